"""Methods with a kernel: TRAK, D-TRAK and those of the other measurements."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dtrak_jax import files
from dtrak_jax.attribution import iterative
from dtrak_jax.attribution.iterative import Trace
from dtrak_jax.attribution.scores import Scores
from dtrak_jax.attribution.solver import GRID, Damping, Kernel, factorize, solve
from dtrak_jax.config import KERNELS, SOLVERS, one_of
from dtrak_jax.features.store import Features

DEFAULT_DAMPING = 0.1
"""In units of the mean eigenvalue. Chosen without labels of any kind: on digits the
linear datamodeling score is within 8% of its best for anything from .01 to .3."""


def attribute(
    train: Features | np.ndarray,
    query: Features | np.ndarray | dict[str, Features | np.ndarray],
    *,
    method: str | None = None,
    damping: float | Damping = DEFAULT_DAMPING,
    solver: str = "eigh",
) -> Scores | dict[str, Scores]:
    """Scores every training example for every query.

    tau(q, n) = sum_j phi_j(q)^T (Phi_j^T Phi_j + lambda_j I)^-1 phi_j(n)

    over the pairs j of a timestep and a noise draw that the features keep apart, or
    with the single kernel of averaged features, as in "Intriguing Properties of Data
    Attribution on Diffusion Models" (D-TRAK, ICLR 2024). "trak" is this with gradients
    of the loss, "dtrak" with gradients of the squared output, and "kernel-mean" and so
    on with those of the other measurements.

    Args:
      train: features of the training set, [T, n, k] or [n, k].
      query: of the queries, [T, q, k] or [q, k], computed with the same task,
        parameters and projection; or several sets of them by name.
      method: one of `config.KERNELS`, checked against the features' measurement; None
        takes the one that the features are for.
      damping: lambda_j in units of that kernel's mean eigenvalue,
        trace(Phi_j Phi_j^T) / min(n, k); or `absolute(lambda)`.
      solver: "eigh", one eigendecomposition of each kernel on the host, whatever the
        number of queries; or "cg", conjugate gradients on all devices, where min(n, k)
        is too large for that: right to 1e-5, at a price for every query (see
        `iterative.solve`), and without the kernels' eigenvalues.

    Returns:
      The scores; or {name: scores} if several sets of queries were given. With several
      processes all must call this, and all get them.

    Raises:
      ValueError: an unknown method; features of different tasks, or with the wrong
        measurement or shape; or a damping that is not above rounding errors.
      MemoryError: min(n, k) is too large for solver "eigh" on this host.
    """
    one_of("solver", solver, SOLVERS)
    queries = query if isinstance(query, dict) else {"query": query}
    names = {_check_method(train, one, method) for one in queries.values()}
    if not isinstance(damping, Damping):
        damping = Damping(damping)
    solved = {"eigh": _apart, "cg": _iterated}[solver](train, queries)
    path = _path(solved, list(queries), [damping])
    scores = {
        name: Scores(
            scores=path.scores[name][0].astype(np.float32),
            train_ids=example_ids(train),
            query_ids=example_ids(one),
            method=next(iter(names)),
            damping=tuple(damping),
            lambdas=path.lambdas[0],
            eigenvalues=path.eigenvalues,
        )
        for name, one in queries.items()
    }
    return scores if isinstance(query, dict) else scores["query"]


def damping_path(
    train: Features | np.ndarray,
    query: Features | np.ndarray,
    dampings: Sequence[float | Damping] = GRID,
    *,
    pooled: bool = False,
    subsets: np.ndarray | None = None,
) -> np.ndarray:
    """The scores at every value of a grid, float64 [len(dampings), q, n].

    One eigendecomposition for each kernel serves the whole grid. Features, damping and
    errors are those of `attribute`, but that values of the grid so small that rounding
    errors of some kernel would decide the scores give NaN.

    Args:
      train: features of the training set, [T, n, k] or [n, k].
      query: of the queries, [T, q, k] or [q, k].
      dampings: the grid.
      pooled: take one kernel, that of all pairs,
        tau(q, n) = sum_j phi_j(q)^T (sum_i Phi_i^T Phi_i + lambda I)^-1 phi_j(n),
        instead of one for each pair. All T n training features are in memory.
      subsets: of the training set, bool [M, n]: give the sums of the scores over each,
        which is what the scores predict for models trained on them, at a fraction of
        the cost.

    Returns:
      The scores; or their sums over subsets, [len(dampings), q, M].
    """
    check_features(train, query)
    grid = [d if isinstance(d, Damping) else Damping(d) for d in dampings]
    queries = {"query": query}
    solved = (_pooled if pooled else _apart)(train, queries, subsets)
    path = _path(solved, list(queries), grid, strict=False)
    return np.stack(path.scores["query"])


class _Path(NamedTuple):
    scores: dict[str, list[np.ndarray]]
    """For each set of queries and each damping: [q, n], or [q, M] of subsets."""
    lambdas: np.ndarray
    """[len(dampings), kernels]"""
    eigenvalues: np.ndarray | None
    """[kernels, min(n, k)]"""


_Solved = Iterator[tuple[Kernel | Trace, list[Callable[[float], np.ndarray]]]]
"""Of every pair in turn the kernel and, for each set of queries, tau(lambda)."""


def _apart(train, queries: dict, subsets: np.ndarray | None = None) -> _Solved:
    """A kernel for each pair, of which one is in memory at a time."""
    streams = zip(kernels(train), *map(kernels, queries.values()), strict=True)
    for phi, *phi_queries in streams:
        kernel = factorize(phi)
        yield kernel, [solve(kernel, phi, q, subsets=subsets) for q in phi_queries]


def _iterated(train, queries: dict) -> _Solved:
    """As `_apart`, for kernels that are too large to decompose."""
    streams = zip(kernels(train), *map(kernels, queries.values()), strict=True)
    for phi, *phi_queries in streams:
        taus = [functools.partial(iterative.solve, phi, q) for q in phi_queries]
        yield iterative.trace(phi), taus


def _pooled(train, queries: dict, subsets: np.ndarray | None = None) -> _Solved:
    """One kernel for all pairs: the features of pair j are rows j n to (j + 1) n."""
    n = train.shape[-2]
    phi = np.concatenate(list(kernels(train)))
    kernel = factorize(phi)
    streams = zip(*map(kernels, queries.values()), strict=True)
    for pair, phi_queries in enumerate(streams):
        rows = slice(pair * n, (pair + 1) * n)
        yield kernel, [solve(kernel, phi, q, rows, subsets) for q in phi_queries]


def _path(
    solved: _Solved,
    names: list[str],
    dampings: list[Damping],
    strict: bool = True,
) -> _Path:
    """Adds up the scores of all pairs; NaN, or an error if strict, where they would be
    rounding errors."""
    scores = {name: [0.0] * len(dampings) for name in names}
    lambdas, spectra = [], []
    for kernel, taus in solved:
        lambdas.append([kernel.damping(damping, strict) for damping in dampings])
        spectra.append(kernel.eigenvalues)
        for name, tau in zip(names, taus, strict=True):
            for i, value in enumerate(lambdas[-1]):
                scores[name][i] += tau(value)
    eigenvalues = None if spectra[0] is None else np.array(spectra)
    return _Path(scores, np.array(lambdas).T, eigenvalues)


def check_features(train: Features | np.ndarray, query: Features | np.ndarray) -> None:
    """Raises a ValueError unless scores can be made of these features.

    They must have the shapes [T, n, k] and [T, q, k], or [n, k] and [q, k], with
    nothing empty; and come from the same task, parameters and projection.
    """
    for name, features in (("train", train), ("query", query)):
        if len(features.shape) not in (2, 3) or 0 in features.shape:
            raise ValueError(
                f"{name} features have shape {tuple(features.shape)}; it must be "
                "[T, n, k] or [n, k], with nothing empty."
            )
    t, q = tuple(train.shape), tuple(query.shape)
    if (len(t), t[:-2], t[-1]) != (len(q), q[:-2], q[-1]):
        raise ValueError(
            f"train features have shape {t} and query features {q}; they may differ "
            "in the number of examples only."
        )
    if not isinstance(train, Features) or not isinstance(query, Features):
        return
    own = {"images", "ids", "cond"}
    if (train.fingerprint["noise"], query.fingerprint["noise"]) == ("common", "cyclic"):
        own.add("noise")
    there, here = (
        {field: value for field, value in one.fingerprint.items() if field not in own}
        for one in (train, query)
    )
    differs = files.differences(there, here)
    if differs:
        raise ValueError(
            "training (there) and query (here) features do not belong together: "
            f"{differs[0]}."
        )


def _check_method(train, query, method: str | None) -> str:
    """The method's name, once it is sure that these features make its scores."""
    if method is not None:
        one_of("method", method, KERNELS)
    check_features(train, query)
    if not isinstance(train, Features):
        return method or "kernel"
    if method and KERNELS[method] != train.measurement:
        raise ValueError(
            f"method {method!r} needs features of the measurement "
            f"{KERNELS[method]!r}; these are of {train.measurement!r}."
        )
    names = {measurement: name for name, measurement in KERNELS.items()}
    return names.get(train.measurement, train.measurement)


def kernels(features: Features | np.ndarray) -> Iterator[np.ndarray]:
    """Each pair's features [n, k] in turn; just one array if averaged."""
    if isinstance(features, Features):
        return features.kernels()
    features = np.asarray(features)
    if not np.isfinite(features).all():
        raise ValueError("features have entries that are not finite.")
    return iter(features if features.ndim == 3 else features[None])


def example_ids(features: Features | np.ndarray) -> np.ndarray:
    """The ids, str [n]; for an array "0", "1", ..."""
    if isinstance(features, Features):
        return np.array(features.ids)
    return np.array([str(i) for i in range(features.shape[-2])])
