"""Plans: what XLA says is counted right, and steps are those that stages make."""

import collections
import json
import os
import platform
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DIGITS, digits_command

import dtrak_jax as dtrak
from dtrak_jax import cli, data, models, parallel, planning
from dtrak_jax.attribution import solver
from dtrak_jax.diffusion import sampling
from dtrak_jax.evaluation import outputs
from dtrak_jax.features import gradients
from dtrak_jax.parallel import P, over_mesh
from dtrak_jax.planning import table
from dtrak_jax.planning.costs import Cost, Program, collectives, cost
from dtrak_jax.planning.stages import Stage, stages_of
from dtrak_jax.planning.topology import Chip
from dtrak_jax.training import ensemble
from dtrak_jax.training import loop as training_loop

needs_libtpu = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="there is no libtpu for this platform",
)
N = 64
FLAGS = {
    "data.train": "30",
    "data.validation": "5",
    # Little to compile.
    "model.block-out-channels": "4",
    "model.down-block-types": "DownBlock2D",
    "model.up-block-types": "UpBlock2D",
    "model.norm-num-groups": "2",
    "model.no-add-attention": "",
    "train.steps": "12",
    "train.save-every": "5",
    "sample.count": "20",
    "sample.steps": "3",
    "sample.batch-size": "2",
    "features.timesteps": "100 300 500",
    "features.dim": "64",
    "features.batch-size": "2",
    "ensemble.subsets": "5",
    "ensemble.seeds": "2",
    "ensemble.timesteps": "4",
    "ensemble.draws": "2",
    "ensemble.batch-size": "10",
}


def square(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def tiny_config(tmp_path, **changes):
    line = digits_command("run", tmp_path, FLAGS, changes)
    return cli.parse(line)[1]


@pytest.fixture(scope="module")
def p(tmp_path_factory):
    """The number of parameters of that run."""
    model = models.build(tiny_config(tmp_path_factory.mktemp("p")).model)
    shapes = jax.eval_shape(models.init_fn(model), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def on_devices(function, devices, *arguments):
    mesh = parallel.mesh(jax.devices()[:devices])
    return Program(over_mesh(function, mesh, P(), P()), arguments, mesh)


def test_bodies_of_loops_are_counted_for_every_trip():
    """XLA's own count does not grow with the number of trips."""

    def looped(trips):
        def program(a, b):
            a = jax.lax.scan(lambda c, _: (c @ b, None), a, None, length=trips)[0]
            return jax.lax.fori_loop(
                0, 2, lambda i, c: jax.lax.fori_loop(0, trips, lambda j, d: d @ b, c), a
            )

        return on_devices(program, 1, square(N, N), square(N, N))

    def counted(trips):
        program = looped(trips)
        lowered = program.function.lower(*program.arguments)
        return lowered.compile().cost_analysis()["flops"]

    assert counted(20) == counted(5)
    product = 2 * N**3
    costs = {trips: cost(looped(trips)) for trips in (5, 20)}
    for trips, one in costs.items():
        # Beside the products there are the loops' counters.
        assert one.flops == pytest.approx(3 * trips * product, rel=1e-3)
        assert one.passes == one.flops
    assert costs[20].bytes > 3 * costs[5].bytes


def test_collectives_in_loops_are_counted_for_every_trip():
    def program(a):
        return jax.lax.scan(
            lambda c, _: (jax.lax.psum(c, "data") / 8, None), a, None, length=7
        )[0]

    found = cost(on_devices(program, 8, square(N, N))).collectives
    assert found == {"all-reduce": [7, 7 * 4 * N * N]}


def test_what_was_compiled_is_found_again_for_any_host(tmp_path, monkeypatch):
    """And not for other programs, or other arrangements of devices."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compiled = collections.Counter()
    account = planning.costs._account

    def counting(lowered):
        compiled["all"] += 1
        return account(lowered)

    monkeypatch.setattr(planning.costs, "_account", counting)

    def found(devices, factor=2.0):
        mesh = parallel.mesh(devices)
        function = over_mesh(lambda a: factor * a, mesh, P("data"), P("data"))
        return cost(Program(function, (square(N),), mesh)), compiled["all"]

    try:
        devices = jax.devices()
        first, count = found(devices[:4])
        assert found(devices[4:]) == (first, count) == (first, 1)
        assert found(devices[:4], factor=3.0)[1] == 2
        assert found(devices)[1] == 3
        assert found(devices[:4][::-1])[1] == 4
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)


def test_a_loop_of_unknown_length_is_refused():
    def program(a):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: c + 1, a)

    with pytest.raises(ValueError, match="no fixed number of trips"):
        cost(on_devices(program, 1, square(N)))


def test_products_at_highest_precision_take_six_passes():
    def program(a, b):
        def add(c, _):
            return c + jnp.matmul(a, b, precision="highest"), None

        return jax.lax.scan(add, a @ b, None, length=4)[0]

    one = cost(on_devices(program, 1, square(N, N), square(N, N)))
    product = 2 * N**3
    assert one.passes - one.flops == 5 * 4 * product


def test_collectives_of_a_programs_text():
    text = """
  %all-reduce.1 = (f32[3,5]{1,0}, bf16[7]{0}) all-reduce(%a, %b), channel_id=1
  %ag = f32[16]{0} all-gather-start(%c), dimensions={0}
  %done = f32[16]{0} all-gather-done(%ag)
  %own = f32[16]{0} all-reduce(%c), replica_groups={{0},{1}}, to_apply=%add
  %own2 = f32[16]{0} all-reduce(%c), replica_groups=[8,1]<=[8], to_apply=%add
  %own3 = f32[16]{0} all-reduce(%c), replica_groups=mesh['a'=4,'b'=1] {'b'}, to=%add
  %two = f32[2]{0} all-gather(%c), replica_groups=mesh['a'=4,'b'=1] {'a','b'}, d={0}
  ROOT %x = f32[] add(%all-reduce.1, %all-gather.2)
"""
    assert collectives(text) == {"all-reduce": [1, 74], "all-gather": [2, 72]}


def test_arithmetic_of_gradients_is_that_of_the_formula():
    """Three products for every layer but the first, whose inputs need no gradient.

    Whether every image has its own gradient or all have one together.
    """
    wide, slots = 32, 8
    sizes = [(1, wide), (wide, wide), (wide, 1)]
    params = [square(1, 1, *size) for size in sizes]

    def apply(params, x, t, cond):
        for kernel in params:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return x

    task = dtrak.Task(apply, dtrak.linear_schedule(), timesteps=1)
    mesh = parallel.mesh(jax.devices()[:1])
    function = gradients.gradient_function(task, mesh)

    def flops(images, copies):
        slots = gradients.Slots(
            x=square(images, 1, 8, 8, 1),
            words=jax.ShapeDtypeStruct((images, 2), np.uint32),
            position=jax.ShapeDtypeStruct((images,), np.int32),
            pair=jax.ShapeDtypeStruct((images, copies), np.int32),
            weight=square(images, copies),
            cond=None,
        )
        return cost(Program(function, (params, {}, slots), mesh)).flops

    layers = [2 * 64 * a * b for a, b in sizes]
    expected = slots * (3 * sum(layers) - layers[0])
    assert flops(slots, 1) == pytest.approx(expected, rel=0.1)
    assert flops(1, slots) == pytest.approx(expected, rel=0.1)


def test_the_gram_matrix_is_shared_by_devices_and_added_up_once():
    mesh = parallel.mesh(jax.devices())
    program = Program(
        solver._gram_function(mesh), (square(N, N), square(N, 8 * N)), mesh
    )
    one = cost(program)
    assert one.flops == pytest.approx(2 * N**3, rel=0.05)
    assert one.passes - one.flops == 5 * 2 * N**3
    assert one.collectives == {"all-reduce": [1, 4 * N * N]}
    assert one.memory >= 4 * (3 * N * N)


@pytest.fixture(scope="module")
def tiny_plan(tmp_path_factory):
    """{stage: row} of a tiny run on eight devices."""
    config = tiny_config(tmp_path_factory.mktemp("plan"))
    return {row.stage: row for row in planning.plan(config, planning.find(None))}


def test_only_training_and_the_gram_matrix_have_collectives(tiny_plan, p):
    with_some = {name for name, row in tiny_plan.items() if row.collectives}
    assert with_some == {"train", "attribute"}
    # The gradient, the loss, the number of examples, and whether to stop; XLA adds up
    # only once what is equal, such as the gradients of two biases whose outputs are added.
    ((kind, (_, size)),) = tiny_plan["train"].collectives.items()
    assert kind == "all-reduce"
    assert 0.99 < size / (4 * (p + 3)) <= 1


def test_memory_holds_what_must_be_there(tiny_plan, p):
    size = 4 * p
    # Parameters, and two gradients a slot of the batch before and of this one.
    assert tiny_plan["featurize train"].memory > size + 2 * (2 * 2 * size)
    assert tiny_plan["train"].memory > 3 * size
    assert tiny_plan["train"].stored == pytest.approx(4 * 3 * size, rel=0.01)
    assert tiny_plan["retrain"].stored == 10 * size


def test_steps_are_those_that_the_stages_make(tmp_path, monkeypatch):
    """Every call of every compiled function of a whole run, counted."""
    config = tiny_config(tmp_path / "run")
    made = collections.Counter()

    def counted(name, function):
        def call(*arguments):
            made[name] += 1
            return function(*arguments)

        return call

    def count(module, maker, name, pick=None):
        make = getattr(module, maker)

        def counting(*arguments):
            found = make(*arguments)
            if pick is None:
                return counted(name, found)
            return counted(name, found[0]), *found[1:]

        monkeypatch.setattr(module, maker, counting)

    planned = collections.Counter()
    for stage in stages_of(config, planning.find(None)):
        name = stage.name.partition(" ")[0]
        for i, (_, calls) in enumerate(stage.calls):
            planned[f"{name} {i}"] += calls
    count(training_loop, "_compile", "train 0")
    count(sampling, "_step_function", "sample 0")
    count(gradients, "gradient_function", "featurize 0")
    count(gradients, "projection_function", "featurize 1")
    count(solver, "_gram_function", "attribute 0")
    count(ensemble, "_compile", "retrain 0", pick=0)
    count(outputs, "_losses", "measure 0")
    monkeypatch.setattr(dtrak.pipeline, "distortion", lambda *a, **k: {})
    for stage in ("train", "sample", "featurize", "attribute", "retrain"):
        cli.main(digits_command(stage, tmp_path / "run", FLAGS, {}))
    assert made == planned


def test_processes_share_the_steps_of_all_stages_but_training():
    """Eight devices of four processes, by what their devices say."""
    config = runpy.run_path(str(DIGITS))["get_config"]()
    alone = stages_of(config, planning.find(None))

    class Four(planning.Topology):
        local = property(lambda self: list(self.devices))
        processes = 4

    shared = stages_of(config, Four("four", tuple(jax.devices())))
    for one, four in zip(alone, shared, strict=True):
        (_, steps), (_, fewer) = one.calls[-1], four.calls[-1]
        if one.name in ("train", "sample", "attribute"):
            assert fewer == steps
        else:
            assert steps / 4 <= fewer <= steps / 4 + max(steps / 8, 5)


def test_hours_are_at_the_slower_of_arithmetic_and_bytes():
    chip = Chip(memory=1000, flops=100.0, bandwidth=10.0)
    costs = {
        1: Cost(600, 0, 200.0, 400.0, 10.0, {"all-reduce": [1, 8]}),
        2: Cost(500, 0, 100.0, 100.0, 50.0, {}),
    }
    programs = {id(p): p for p in (object(), object())}
    (a, b), ids = programs.values(), dict(zip(programs, (1, 2), strict=True))
    costs = {i: costs[n] for i, n in ids.items()}
    stage = Stage("featurize", "", [(a, 6), (b, 2)], 4, True, 0, 0, plain=(a, 5))
    row = planning.row(stage, costs, chip)
    assert row.steps == 2
    # Arithmetic takes 4 s and bytes 1 s; then 1 s and 5 s.
    assert row.seconds == 6 * 4 + 2 * 5
    assert row.flops == (6 * 200 + 2 * 100) / 2
    assert row.useful == 5 * 200 / (6 * 200 + 2 * 100)
    assert row.collectives == {"all-reduce": [3, 24]}
    assert row.memory == 1100 and row.fits is False
    assert planning.row(stage._replace(together=False), costs, chip).fits is True
    assert planning.row(stage, costs, None).fits is None


def test_what_the_compiler_refuses_does_not_fit():
    refused = Cost(5 * 2**30, 0, None, None, None, {})
    stage = Stage("train", "", [("program", 3)], 4, False, 0, 0)
    row = planning.row(
        stage, {id(stage.calls[0][0]): refused}, Chip(9 * 2**30, 1.0, 1.0)
    )
    assert row.fits is False
    assert row.seconds is None and row.flops is None
    assert "NO" in table.as_text([row], planning.find(None))


def test_command(tmp_path, capsys, monkeypatch):
    """Needs no run directory and no data, and says what it does not know."""

    def refuse(*_):
        raise AssertionError("a plan read data")

    monkeypatch.setattr(data, "load", refuse)
    line = digits_command("plan", tmp_path, FLAGS, {})
    at = line.index("--workdir")
    output = tmp_path / "plan.json"
    cli.main([*line[:at], *line[at + 2 :], "--output", str(output)])
    said = capsys.readouterr().out
    assert "the devices at hand: 8 x cpu" in said
    assert "no hours" in said and "planned, not measured" in said
    saved = json.loads(output.read_text())
    assert saved["versions"]["jax"] == jax.__version__
    names = [row["stage"] for row in saved["stages"]]
    assert names == [
        *("train", "sample", "featurize train", "featurize validation"),
        *("featurize generated", "attribute", "retrain", "measure"),
    ]
    assert all(row["seconds"] is None for row in saved["stages"])
    useful = [row["useful"] for row in saved["stages"] if row["useful"] is not None]
    assert len(useful) == 3 and all(0.3 < share < 1.2 for share in useful)


def test_some_stages(tmp_path):
    topology = planning.find(None)
    config = tiny_config(tmp_path)
    rows = planning.plan(config, topology, ["attribute"])
    assert [row.stage for row in rows] == ["attribute"]
    with pytest.raises(ValueError, match="--stages is 'featurise'.*'featurize'"):
        planning.plan(config, topology, ["train", "featurise"])


@pytest.mark.parametrize(
    "name",
    ["v9:2x2", "v5e", pytest.param("v5e:3x3", marks=needs_libtpu), "v5e:2x4x4"],
)
def test_unknown_topology(name):
    with pytest.raises(ValueError, match=f"--topology is '{name}'.*v5e:2x2 to 16x16"):
        planning.find(name)


def test_without_libtpu_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", str(DIGITS), "--topology", "v5e:2x4"])
    assert stopped.value.code == 2
    assert 'pip install "dtrak-jax[plan]"' in capsys.readouterr().err


def test_flags_of_a_plan_are_refused_elsewhere(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main([*digits_command("run", tmp_path, {}, {}), "--stages", "train"])
    assert "for `dtrak-jax plan`" in capsys.readouterr().err


@needs_libtpu
def test_nothing_is_said_of_a_tpu_that_is_not_wanted():
    """Libtpu prints errors where it is not told what no machine without a TPU knows."""
    code = "from dtrak_jax import planning; print(planning.find('v6e:2x4').described)"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "8 x TPU v6 lite, 2 processes\n"
    assert done.stderr == ""


@needs_libtpu
def test_sketches_compile_for_a_tpu():
    """Of so many gradients a slice with strides finds too little memory on the chip."""
    mesh = parallel.mesh(planning.find("v5e:2x4").local)
    parts = [square(16 * mesh.size, size) for size in (1_179_648, 256)]
    function = gradients.projection_function(dtrak.Projection(dim=4096), mesh)
    one = cost(Program(function, ({"square": parts},), mesh))
    assert one.collectives == {}
    # Every entry is read, and multiplied by its sign and added, about once.
    assert 1 < one.flops / (16 * 1_179_904) < 10
    assert one.bytes > 4 * 16 * 1_179_904


@needs_libtpu
def test_compiles_for_a_tpu_that_is_not_there():
    """Loops, arithmetic and collectives are counted there as they are here."""
    topology = planning.find("v5e:2x4")
    assert len(topology.devices) == 8 and topology.processes == 2
    assert topology.chip.memory == 16 * 2**30
    mesh = parallel.mesh(topology.devices)
    wide = 256

    def program(a, b):
        return jax.lax.fori_loop(0, 5, lambda i, c: jax.lax.psum(c @ b, "data") / 8, a)

    arguments = square(8 * wide, wide), square(wide, wide)
    specs = (P("data"), P()), P("data")
    one = cost(Program(over_mesh(program, mesh, *specs), arguments, mesh))
    assert one.flops == pytest.approx(5 * 2 * wide**3, rel=0.02)
    ((kind, (count, size)),) = one.collectives.items()
    assert kind == "all-reduce"
    assert count == 5 and size == pytest.approx(5 * 4 * wide**2, rel=0.51)
    assert one.memory >= 3 * 4 * wide**2


@needs_libtpu
def test_a_host_of_a_large_v5e_slice_has_a_program_for_each_device():
    """There is none for its four devices together; see `parallel.over_mesh`."""
    mesh = parallel.mesh(planning.find("v5e:4x8").local)
    function = over_mesh(lambda a, b: a @ b, mesh, (P("data"), P()), P("data"))
    arguments = square(4 * N, N), square(N, N)
    assert function.eval_shape(*arguments).shape == (4 * N, N)
    one = cost(Program(function, arguments, mesh))
    assert one.flops == pytest.approx(2 * N**3, rel=0.05)
    assert one.collectives == {}
