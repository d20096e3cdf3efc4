"""Features equal a plain loop of jax.grad, whatever the batches and the devices."""

import dataclasses
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax.digests import digest_rows, named_leaves
from dtrak_jax.features import Store, gradients, microbatches
from dtrak_jax.features.fingerprint import example_hashes
from dtrak_jax.features.measurements import FUNCTIONS
from dtrak_jax.features.projection import project_all
from dtrak_jax.features.task import REFERENCE_SHARD
from dtrak_jax.rng import id_words

SCHEDULE = dtrak.linear_schedule()
RAW = dtrak.Projection("none")
IDS = tuple(f"image-{i}" for i in range(12))


def close(a, b, tolerance=1e-5):
    """Asserts that a and b are equal to float32 rounding of the largest entry."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def task_of(network, **changes):
    settings = {"measurement": ("square", "loss"), "timesteps": (0, 150, 600)}
    return dtrak.Task(network[0], SCHEDULE, **settings | changes)


def net(params, x, t, cond):
    """A network that compiles in no time, for what does not depend on the network."""
    hidden = jnp.tanh(jnp.einsum("bhwc,hwcd->bd", x, params["in"]))
    return jnp.einsum("bd,hwcd->bhwc", hidden, params["out"]) + params["scale"] * x


@pytest.fixture(scope="module")
def small():
    """(net, its parameters); stands in for `tiny`."""
    rng = np.random.default_rng(3)
    w = rng.normal(size=(2, 8, 8, 1, 6)).astype(np.float32) / 8
    return net, {"in": w[0], "out": w[1], "scale": np.ones((1, 1, 1, 1), np.float32)}


def one_by_one(task, params, images, ids=IDS):
    """{measurement: gradients [T, n, p]} by jax.grad, one image at a time."""
    leaves, treedef = jax.tree.flatten(params)
    words = id_words(ids)

    def value(flat_leaves, x, eps, t, measure):
        alpha_bar = jnp.cumprod(1 - jnp.asarray(SCHEDULE.betas))[t]
        x_t = jnp.sqrt(alpha_bar) * x + jnp.sqrt(1 - alpha_bar) * eps
        params = treedef.unflatten(flat_leaves)
        prediction = task.apply(params, x_t[None], jnp.array([t]), None)[0]
        return measure(prediction, eps, t, SCHEDULE)

    gradient = jax.jit(jax.grad(value), static_argnums=4)

    def flat_gradient(measure, j, i):
        eps = task.eps(j, words[i], np.int32(i), images[i].shape)
        parts = gradient(leaves, images[i], eps, task.pairs[j][0], measure)
        return np.concatenate([np.ravel(part) for part in parts])

    return {
        name: np.array(
            [
                [flat_gradient(measure, j, i) for i in range(len(images))]
                for j in range(len(task.pairs))
            ]
        )
        for name, measure in task.measurements.items()
    }


@pytest.fixture(scope="module")
def exact(small, images):
    return one_by_one(task_of(small), small[1], images[:5])


def test_sharded_features_equal_a_loop_of_grad(tiny, images):
    """On eight devices; automatic sharding of vmapped convolutions gets this wrong."""
    task = task_of(tiny, timesteps=(0, 600))
    features = dtrak.featurize(
        task, tiny[1], images[:5], RAW, ids=IDS[:5], batch_size=1
    )
    for name, gradient in one_by_one(task, tiny[1], images[:5]).items():
        close(features[name], gradient)
        close(features[name].squared_norms, np.sum(gradient**2, axis=-1), 2e-5)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_averaging_is_the_mean_over_pairs(small, images, exact, batch_size):
    """Also where the pairs of an example do not fit in one batch."""
    task = task_of(small, per_timestep=False)
    features = dtrak.featurize(
        task, small[1], images[:5], RAW, ids=IDS[:5], batch_size=batch_size
    )
    for name, gradient in exact.items():
        close(features[name], gradient.mean(axis=0))
    assert features["loss"].losses.shape == (3, 5)


def test_projecting_is_linear_and_separate(small, images, exact):
    projection = dtrak.Projection("sketch", dim=100)
    features = dtrak.featurize(
        task_of(small), small[1], images[:5], projection, ids=IDS[:5], batch_size=2
    )
    for name, gradient in exact.items():
        flat = gradient.reshape(-1, gradient.shape[-1])
        ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(small[1])])
        parts = np.split(flat, ends[:-1], axis=1)
        expected = project_all(projection, {name: parts})[name]
        close(features[name], expected.reshape(3, 5, 100))


def test_losses_are_the_training_loss(small, images):
    task = task_of(small)
    features = dtrak.featurize(
        task, small[1], images[:2], dtrak.Projection(dim=8), ids=IDS[:2]
    )
    for j, (t, _) in enumerate(task.pairs):
        eps = task.eps(j, np.zeros(2, np.uint32), 0, images.shape[1:])
        scale = np.float32(SCHEDULE.alpha_bar[t])
        x_t = np.sqrt(scale) * images[:2] + np.sqrt(1 - scale) * eps[None]
        residual = small[0](small[1], x_t, jnp.full(2, t), None) - eps[None]
        close(features["loss"].losses[j], np.mean(residual**2, axis=(1, 2, 3)), 1e-4)


def test_one_measurement_is_not_in_a_dict(small, images):
    arguments = small[1], images[:2], dtrak.Projection(dim=8)
    alone = dtrak.featurize(task_of(small, measurement="loss"), *arguments)
    assert alone.measurement == "loss"
    both = dtrak.featurize(task_of(small, measurement=("loss",)), *arguments)
    close(both["loss"], alone, 0)


@pytest.mark.parametrize("n", [64, 640])
def test_host_memory_is_bounded_by_a_chunk(n, monkeypatch):
    """The largest array handed to the store does not grow with the examples."""
    rows, write = [], Store.write

    def apply(params, x, t, cond):
        return params * x

    def counting(self, chunk, *arrays):
        rows.append(chunk.stop - chunk.start)
        write(self, chunk, *arrays)

    monkeypatch.setattr(Store, "write", counting)
    task = dtrak.Task(apply, SCHEDULE, timesteps=(100,))
    x = np.random.default_rng(0).uniform(-1, 1, (n, 2, 2, 1)).astype(np.float32)
    dtrak.featurize(task, jnp.ones((1, 2, 2, 1)), x, RAW, batch_size=8)
    assert max(rows) == 64
    assert sum(rows) == n


@pytest.mark.parametrize("per_timestep", [True, False])
def test_programs_and_their_number_are_those_that_run(
    small, images, tmp_path, monkeypatch, per_timestep
):
    """The planner's programs are the compiled functions that featurize calls so often."""
    made, task = [], task_of(small, per_timestep=per_timestep)
    arguments = task, small[1], images, dtrak.Projection(dim=64)
    mesh = dtrak.parallel.mesh(jax.local_devices())
    programs = dtrak.features.step_programs(*arguments, mesh, batch_size=2)

    def counted(name, maker):
        def make(*of):
            function = maker(*of)

            def call(*given):
                made.append(name)
                expected = getattr(programs, name)
                assert function is expected.function
                shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), given)
                assert shapes == jax.tree.map(
                    lambda leaf: (leaf.shape, leaf.dtype), expected.arguments
                )
                return function(*given)

            return call

        monkeypatch.setattr(gradients, maker.__name__, make)

    counted("gradients", gradients.gradient_function)
    counted("project", gradients.projection_function)
    dtrak.featurize(*arguments, batch_size=2, store=tmp_path)
    layout = programs.layout
    assert made.count("project") == layout.rounds(12)
    assert made.count("gradients") == layout.rounds(12) * layout.parts
    assert layout.parts == (1 if per_timestep else 2)
    chunks = [path for path in tmp_path.rglob("c/**/*") if path.is_file()]
    size = sum(path.stat().st_size - 4 for path in chunks)  # without checksums
    assert size >= layout.bytes_written(12, measurements=2) > 0.6 * size


def test_processes_share_the_rounds():
    layout = microbatches.Layout(pairs=3, apart=True, size=16, copies=1, dim=64)
    # 16 chunks of 60 examples, 180 gradients, in 12 rounds; and one of 40, in 8.
    assert layout.rows_per_chunk == 60
    assert layout.rounds(1000) == 16 * 12 + 8
    # The first of four processes has the chunks 0, 4, 8, 12 and 16.
    assert layout.rounds(1000, processes=4) == 4 * 12 + 8


# Noise


def eps(task, pair=0, words=(1, 2), position=0):
    return np.asarray(task.eps(pair, np.array(words, np.uint32), position, (4, 4, 1)))


def test_common_noise_is_one_draw_for_all(small):
    task = task_of(small, noise="common", draws=2)
    np.testing.assert_array_equal(eps(task), eps(task, words=(3, 4), position=9))
    for other in (1, 2):
        assert np.abs(eps(task) - eps(task, other)).max() > 0.1
    assert np.abs(eps(task) - eps(dataclasses.replace(task, seed=1))).max() > 0.1


def test_independent_noise_follows_the_id(small):
    task = task_of(small, noise="independent")
    np.testing.assert_array_equal(eps(task), eps(task, position=9))
    assert np.abs(eps(task) - eps(task, words=(1, 3))).max() > 0.1


def test_reference_noise_follows_the_slot(small):
    task = task_of(small, noise="reference", noise_batch=5)
    np.testing.assert_array_equal(
        eps(task, position=2), eps(task, words=(7, 7), position=12)
    )
    assert np.abs(eps(task, position=2) - eps(task, position=3)).max() > 0.1


def test_reference_noise_begins_anew_in_each_shard(small):
    """The slot of image n is (n mod 1000) mod 52, as in the paper's code."""
    task = task_of(small, noise="reference")
    assert (REFERENCE_SHARD, task.noise_batch) == (1000, 52)
    for position, slot in [(999, 11), (1000, 0), (1053, 1), (4999, 11)]:
        np.testing.assert_array_equal(
            eps(task, position=position), eps(task, position=slot)
        )
    assert np.abs(eps(task, position=1000) - eps(task, position=1000 % 52)).max() > 0.1


def test_cyclic_noise_is_the_next_pairs(small):
    common = task_of(small, draws=2)
    cyclic = dataclasses.replace(common, noise="cyclic")
    for j in range(6):
        np.testing.assert_array_equal(eps(cyclic, j), eps(common, (j + 1) % 6))


def test_noise_is_standard_normal(small):
    task = task_of(small, noise="independent")
    draws = np.concatenate([eps(task, words=(i, 0)).ravel() for i in range(300)])
    assert abs(draws.mean()) < 4 / len(draws) ** 0.5
    assert abs(draws.var() - 1) < 4 * (2 / len(draws)) ** 0.5


@pytest.mark.parametrize("noise", ["common", "independent"])
def test_features_do_not_depend_on_the_order(small, images, noise):
    task = task_of(small, noise=noise, timesteps=(300,), measurement="loss")
    order = [3, 0, 2, 1]
    projection = dtrak.Projection(dim=32)
    straight = dtrak.featurize(task, small[1], images[:4], projection, ids=IDS[:4])
    shuffled = dtrak.featurize(
        task, small[1], images[order], projection, ids=[IDS[i] for i in order]
    )
    close(np.asarray(shuffled), np.asarray(straight)[:, order])


# Measurements, timesteps, parameters


def test_measurements_are_the_papers():
    rng = np.random.default_rng(1)
    y, target = rng.normal(size=(2, 3, 3, 2))
    t, d = 10, y.size
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    weight = beta[t] / (2 * (1 - beta[t]) * (1 - alpha_bar[t]))
    error = np.sum((y - target) ** 2)
    expected = {
        "loss": error / d,
        "square": np.sum(y**2) / d,
        "mean": np.sum(y) / d,
        "l1": np.sum(np.abs(y)),
        "l2": np.linalg.norm(y),
        "linf": np.abs(y).max(),
        "elbo": weight * error / d,
    }
    assert expected.keys() == FUNCTIONS.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(FUNCTIONS[name](y, target, t, SCHEDULE), value, 1e-5)
    # In v the same network errs in eps by sqrt(alpha_bar) of its error in v.
    in_v = FUNCTIONS["elbo"](y, target, t, dtrak.linear_schedule(prediction="v"))
    np.testing.assert_allclose(in_v, alpha_bar[t] * weight * error / d, 1e-5)


def test_timestep_strategies(small):
    assert task_of(small, timesteps=10).grid == tuple(range(0, 1000, 100))
    # Of a number that does not divide 1000 there are as many, over all of the schedule.
    assert task_of(small, timesteps=3).grid == (0, 333, 666)
    assert task_of(small, timesteps=7).grid == (0, 142, 285, 428, 571, 714, 857)
    assert len(task_of(small, timesteps=600).grid) == 600
    assert task_of(small, timesteps=600).grid[-1] == 998
    cumulative = task_of(small, timesteps=4, strategy="cumulative")
    assert cumulative.grid == (0, 1, 2, 3)
    assert task_of(small, timesteps=(5, 9), draws=2).pairs == (
        (5, 0),
        (5, 1),
        (9, 0),
        (9, 1),
    )


def test_aliases_are_the_same_measurement(small):
    task = task_of(small, measurement=("mean-squared-l2-norm", "l1-norm"))
    assert list(task.measurements) == ["square", "l1"]


def test_some_parameters_only(small, images, exact):
    paths = list(named_leaves(small[1]))
    sizes = [leaf.size for leaf in jax.tree.leaves(small[1])]
    entries = np.repeat(["o" in path for path in paths], sizes)
    features = dtrak.featurize(
        task_of(small, parameters="o"), small[1], images[:5], RAW, ids=IDS[:5]
    )
    close(features["loss"], exact["loss"][..., entries])


# Conditions


def scaled(params, x, t, cond):
    """A network whose gradients tell which condition it was given."""
    return x * params[0]["a"] + cond.reshape(-1, 1, 1, 1) * params[1]


def both_of(params, x, t, cond):
    """The same with a condition of two parts, one of them nested."""
    return scaled(params, x, t, cond["scale"] + cond["text"][0].sum(axis=1))


SCALED = [{"a": jnp.float32(0.5)}, jnp.float32(2.0)]
TEXT = np.arange(10, dtype=np.float32).reshape(5, 2)
SCALE = np.linspace(0, 1, 5, dtype=np.float32)
COND = {"text": (TEXT,), "scale": SCALE}


def conditioned(cond, apply=scaled, rows=slice(None), **options):
    task = dtrak.Task(apply, SCHEDULE, measurement="mean", timesteps=(7,))
    task = dataclasses.replace(task, per_timestep=options.pop("per_timestep", True))
    x = np.random.default_rng(0).uniform(-1, 1, (5, 2, 2, 1)).astype(np.float32)
    cond = jax.tree.map(lambda leaf: leaf[rows], cond)
    return dtrak.featurize(
        task, SCALED, x[rows], RAW, ids=IDS[:5][rows], cond=cond, **options
    )


@pytest.mark.parametrize("per_timestep", [True, False])
def test_each_example_has_its_condition(per_timestep):
    """An array or a pytree of arrays; the parameters may be any pytree."""
    for apply, cond, expected in [
        (scaled, SCALE, SCALE),
        (both_of, COND, SCALE + TEXT.sum(axis=1)),
    ]:
        features = conditioned(cond, apply, per_timestep=per_timestep)
        gradient = np.asarray(features).reshape(5, 2)[:, 1]
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_hashes_of_conditions():
    """A plain array has the hashes of its rows; a pytree's cover all of its leaves."""
    x = np.zeros((5, 2, 2, 1), np.float32)

    def hashes(cond):
        return example_hashes(IDS[:5], x, cond)["cond"]

    assert hashes(None) is None
    assert hashes(TEXT) == digest_rows(TEXT)
    before = hashes(COND)
    for changed in (
        {**COND, "scale": SCALE + (SCALE > 0.9)},
        {**COND, "text": (TEXT + TEXT // 8,)},
    ):
        after = hashes(changed)
        assert [a == b for a, b in zip(before, after, strict=True)] == [True] * 4 + [
            False
        ]
    assert hashes({"text": TEXT}) != hashes({"image": TEXT})


def test_stores_with_conditions_are_merged(tmp_path):
    whole = conditioned(COND, both_of, store=tmp_path / "whole")
    for name, rows in {"a": slice(0, 2), "b": slice(2, 5)}.items():
        conditioned(COND, both_of, rows, store=tmp_path / name)
    merged = dtrak.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")["mean"]
    close(merged, whole)
    assert merged.fingerprint == whole.fingerprint
    changed = {**COND, "scale": SCALE + 1}
    with pytest.raises(ValueError, match="holds other features: cond is"):
        conditioned(changed, both_of, store=tmp_path / "both")


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (SCALE[:4], "cond has 4 rows and images 5"),
        ({**COND, "text": (TEXT[:3],)}, "cond: text/0 has 3 rows and images 5"),
        ({**COND, "scale": 1.0}, "cond: scale is 1.0; it must be an array"),
    ],
)
def test_wrong_conditions(cond, message):
    x = np.zeros((5, 2, 2, 1), np.float32)
    with pytest.raises(ValueError, match=message):
        dtrak.featurize(dtrak.Task(both_of, SCHEDULE), SCALED, x, RAW, cond=cond)


# Frozen parameters


def adapted(params, x, t, cond):
    """A frozen network with adapters, x W + (x A) B, all layers tagged."""
    lora, base = params
    h = jnp.tanh(x.reshape(len(x), -1))
    low = dtrak.layer(lora["a"], h, h @ lora["a"])
    out = h @ base["w"] + dtrak.layer(lora["b"], low, low @ lora["b"])
    return out.reshape(x.shape)


@pytest.fixture(scope="module")
def frozen():
    """(adapted, params, frozen), of 64 x 4, 4 x 64 and 64 x 64 entries."""
    rng = np.random.default_rng(5)
    a, b, w = (
        rng.normal(size=size).astype(np.float32) / 8
        for size in ((64, 4), (4, 64), (64, 64))
    )
    return adapted, {"a": a, "b": b}, {"w": w}


def test_gradients_are_of_the_trained_parameters_only(frozen, images):
    """Equal to those where the frozen ones are constants of the network's function."""
    apply, params, base = frozen
    closed = task_of((lambda p, *inputs: apply((p, base), *inputs),))
    options = {"ids": IDS[:5], "batch_size": 2}
    task, few = task_of(frozen), images[:5]
    features = dtrak.featurize(task, params, few, RAW, frozen=base, **options)
    for name, gradient in one_by_one(closed, params, few).items():
        close(features[name], gradient)
    projection = dtrak.Projection("factorized", dim=4096)
    short = dtrak.featurize(task, params, few, projection, frozen=base, **options)
    for phi, g in zip(short["loss"].by_pair(), features["loss"].by_pair(), strict=True):
        close(phi @ phi.T, g @ g.T)


def test_frozen_parameters_are_no_constants_of_the_program(frozen, images):
    """As they are where the network's function holds them itself."""
    if getattr(jax.config, "jax_use_simplified_jaxpr_constants", False):
        pytest.skip("with this switch a program's text has no constants")
    apply, params, base = frozen
    mesh = dtrak.parallel.mesh(jax.local_devices())

    def text(apply, **options):
        arguments = task_of((apply,)), params, images, RAW, mesh, 2
        program = dtrak.features.step_programs(*arguments, **options).gradients
        return program.function.lower(*program.arguments).as_text()

    with_argument = text(apply, frozen=base)
    with_constant = text(lambda p, *inputs: apply((p, base), *inputs))
    digits = 2 * base["w"].nbytes
    assert len(with_constant) - len(with_argument) > 0.9 * digits


def test_stores_know_the_frozen_parameters(frozen, images, tmp_path):
    apply, params, base = frozen
    task = task_of(frozen, timesteps=(9,), measurement="loss")
    arguments = task, params, images[:2], dtrak.Projection(dim=8)
    features = dtrak.featurize(*arguments, frozen=base, store=tmp_path)
    changed = {"w": base["w"] * 2}
    with pytest.raises(ValueError, match="holds other features: frozen is"):
        dtrak.featurize(*arguments, frozen=changed, store=tmp_path)
    with pytest.raises(ValueError, match="frozen: w has entries that are not finite"):
        dtrak.featurize(*arguments, frozen={"w": base["w"] * np.nan})
    inside = task_of((lambda p, *inputs: apply((p, base), *inputs),), timesteps=(9,))
    assert "frozen" in features.fingerprint
    assert "frozen" not in dtrak.featurize(inside, *arguments[1:])["loss"].fingerprint


# Bad input


def change(array, value):
    array = array.copy()
    array[1, 0, 0, 0] = value
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measurement": "l1_norm"}, "'l1-norm'"),
        ({"measurement": ()}, "measurement is empty"),
        ({"measurement": lambda *_: 0.0}, "define it with `def`"),
        ({"timesteps": 0}, "between 1 and 1000"),
        ({"timesteps": 1001}, "between 1 and 1000"),
        ({"timesteps": (1000,)}, "0 to 999"),
        ({"timesteps": (3, 3)}, "there twice"),
        ({"timesteps": ()}, "one or more of 0 to 999"),
        ({"noise": "shared"}, "'common', 'independent', 'reference', 'cyclic'"),
        ({"noise": "cyclic", "timesteps": (5,)}, "two or more"),
        ({"draws": 0}, "draws is 0; it must be an integer >= 1"),
        ({"strategy": "random"}, "'uniform', 'cumulative'"),
        ({"parameters": "("}, "regular expression"),
    ],
)
def test_wrong_tasks(small, changes, message):
    with pytest.raises(ValueError, match=message):
        task_of(small, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("count", 8), "'sketch', 'rademacher', 'gaussian', 'factorized', 'none'"),
        (("sketch", 0), "dim is 0"),
        (("sketch", 2.5), "dim is 2.5"),
    ],
)
def test_wrong_projections(arguments, message):
    with pytest.raises(ValueError, match=message):
        dtrak.Projection(*arguments)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda x, ids: (x[:0], ()), "there are none"),
        (lambda x, ids: (x[..., 0], ids), r"\[n, height, width, channels\]"),
        (lambda x, ids: (change(x, np.nan), ids), "finite"),
        (lambda x, ids: ((x > 0), ids), "are bool; they must be float32"),
        (lambda x, ids: (((x + 1) * 127).astype(np.uint8), ids), "127.5"),
        (lambda x, ids: (x, (*ids[:-1], ids[0])), "image-0"),
        (lambda x, ids: (x, ids[:-1]), "11"),
        (lambda x, ids: (x[:, 1:], ids), r"\(7, 8, 1\)"),
    ],
)
def test_wrong_images(small, images, break_it, message):
    x, ids = break_it(images, IDS)
    with pytest.raises(ValueError, match=message):
        dtrak.featurize(task_of(small), small[1], x, RAW, ids=ids)


def test_wrong_parameters(small, images):
    task = task_of(small, parameters="nothing_like_this")
    with pytest.raises(ValueError, match="finds none of the 3 parameters, such as in"):
        dtrak.featurize(task, small[1], images, RAW)
    leaves, treedef = jax.tree.flatten(small[1])
    leaves[1] = leaves[1] * np.nan
    path = list(named_leaves(small[1]))[1]
    with pytest.raises(ValueError, match=f"{path} has entries that are not finite"):
        dtrak.featurize(task_of(small), treedef.unflatten(leaves), images, RAW)


def test_gradients_that_are_not_finite_name_the_example(tmp_path):
    """The root of 0 has no gradient; nothing of the chunk is kept."""

    def apply(params, x, t, cond):
        return params * jnp.where(x.sum() > 1e6, x, 0 * x)

    x = np.zeros((2, 2, 2, 1), np.float32)
    task = dtrak.Task(apply, SCHEDULE, measurement="l2", timesteps=(0,))
    with pytest.raises(FloatingPointError, match="gradient of 'l2' of example 'a'"):
        dtrak.featurize(
            task, jnp.ones(()).reshape(1, 1, 1, 1), x, RAW, ids=("a", "b"),
            store=tmp_path / "s",
        )  # fmt: skip
    with pytest.raises(ValueError, match="2 of 2 examples"):
        dtrak.Features.load(tmp_path / "s", "l2")


def test_a_network_of_another_shape(images):
    task = dtrak.Task(lambda params, x, t, cond: x[..., :1, :] * params, SCHEDULE)
    with pytest.raises(ValueError, match="must have the shape of the images"):
        dtrak.featurize(task, jnp.ones((1, 1, 1, 1)), images, RAW)
    for kind in ("int32", "complex64"):
        task = dtrak.Task(lambda p, x, t, cond, kind=kind: x.astype(kind), SCHEDULE)
        with pytest.raises(ValueError, match=f"predicts {kind}; .* real numbers"):
            dtrak.featurize(task, jnp.ones(1), images, RAW)


def test_foreign_stores_are_refused(small, images, tmp_path):
    """By the field that differs; also for an edited function of the same name."""
    store = tmp_path / "s"

    def measure(scale):
        def contrast(prediction, target, t, schedule):
            return scale * jnp.mean(prediction**3)

        return contrast

    task = task_of(small, measurement=measure(1.0), timesteps=(9,))
    base = {"ids": IDS, "store": store}
    projection = dtrak.Projection(dim=8)
    dtrak.featurize(task, small[1], images, projection, **base)
    replace = dataclasses.replace
    other = jax.tree.map(lambda leaf: leaf + 1, small[1])
    for field, arguments, changes in [
        ("params", (task, other, images, projection), {}),
        ("images", (task, small[1], images / 2, projection), {}),
        ("ids", (task, small[1], images, projection), {"ids": IDS[::-1]}),
        ("dim", (task, small[1], images, dtrak.Projection(dim=9)), {}),
        ("noise is", (replace(task, noise="independent"), *((small[1], images, projection))), {}),
        ("noise_seed", (replace(task, seed=5), small[1], images, projection), {}),
        ("timesteps", (replace(task, timesteps=(8,)), small[1], images, projection), {}),
        ("measurements", (replace(task, measurement=measure(2.0)), small[1], images, projection), {}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"holds other features: {field}"):
            dtrak.featurize(*arguments, **base | changes)


def test_a_full_disk_keeps_the_chunks_before(small, images, tmp_path, monkeypatch):
    """By a limit on the size of files, which fails a write in the same way."""
    monkeypatch.setattr(microbatches, "CHUNK_ROWS", 4)
    arguments = (task_of(small, timesteps=(9,)), small[1], images)
    options = {"ids": IDS, "store": tmp_path / "s", "batch_size": 1}
    # JAX keeps what it compiles in files, which the limit is not meant for.
    dtrak.featurize(*arguments, dtrak.Projection(dim=4096), ids=IDS, batch_size=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="examples 0 to 7 could not be stored"):
            dtrak.featurize(*arguments, dtrak.Projection(dim=4096), **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    features = dtrak.featurize(*arguments, dtrak.Projection(dim=4096), **options)
    assert np.isfinite(np.asarray(features["loss"])).all()
