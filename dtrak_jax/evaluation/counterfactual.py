"""Counterfactuals: retrain without a generated image's top examples, generate it again.

The last evaluation of the D-TRAK paper (Zheng et al. 2024, arXiv 2311.00500): the more
an image changes when the examples that a method names are taken away, compared with
taking away random ones, the better the method. `counterfactual` does all of it.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from dtrak_jax import data, files, models, parallel, training
from dtrak_jax.attribution import Scores
from dtrak_jax.config import TrainConfig
from dtrak_jax.diffusion.schedule import Schedule

RANDOM = "random"
"""Removes random examples, as many as the methods do."""
EVERYTHING = "everything"
"""Removes nothing and keeps the seed: makes the same image but for rounding."""
OTHER_SEED = "other-seed"
"""Removes nothing and takes another seed: how far images move by retraining alone."""
CONTROLS = (RANDOM, EVERYTHING, OTHER_SEED)

RESAMPLES = 1000

Embedding = Callable[[np.ndarray], np.ndarray]
"""Images [n, H, W, C] in [-1, 1] to vectors [n, d]."""


class Generated(NamedTuple):
    """Images that the original model generated."""

    images: np.ndarray
    """[n, H, W, C] in [-1, 1], of 8 bits."""
    ids: np.ndarray
    """str [n]"""
    seeds: np.ndarray
    """Their sampling seeds [n]."""


class Run(NamedTuple):
    """One retrained model, and what it is for."""

    method: str
    """The method that chose what to remove, or one of `CONTROLS`."""
    queries: tuple[str, ...]
    """Ids of the images that it generates again."""
    member: training.Member
    steps: int
    """Of its training."""


def counterfactual(
    init: Callable,
    apply: Callable,
    schedule: Schedule,
    generate: Callable,
    images: np.ndarray,
    train_ids: np.ndarray,
    scores: Mapping[str, Scores],
    generated: Generated,
    config: TrainConfig,
    workdir: epath.PathLike,
    *,
    queries: Sequence[str],
    count: int,
    params,
    measure: Callable,
    measured: str,
    embeddings: Mapping[str, Embedding],
    seed: int = 0,
    flip: bool = False,
) -> dict:
    """Retrains without the top examples of every query, and compares the images.

    For each method and query, and for random removals, one model is trained on what
    `removals` leaves, from the original's seed and for as many epochs; it generates the
    query's image again from the image's own seed, and its loss of the original image is
    measured. Two more models, trained on everything, are the controls. What is there
    already is not done again.

    Args:
      init: the model's initialisation, key -> params.
      apply: the network in training mode, (params, x, t, cond, key) -> prediction.
      schedule: the noise schedule.
      generate: makes images as the original ones were made, (params, seeds [n]) ->
        [n, H, W, C].
      images: all training images [n, H, W, C] in [-1, 1].
      train_ids: their ids [n].
      scores: of each method, for the generated images.
      generated: the original images.
      config: what the original was trained with.
      workdir: gets counterfactual.json, counterfactual/images.npz, and a folder
        counterfactual/MEMBER/ for each model.
      queries: ids of the generated images to ask about.
      count: how many training examples are removed, 1 to n - 1.
      params: of the original model.
      measure: the loss whose increase is a metric, (params, images, ids) -> [Q].
      measured: what `measure` depends on besides; losses of another are not reused.
      embeddings: what images are compared in, besides the pixels' distance.
      seed: of the random removals.
      flip: whether training mirrors half of the images.

    Returns:
      What counterfactual.json holds: "settings"; "rows", the metrics of every method
      and query (see `compare`); "summary", see `summarize`; "differences", the same of
      every method's metrics less those of random removal, query by query.

    Raises:
      ValueError: before anything is trained, where arguments do not fit together.
      FloatingPointError: a model's loss or image is not finite; names it.
      KeyboardInterrupt: as `training.train_members`.
    """
    folder = epath.Path(workdir) / "counterfactual"
    queries = tuple(str(query) for query in queries)
    position = {str(name): i for i, name in enumerate(generated.ids)}
    if len(images) != len(train_ids):
        raise ValueError(
            f"there are {len(images)} training images and {len(train_ids)} train_ids; "
            "each image must have one."
        )
    _check_queries(queries, position)
    kept = removals(scores, queries, train_ids, count, seed)
    runs = plan(kept, queries, len(images), config)
    for steps in dict.fromkeys(run.steps for run in runs):
        training.train_members(
            init,
            apply,
            schedule,
            images,
            [run.member for run in runs if run.steps == steps],
            dataclasses.replace(config, steps=steps),
            folder,
            flip=flip,
            description=f"retrain {steps} steps",
        )
    chosen = [position[query] for query in queries]
    originals = Generated(*(field[chosen] for field in generated))
    images, losses = _regenerate(
        init, generate, measure, measured, runs, originals, config, folder
    )
    before = measure(params, originals.images, originals.ids)
    metrics = {
        method: compare(originals.images, images[method], embeddings)
        | {"loss_increase": losses[method] - before}
        for method in images
    }
    result = {
        "settings": {
            "count": count,
            "queries": list(queries),
            "seed": seed,
            "steps": runs[0].steps,
        },
        "rows": [
            {"method": method, "query": query}
            | {name: float(values[i]) for name, values in own.items()}
            for method, own in metrics.items()
            for i, query in enumerate(queries)
        ],
        "summary": [
            {"method": method, "metric": name, **summarize(values)}
            for method, own in metrics.items()
            for name, values in own.items()
        ],
        "differences": [
            {
                "method": method,
                "metric": name,
                **summarize(values - metrics[RANDOM][name]),
            }
            for method in scores
            for name, values in metrics[method].items()
        ],
    }
    if parallel.is_primary():
        files.write_npz(
            folder / "images.npz",
            query_ids=originals.ids,
            original=originals.images,
            **images,
        )
        files.write_json(epath.Path(workdir) / "counterfactual.json", result)
    parallel.wait_for_all("counterfactual")
    return result


def removals(
    scores: Mapping[str, Scores],
    queries: Sequence[str],
    train_ids: np.ndarray,
    count: int,
    seed: int,
) -> dict[tuple[str, str], np.ndarray]:
    """The rows of the training set that are left, by (method, query), ascending.

    A method removes the `count` examples with the highest scores for the query
    (`Scores.top`). "random" removes those with the smallest hashes of (seed, query,
    id), whichever other queries there are.

    Args:
      scores: of each method.
      queries: ids of generated images.
      train_ids: of the run's training images [n].
      count: 1 to n - 1.
      seed: of the random removals.

    Raises:
      ValueError: count is out of range, a method has a control's name, or scores are of
        another training set or lack a query.
    """
    n = len(train_ids)
    if not 1 <= count <= n - 1:
        raise ValueError(
            f"count is {count}; it must be 1 to {n - 1}, as there are {n} training "
            "images and one must be left."
        )
    for method, one in scores.items():
        _check_scores(method, one, queries, train_ids)
    removed = {}
    for method, one in scores.items():
        row = {str(name): i for i, name in enumerate(one.query_ids)}
        top = one.top(count).index
        removed |= {(method, query): top[row[query]] for query in queries}
    for query in queries:
        removed[RANDOM, query] = data.choose(
            train_ids, None, count, seed, f"{RANDOM}/{query}"
        )
    return {key: np.delete(np.arange(n), rows) for key, rows in removed.items()}


def plan(
    kept: Mapping[tuple[str, str], np.ndarray],
    queries: Sequence[str],
    n: int,
    config: TrainConfig,
) -> list[Run]:
    """The models to train: one for each removal, then the two controls.

    A removal's steps are round(config.steps * kept / n), at least 1: as many epochs as
    the original had. Folders are named by a hash of the kept rows too, so that no model
    of older scores is taken for one of these.

    Args:
      kept: see `removals`.
      queries: all of them; each control serves them all.
      n: number of training images.
      config: what the original was trained with.
    """

    def member(name: str, rows: np.ndarray, seed: int) -> training.Member:
        digest = hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=4)
        return training.Member(f"{name}-{digest.hexdigest()}", rows, seed)

    everything = np.arange(n)
    removing = [
        Run(
            method,
            (query,),
            member(f"{method}-{query}", rows, config.seed),
            max(1, round(config.steps * len(rows) / n)),
        )
        for (method, query), rows in kept.items()
    ]
    controls = [
        Run(name, tuple(queries), member(name, everything, seed), config.steps)
        for name, seed in ((EVERYTHING, config.seed), (OTHER_SEED, config.seed + 1))
    ]
    return removing + controls


def compare(
    original: np.ndarray, images: np.ndarray, embeddings: Mapping[str, Embedding]
) -> dict[str, np.ndarray]:
    """How far images [Q, H, W, C] are from the original ones, by metric [Q].

    "pixel_l2" is the Euclidean distance of the flattened pixels in [-1, 1]. For each
    embedding f, "NAME_cosine" is <f(a), f(b)> / (|f(a)| |f(b)|), and 0 where one of
    them is the zero vector.
    """
    flat = (images - original).reshape(len(images), -1).astype(np.float64)
    metrics = {"pixel_l2": np.linalg.norm(flat, axis=1)}
    for name, embed in embeddings.items():
        a, b = (np.asarray(embed(x), np.float64) for x in (original, images))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        products = np.einsum("qd,qd->q", a, b)
        metrics[f"{name}_cosine"] = products / np.where(norms == 0, 1, norms)
    return metrics


def pixels(images: np.ndarray) -> np.ndarray:
    """The embedding that changes nothing: [n, H, W, C] -> [n, H * W * C]."""
    return images.reshape(len(images), -1)


def bottleneck(
    model: models.UNet2D,
    params,
    schedule: Schedule,
    images: np.ndarray,
    batch_size: int = 64,
) -> Embedding:
    """The embedding by the network's own lowest level, see `models.bottleneck_fn`.

    Images are shown without noise, as if at the timestep T // 100, where there is
    hardly any. The mean over `images` is subtracted: what all of them share would make
    every cosine almost 1.

    Args:
      model: the network.
      params: of the original model, so that all images are seen by the same network.
      schedule: the noise schedule that it was trained with.
      images: the training images [n, H, W, C].
      batch_size: images at once.
    """
    features = models.bottleneck_fn(model)
    t = schedule.steps // 100

    def embed(images: np.ndarray) -> np.ndarray:
        size = min(batch_size, len(images))
        found = []
        for start in range(0, len(images), size):
            x = parallel.pad(images[start : start + size], size)
            found.append(np.asarray(features(params, x, jnp.full(size, t))))
        return np.concatenate(found)[: len(images)]

    @functools.cache
    def mean() -> np.ndarray:
        # When first needed: after the arguments of a counterfactual were checked.
        return embed(images).mean(axis=0)

    return lambda images: embed(images) - mean()


def summarize(values: np.ndarray) -> dict[str, float]:
    """Median and mean over queries [Q], each with a 95% interval.

    The interval is that of percentiles over `RESAMPLES` bootstrap samples of the
    queries, the same samples whatever the values.
    """
    n = len(values)
    samples = values[np.random.default_rng(0).integers(0, n, (RESAMPLES, n))]
    summary = {}
    for name, statistic in (("median", np.median), ("mean", np.mean)):
        low, high = np.quantile(statistic(samples, axis=1), [0.025, 0.975])
        summary[name] = float(statistic(values))
        summary |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return summary


def _regenerate(
    init: Callable,
    generate: Callable,
    measure: Callable,
    measured: str,
    runs: Sequence[Run],
    originals: Generated,
    config: TrainConfig,
    folder: epath.Path,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every method's images [Q, H, W, C], of 8 bits, and losses of the originals [Q].

    Each model's own are kept in MEMBER/images.npz; processes share the models out.
    """
    position = {str(name): i for i, name in enumerate(originals.ids)}
    mine = runs[jax.process_index() :: jax.process_count()]
    for run in tqdm(mine, desc="regenerate", unit="model", disable=None):
        path = folder / run.member.name / "images.npz"
        own = Generated(*(f[[position[q] for q in run.queries]] for f in originals))
        wanted = {
            "seeds": own.seeds,
            "originals": own.images,
            "measured": np.array(measured),
        }
        if files.holds(path, wanted):
            continue
        params = training.load_members(
            init,
            [run.member.name],
            dataclasses.replace(config, steps=run.steps),
            folder,
        )
        params = jax.tree.map(lambda leaf: leaf[0], params)
        images = generate(params, own.seeds)
        losses = measure(params, own.images, own.ids)
        if not np.isfinite(images).all():
            raise FloatingPointError(
                f"an image that {run.member.name} generated has pixels that are not "
                "finite; delete its folder and try a smaller train.learning_rate."
            )
        files.write_npz(path, images=data.to_pixels(images), losses=losses, **wanted)
    parallel.wait_for_all("regenerate")
    images, losses = {}, {}
    for run in runs:
        saved = files.read_npz(folder / run.member.name / "images.npz")
        # Of 8 bits like the originals, or the controls would show the rounding.
        new = saved["images"].astype(np.float32) / 127.5 - 1
        for found, own in ((images, new), (losses, saved["losses"])):
            found.setdefault(run.method, {}).update(zip(run.queries, own, strict=True))
    return tuple(
        {m: np.stack([by_query[q] for q in position]) for m, by_query in found.items()}
        for found in (images, losses)
    )


def _check_queries(queries: Sequence[str], generated: Mapping[str, int]) -> None:
    """Raises a ValueError unless queries are different ids of generated images."""
    if not queries or len(set(queries)) < len(queries):
        raise ValueError(
            f"queries are {list(queries)}; name one or more, each of them once."
        )
    unknown = [query for query in queries if query not in generated]
    if unknown:
        raise ValueError(
            f"queries has {unknown[0]!r}, which is no generated image; the "
            f"{len(generated)} generated ones are {_some(list(generated))}."
        )


def _check_scores(
    method: str, scores: Scores, queries: Sequence[str], train_ids: np.ndarray
) -> None:
    """Raises a ValueError unless these are scores of the run's images."""
    if method in CONTROLS:
        raise ValueError(
            f"scores has the method {method!r}, which is the name of a control "
            f"({', '.join(CONTROLS)}); leave it out."
        )
    if not np.array_equal(scores.train_ids, train_ids):
        raise ValueError(
            f"the scores of {method} are of another training set: their train_ids are "
            f"{_some(scores.train_ids)} ({len(scores.train_ids)} of them), those of "
            f"this run {_some(train_ids)} ({len(train_ids)}). Run `dtrak-jax "
            "attribute` in this workdir."
        )
    have = set(map(str, scores.query_ids))
    missing = [query for query in queries if query not in have]
    if missing:
        raise ValueError(
            f"the scores of {method} have none for {missing[0]!r}; they have "
            f"{_some(scores.query_ids)} ({len(scores.query_ids)} of them)."
        )


def _some(names: Sequence[str]) -> str:
    """The first names of many."""
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
