"""Every stage's programs, how often each is called, and what is written."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from dtrak_jax import diffusion, models, parallel, pipeline, training
from dtrak_jax.attribution import solver
from dtrak_jax.config import KERNELS, Config
from dtrak_jax.diffusion import sampling
from dtrak_jax.evaluation import outputs
from dtrak_jax.evaluation.ensemble import member_steps
from dtrak_jax.features import gradients
from dtrak_jax.features import loop as features
from dtrak_jax.features.factorized import channel_folds
from dtrak_jax.planning.costs import Program
from dtrak_jax.planning.topology import Topology
from dtrak_jax.training import ensemble
from dtrak_jax.training import loop as training_loop

FLOAT = 4
"""Bytes of a number in a file."""


class Stage(NamedTuple):
    """One stage, on each of the processes that share it."""

    name: str
    step: str
    """What is done at a time, in words."""
    calls: list[tuple[Program, int]]
    """The programs of a step and how often the busiest process calls them in all."""
    devices: int
    """On which one step runs."""
    together: bool
    """Whether a program starts while the one before is still there."""
    written: int
    """Bytes that all processes write."""
    stored: int
    """Bytes of these that stay."""
    plain: tuple[Program, float] | None = None
    """Of gradients: that of a sum over noised images, and how often for all of them."""


def stages_of(config: Config, topology: Topology) -> list[Stage]:
    """All stages that take long, in their order. No data is read."""
    plan = _Plan(config, topology)
    sets = {"train": config.data.train, **_query_counts(config)}
    return [
        plan.train(),
        *([plan.sample()] if config.sample.count else []),
        *(plan.featurize(name, count) for name, count in sets.items()),
        *([plan.attribute()] if plan.kernel_methods else []),
        plan.retrain(),
        plan.measure(),
    ]


def _query_counts(config: Config) -> dict[str, int]:
    counts = {"validation": config.data.validation, "generated": config.sample.count}
    return {name: counts[name] for name in pipeline.query_sets(config)}


def shape(dims: tuple[int, ...], dtype=np.float32) -> jax.ShapeDtypeStruct:
    """An array that is not there."""
    return jax.ShapeDtypeStruct(dims, dtype)


def size(tree) -> int:
    """Bytes of arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def stacked(tree, count: int):
    """`count` of all arrays, along a new first axis."""
    return jax.tree.map(lambda leaf: shape((count, *leaf.shape), leaf.dtype), tree)


@dataclasses.dataclass(frozen=True)
class _Plan:
    config: Config
    topology: Topology

    @functools.cached_property
    def model(self):
        return models.build(self.config.model)

    @functools.cached_property
    def params(self):
        key = jax.eval_shape(jax.random.key, 0)
        return jax.eval_shape(models.init_fn(self.model), key)

    @functools.cached_property
    def schedule(self):
        return diffusion.build(self.config.diffusion)

    @functools.cached_property
    def image(self) -> tuple[int, int, int]:
        size = self.config.model.sample_size
        return size, size, self.config.model.in_channels

    @property
    def kernel_methods(self) -> list[str]:
        return [m for m in self.config.attribution.methods if m in KERNELS]

    @functools.cached_property
    def member_config(self):
        return dataclasses.replace(self.config.train, steps=member_steps(self.config))

    def mine(self, count: int) -> int:
        """The largest share of a process."""
        return -(-count // self.topology.processes)

    @property
    def groups(self) -> int:
        """Of members, one on each device, that a process trains one after the other."""
        settings = self.config.ensemble
        members = self.mine(settings.subsets * settings.seeds)
        return -(-members // len(self.topology.local))

    def train(self) -> Stage:
        config, devices = self.config.train, self.topology.devices
        mesh = parallel.mesh(devices)
        state = self._state(config)
        step = training_loop._compile(
            models.train_apply_fn(self.model),
            self.schedule,
            config,
            self.config.data.flip,
            mesh,
            training_loop.state_specs(config, state, mesh),
        )
        b = -(-config.batch_size // len(devices)) * len(devices)
        arrays = shape((b, *self.image)), shape((b,), np.int32), shape((b,))
        asked, seed = shape((len(devices),), np.int32), shape((), np.uint32)
        program = Program(step, (state, *arrays, asked, seed), mesh)
        kept = training.kept_steps(config)
        saved = {*kept, *range(config.save_every, config.steps + 1, config.save_every)}
        return Stage(
            "train",
            f"{config.batch_size} images, {b // len(devices)} on a device",
            [(program, config.steps)],
            devices=len(devices),
            together=False,
            written=len(saved) * size(state),
            stored=len(kept) * size(state),
        )

    def _state(self, config) -> training_loop.TrainState:
        return jax.eval_shape(
            lambda params: training_loop.init_state(params, config), self.params
        )

    def sample(self) -> Stage:
        config, mesh = self.config.sample, parallel.mesh(self.topology.local)
        step = sampling._step_function(
            models.apply_fn(self.model),
            self.schedule,
            mesh,
            config.sampler == "ancestral",
            config.eta,
            config.clip,
        )
        count = self.mine(config.count)
        n = max(1, min(config.batch_size * mesh.size, count))
        n += -n % mesh.size
        number = shape((), np.int32)
        x, seeds = shape((n, *self.image)), shape((n,), np.uint32)
        program = Program(step, (self.params, x, seeds, None, number, number), mesh)
        pixels = config.count * math.prod(self.image)
        return Stage(
            "sample",
            f"{n // mesh.size} images on a device",
            [(program, -(-count // n) * config.steps)],
            devices=mesh.size,
            together=False,
            # PNG files, and all of them in one array.
            written=2 * pixels,
            stored=2 * pixels,
        )

    def featurize(self, name: str, count: int) -> Stage:
        settings = self.config.features
        task, gradient, project, plain, slots = self._gradients
        kernels = len(task.pairs) if task.per_timestep else 1
        k = self.features_dim
        rows = features.rows_per_chunk(kernels, k, slots)
        # Process 0 has the most chunks: every so-many-th from the first one on.
        chunks = range(0, count, rows)[:: self.topology.processes]
        batches = sum(
            -(-min(rows, count - start) * kernels // slots) for start in chunks
        )
        copies = gradient.arguments[2].pair.shape[1]
        parts = 1 if task.per_timestep else -(-len(task.pairs) // copies)
        step, noised = f"{settings.batch_size} noised images on a device", batches
        if not task.per_timestep:
            step = f"{len(task.pairs)} noised images of one image on a device"
            # The last part is filled up to as many as the others.
            noised = batches * len(task.pairs) / copies
        measured = len(task.measurements)
        stored = FLOAT * count * (measured * kernels * (k + 1) + len(task.pairs))
        return Stage(
            f"featurize {name}",
            step,
            [(gradient, batches * parts), (project, batches)],
            devices=gradient.mesh.size,
            together=True,
            written=stored,
            stored=stored,
            plain=(plain, noised),
        )

    @functools.cached_property
    def features_dim(self) -> int:
        task = pipeline.task(self.config, self.config.features.noise)
        p = features.parameter_count(task, self.params)
        return pipeline.projection(self.config).output_dim(p)

    @functools.cached_property
    def _gradients(self):
        """(task, gradient step, projection step, plain gradient step, slots)."""
        settings, projection = self.config.features, pipeline.projection(self.config)
        task = pipeline.task(self.config, settings.noise)
        mesh = features.example_mesh(self.topology.local, settings.proj_devices)
        slots, copies = features._slots_and_copies(task, settings.batch_size, mesh.size)
        inputs = gradients.network_inputs(shape((1, *self.image)), None, 1)
        folds = channel_folds(task, self.params, projection, inputs)
        folds = jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype), folds)
        function = gradients.gradient_function(task, mesh)

        def gradient(count: int, of: int) -> Program:
            batch = gradients.Slots(
                x=shape((count, 1, *self.image)),
                words=shape((count, 2), np.uint32),
                position=shape((count,), np.int32),
                pair=shape((count, of), np.int32),
                weight=shape((count, of)),
                cond=None,
            )
            return Program(function, (self.params, folds, batch), mesh)

        step = gradient(slots, copies)
        made, _ = function.eval_shape(*step.arguments)
        project = Program(
            gradients.projection_function(projection, mesh), (made,), mesh
        )
        plain = (
            gradient(mesh.size, slots * copies // mesh.size) if copies == 1 else step
        )
        return task, step, project, plain, slots

    def attribute(self) -> Stage:
        n, k = self.config.data.train, self.features_dim
        rows, columns = min(n, k), max(n, k)
        mesh = parallel.mesh(self.topology.devices)
        width = max(1, solver.BLOCK // rows)
        width += -width % mesh.size
        block = shape((rows, min(width, columns + -columns % mesh.size)))
        program = Program(
            solver._gram_function(mesh), (shape((rows, rows)), block), mesh
        )
        task = self._gradients[0]
        kernels = len(task.pairs) if task.per_timestep else 1
        queries = sum(_query_counts(self.config).values())
        methods = len(self.kernel_methods)
        return Stage(
            "attribute",
            f"the Gram matrix {rows} x {rows} of {block.shape[1]} columns; on the host "
            f"its eigenvectors, {4 * 8 * rows**2 / 2**30:.1f} GiB",
            [(program, methods * kernels * -(-columns // width))],
            devices=mesh.size,
            together=False,
            written=FLOAT * methods * n * queries,
            stored=FLOAT * methods * n * queries,
        )

    def retrain(self) -> Stage:
        config, settings = self.member_config, self.config.ensemble
        width = len(self.topology.local)
        mesh = parallel.mesh(self.topology.local, width)
        step, _ = ensemble._compile(
            models.init_fn(self.model),
            models.train_apply_fn(self.model),
            self.schedule,
            config,
            self.config.data.flip,
            mesh,
        )
        b = config.batch_size
        arrays = shape((b, *self.image)), shape((b,), np.int32), shape((b,))
        state = self._state(config)
        own = (state, *arrays, shape((), np.uint32))
        members = settings.subsets * settings.seeds
        final = members * size(training_loop.trained(state))
        saves = (config.steps - 1) // config.save_every
        return Stage(
            "retrain",
            f"a model of {members} on a device, {b} images",
            [(Program(step, stacked(own, width), mesh), self.groups * config.steps)],
            devices=width,
            together=False,
            written=members * saves * size(state) + final,
            stored=final,
        )

    def measure(self) -> Stage:
        settings, width = self.config.ensemble, len(self.topology.local)
        mesh = parallel.mesh(self.topology.local, width)
        losses = outputs._losses(models.apply_fn(self.model), self.schedule, mesh)
        queries = sum(_query_counts(self.config).values())
        b = min(settings.batch_size, queries)
        arguments = (
            stacked(self.params, width),
            shape((b, *self.image)),
            shape((b, 2), np.uint32),
            shape((), np.int32),
            shape((), np.int32),
            shape((), np.uint32),
        )
        grid = outputs.timestep_grid(settings.timesteps, self.schedule)
        pairs = len(grid) * settings.draws
        members = settings.subsets * settings.seeds
        calls = self.groups * pairs * -(-queries // b)
        return Stage(
            "measure",
            f"{b} noised queries, a model on a device",
            [(Program(losses, arguments, mesh), calls)],
            devices=width,
            together=False,
            written=8 * members * queries,
            stored=8 * members * queries,
        )
