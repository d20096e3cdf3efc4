"""Features equal a plain loop of jax.grad, whatever the batches and the devices."""

import dataclasses
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax import parallel
from dtrak_jax.features import gradients, loop, project
from dtrak_jax.features.measurements import FUNCTIONS
from dtrak_jax.streams import id_words
from dtrak_jax.trees import named_leaves

SCHEDULE = dtrak.linear_schedule()
RAW = dtrak.Projection("none")
IDS = tuple(f"image-{i}" for i in range(12))


def close(a, b, tolerance=1e-5):
    """Equal to float32 rounding, relative to the largest entry."""
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
    result = {}
    for name, measure in task.measurements.items():
        result[name] = [
            [
                np.concatenate(
                    [
                        np.ravel(g)
                        for g in gradient(
                            leaves,
                            x,
                            task.eps(j, words[i], np.int32(i), x.shape),
                            t,
                            measure,
                        )
                    ]
                )
                for i, x in enumerate(images)
            ]
            for j, (t, _) in enumerate(task.pairs)
        ]
    return {name: np.array(rows) for name, rows in result.items()}


@pytest.fixture(scope="module")
def exact(tiny, images):
    return one_by_one(task_of(tiny), tiny[1], images[:5])


def test_sharded_features_equal_a_loop_of_grad(tiny, images, exact):
    """On eight devices; automatic sharding of vmapped convolutions gets this wrong."""
    features = dtrak.featurize(
        task_of(tiny), tiny[1], images[:5], RAW, ids=IDS[:5], batch_size=2
    )
    for name, gradient in exact.items():
        close(features[name], gradient)
        close(features[name].squared_norms, np.sum(gradient**2, axis=-1), 2e-5)


def test_one_device_and_another_batch_size(tiny, images, exact, one_device):
    features = dtrak.featurize(
        task_of(tiny), tiny[1], images[:5], RAW, ids=IDS[:5], batch_size=3
    )
    for name, gradient in exact.items():
        close(features[name], gradient)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_averaging_is_the_mean_over_pairs(tiny, images, exact, batch_size):
    """Also where the pairs of an example do not fit in one batch."""
    task = task_of(tiny, per_timestep=False)
    features = dtrak.featurize(
        task, tiny[1], images[:5], RAW, ids=IDS[:5], batch_size=batch_size
    )
    for name, gradient in exact.items():
        close(features[name], gradient.mean(axis=0))
    assert features["loss"].losses.shape == (3, 5)


def test_projecting_is_linear_and_separate(tiny, images, exact):
    projection = dtrak.Projection("sketch", dim=100)
    features = dtrak.featurize(
        task_of(tiny), tiny[1], images[:5], projection, ids=IDS[:5], batch_size=2
    )
    for name, gradient in exact.items():
        flat = gradient.reshape(-1, gradient.shape[-1])
        ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(tiny[1])])
        parts = np.split(flat, ends[:-1], axis=1)
        expected = np.asarray(project(projection, parts)).reshape(3, 5, 100)
        close(features[name], expected)


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


def test_a_store_continues_where_it_stopped(small, images, tmp_path, monkeypatch):
    """Interrupted after some chunks, resumed: the same bytes as in one go."""
    monkeypatch.setattr(loop, "CHUNK_ROWS", 4)
    task, projection = task_of(small, timesteps=(300,)), dtrak.Projection(dim=16)

    def run(store):
        return dtrak.featurize(
            task, small[1], images, projection, ids=IDS, store=store, batch_size=1
        )

    whole = run(tmp_path / "whole")
    write = loop.Store.write
    calls = []

    def stop_in_the_second_chunk(self, *args):
        calls.append(args[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(loop.Store, "write", stop_in_the_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    with pytest.raises(ValueError, match="run featurize again"):
        dtrak.Features.load(tmp_path / "cut", "loss")
    monkeypatch.setattr(loop.Store, "write", write)
    resumed = run(tmp_path / "cut")
    for name in whole:
        np.testing.assert_array_equal(
            np.asarray(resumed[name]), np.asarray(whole[name])
        )
        loaded = dtrak.Features.load(tmp_path / "cut", name)
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(whole[name]))
        assert loaded.ids == IDS


def test_finished_stores_are_not_computed_again(small, images, tmp_path, monkeypatch):
    arguments = (task_of(small), small[1], images[:2], dtrak.Projection(dim=8))
    dtrak.featurize(*arguments, store=tmp_path / "s")
    monkeypatch.setattr(loop, "_start_chunk", lambda *_: pytest.fail("computed again"))
    assert dtrak.featurize(*arguments, store=tmp_path / "s")["loss"].shape == (3, 2, 8)


def test_no_projection_matrix_and_flat_memory(small):
    """XLA's own count: far less than p x k, and less than two copies of the batch."""
    mesh = parallel.mesh(jax.local_devices()[:1])
    p, k, slots = 200_000, 8192, 4
    flat = jax.ShapeDtypeStruct((slots, p), np.float32)
    for kind in ("sketch", "rademacher", "gaussian"):
        project = gradients.projection_function(dtrak.Projection(kind, dim=k), mesh)
        memory = project.lower({"square": [flat]}).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.02 * 4 * p * k


@pytest.mark.parametrize("n", [64, 640])
def test_host_memory_is_bounded_by_a_chunk(n):
    """The largest array handed to the store does not grow with the examples."""
    rows = []

    def apply(params, x, t, cond):
        return params * x

    task = dtrak.Task(apply, SCHEDULE, timesteps=(100,))
    write = loop.Store.write
    try:
        loop.Store.write = lambda self, chunk, *rest: (
            rows.append(chunk.stop - chunk.start),
            write(self, chunk, *rest),
        )
        x = np.random.default_rng(0).uniform(-1, 1, (n, 2, 2, 1)).astype(np.float32)
        dtrak.featurize(task, jnp.ones((1, 2, 2, 1)), x, RAW, batch_size=8)
    finally:
        loop.Store.write = write
    assert max(rows) == 64
    assert sum(rows) == n


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
    assert task_of(small, timesteps=7).grid == tuple(range(0, 7 * 142, 142))
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


def test_some_parameters_only(tiny, images, exact):
    paths = list(named_leaves(tiny[1]))
    sizes = [leaf.size for leaf in jax.tree.leaves(tiny[1])]
    entries = np.repeat(["mid_block" in path for path in paths], sizes)
    task = task_of(tiny, parameters="mid_block")
    features = dtrak.featurize(task, tiny[1], images[:5], RAW, ids=IDS[:5])
    close(features["loss"], exact["loss"][..., entries])


def test_conditioned_network_and_any_pytree():
    """`cond` reaches the right example; parameters may be any tree."""

    def apply(params, x, t, cond):
        return x * params[0]["a"] + cond.reshape(-1, 1, 1, 1) * params[1]

    params = [{"a": jnp.float32(0.5)}, jnp.float32(2.0)]
    x = np.random.default_rng(0).uniform(-1, 1, (5, 2, 2, 1)).astype(np.float32)
    cond = np.arange(5, dtype=np.float32)
    for per_timestep in (True, False):
        task = dtrak.Task(
            apply,
            SCHEDULE,
            measurement="mean",
            timesteps=(7,),
            per_timestep=per_timestep,
        )
        features = np.asarray(dtrak.featurize(task, params, x, RAW, cond=cond))
        np.testing.assert_allclose(features.reshape(5, 2)[:, 1], cond, rtol=1e-6)


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
        ({"timesteps": 0}, "1 to 1000"),
        ({"timesteps": 1001}, "1 to 1000"),
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


def test_apply_must_be_a_function():
    with pytest.raises(TypeError, match="it must be a function"):
        dtrak.Task("unet", SCHEDULE)


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
        (lambda x, ids: (change(x, 1.5), ids), r"\[-1, ?1\]"),
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


def test_damaged_stores_are_refused(small, images, tmp_path):
    store = tmp_path / "s"
    task = task_of(small, timesteps=(9,), measurement="loss")
    arguments = (task, small[1], images, dtrak.Projection(dim=8))
    dtrak.featurize(*arguments, store=store)
    chunk = next(path for path in (store / "loss/phi/c").rglob("*") if path.is_file())
    whole = chunk.read_bytes()
    for damage in (whole[:-7], b"x" + whole[1:]):
        chunk.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged"):
            np.asarray(dtrak.Features.load(store, "loss"))
    chunk.unlink()
    with pytest.raises(ValueError, match="missing"):
        np.asarray(dtrak.Features.load(store, "loss"))
    (store / "metadata.json").write_text(json.dumps({})[:1])
    with pytest.raises(ValueError, match="not valid JSON"):
        dtrak.featurize(*arguments, store=store)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(ValueError, match="holds no feature store"):
        dtrak.featurize(*arguments, store=tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match="no feature store"):
        dtrak.Features.load(tmp_path / "nowhere", "loss")


def test_a_full_disk_keeps_the_chunks_before(small, images, tmp_path, monkeypatch):
    """By a limit on the size of files, which fails a write in the same way."""
    monkeypatch.setattr(loop, "CHUNK_ROWS", 4)
    monkeypatch.setattr(loop, "_slots_and_copies", lambda *_: (8, 1))
    arguments = (task_of(small, timesteps=(9,)), small[1], images)
    options = {"ids": IDS, "store": tmp_path / "s"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="examples 0 to 7 could not be stored"):
            dtrak.featurize(*arguments, dtrak.Projection(dim=4096), **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    features = dtrak.featurize(*arguments, dtrak.Projection(dim=4096), **options)
    assert np.isfinite(np.asarray(features["loss"])).all()
