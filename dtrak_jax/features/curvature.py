"""The Gauss-Newton matrix of the network's output, approximated by EK-FAC.

F = E[J^T (2/D) J], J the derivative by the parameters of the prediction of D entries, over
training images, and the timesteps and noise of a task. It is the Hessian of the loss where
the network is linear in its parameters, and the Fisher matrix of a normal distribution
around the prediction; it does not depend on the target. One cotangent c = eta sqrt(2/D),
eta ~ N(0, I), of a draw gives J^T c, whose outer product has the expectation F.

Of a layer's weight this is G = sum_positions a b^T, [window C_in, C_out], a the inputs and
b the output gradients of a position. EK-FAC (George et al. 2018, "Fast Approximate Natural
Gradient Descent in a Kronecker-factored Eigenbasis", arXiv 1806.03884) takes

  F = sum_io Lambda_io vec(q_i r_o^T) vec(q_i r_o^T)^T,  Lambda_io = E[(q_i^T G r_o)^2],

q_i the eigenvectors of A = mean_positions a a^T, and r_o those of B = E[sum_positions b b^T]
(the "expand" form, Eschenhagen et al. 2023, arXiv 2311.00636). In that basis F's diagonal
is exact, and what is off it counts as 0, as does F between layers. All other parameters,
such as biases, norms and embeddings, have the diagonal of their own entries.
Attribution for diffusion by it is of Mlodozeniec et al. (arXiv 2410.13850).
"""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from etils import epath

from dtrak_jax import files, parallel
from dtrak_jax.checks import at_least, instance
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.digests import digest, named_leaves
from dtrak_jax.features.featurize import checked, example_mesh
from dtrak_jax.features.fingerprint import example_hashes, fingerprint, noise_words
from dtrak_jax.features.gradients import (
    addition_function,
    check_tags,
    chosen_leaves,
    network_inputs,
)
from dtrak_jax.features.microbatches import Layout, microbatches
from dtrak_jax.features.passes import HIGHEST, Draws, pass_programs
from dtrak_jax.features.projection import Projection
from dtrak_jax.features.task import Task
from dtrak_jax.network import Params
from dtrak_jax.parallel import Program
from dtrak_jax.progress import progress
from dtrak_jax.switches import standard

ROUNDING = 1e-10
"""A block whose mean eigenvalue is a smaller part of the largest is of rounding errors, such
as that of the bias of an attention's keys."""


class Block(NamedTuple):
    """The part of F that belongs to one leaf of the parameters."""

    eigenvalues: np.ndarray
    """Lambda, float32 [window C_in, C_out]; or a diagonal [size]."""
    inputs: np.ndarray | None = None
    """The eigenvectors of A in columns; None of a diagonal."""
    outputs: np.ndarray | None = None
    """The eigenvectors of B in columns; None of a diagonal."""

    def divide(self, gradients: jax.Array, damping: jax.Array) -> jax.Array:
        """Returns (F + lambda I)^-1 g of the leaf's gradients [S, size]."""
        divisors = self.eigenvalues + damping
        if self.inputs is None:
            return gradients / divisors.reshape(1, -1)
        g = gradients.reshape(-1, *divisors.shape)
        rotate = functools.partial(jnp.einsum, precision=HIGHEST)
        g = rotate("ia,sio,ob->sab", self.inputs, g, self.outputs) / divisors
        g = rotate("ia,sab,ob->sio", self.inputs, g, self.outputs)
        return g.reshape(gradients.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Curvature:
    """F of a network, with what it is of; made by `ekfac`."""

    task: Task
    """Timesteps, noise and parameters; its measurement becomes the loss."""
    params: Params
    frozen: Params | None
    blocks: dict[str, Block]
    """The blocks by the path of the leaf, in order."""

    def __post_init__(self):
        task = dataclasses.replace(self.task, measurement="loss")
        object.__setattr__(self, "task", task)
        paths = list(named_leaves(self.params))
        chosen = {paths[i] for i in chosen_leaves(task, self.params)}
        if differing := chosen ^ self.blocks.keys():
            raise ValueError(
                f"the task's parameters are others than the curvature's, such as by "
                f"{min(differing)!r}; make the curvature with this task."
            )

    def __repr__(self) -> str:
        kept = sum(block.inputs is not None for block in self.blocks.values())
        return f"Curvature({kept} layers, {len(self.blocks) - kept} diagonals)"

    @property
    def mean_eigenvalues(self) -> np.ndarray:
        """The mean eigenvalue of each block, float64 [blocks]; infinite where F is 0 but for
        rounding errors, so that no damping in this unit makes anything of them."""
        values = [block.eigenvalues for block in self.blocks.values()]
        means = np.array([array.mean(dtype=np.float64) for array in values])
        return np.where(means > ROUNDING * means.max(), means, np.inf)


@standard()
def ekfac(
    task: Task,
    params: Params,
    images: np.ndarray | Dataset,
    *,
    frozen: Params | None = None,
    ids: Sequence[str] | None = None,
    cond: object = None,
    bounds: tuple[float, float] | None = None,
    cotangents: int = 1,
    store: epath.PathLike | None = None,
    batch_size: int = 64,
) -> Curvature:
    """Returns EK-FAC's F, its mean taken over training images and the pairs of a task.

    It takes a forward pass and a pass back to the layers for each image, pair and
    cotangent, twice: once for A and B, once for Lambda. Batch size and devices change it
    by rounding only. All processes must call this together.

    Args:
      task: network, timesteps and noise; its measurement does not matter.
      params, images, frozen, ids, cond, bounds, batch_size: those of `featurize`, of the
        training set.
      cotangents: random ones for each image and pair, a function of the task's seed, the
        image's id, the pair and their number; 0 takes the D unit vectors, without chance.
      store: an .npz that keeps F, and is read if it is of the same, and else refused;
        None keeps it in memory alone. A pass that is interrupted begins anew.

    Raises:
      ValueError: what `featurize` raises; or a weight of which only some uses are tagged,
        or otherwise than the network uses it.
      FloatingPointError: F is not finite.
    """
    instance("task", task, Task)
    cotangents = at_least("cotangents", cotangents, 0)
    batch_size = at_least("batch_size", batch_size, 1)
    task = dataclasses.replace(task, measurement="loss")
    network, ids, images, cond = checked(
        task, (params, frozen), images, ids, cond, bounds
    )
    if images.ndim != 4:
        raise ValueError(
            f"images have shape {images.shape}; they must be [n, H, W, C]."
        )
    hashes, inputs = example_hashes(ids, images, cond), network_inputs(images, cond, 1)
    made_from = ""
    if store is not None:
        none = Projection("none")
        described = fingerprint(task, (*network, {}), none, inputs, hashes, "train")
        # Whether gradients are averaged does not matter.
        described |= {"per_timestep": True, "cotangents": cotangents}
        made_from = digest(json.dumps(described, sort_keys=True))
        if parallel.agreed(files.holds(store, {"made_from": np.array(made_from)})):
            return Curvature(task, *network, _load(store))
        if parallel.agreed(files.at(store).exists()):
            raise ValueError(
                f"{store} is no curvature of this network, task and images; name another "
                "store, or delete it."
            )
    draws = Draws.of(task, network, images, cond, cotangents)
    check_tags(task, network, images, cond)
    if not draws.outputs:
        warnings.warn(
            "no layer of the network is tagged among the parameters chosen, so that "
            "EK-FAC is the diagonal of F alone. Tag them by `dtrak_jax.layer`.",
            stacklevel=3,
        )
    words, position = noise_words(hashes, "train"), np.arange(len(ids), dtype=np.int32)
    blocks = _blocks(draws, network, (images, words, position, cond), batch_size)
    if store is not None:
        if parallel.is_main_process():
            _save(store, blocks, made_from)
        parallel.barrier(f"write {store}")
    return Curvature(task, *network, blocks)


def block_shapes(draws: Draws, params: Params) -> list[Block]:
    """Returns the shapes of the blocks of F; shapes will do for parameters."""

    def shape(*sides: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sides, np.float32)

    leaves, sides = jax.tree.leaves(params), draws.sides(params)
    return [
        Block(shape(*sides[i]), *(shape(side, side) for side in sides[i]))
        if i in sides
        else Block(shape(leaves[i].size))
        for i in chosen_leaves(draws.task, params)
    ]


def _blocks(
    draws: Draws, network: tuple, examples: tuple, batch_size: int
) -> dict[str, Block]:
    """Returns the blocks of F, by the path of the leaf."""
    x, *_, cond = examples
    n, mesh = len(x), example_mesh(jax.local_devices(), 1)
    passes = pass_programs(draws, network, x, cond, mesh, batch_size)
    network = parallel.put(network, mesh)
    shared = jax.tree.map(lambda column: column[parallel.share(n)], examples)
    with progress(None, "curvature", 2 * len(shared[0]), "image") as bar:
        sums = functools.partial(_sums, passes.layout, shared, n, bar.update)
        bases = {}
        for i, (a, b) in sums(passes.factors, network).items():
            # Hosts may round differently, and must go on with the same basis.
            a = scipy.linalg.eigh(a / draws.positions(i))[1].astype(np.float32)
            b = scipy.linalg.eigh(b)[1].astype(np.float32)
            bases[i] = tuple(map(parallel.of_main_process, (a, b)))
        on_mesh = parallel.put(bases, mesh)
        eigenvalues = sums(passes.eigenvalues, (*network, on_mesh))
    paths = list(named_leaves(network[0]))
    return {
        paths[i]: Block(values.astype(np.float32), *bases.get(i, ()))
        for i, values in sorted(eigenvalues.items())
    }


def _sums(
    layout: Layout,
    examples: tuple,
    n: int,
    advance: Callable[[int], object],
    program: Program,
    arguments: tuple,
):
    """Returns the mean over all cotangents of n images of what a program adds up, float64.

    The examples are those of this process, and `advance` is told the number of images.
    """
    add, total, done = addition_function(program.mesh), None, 0
    count = len(examples[0]) * layout.pairs
    for (microbatch,) in microbatches(layout, examples) if count else ():
        # What fills up the last microbatch counts as nothing.
        left = np.arange(done, done + layout.size)[:, None] < count
        microbatch = microbatch._replace(weight=left.astype(np.float32))
        part = program.function(*arguments, microbatch)
        # Two microbatches under way keep the devices busy; more would take memory.
        jax.block_until_ready(total)
        total = part if total is None else add(total, part)
        before, done = done, min(done + layout.size, count)
        advance(done // layout.pairs - before // layout.pairs)
    if total is None:
        shapes = jax.eval_shape(program.function, *program.arguments)
        total = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def mean(leaf) -> np.ndarray:
        of_process = np.asarray(leaf).sum(axis=0, dtype=np.float64)
        gathered = parallel.gather(
            of_process.astype(np.float32)[None], jax.process_count()
        )
        whole = gathered.sum(axis=0, dtype=np.float64) / (n * layout.pairs)
        if not np.isfinite(whole).all():
            raise FloatingPointError(
                "the curvature is not finite; is the model trained, and are its "
                "predictions of a reasonable size?"
            )
        return whole

    return jax.tree.map(mean, total)


def _save(path: epath.PathLike, blocks: dict[str, Block], made_from: str) -> None:
    """Writes blocks as an .npz with what they were made from."""
    arrays = {"made_from": np.array(made_from), "paths": np.array(list(blocks))}
    for index, block in enumerate(blocks.values()):
        named = block._asdict().items()
        arrays |= {f"{index}/{k}": array for k, array in named if array is not None}
    files.write_npz(path, **arrays)


def _load(path: epath.PathLike) -> dict[str, Block]:
    """Reads what `_save` wrote."""
    saved, blocks = files.read_npz(path), {}
    for index, name in enumerate(saved["paths"]):
        fields = (saved.get(f"{index}/{field}") for field in Block._fields)
        blocks[str(name)] = Block(*fields)
    return blocks
