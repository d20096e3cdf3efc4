"""The featurize stage: images in, gradient features out."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from dtrak_jax import parallel
from dtrak_jax.config import at_least
from dtrak_jax.data import check_ids, check_images
from dtrak_jax.features import gradients
from dtrak_jax.features.fingerprint import fingerprint
from dtrak_jax.features.gradients import Slots
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.store import Features, Store
from dtrak_jax.features.task import Task
from dtrak_jax.streams import id_words
from dtrak_jax.trees import named_leaves

CHUNK_ROWS, CHUNK_BYTES = 64, 2**25
"""About how much of a store is written, and lost by a kill, at a time."""


def featurize(
    task: Task,
    params,
    images: np.ndarray,
    projection: Projection,
    *,
    ids: Sequence[str] | None = None,
    cond: np.ndarray | None = None,
    store: epath.PathLike | None = None,
    batch_size: int = 64,
    description: str = "featurize",
) -> Features | dict[str, Features]:
    """phi_j(x) = P grad_theta f(x, j) for every image x and pair j; see `Task`.

    Args:
      task: what is differentiated, and with which noise.
      params: the network's parameters, any pytree.
      images: [n, H, W, C] in [-1, 1]; any array that can be sliced by rows.
      projection: P.
      ids: a stable, unique name for every image; "0", "1", ... if None.
      cond: [n, ...] passed on to the network, or None.
      store: folder to keep the features in; what is there already is not computed
        again. In memory if None.
      batch_size: noised images at once on each device; limits memory, and changes
        results by rounding only.
      description: of the progress bar.

    Returns:
      The features; or {measurement: features} if the task has a tuple of them.

    Raises:
      ValueError: wrong images, ids, parameters or network; or the store holds
        other features. Says what is wrong and what would be right.
      FloatingPointError: a gradient is not finite; names the example.
    """
    check_images(images)
    ids = tuple(map(str, range(len(images)))) if ids is None else tuple(ids)
    check_ids(ids, len(images))
    at_least("batch_size", batch_size, 1)
    check_network(task, params, images, cond)
    p = parameter_count(task, params)

    mesh = parallel.mesh(jax.local_devices())
    slots, copies = _slots_and_copies(task, batch_size, mesh.size)
    pairs, k = len(task.pairs), projection.output_dim(p)
    kernels = pairs if task.per_timestep else 1
    unit = max(1, -(-slots // kernels))
    rows = min(CHUNK_ROWS, max(1, CHUNK_BYTES // (4 * kernels * k)))
    metadata = {
        "fingerprint": fingerprint(task, params, projection, images, ids, cond),
        "shape": [pairs, len(ids), k] if task.per_timestep else [len(ids), k],
        "pairs": pairs,
        "rows_per_chunk": unit * max(1, rows // unit),
        "ids": list(ids),
    }
    if store is None:
        target = Store.in_memory(metadata)
    else:
        target = Store.open_or_create(store, metadata)

    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, parallel.P()))
    words = id_words(ids)
    missing = target.missing_chunks()
    # Only what goes to disk is there for the other processes to read.
    mine = missing
    if store is not None:
        mine = missing[jax.process_index() :: jax.process_count()]
    left = sum(chunk.stop - chunk.start for chunk in mine)
    with tqdm(
        total=len(ids),
        initial=len(ids) - left,
        desc=description,
        unit="image",
        disable=None,
    ) as bar:
        for chunk in mine:
            index = np.arange(chunk.start, chunk.stop)
            x = np.asarray(images[chunk], np.float32)
            c = None if cond is None else np.asarray(cond[chunk])
            results = _chunk(
                task, params, projection, mesh, slots, copies, x, words[index], index, c
            )
            _check_finite(results, [ids[i] for i in index], task)
            target.write(chunk, *results)
            bar.update(len(index))
    parallel.wait_for_all(f"featurize {store}")
    features = {name: target.features(name) for name in task.measurements}
    if isinstance(task.measurement, tuple):
        return features
    return next(iter(features.values()))


def parameter_count(task: Task, params) -> int:
    """p, the length of the gradient."""
    leaves = jax.tree.leaves(params)
    return sum(leaves[i].size for i in gradients.chosen_leaves(task, params))


def check_network(task: Task, params, images, cond) -> None:
    """Raises a ValueError if parameters or the network's output cannot be right."""
    for path, leaf in named_leaves(params).items():
        if not np.isfinite(np.asarray(leaf, np.float32)).all():
            raise ValueError(f"params: {path} has entries that are not finite.")
    if cond is not None and len(cond) != len(images):
        raise ValueError(
            f"cond has {len(cond)} rows and images {len(images)}; give one each."
        )
    x = jax.ShapeDtypeStruct((2, *images.shape[1:]), np.float32)
    t = jax.ShapeDtypeStruct((2,), np.int32)
    c = None if cond is None else jax.ShapeDtypeStruct((2, *cond.shape[1:]), cond.dtype)
    try:
        prediction = jax.eval_shape(task.apply, params, x, t, c)
    except Exception as error:
        raise ValueError(
            f"the network does not take images of shape {images.shape[1:]} with these "
            f"parameters: {error}"
        ) from error
    shape = getattr(prediction, "shape", None)
    if shape != x.shape:
        raise ValueError(
            f"the network maps images {x.shape} to {shape}; a prediction must have the "
            "shape of the images."
        )


def _slots_and_copies(task: Task, batch_size: int, devices: int) -> tuple[int, int]:
    """S over all devices, and R; see `Slots`.

    An averaged gradient is one ordinary batched gradient over its noised copies: on a
    CPU about twice as fast as vmapping several examples, and without the grouped
    convolutions that vmapping makes.
    """
    if task.per_timestep:
        return batch_size * devices, 1
    return devices, min(batch_size, len(task.pairs))


def _work(
    task: Task, rows: int, slots: int, copies: int
) -> Iterator[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Splits a chunk into batches: (row [S], pair [S, R], weight [S, R]).

    The batches of one list add up to one gradient per slot.
    """
    pairs = len(task.pairs)
    if task.per_timestep:
        row, pair = np.divmod(np.arange(rows * pairs), pairs)
        pair, weight = pair[:, None], np.ones((rows * pairs, 1))
        pieces = [(pair, weight)]
    else:
        row = np.arange(rows)
        filled = np.arange(-(-pairs // copies) * copies)
        weight = (filled < pairs) / pairs
        pieces = [
            (np.tile(pair, (rows, 1)), np.tile(w, (rows, 1)))
            for pair, w in zip(
                np.minimum(filled, pairs - 1).reshape(-1, copies),
                weight.reshape(-1, copies),
                strict=True,
            )
        ]
    for start in range(0, len(row), slots):
        cut = slice(start, start + slots)
        yield [(row[cut], pair[cut], weight[cut]) for pair, weight in pieces]


def _chunk(
    task, params, projection, mesh, slots, copies, x, words, position, cond
) -> tuple[dict, dict, np.ndarray]:
    """(phi, squared norms, losses) of a chunk of rows, as `Store.write` takes them."""
    gradient = gradients.gradient_function(task, mesh)
    project = gradients.projection_function(projection, mesh)
    phi = {name: [] for name in task.measurements}
    squared_norms = {name: [] for name in task.measurements}
    losses = []
    for batch in _work(task, len(x), slots, copies):
        total, errors = None, []
        for row, pair, weight in batch:
            fill = slots - len(row)
            at = np.pad(row, (0, fill), mode="edge")
            part, error = gradient(
                params,
                Slots(
                    x=x[at],
                    words=words[at],
                    position=position[at].astype(np.int32),
                    pair=np.pad(pair, ((0, fill), (0, 0))).astype(np.int32),
                    weight=np.pad(weight, ((0, fill), (0, 0))).astype(np.float32),
                    cond=None if cond is None else cond[at],
                ),
            )
            total = part if total is None else jax.tree.map(jnp.add, total, part)
            errors.append(error)
        count = len(batch[0][0])
        for name, flat in total.items():
            features, norms = project(flat)
            phi[name].append(np.asarray(features)[:count])
            squared_norms[name].append(np.asarray(norms)[:count])
        losses.append(np.concatenate([np.asarray(e)[:count] for e in errors], axis=1))

    n, pairs = len(x), len(task.pairs)
    losses = np.concatenate(losses)
    if not task.per_timestep:
        merged = (
            {m: np.concatenate(a) for m, a in d.items()} for d in (phi, squared_norms)
        )
        return *merged, losses[:, :pairs].T

    def pairs_first(parts: list[np.ndarray]) -> np.ndarray:
        whole = np.concatenate(parts)
        return np.moveaxis(whole.reshape(n, pairs, *whole.shape[1:]), 1, 0)

    return (
        {name: pairs_first(parts) for name, parts in phi.items()},
        {name: pairs_first(parts) for name, parts in squared_norms.items()},
        losses.reshape(n, pairs).T,
    )


def _check_finite(results, ids: list[str], task: Task) -> None:
    """Raises a FloatingPointError that names the first bad example."""
    _, squared_norms, losses = results
    for name, values in [("prediction", losses), *squared_norms.items()]:
        bad = ~np.isfinite(values).reshape(-1, len(ids)).all(axis=0)
        if bad.any():
            what = "prediction" if name == "prediction" else f"gradient of {name!r}"
            raise FloatingPointError(
                f"the {what} of example {ids[int(np.argmax(bad))]!r} is not finite; "
                f"{int(bad.sum())} of {len(ids)} examples in its chunk have this. "
                f"Nothing of the chunk was kept. Timesteps: {task.grid}."
            )
