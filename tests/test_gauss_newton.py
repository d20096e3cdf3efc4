"""Gauss-Newton matrices of the output, and influence by them."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import apply, init

import dtrak_jax as dtrak
from dtrak_jax.attribution import Damping, Kernels, damping_path, das, influence
from dtrak_jax.features import output_curvature as matrices

SKETCH = dtrak.Projection("sketch", 8)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, init(jax.random.key(0)))


@pytest.fixture(scope="module")
def both():
    """Seven training images and two queries, [4, 4, 1]."""
    rng = np.random.default_rng(2)
    return [rng.uniform(-1, 1, (n, 4, 4, 1)).astype(np.float32) for n in (7, 2)]


def task_of(measurement="loss", **settings):
    settings = {"timesteps": (100, 500)} | settings
    return dtrak.Task(apply, dtrak.linear_schedule(), measurement, **settings)


def all_of(made):
    """H of every pair, float64 [pairs, k, k]."""
    pairs = made.shape[0] if len(made.shape) == 3 else 1
    return np.stack([made.matrix(pair) for pair in range(pairs)]).astype(np.float64)


def close(actual, expected, tolerance=1e-5):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def entry(d):
    """The measurement of one entry of the output."""

    def f(prediction, target, t, schedule):
        return prediction.reshape(-1)[d]

    f.__name__ = f"entry{d}"
    return f


@pytest.mark.parametrize("kind", ["none", "sketch", "gaussian", "factorized"])
def test_it_adds_up_the_gradients_of_all_entries_of_the_output(kind, params, both):
    """sum_n J_n^T (2/D) J_n, in the projection of the features; averaged, their mean."""
    task, projection = task_of(tuple(map(entry, range(16)))), dtrak.Projection(kind, 8)
    jacobian = dtrak.featurize(task, params, both[0], projection).values()
    rows = np.stack([np.asarray(phi, np.float64) for phi in jacobian])
    expected = 2 / 16 * np.einsum("djnk,djnl->jkl", rows, rows)
    how = params, both[0], projection
    # Three cotangents at a time: the last round is filled up.
    made = dtrak.gauss_newton(task_of("square"), *how, cotangents=0, batch_size=3)
    close(all_of(made), expected)
    averaged = task_of(per_timestep=False)
    made = dtrak.gauss_newton(averaged, *how, cotangents=0)
    assert made.shape == expected.shape[1:]
    close(all_of(made), expected.mean(axis=0, keepdims=True))


def test_random_cotangents_are_right_in_expectation(params, both):
    """A hundred times as many err by a tenth. Each image has its own: copies of one image
    show different directions."""
    how = task_of(), params, np.repeat(both[0][:1], 7, axis=0), SKETCH
    exact, near, far = (
        all_of(dtrak.gauss_newton(*how, cotangents=count)) for count in (0, 200, 2)
    )
    errors = [
        np.linalg.norm(made - exact) / np.linalg.norm(exact) for made in (near, far)
    ]
    assert errors[0] < 0.08 and 5 < errors[1] / errors[0] < 20
    one = all_of(dtrak.gauss_newton(*how, cotangents=1))
    assert (np.linalg.matrix_rank(one, tol=1e-4 * one.max()) > 3).all()


def test_devices_and_batches_change_nothing(params, both, monkeypatch):
    """Cotangents and independent noise belong to an image's id."""
    task = task_of(noise="independent")

    def made(batch_size):
        how = {"cotangents": 3, "batch_size": batch_size}
        return all_of(dtrak.gauss_newton(task, params, both[0], SKETCH, **how))

    spread, first = made(2), jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: first)
    close(spread, made(7))


def test_a_store_is_continued_and_no_other_is_taken(
    params, both, tmp_path, monkeypatch
):
    how = params, both[0], SKETCH
    expected = all_of(dtrak.gauss_newton(task_of(), *how))
    cut = matrices.microbatches

    def killed(layout, examples, pair):
        if pair == 1:
            raise KeyboardInterrupt
        return cut(layout, examples, pair)

    monkeypatch.setattr(matrices, "microbatches", killed)
    with pytest.raises(KeyboardInterrupt):
        dtrak.gauss_newton(task_of(), *how, store=tmp_path)
    asked = set()
    monkeypatch.setattr(
        matrices, "microbatches", lambda *args: asked.add(args[2]) or cut(*args)
    )
    made = dtrak.gauss_newton(task_of(), *how, store=tmp_path)
    assert asked == {1}
    np.testing.assert_array_equal(all_of(made), expected)
    loaded = dtrak.features.GaussNewton.load(tmp_path)
    np.testing.assert_array_equal(all_of(loaded), expected)
    assert (loaded.digest, loaded.shape) == (made.digest, made.shape)
    for task, changes in ((task_of(seed=1), {}), (task_of(), {"cotangents": 2})):
        with pytest.raises(ValueError, match="0.npz is another Gauss-Newton matrix: "):
            dtrak.gauss_newton(task, *how, store=tmp_path, **changes)
    (tmp_path / "0.npz").write_bytes((tmp_path / "1.npz").read_bytes())
    with pytest.raises(ValueError, match="0.npz is another Gauss-Newton matrix: "):
        dtrak.gauss_newton(task_of(), *how, store=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metadata.json").touch()
    with pytest.raises(ValueError, match="holds no Gauss-Newton matrices but 'metada"):
        dtrak.gauss_newton(task_of(), *how, store=tmp_path / "other")


def test_influence_takes_it_in_place_of_the_kernel(params, both, tmp_path):
    """tau = g^T (H_j + lambda_j I)^-1 phi, added up over pairs; standard errors too."""
    task = task_of(draws=2)
    train, query = (dtrak.featurize(task, params, x, SKETCH) for x in both)
    made = dtrak.gauss_newton(task, params, both[0], SKETCH)
    phi, g = np.asarray(train, np.float64), np.asarray(query, np.float64)
    h, identity = all_of(made), np.eye(8)

    def inverse(matrix, damping):
        return np.linalg.inv(matrix + damping * np.trace(matrix) / 8 * identity)

    def expected(damping):
        return sum(g[j] @ inverse(h[j], damping) @ phi[j].T for j in range(4))

    scores = dtrak.attribute(train, query, curvature=made)
    assert (scores.method, scores.damping) == ("gauss-newton", Damping(0.001))
    close(scores.scores, expected(0.001))
    assert scores.freedom and (scores.errors > 0).all()
    kernels = Kernels(train, curvature=made, store=tmp_path)
    assert repr(kernels) == f"Kernels({train!r}, Gauss-Newton, eigh)"
    # What is decomposed is kept, and not taken for the kernel of the features.
    close(influence(Kernels(train, store=tmp_path), query), influence(train, query))
    close(influence(kernels, query, 0.1), expected(0.1))
    close(
        influence(Kernels(train, curvature=made, store=tmp_path), query), expected(0.1)
    )
    (path,) = damping_path(kernels, query, [0.01], pooled=True)
    whole = inverse(h.sum(axis=0), 0.01)
    close(path, np.einsum("jqk,kl,jnl->qn", g, whole, phi))


def test_probes_are_the_cotangents_of_the_matrix(params, both):
    """Of the same images and role they add up to it: P J^T c, E c c^T = (2/D) I."""
    how, task = (both[0], SKETCH), task_of(draws=2)
    made = dtrak.gauss_newton(task, params, *how, cotangents=3)
    probed = task_of(dtrak.probes(3), draws=2)
    found = dtrak.featurize(probed, params, *how, role="train")
    assert list(found) == ["probe0", "probe1", "probe2"]
    rows = np.stack([np.asarray(phi, np.float64) for phi in found.values()])
    close(np.einsum("vjnk,vjnl->jkl", rows, rows) / 3, all_of(made))
    # Each image has others, and a query others than a training image of its name.
    alone = dtrak.featurize(probed, params, *how, role="query")["probe1"]
    assert not np.allclose(alone, rows[1], rtol=0.1)


def test_das_is_the_movement_of_a_linear_model_without_an_image():
    """Ridge regression, by finite differences of its solution in an image's weight."""

    def linear(params, x, t, cond):
        return (x.reshape(len(x), 4) @ params).reshape(x.shape)

    rng, ridge, step = np.random.default_rng(4), 0.3, 1e-4
    images = rng.uniform(-1, 1, (11, 2, 2, 1)).astype(np.float32)
    task = dtrak.Task(linear, dtrak.linear_schedule(), "loss", timesteps=(300,))
    inputs, targets = np.empty((2, 11, 4))
    for n, image in enumerate(images):
        words = np.zeros(2, np.uint32)
        eps = task.eps(0, words, n, image.shape)
        x = task.schedule.add_noise(image[None], eps[None], np.array([300]))
        inputs[n], targets[n] = np.ravel(x), np.ravel(eps)

    def solved(weights):
        gram = np.einsum("n,ni,nj->ij", weights, inputs[:9], inputs[:9]) / 2
        right = np.einsum("n,ni,nj->ij", weights, inputs[:9], targets[:9]) / 2
        return np.linalg.solve(gram + ridge * np.eye(4), right)

    change = step * np.eye(9)
    moved = [(solved(1 + d) - solved(1 - d)) / 2 / step for d in change]
    expected = np.mean((inputs[9:] @ np.stack(moved)) ** 2, axis=2).T

    params = solved(np.ones(9)).astype(np.float32)
    how = params, images[:9], dtrak.Projection("none")
    kernels = Kernels(
        dtrak.featurize(task, *how),
        curvature=dtrak.gauss_newton(task, *how, cotangents=0),
    )
    # The output's entries, as cotangents whose mean outer product is (2/D) I.
    entries = dataclasses.replace(task, measurement=tuple(map(entry, range(4))))
    rows = dtrak.featurize(entries, params, images[9:], dtrak.Projection("none"))
    probes = [np.sqrt(2) * np.asarray(phi) for phi in rows.values()]
    close(das(kernels, probes, dtrak.absolute(ridge)), expected, 1e-3)


def test_attribute_takes_features_of_probes(params, both):
    task, probed = task_of(draws=2), task_of(dtrak.probes(3), draws=2)
    train = dtrak.featurize(task, params, both[0], SKETCH)
    query = dtrak.featurize(probed, params, both[1], SKETCH)
    made = dtrak.gauss_newton(task, params, both[0], SKETCH)
    how = {"method": "das", "curvature": made}
    scores = dtrak.attribute(train, query, **how)
    phi, h = np.asarray(train, np.float64), all_of(made)
    g = np.stack([np.asarray(each, np.float64) for each in query.values()])
    unit = np.trace(h, axis1=1, axis2=2)[:, None, None] / 8
    inverse = np.linalg.inv(h + 0.001 * unit * np.eye(8))
    expected = np.einsum("vjqk,jkl,jnl->vjqn", g, inverse, phi) ** 2 / 2
    close(scores.scores, expected.mean(axis=0).sum(axis=0))
    assert (scores.damping, scores.signed) == (Damping(0.001), False)
    assert scores.freedom and (scores.errors > 0).all()
    several = dtrak.attribute(train, {"a": query, "b": query}, **how)
    close(several["b"].scores, scores.scores)
    with pytest.raises(ValueError, match="query has sets of 1 and 3 probes; those"):
        one = {"probe0": query["probe0"]}
        dtrak.attribute(train, {"a": query, "b": one}, **how)
    with pytest.raises(TypeError, match=r"query is Features.*; das takes {probe: f"):
        dtrak.attribute(train, query["probe0"], **how)
    of_loss = dtrak.featurize(task, params, both[1], SKETCH)
    with pytest.raises(ValueError, match="'loss'; das takes those of dtrak_jax.probes"):
        dtrak.attribute(train, {"loss": of_loss}, **how)
    with pytest.raises(ValueError, match="'probe0'; only method 'das' takes those of"):
        dtrak.attribute(train, query, curvature=made)
    with pytest.raises(ValueError, match="query of 'a' has the same probe twice"):
        twice = {"probe0": query["probe0"], "probe1": query["probe0"]}
        dtrak.attribute(train, {"a": twice}, **how)
    with pytest.raises(TypeError, match="are a dict of 'probe0', 'probe1', 'probe2'"):
        dtrak.attribute(query, query, **how)
    with pytest.raises(ValueError, match="query has probes of different queries"):
        # Other pictures of the same ids.
        others = dtrak.featurize(probed, params, both[0][:2], SKETCH)
        mixed = {"probe0": query["probe0"], "probe1": others["probe1"]}
        dtrak.attribute(train, mixed, **how)
    with pytest.raises(ValueError, match="das takes the Gauss-Newton matrix in place"):
        das(Kernels(train), list(query.values()))
    with pytest.raises(ValueError, match="count is 0"):
        dtrak.probes(0)


def test_what_is_refused(params, both):
    task = task_of()
    train, query = (dtrak.featurize(task, params, x, SKETCH) for x in both)
    made = dtrak.gauss_newton(task, params, both[0], SKETCH)
    kernels = Kernels(train, curvature=made)
    with pytest.raises(ValueError, match="method is 'trak', which is made from"):
        dtrak.attribute(train, query, method="trak", curvature=made)
    with pytest.raises(ValueError, match="which is made from features, and the Gauss"):
        dtrak.attribute(train, query, method="gauss-newton")
    with pytest.raises(ValueError, match="do not belong together: ids is"):
        dtrak.attribute(query, train, curvature=made)
    with pytest.raises(ValueError, match=r"the curvature \(2, 8, 8\); it must be \(1"):
        dtrak.attribute(np.ones((1, 7, 8)), np.ones((1, 2, 8)), curvature=made)
    with pytest.raises(ValueError, match="give the curvature to these"):
        dtrak.attribute(Kernels(train), query, curvature=made)
    with pytest.raises(ValueError, match="a Gauss-Newton matrix needs kernels decomp"):
        dtrak.attribute(train, query, curvature=made, solver="cg")
    with pytest.raises(TypeError, match="curvature is .*; it must be GaussNewton"):
        dtrak.attribute(train, query, curvature=np.ones((2, 8, 8)))
    independent = task_of(noise="independent")
    without = dtrak.featurize(independent, params, both[0], SKETCH)
    of_train = dtrak.gauss_newton(independent, params, both[0], SKETCH)
    with pytest.raises(
        ValueError, match="noise_of is 'train' there and 'picture' here"
    ):
        Kernels(without, curvature=of_train)
    squares = dtrak.featurize(task_of("square"), params, both[0], SKETCH)
    others = dtrak.featurize(task_of("square"), params, both[1], SKETCH)
    with pytest.raises(ValueError, match="needs features of the measurement 'loss'"):
        dtrak.attribute(squares, others, curvature=made)
    with pytest.raises(ValueError, match="a removal set takes kernels of the training"):
        dtrak.removal_set(kernels, query, 2)
    for call in (
        lambda: dtrak.predict(kernels, query, np.ones((1, 7), bool)),
        lambda: dtrak.attribution.coverage(kernels, query),
    ):
        with pytest.raises(ValueError, match="coverage takes kernels of the training"):
            call()
    with pytest.raises(ValueError, match="cotangents is -1"):
        dtrak.gauss_newton(task, params, both[0], SKETCH, cotangents=-1)
    with pytest.raises(ValueError, match=r"must be \[n, H, W, C\]"):
        apart = np.stack([both[0]] * 2, axis=1)
        dtrak.gauss_newton(task, params, apart, SKETCH)
