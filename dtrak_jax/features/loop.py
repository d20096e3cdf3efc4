"""The featurize stage: images in, gradient features out."""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from dtrak_jax import parallel
from dtrak_jax.config import at_least, check_columns
from dtrak_jax.data import check_ids, check_images
from dtrak_jax.features import gradients
from dtrak_jax.features.factorized import channel_folds
from dtrak_jax.features.fingerprint import (
    example_hashes,
    examples_fingerprint,
    fingerprint,
)
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
    proj_devices: int = 1,
    description: str = "featurize",
) -> Features | dict[str, Features]:
    """phi_j(x) = P grad_theta f(x, j) for every image x and pair j; see `Task`.

    Args:
      task: what is differentiated, and with which noise.
      params: the network's parameters, any pytree.
      images: [n, H, W, C] in [-1, 1]; any array that can be sliced by rows. Or
        [n, pairs, H, W, C]: for every pair an image of its own.
      projection: P.
      ids: a stable, unique name for every image; "0", "1", ... if None.
      cond: [n, ...] passed on to the network, or None.
      store: folder to keep the features in; what is there already is not computed
        again. In memory if None.
      batch_size: noised images at once on each device; limits memory, and changes
        results by rounding only.
      proj_devices: how many devices of a process share the columns of a dense
        projection, whose entries each of them would make otherwise; changes results by
        rounding only.
      description: of the progress bar.

    Returns:
      The features; or {measurement: features} if the task has a tuple of them.

    Raises:
      ValueError: wrong images, ids, parameters or network; or the store holds
        other features. Says what is wrong and what would be right.
      FloatingPointError: a gradient is not finite; names the example.
    """
    if images.ndim == 5:
        if images.shape[1] != len(task.pairs):
            raise ValueError(
                f"images have shape {images.shape}: {images.shape[1]} for each example; "
                f"the task has {len(task.pairs)} pairs of a timestep and a draw."
            )
        check_images(np.reshape(images, (-1, *images.shape[2:])))
    else:
        check_images(images)
    ids = tuple(map(str, range(len(images)))) if ids is None else tuple(ids)
    check_ids(ids, len(images))
    at_least("batch_size", batch_size, 1)
    check_columns(projection.kind, projection.dim, proj_devices)
    mesh = example_mesh(jax.local_devices(), proj_devices)
    check_network(task, params, images, cond)
    folds = channel_folds(
        task, params, projection, gradients.network_inputs(images, cond, 1)
    )
    p = parameter_count(task, params)

    slots, copies = _slots_and_copies(task, batch_size, mesh.size)
    pairs, k = len(task.pairs), projection.output_dim(p)
    kernels = pairs if task.per_timestep else 1
    hashes = example_hashes(ids, images, cond)
    metadata = {
        "fingerprint": fingerprint(task, params, projection, folds, images, cond)
        | examples_fingerprint(hashes),
        "shape": [pairs, len(ids), k] if task.per_timestep else [len(ids), k],
        "pairs": pairs,
        "rows_per_chunk": rows_per_chunk(kernels, k, slots),
    } | hashes
    in_memory = store is None
    if in_memory:
        target = Store.in_memory(metadata)
    else:
        target = Store.open_or_create(store, metadata)

    params, folds = parallel.place((params, folds), mesh)
    start = functools.partial(
        _start_chunk, task, projection, mesh, params, folds, slots, copies
    )
    words = id_words(ids)
    mine = target.missing_chunks() if in_memory else target.my_missing_chunks(store)
    left = sum(chunk.stop - chunk.start for chunk in mine)
    with tqdm(
        total=len(ids),
        initial=len(ids) - left,
        desc=description,
        unit="image",
        disable=None,
    ) as bar:

        def finish(chunk: slice, started) -> None:
            results = _finish_chunk(task, started)
            _check_finite(results, ids[chunk], task)
            target.write(chunk, *results)
            bar.update(chunk.stop - chunk.start)

        before = None
        for chunk in mine:
            rows = Slots(
                x=np.asarray(images[chunk], np.float32),
                words=words[chunk],
                position=np.arange(chunk.start, chunk.stop, dtype=np.int32),
                pair=None,
                weight=None,
                cond=None if cond is None else np.asarray(cond[chunk]),
            )
            started = start(rows)
            # The devices go on with this chunk while the one before is written.
            if before:
                finish(*before)
            before = chunk, started
        if before:
            finish(*before)
    if not in_memory:
        parallel.wait_for_all(f"finish {store}")
    features = {name: target.features(name) for name in task.measurements}
    if isinstance(task.measurement, tuple):
        return features
    return next(iter(features.values()))


def example_mesh(devices: list[jax.Device], proj_devices: int) -> jax.sharding.Mesh:
    """The devices of a process, so many of them to share a dense projection's columns.

    Raises:
      ValueError: they cannot be shared out so.
    """
    if len(devices) % proj_devices:
        raise ValueError(
            f"proj_devices is {proj_devices}; it must divide {len(devices)}, the number "
            "of this process's devices."
        )
    return parallel.mesh(devices, proj=proj_devices)


def rows_per_chunk(kernels: int, k: int, slots: int) -> int:
    """Images whose features are written at a time: whole batches, if there are more."""
    unit = max(1, -(-slots // kernels))
    rows = min(CHUNK_ROWS, max(1, CHUNK_BYTES // (4 * kernels * k)))
    return unit * max(1, rows // unit)


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
    x, *others = gradients.network_inputs(images, cond, 2)
    try:
        prediction = jax.eval_shape(task.apply, params, x, *others)
    except Exception as error:
        raise ValueError(
            f"the network does not take images of shape {images.shape[-3:]} with these "
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

    An averaged gradient is one ordinary batched gradient over its noised copies.
    """
    if task.per_timestep:
        return batch_size * devices, 1
    return devices, min(batch_size, len(task.pairs))


def _batches(
    task: Task, rows: Slots, slots: int, copies: int
) -> Iterator[tuple[int, list[Slots]]]:
    """Cuts a chunk of rows into batches of `slots` slots.

    Args:
      task: decides whether a slot is one pair of an image, or all of them.
      rows: the images of the chunk; `pair` and `weight` are not there yet.
      slots: S.
      copies: R.

    Yields:
      How many slots count (the others fill up the last batch), and the parts whose
      gradients add up to theirs: more than one if not all pairs fit in R.
    """
    n, pairs = len(rows.x), len(task.pairs)
    if task.per_timestep:
        row, pair = np.divmod(np.arange(n * pairs), pairs)
        pair, weight = pair[:, None], np.ones((n * pairs, 1))
    else:
        row = np.arange(n)
        filled = np.arange(-(-pairs // copies) * copies)
        pair = np.tile(np.minimum(filled, pairs - 1), (n, 1))
        weight = np.tile((filled < pairs) / pairs, (n, 1))
    for start in range(0, len(row), slots):
        at = np.arange(start, start + slots).clip(max=len(row) - 1)
        images = jax.tree.map(lambda column, at=at: column[row[at]], rows)
        parts = [
            images._replace(
                x=_images_of(images.x, pair[at, part : part + copies]),
                pair=pair[at, part : part + copies].astype(np.int32),
                weight=weight[at, part : part + copies].astype(np.float32),
            )
            for part in range(0, pair.shape[1], copies)
        ]
        yield min(slots, len(row) - start), parts


def _images_of(x: np.ndarray, pair: np.ndarray) -> np.ndarray:
    """`Slots.x` for pairs [S, R] of x [S, H, W, C], or [S, pairs, H, W, C]."""
    if x.ndim == 4:
        return x[:, None]
    return x[np.arange(len(x))[:, None], pair]


def _start_chunk(
    task: Task,
    projection: Projection,
    mesh: jax.sharding.Mesh,
    params,
    folds: gradients.Folds,
    slots: int,
    copies: int,
    rows: Slots,
) -> list[tuple[int, tuple, list]]:
    """Has the devices compute a chunk of rows, and does not wait for them.

    Returns:
      For each batch: how many slots count, what `projection_function` makes of them,
      and the losses of their noised images, a part of them in each entry.
    """
    gradient = gradients.gradient_function(task, mesh)
    project = gradients.projection_function(projection, mesh)
    add = gradients.addition_function(mesh)
    batches = []
    for count, (first, *others) in _batches(task, rows, slots, copies):
        total, error = gradient(params, folds, first)
        errors = [error]
        for part in others:
            more, error = gradient(params, folds, part)
            total = add(total, more)
            errors.append(error)
        batches.append((count, project(total), errors))
        # Two batches under way keep the devices busy; more would take memory.
        jax.block_until_ready(batches[max(0, len(batches) - 2)])
    return batches


def _finish_chunk(
    task: Task, batches: list[tuple[int, tuple, list]]
) -> tuple[dict, dict, np.ndarray]:
    """(phi, squared norms, losses) of what was started, as `Store.write` takes them."""
    kernels = len(task.pairs) if task.per_timestep else 1
    n = sum(count for count, *_ in batches) // kernels

    def by_kernel(*parts: np.ndarray) -> np.ndarray:
        rows = np.concatenate(parts)
        split = np.moveaxis(rows.reshape(n, kernels, *rows.shape[1:]), 1, 0)
        return split if task.per_timestep else split[0]

    counted = [
        jax.tree.map(lambda rows, m=m: np.asarray(rows)[:m], projected)
        for m, projected, _ in batches
    ]
    phi, squared_norms = jax.tree.map(by_kernel, *counted)
    losses = np.concatenate(
        [np.concatenate(parts, axis=1)[:m] for m, _, parts in batches]
    )
    return phi, squared_norms, losses.reshape(n, -1)[:, : len(task.pairs)].T


def _check_finite(results, ids: tuple[str, ...], task: Task) -> None:
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
