"""Removal sets: the Newton step for many images, and its greedy choice."""

import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax import host
from dtrak_jax.attribution import kernel, sets

N, K = 12, 7


def features(pairs=3, n=N, k=K, queries=2, seed=0):
    """Returns features of a training set [pairs, n, k] and of queries."""
    rng = np.random.default_rng(seed)
    shapes = (pairs, n, k), (pairs, queries, k)
    return (rng.normal(size=shape).astype(np.float32) for shape in shapes)


def uncovered(train, query, rows, lambdas, pooled=False):
    """Returns the sum over pairs and queries of phi_q (Phi_K^T Phi_K + lambda)^-1 phi_q^T,
    of the kept rows K."""
    train, query = train.astype(np.float64), query.astype(np.float64)
    kept = np.delete(train, rows, axis=1)
    grams = np.einsum("jnk,jnl->jkl", kept, kept)
    if pooled:
        grams = np.broadcast_to(grams.sum(axis=0), grams.shape)
    inverses = np.linalg.inv(grams + np.diag([lambdas[0]] * grams.shape[-1]))
    return np.einsum("jqk,jkl,jql->", query, inverses, query)


def newton(train, query, rows, lambdas, weights, pooled=False):
    """Returns sum_j phi_q (Phi_K^T Phi_K + lambda)^-1 Phi_S^T w, of the kept rows K."""
    train, query = train.astype(np.float64), query.astype(np.float64)
    kept = np.delete(train, rows, axis=1)
    grams = np.einsum("jnk,jnl->jkl", kept, kept)
    if pooled:
        grams = np.broadcast_to(grams.sum(axis=0), grams.shape)
    total = 0.0
    for g, phi, gram, value, w in zip(query, train, grams, lambdas, weights):
        gone = phi[rows].T @ w[rows]
        total += g.sum(axis=0) @ np.linalg.solve(gram + value * np.eye(len(gram)), gone)
    return total


@pytest.mark.parametrize("grouped", [False, True], ids=["images", "groups"])
@pytest.mark.parametrize("pooled", [False, True], ids=["apart", "pooled"])
@pytest.mark.parametrize("k", [K, 40], ids=["primal", "dual"])
@pytest.mark.parametrize("objective", ["influence", "coverage"])
def test_every_choice_is_the_best_by_the_exact_step(pooled, k, grouped, objective):
    train, query = features(k=k)
    groups = np.array(list("abcabbcdeeab")) if grouped else None
    count, weights = 3, np.ones((3, N))
    damping = dtrak.absolute(4.0)
    chosen = dtrak.removal_set(
        *(train, query, count),
        objective=objective,
        damping=damping,
        pooled=pooled,
        groups=groups,
    )

    def exact(rows):
        arguments = train, query, rows, [4.0] * 3
        if objective == "influence":
            return newton(*arguments, weights, pooled)
        covered = uncovered(*(train, query, [], [4.0] * 3), pooled)
        return uncovered(*arguments, pooled) - covered

    names = np.unique(groups) if grouped else np.arange(N).astype(str)
    of_name = groups if grouped else names
    gone = []
    for name, predicted in zip(chosen.names, chosen.predicted):
        steps = {
            other: exact(np.flatnonzero(np.isin(of_name, [*gone, other])))
            for other in set(names) - set(gone)
        }
        assert name == max(steps, key=steps.get)
        np.testing.assert_allclose(predicted, steps[name], rtol=2e-5)
        gone.append(name)
    np.testing.assert_array_equal(
        np.sort(chosen.rows), np.flatnonzero(np.isin(of_name, gone))
    )


def test_with_residuals_it_is_the_refit_of_a_ridge_regression():
    train, query = features(pairs=1)
    phi, g = train[0].astype(np.float64), query[0].astype(np.float64)
    y = np.random.default_rng(1).normal(size=N)

    def prediction(rows):
        gram = phi[rows].T @ phi[rows] + 2.0 * np.eye(K)
        theta = np.linalg.solve(gram, phi[rows].T @ y[rows])
        return theta, (g @ theta).sum()

    theta, before = prediction(np.arange(N))
    chosen = dtrak.removal_set(
        *(train, query, 5), damping=dtrak.absolute(2.0), weights=y - phi @ theta
    )
    for count, predicted in enumerate(chosen.predicted, 1):
        _, after = prediction(np.delete(np.arange(N), chosen.rows[:count]))
        np.testing.assert_allclose(after - before, -predicted, rtol=1e-5)


def test_copies_are_removed_together_as_a_group():
    # Without one of six copies the other five make up for it, and none is chosen.
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(20, 30)).astype(np.float32)
    phi[:6] = phi[0]
    query = (phi[0] + 0.5 * phi[10])[None]
    chosen = dtrak.removal_set(phi, query, 6)
    assert not set(range(6)) & set(chosen.rows.tolist())
    copies = ["copied"] * 6 + [str(row) for row in range(6, 20)]
    assert dtrak.removal_set(phi, query, 1, groups=copies).names == ["copied"]


@pytest.mark.parametrize("pooled", [False, True])
def test_memory_is_told_with_the_blocks_of_groups(pooled, monkeypatch):
    """All that is kept is counted, and blocks twice more."""
    told, kept = [], []
    monkeypatch.setattr(sets.host, "check_fits", lambda what, size: told.append(size))
    init = sets.Removable.__init__

    def counting(self, factor, m, ones, candidates):
        init(self, factor, m, ones, candidates)
        blocks = sum(of_size.leverages.nbytes for of_size in self.candidates)
        kept.append((blocks, factor.nbytes + m.nbytes + ones.nbytes))

    monkeypatch.setattr(sets.Removable, "__init__", counting)
    train, query = features()
    names = ["a"] * (N - 2) + ["b"] * 2
    dtrak.removal_set(train, query, 1, groups=names, pooled=pooled)
    blocks, arrays = np.sum(kept, axis=0)
    rows = len(train) * N * (len(train) if pooled else 1)
    added = 8 * rows * (N - 2)
    assert told[-1] == pytest.approx(blocks + 2 * kept[0][0] + arrays + added)


def test_what_does_not_fit_is_refused_by_name(monkeypatch):
    train, query = features()

    def refused(match, *arguments, error=ValueError, **options):
        with pytest.raises(error, match=match):
            dtrak.removal_set(*arguments, **options)

    refused(r"count is 12; of 12 images 1 to 11", train, query, N)
    refused(r"count must be 1 or more|count is 0", train, query, 0)
    one = ["all"] * N
    refused(r"of 1 groups 1 to 0", train, query, 1, groups=one)
    refused(r"groups has shape \(2,\)", train, query, 1, groups=["a", "b"])
    refused("groups has None at position 0", train, query, 1, groups=[None] * N)
    refused("groups has shape", train, query, 1, groups=[["a"], ["b", "c"]])
    refused(r"weights is \['a'\]; it must be an array", train, query, 1, weights=["a"])
    by_coverage = {"objective": "coverage"}
    ones = np.ones(N)
    refused("weights are of objective", train, query, 1, weights=ones, **by_coverage)
    refused("objective must be one of|objective is", train, query, 1, objective="cover")
    refused(r"weights have shape \(3,\)", train, query, 1, weights=np.ones(3))
    iterated = kernel.Kernels(train, solver="cg")
    refused("a removal set needs kernels decomposed", iterated, query, 1)
    monkeypatch.setattr(sets, "LEAST", 0.9)
    refused("1 - M_ii of a training image is .* larger damping", train, query, 1)
    monkeypatch.setattr(host, "memory", lambda: 1000)
    refused("kernels from which 2 images among 12", train, query, 2, error=MemoryError)
