"""The solver against float64 closed forms, and attribution against known answers."""

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from sklearn.linear_model import Ridge

import dtrak_jax as dtrak
from dtrak_jax import attribution, files
from dtrak_jax.attribution import GRID, Damping, Kernels, kernel, linalg
from dtrak_jax.attribution.influence import solution
from dtrak_jax.attribution.kernel import driver_for, factorize

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
    made = factorize(phi)
    assert made.dual == (n <= k)
    scores = dtrak.attribute(phi, query, damping=dtrak.absolute(value)).scores
    expected = ridge(phi, query, value)
    # The Gram matrix is rounded to float32, and lambda magnifies what that changed.
    rounding = 4 * np.finfo(np.float32).eps * made.eigenvalues[-1]
    rounding /= made.eigenvalues[0] + value
    tolerance = max(1e-5, rounding) * np.abs(expected).max()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)


def test_dual_equals_primal():
    """Empty columns force the other form on the same features."""
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


def test_the_path_agrees_with_single_values():
    phi, query = features(12, 30)
    path = dtrak.damping_path(phi, query)
    assert path.shape == (len(GRID), 7, 12)
    for value, scores in zip(GRID, path, strict=True):
        single = dtrak.attribute(phi, query, damping=value).scores
        np.testing.assert_allclose(single, scores, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)], ids=["dual", "primal"])
def test_a_share_gives_every_pair_its_own_effective_dimension(shape):
    both = [features(*shape, seed=seed) for seed in range(2)]
    phi, query = (np.stack(part) for part in zip(*both, strict=True))
    phi[1] *= 100
    found = dtrak.attribute(phi, query, damping=dtrak.effective(0.3))
    for values, value in zip(found.eigenvalues, found.lambdas, strict=True):
        dimension = np.sum(values / (values + value))
        assert dimension == pytest.approx(0.3 * 12, rel=1e-5)
    apart = [
        dtrak.attribute(*pair, damping=dtrak.absolute(value)).scores
        for *pair, value in zip(phi, query, found.lambdas, strict=True)
    ]
    np.testing.assert_allclose(found.scores, sum(apart), rtol=1e-4, atol=1e-6)
    middle = dtrak.absolute(np.sqrt(np.prod(found.lambdas)))
    dampings = [dtrak.effective(0.3), middle]
    pooled = dtrak.damping_path(phi, query, dampings, pooled=True)
    np.testing.assert_allclose(*pooled, rtol=1e-6)


def test_files_that_know_no_share_and_no_sign_load(tmp_path):
    """Those of earlier versions; all scores had a sign then."""
    scores = dtrak.attribute(*features(6, 9), damping=dtrak.absolute(2.0))
    scores.save(tmp_path / "new.npz")
    assert dtrak.Scores.load(tmp_path / "new.npz").damping == scores.damping
    saved = files.read_npz(tmp_path / "new.npz")
    del saved["sign"]
    saved["damping"] = np.array('{"value": 2.0, "absolute": true}')
    files.write_npz(tmp_path / "old.npz", **saved)
    old = dtrak.Scores.load(tmp_path / "old.npz")
    assert old.damping == scores.damping and old.signed


def test_a_share_that_no_kernel_can_have_is_refused():
    phi, query = features(6, 9)
    for share in (0, 1, 1.5, "half"):
        with pytest.raises((ValueError, TypeError), match="share|damping"):
            dtrak.effective(share)
    with pytest.raises(ValueError, match=r"at most 0\.17 of min\(n, k\)"):
        dtrak.attribute(phi[[0] * 6], query, damping=dtrak.effective(0.2))
    iterated = Kernels(phi, solver="cg")
    with pytest.raises(ValueError, match="which needs kernels decomposed: solver"):
        dtrak.attribute(iterated, query, damping=dtrak.effective(0.2))


def test_gram_matrices_do_not_depend_on_blocks_or_devices(monkeypatch, one_device):
    phi, _ = features(13, 1001)
    expected = phi.astype(np.float64) @ phi.T.astype(np.float64)
    np.testing.assert_allclose(linalg.gram_matrix(phi), expected, atol=1e-3)
    monkeypatch.undo()
    assert len(jax.local_devices()) == 8
    monkeypatch.setattr(linalg, "BLOCK", 13 * 100)
    np.testing.assert_allclose(linalg.gram_matrix(phi), expected, atol=1e-3)


# Eigendecompositions, each made once


def test_the_driver_is_one_whose_workspace_has_a_size():
    """1 + 6 m + 2 m^2 numbers of evd are more than 2^31 - 1 from 32,767 on."""
    assert {m: driver_for(m) for m in (2, 5000, 32766, 32767, 32768, 65536)} == {
        **dict.fromkeys((2, 5000, 32766), "evd"),
        **dict.fromkeys((32767, 32768, 65536), "evr"),
    }


@pytest.mark.parametrize(("n", "k"), [(40, 90), (90, 40)])
def test_both_drivers_give_one_decomposition(n, k, monkeypatch):
    phi, query = features(n, k)
    divided, scores = factorize(phi), dtrak.attribute(phi, query).scores
    monkeypatch.setattr(kernel, "driver_for", lambda m: "evr")
    robust, again = factorize(phi), dtrak.attribute(phi, query).scores
    values = divided.eigenvalues
    assert (np.diff(values) >= 0).all()
    atol = 1e-13 * values[-1]
    np.testing.assert_allclose(robust.eigenvalues, values, rtol=0, atol=atol)
    gram_matrix = linalg.gram_matrix(phi if n <= k else phi.T)
    for made in (divided, robust):
        product = (made.eigenvectors.T * values) @ made.eigenvectors
        np.testing.assert_allclose(product, gram_matrix, rtol=0, atol=10 * atol)
    np.testing.assert_allclose(again, scores, rtol=0, atol=1e-6 * np.abs(scores).max())


@pytest.fixture
def decomposed(monkeypatch):
    """The shapes of all features whose kernel was decomposed."""
    shapes = []

    def counted(phi):
        shapes.append(phi.shape)
        return factorize(phi)

    monkeypatch.setattr(kernel, "factorize", counted)
    return shapes


def as_features(array, **fingerprint):
    """Gradients of the loss in memory, as `featurize` returns them."""
    made = {"noise": "common", "timesteps": [5, 500], "draws": 1} | fingerprint
    ids = tuple(f"i{i}" for i in range(array.shape[-2]))
    beside = np.zeros(array.shape[:-1])
    return dtrak.Features("loss", ids, ts.array(array), beside, beside, made)


def use_all(kernels, query):
    """Everything that is made from the kernels of one model's loss."""
    journey = np.asarray(query)[:, ::-1]
    return [
        dtrak.attribute(kernels, query, method="trak").scores,
        dtrak.attribute(kernels, {"a": query, "b": query}, method="trak")["b"].scores,
        dtrak.attribute(kernels, query, method="relative-influence").scores,
        dtrak.attribute(kernels, query, method="renormalised-influence").scores,
        dtrak.attribute(kernels, journey, method="trak", damping=0.5).scores,
        dtrak.damping_path(kernels, query),
        dtrak.damping_path(kernels, query, subsets=np.ones((2, 12), bool)),
    ]


@pytest.mark.parametrize("k", [30, 7])
def test_all_methods_and_dampings_share_a_decomposition(k, tmp_path, decomposed):
    """One for each pair, in this process and, read from the disk, in all later ones."""
    pairs = [features(12, k, seed=1), features(12, k, seed=2)]
    train, query = map(as_features, map(np.stack, zip(*pairs, strict=True)))
    plain = use_all(train, query)
    assert len(decomposed) == 2 * len(plain)
    decomposed.clear()
    first = use_all(Kernels(train, tmp_path / "kernels"), query)
    assert decomposed == [(12, k), (12, k)]
    later = use_all(Kernels(train, tmp_path / "kernels"), query)
    assert len(decomposed) == 2
    for scores in zip(plain, first, later, strict=True):
        np.testing.assert_array_equal(scores[0], scores[1])
        np.testing.assert_array_equal(scores[0], scores[2])
    # Eigenvectors of other features are of no use.
    changed = dataclasses.replace(train, fingerprint=train.fingerprint | {"params": 1})
    dtrak.attribute(Kernels(changed, tmp_path / "kernels"), np.asarray(query))
    assert len(decomposed) == 4


def test_kernels_too_large_to_keep_are_made_anew(tmp_path, decomposed, monkeypatch):
    monkeypatch.setattr(kernel, "KEPT_IN_MEMORY", 12 * 12 * 8)
    monkeypatch.setattr(kernel, "KEPT_ON_DISK", 2 * 12 * 12 * 8 - 1)
    pairs = [features(12, 30, seed=1), features(12, 30, seed=2)]
    train, query = map(as_features, map(np.stack, zip(*pairs, strict=True)))
    kernels = Kernels(train, tmp_path / "kernels")
    first = dtrak.attribute(kernels, query)
    again = dtrak.attribute(kernels, query)
    # The first is in memory; the spectra of both are known.
    assert len(decomposed) == 3
    assert not (tmp_path / "kernels").exists()
    np.testing.assert_array_equal(first.scores, again.scores)
    np.testing.assert_array_equal(first.eigenvalues, again.eigenvalues)


def test_the_pooled_kernel_is_made_once(decomposed):
    kernels = Kernels(np.stack([features(12, 30)[0], features(12, 30, seed=1)[0]]))
    query = np.stack([features(12, 30)[1], features(12, 30, seed=1)[1]])
    for dampings in ((0.1,), GRID):
        dtrak.damping_path(kernels, query, dampings, pooled=True)
    assert decomposed == [(24, 30)]


def test_a_damaged_decomposition_is_named(tmp_path):
    phi, query = features(5, 8)
    train = as_features(phi[None])
    dtrak.attribute(Kernels(train, tmp_path), query[None])
    path = tmp_path / "0.npz"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"0\.npz is damaged"):
        dtrak.attribute(Kernels(train, tmp_path), query[None])


# The float64 program


@pytest.mark.parametrize(("n", "k"), [(60, 101), (101, 60)])
def test_the_program_is_as_accurate_as_numpy(n, k, monkeypatch):
    """Scores, sums over subsets and norms agree to 1e-12, in several blocks."""
    phi, query = features(n, k)
    dual, _, values, vectors = made = factorize(phi)
    wide, subsets = phi.astype(np.float64), np.arange(3 * n).reshape(3, n) % 5 == 0
    left = (query.astype(np.float64) @ wide.T if dual else query) @ vectors.T
    right = vectors if dual else vectors @ wide.T
    monkeypatch.setattr(linalg, "BLOCK", 7 * k)
    ours = solution(made, phi, query)
    sums = solution(made, phi, query, subsets=subsets)
    for value in (1e-3, 10.0):
        inverse = 1 / (values + value)
        expected = (left * inverse) @ right
        factors = (values if dual else 1) * inverse**2
        for made_of, exact in (
            (ours.scores(value), expected),
            (sums.scores(value), expected @ subsets.T),
            (ours.inverse_norms(value), np.sqrt(factors @ right**2)),
        ):
            assert made_of.dtype == np.float64
            tolerance = 1e-12 * np.abs(exact).max()
            np.testing.assert_allclose(made_of, exact, rtol=0, atol=tolerance)


def test_without_a_cpu_device_numpy_solves_and_says_so_once(monkeypatch):
    phi, query = features(12, 30)
    compiled = dtrak.damping_path(phi, query)

    def no_cpu(backend):
        raise RuntimeError(f"Unknown backend: {backend!r} requested")

    monkeypatch.setattr(jax, "local_device_count", no_cpu)
    linalg.has_cpu.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no CPU device here, so NumPy"):
            plain = dtrak.damping_path(phi, query)
        with warnings.catch_warnings(action="error"):
            influence = attribution.relative_influence(phi.T, query[:, :12].copy())
    finally:
        linalg.has_cpu.cache_clear()
    assert np.isfinite(influence).all()
    np.testing.assert_allclose(plain, compiled, rtol=0, atol=1e-12 * plain.max())


# Known answers


def test_a_linear_models_scores_are_the_closed_form_ridge_influence():
    """Scikit-learn tells how a ridge prediction moves with one training label.

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
        unmoved = model.fit(x[:9], labels).predict(x[9:])
        moved = [
            model.fit(x[:9], labels + np.eye(9)[n]).predict(x[9:]) - unmoved
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


@pytest.mark.parametrize("per_timestep", [True, False])
def test_planted_duplicates_rank_first(per_timestep):
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
        measurement=("square", "loss"),
        timesteps=(100, 300, 500),
        per_timestep=per_timestep,
    )
    projection = dtrak.Projection(dim=256)
    train = dtrak.featurize(task, mlp_params(), images, projection)
    query = dtrak.featurize(task, mlp_params(), queries, projection)
    for measurement, method in (("square", "dtrak"), ("loss", "trak")):
        scores = dtrak.attribute(train[measurement], query[measurement], method=method)
        top = scores.top(2)
        for q, rows in planted.items():
            assert set(top.index[q]) == set(rows)


# Scores


def scores(method=None):
    rng = np.random.default_rng(0)
    train, query = rng.normal(size=(2, 6, 4)).astype(np.float32)
    return dtrak.attribute(train, query[:3], method=method)


def test_a_groups_score_is_the_sum_of_its_images():
    scores = np.array([[1, 2, -4, 8, 0.5], [0, -1, 3, 1e-9, 7]], np.float32)
    column = ["b", "a", "b", "c", "a"]
    names, sums = attribution.group_scores(scores, column)
    assert names.tolist() == ["a", "b", "c"] and sums.dtype == np.float64
    expected = [[2.5, -3, 8], [6, 3, np.float32(1e-9)]]
    np.testing.assert_array_equal(sums, expected)
    ids = np.array(column), np.array(["x", "y"])
    made = dtrak.Scores(scores, *ids, "dtrak")
    np.testing.assert_array_equal(made.group(np.array(column)).scores, sums)
    # All in one group, and many images, whose sum is exact in float64.
    names, sums = attribution.group_scores(
        np.ones((1, 2**16), np.float32), ["x"] * 2**16
    )
    assert (names.tolist(), sums.tolist()) == (["x"], [[2**16]])
    for wrong in (column[:4], [column], []):
        with pytest.raises(ValueError, match=r"column has shape .* \[n\] and \[q, n\]"):
            attribution.group_scores(scores, wrong)


def test_top_is_sorted_and_opposing_is_the_other_end():
    result = scores()
    top, bottom = result.top(6), result.top(6, opposing=True)
    assert (np.diff(top.scores) <= 0).all()
    assert (np.diff(bottom.scores) >= 0).all()
    np.testing.assert_array_equal(top.index, bottom.index[:, ::-1])
    np.testing.assert_array_equal(top.ids, result.train_ids[top.index])
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"count is {count}; .* between 1 and 6"):
            result.top(count)


@pytest.mark.parametrize("method", ["trak", "gradient-dot"])
def test_scores_survive_saving(method, tmp_path):
    """With the kernels' fields, and without."""
    result = scores(method)
    result.save(tmp_path / "s.npz")
    assert (result.eigenvalues is None) == (method == "gradient-dot")
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
    with pytest.raises(ValueError, match="'bert'; it must be one of: 'dtrak', 'trak'"):
        dtrak.attribute(pair_of(), pair_of(), method="bert")
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
    assert factorize(repeated).lambda_of(Damping(1e-3)) > 0


def test_wrong_arrays():
    phi, query = features(5, 8)
    with pytest.raises(ValueError, match="with nothing empty"):
        dtrak.attribute(phi[:0], query)
    with pytest.raises(ValueError, match="with nothing empty"):
        dtrak.attribute(phi[0], query)
    with pytest.raises(ValueError, match="not finite"):
        dtrak.attribute(phi * np.nan, query)
    with pytest.raises(ValueError, match="one set of queries or more"):
        dtrak.attribute(phi, {})
    with pytest.raises(ValueError, match="all features of the training set are 0"):
        dtrak.attribute(0 * phi, query)
    silent = np.stack([phi, 0 * phi]), np.stack([query, query])
    with pytest.raises(ValueError, match="set are 0 in pair 1"):
        dtrak.attribute(*silent)
    with pytest.raises(ValueError, match="set are 0 at timestep 500, draw 0"):
        dtrak.attribute(*map(as_features, silent))


def test_too_large_for_the_host(monkeypatch):
    """The largest that it names is the largest that fits, by either driver."""
    monkeypatch.setattr("os.sysconf", lambda name: 16)
    with pytest.raises(MemoryError, match="smaller projection dim, or solver .cg."):
        dtrak.attribute(*features(5, 8))
    for gigabytes in (8, 24, 30, 200):
        monkeypatch.setattr(
            "os.sysconf", lambda name, g=gigabytes: g**0.5 * 1e4 * 10**0.5
        )
        with pytest.raises(MemoryError) as error:
            kernel.check_memory(10**6)
        largest = int(re.search(r"at most (\d+)", str(error.value))[1])
        kernel.check_memory(largest)
        with pytest.raises(MemoryError):
            kernel.check_memory(largest + 1)
