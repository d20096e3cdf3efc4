"""The featurize stage with writing, against the price of training on the same images.

That price is one plain batched gradient: of the mean of f over a batch of noised
images, which are given, spread over the same devices. The stage forms every image's own gradient of them, draws the
noise, projects, and writes a store.
"""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import dtrak_jax as dtrak
from dtrak_jax import parallel
from dtrak_jax.features import measurements
from dtrak_jax.parallel import P
from tests.benchmarks.rows import Row, in_turn
from tests.benchmarks.workload import Workload, digits, noised, task

BATCH, PLAIN_BATCH = 32, 64
"""Noised images at once on each device: the fastest of 16, 32 and 64 for each side."""


def measure(small: bool, repetitions: int) -> list[Row]:
    """Averaged, kept apart, and three measurements in one pass; T = 10, k = 2,048."""
    work = digits(small, 8 if small else 256)
    timesteps, k = (2, 128) if small else (10, 2048)
    batches = {"batch": BATCH, "their batch": PLAIN_BATCH}
    settings = work.settings(timesteps=timesteps, dim=k, **batches)
    items = len(work.images) * timesteps
    rows = []

    def stage(measurement="square", apart=True, kind="sketch"):
        one = task(
            work, measurement=measurement, timesteps=timesteps, per_timestep=apart
        )

        def run():
            with tempfile.TemporaryDirectory() as folder:
                dtrak.featurize(
                    one,
                    work.params,
                    work.images,
                    dtrak.Projection(kind, k),
                    store=folder,
                    batch_size=BATCH,
                )

        return run

    agreement = {"mean gradient": mean_error(work, timesteps)}
    one = task(work, timesteps=timesteps)
    x_t, t = noised(work, one)
    plain = batched_gradient(work, x_t, t)
    cases = [
        ("averaged", False, "sketch", 1.15),
        ("kept apart", True, "sketch", 1.5),
        ("kept apart", True, "factorized", 0.75),
    ]
    for kept, apart, kind, goal in cases:
        rows.append(
            Row(
                name=f"stage {kept}, {kind}",
                ours="featurize into a new store",
                theirs="one plain batched gradient over the same noised images",
                goal=("at most", goal),
                settings=settings,
                agreement=agreement,
                items=items,
                unit="noised images/s",
                **in_turn(stage("square", apart, kind), plain, repetitions),
            )
        )
    three = ("square", "loss", "l1")
    for kept, apart, kind, _ in cases:
        rows.append(
            Row(
                name=f"three measurements {kept}, {kind}",
                ours=f"the stage with {', '.join(three)}",
                theirs="the stage with square",
                goal=("at most", 2),
                settings=settings,
                agreement={},
                items=items,
                unit="noised images/s",
                **in_turn(
                    stage(three, apart, kind), stage("square", apart, kind), repetitions
                ),
            )
        )
    return rows


def batched_gradient(work: Workload, x_t: np.ndarray, t: np.ndarray):
    """A function that returns the mean gradient over x_t [T, n, ...], in batches."""
    x = x_t.reshape(-1, *x_t.shape[2:])
    every = np.repeat(t, x_t.shape[1])

    mesh = parallel.mesh(jax.local_devices())
    params = parallel.put(work.params, mesh)

    def per_device(params, x, t):
        def mean_square(params):
            prediction = work.apply(params, x, t, None)
            values = jax.vmap(
                lambda y, s: measurements.square(y, None, s, work.schedule)
            )(prediction, t)
            return values.mean()

        return jax.lax.pmean(jax.grad(mean_square)(params), "data")

    gradient = parallel.sharded(per_device, mesh, (P(), P("data"), P("data")), P())

    size = min(PLAIN_BATCH * mesh.size, len(x))
    starts = range(0, len(x) - len(x) % size, size)
    assert len(x) % size == 0, "a smaller last batch would compile once more"

    def run():
        total = None
        for start in starts:
            rows = slice(start, start + size)
            part = gradient(params, x[rows], every[rows])
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return jax.block_until_ready(
            jax.tree.map(lambda leaf: leaf / len(starts), total)
        )

    return run


def mean_error(work: Workload, timesteps: int) -> float:
    """|g - g'| / |g| of the mean of the examples' gradients and the batched one."""
    few = work._replace(images=work.images[:PLAIN_BATCH])
    one = task(few, timesteps=timesteps)
    exact = dtrak.featurize(one, few.params, few.images, dtrak.Projection("none"))
    mean = np.asarray(exact).mean(axis=(0, 1))
    leaves = jax.tree.leaves(batched_gradient(few, *noised(few, one))())
    plain = np.concatenate([np.ravel(leaf) for leaf in leaves])
    error = float(np.linalg.norm(mean - plain) / np.linalg.norm(plain))
    assert error < 1e-3, f"the mean of the gradients is off by {error:.1e}"
    return error
