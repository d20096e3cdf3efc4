"""Methods that learn from training again: on subsets, or with its derivative.

masks, bool [M, n], says on which of the n training examples each of M models was
trained; outputs [M, q] is the loss of each query under each model. The two methods of
these predict the loss and are negated, so that a positive score means what it does for all methods:
training on the example lowered the query's loss.
"""

from collections.abc import Sequence

import numpy as np
import scipy.linalg

from dtrak_jax.checks import at_least, positive


def metagradient(derivatives: np.ndarray) -> np.ndarray:
    """Returns minus the derivatives of queries' losses by the weights of training examples
    in the whole training, [q, n].

    MAGIC (arXiv 2504.16430); see `dtrak_jax.metagradients`.
    """
    return -derivatives


def empirical_influence(masks: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Returns E[F(q) | n not in S] - E[F(q) | n in S], float64 [q, n].

    Feldman and Zhang, "What Neural Networks Memorize and Why" (arXiv 2008.03703), F
    being the loss. An example that is in all subsets or in none has influence 0:
    nothing is known of it.

    Raises:
      ValueError: wrong shapes or types, or outputs that are not finite.
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
    folds: int | None = None,
) -> np.ndarray:
    """Returns -w_q of the ridge regression F_m(q) = b_q + w_q . masks_m, float64 [q, n].

    Linear datamodels, Ilyas et al. (arXiv 2202.00622), fitted by ridge regression as
    the D-TRAK paper does. For each query the weights equal scikit-learn's
    `RidgeCV(alphas, cv=folds).fit(masks, F(q)).coef_`, that is, its penalty is the one
    with the best mean of R^2 over contiguous folds, the first of equals.

    M models are fewer than n examples, so the regression is solved in the dual form,
    w = X^T (X X^T + alpha I)^-1 y of centred X and y: for a fold and an alpha, one
    M x M system serves all queries. M must be at least twice the number of folds, which
    is 5 if None, or less where there are fewer than 10 models.

    Raises:
      ValueError: wrong shapes, types or settings, or outputs that are not finite.
    """
    masks, outputs = _checked(masks, outputs)
    folds = max(2, min(5, len(masks) // 2)) if folds is None else folds
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
    centred = masks - masks.mean(axis=0)
    targets = outputs - outputs.mean(axis=0)
    gram = centred @ centred.T
    tests = np.array_split(np.arange(len(masks)), folds)
    quality = np.mean([_r2(gram, targets, test, alphas) for test in tests], axis=0)
    best = np.argmax(quality, axis=0)
    dual = np.empty_like(targets)
    for i, alpha in enumerate(alphas):
        dual[:, best == i] = _dual_ridge(gram, targets[:, best == i], alpha)
    return -(dual.T @ centred)


def _r2(gram, targets, test, alphas) -> np.ndarray:
    """Returns R^2 on the models `test` of ridge regressions on the rest [alphas, q].

    Where the targets do not vary it is 1 or 0, as in scikit-learn.
    """
    train = np.setdiff1d(np.arange(len(gram)), test)
    # Products of masks centred over the models of `train`, from those centred over all.
    mean = gram[train].mean(axis=0)
    gram = gram - mean - mean[:, None] + mean[train].mean()
    targets = targets - targets[train].mean(axis=0)
    truth = targets[test]
    total = np.sum((truth - truth.mean(axis=0)) ** 2, axis=0)
    varies, values = total > 0, []
    for alpha in alphas:
        dual = _dual_ridge(gram[np.ix_(train, train)], targets[train], alpha)
        residual = np.sum((truth - gram[np.ix_(test, train)] @ dual) ** 2, axis=0)
        quality = 1 - residual / np.where(varies, total, 1)
        values.append(np.where(varies, quality, residual == 0))
    return np.array(values)


def _dual_ridge(gram: np.ndarray, targets: np.ndarray, alpha: float) -> np.ndarray:
    """Returns (gram + alpha I)^-1 targets, [M, q]."""
    return scipy.linalg.solve(gram + alpha * np.eye(len(gram)), targets, assume_a="pos")


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
