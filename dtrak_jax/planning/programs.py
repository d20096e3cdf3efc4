"""The programs that each stage calls on given devices, and how often.

The functions are those that the stages themselves call, with shapes in place of arrays;
nothing is trained or read. Each takes a `Run`, of which it uses the config alone, and
the devices of a `Topology`.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from dtrak_jax import diffusion, training
from dtrak_jax.attribution.kernel import eigh_bytes
from dtrak_jax.attribution.linalg import gram_program
from dtrak_jax.evaluation.outputs import losses_program
from dtrak_jax.evaluation.retrain import member_steps
from dtrak_jax.features import StepPrograms, example_mesh, step_programs
from dtrak_jax.methods import METHODS
from dtrak_jax.network import Params
from dtrak_jax.parallel import Program
from dtrak_jax.planning.topology import Topology
from dtrak_jax.run import Run


class Planned(NamedTuple):
    """One step of a stage, on each of the processes that share it."""

    name: str
    step: str  # what is done at a time, in words
    calls: list[tuple[Program, int]]  # and how often the busiest process calls them
    written: int  # bytes that all processes write
    stored: int  # bytes of these that stay
    overlapping: bool = (
        False  # whether a program starts before the one before has ended
    )
    plain: tuple[Program, float] | None = None
    """For gradients: that of a sum over noised images, and how often for all of them."""

    @property
    def programs(self) -> list[Program]:
        """The programs of the calls, and then the plain one."""
        return [program for program, _ in [*self.calls, *filter(None, [self.plain])]]


def shapes(run: Run) -> Params:
    """Returns the shapes of the model's parameters."""
    return jax.eval_shape(run.init, jax.eval_shape(jax.random.key, 0))


def size(tree) -> int:
    """Returns the bytes of a pytree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def ceil(count: int, parts: int) -> int:
    """Returns the largest of so many parts of a count."""
    return -(-count // parts)


def train(run: Run, topology: Topology) -> list[Planned]:
    """Returns the training step; nothing for a model that is given."""
    config, devices = run.config.train, topology.devices
    if run.config.model.folder:
        return []
    recipe = run.recipe(config.steps)
    program = training.planned_step(recipe, run.image_shape, devices)
    state, batch, *_ = program.arguments
    step = f"{config.batch_size} images, {len(batch.x) // len(devices)} on a device"
    written = len(training.saved_steps(config)) * size(state)
    stored = len(training.kept_steps(config)) * size(state)
    return [Planned("train", step, [(program, config.steps)], written, stored)]


def sample(run: Run, topology: Topology) -> list[Planned]:
    """Returns the sampling step; nothing where the model generates no queries."""
    settings, devices = run.config.sample, topology.local
    if not run.is_sampled:
        return []
    images = ceil(settings.count, topology.processes), settings.batch_size
    program, calls = diffusion.sample_program(
        run.apply, shapes(run), run.sampler, run.image_shape, *images, devices
    )
    step = f"{len(program.arguments[1]) // len(devices)} images on a device"
    # The files hold each picture, and all of them in one array.
    written = 2 * settings.count * math.prod(run.image_shape)
    return [Planned("sample", step, [(program, calls)], written, written)]


def featurize(run: Run, topology: Topology) -> list[Planned]:
    """Returns a step of gradients and their projection, for each set of examples."""
    programs = _features(run, topology)
    layout = programs.layout
    step, noised = f"{run.config.features.batch_size} noised images on a device", 1.0
    if not layout.apart:
        step = f"{layout.pairs} noised images of one image on a device"
        # The last microbatch of an example is filled up to the size of the others.
        noised = layout.pairs / layout.copies
    steps = []
    for examples, count in {"train": run.config.data.train, **run.query_counts}.items():
        rounds = layout.rounds(count, topology.processes)
        stored = layout.bytes_written(count, len(run.task().measurements))
        calls = [
            (programs.gradients, rounds * layout.parts),
            (programs.project, rounds),
        ]
        name, plain = f"featurize {examples}", (programs.plain, rounds * noised)
        steps.append(Planned(name, step, calls, stored, stored, True, plain))
    return steps


def _features(run: Run, topology: Topology) -> StepPrograms:
    """Returns the programs of featurize on a process's devices."""
    image = jax.ShapeDtypeStruct((1, *run.image_shape), np.float32)
    mesh = example_mesh(topology.local, run.config.features.proj_devices)
    batch_size = run.config.features.batch_size
    return step_programs(
        run.task(), shapes(run), image, run.projection, mesh, batch_size
    )


def attribute(run: Run, topology: Topology) -> list[Planned]:
    """Returns the sum of a kernel's Gram matrix; nothing without a kernel method."""
    methods = [m for m in run.config.attribution.methods if METHODS[m].kernel]
    if not methods:
        return []
    n, layout = run.config.data.train, _features(run, topology).layout
    program, calls = gram_program(n, layout.dim, topology.devices)
    measurements = {METHODS[name].measurement for name in methods}
    side, columns = program.arguments[1].shape
    step = (
        f"the Gram matrix {side} x {side} of {columns} columns; on the host its "
        f"eigenvectors, {eigh_bytes(side) / 2**30:.1f} GiB"
    )
    called = [(program, len(measurements) * layout.per_example * calls)]
    scores = 4 * len(methods) * n * sum(run.query_counts.values())
    return [Planned("attribute", step, called, scores, scores)]


def retrain(run: Run, topology: Topology) -> list[Planned]:
    """Returns the training step of members, and the measurement of their losses."""
    settings, devices = run.config.ensemble, topology.local
    members, queries = settings.subsets * settings.seeds, sum(run.query_counts.values())
    plans = [_members(run, topology, "retrain", members, member_steps(run.config))]
    if settings.models:
        more = settings.models, run.config.train.steps
        plans.append(_members(run, topology, "train models", *more))
    network = run.apply, run.schedule, shapes(run), run.image_shape
    program, calls = losses_program(*network, queries, settings, devices)
    calls *= ceil(ceil(members, topology.processes), len(devices))
    images = min(settings.batch_size, queries)
    step = f"{images} noised queries, a model on a device"
    written = 8 * members * queries
    return [*plans, Planned("measure", step, [(program, calls)], written, written)]


def _members(
    run: Run, topology: Topology, name: str, members: int, steps: int
) -> Planned:
    """Returns the training step of so many models, one on each device."""
    devices, config = topology.local, run.config.train
    recipe = run.recipe(steps)
    program = training.planned_member_step(recipe, run.image_shape, devices)
    state, final = size(program.arguments[0]) // len(devices), size(shapes(run))
    step = f"a model of {members} on a device, {config.batch_size} images"
    calls = ceil(ceil(members, topology.processes), len(devices)) * steps
    written = members * ((steps - 1) // config.save_every * state + final)
    return Planned(name, step, [(program, calls)], written, members * final)
