"""Counterfactuals: retrain without a generated image's top examples, generate it again.

The last evaluation of the D-TRAK paper (Zheng et al. 2024, arXiv 2311.00500): the more
an image changes when the examples that a method names are taken away, compared with
taking away random ones, the better the method.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from dtrak_jax import data, files, parallel
from dtrak_jax.evaluation.distances import bottleneck, distances
from dtrak_jax.evaluation.outputs import measure
from dtrak_jax.evaluation.removals import (
    CONTROLS,
    RANDOM,
    Choice,
    Model,
    kept_rows,
    plan,
)
from dtrak_jax.evaluation.retrain import load_members, train
from dtrak_jax.evaluation.statistics import summarize
from dtrak_jax.network import Params
from dtrak_jax.run import Run

FOLDER = "counterfactual"


class Originals(NamedTuple):
    """The generated images that are asked about."""

    images: np.ndarray
    """[Q, H, W, C]"""
    ids: np.ndarray
    """str [Q]"""
    seeds: np.ndarray
    """The sampling seeds [Q]."""

    def take(self, queries: Sequence[str]) -> "Originals":
        """Returns those with these ids."""
        return Originals(*(column[self.rows(queries)] for column in self))

    def rows(self, queries: Sequence[str]) -> list[int]:
        """Returns the positions of these ids."""
        return [self.ids.tolist().index(query) for query in queries]


class Regenerated(NamedTuple):
    """The images that the models of one choice generate instead, 8-bit as the originals
    are, and the losses of the originals under these models."""

    images: np.ndarray
    """[Q, H, W, C]"""
    losses: np.ndarray
    """[Q]"""


def counterfactual(run: Run) -> None:
    """Retrains without the top examples of some queries, and compares the images.

    For each choice and query one model is trained on its `kept_rows`, from the
    original's seed and for as many epochs; it generates the query's image again from
    the image's own seed, and its loss of the original image is measured. Two more
    models, trained on everything, are the controls. Whatever is finished is not done
    again.

    counterfactual.json holds "settings", and the parts that `tables` makes; the images
    are in counterfactual/images.npz.

    Raises:
      ValueError: before anything is trained, where settings and data do not fit.
      FloatingPointError: a model's loss or image is not finite; names it.
      KeyboardInterrupt: as `training.train_members`.
    """
    check(run)
    settings, train_ids = run.config.counterfactual, run.splits.train.ids
    originals = choose_originals(run)
    queries = originals.ids.tolist()
    scores = {
        Choice(*names): run.scores(names[0], "generated")
        for names in run.config.removal_methods
    }
    kept = kept_rows(scores, queries, train_ids, settings.count, settings.seed)
    models = plan(run.config.train, kept, queries, len(train_ids))
    for steps in dict.fromkeys(model.steps for model in models):
        members = [model.member for model in models if model.steps == steps]
        train(run, members, steps, f"retrain {steps} steps", FOLDER)
    regenerated = regenerate(run, models, originals)
    metrics = compare(run, originals, regenerated)
    if parallel.is_main_process():
        files.write_npz(
            run.workdir / FOLDER / "images.npz",
            query_ids=originals.ids,
            original=originals.images,
            **{choice.name: made.images for choice, made in regenerated.items()},
        )
        described = {
            "count": settings.count,
            "queries": queries,
            "seed": settings.seed,
            "steps": models[0].steps,
        }
        result = {"settings": described} | tables(metrics, queries)
        files.write_json(run.workdir / "counterfactual.json", result)


def check(run: Run) -> None:
    """Raises a ValueError unless there are generated images, and enough to remove."""
    count, n = run.config.counterfactual.count, len(run.splits.train.ids)
    if not run.is_sampled:
        raise ValueError(
            "counterfactuals generate images again from their seeds: queries.folder must "
            "be empty and sample.count 1 or more."
        )
    if not 1 <= count <= n - 1:
        raise ValueError(
            f"counterfactual.count is {count}; it must be 1 to {n - 1}, as there are {n} "
            "training images and one must be left."
        )


def choose_originals(run: Run) -> Originals:
    """Returns the generated images with the smallest hashes of (seed, id)."""
    settings, generated = run.config.counterfactual, run.queries["generated"]
    count = min(settings.queries, len(generated.ids))
    rows = data.choose(generated.ids, None, count, settings.seed, FOLDER)
    return Originals(generated.images[rows], generated.ids[rows], run.seeds[rows])


def regenerate(
    run: Run, models: Sequence[Model], originals: Originals
) -> dict[Choice, Regenerated]:
    """Returns what every choice makes of the originals.

    Each model's part is kept in MEMBER/images.npz; processes share the models out.
    """
    share = parallel.of_process(models)
    for model in tqdm(share, "regenerate", unit="model", disable=None):
        _regenerate_with(run, model, originals.take(model.queries))
    parallel.barrier("regenerate")
    results = {}
    for model in models:
        saved = files.read_npz(_images_path(run, model))
        rows, count = originals.rows(model.queries), len(originals.ids)
        empty = Regenerated(np.zeros_like(originals.images), np.zeros(count))
        result = results.setdefault(model.choice, empty)
        # Of 8 bits like the originals, or the controls would show the rounding.
        result.images[rows] = data.from_pixels(saved["images"])
        result.losses[rows] = saved["losses"]
    return results


def _regenerate_with(run: Run, model: Model, originals: Originals) -> None:
    """Writes a model's images and losses, unless they are of these originals already."""
    path = _images_path(run, model)
    made_from = {
        "seeds": originals.seeds,
        "originals": originals.images,
        "measured": np.array(run.config.ensemble.measured),
    }
    if files.holds(path, made_from):
        return
    stack = load_members(run, [model.member.name], model.steps, FOLDER)
    images = run.generate(jax.tree.map(lambda leaf: leaf[0], stack), originals.seeds)
    if not np.isfinite(images).all():
        raise FloatingPointError(
            f"an image that {model.member.name} generated has pixels that are not "
            "finite; delete its folder and try a smaller train.learning_rate."
        )
    pixels, losses = data.to_pixels(images), _losses(run, stack, originals)
    files.write_npz(path, images=pixels, losses=losses, **made_from)


def _images_path(run: Run, model: Model):
    return run.workdir / FOLDER / model.member.name / "images.npz"


def _losses(run: Run, stack: Params, originals: Originals) -> np.ndarray:
    """Returns the losses [Q] under the one model of a stack, as the ensemble's are."""
    images, ids, _ = originals
    settings = run.config.ensemble
    return measure(run.apply, run.schedule, stack, images, ids, settings)[0]


def compare(
    run: Run, originals: Originals, regenerated: Mapping[Choice, Regenerated]
) -> dict[Choice, dict[str, np.ndarray]]:
    """Returns every choice's metrics of each query [Q]: `distances`, and by how much the
    original's loss is above that under the original model."""
    params = run.params()
    losses = _losses(run, jax.tree.map(lambda leaf: leaf[None], params), originals)
    embeddings = {
        "pixels": lambda images: images.reshape(len(images), -1),
        "bottleneck": bottleneck(
            run.model, params, run.schedule, run.splits.train.images
        ),
    }
    return {
        choice: distances(originals.images, made.images, embeddings)
        | {"loss_increase": made.losses - losses}
        for choice, made in regenerated.items()
    }


def tables(
    metrics: Mapping[Choice, Mapping[str, np.ndarray]], queries: Sequence[str]
) -> dict[str, list[dict]]:
    """Returns three parts of counterfactual.json, of the metrics of each choice [Q].

    "rows" has every choice and query; "summary" what `summarize` says of each choice's
    metrics, and "differences" what it says of every method's metrics less those of
    random removal, query by query.
    """

    def summaries(choice: Choice, columns: Mapping[str, np.ndarray]) -> list[dict]:
        return [
            choice._asdict() | {"metric": name} | summarize(column)
            for name, column in columns.items()
        ]

    random = metrics[Choice(RANDOM)]
    rows, summary, differences = [], [], []
    for choice, columns in metrics.items():
        for i, query in enumerate(queries):
            values = {name: float(column[i]) for name, column in columns.items()}
            rows.append(choice._asdict() | {"query": query} | values)
        summary += summaries(choice, columns)
        if choice.method not in CONTROLS:
            less = {name: columns[name] - random[name] for name in columns}
            differences += summaries(choice, less)
    return {"rows": rows, "summary": summary, "differences": differences}
