"""Plans: what XLA says is counted right, and steps are those that stages make."""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DIGITS, digits_command, png, use_simple_network, use_two_devices

import dtrak_jax as dtrak
from dtrak_jax import cli, data, models, parallel, pipeline, planning, training
from dtrak_jax.attribution import conjugate, ekfac, linalg, whole
from dtrak_jax.config import ModelConfig, QueriesConfig
from dtrak_jax.diffusion import sampling
from dtrak_jax.evaluation import outputs
from dtrak_jax.features import gradients, output_programs, passes, products
from dtrak_jax.features.microbatches import Microbatch
from dtrak_jax.parallel import P, Program, sharded
from dtrak_jax.planning import table, work
from dtrak_jax.planning.costs import Cost, collectives, cost
from dtrak_jax.planning.programs import Planned
from dtrak_jax.planning.topology import Chip
from dtrak_jax.run import Run

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
    "features.draws": "1",
    "features.dim": "64",
    "features.batch-size": "2",
    "ensemble.subsets": "5",
    "ensemble.seeds": "2",
    "ensemble.models": "1",
    "ensemble.timesteps": "4",
    "ensemble.draws": "2",
    "ensemble.batch-size": "10",
}
ALL = {kind: [0, 0] for kind in planning.costs.KINDS}


def array(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def tiny_config(**changes):
    return cli.parse(digits_command("run", "none", FLAGS, changes))[1]


def on_devices(function, devices, *arguments):
    """A program of replicated arguments."""
    mesh = parallel.mesh(jax.devices()[:devices])
    return Program(sharded(function, mesh, P(), P()), arguments, mesh)


def planned(config, topology=None):
    """{name: step} of all stages, without compiling anything."""
    topology = topology or planning.find(None)
    return {
        step.name: step
        for stage in pipeline.STAGES
        if stage.programs
        for step in stage.programs(Run(config, None), topology)
    }


# Costs of a program


def test_bodies_of_loops_are_counted_for_every_trip():
    """XLA's own count does not grow with the number of trips."""

    def looped(trips):
        def program(a, b):
            a = jax.lax.scan(lambda c, _: (c @ b, None), a, None, length=trips)[0]
            return jax.lax.fori_loop(
                0, 2, lambda i, c: jax.lax.fori_loop(0, trips, lambda j, d: d @ b, c), a
            )

        return on_devices(program, 1, array(N, N), array(N, N))

    def counted(trips):
        program = looped(trips)
        lowered = program.function.lower(*program.arguments)
        return lowered.compile().cost_analysis()["flops"]

    assert counted(20) == counted(5)
    product = 2 * N**3
    costs = {trips: cost(looped(trips)) for trips in (5, 20)}
    for trips, looped_cost in costs.items():
        # Beside the products there are the loops' counters.
        assert looped_cost.flops == pytest.approx(3 * trips * product, rel=1e-3)
        assert looped_cost.passes == looped_cost.flops
    assert costs[20].bytes > 3 * costs[5].bytes


def test_collectives_in_loops_are_counted_for_every_trip():
    def program(a):
        return jax.lax.scan(
            lambda c, _: (jax.lax.psum(c, "data") / 8, None), a, None, length=7
        )[0]

    exchanged = cost(on_devices(program, 8, array(N, N))).collectives
    assert exchanged == ALL | {"all-reduce": [7, 7 * 4 * N * N]}


def test_what_was_compiled_is_found_again_for_any_host(tmp_path):
    """And not for other programs, or other arrangements of devices."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))

    def account(devices, factor=2.0):
        """The cost, and the number of accounts that are kept."""
        mesh = parallel.mesh(devices)
        function = sharded(lambda a: factor * a, mesh, P("data"), P("data"))
        program = Program(function, (array(N),), mesh)
        return cost(program), len(list(tmp_path.glob("plan-*.json")))

    try:
        devices = jax.devices()
        first, count = account(devices[:4])
        assert account(devices[4:]) == (first, count) == (first, 1)
        assert account(devices[:4], factor=3.0)[1] == 2
        assert account(devices)[1] == 3
        assert account(devices[:4][::-1])[1] == 4
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)


def test_a_loop_of_unknown_length_is_refused():
    def program(a):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: c + 1, a)

    with pytest.raises(ValueError, match="no fixed number of trips"):
        cost(on_devices(program, 1, array(N)))


def test_products_at_highest_precision_take_six_passes():
    def program(a, b):
        def add(c, _):
            return c + jnp.matmul(a, b, precision="highest"), None

        return jax.lax.scan(add, a @ b, None, length=4)[0]

    total = cost(on_devices(program, 1, array(N, N), array(N, N)))
    product = 2 * N**3
    assert total.passes - total.flops == 5 * 4 * product


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
    assert collectives(text) == ALL | {"all-reduce": [1, 74], "all-gather": [2, 72]}


def test_arithmetic_of_gradients_is_that_of_the_formula():
    """Three products for every layer but the first, whose inputs need no gradient.

    Whether every image has its own gradient or all have one together.
    """
    wide, slots = 32, 8
    sizes = [(1, wide), (wide, wide), (wide, 1)]
    params = [array(1, 1, *size) for size in sizes]

    def apply(params, x, t, cond):
        for weight in params:
            x = jax.lax.conv_general_dilated(
                x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return x

    task = dtrak.Task(apply, dtrak.linear_schedule(), timesteps=1)
    mesh = parallel.mesh(jax.devices()[:1])
    function = gradients.gradient_function(task, mesh)

    def flops(images, copies):
        microbatch = Microbatch(
            x=array(images, 1, 8, 8, 1),
            words=array(images, 2, dtype=np.uint32),
            position=array(images, dtype=np.int32),
            pair=array(images, copies, dtype=np.int32),
            weight=array(images, copies),
            cond=None,
        )
        return cost(Program(function, (params, None, {}, microbatch), mesh)).flops

    layers = [2 * 64 * a * b for a, b in sizes]
    expected = slots * (3 * sum(layers) - layers[0])
    assert flops(slots, 1) == pytest.approx(expected, rel=0.1)
    assert flops(1, slots) == pytest.approx(expected, rel=0.1)


def test_the_gram_matrix_is_shared_by_devices_and_added_up_once():
    program, calls = linalg.gram_program(N, 8 * N, jax.devices())
    assert calls == 1
    total = cost(program)
    assert total.flops == pytest.approx(2 * N**3, rel=0.05)
    assert total.passes - total.flops == 5 * 2 * N**3
    assert total.collectives == ALL | {"all-reduce": [1, 4 * N * N]}
    assert total.memory >= 4 * (3 * N * N)


# A plan


@pytest.fixture(scope="module")
def tiny_plan(tmp_path_factory):
    """(text, JSON) of `dtrak-jax plan` for a tiny run on eight devices.

    It needs no run directory and no data.
    """

    def refuse(*_):
        raise AssertionError("a plan read data")

    output = tmp_path_factory.mktemp("plan") / "plan.json"
    line = digits_command("plan", "none", FLAGS, {})
    at = line.index("--workdir")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(data, "load", refuse)
        cli.main([*line[:at], *line[at + 2 :], "--output", str(output)])
    return said.getvalue(), json.loads(output.read_text())


@pytest.fixture
def rows(tiny_plan):
    """{step: row} of that plan."""
    return {row["stage"]: row for row in tiny_plan[1]["stages"]}


@pytest.fixture(scope="module")
def p():
    """The number of parameters of that run."""
    model = models.build(tiny_config().model)
    shapes = jax.eval_shape(models.init_fn(model), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_a_plan_says_what_it_does_not_know(tiny_plan, rows):
    said, saved = tiny_plan
    assert "the devices at hand: 8 x cpu" in said
    assert "no hours" in said
    assert "planned, not measured" in said
    assert saved["versions"]["jax"] == jax.__version__
    assert list(rows) == [
        *("train", "sample", "retrain", "train models", "measure", "featurize train"),
        *("featurize validation", "featurize generated", "attribute"),
    ]
    assert all(row["seconds"] is None for row in rows.values())
    useful = [row["useful"] for row in rows.values() if row["useful"] is not None]
    assert len(useful) == 3
    assert all(0.3 < share < 1.2 for share in useful)


def test_only_training_and_the_gram_matrix_have_collectives(rows, p):
    assert {name for name, row in rows.items() if row["collectives"]} == {
        "train",
        "attribute",
    }
    # The gradient, and a few numbers; XLA adds up only once what is equal, such as the
    # gradients of two biases whose outputs are added.
    ((kind, (_, size)),) = rows["train"]["collectives"].items()
    assert kind == "all-reduce"
    assert 0.99 < size / (4 * p) < 1.01


def test_memory_holds_what_must_be_there(rows, p):
    size = 4 * p
    # Parameters, and two gradients a slot of the batch before and of this one.
    assert rows["featurize train"]["memory"] > size + 2 * (2 * 2 * size)
    assert rows["train"]["memory"] > 3 * size
    assert rows["train"]["stored"] == pytest.approx(4 * 3 * size, rel=0.01)
    assert rows["retrain"]["stored"] == 10 * size


def shapes(arguments):
    return str(jax.tree.map(np.shape, arguments))


class Counted:
    """A compiled function that counts its calls by the shapes of their arguments."""

    def __init__(self, function):
        self.function, self.calls = function, collections.Counter()

    def __call__(self, *arguments):
        self.calls[shapes(arguments)] += 1
        return self.function(*arguments)

    def __getattr__(self, name):
        return getattr(self.function, name)


MAKERS = (
    (training.programs, "step_function"),
    (training.programs, "member_step_function"),
    (sampling, "step_function"),
    (gradients, "gradient_function"),
    (gradients, "projection_function"),
    (linalg, "gram_function"),
    (output_programs, "gradients_function"),
    (output_programs, "add_function"),
    (passes, "factors_function"),
    (passes, "eigenvalues_function"),
    (ekfac, "divide_function"),
    (conjugate, "begin_function"),
    (conjugate, "advance_function"),
    (products, "products_function"),
    (whole, "product_function"),
    (outputs, "losses_function"),
)
"""The functions that make compiled ones."""


def test_stages_call_what_is_planned_and_as_often(tmp_path, monkeypatch):
    """Every call of a run, counted in the very functions that a plan compiles, with
    arrays of the shapes that it compiles them for."""
    use_two_devices(monkeypatch)
    use_simple_network(monkeypatch)
    for module, name in MAKERS:
        make = getattr(module, name)
        counted = functools.cache(lambda *args, make=make: Counted(make(*args)))
        monkeypatch.setattr(module, name, counted)
    monkeypatch.setattr(pipeline, "measure_distortion", lambda run: None)
    # Two devices train them together.
    changes = {
        "ensemble__models": "2",
        "attribution__methods": "dtrak trak trak-layers ekfac gauss-newton "
        "gauss-newton-cg",
        "attribution__ggn_iterations": "2",
        "attribution__ggn_tolerance": "0",
        "attribution__ggn_images": "31",
    }
    line = digits_command("run", tmp_path / "run", FLAGS, changes)
    _, config, _ = cli.parse(line)
    expected = collections.defaultdict(collections.Counter)
    for step in planned(config).values():
        for program, calls in step.calls:
            expected[program.function][shapes(program.arguments)] += calls
    for stage in ("retrain", "attribute"):
        pipeline.run(stage, config, tmp_path / "run")
    assert {function: function.calls for function in expected} == expected
    assert len(expected) == 20


def test_processes_share_the_steps_of_all_stages_but_training(monkeypatch):
    """Eight devices of four processes, by what their devices say."""
    use_simple_network(monkeypatch)
    config = cli.load_config(str(DIGITS))

    class Four(planning.Topology):
        local = property(lambda self: list(self.devices))
        processes = 4

    alone = planned(config)
    shared = planned(config, Four("four", tuple(jax.devices())))
    assert alone.keys() == shared.keys()
    for name, step in alone.items():
        (_, calls), (_, fewer) = step.calls[-1], shared[name].calls[-1]
        if name in ("train", "sample", "attribute"):
            assert fewer == calls
        else:
            assert calls / 4 <= fewer <= calls / 4 + max(calls / 8, 5)


def test_a_model_and_queries_that_are_given_take_no_programs(tmp_path, monkeypatch):
    use_simple_network(monkeypatch)
    config = tiny_config()
    given = dataclasses.replace(config, model=ModelConfig(folder="given"))
    monkeypatch.setattr(models, "resolve", lambda settings: config.model)
    assert "train" not in planned(given)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(np.full((8, 8), i, np.uint8)))
    queries = QueriesConfig(folder=str(tmp_path))
    given = dataclasses.replace(given, queries=queries)
    steps = planned(given)
    assert steps.keys() == planned(config).keys() - {"train", "sample"}
    assert steps["measure"].written == 8 * 10 * (5 + 3)
    run = Run(given, None)
    assert work.passes(run)["train"] == work.passes(run)["sample"] == 0
    assert work.describe("featurize", run) == "gradients of 38 images"


def test_work_is_counted_in_passes():
    """A backward pass is two: 3 for a training image, 5 for its two measurements."""
    run = Run(tiny_config(), None)
    train, images, passes = 3 * 12 * 64, 30 + 5 + 20, work.passes(run)
    assert passes["train"] == train
    assert passes["sample"] == 20 * 3
    assert passes["featurize"] == 5 * 3 * images
    assert passes["retrain"] == 10 * train / 2 + train + 10 * 25 * 4 * 2
    assert passes["attribute"] == 0
    matrices = Run(tiny_config(attribution__methods="gauss-newton"), None)
    assert work.passes(matrices)["attribute"] == (8 + 2 * 16) * 3 * 30
    curved = Run(tiny_config(attribution__methods="ekfac"), None)
    ekfac_passes = work.passes(curved)["attribute"]
    assert ekfac_passes == 3 * 3 * images + 6 * 3 * 30
    changes = {"ggn_iterations": "4", "ggn_images": "10"}
    changes = {f"attribution__{name}": value for name, value in changes.items()}
    searched = Run(tiny_config(attribution__methods="gauss-newton-cg", **changes), None)
    # Four iterations for 25 queries, of ten noised images.
    searching = 4 * 4 * 25 * 10
    assert work.passes(searched)["attribute"] == ekfac_passes + searching
    # Features by layer are of queries alone.
    weighed = Run(tiny_config(attribution__methods="trak-layers"), None)
    assert work.passes(weighed)["featurize"] == 5 * 3 * (images + 5 + 20)
    probed = Run(tiny_config(attribution__methods="trak das"), None)
    expected = 5 * 3 * images + (1 + 2 * 8) * 3 * (5 + 20)
    assert work.passes(probed)["featurize"] == expected
    assert work.passes(probed)["attribute"] == (8 + 2 * 16) * 3 * 30
    assert work.describe("train", run) == "12 steps of 64 images"
    assert work.describe("retrain", run) == "5 x 2 models of 6 steps, 1 of 12"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 second"), (75, "75 seconds"), (120, "2 minutes"), (9000, "2.5 hours")],
)
def test_a_duration_in_words(seconds, words):
    assert work.duration(seconds) == words


# A row


def program(devices=1):
    return on_devices(lambda: 0, devices)


def test_hours_are_at_the_slower_of_arithmetic_and_bytes():
    chip = Chip(memory=1000, flops=100.0, bandwidth=10.0)
    costs = [
        Cost(600, 0, 200.0, 400.0, 10.0, {"all-reduce": [1, 8]}),
        Cost(500, 0, 100.0, 100.0, 50.0, {"all-reduce": [0, 0]}),
    ]
    a, b = program(), program()
    step = Planned("featurize", "", [(a, 6), (b, 2)], 0, 0, True, plain=(a, 5))
    assert step.programs == [a, b, a]
    costs.append(costs[0])
    row = table.total(step, costs, chip)
    assert row.steps == 2
    # Arithmetic takes 4 s and bytes 1 s; then 1 s and 5 s.
    assert row.seconds == 6 * 4 + 2 * 5
    assert row.flops == (6 * 200 + 2 * 100) / 2
    assert row.useful == 5 * 200 / (6 * 200 + 2 * 100)
    assert row.collectives == {"all-reduce": [3, 24]}
    assert row.memory == 1100
    assert row.fits is False
    alone = step._replace(overlapping=False)
    assert table.total(alone, costs, chip).fits is True
    assert table.total(step, costs, None).fits is None


def test_what_the_compiler_refuses_does_not_fit():
    refused = Cost(5 * 2**30, 0, None, None, None, None)
    step = Planned("train", "", [(program(), 3)], 0, 0)
    row = table.total(step, [refused], Chip(9 * 2**30, 1.0, 1.0))
    assert row.fits is False
    assert row.seconds is None
    assert row.flops is None
    assert "NO" in table.as_text([row], planning.find(None))


def test_some_stages():
    topology, config = planning.find(None), tiny_config()
    rows = planning.plan(pipeline.STAGES, config, topology, ["attribute"])
    assert [row.stage for row in rows] == ["attribute"]
    with pytest.raises(ValueError, match="--stages is 'featurise'.*'featurize'"):
        planning.plan(pipeline.STAGES, config, topology, ["train", "featurise"])


# Slices


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
    code = "from dtrak_jax import planning; print(planning.find('v6e:2x4'))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "v6e:2x4: 8 x TPU v6 lite, 2 processes\n"
    assert done.stderr == ""


@needs_libtpu
def test_compiles_for_a_tpu_that_is_not_there():
    """Loops, arithmetic and collectives are counted there as they are here."""
    topology = planning.find("v5e:2x4")
    assert len(topology.devices) == 8
    assert topology.processes == 2
    assert topology.chip.memory == 16 * 2**30
    mesh = parallel.mesh(topology.devices)
    wide = 256

    def program(a, b):
        return jax.lax.fori_loop(0, 5, lambda i, c: jax.lax.psum(c @ b, "data") / 8, a)

    arguments = array(8 * wide, wide), array(wide, wide)
    specs = (P("data"), P()), P("data")
    total = cost(Program(sharded(program, mesh, *specs), arguments, mesh))
    assert total.flops == pytest.approx(5 * 2 * wide**3, rel=0.02)
    count, size = total.collectives["all-reduce"]
    assert total.collectives == ALL | {"all-reduce": [count, size]}
    assert count == 5
    assert size == pytest.approx(5 * 4 * wide**2, rel=0.51)
    assert total.memory >= 3 * 4 * wide**2


@needs_libtpu
def test_a_host_of_a_large_v5e_slice_has_no_programs():
    """XLA has some for all chips or for one."""
    mesh = parallel.mesh(planning.find("v5e:4x8").local)
    function = sharded(lambda a: a + 1, mesh, P("data"), P("data"))
    with pytest.raises(ValueError, match="no program for 4 chips.*--stages that run"):
        cost(Program(function, (array(N),), mesh))
