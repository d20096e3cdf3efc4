"""Methods that learn from models retrained on subsets of the training set.

masks, bool [M, n], says on which of the n training examples each of M models was
trained; outputs [M, q] is the loss of each query under each model. Both methods predict
the loss and are negated, so that a positive score means what it does for all methods:
training on the example lowered the query's loss. They raise a ValueError for wrong
shapes, types or settings, and for outputs that are not finite.
"""

from collections.abc import Sequence

import numpy as np

from dtrak_jax.checks import at_least, positive


def empirical_influence(masks: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Returns E[F(q) | n not in S] - E[F(q) | n in S], float64 [q, n].

    Feldman and Zhang, "What Neural Networks Memorize and Why" (arXiv 2008.03703), F
    being the loss. An example that is in all subsets or in none has influence 0:
    nothing is known of it.
    """
    masks, outputs = _checked(masks, outputs)
    inside = masks.sum(axis=0)
    outside = len(masks) - inside
    weights = np.where(masks, -1 / np.maximum(inside, 1), 1 / np.maximum(outside, 1))
    return outputs.T @ (weights * ((inside > 0) & (outside > 0)))


def datamodels(
    masks: np.ndarray,
    outputs: np.ndarray,
    alphas: Sequence[float] = (0.1, 1.0, 10.0),
    folds: int = 5,
) -> np.ndarray:
    """Returns -w_q of the ridge regression F_m(q) = b_q + w_q . masks_m, float64 [q, n].

    Linear datamodels, Ilyas et al. (arXiv 2202.00622), fitted by ridge regression as
    the D-TRAK paper does. For each query the weights equal scikit-learn's
    `RidgeCV(alphas, cv=folds).fit(masks, F(q)).coef_`, that is, its penalty is the one
    with the best mean of R^2 over contiguous folds, the first of equals; all queries
    share the fits. M must be at least twice the number of folds.
    """
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score
    from sklearn.model_selection import KFold

    masks, outputs = _checked(masks, outputs)
    at_least("folds", folds, 2)
    if not len(alphas):
        raise ValueError("alphas is empty; name one or more.")
    for alpha in alphas:
        positive("alphas", alpha)
    if len(masks) < 2 * folds:
        raise ValueError(
            f"masks has {len(masks)} models; cross-validation with folds={folds} needs "
            f"at least {2 * folds}, two in each fold."
        )
    masks = masks.astype(np.float64)
    quality = np.zeros((len(alphas), outputs.shape[1]))
    for train, test in KFold(folds).split(masks):
        for i, alpha in enumerate(alphas):
            model = Ridge(alpha=alpha).fit(masks[train], outputs[train])
            predicted = model.predict(masks[test])
            quality[i] += r2_score(outputs[test], predicted, multioutput="raw_values")
    best = np.argmax(quality, axis=0)
    fits = [Ridge(alpha=alpha).fit(masks, outputs).coef_ for alpha in alphas]
    # Of a single query, coef_ has one axis.
    weights = np.reshape(fits, (len(alphas), len(best), -1))
    return -weights[best, np.arange(len(best))]


def _checked(masks, outputs) -> tuple[np.ndarray, np.ndarray]:
    """Returns masks, and outputs in float64, once they are sure to fit together."""
    masks, outputs = np.asarray(masks), np.asarray(outputs, np.float64)
    if masks.dtype != bool:
        raise ValueError(f"masks are {masks.dtype}; they must be bool.")
    if masks.ndim != 2 or outputs.ndim != 2 or len(masks) != len(outputs):
        raise ValueError(
            f"masks have shape {masks.shape} and outputs {outputs.shape}; they must be "
            "[M, n] and [M, q], with a row for each of M models."
        )
    if not np.isfinite(outputs).all():
        raise ValueError("outputs have entries that are not finite.")
    return masks, outputs
