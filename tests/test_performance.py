"""What the stages compile, compute and hold, by JAX's and XLA's own account.

No timers: these are the regressions that a noisy machine can find.
"""

import collections
import contextlib
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax import diffusion, parallel, training
from dtrak_jax.attribution import solver
from dtrak_jax.config import TrainConfig
from dtrak_jax.features import gradients
from dtrak_jax.planning.costs import Program, cost
from dtrak_jax.training import Member

SCHEDULE = dtrak.linear_schedule()
SLOTS, WIDTH = 16, 32


def init(key):
    """A network of three convolutions, most of whose work is in the middle one."""
    shapes = [(3, 3, 1, WIDTH), (3, 3, WIDTH, WIDTH), (3, 3, WIDTH, 1)]
    keys = jax.random.split(key, 3)
    return [0.1 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def apply(params, x, t, cond):
    for kernel in params:
        x = jnp.tanh(
            jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
    return x


def train_apply(params, x, t, cond, key):
    return apply(params, x, t, cond)


PARAMS = jax.eval_shape(init, jax.random.key(0))
P = sum(leaf.size for leaf in PARAMS)


@contextlib.contextmanager
def compilations():
    """Counts what XLA compiles, by name."""
    found = collections.Counter()

    class Count(logging.Handler):
        def emit(self, record):
            said = record.getMessage()
            if match := re.match(r"Finished XLA compilation of jit\((.*?)\) ", said):
                found[match[1]] += 1

    logger, handler = logging.getLogger("jax"), Count()
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(handler)


def random_images(n):
    return np.random.default_rng(n).uniform(-1, 1, (n, 8, 8, 1)).astype(np.float32)


def test_featurize_compiles_once_for_any_number_of_images():
    """One gradient and one projection, whatever n and however batches are cut."""
    params = init(jax.random.key(0))
    task = dtrak.Task(apply, SCHEDULE, measurement=("square", "loss"), timesteps=3)
    projection = dtrak.Projection("sketch", 64)
    with compilations() as found:
        for n in (1, 7, 30):
            dtrak.featurize(task, params, random_images(n), projection, batch_size=2)
    assert found == {"per_device": 2}


def test_training_compiles_its_step_once(tmp_path):
    """Over epochs with a short last batch, and over checkpoints."""
    config = TrainConfig(steps=7, batch_size=8, save_every=3, log_every=2)
    with compilations() as found:
        training.train(init, train_apply, SCHEDULE, random_images(20), config, tmp_path)
    assert found["step"] == 1
    with compilations() as found:
        members = [Member(str(i), np.arange(5 + i), i) for i in range(9)]
        training.train_members(
            init, train_apply, SCHEDULE, random_images(20), members, config, tmp_path
        )
    # Nine members on eight devices: one mesh of eight, and one of one.
    assert found["step"] == 2


def test_sampling_compiles_its_step_once():
    params = init(jax.random.key(0))
    shape = (8, 8, 1)
    with compilations() as found:
        for n in (16, 30):
            seeds = np.arange(n)
            diffusion.sample(
                apply, params, SCHEDULE, seeds, shape, steps=4, batch_size=2
            )
    assert found["step"] == 1


def test_attribution_compiles_one_product_for_all_kernels_and_dampings():
    rng = np.random.default_rng(0)
    train, query = rng.normal(size=(5, 20, 32)), rng.normal(size=(5, 3, 32))
    with compilations() as found:
        dtrak.damping_path(train.astype(np.float32), query.astype(np.float32))
    assert found == {"add_block": 1}


def one_device_mesh():
    return parallel.mesh(jax.local_devices()[:1])


def compiled_step(slots, copies, measurement="square"):
    """The compiled gradient step of `featurize` on one device."""
    task = dtrak.Task(
        apply,
        SCHEDULE,
        measurement=measurement,
        timesteps=max(copies, 1),
        per_timestep=copies == 1,
    )
    given = gradients.Slots(
        x=jax.ShapeDtypeStruct((slots, 1, 8, 8, 1), np.float32),
        words=jax.ShapeDtypeStruct((slots, 2), np.uint32),
        position=jax.ShapeDtypeStruct((slots,), np.int32),
        pair=jax.ShapeDtypeStruct((slots, copies), np.int32),
        weight=jax.ShapeDtypeStruct((slots, copies), np.float32),
        cond=None,
    )
    step = gradients.gradient_function(task, one_device_mesh())
    return step.lower(PARAMS, {}, given).compile()


@pytest.fixture(scope="module")
def plain():
    """The compiled mean gradient over as many images: what training pays."""
    x = jax.ShapeDtypeStruct((SLOTS, 8, 8, 1), np.float32)

    def mean_square(params, x):
        return jnp.mean(apply(params, x, None, None) ** 2)

    return jax.jit(jax.grad(mean_square)).lower(PARAMS, x).compile()


def flops(compiled):
    return compiled.cost_analysis()["flops"]


def scratch(compiled):
    """Bytes of everything but arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_step_computes_what_a_plain_gradient_does(plain):
    """Own gradients of all images, or averaged ones: the same arithmetic."""
    assert flops(compiled_step(SLOTS, 1)) < 1.15 * flops(plain)
    assert flops(compiled_step(1, SLOTS)) < 1.15 * flops(plain)


def test_three_measurements_share_a_forward_pass(plain):
    """One forward and three backward passes, of twice a forward each: 7 of 9 parts."""
    three = compiled_step(SLOTS, 1, ("square", "loss", "l1"))
    assert flops(three) < 7 / 3 * 1.1 * flops(plain)


def test_memory_of_the_step(plain):
    """About a plain gradient's; every image's own gradient is there once, the result.

    And what the patches of one layer's inputs take, while they are made.
    """
    own = 4 * SLOTS * P
    patches = 4 * SLOTS * 8 * 8 * 9 * WIDTH
    assert scratch(compiled_step(1, SLOTS)) < 1.1 * scratch(plain) + own / 2
    assert (
        scratch(compiled_step(SLOTS, 1)) < 1.1 * scratch(plain) + own / 2 + 3 * patches
    )


def projection_program(kind, p, k, n=8, measurements=("square",)):
    mesh = one_device_mesh()
    project = gradients.projection_function(dtrak.Projection(kind, k), mesh)
    part = jax.ShapeDtypeStruct((n, p // 4), np.float32)
    return Program(project, ({name: [part] * 4 for name in measurements},), mesh)


def compiled_projection(*of):
    program = projection_program(*of)
    return program.function.lower(*program.arguments).compile()


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_a_dense_projection_is_drawn_once_for_all_measurements(kind):
    """Another measurement takes its products more: 2 n operations an entry, and no draw."""
    p, k, n = 100_000, 512, 3
    one, two = (
        cost(projection_program(kind, p, k, n, names)).flops
        for names in (("square",), ("square", "loss"))
    )
    assert 2 * n * p * k < two - one < 1.2 * 2 * n * p * k


def test_memory_of_the_sketch():
    """The signs, and a few rows; not the gradients once more."""
    n, p, k = 8, 200_000, 2048
    assert scratch(compiled_projection("sketch", p, k, n)) < 4 * (2 * p + 10 * n * k)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_memory_of_dense_projections(kind):
    """Tiles, not p x k entries: here 800 tiles' worth."""
    n, p, k = 8, 200_000, 16_384
    tile = 4 * 2**22
    assert scratch(compiled_projection(kind, p, k, n)) < 4 * n * (p + 10 * k) + 6 * tile


def test_memory_of_the_gram_matrix():
    """Its size and its blocks', whatever the number of features."""
    n, width = 256, 4096
    gram = jax.ShapeDtypeStruct((n, n), np.float32)
    block = jax.ShapeDtypeStruct((n, width), np.float32)
    add_block = solver._gram_function(one_device_mesh())
    compiled = add_block.lower(gram, block).compile()
    assert scratch(compiled) < 4 * (2 * n * n + 2 * n * width)
