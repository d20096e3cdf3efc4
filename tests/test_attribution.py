"""The solver against float64 closed forms, and attribution against known answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

import dtrak_jax as dtrak
from dtrak_jax.attribution import Damping, factorize, solver

SCHEDULE = dtrak.linear_schedule()


def ridge(phi, query, damping):
    """query (phi^T phi + damping I)^-1 phi^T in float64."""
    phi, query = phi.astype(np.float64), query.astype(np.float64)
    hessian = phi.T @ phi + damping * np.eye(phi.shape[1])
    return query @ np.linalg.solve(hessian, phi.T)


def features(n, k, q=7, seed=0):
    rng = np.random.default_rng(seed)
    phi, query = rng.normal(size=(n, k)), rng.normal(size=(q, k))
    return phi.astype(np.float32), query.astype(np.float32)


@pytest.mark.parametrize(("n", "k"), [(20, 50), (50, 20), (30, 30), (1, 9), (9, 1)])
@pytest.mark.parametrize("value", [1e-2, 1.0, 100.0])
def test_scores_equal_the_float64_ridge(n, k, value):
    """Dual where n <= k, primal where n > k."""
    phi, query = features(n, k)
    kernel = factorize(phi)
    assert kernel.dual == (n <= k)
    scores = dtrak.attribute(phi, query, damping=dtrak.absolute(value)).scores
    expected = ridge(phi, query, value)
    # The Gram matrix is rounded to float32, and lambda magnifies what that changed.
    rounding = 4 * kernel.floor / (kernel.eigenvalues[0] + value)
    tolerance = max(1e-5, rounding) * np.abs(expected).max()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)


def test_dual_equals_primal():
    """The same features padded by empty columns, which force the other form."""
    phi, query = features(40, 30)
    wide = np.pad(phi, ((0, 0), (0, 20))), np.pad(query, ((0, 0), (0, 20)))
    assert not factorize(phi).dual
    assert factorize(wide[0]).dual
    for value in (0.5, 50.0):
        primal = dtrak.attribute(phi, query, damping=dtrak.absolute(value)).scores
        dual = dtrak.attribute(*wide, damping=dtrak.absolute(value)).scores
        np.testing.assert_allclose(dual, primal, atol=1e-5 * np.abs(primal).max())


def test_right_at_a_damping_where_a_float32_inverse_fails():
    """A Gram spectrum like 1e10 / i^2, as gradients have it, and n < k."""
    rng = np.random.default_rng(0)
    n, k = 100, 300
    left, right = (np.linalg.qr(rng.normal(size=(m, n)))[0] for m in (n, k))
    singular = 1e5 / np.arange(1, n + 1)
    phi = ((left * singular) @ right.T).astype(np.float32)
    query = rng.normal(size=(5, k)).astype(np.float32)
    for value in (1.0, 100.0, 1e4):
        wide = phi.astype(np.float64)
        gram = wide @ wide.T + value * np.eye(n)
        expected = query.astype(np.float64) @ wide.T @ np.linalg.inv(gram)
        ours = dtrak.attribute(phi, query, damping=dtrak.absolute(value)).scores
        np.testing.assert_allclose(ours, expected, atol=1e-2 * np.abs(expected).max())
    hessian = phi.T @ phi + np.float32(1) * np.eye(k, dtype=np.float32)
    float32 = query @ np.linalg.inv(hessian) @ phi.T
    expected = dtrak.attribute(phi, query, damping=dtrak.absolute(1.0)).scores
    correlation = np.corrcoef(float32.ravel(), expected.ravel())[0, 1]
    assert not correlation > 0.9


def test_kernels_of_timesteps_are_damped_and_added_separately():
    phi, query = features(10, 20)
    train = np.stack([phi, 1000 * phi[::-1]])
    queries = np.stack([query, 1000 * query])
    scores = dtrak.attribute(train, queries, damping=0.1)
    expected = 0
    for p, q, value in zip(train, queries, scores.lambdas, strict=True):
        gram = p.astype(np.float64) @ p.T.astype(np.float64)
        np.testing.assert_allclose(value, 0.1 * np.trace(gram) / 10, rtol=1e-5)
        expected = expected + ridge(p, q, value)
    np.testing.assert_allclose(scores.scores, expected, atol=1e-5)
    assert scores.eigenvalues.shape == (2, 10)


def test_relative_damping_is_free_of_scale():
    phi, query = features(10, 20)
    np.testing.assert_allclose(
        dtrak.attribute(1e3 * phi, 1e3 * query).scores,
        dtrak.attribute(phi, query).scores,
        atol=1e-5,
    )


def test_the_path_agrees_with_single_values_and_factorises_once(monkeypatch):
    phi, query = features(12, 30)
    calls = []
    monkeypatch.setattr(
        "dtrak_jax.attribution.methods.factorize",
        lambda p: (calls.append(1), factorize(p))[1],
    )
    path = dtrak.damping_path(phi, query)
    assert path.shape == (len(solver.GRID), 7, 12)
    assert len(calls) == 1
    for value, scores in zip(solver.GRID, path, strict=True):
        one = dtrak.attribute(phi, query, damping=value).scores
        np.testing.assert_allclose(one, scores, atol=1e-5)


def test_gram_matrices_do_not_depend_on_blocks_or_devices(monkeypatch, one_device):
    phi, _ = features(13, 1001)
    expected = phi.astype(np.float64) @ phi.T.astype(np.float64)
    np.testing.assert_allclose(solver.gram_matrix(phi), expected, atol=1e-3)
    monkeypatch.undo()
    assert len(jax.local_devices()) == 8
    monkeypatch.setattr(solver, "BLOCK", 13 * 100)
    np.testing.assert_allclose(solver.gram_matrix(phi), expected, atol=1e-3)


# Known answers


def test_a_linear_models_scores_are_the_closed_form_ridge_influence():
    """How a ridge prediction moves with one training label, by scikit-learn.

    The network predicts params . x_t, so its gradient is x_t, and the score is
    d prediction(query) / d label(n) of a ridge regression on x_t.
    """

    def apply(params, x, t, cond):
        return jnp.broadcast_to(
            jnp.sum(params * x, axis=(1, 2, 3), keepdims=True), x.shape
        )

    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (12, 3, 3, 1)).astype(np.float32)
    task = dtrak.Task(apply, SCHEDULE, measurement="mean", timesteps=(50, 400))
    params = rng.normal(size=(1, 3, 3, 1)).astype(np.float32)
    exact = dtrak.Projection("none")
    train = dtrak.featurize(task, params, images[:9], exact)
    query = dtrak.featurize(task, params, images[9:], exact)
    scores = dtrak.attribute(train, query, damping=0.3)

    expected = 0
    for (t, draw), value in zip(task.pairs, scores.lambdas, strict=True):
        pair = task.pairs.index((t, draw))
        eps = np.asarray(task.eps(pair, np.zeros(2, np.uint32), 0, (3, 3, 1)))
        scale = SCHEDULE.alpha_bar[t]
        x = (np.sqrt(scale) * images + np.sqrt(1 - scale) * eps).reshape(12, 9)
        model = Ridge(alpha=value, fit_intercept=False)
        labels = rng.normal(size=9)
        before = model.fit(x[:9], labels).predict(x[9:])
        moved = [
            model.fit(x[:9], labels + np.eye(9)[n]).predict(x[9:]) - before
            for n in range(9)
        ]
        expected = expected + np.array(moved).T
    np.testing.assert_allclose(scores.scores, expected, atol=1e-5)


def mlp(params, x, t, cond):
    """A plain-function denoiser; no flax."""
    flat = jnp.concatenate([x.reshape(len(x), -1), t[:, None] / 1000], axis=1)
    hidden = jnp.tanh(flat @ params["w1"])
    return (hidden @ params["w2"]).reshape(x.shape)


def mlp_params(seed=0):
    k1, k2 = jax.random.split(jax.random.key(seed))
    return {
        "w1": jax.random.normal(k1, (17, 32)) / 4,
        "w2": jax.random.normal(k2, (32, 16)) / 6,
    }


@pytest.mark.parametrize(
    ("method", "measurement"), [("dtrak", "square"), ("trak", "loss")]
)
@pytest.mark.parametrize("per_timestep", [True, False])
def test_planted_duplicates_rank_first(method, measurement, per_timestep):
    """Exact copies of each query among the training images."""
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (60, 4, 4, 1)).astype(np.float32)
    queries = rng.uniform(-1, 1, (5, 4, 4, 1)).astype(np.float32)
    planted = {q: [7 * q + 2, 7 * q + 5] for q in range(5)}
    for q, rows in planted.items():
        images[rows] = queries[q]
    task = dtrak.Task(
        mlp,
        SCHEDULE,
        measurement=measurement,
        timesteps=(100, 300, 500),
        per_timestep=per_timestep,
    )
    projection = dtrak.Projection(dim=256)
    train = dtrak.featurize(task, mlp_params(), images, projection)
    query = dtrak.featurize(task, mlp_params(), queries, projection)
    top = dtrak.attribute(train, query, method=method).top(2)
    for q, rows in planted.items():
        assert set(top.index[q]) == set(rows)


# Scores


def scores():
    rng = np.random.default_rng(0)
    train, query = rng.normal(size=(2, 6, 4)).astype(np.float32)
    return dtrak.attribute(train, query[:3])


def test_top_is_sorted_and_opposing_is_the_other_end():
    result = scores()
    top, bottom = result.top(6), result.top(6, opposing=True)
    assert (np.diff(top.scores) <= 0).all()
    assert (np.diff(bottom.scores) >= 0).all()
    np.testing.assert_array_equal(top.index, bottom.index[:, ::-1])
    np.testing.assert_array_equal(top.ids, result.train_ids[top.index])
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"count is {count}; it must be 1 to 6"):
            result.top(count)


def test_scores_survive_saving(tmp_path):
    result = scores()
    result.save(tmp_path / "s.npz")
    loaded = dtrak.Scores.load(tmp_path / "s.npz")
    for field in dataclasses.fields(result):
        saved, read = (getattr(s, field.name) for s in (result, loaded))
        np.testing.assert_array_equal(saved, read)
    with np.load(tmp_path / "s.npz") as archive:
        assert str(archive["sign"]).startswith("positive: training on the example")
    whole = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "s.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        dtrak.Scores.load(tmp_path / "s.npz")
    np.savez(tmp_path / "other.npz", a=1)
    with pytest.raises(ValueError, match="holds no scores"):
        dtrak.Scores.load(tmp_path / "other.npz")


# Bad input


@pytest.fixture(scope="module")
def pair_of():
    """A function that makes training and query features of changed tasks."""
    images = np.random.default_rng(0).uniform(-1, 1, (4, 4, 4, 1)).astype(np.float32)

    def make(dim=8, seed=0, **changes):
        settings = {"measurement": "square", "timesteps": (10, 20)} | changes
        task = dtrak.Task(mlp, SCHEDULE, **settings)
        return dtrak.featurize(
            task, mlp_params(seed), images, dtrak.Projection(dim=dim)
        )

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 9}, "differ in the number of examples only"),
        ({"seed": 1}, "do not belong together: params"),
        ({"timesteps": (10, 30)}, "timesteps"),
        ({"measurement": "loss"}, "measurements"),
        ({"noise": "independent"}, "noise is 'common' there and 'independent' here"),
        ({"per_timestep": False}, "differ in the number of examples only"),
    ],
)
def test_features_that_do_not_belong_together(pair_of, changes, message):
    with pytest.raises(ValueError, match=message):
        dtrak.attribute(pair_of(), pair_of(**changes))


def test_cyclic_queries_are_a_control_not_an_error(pair_of):
    control = dtrak.attribute(pair_of(), pair_of(noise="cyclic")).scores
    matched = dtrak.attribute(pair_of(), pair_of()).scores
    assert np.abs(control - matched).max() > 1e-3
    with pytest.raises(ValueError, match="noise"):
        dtrak.attribute(pair_of(noise="cyclic"), pair_of())


def test_wrong_methods(pair_of):
    with pytest.raises(ValueError, match="'dtrak', 'trak'"):
        dtrak.attribute(pair_of(), pair_of(), method="tracin")
    with pytest.raises(ValueError, match="needs features of the measurement 'loss'"):
        dtrak.attribute(pair_of(), pair_of(), method="trak")
    assert dtrak.attribute(pair_of(), pair_of()).method == "dtrak"


def test_wrong_dampings():
    phi, query = features(5, 8)
    for value in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping is"):
            dtrak.attribute(phi, query, damping=value)
    repeated = np.concatenate([phi, phi])
    with pytest.raises(ValueError, match="rounding errors"):
        dtrak.attribute(repeated, query, damping=1e-9)
    assert solver.factorize(repeated).damping(Damping(1e-3)) > 0


def test_wrong_arrays():
    phi, query = features(5, 8)
    with pytest.raises(ValueError, match="with nothing empty"):
        dtrak.attribute(phi[:0], query)
    with pytest.raises(ValueError, match="with nothing empty"):
        dtrak.attribute(phi[0], query)
    with pytest.raises(ValueError, match="not finite"):
        dtrak.attribute(phi * np.nan, query)
    with pytest.raises(ValueError, match="all features of the training set are 0"):
        dtrak.attribute(0 * phi, query)


def test_too_large_for_the_host(monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 16)
    with pytest.raises(MemoryError, match="smaller projection dim, or solver .cg."):
        dtrak.attribute(*features(5, 8))
