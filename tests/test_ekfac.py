"""EK-FAC against curvlinops and the dense Gauss-Newton matrix, and influence by it."""

import dataclasses
import re
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax import files
from dtrak_jax.attribution import Damping, whole
from dtrak_jax.digests import named_leaves
from dtrak_jax.features import curvature as curvatures
from dtrak_jax.features.featurize import example_mesh
from dtrak_jax.features.measurements import loss
from dtrak_jax.features.products import batch_of, product_program

EXACT = dtrak.Projection("none")


class Golden(nn.Module):
    """The network of goldens/make_ekfac.py."""

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(3, (3, 3), strides=2, padding=1, name="conv")(x)
        return nn.Dense(32, use_bias=False, name="out")(jnp.tanh(h).reshape(len(x), -1))


def golden_apply(params, x, t, cond):
    """Sees the condition, if there is one, in place of x."""
    inputs = x if cond is None else cond
    return Golden().apply({"params": params}, inputs).reshape(x.shape)


@pytest.fixture(scope="module")
def golden():
    """What the file has; and parameters of the network."""
    saved = files.read_npz(Path(__file__).parent / "goldens" / "ekfac.npz")
    conv = {"kernel": saved["conv/kernel"], "bias": saved["conv/bias"]}
    return saved, {"conv": conv, "out": {"kernel": saved["out/kernel"]}}


class Net(nn.Module):
    """Layers of every kind, of which the grouped convolution and the norm have no tag; one
    is used twice."""

    @nn.compact
    def __call__(self, x, t):
        h = nn.Conv(4, (3, 3), strides=2, name="conv")(x)
        time = nn.Dense(4, name="time")(jnp.sin(t[:, None] / 100))
        h = nn.GroupNorm(2, name="norm")(h + time[:, None, None, :])
        h = nn.Conv(4, (3, 3), feature_group_count=2, name="grouped")(jnp.tanh(h))
        flat = h.reshape(len(x), -1, 4)
        attention = nn.MultiHeadDotProductAttention(2, name="attention")
        h = flat + attention(flat, flat)
        twice = nn.Dense(4, name="twice")
        h = twice(jnp.tanh(twice(h)))
        out = nn.Dense(x[0].size, name="out")(h.reshape(len(x), -1))
        return out.reshape(x.shape)


def net_apply(params, x, t, cond):
    return Net().apply({"params": params}, x, t)


@pytest.fixture(scope="module")
def net(both):
    """(apply, params), no parameter being 0."""
    shapes = jax.eval_shape(Net().init, jax.random.key(0), both[0], jnp.zeros(7))
    rng = np.random.default_rng(0)

    def draw(leaf):
        return rng.normal(size=leaf.shape).astype(np.float32) / 2

    return net_apply, jax.tree.map(draw, shapes["params"])


def linear(params, x, t, cond):
    """y = x W, so that A and B are independent and the Kronecker form is exact."""
    flat = x.reshape(len(x), -1)
    return dtrak.layer(params, flat, flat @ params).reshape(x.shape)


@pytest.fixture(scope="module")
def matrix():
    """W of `linear`."""
    return np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def both():
    """Seven training images and three queries, [4, 4, 1]."""
    rng = np.random.default_rng(2)
    return [rng.uniform(-1, 1, (n, 4, 4, 1)).astype(np.float32) for n in (7, 3)]


def task_of(apply, **settings):
    settings = {"timesteps": (100, 500), "measurement": "loss"} | settings
    return dtrak.Task(apply, dtrak.linear_schedule(), **settings)


def dense(block):
    """A block as a matrix, float64 [size, size]."""
    if block.inputs is None:
        return np.diag(block.eigenvalues.astype(np.float64))
    basis = np.kron(block.inputs.astype(np.float64), block.outputs.astype(np.float64))
    return (basis * block.eigenvalues.reshape(1, -1)) @ basis.T


def noised_inputs(task, images):
    """x_t of every pair and image, and its timestep, [pairs images, 1, H, W, C]."""
    rows = []
    for pair, (t, _) in enumerate(task.pairs):
        t = np.array([t], np.int32)
        for i, x in enumerate(images):
            eps = task.eps(np.int32(pair), np.zeros(2, np.uint32), i, x.shape)
            rows.append((np.asarray(task.schedule.add_noise(x[None], eps[None], t)), t))
    return rows


def close(actual, expected, tolerance=1e-5):
    # A bias of an attention's keys has no gradient but by rounding.
    atol = tolerance * np.abs(expected).max() + 1e-12
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_blocks_are_those_of_curvlinops(golden):
    """With all entries of the output, expand form; a convolution and a matrix product."""
    saved, params = golden
    images = np.zeros((8, 4, 4, 2), np.float32)
    task = task_of(golden_apply, timesteps=(10,))
    made = dtrak.ekfac(
        task, params, images, cond=saved["x"], cotangents=0, batch_size=2
    )
    assert repr(made) == "Curvature(2 layers, 1 diagonals)"
    for name in ("conv", "out"):
        close(dense(made.blocks[f"{name}/kernel"]), saved[f"{name}/matrix"])


def test_eigenvalues_are_the_diagonal_of_the_gauss_newton_matrix(net, both):
    """Layers of every kind, in the basis of their eigenvectors; others in their own."""
    (apply, params), images = net, both[0]
    task = task_of(apply, timesteps=(100, 700))
    made = dtrak.ekfac(task, params, images[:2], cotangents=0)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        jacobian = jax.jit(jax.jacrev(apply))
        parts = [jacobian(wide, x, t, None) for x, t in noised_inputs(task, images[:2])]
        stacked = jax.tree.map(lambda *rows: np.stack(rows), *parts)
    means = []
    for path, j in named_leaves(stacked).items():
        block = made.blocks[path]
        j = np.asarray(j).reshape(4, images[0].size, *block.eigenvalues.shape)
        if block.inputs is not None:
            sides = block.inputs.astype(np.float64), block.outputs.astype(np.float64)
            j = np.einsum("ia,rdio,ob->rdab", sides[0], j, sides[1])
        expected = 2 / images[0].size * (j**2).sum(axis=1).mean(axis=0)
        close(block.eigenvalues, expected, 1e-4)
        means.append(expected.mean())
    layers = [path for path, block in made.blocks.items() if block.inputs is not None]
    attention = (
        f"attention/{part}/kernel" for part in ("query", "key", "value", "out")
    )
    named = (f"{part}/kernel" for part in ("conv", "time", "twice", "out"))
    assert {*layers} == {*attention, *named}
    # A layer whose F is of rounding errors is nothing at any damping.
    dead = list(made.blocks).index("attention/key/bias")
    assert made.mean_eigenvalues[dead] == np.inf
    np.testing.assert_allclose(
        np.delete(made.mean_eigenvalues, dead), np.delete(means, dead), rtol=1e-4
    )


@pytest.mark.parametrize("apart", [True, False])
def test_influence_of_a_linear_network_is_exact(matrix, both, apart, monkeypatch):
    """Kept apart, tau adds up the pairs; averaged, it has the mean gradient. Queries that
    do not fit together are scored in blocks."""
    train, query = both
    task = task_of(linear, per_timestep=apart)
    made = dtrak.ekfac(task, matrix, train, cotangents=0, batch_size=3)
    x = np.stack([x_t.reshape(-1) for x_t, _ in noised_inputs(task, train)])
    a = (x.T @ x / len(x)).astype(np.float64)
    matrix_of_all = np.kron(a, np.eye(16) * 2 / 16)
    close(dense(made.blocks[""]), matrix_of_all)
    phi, g = (
        np.asarray(dtrak.featurize(task, matrix, images, EXACT), np.float64)
        for images in both
    )
    phi, g = (array if apart else array[None] for array in (phi, g))
    value = 0.3 * np.trace(matrix_of_all) / 256
    inverse = np.linalg.inv(matrix_of_all + value * np.eye(256))
    expected = np.einsum("jqp,pr,jnr->qn", g, inverse, phi)
    scores = dtrak.ekfac_influence(made, train, query, damping=0.3, batch_size=2)
    close(scores.scores, expected)
    np.testing.assert_allclose(scores.lambdas, [value], rtol=1e-5)
    assert (scores.method, scores.damping) == ("ekfac", Damping(0.3))
    monkeypatch.setattr(whole, "QUERY_BYTES", 2 * 4 * 256)
    absolute = dtrak.absolute(value)
    close(dtrak.ekfac_influence(made, train, query, damping=absolute).scores, expected)


@pytest.mark.parametrize("apart", [True, False])
def test_conjugate_gradients_of_a_linear_network_are_exact(matrix, both, apart):
    """Of a batch of three noised images, by a preconditioner that is of all fourteen; kept
    apart each pair has a matrix of its own."""
    task = task_of(linear, per_timestep=apart)
    made = dtrak.ekfac(task, matrix, both[0], cotangents=0)
    x = np.stack([x for x, _ in noised_inputs(task, both[0])]).astype(np.float64)
    # Of each image in turn at one timestep; or of all at each.
    pairs = np.array([[0, 0, 0], [1, 1, 1]] if apart else [[0, 1, 0]])
    x = x.reshape(2, 7, 16)[pairs, [0, 2, 4]]
    lambdas = 0.1 * made.mean_eigenvalues[0] * np.eye(256)
    phi, g = (
        np.asarray(dtrak.featurize(task, matrix, images, EXACT), np.float64)
        for images in both
    )
    phi, g = (array.reshape(-1, *array.shape[-2:]) for array in (phi, g))
    whole = np.stack([np.kron(rows.T @ rows / 3, np.eye(16) * 2 / 16) for rows in x])
    expected = np.einsum("jqp,jpr,jnr->qn", g, np.linalg.inv(whole + lambdas), phi)
    how = {"damping": 0.1, "curvature_images": 3, "tolerance": 1e-6, "batch_size": 5}
    scores = dtrak.gauss_newton_influence(made, *both, iterations=60, **how)
    close(scores.scores, expected)
    assert (scores.method, scores.damping) == ("gauss-newton-cg", Damping(0.1))
    far = dtrak.ekfac_influence(made, *both, damping=0.1).scores
    assert np.abs(far - expected).max() > 0.1 * np.abs(expected).max()
    with pytest.warns(UserWarning, match=r"after 1 iteration, where [36] of [36] res"):
        dtrak.gauss_newton_influence(made, *both, iterations=1, **how)
    how["tolerance"] = 0
    with warnings.catch_warnings(action="error"):
        dtrak.gauss_newton_influence(made, *both, iterations=1, **how)


@pytest.mark.filterwarnings("ignore:conjugate gradients stopped")
def test_conjugate_gradients_come_nearer_at_every_step(net, both, monkeypatch):
    """In the norm of G + Lambda, G float64 of a network with layers of every kind, from
    EK-FAC's solution on, and up to the exact one; devices have other queries."""
    (apply, params), (train, query) = net, both
    task = task_of(apply, per_timestep=False)
    made = dtrak.ekfac(task, params, train, cotangents=0)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        jacobian = jax.jit(jax.jacrev(apply))
        parts = [jacobian(wide, *xt, None) for xt in noised_inputs(task, train)]
    rows = [
        np.concatenate([np.reshape(j, (16, -1)) for j in jax.tree.leaves(part)], axis=1)
        for part in parts
    ]
    j = np.concatenate(rows)
    sizes = [block.eigenvalues.size for block in made.blocks.values()]
    lambdas = np.repeat(0.3 * made.mean_eigenvalues, sizes)
    kept = np.isfinite(lambdas)
    matrix = (2 / 16 * j.T @ j / len(parts))[kept][:, kept] + np.diag(lambdas[kept])
    g = np.asarray(dtrak.featurize(task, params, query, EXACT), np.float64)[:, kept]
    exact = np.linalg.solve(matrix, g.T).T
    solutions, make = [], whole.product_function

    def recorded(mesh):
        def product(gradients, parts):
            solutions.append(np.concatenate(parts, axis=1))
            return make(mesh)(gradients, parts)

        return product

    monkeypatch.setattr(whole, "product_function", recorded)
    errors = []
    for iterations in (0, 1, 2, 4, 200):
        how = {"damping": 0.3, "iterations": iterations, "tolerance": 1e-5}
        tau = dtrak.gauss_newton_influence(made, train, query, **how).scores
        if not iterations:
            close(dtrak.ekfac_influence(made, train, query, damping=0.3).scores, tau)
        assert not solutions[-1][:, ~kept].any()
        off = solutions[-1][:, kept] - exact
        errors.append(np.einsum("qp,pr,qr->q", off, matrix, off))
    assert (np.diff(errors, axis=0) <= 1e-6 * errors[0]).all()
    assert (errors[-1] < 1e-8 * errors[0]).all()
    assert (errors[3] < 0.5 * errors[0]).all()


@pytest.mark.parametrize("count", [1, 4, 7, 10, 14])
def test_noised_images_are_spread_over_images_and_pairs(count):
    rows, pairs = batch_of(count, 7, 2)
    assert len({*zip(rows, pairs[:, 0])}) == count
    for numbers, size in ((rows, 7), (pairs[:, 0], 2)):
        each = np.bincount(numbers, minlength=size)
        assert each.max() - each.min() <= 1
    np.testing.assert_array_equal(batch_of(0, 7, 2)[0], batch_of(99, 7, 2)[0])


def test_products_have_no_groups_but_those_of_the_network(net, both):
    """Whatever is batched over the vectors stays an ordinary convolution."""
    (apply, params), mesh = net, example_mesh(jax.local_devices(), 1)
    task = task_of(apply)
    how = (params, None), both[0], None, mesh
    layout, program = product_program(task, *how, 64, 100)
    vectors = program.arguments[2]
    assert (layout.size, len(vectors[0])) == (8, 8 * mesh.size)
    text = str(program.function.trace(*program.arguments).jaxpr)
    groups = re.findall(r"(?:feature|batch)_group_count=(\d+)", text)
    assert {*groups} == {"1", "2"}
    layout, program = product_program(task, *how, 64, 3)
    assert (layout.size, len(program.arguments[2][0])) == (21, 3 * mesh.size)


def test_random_cotangents_are_right_in_expectation(matrix, both):
    """A hundred times as many err by a tenth."""
    task = task_of(linear)
    exact = dtrak.ekfac(task, matrix, both[0], cotangents=0)
    near = dtrak.ekfac(task, matrix, both[0], cotangents=200)
    far = dtrak.ekfac(task, matrix, both[0], cotangents=2)
    expected = dense(exact.blocks[""])
    errors = [
        np.linalg.norm(dense(made.blocks[""]) - expected) / np.linalg.norm(expected)
        for made in (near, far)
    ]
    assert errors[0] < 0.12 and 5 < errors[1] / errors[0] < 20


def test_devices_and_batches_change_nothing(golden, both, monkeypatch):
    """Random cotangents and independent noise belong to an image's id."""
    _, params = golden
    train, query = (np.concatenate([x, x[::-1]], axis=3) for x in both)
    task = task_of(golden_apply, noise="independent", draws=2)

    def scores(batch_size):
        made = dtrak.ekfac(task, params, train, batch_size=batch_size)
        groups = {"half": [*"aabbbbb"]}
        how = {"batch_size": batch_size, "groups": groups}
        searched = {"damping": 0.1, "iterations": 3, "tolerance": 1e-9, **how}
        with pytest.warns(UserWarning, match="12 of 12 residuals are above 1e-09"):
            near = dtrak.gauss_newton_influence(made, train, query, **searched)
        return made, dtrak.ekfac_influence(made, train, query, **how), near

    spread, actual, near = scores(1)
    first = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: first)
    alone, expected, same = scores(5)
    for path, block in spread.blocks.items():
        close(dense(block), dense(alone.blocks[path]), 1e-4)
    close(actual.scores, expected.scores, 1e-4)
    close(actual.errors, expected.errors, 1e-4)
    close(near.scores, same.scores, 1e-4)
    close(near.errors, same.errors, 1e-4)
    assert (expected.errors > 0).all() and expected.freedom
    assert (expected.group("half").errors > 0).all()


def test_gradients_are_of_the_loss_and_noise_is_of_the_role(matrix, both):
    """Whatever the task's measurement; a query's independent noise is its own."""
    made = dtrak.ekfac(task_of(linear, measurement="square"), matrix, both[0])
    expected = dtrak.ekfac(task_of(linear, measurement=loss), matrix, both[0])
    close(dense(made.blocks[""]), dense(expected.blocks[""]))
    scores, same = (dtrak.ekfac_influence(c, *both).scores for c in (made, expected))
    close(scores, same)
    # So it is with another task of the user's.
    task = task_of(linear, measurement="square")
    same = dtrak.ekfac_influence(dataclasses.replace(made, task=task), *both).scores
    close(scores, same)
    other = dataclasses.replace(made, task=task_of(linear, noise="independent"))
    again = dtrak.ekfac_influence(other, both[0], both[0]).scores
    assert np.abs(again - again.T).max() > 0.01 * np.abs(again).max()


def test_what_is_stored_is_read(matrix, both, tmp_path, monkeypatch):
    path, task = tmp_path / "curvature.npz", task_of(linear)
    made = dtrak.ekfac(task, matrix, both[0], store=path)
    monkeypatch.setattr(curvatures, "pass_programs", None)
    again = dtrak.ekfac(task, matrix, both[0], store=path)
    np.testing.assert_array_equal(dense(again.blocks[""]), dense(made.blocks[""]))
    for arguments, changes in (
        ((task, 2 * matrix, both[0]), {}),
        ((task, matrix, both[0]), {"cotangents": 2}),
        ((task_of(linear, seed=1), matrix, both[0]), {}),
    ):
        with pytest.raises(ValueError, match="is no curvature of this network, task"):
            dtrak.ekfac(*arguments, store=path, **changes)


def test_what_is_refused(matrix, both):
    task = task_of(linear)
    with pytest.raises(ValueError, match="cotangents is -1"):
        dtrak.ekfac(task, matrix, both[0], cotangents=-1)
    apart = np.stack([both[0]] * 2, axis=1)
    with pytest.raises(ValueError, match=r"must be \[n, H, W, C\]"):
        dtrak.ekfac(task, matrix, apart)

    def untagged(params, x, t, cond):
        return (x.reshape(len(x), -1) @ params).reshape(x.shape)

    with pytest.warns(UserWarning, match="no layer of the network is tagged"):
        made = dtrak.ekfac(task_of(untagged), matrix, both[0])
    assert repr(made) == "Curvature(0 layers, 1 diagonals)"
    with pytest.raises(ValueError, match="damping is 0"):
        dtrak.ekfac_influence(made, *both, damping=0)
    with pytest.raises(ValueError, match="damping is by a share"):
        dtrak.ekfac_influence(made, *both, damping=dtrak.effective(0.1))
    for name, value in (("iterations", -1), ("curvature_images", -1), ("tolerance", 2)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            dtrak.gauss_newton_influence(made, *both, **{name: value})
    with pytest.raises(ValueError, match="query is {}"):
        dtrak.ekfac_influence(made, both[0], {})
    with pytest.raises(ValueError, match=r"query_ids must be a dict .* \['a'\]"):
        dtrak.ekfac_influence(made, both[0], {"a": both[1]}, query_ids=["0"])
    with pytest.raises(ValueError, match="groups: 'g' has shape"):
        dtrak.ekfac_influence(made, *both, groups={"g": ["a"]})

    def twice(params, x, t, cond):
        return linear(params, x, t, cond) * params.sum()

    with pytest.raises(
        ValueError, match="tagged as the weight of 1 layers; .* 2 times"
    ):
        dtrak.ekfac(task_of(twice), matrix, both[0])
