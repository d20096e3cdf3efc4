"""Distances of pictures from others, by metric, and the tables of counterfactuals."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dtrak_jax.evaluation.removals import CONTROLS, EVERYTHING, RANDOM, Choice
from dtrak_jax.evaluation.statistics import summarize

NOT_REMADE = (
    "Retraining does not make this model again. What retraining measures, LDS and removal, "
    "says nothing of it."
)


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


def loss_increase(losses: Mapping[Choice, np.ndarray], choice: Choice) -> np.ndarray:
    """Returns the losses of the originals [Q] under a choice's models, less those under
    the model trained on everything with the same seed.

    That model was trained by the same code as those without some examples, so that
    nothing but what was removed is between them; it is the original one where training
    makes that again, see `Remade`.
    """
    return losses[choice] - losses[Choice(EVERYTHING)]


class Remade(NamedTuple):
    """The answer to: does retraining make the original model again?

    Training on everything with the same seed should change nothing. Where it moves
    pictures by half as much as the removal of random examples, or no removal moves any,
    what is removed tells nothing of the original model.
    """

    same: float
    """The median distance of the pictures that training on everything makes."""
    random: float
    """The same of those without random examples."""
    largest: float
    """The largest such median of all choices."""
    metric: str
    """The distance, "pixel_l2" or "latent_l2"."""

    @property
    def is_remade(self) -> bool:
        """True if the models tell of the original one."""
        return self.same <= self.random / 2 and self.largest > 0

    @property
    def sentence(self) -> str:
        """The two distances in words, to be followed by what they mean."""
        if not self.largest:
            return "no model moves any picture, whatever it is trained without"
        return (
            f"trained on everything with the same seed, models move pictures by "
            f"{self.same:.3g} (median {self.metric}), and without random examples by "
            f"{self.random:.3g}"
        )


def remade(summary: Sequence[Mapping]) -> Remade:
    """Returns whether models are remade, of the part "summary" of counterfactual.json."""
    metric = next(r["metric"] for r in summary if r["metric"].endswith("_l2"))
    medians = {
        (row["method"], row.get("transform", "linear")): row["median"]
        for row in summary
        if row["metric"] == metric
    }
    same, random = (medians[Choice(name)] for name in (EVERYTHING, RANDOM))
    return Remade(same, random, max(medians.values()), metric)


def warn_if_not_remade(removal: Mapping | None) -> None:
    """Warns where counterfactual.json, if there is one, says that models are not remade."""
    if removal and not remade(removal["summary"]).is_remade:
        warnings.warn(NOT_REMADE, stacklevel=3)


def tables(
    metrics: Mapping[Choice, Mapping[str, np.ndarray]], queries: Sequence[str]
) -> dict[str, list[dict]]:
    """Returns three parts of counterfactual.json, of the metrics of each choice [Q].

    "rows" has every choice and query; "summary" what `summarize` says of each choice's
    metrics, and "differences" what it says of every method's metrics less those of
    random removal, query by query.
    """
    random = metrics[Choice(RANDOM)]
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
    found = remade(summary)
    if found.same > found.random / 2:
        warnings.warn(
            f"{found.sentence}: training does not make the original model again, and "
            "what is removed tells nothing of it. Is it trained as that model was, and "
            "generated from the same seeds?",
            stacklevel=3,
        )
    return {"rows": rows, "summary": summary, "differences": differences}
