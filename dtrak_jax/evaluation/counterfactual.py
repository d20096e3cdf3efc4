"""Counterfactuals: retrain without a generated image's top examples, generate it again.

The last evaluation of the D-TRAK paper (Zheng et al. 2024, arXiv 2311.00500): the more
an image changes when the examples that a method names are taken away, compared with
taking away random ones, the better the method.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax import data, diffusion, files, models, parallel, results, training
from dtrak_jax.attribution import removal_set
from dtrak_jax.batches import in_batches
from dtrak_jax.encoding.encode import moments
from dtrak_jax.evaluation.changes import distances, flattened, loss_increase, tables
from dtrak_jax.evaluation.outputs import measure
from dtrak_jax.evaluation.removals import (
    SET,
    Choice,
    Model,
    check_count,
    chosen_queries,
    plan,
    removed_ids,
    removed_rows,
)
from dtrak_jax.evaluation.retrain import train
from dtrak_jax.methods import METHODS
from dtrak_jax.network import Params
from dtrak_jax.progress import progress
from dtrak_jax.run import Run

FOLDER = "counterfactual"


def counterfactual(run: Run) -> None:
    """Retrains without the top examples of some queries, and compares the images.

    For each choice and query one model is trained without its `removed_rows`, from the
    original's seed and for as many epochs; it generates the query's image again from
    the image's own seed, and its loss of the original image is measured. Two more
    models, trained on everything, are the controls. Whatever is finished is not done
    again.

    counterfactual.json holds "settings", the `tables` and the `removed_ids`; the images
    are in counterfactual/images.npz.

    Raises:
      ValueError: before anything is trained, where settings and data do not fit.
      FloatingPointError: a model's loss or image is not finite; names it.
      KeyboardInterrupt: as `training.train_members`.
    """
    check(run)
    settings, train_ids = run.config.counterfactual, run.splits.train.ids
    removal_count = settings.removed_of(len(train_ids))
    generated = run.queries["generated"]
    count = min(settings.queries, len(generated))
    rows = chosen_queries(generated.ids, count, settings.seed)
    originals = generated.take(rows)
    queries = originals.ids.tolist()
    choices = [Choice(*names) for names in run.config.removal_methods]
    scores = {
        choice: run.scores(choice.method, "generated")
        for choice in choices
        if choice.transform != SET
    }
    chosen = {
        (choice, query): chosen_set(run, choice.method, row)
        for choice in choices
        if choice.transform == SET
        for query, row in zip(queries, rows, strict=True)
    }
    how = removal_count, settings.seed, chosen
    removed = removed_rows(scores, queries, train_ids, *how)
    planned = plan(run.config.train, removed, queries, len(train_ids))
    for steps in dict.fromkeys(model.steps for model in planned):
        members = [model.member for model in planned if model.steps == steps]
        train(run, members, steps, f"retrain {steps} steps", FOLDER)
    images, losses = regenerate(run, planned, rows)
    metrics = compare(run, rows, images, losses)
    if parallel.is_main_process():
        files.write_npz(
            run.workdir / FOLDER / "images.npz",
            query_ids=originals.ids,
            original=originals.images,
            **{choice.name: made for choice, made in images.items()},
        )
    described = {"count": removal_count, "queries": queries, "seed": settings.seed}
    described["steps"] = planned[0].steps
    result = {"settings": described} | tables(metrics, queries)
    result["removed"] = removed_ids(removed, train_ids)
    methods = dict.fromkeys(name for name, _ in run.config.removal_methods)
    parts = ["model", *(f"scores of {name}" for name in methods)]
    results.save(run, "counterfactual", result, parts)


def check(run: Run) -> None:
    """Raises a ValueError unless there are generated images, and enough to remove."""
    n = len(run.chosen.train)
    if not run.is_sampled:
        remedy = "sample.count must be 1 or more."
        if run.config.queries.folder:
            remedy = "leave out --queries (queries.folder) and give another --workdir."
        raise ValueError(
            f"counterfactuals generate images again from their seeds, which pictures that "
            f"are given have not: {remedy}"
        )
    count = run.config.counterfactual.removed_of(n)
    check_count("counterfactual.count", count, n)


def chosen_set(run: Run, method: str, row: int) -> np.ndarray:
    """Returns the training images of one query's `removal_set`, by a method's kernels and
    its objective."""
    by = METHODS[method]
    query = np.asarray(run.features("generated", by.measurement)[..., [row], :])
    kernels, copies = run.kernels(by.measurement), run.copies().copies
    count = run.config.counterfactual.removed_of(len(run.splits.train))
    # Near-duplicates go together; at most as many pictures as images are removed.
    chosen = min(count, len(np.unique(copies)) - 1)
    options = {"damping": run.config.attribution.damping_of(by), "groups": copies}
    options["objective"] = by.objective
    rows = removal_set(kernels, query, chosen, **options).rows[:count]
    return parallel.of_main_process(rows)


def regenerate(
    run: Run, planned: Sequence[Model], rows: np.ndarray
) -> tuple[dict[Choice, np.ndarray], dict[Choice, np.ndarray]]:
    """Returns the images [Q, H, W, C] that every choice makes of the originals, and the
    losses [Q] of the originals under its models.

    The originals are these rows of the generated images. Each model's part is kept in
    MEMBER/images.npz; processes share the models out.
    """
    share = parallel.of_process(planned)
    for model in progress(share, "regenerate", unit="model"):
        _regenerate_with(run, model, rows[model.queries])
    parallel.barrier("regenerate")
    images, losses = {}, {}
    for choice in dict.fromkeys(model.choice for model in planned):
        # The models of a choice are in the order of their queries.
        of_choice = [model for model in planned if model.choice == choice]
        parts = [files.read_npz(_images_path(run, model)) for model in of_choice]
        # Of 8 bits like the originals, or the controls would show the rounding.
        pixels = np.concatenate([part["images"] for part in parts])
        images[choice] = data.from_pixels(pixels)
        losses[choice] = np.concatenate([part["losses"] for part in parts])
    return images, losses


def _regenerate_with(run: Run, model: Model, rows: np.ndarray) -> None:
    """Writes a model's images and losses, unless they are of these originals already."""
    path, name, seeds = _images_path(run, model), model.member.name, run.seeds[rows]
    originals = run.queries["generated"].images[rows]
    measured = np.array(run.config.ensemble.measured)
    made_from = {"seeds": seeds, "originals": originals, "measured": measured}
    if files.holds(path, made_from):
        return
    folder = run.workdir / FOLDER
    stack = training.load_members(run.network.init, [name], model.steps, folder)
    params = jax.tree.map(lambda leaf: leaf[0], stack)
    images = run.space.decode(run.generate(params, seeds))
    if not np.isfinite(images).all():
        raise FloatingPointError(
            f"an image that {name} generated has pixels that are not finite; try a "
            "smaller train.learning_rate."
        )
    pixels, losses = data.to_pixels(images), _losses(run, params, rows)
    files.write_npz(path, images=pixels, losses=losses, **made_from)


def _images_path(run: Run, model: Model):
    return run.workdir / FOLDER / model.member.name / "images.npz"


def _losses(run: Run, params: Params, rows: np.ndarray) -> np.ndarray:
    """Returns the losses [Q] under one model, measured as the ensemble's are."""
    space, stack = run.space, jax.tree.map(lambda leaf: leaf[None], params)
    ids = run.queries["generated"].ids
    x, ids, cond = jax.tree.map(
        lambda column: column[rows],
        (space.x("generated"), ids, space.cond("generated")),
    )
    network = run.network.apply, run.schedule, stack
    return measure(*network, x, ids, run.config.ensemble, cond, space.frozen)[0]


def compare(
    run: Run,
    rows: np.ndarray,
    images: Mapping[Choice, np.ndarray],
    losses: Mapping[Choice, np.ndarray],
) -> dict[Choice, dict[str, np.ndarray]]:
    """Returns every choice's metrics of each query [Q]: `distances`, and the
    `loss_increase` of the original."""
    params, originals = run.params(), run.queries["generated"].images[rows]
    lengths, cosines = {"pixel": flattened}, {}
    if run.config.is_latent:
        lengths = {"latent": partial(latents, run), "pixel": flattened}
    else:
        network = run.space.model, params, run.schedule
        cosines["pixels"] = flattened
        if run.space.sampled_cond is None:  # Pictures that are made have no class.
            cosines["bottleneck"] = bottleneck(*network, run.splits.train.images)
    if run.config.clip.folder:
        cosines["clip"] = run.clip_network
    return {
        choice: distances(originals, made, lengths, cosines)
        | {"loss_increase": loss_increase(losses, choice)}
        for choice, made in images.items()
    }


def latents(run: Run, images: np.ndarray) -> np.ndarray:
    """Returns the modes [Q, d] of images' latents, without the scaling factor."""
    mean, _ = moments(run, images)
    return flattened(mean / run.space.pipeline.vae.config.scaling_factor)


def bottleneck(
    model: models.UNet2D,
    params: Params,
    schedule: diffusion.Schedule,
    images: np.ndarray,
    batch_size: int = 64,
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the embedding by the network's lowest level, see `models.bottleneck_fn`.

    Images are shown without noise, as if at the timestep T // 100, where there is
    hardly any. The mean over `images`, those of training, is subtracted: what all of
    them share would make every cosine almost 1.
    """
    features = models.bottleneck_fn(model)
    t = schedule.steps // 100

    def embed(images: np.ndarray) -> np.ndarray:
        def features_of(x: np.ndarray) -> jax.Array:
            return features(params, x, jnp.full(len(x), t))

        size = min(batch_size, len(images))
        return in_batches(features_of, images, size, "compare")

    mean = embed(images).mean(axis=0)
    return lambda images: embed(images) - mean
