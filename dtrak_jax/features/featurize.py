"""The featurize stage: from images to gradient features."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, get_args

import jax
import numpy as np
from etils import epath

from dtrak_jax import files, host, parallel
from dtrak_jax.checks import at_least, instance, one_of
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.features import gradients
from dtrak_jax.features.arrays import as_arrays, check_rows, ids_of, images_of
from dtrak_jax.features.dependence import check_network
from dtrak_jax.features.factorized import channel_sketches
from dtrak_jax.features.fingerprint import (
    Role,
    example_hashes,
    fingerprint,
    noise_words,
)
from dtrak_jax.features.gradients import (
    LayerGroups,
    feature_names,
    network_inputs,
    variables,
)
from dtrak_jax.features.layers import Layers, by_group, groups_of
from dtrak_jax.features.measurements import check_values
from dtrak_jax.features.microbatches import Layout, microbatches
from dtrak_jax.features.projection import Projection, check_columns, warn_of_dim
from dtrak_jax.features.store import Features, Store
from dtrak_jax.features.task import Task
from dtrak_jax.network import Params
from dtrak_jax.parallel import Program
from dtrak_jax.progress import progress
from dtrak_jax.switches import standard


@standard()
def featurize(
    task: Task,
    params: Params,
    images: np.ndarray | Dataset,
    projection: Projection,
    *,
    frozen: Params | None = None,
    ids: Sequence[str] | None = None,
    cond: object = None,
    role: Role | None = None,
    bounds: tuple[float, float] | None = None,
    store: epath.PathLike | None = None,
    batch_size: int = 64,
    proj_devices: int = 1,
    layers: Layers | None = None,
) -> Features | dict[str, Features]:
    """Computes phi_j(x) = P grad_params f(x, j) for every image x and pair j of a task.

    Batch size and devices change results by rounding only.

    Args:
      task: what is differentiated, and with which noise.
      params: the parameters that are differentiated, any pytree.
      images: [n, H, W, C] of any numbers, pixels or latents; or a `Dataset`, such as of
        `load_images`, which has ids as well. Or [n, pairs, H, W, C]: for every pair an
        image of its own.
      projection: P.
      frozen: the network's other parameters, any pytree. If given, the network is
        called as apply((params, frozen), x, t, cond).
      ids: a stable, unique name for every image; "0", "1", ... if None.
      cond: a pytree of arrays with n rows that the network is given, or None.
      role: "train" or "query". With noise "independent" an image has other noise in each
        role; without one, noise follows the image's content instead of its id. Other
        kinds do not depend on it; `attribute` refuses two sets in each other's place.
      bounds: the least and the largest value that images may have. None warns of values
        that are not in [-1, 1], or look like pixels in [0, 1].
      store: a folder that keeps the features, and is continued; in memory if None.
      batch_size: noised images at once on each device; limits memory.
      proj_devices: devices of a process that share the columns of a dense projection.
      layers: groups of parameters, {name: a regular expression of their paths}, each
        parameter in one; or "blocks", one for each first component of the paths.

    Returns:
      The features; or {measurement: features} if the task has a tuple of them. With
      layers {group: features} in place of features: P g with all entries of other groups
      0, which add up to the features. `layer_weights` takes them, of queries.

    Raises:
      ValueError: wrong images, ids, conditions, parameters, layers, network or tags; or a
        store that holds other features.
      MemoryError, OSError: the features do not fit this host's memory or disk.
      FloatingPointError: a gradient is not finite; names the example.
    """
    instance("task", task, Task)
    instance("projection", projection, Projection)
    one_of("role", role, (*get_args(Role), None))
    (params, frozen), ids, images, cond = checked(
        task, (params, frozen), images, ids, cond, bounds
    )
    batch_size = at_least("batch_size", batch_size, 1)
    check_columns(projection.kind, projection.dim, proj_devices)
    mesh = example_mesh(jax.local_devices(), proj_devices)
    groups = groups_of(task, params, layers)
    names = feature_names(task, groups)
    how = projection, batch_size, mesh.size
    _check_size(task, params, *how, len(images), store, len(names))
    programs = step_programs(
        *(task, params, images, projection, mesh, batch_size),
        frozen=frozen,
        cond=cond,
        groups=groups,
    )
    if programs.sketches:
        gradients.check_tags(task, (params, frozen), images, cond)
    layout, network = programs.layout, (params, frozen, programs.sketches)
    hashes, inputs = example_hashes(ids, images, cond), network_inputs(images, cond, 1)
    made_from = fingerprint(task, network, projection, inputs, hashes, role, groups)
    metadata = layout.metadata(len(ids)) | {"fingerprint": made_from, "role": role}
    target = Store.open_or_create(store, metadata | hashes)
    words, position = noise_words(hashes, role), np.arange(len(ids), dtype=np.int32)
    examples = images, words, position, cond
    _write_missing(task, programs, parallel.put(network, mesh), target, examples)
    if store is not None:
        parallel.barrier(f"finish {target.folder}")
    features = by_group(target.features(names), task, groups)
    return features if isinstance(task.measurement, tuple) else features.popitem()[1]


def checked(
    task: Task,
    network: tuple[Params, Params | None],
    images: np.ndarray | Dataset,
    ids: Sequence[str] | None,
    cond: object,
    bounds: tuple[float, float] | None,
) -> tuple[tuple, tuple[str, ...], np.ndarray, object]:
    """Returns (params, frozen), ids, images and cond as arrays, see `featurize`.

    Raises:
      ValueError: wrong images, ids, conditions, parameters or network.
    """
    if isinstance(images, Dataset):
        images, ids = images.images, images.ids if ids is None else ids
    images = images_of(task, images, bounds)
    ids = ids_of(ids, len(images))
    params, frozen = map(as_arrays, ("params", "frozen"), network)
    cond = as_arrays("cond", cond)
    check_rows(cond, len(images))
    check_network(task, params, frozen, images, cond)
    check_values(task.measurements, task.schedule, images.shape[-3:])
    return (params, frozen), ids, images, cond


def example_mesh(devices: Sequence[jax.Device], proj_devices: int) -> jax.sharding.Mesh:
    """Returns the mesh of a process, on whose axis "proj" devices share columns."""
    if len(devices) % proj_devices:
        raise ValueError(
            f"proj_devices is {proj_devices}; it must divide {len(devices)}, the number "
            "of this process's devices."
        )
    return parallel.mesh(devices, proj=proj_devices)


class StepPrograms(NamedTuple):
    """The programs of one round: `layout.parts` times gradients, then a projection."""

    layout: Layout
    sketches: gradients.Sketches  # an argument of the gradients
    gradients: Program  # makes the gradients of a microbatch
    project: Program  # makes their features
    plain: Program  # for comparison: a sum over as many noised images on each device


@standard()
def step_programs(
    task: Task,
    params: Params,
    images,
    projection: Projection,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    *,
    frozen: Params | None = None,
    cond: object = None,
    groups: LayerGroups = (),
) -> StepPrograms:
    """Returns what `featurize` runs on an `example_mesh`.

    Shapes will do for parameters, images and conditions. Nothing is computed but the
    signs of sketches.
    """
    shape = jax.ShapeDtypeStruct
    p = sum(leaf.size for leaf in variables(task, params, {}))
    layout = Layout.of(task, projection, p, batch_size, mesh.size)
    inputs = network_inputs(images, cond, 1)
    sketches = channel_sketches(task, params, frozen, projection, inputs)
    network = jax.tree.map(
        lambda leaf: shape(leaf.shape, leaf.dtype), (params, frozen, sketches)
    )
    gradient_function = gradients.gradient_function(task, mesh)

    def gradient_program(size: int, copies: int) -> Program:
        microbatch = gradients.microbatch_of(images, cond, size, copies)
        return Program(gradient_function, (*network, microbatch), mesh)

    step = plain = gradient_program(layout.size, layout.copies)
    if layout.copies == 1:
        plain = gradient_program(mesh.size, layout.size // mesh.size)
    sizes = [leaf.size for leaf in variables(task, params, sketches)]
    parts = [shape((layout.size, size), np.float32) for size in sizes]
    gradient = dict.fromkeys(task.measurements, parts)
    function = gradients.projection_function(projection, mesh, groups)
    project = Program(function, (gradient,), mesh)
    return StepPrograms(layout, sketches, step, project, plain)


def _write_missing(
    task: Task, programs: StepPrograms, network: tuple, target: Store, examples: tuple
) -> None:
    """Computes and writes the features that are missing in the store."""
    ids, chunks = target.metadata["ids"], target.missing_chunks()
    done = len(ids) - sum(chunk.stop - chunk.start for chunk in chunks)
    # Folders of runs end with a hash, as "train-1f0c64ab".
    name = re.sub("-[0-9a-f]{8}$", "", target.folder.name) if target.folder else ""
    description = f"featurize {name}".strip()
    with progress(None, description, len(ids), "image", done) as bar:
        how = programs, network, examples
        started = ((chunk, _start(*how, chunk, bar.update)) for chunk in chunks)
        # The devices go on with the next chunk while this one is written.
        for (chunk, rounds), _ in itertools.pairwise(itertools.chain(started, [None])):
            names = ids[chunk]
            results = _finish(programs.layout, len(names), rounds)
            _check_finite(results, names, task)
            target.write(chunk, *results)


def _start(
    programs: StepPrograms,
    network: tuple,
    examples: tuple,
    chunk: slice,
    advance: Callable[[int], object],
) -> list[tuple[tuple, list]]:
    """Has the devices compute a chunk of examples, and does not wait for the last ones.

    Returns ((features, squared norms), losses of each part) of each round; `advance` is
    told the number of examples in it.
    """
    examples = jax.tree.map(lambda column: np.asarray(column[chunk]), examples)
    rounds, done, layout = [], 0, programs.layout
    for total, losses in gradient_rounds(programs, network, examples):
        rounds.append((programs.project.function(total), losses))
        # Two rounds under way keep the devices busy; more would take memory.
        jax.block_until_ready(rounds[max(0, len(rounds) - 2)])
        before, done = done, len(rounds) * layout.size // layout.per_example
        advance(min(done, len(examples[1])) - before)
    return rounds


def gradient_rounds(
    programs: StepPrograms, network: tuple, examples: tuple, pair: int | None = None
) -> Iterator[tuple[dict, list]]:
    """Yields {measurement: gradients, a list of parts [S, p_i]} and losses of each round.

    They are on the devices, in the order of `microbatches`, which has the arguments.
    """
    add = gradients.addition_function(programs.gradients.mesh)
    for parts in microbatches(programs.layout, examples, pair):
        total, losses = None, []
        for microbatch in parts:
            part, loss = programs.gradients.function(*network, microbatch)
            total = add(total, part) if losses else part
            losses.append(loss)
        yield total, losses


def _finish(
    layout: Layout, n: int, rounds: list[tuple[tuple, list]]
) -> tuple[dict, dict, np.ndarray]:
    """Returns (phi, squared norms, losses) of n examples, as `Store.write` takes them."""

    def by_example(rows: np.ndarray) -> np.ndarray:
        # What fills up the last round is left out.
        return rows[: n * layout.per_example].reshape(n, -1, *rows.shape[1:])

    def by_pair(*parts: np.ndarray) -> np.ndarray:
        rows = by_example(np.concatenate(parts))
        return np.moveaxis(rows, 1, 0) if layout.apart else rows[:, 0]

    projected, losses = zip(*rounds, strict=True)
    phi, squared_norms = jax.tree.map(by_pair, *projected)
    losses = np.concatenate([np.concatenate(parts, axis=1) for parts in losses])
    return phi, squared_norms, by_example(losses).reshape(n, -1)[:, : layout.pairs].T


def _check_size(
    task: Task,
    params: Params,
    projection: Projection,
    batch_size: int,
    devices: int,
    n: int,
    store: epath.PathLike | None,
    arrays: int,
) -> None:
    """Raises a MemoryError or an OSError if features do not fit this host."""
    p = sum(leaf.size for leaf in variables(task, params, {}))
    warn_of_dim(projection, p)
    layout = Layout.of(task, projection, p, batch_size, devices)
    folder = None if store is None else files.check_folder("store", store)
    kept = layout.bytes_written(n, arrays)
    taken = layout.bytes_in_memory(n, arrays)
    if folder is None:
        kept, taken = 0, taken + kept
    elif not files.is_empty(folder):
        kept = 0  # Nobody knows how much of it is there.
    what = f"features of {n} images"
    measurements = len(task.measurements)
    if measurements > 1:
        what += f" by {measurements} measurements"
    if arrays > measurements:
        what += f" and {arrays // measurements} groups of layers"
    what += f" with {layout.per_example} gradients each of dim={layout.dim}"
    host.check_fits(what, taken, kept, folder)


def _check_finite(results: tuple, ids: Sequence[str], task: Task) -> None:
    """Raises a FloatingPointError that names the first bad example."""
    _, squared_norms, losses = results
    for name, values in {"": losses, **squared_norms}.items():
        bad = ~np.isfinite(values).reshape(-1, len(ids)).all(axis=0)
        if bad.any():
            what = f"gradient of {name!r}" if name else "prediction"
            raise FloatingPointError(
                f"the {what} of example {ids[int(np.argmax(bad))]!r} is not finite; "
                f"{int(bad.sum())} of {len(ids)} examples in its chunk have this. "
                f"Nothing of the chunk was kept. Timesteps: {task.grid}."
            )
