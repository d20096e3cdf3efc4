"""Scores by metagradients: the effect of an image's weight in training, exactly."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from etils import epath

from dtrak_jax import attribution, files
from dtrak_jax.attribution import Scores
from dtrak_jax.checks import at_least, check_images, instance
from dtrak_jax.digests import settings_text
from dtrak_jax.evaluation.outputs import QueryLosses, measured_gradients
from dtrak_jax.evaluation.truth import measured_from, named, query_inputs
from dtrak_jax.features.arrays import as_arrays, check_rows
from dtrak_jax.network import Params, network_params
from dtrak_jax.rng import split, stream
from dtrak_jax.switches import standard
from dtrak_jax.training.metagradient import PER_DEVICE, metagradient
from dtrak_jax.training.step import Recipe
from dtrak_jax.training.weighted import Course

if TYPE_CHECKING:
    from dtrak_jax.run import Run

APART = 0.01
"""The relative distance of parameters from which two models are said to differ."""

ANOTHER = 0.05
"""The relative distance of predictions from which two networks are said to differ, far above
the rounding errors of bfloat16."""


@standard()
def metagradients(
    recipe: Recipe,
    images: np.ndarray,
    losses: QueryLosses,
    *,
    ids: Sequence[str] | None = None,
    cond=None,
    interval: int | None = None,
    per_device: int = PER_DEVICE,
    store: epath.PathLike | None = None,
) -> Scores:
    """Scores every training image for a few queries, exactly, by training once more.

    tau(q, n) = -d m_q(A(w)) / d w_n at w = 1, where A(w) are the parameters that training
    ends with if image n counts w_n times in the loss of every step, (1 / batch) sum_i w_i
    l_i, with the seed, the order and the noise of training as they are; and m_q is the
    loss of the query that `losses` measures. To first order the loss of q rises by the sum
    of tau(q, n) if these n are left out. MAGIC, arXiv 2504.16430.

    It takes two trainings, and about four times the gradients of one for each query; in
    memory about 2 sqrt(steps) states of training, and one for each query.

    Args:
      recipe: `training.Recipe(init, train_apply, schedule, TrainConfig(...))`, as the model
        was trained by `training.train`; its `eps_root` must be above 0.
      images: the training images [n, H, W, C], as `training.train` takes them.
      losses: the queries, with the noise of their losses and the frozen parameters.
      ids: the names of the training images; "0", "1", ... if None.
      cond: conditions as `training.train` takes them.
      interval: the steps between two states that are kept; about the root of all if None.
      per_device: the queries at a time on each device, which limits memory.
      store: a folder that keeps how far the work has come, so that the same call continues
        where it was stopped; in the end it is empty.

    Raises:
      ValueError: images or conditions do not fit; `losses` are of another network or
        schedule than the recipe; or `eps_root` is 0: AdamW's root has an infinite
        derivative there.
      MemoryError: there are too many queries, or too large a network, for this host.
      FloatingPointError: a derivative is not finite.
    """
    instance("recipe", recipe, Recipe)
    instance("losses", losses, QueryLosses)
    at_least("per_device", per_device, 1)
    images, cond = check_images(images, None), as_arrays("cond", cond)
    check_rows(cond, len(images))
    _check_network(recipe, losses)
    network = losses.apply, losses.schedule
    queries = losses.images, losses.ids, losses, losses.cond, losses.frozen

    def measured(params: Params) -> Params:
        return measured_gradients(*network, params, *queries)

    course = Course(recipe, (images, cond), losses.frozen)
    derivatives = metagradient(
        course,
        measured,
        len(losses.images),
        interval=interval,
        per_device=per_device,
        partial=store and files.at(store) / "metagradient.npz",
    )
    scores = attribution.metagradient(derivatives).astype(np.float32)
    train_ids = named(ids, course.count)
    return Scores(scores, train_ids, losses.ids, "metagradient")


def _check_network(recipe: Recipe, losses: QueryLosses) -> None:
    """Raises a ValueError unless losses are of the recipe's schedule and, as far as a
    prediction tells, of its network: of one with dropout its shape alone does."""
    if settings_text(recipe.schedule) != settings_text(losses.schedule):
        raise ValueError(
            f"losses.schedule is {losses.schedule!r} and recipe.schedule "
            f"{recipe.schedule!r}; they must be the same."
        )
    rng, keys = np.random.default_rng(0), split(stream(0, "network"), 2)
    # What initialisation sets to 0 would hide what follows it.
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype),
        recipe.init(stream(0, "init")),
    )
    whole = network_params(params, losses.frozen)
    x, cond = jax.tree.map(lambda leaf: leaf[[0, 0]], (losses.images, losses.cond))
    given = whole, x, np.full(2, recipe.schedule.steps // 2, np.int32), cond
    first, second = np.asarray(jax.jit(recipe.apply)(*given, keys), np.float64)
    try:
        found = np.asarray(jax.jit(losses.apply)(*given), np.float64)[0]
    except Exception as error:
        raise ValueError(
            "losses.apply must be the recipe's network, and does not take the parameters "
            f"of recipe.init: {error}"
        ) from error
    drops = not np.allclose(first, second)
    same = found.shape == first.shape
    if same and not drops:
        # What is not finite tells nothing.
        same = not np.linalg.norm(found - first) > ANOTHER * np.linalg.norm(first)
    if not same:
        raise ValueError(
            "losses.apply must be the recipe's network, and predicts otherwise than "
            f"recipe.apply from the same parameters: {found.shape} with a mean square of "
            f"{np.square(found).mean():.3g}, not {first.shape} with "
            f"{np.square(first).mean():.3g}."
        )


def of_run(run: "Run") -> dict[str, np.ndarray]:
    """Returns the derivatives of every set's losses by the weights of the training images,
    float64 [queries, train], as `metagradients` says; training is done again."""
    x, cond = query_inputs(run)
    ids, settings = measured_from(run)["query_ids"], run.config.ensemble
    space, given = run.space, (settings, cond, run.space.frozen)
    examples = space.training_examples, space.cond("train")
    course = Course(run.recipe(run.config.train.steps), examples, space.frozen)

    def measured(params: Params) -> Params:
        _compare(params, run.params())
        return measured_gradients(
            run.network.apply, run.schedule, params, x, ids, *given
        )

    partial = run.workdir / "scores" / "metagradient.partial.npz"
    derivatives = metagradient(course, measured, len(x), partial=partial)
    ends = np.cumsum([len(examples) for examples in run.queries.values()])
    parts = np.split(derivatives, ends[:-1])
    return dict(zip(run.queries, parts, strict=True))


def _compare(again: Params, params: Params) -> None:
    """Warns if training again has led to another model than that of the run."""
    difference = jax.tree.map(np.subtract, again, params)
    length, size = (
        np.sqrt(sum(np.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)))
        for tree in (difference, params)
    )
    if length > APART * size:
        warnings.warn(
            f"training again has led to parameters that differ by {length / size:.1%} from "
            "those of the run, by rounding on other devices: the metagradients are those of "
            "the model that was trained again.",
            stacklevel=2,
        )
