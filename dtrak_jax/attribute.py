"""Scores from the features of one model, by any method that takes these alone."""

import warnings
from collections.abc import Mapping, Sequence

from dtrak_jax.attribution import Damping, Kernels, Scores
from dtrak_jax.attribution.inputs import Array
from dtrak_jax.attribution.scoring import GAUSS_NEWTON, ONE_MODEL, PROBES, score
from dtrak_jax.checks import instance, one_of
from dtrak_jax.data import look_alikes
from dtrak_jax.features import Features, GaussNewton
from dtrak_jax.methods import METHODS, Method
from dtrak_jax.switches import standard


@standard()
def attribute(
    train: Array | Kernels,
    query: Array | Mapping[str, Array | Mapping[str, Array]],
    *,
    method: str | None = None,
    damping: float | Damping | None = None,
    solver: str = "eigh",
    curvature: GaussNewton | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    draws: int | None = None,
) -> Scores | dict[str, Scores]:
    """Scores every training example for every query, by any method of one model's features.

    Formulas and sources are in the functions' docstrings in `dtrak_jax.attribution`. The
    methods with a kernel, such as "trak" with gradients of the loss and "dtrak" with those
    of the squared output, are

    tau(q, n) = sum_j phi_j(q)^T (Phi_j^T Phi_j + lambda_j I)^-1 phi_j(n)

    over the pairs j of a timestep and a noise draw that the features keep apart, or with
    the single kernel of averaged features.

    Args:
      train: features of the training set, [T, n, k] or [n, k]; or `Kernels`, to share
        what is decomposed with other calls.
      query: of the queries, [T, q, k] or [q, k], computed with the same task,
        parameters and projection; or several sets of them by name. Of "das", {probe:
        features}, as `featurize` returns them for `dtrak_jax.probes(count)`, with the same
        number of probes in every set.
      method: its name; None takes the kernel method of the features' measurement.
      damping: lambda_j in units of that kernel's mean eigenvalue,
        trace(Phi_j Phi_j^T) / min(n, k); or `absolute(lambda)` or `effective(share)`;
        None is the method's own: 0.1, `effective(0.05)` of "coverage", and 0.001 with a
        curvature.
      solver: "eigh", one eigendecomposition of each kernel on the host; or "cg", where
        min(n, k) is too large for that: conjugate gradients on all devices, right to
        1e-5, at a price for every query (see `attribution.iterative.solve`).
      curvature: H_j of `gauss_newton`, made with the same task, parameters, projection and
        training images: it stands in place of Phi_j^T Phi_j, and the method is
        "gauss-newton", or "das" if it is named. Training features are of the loss.
      groups: {grouping: the name of each training example's group [n]}, such as
        {"contributor": [...]}; `scores.group("contributor")` adds up their scores.
      draws: the noise draws of each timestep, which arrays do not say: their pairs are
        then timesteps x draws, those of a timestep one after the other.

    Returns:
      The scores; {name: scores} of several sets. All processes must call this together.
      With 2 independent draws or more, kept apart, they have standard errors: those of
      estimating the score that many draws would give, see `attribution.PairSum`.

    Raises:
      ValueError: a method that is unknown or needs more than features; features of
        different tasks, or with the wrong measurement or shape; groups of other
        examples, or draws of other features; or a damping that is not above rounding
        errors.
      MemoryError: min(n, k) is too large for solver "eigh" on this host.
    """
    kernels = Kernels.of(train, solver, curvature)
    row = _choose(kernels, method)
    damping = row.damping if damping is None else Damping.of(damping)
    several = isinstance(query, Mapping)
    if row.probed:
        several = several and all(isinstance(each, Mapping) for each in query.values())
    queries = query if several else {"": query}
    scores = score(row, kernels, queries, damping, groups, draws)
    for name, column in next(iter(scores.values())).columns.items():
        if text := look_alikes(name, column):
            warnings.warn(text, stacklevel=3)
    return scores if several else scores[""]


def _choose(kernels: Kernels, method: str | None) -> Method:
    """Returns the row of a method, once the features are sure to fit it."""
    train = kernels.train
    inputs = (GAUSS_NEWTON, PROBES) if kernels.curvature else (ONE_MODEL,)
    measurement = train.measurement if isinstance(train, Features) else None
    rows = {name: row for name, row in METHODS.items() if row.inputs in inputs}
    if kernels.curvature and method is None:
        method = "gauss-newton"
    if method is None:
        for row in rows.values():
            if row.kernel and row.measurement == measurement:
                return row
        # A measurement of the user's own has a kernel like the others, and no name.
        name = measurement or "kernel"
        name = f"kernel-{name}" if name in METHODS else name
        return METHODS["trak"]._replace(name=name)
    instance("method", method, str)
    if method in METHODS and method not in rows:
        row = METHODS[method]
        own = f"dtrak_jax.attribution.{row.function.__name__}"
        raise ValueError(
            f"method is {method!r}, which is made from {row.inputs.words}, by "
            f"{row.inputs.python or own}; from one model's features are made: "
            f"{', '.join(map(repr, rows))}."
        )
    one_of("method", method, rows)
    row = rows[method]
    if measurement not in (None, row.measurement):
        raise ValueError(
            f"method {method!r} needs features of the measurement {row.measurement!r}; "
            f"these are of {measurement!r}."
        )
    return row
