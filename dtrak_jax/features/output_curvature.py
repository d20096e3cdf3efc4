"""The Gauss-Newton matrix of the network's output, among projected gradients.

At pair j it is

  H_j = P (sum_n J_nj^T (2/D) J_nj) P^T,

n over training images, J_nj the derivative by the parameters of the prediction of D
entries for noised image j of n, and P the projection of the features: what the kernel
Phi_j^T Phi_j of the loss's own gradients stands for. Of the loss it is the Hessian where
the network is linear in its parameters; it does not depend on the target.

A random cotangent c = eta sqrt(2/D), eta ~ N(0, I), gives P J_nj^T c, whose outer product
has the expectation of n's term. Each image has cotangents of its own: were they the same
for all, one or a few would show the same few directions of the output every time.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dtrak_jax import files, host, parallel
from dtrak_jax.checks import at_least, instance
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.digests import digest
from dtrak_jax.features.featurize import checked, example_mesh
from dtrak_jax.features.fingerprint import example_hashes, fingerprint, noise_words
from dtrak_jax.features.gradients import EXAMPLES, network_inputs
from dtrak_jax.features.microbatches import microbatches
from dtrak_jax.features.output_programs import OutputPrograms, output_programs
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.store import Features, chunks_of
from dtrak_jax.features.task import Task
from dtrak_jax.network import Params
from dtrak_jax.progress import progress
from dtrak_jax.switches import standard

GATHERED_ROWS = 512
"""Rows of a matrix that processes exchange at one time."""


@dataclasses.dataclass(frozen=True, eq=False)
class GaussNewton:
    """H_j of every pair, made by `gauss_newton`; of averaged gradients their mean."""

    shape: tuple[int, ...]
    """[J, k, k]; or [k, k] of a task that averages."""
    fingerprint: dict
    """All that decides the values, as of features of the loss."""
    cotangents: int
    matrix: Callable[[int], np.ndarray] = dataclasses.field(repr=False)
    """Returns H_j, float32 [k, k]."""

    @classmethod
    def load(cls, store: epath.PathLike) -> "GaussNewton":
        """Returns the matrices of a store, as `gauss_newton` left it.

        Raises:
          FileNotFoundError: one of them is missing.
        """
        folder = files.check_folder("store", store)
        first = files.read_npz(_path(folder, 0))
        made_from = json.loads(str(first["made_from"]))
        cotangents, _ = made_from.pop("cotangents"), made_from.pop("pair")
        shape = first["matrix"].shape
        if made_from["per_timestep"]:
            shape = (len(made_from["timesteps"]) * made_from["draws"], *shape)
        for pair in range(shape[0] if made_from["per_timestep"] else 1):
            if not _path(folder, pair).exists():
                raise FileNotFoundError(f"there is no {_path(folder, pair)}.")
        return cls(shape, made_from, cotangents, functools.partial(_read, folder))

    @property
    def digest(self) -> str:
        """A hash of all that decides the values."""
        return digest(json.dumps(self.made_from(0), sort_keys=True))

    def made_from(self, pair: int) -> dict[str, object]:
        """Returns all that decides the matrix of a pair."""
        return self.fingerprint | {"cotangents": self.cotangents, "pair": pair}

    def check(self, train: Features | np.ndarray) -> None:
        """Raises a ValueError unless features of a training set belong to it."""
        *pairs, _, k = train.shape
        if self.shape != (*pairs, k, k):
            raise ValueError(
                f"train features have shape {tuple(train.shape)}, and the curvature "
                f"{self.shape}; it must be {(*pairs, k, k)}."
            )
        if not isinstance(train, Features):
            return
        # Independent noise is that of the role "train" here.
        free = {"measurements": None}
        differing = files.differences(self.fingerprint | free, train.fingerprint | free)
        if differing:
            raise ValueError(
                "the curvature (there) and the training features (here) do not belong "
                f"together: {differing[0]}."
            )


@standard()
def gauss_newton(
    task: Task,
    params: Params,
    images: np.ndarray | Dataset,
    projection: Projection,
    *,
    frozen: Params | None = None,
    ids: Sequence[str] | None = None,
    cond: object = None,
    bounds: tuple[float, float] | None = None,
    cotangents: int = 16,
    store: epath.PathLike | None = None,
    batch_size: int = 64,
) -> GaussNewton:
    """Returns H_j of every pair of a task, see the module.

    `attribute(train, query, curvature=...)` takes it in place of the kernels of `train`.
    It takes a forward pass and a pass back with its projection for each image, pair and
    cotangent; some cotangents share a forward pass. Each device holds one matrix [k, k].
    Batch size and devices change it by rounding only. All processes must call this
    together.

    Args:
      task, params, images, projection, frozen, ids, cond, bounds: those of `featurize`, of
        the training set with role "train", which decides independent noise; the
        measurement does not matter.
      cotangents: random ones for each image and pair, a function of the task's seed, the
        image's id, the pair and their number; 0 takes the D unit vectors, without chance.
        With n of them in all, H has rank n: below k what it misses counts as 0.
      store: a folder that keeps the matrices, and is continued; in memory if None.
      batch_size: cotangents at once on each device; limits memory.

    Raises:
      ValueError: what `featurize` raises; or a store of other matrices.
      MemoryError, OSError: the matrices do not fit this host's memory or disk.
      FloatingPointError: a matrix is not finite.
    """
    instance("task", task, Task)
    instance("projection", projection, Projection)
    count = at_least("cotangents", cotangents, 0)
    batch_size = at_least("batch_size", batch_size, 1)
    task = dataclasses.replace(task, measurement="loss")
    network, ids, images, cond = checked(
        task, (params, frozen), images, ids, cond, bounds
    )
    if images.ndim != 4:
        raise ValueError(
            f"images have shape {images.shape}; they must be [n, H, W, C]."
        )
    mesh = example_mesh(jax.local_devices(), 1)
    programs = output_programs(
        task,
        *network,
        images,
        projection,
        mesh,
        batch_size,
        cond=cond,
        cotangents=count,
    )
    hashes, inputs = example_hashes(ids, images, cond), network_inputs(images, cond, 1)
    network = *network, programs.sketches
    made_from = fingerprint(task, network, projection, inputs, hashes, "train")
    k, pairs = programs.layout.dim, len(task.pairs) if task.per_timestep else 1
    shape = (pairs, k, k) if task.per_timestep else (k, k)
    _check_size(shape, store)
    folder, kept = None, {}
    matrix = kept.__getitem__
    if store is not None:
        folder = files.check_folder("store", store)
        _check_store(folder, pairs)
        matrix = functools.partial(_read, folder)
    made = GaussNewton(shape, made_from, count, matrix)
    words, position = noise_words(hashes, "train"), np.arange(len(ids), dtype=np.int32)
    shared = jax.tree.map(
        lambda column: column[parallel.share(len(ids))], (images, words, position, cond)
    )
    on_mesh = parallel.put(network, mesh)
    missing = [pair for pair in range(pairs) if not _is_kept(folder, pair, made)]
    of_pair = 1 if task.per_timestep else len(task.pairs)
    amount = len(missing) * of_pair * programs.blocks * len(shared[0])
    with progress(None, "gauss-newton", amount, "image") as bar:
        for pair in missing:
            averaged = [pair] if task.per_timestep else range(len(task.pairs))
            spread = jax.NamedSharding(mesh, EXAMPLES)
            total = jnp.zeros((mesh.size, k, k), jnp.float32, device=spread)
            for one in averaged:
                total = _add_pair(programs, on_mesh, shared, one, total, bar.update)
            matrix = _over_processes(total) / (programs.cotangents * len(averaged))
            if not np.isfinite(matrix).all():
                raise FloatingPointError(
                    "the Gauss-Newton matrix is not finite; is the model trained, and "
                    "are its predictions of a reasonable size?"
                )
            _keep(folder, kept, pair, matrix, made)
    return made


def _add_pair(
    programs: OutputPrograms,
    network: tuple,
    examples: tuple,
    pair: int,
    total: jax.Array,
    advance: Callable[[int], object],
) -> jax.Array:
    """Returns the total [devices, k, k] with the sum over this process's images."""
    layout, width, n = programs.layout, programs.width, len(examples[0])
    for first in range(0, programs.blocks * width, width):
        numbers, under_way = np.arange(first, first + width, dtype=np.int32), []
        starts = range(0, n, layout.size)
        for start, (microbatch,) in zip(starts, microbatches(layout, examples, pair)):
            # What fills up the last microbatch counts as nothing.
            left = np.arange(start, start + layout.size)[:, None] < n
            microbatch = microbatch._replace(weight=left.astype(np.float32))
            parts = programs.gradients.function(*network, numbers, microbatch)
            features, _ = programs.project.function({"output": parts})
            total = programs.add.function(total, features["output"])
            # Two rounds under way keep the devices busy; more would take memory.
            under_way = [*under_way[-1:], features]
            jax.block_until_ready(under_way[0])
            advance(min(layout.size, n - start))
    return total


def _over_processes(total: jax.Array) -> np.ndarray:
    """Returns the sum over all devices of all processes [k, k], in each of these."""
    count, (*_, k, _) = jax.process_count(), total.shape
    gathered = [
        parallel.gather(np.asarray(total[:, rows]).sum(axis=0)[None], count).sum(axis=0)
        for rows in chunks_of(k, GATHERED_ROWS)
    ]
    return np.concatenate(gathered)


def _check_size(shape: tuple[int, ...], store: epath.PathLike | None) -> None:
    """Raises a MemoryError or an OSError if the matrices do not fit this host."""
    one, whole = 4 * math.prod(shape[-2:]), 4 * math.prod(shape)
    what = f"Gauss-Newton matrices of {' x '.join(map(str, shape))} numbers"
    if store is None:
        host.check_fits(what, whole + 2 * one, 0, None)
    else:
        host.check_fits(what, 3 * one, whole, files.check_folder("store", store))


def _check_store(folder: epath.Path, pairs: int) -> None:
    """Raises a ValueError if a folder holds anything but matrices of pairs."""
    names = {_path(folder, pair).name for pair in range(pairs)}
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if parallel.agreed(bool(there) and not there & names):
        raise ValueError(
            f"store is {folder}, which holds no Gauss-Newton matrices but {min(there)!r}; "
            "name a folder that is new or empty."
        )


def _path(folder: epath.Path, pair: int) -> epath.Path:
    return folder / f"{pair}.npz"


def _is_kept(folder: epath.Path | None, pair: int, made: GaussNewton) -> bool:
    """Returns whether a matrix is there, or raises a ValueError if it is another one."""
    if folder is None:
        return False
    path = _path(folder, pair)
    if not parallel.agreed(path.exists()):
        return False
    saved = json.loads(str(files.read_npz(path).get("made_from", "{}")))
    differing = files.differences(saved, json.loads(json.dumps(made.made_from(pair))))
    if not parallel.agreed(bool(differing)):
        return True
    raise ValueError(
        f"{path} is another Gauss-Newton matrix: {differing[0]}. Name another store, or "
        "delete it."
    )


def _keep(
    folder: epath.Path | None,
    kept: dict,
    pair: int,
    matrix: np.ndarray,
    made: GaussNewton,
) -> None:
    """Keeps a matrix in memory, or on the disk if there is a folder."""
    if folder is None:
        kept[pair] = matrix
        return
    if parallel.is_main_process():
        made_from = json.dumps(made.made_from(pair))
        files.write_npz(_path(folder, pair), matrix=matrix, made_from=made_from)
    parallel.barrier(f"write {_path(folder, pair)}")


def _read(folder: epath.Path, pair: int) -> np.ndarray:
    return files.read_npz(_path(folder, pair))["matrix"]
