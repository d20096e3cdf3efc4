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
from tqdm import tqdm

from dtrak_jax import data, diffusion, files, models, parallel, training
from dtrak_jax.encoding.encode import moments
from dtrak_jax.evaluation.outputs import measure
from dtrak_jax.evaluation.removals import (
    CONTROLS,
    RANDOM,
    Choice,
    Model,
    kept_rows,
    plan,
)
from dtrak_jax.evaluation.retrain import train
from dtrak_jax.evaluation.statistics import summarize
from dtrak_jax.network import Params
from dtrak_jax.run import Run

FOLDER = "counterfactual"


def counterfactual(run: Run) -> None:
    """Retrains without the top examples of some queries, and compares the images.

    For each choice and query one model is trained on its `kept_rows`, from the
    original's seed and for as many epochs; it generates the query's image again from
    the image's own seed, and its loss of the original image is measured. Two more
    models, trained on everything, are the controls. Whatever is finished is not done
    again.

    counterfactual.json holds "settings" and the `tables`; the images are in
    counterfactual/images.npz.

    Raises:
      ValueError: before anything is trained, where settings and data do not fit.
      FloatingPointError: a model's loss or image is not finite; names it.
      KeyboardInterrupt: as `training.train_members`.
    """
    check(run)
    settings, train_ids = run.config.counterfactual, run.splits.train.ids
    generated = run.queries["generated"]
    count = min(settings.queries, len(generated))
    # Those with the smallest hashes of (seed, id).
    rows = data.choose(generated.ids, None, count, settings.seed, FOLDER)
    originals = generated.take(rows)
    queries = originals.ids.tolist()
    scores = {
        Choice(*names): run.scores(names[0], "generated")
        for names in run.config.removal_methods
    }
    kept = kept_rows(scores, queries, train_ids, settings.count, settings.seed)
    planned = plan(run.config.train, kept, queries, len(train_ids))
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
        described = {"count": settings.count, "queries": queries, "seed": settings.seed}
        described["steps"] = planned[0].steps
        result = {"settings": described} | tables(metrics, queries)
        files.write_json(run.workdir / "counterfactual.json", result)


def check(run: Run) -> None:
    """Raises a ValueError unless there are generated images, and enough to remove."""
    count, n = run.config.counterfactual.count, len(run.splits.train)
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


def regenerate(
    run: Run, planned: Sequence[Model], rows: np.ndarray
) -> tuple[dict[Choice, np.ndarray], dict[Choice, np.ndarray]]:
    """Returns the images [Q, H, W, C] that every choice makes of the originals, and the
    losses [Q] of the originals under its models.

    The originals are these rows of the generated images. Each model's part is kept in MEMBER/images.npz; processes share the models out.
    """
    share = parallel.of_process(planned)
    for model in tqdm(share, "regenerate", unit="model", disable=None):
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
            f"an image that {name} generated has pixels that are not finite; delete its "
            "folder and try a smaller train.learning_rate."
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
    """Returns every choice's metrics of each query [Q]: `distances`, and by how much the
    original's loss is above that under the original model."""
    params, originals = run.params(), run.queries["generated"].images[rows]
    before = _losses(run, params, rows)
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
        | {"loss_increase": losses[choice] - before}
        for choice, made in images.items()
    }


def flattened(images: np.ndarray) -> np.ndarray:
    """Returns the pixels [Q, d] of images [Q, H, W, C]."""
    return images.reshape(len(images), -1)


def latents(run: Run, images: np.ndarray) -> np.ndarray:
    """Returns the modes [Q, d] of images' latents, without the scaling factor."""
    mean, _ = moments(run, images)
    return flattened(mean / run.space.pipeline.vae.config.scaling_factor)


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
        return parallel.in_batches(features_of, images, size)

    mean = embed(images).mean(axis=0)
    return lambda images: embed(images) - mean


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
    return {"rows": rows, "summary": summary, "differences": differences}
