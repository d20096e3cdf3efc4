"""The programs that each stage calls on given devices, and how often.

The functions are those that the stages themselves call, with shapes in place of arrays;
nothing is trained or read. Each takes a `Run`, of which it uses the config alone, and
the devices of a `Topology`.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from dtrak_jax import diffusion, feature_sets, training
from dtrak_jax.attribution.conjugate import VECTORS, search_calls
from dtrak_jax.attribution.ekfac import divide_calls
from dtrak_jax.attribution.kernel import eigh_bytes
from dtrak_jax.attribution.linalg import gram_program
from dtrak_jax.attribution.whole import queries_at_once, score_calls, solve_calls
from dtrak_jax.encoding.encode import (
    chunks,
    decode_function,
    encode_function,
    planned_batches,
)
from dtrak_jax.evaluation.outputs import losses_program
from dtrak_jax.evaluation.retrain import member_steps
from dtrak_jax.features import (
    Projection,
    StepPrograms,
    Task,
    example_mesh,
    step_programs,
)
from dtrak_jax.features.curvature import block_shapes
from dtrak_jax.features.gradients import LayerGroups, feature_names
from dtrak_jax.features.output_programs import output_programs
from dtrak_jax.features.passes import Draws, pass_programs
from dtrak_jax.features.products import batch_of, product_program
from dtrak_jax.methods import METHODS
from dtrak_jax.network import network_params
from dtrak_jax.parallel import Program
from dtrak_jax.planning import footprint
from dtrak_jax.planning.topology import Topology
from dtrak_jax.run import Run


class Planned(NamedTuple):
    """One step of a stage, on each of the processes that share it."""

    name: str
    step: str  # what is done at a time, in words
    calls: list[tuple[Program, int]]  # and how often the busiest process calls them
    written: int  # bytes that all processes write
    stored: int  # bytes of these that stay
    overlapping: bool = False  # a program starts before the one before has ended
    plain: tuple[Program, float] | None = None
    """For gradients: that of a sum over noised images, and how often for all of them."""

    @property
    def programs(self) -> list[Program]:
        """The programs of the calls, and then the plain one."""
        return [program for program, _ in [*self.calls, *filter(None, [self.plain])]]


def size(tree) -> int:
    """Returns the bytes of a pytree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def encode(run: Run, topology: Topology) -> list[Planned]:
    """Returns the encoding of a batch of pictures, those to be generated too; nothing of
    a network of pixels. The few captions count as nothing."""
    if not run.config.is_latent:
        return []
    picture = jax.ShapeDtypeStruct(run.space.image_shape, np.float32)
    program, size = planned_batches(
        run, encode_function, "vae", picture, topology.local
    )
    variants = {"train": 1 + run.config.data.flip}
    calls = written = 0
    for name, count in run.counts.items():
        shared = chunks(count)[:: topology.processes]
        batches = sum(-(-(rows.stop - rows.start) // size) for rows in shared)
        calls += batches * variants.get(name, 1)
        # A mean and a deviation.
        written += 2 * count * variants.get(name, 1) * latent_bytes(run)
    step = f"{size // len(topology.local)} pictures on a device"
    return [Planned("encode", step, [(program, calls)], written, written)]


def latent_bytes(run: Run) -> int:
    """Returns the bytes of what a network is given of a picture."""
    return 4 * math.prod(run.network.shape)


def train(run: Run, topology: Topology) -> list[Planned]:
    """Returns the training step; nothing for a model that is given."""
    config, devices = run.config.train, topology.devices
    if run.config.is_given:
        return []
    program = training.planned_step(run.recipe(config.steps), run.space.shapes, devices)
    state, batch, *_ = program.arguments
    step = f"{config.batch_size} images, {len(batch.index) // len(devices)} on a device"
    written = len(training.saved_steps(config)) * size(state)
    stored = len(training.kept_steps(config)) * size(state)
    return [Planned("train", step, [(program, config.steps)], written, stored)]


def sample(run: Run, topology: Topology) -> list[Planned]:
    """Returns the sampling step; nothing where the model generates no queries."""
    settings, devices = run.config.sample, topology.local
    if not run.is_sampled:
        return []
    images = math.ceil(settings.count / topology.processes), settings.batch_size
    given = run.space.shapes
    params = network_params(run.param_shapes, given.frozen)
    network = run.space.sampled, params, run.space.sampler, run.network.shape
    cond = run.space.sampled_cond
    call = diffusion.sample_program(*network, *images, devices, cond)
    step = f"{len(call[0].arguments[1]) // len(devices)} images on a device"
    # The files hold each picture, and all of them in one array.
    written = 2 * settings.count * math.prod(run.space.image_shape)
    steps = [Planned("sample", step, [call], written, written)]
    if run.config.is_latent:
        latent = jax.ShapeDtypeStruct(run.network.shape, np.float32)
        program, size = planned_batches(run, decode_function, "vae", latent, devices)
        step = f"{size // len(devices)} pictures on a device"
        steps += [Planned("decode", step, [(program, -(-images[0] // size))], 0, 0)]
    return steps


def featurize(run: Run, topology: Topology) -> list[Planned]:
    """Returns a step of gradients and their projection, for each set of features that the
    config's methods need."""
    made: dict[tuple, StepPrograms] = {}
    steps = []
    for feature_set in feature_sets.wanted(run):
        how = feature_set.task, footprint.groups(run, feature_set)
        if how not in made:
            made[how] = _features(run, topology, *how)
        programs, layout = made[how], made[how].layout
        count = run.counts[feature_set.examples]
        step = f"{run.config.features.batch_size} noised images on a device"
        noised = 1.0
        if not layout.apart:
            step = f"{layout.pairs} noised images of one image on a device"
            # The last microbatch of an example is filled up to the size of the others.
            noised = layout.pairs / layout.copies
        rounds = layout.rounds(count, topology.processes)
        gradients = programs.gradients, rounds * layout.parts
        written = layout.bytes_written(count, len(feature_names(*how)))
        name = feature_set.store.removeprefix(f"{feature_sets.place(run)}/")
        steps.append(
            Planned(
                f"featurize {name}",
                step,
                [gradients, (programs.project, rounds)],
                *(written, written),
                overlapping=True,
                plain=(programs.plain, rounds * noised),
            )
        )
    return steps


def _features(
    run: Run, topology: Topology, task: Task, groups: LayerGroups = ()
) -> StepPrograms:
    """Returns the programs of featurize on a process's devices."""
    settings = run.config.features
    mesh = example_mesh(topology.local, settings.proj_devices)
    given = run.space.shapes
    return step_programs(
        task,
        run.param_shapes,
        given.x,
        run.projection,
        mesh,
        settings.batch_size,
        frozen=given.frozen,
        cond=given.cond,
        groups=groups,
    )


def attribute(run: Run, topology: Topology) -> list[Planned]:
    """Returns the sum of a kernel's Gram matrix, if a method has one, and what
    Gauss-Newton matrices and the curvature take, if a method is made from them."""
    return [
        *_kernels(run, topology),
        *_gauss_newton(run, topology),
        *_curvature(run, topology),
    ]


def _gauss_newton(run: Run, topology: Topology) -> list[Planned]:
    """Returns the gradients of cotangents, their projection, and the sum of a matrix."""
    if not any(METHODS[name].of_output for name in run.config.attribution.methods):
        return []
    settings, given = run.config.features, run.space.shapes
    programs = output_programs(
        run.task(measurement="loss"),
        run.param_shapes,
        given.frozen,
        given.x,
        run.projection,
        example_mesh(topology.local, 1),
        settings.batch_size,
        cond=given.cond,
        cotangents=run.config.attribution.gauss_newton_cotangents,
    )
    layout, share = programs.layout, math.ceil(run.counts["train"] / topology.processes)
    calls = layout.pairs * programs.blocks * math.ceil(share / layout.size)
    parts = (programs.gradients, programs.project, programs.add)
    step = (
        f"{layout.size * programs.width // len(topology.local)} cotangents on a device"
    )
    matrices = layout.pairs if settings.per_timestep else 1
    kept = 4 * matrices * layout.dim**2
    return [
        Planned("gauss-newton", step, [(part, calls) for part in parts], kept, kept)
    ]


def _curvature(run: Run, topology: Topology) -> list[Planned]:
    """Returns the two passes of EK-FAC, and the scores of whole gradients by each method
    that is made from it."""
    methods = [m for m in run.config.attribution.methods if METHODS[m].curved]
    if not methods:
        return []
    settings, given = run.config.attribution, run.space.shapes
    mesh, task = (
        example_mesh(topology.local, 1),
        run.task(measurement="loss", per_timestep=False),
    )
    network, size = (run.param_shapes, given.frozen), run.config.features.batch_size
    draws = Draws.of(task, network, given.x, given.cond, settings.cotangents)
    how = given.x, given.cond, mesh, size
    passes = pass_programs(draws, network, *how)
    n, queries = run.counts["train"], sum(run.query_counts.values())
    share = math.ceil(n / topology.processes)
    calls = math.ceil(share * draws.pairs / passes.layout.size)
    step = f"{size} noised images on a device"
    both = [(passes.factors, calls), (passes.eigenvalues, calls)]
    written = 4 * draws.entries(run.param_shapes)
    planned = [Planned("curvature", step, both, written, written)]
    programs = step_programs(
        task,
        run.param_shapes,
        given.x,
        Projection("none"),
        mesh,
        size,
        frozen=given.frozen,
        cond=given.cond,
    )
    blocks, processes = block_shapes(draws, run.param_shapes), topology.processes
    scored = score_calls(programs, share, queries, processes)
    divide = divide_calls(programs, blocks, queries, processes)
    most = queries_at_once(programs.layout.dim, VECTORS)
    product = product_program(task, network, *how, most)
    vectors = len(product[1].arguments[2][0])
    searches = solve_calls(programs.layout, vectors, queries, processes)
    images = len(batch_of(settings.ggn_images, n, len(task.pairs))[0])
    searching = blocks, images, settings.ggn_iterations, searches
    calls = {"ekfac": [divide], "gauss-newton-cg": search_calls(product, *searching)}
    scores = 4 * n * queries
    return planned + [
        Planned(name, step, [*scored, *calls[name]], scores, scores) for name in methods
    ]


def _kernels(run: Run, topology: Topology) -> list[Planned]:
    """Returns the sum of a kernel's Gram matrix; nothing without a kernel method."""
    chosen = {name: METHODS[name] for name in run.config.attribution.methods}
    methods = [m for m, row in chosen.items() if row.kernel and not row.of_output]
    if not methods:
        return []
    n, layout = run.counts["train"], _features(run, topology, run.task()).layout
    program, calls = gram_program(n, layout.dim, topology.devices)
    calls *= layout.per_example * len({METHODS[name].measurement for name in methods})
    side, columns = program.arguments[1].shape
    step = (
        f"the Gram matrix {side} x {side} of {columns} columns; on the host its "
        f"eigenvectors, {eigh_bytes(side) / 2**30:.1f} GiB"
    )
    scores = 4 * len(methods) * n * sum(run.query_counts.values())
    return [Planned("attribute", step, [(program, calls)], scores, scores)]


def retrain(run: Run, topology: Topology) -> list[Planned]:
    """Returns the training step of members, and the measurement of their losses."""
    settings, devices = run.config.ensemble, topology.local
    members, queries = settings.subsets * settings.seeds, sum(run.query_counts.values())
    plans = [_members(run, topology, "retrain", members, member_steps(run.config))]
    if settings.models:
        full = settings.models, run.config.train.steps
        plans.append(_members(run, topology, "train models", *full))
    network = run.network.apply, run.schedule, run.param_shapes, run.space.shapes
    program, calls = losses_program(*network, queries, settings, devices)
    calls *= groups_of(members, topology)
    step = f"{min(settings.batch_size, queries)} noised queries, a model on a device"
    written = 8 * members * queries
    return [*plans, Planned("measure", step, [(program, calls)], written, written)]


def _members(
    run: Run, topology: Topology, name: str, members: int, steps: int
) -> Planned:
    """Returns the training step of so many models, one on each device."""
    devices, config = topology.local, run.config.train
    per_device = run.config.ensemble.per_device
    program = training.planned_member_step(
        run.recipe(steps), run.space.shapes, devices, per_device
    )
    trained = len(devices) * per_device
    state, final = size(program.arguments[0]) // trained, size(run.param_shapes)
    models = "a model" if per_device == 1 else f"{per_device} models"
    step = f"{models} of {members} on a device, {config.batch_size} images"
    calls = groups_of(members, topology, per_device) * steps
    written = members * ((steps - 1) // config.save_every * state + final)
    return Planned(name, step, [(program, calls)], written, members * final)


def groups_of(members: int, topology: Topology, per_device: int = 1) -> int:
    """Returns how many groups of models, as many on each device, the busiest process has."""
    of_process = math.ceil(members / topology.processes)
    return math.ceil(of_process / len(topology.local) / per_device)
