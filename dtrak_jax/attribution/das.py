"""DAS: how far the prediction for a query moves where an image is left out.

Without image n the parameters of a linearised network move by H_j^-1 phi_j(n), phi_j(n) the
gradient of the image's loss and H_j the Gauss-Newton matrix of the output, and the
prediction of D entries for a query by J_j(q) times that. So pair j has the mean squared
movement

  (1/D) |J_j(q) (H_j + lambda_j I)^-1 phi_j(n)|^2
    = (1/2) E_c (c^T J_j(q) (H_j + lambda_j I)^-1 phi_j(n))^2,

c a random cotangent with E c c^T = (2/D) I. J_j(q)^T c are the query's features of `probes`.
A movement has no sign: it does not tell whether the image helps or harms. With the residual
in the place of c it is the influence on the loss, and the mean over c without the square is 0.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dtrak_jax import files
from dtrak_jax.attribution.damping import GAUSS_NEWTON_DAMPING, Damping
from dtrak_jax.attribution.errors import PairSum
from dtrak_jax.attribution.influence import solution
from dtrak_jax.attribution.inputs import Array, by_pair, check_features, example_ids
from dtrak_jax.attribution.kernel import Kernels
from dtrak_jax.checks import shown
from dtrak_jax.features import Features
from dtrak_jax.switches import standard


@standard()
def das(
    kernels: Kernels,
    query: Sequence[Array],
    damping: float | Damping = GAUSS_NEWTON_DAMPING,
    total: PairSum | None = None,
) -> np.ndarray:
    """Returns sum_j (1/2V) sum_v (g_jv(q)^T (H_j + lambda_j I)^-1 phi_j(n))^2, float64 [q, n].

    "Diffusion Attribution Score" (Lin et al., arXiv 2410.18639, equation 16) for the whole
    output, in whose place its code has the mean of the output, and without the leverage of
    n. There are V probes, whose chance is in the standard errors, since each draw has
    others.

    Args:
      kernels: those of features of the loss, with the curvature of `gauss_newton`.
      query: the queries' features of each probe, [T, q, k] or [q, k].
      damping: lambda_j in units of H_j's mean eigenvalue, and so on as in `influence`.
      total: what adds up the pairs, see `PairSum`.

    Raises:
      ValueError: kernels without a curvature, or what `influence` raises.
    """
    if kernels.curvature is None:
        raise ValueError(
            "das takes the Gauss-Newton matrix in place of kernels of the training "
            "features; give attribute curvature=dtrak_jax.gauss_newton(...)."
        )
    probes = [check_features(kernels.train, each, probed=True)[1] for each in query]
    total = total or PairSum()
    for (phi, kernel), *rows in zip(kernels, *map(by_pair, probes), strict=True):
        value, count = kernel.lambda_of(Damping.of(damping)), len(rows[0])
        tau, squares = solution(kernel, phi, np.concatenate(rows)), 0.0
        # One probe after the other: scores of all of them may not fit in memory.
        for start in range(0, count * len(rows), count):
            of_probe = tau._replace(left=tau.left[start : start + count])
            squares = squares + of_probe.scores(value) ** 2
        total.add(squares / (2 * len(rows)))
    return total.total


def checked_probes(train: Array, query: object, name: str = "") -> list[Array]:
    """Returns the features of each probe of a set of queries, given as {probe: features}.

    Raises:
      TypeError: they are given otherwise.
      ValueError: they do not fit the training features, or are of different queries, or of
        one probe twice.
    """
    given = (
        "give what `featurize` returns for a task whose measurement is probes(count)"
    )
    where = f"query of {name!r}" if name else "query"
    if not isinstance(query, Mapping) or not query:
        raise TypeError(
            f"{where} is {shown(query)}; das takes {{probe: features}}: {given}."
        )
    parts = [check_features(train, each, probed=True)[1] for each in query.values()]
    kept = [part for part in parts if isinstance(part, Features)]
    made_with = [part.fingerprint | {"measurements": None} for part in kept]
    apart = any(files.differences(made_with[0], other) for other in made_with[1:])
    if apart or len({tuple(example_ids(part)) for part in parts}) > 1:
        raise ValueError(f"{where} has probes of different queries; {given}.")
    if len({part.measurement for part in kept}) < len(kept):
        raise ValueError(f"{where} has the same probe twice; {given}.")
    return parts
