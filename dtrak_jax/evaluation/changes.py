"""Distances of pictures from others, by metric, and the tables of counterfactuals."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dtrak_jax.evaluation.removals import CONTROLS, EVERYTHING, RANDOM, Choice
from dtrak_jax.evaluation.statistics import summarize


def flattened(images: np.ndarray) -> np.ndarray:
    """Returns the pixels [Q, d] of images [Q, H, W, C]."""
    return images.reshape(len(images), -1)


def distances(
    original: np.ndarray,
    images: np.ndarray,
    lengths: Mapping[str, Callable],
    cosines: Mapping[str, Callable],
) -> dict[str, np.ndarray]:
    """Returns how far images [Q, H, W, C] are from the original ones, by metric [Q].

    Every embedding f maps images to vectors [Q, d]. "NAME_l2" is |f(a) - f(b)| of those
    in `lengths`; and "NAME_cosine" is <f(a), f(b)> / (|f(a)| |f(b)|) of those in
    `cosines`, and 0 where one of them is the zero vector.
    """

    def embedded(embed):
        return (np.asarray(embed(x), np.float64) for x in (original, images))

    metrics = {}
    for name, embed in lengths.items():
        a, b = embedded(embed)
        metrics[f"{name}_l2"] = np.linalg.norm(b - a, axis=1)
    for name, embed in cosines.items():
        a, b = embedded(embed)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        products = np.einsum("qd,qd->q", a, b)
        metrics[f"{name}_cosine"] = products / np.where(norms == 0, 1, norms)
    return metrics


def _warn_of_other_models(
    everything: Mapping[str, np.ndarray], random: Mapping[str, np.ndarray]
) -> None:
    """Warns where training on everything, which should change nothing, moves pictures by
    half as much as the removal of random examples, or more."""
    name = next(name for name in everything if name.endswith("_l2"))
    same, other = (np.median(metrics[name]) for metrics in (everything, random))
    if same > other / 2:
        warnings.warn(
            f"trained on everything with the same seed, models move pictures by {same:.3g} "
            f"(median {name}), and without random examples by {other:.3g}: training does "
            "not make the original model again, and what is removed tells nothing of it. "
            "Is it trained as that model was, and generated from the same seeds?",
            stacklevel=4,
        )


def tables(
    metrics: Mapping[Choice, Mapping[str, np.ndarray]], queries: Sequence[str]
) -> dict[str, list[dict]]:
    """Returns three parts of counterfactual.json, of the metrics of each choice [Q].

    "rows" has every choice and query; "summary" what `summarize` says of each choice's
    metrics, and "differences" what it says of every method's metrics less those of
    random removal, query by query.
    """
    random = metrics[Choice(RANDOM)]
    _warn_of_other_models(metrics[Choice(EVERYTHING)], random)
    rows, summary, differences = [], [], []
    for choice, columns in metrics.items():
        for i, query in enumerate(queries):
            values = {name: float(column[i]) for name, column in columns.items()}
            rows.append(choice._asdict() | {"query": query} | values)
        for name, column in columns.items():
            described = choice._asdict() | {"metric": name}
            summary.append(described | summarize(column))
            if choice.method not in CONTROLS:
                differences.append(described | summarize(column - random[name]))
    return {"rows": rows, "summary": summary, "differences": differences}
