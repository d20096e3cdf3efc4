"""Conjugate gradients are right to what they promise, or refuse."""

import re

import jax
import numpy as np
import pytest
import tensorstore as ts
from conftest import environments, start_process
from test_attribution import features, ridge

import dtrak_jax as dtrak
from dtrak_jax import parallel
from dtrak_jax.attribution import Kernels, Scores, iterative, linalg
from dtrak_jax.config import AttributionConfig, Config


def errors(ours, theirs):
    """Returns the error of every query's scores as a fraction of their norm; 0 / 0 is 0."""
    norms = np.linalg.norm(theirs, axis=1)
    return np.linalg.norm(ours - theirs, axis=1) / np.where(norms, norms, 1)


def steep(n, k, q=5):
    """Features whose kernel has eigenvalues from 1e10 down to 1e-2."""
    rng = np.random.default_rng(0)
    m = min(n, k)
    left, right = (np.linalg.qr(rng.normal(size=(size, m)))[0] for size in (n, k))
    phi = left * np.geomspace(1e5, 1e-1, m) @ right.T
    return phi.astype(np.float32), rng.normal(size=(q, k)).astype(np.float32)


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize(("n", "k"), [(21, 50), (50, 21), (1, 9), (9, 1)])
def test_scores_equal_a_float64_solve_on_every_mesh(n, k, devices, monkeypatch):
    """To 1e-5 of every query's scores in norm, as promised; in two blocks of queries."""
    chosen = jax.devices()[:devices]
    monkeypatch.setattr(jax, "devices", lambda: chosen)
    monkeypatch.setattr(linalg, "BLOCK", 3 * min(n, k))
    phi, query = features(n, k)
    query[2] = 0
    for value in (1e-2, 1.0, 100.0):
        ours = iterative.solve(phi, query, value)
        assert errors(ours, ridge(phi, query, value)).max() < iterative.TOLERANCE
        assert not ours[2].any()


@pytest.mark.parametrize(("n", "k"), [(60, 101), (101, 60)])
def test_right_or_refused_at_every_damping(n, k, one_device):
    """Down to far below the rounding errors of float32; never wrong without a word."""
    phi, query = steep(n, k)
    # A solve in float64 would itself be wrong by a hundredth at the smallest.
    left, singular, right = np.linalg.svd(phi.astype(np.float64), full_matrices=False)
    along, refused = query.astype(np.float64) @ right.T, []
    for value in (10.0**e for e in range(-2, 10)):
        try:
            ours = iterative.solve(phi, query, value)
        except ValueError as error:
            assert f"lambda = {value:.3g}" in str(error)
            assert "larger damping" in str(error)
            refused.append(value)
        else:
            expected = (along * singular / (singular**2 + value)) @ left.T
            assert errors(ours, expected).max() < iterative.TOLERANCE
    # Of the largest eigenvalue, 1e10, float32 knows seven digits.
    assert 1 in refused
    assert max(refused) < 1e4


def test_attribution_is_the_same_as_with_a_decomposition(tmp_path):
    """Two kernels, relative damping; lambda to rounding, scores to 1e-4: eigh's Gram is
    float32."""
    pairs = [features(30, 40, seed=1), features(30, 40, seed=2)]
    train, query = (np.stack(rows) for rows in zip(*pairs, strict=True))
    decomposed = dtrak.attribute(train, query)
    scores = dtrak.attribute(train, {"a": query, "b": query[:, :2]}, solver="cg")
    np.testing.assert_allclose(scores["a"].lambdas, decomposed.lambdas, rtol=1e-5)
    assert errors(scores["a"].scores, decomposed.scores).max() < 1e-4
    assert errors(scores["b"].scores, scores["a"].scores[:2]).max() < 2e-5
    scores["a"].save(tmp_path / "scores.npz")
    loaded = Scores.load(tmp_path / "scores.npz")
    assert loaded.eigenvalues is None
    np.testing.assert_array_equal(loaded.lambdas, scores["a"].lambdas)


def test_wrong_arguments():
    phi, query = features(5, 8)
    with pytest.raises(ValueError, match="solver is 'lu'; it must be one of: 'eigh'"):
        dtrak.attribute(phi, query, solver="lu")
    for damping in (0, -1):
        with pytest.raises(ValueError, match=f"damping is {damping}; .* above 0"):
            dtrak.attribute(phi, query, solver="cg", damping=damping)
    with pytest.raises(ValueError, match="all features of the training set are 0"):
        dtrak.attribute(0 * phi, query, solver="cg")
    for name in ("relative-influence", "coverage"):
        settings = AttributionConfig(methods=("trak", name), solver="cg")
        with pytest.raises(ValueError, match=f"'{name}', which needs kernels decomp"):
            Config(attribution=settings)


def test_devices_add_up_once_for_a_block_or_an_iteration():
    """One all-reduce each in the compiled programs, the size of the result."""
    mesh = parallel.mesh(jax.devices())
    a, b, total = (
        jax.ShapeDtypeStruct((40, width), np.float32) for width in (80, 5, 40)
    )
    gram_block = linalg.gram_function(mesh).lower(total, a)
    correction = iterative.correction_function(mesh).lower(a, b, np.float32(1))
    for lowered, shape in ((gram_block, "f32[40,40]"), (correction, "f32[40,5]")):
        sums = re.findall(r"= (\S+)\{\S+ all-reduce\(", lowered.compile().as_text())
        assert sums == [shape]


def share(given, out, folder):
    """What each of two processes does."""
    jax.config.update("jax_num_cpu_devices", 3)
    parallel.start()
    given = np.load(given)
    results = {"gram": linalg.gram_matrix(given["phi"])}
    for solver in ("eigh", "cg"):
        found = dtrak.attribute(given["phi"], given["query"], solver=solver)
        results[solver] = found.scores
    ids = tuple(map(str, range(len(given["phi"]))))
    phi = ts.array(given["phi"])
    train = dtrak.Features("loss", ids, phi, None, None, {"noise": "common"})
    for name in ("written", "read"):
        parallel.barrier(name)
        results[name] = dtrak.attribute(Kernels(train, folder), given["query"]).scores
    np.savez(out, **results)


def test_two_processes_share_the_products(tmp_path):
    """Three devices each, and columns left over; both get what one gets, to 2e-5."""
    phi, query = features(13, 101)
    np.savez(tmp_path / "given.npz", phi=phi, query=query)
    files = [tmp_path / "given.npz", *(tmp_path / f"{i}.npz" for i in range(2))]
    processes = [
        start_process(
            share,
            *(files[0], files[1 + i], tmp_path / "kernels"),
            environment=environment,
            error=tmp_path / f"{i}.txt",
        )
        for i, environment in enumerate(environments(2))
    ]
    for process in processes:
        process.join()
    said = [(tmp_path / f"{i}.txt").read_text() for i in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], said
    alone = {s: dtrak.attribute(phi, query, solver=s).scores for s in ("eigh", "cg")}
    alone |= {name: alone["eigh"] for name in ("written", "read")}
    alone["gram"] = linalg.gram_matrix(phi)
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == ["0.npz"]
    for path in files[1:]:
        two = np.load(path)
        for name, ours in alone.items():
            off = np.abs(two[name] - ours).max()
            assert off < 2e-5 * np.abs(ours).max(), name
