"""What the stages compile, compute and hold, by JAX's and XLA's own account.

There are no timers: these are the regressions that a noisy machine can find.
"""

import collections
import contextlib
import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import dtrak_jax as dtrak
from dtrak_jax import diffusion, models, parallel, training
from dtrak_jax.config import TrainConfig
from dtrak_jax.features import step_programs
from dtrak_jax.features.gradients import projection_function
from dtrak_jax.features.projection import TILE_ENTRIES
from dtrak_jax.models import lora
from dtrak_jax.models.conditional_unet import ConditionalConfig, UNet2DCondition
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.stable_diffusion import stable_diffusion_1
from dtrak_jax.training import Member

SCHEDULE = dtrak.linear_schedule()
IMAGES, WIDTH = 16, 32


def init(key):
    """A network of three convolutions, most of whose work is in the middle one."""
    shapes = [(3, 3, 1, WIDTH), (3, 3, WIDTH, WIDTH), (3, 3, WIDTH, 1)]
    keys = jax.random.split(key, 3)
    return [0.1 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def apply(params, x, t, cond):
    for weight in params:
        x = jnp.tanh(
            jax.lax.conv_general_dilated(
                x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
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
    counts = collections.Counter()

    class Count(logging.Handler):
        def emit(self, record):
            message = record.getMessage()
            if match := re.match(r"Finished XLA compilation of jit\((.*?)\) ", message):
                counts[match[1]] += 1

    logger, handler = logging.getLogger("jax"), Count()
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield counts
    finally:
        logger.removeHandler(handler)


def random_images(n):
    return np.random.default_rng(n).uniform(-1, 1, (n, 8, 8, 1)).astype(np.float32)


def test_featurize_compiles_once_for_any_number_of_images():
    """One program for gradients and one for features, however batches are cut; one more
    adds up the parts of averages. A profile shows them by these names."""
    params = init(jax.random.key(0))
    task = dtrak.Task(apply, SCHEDULE, measurement=("square", "loss"), timesteps=3)
    averaged = dataclasses.replace(task, per_timestep=False)
    projection = dtrak.Projection("sketch", 64)
    for kind, names in [
        (task, {"gradients": 1, "project": 1}),
        (averaged, {"gradients": 1, "project": 1, "add_gradients": 1}),
    ]:
        with compilations() as counts:
            for n in (1, 7, 30):
                images = random_images(n)
                dtrak.featurize(kind, params, images, projection, batch_size=2)
        assert counts == names


def step_compilations(counts):
    """The number of programs called a step, such as "train_step"."""
    return sum(count for name, count in counts.items() if name.endswith("step"))


def test_training_compiles_its_step_once(tmp_path):
    """Over epochs with a short last batch, and over checkpoints."""
    config = TrainConfig(steps=7, batch_size=8, save_every=3, log_every=2)
    recipe = training.Recipe(init, train_apply, SCHEDULE, config)
    with compilations() as counts:
        training.train(recipe, random_images(20), tmp_path)
    assert step_compilations(counts) == 1
    with compilations() as counts:
        members = [Member(str(i), np.arange(5 + i), i) for i in range(9)]
        training.train_members(recipe, random_images(20), members, tmp_path)
    # Nine members on eight devices: one mesh of eight, and one of one.
    assert step_compilations(counts) == 2


def test_sampling_compiles_its_step_once():
    params = init(jax.random.key(0))
    shape, sampler = (8, 8, 1), diffusion.Sampler(SCHEDULE, steps=4)
    with compilations() as counts:
        for n in (16, 30):
            seeds = np.arange(n)
            diffusion.sample(apply, params, sampler, seeds, shape, batch_size=2)
    assert step_compilations(counts) == 1


def test_attribution_compiles_nothing_for_another_damping():
    """Nor for more pairs: all kernels share their programs."""
    rng = np.random.default_rng(0)
    train, query = rng.normal(size=(5, 20, 32)), rng.normal(size=(5, 3, 32))
    train, query = train.astype(np.float32), query.astype(np.float32)
    dtrak.attribute(train[:1], query[:1], damping=0.1)
    with compilations() as counts:
        dtrak.attribute(train, query, damping=0.3)
    assert not counts


def one_device_mesh():
    return parallel.mesh(jax.local_devices()[:1])


def step_flops(per_timestep, measurement="square"):
    """XLA's count for the step of `featurize` on one device that makes 16 gradients of
    an image, or one of 16 noised images."""
    task = dtrak.Task(
        apply,
        SCHEDULE,
        measurement=measurement,
        timesteps=IMAGES,
        per_timestep=per_timestep,
    )
    images = jax.ShapeDtypeStruct((IMAGES, 8, 8, 1), np.float32)
    projection, mesh = dtrak.Projection(), one_device_mesh()
    programs = step_programs(task, PARAMS, images, projection, mesh, IMAGES)
    function, arguments, _ = programs.gradients
    return function.lower(*arguments).compile().cost_analysis()["flops"]


@pytest.fixture(scope="module")
def plain_flops():
    """XLA's count for the mean gradient over as many images: what training pays."""
    x = jax.ShapeDtypeStruct((IMAGES, 8, 8, 1), np.float32)

    def mean_square(params, x):
        return jnp.mean(apply(params, x, None, None) ** 2)

    compiled = jax.jit(jax.grad(mean_square)).lower(PARAMS, x).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("per_timestep", [True, False])
def test_the_step_computes_what_a_plain_gradient_does(plain_flops, per_timestep):
    """Gradients of all images, or one of their average: the same arithmetic."""
    assert step_flops(per_timestep) < 1.2 * plain_flops


def test_three_measurements_share_a_forward_pass(plain_flops):
    """One forward and three backward passes, of twice a forward each: 7 of 9 parts."""
    three = step_flops(True, ("square", "loss", "l1"))
    assert three < 7 / 3 * 1.15 * plain_flops


def adapted_unet(unet, rank):
    """The network and the shapes of its adapters and of its base."""
    base, settings = parameter_shapes(unet), lora.LoRAConfig(rank=rank)
    key = jax.eval_shape(jax.random.key, 0)
    adapters = jax.eval_shape(lambda key: lora.init(settings, base, key), key)
    scales = lora.scales_of(settings, base)
    return lora.apply_fn(models.apply_fn(unet), scales), adapters, base


def adapter_flops(unet, network, batch, timesteps=1, per_timestep=True):
    """XLA's count for the step of `featurize` on one device, before optimization."""
    apply, adapters, base = network
    task = dtrak.Task(
        apply,
        SCHEDULE,
        measurement="square",
        timesteps=timesteps,
        per_timestep=per_timestep,
    )
    images, _, cond = inputs_of(unet, 1)
    programs = step_programs(
        task,
        adapters,
        images,
        dtrak.Projection(),
        one_device_mesh(),
        batch,
        frozen=base,
        cond=cond,
    )
    function, arguments, _ = programs.gradients
    return function.lower(*arguments).cost_analysis()["flops"]


def inputs_of(unet, n):
    """The shapes of x, t and text embeddings."""
    shape, size = jax.ShapeDtypeStruct, unet.config.sample_size
    x = shape((n, size, size, unet.config.in_channels), np.float32)
    cond = shape((n, 77, unet.config.cross_attention_dim), np.float32)
    return x, shape((n,), np.int32), cond


def test_gradients_of_adapters_cost_one_pass_to_them():
    """Of every image, or of an average: what a batch's mean gradient takes, which is less
    than with the base's."""
    unet = UNet2DCondition(
        ConditionalConfig(
            sample_size=16,
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=32,
            norm_num_groups=8,
        )
    )
    network = apply, *params = adapted_unet(unet, 16)

    def mean_square(adapters, base, x, t, cond):
        return jnp.mean(apply((adapters, base), x, t, cond) ** 2)

    def plain(argnums):
        gradient = jax.jit(jax.grad(mean_square, argnums))
        lowered = gradient.lower(*params, *inputs_of(unet, 4))
        return lowered.cost_analysis()["flops"]

    one_pass = plain(0)
    assert adapter_flops(unet, network, 4) < 1.1 * one_pass
    assert adapter_flops(unet, network, 4, 4, False) < 1.1 * one_pass
    assert plain((0, 1)) > 1.2 * one_pass


def test_gradients_of_stable_diffusions_adapters_cost_390_gflop():
    """Rank 128 on Stable Diffusion 1 at 32x32 latents, one image and timestep: less than
    PyTorch counts for one pass, where the forward one is 190."""
    unet = stable_diffusion_1().unet
    unet = UNet2DCondition(dataclasses.replace(unet.config, sample_size=32))
    flops = adapter_flops(unet, adapted_unet(unet, 128), 1)
    assert 350e9 < flops < 390e9


def equations(jaxpr):
    """Yields every operation of a jaxpr, and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def projection_equations(kind, p, k, n=8, measurements=("square",)):
    """The operations of a projection of gradients in four parts."""
    project = projection_function(dtrak.Projection(kind, k), one_device_mesh())
    parts = [jax.ShapeDtypeStruct((n, p // 4), np.float32)] * 4
    gradients = {name: parts for name in measurements}
    return list(equations(jax.make_jaxpr(project)(gradients).jaxpr))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_a_dense_projection_is_drawn_once_for_all_measurements(kind):
    def draws(measurements):
        operations = projection_equations(kind, 100_000, 512, 3, measurements)
        return sum(e.primitive.name == "threefry2x32" for e in operations)

    assert draws(("square", "loss", "l1")) == draws(("square",)) > 0


@pytest.mark.parametrize("kind", ["sketch", "rademacher", "gaussian"])
def test_no_projection_has_an_array_as_large_as_its_matrix(kind):
    """The largest is a gradient's size, twice over, or a tile: here a 200th of p k."""
    n, p, k = 8, 200_000, 8192
    sizes = [
        variable.aval.size
        for equation in projection_equations(kind, p, k, n)
        for variable in equation.outvars
    ]
    assert max(sizes) <= max(1.1 * n * p, 1.1 * TILE_ENTRIES) < p * k / 200
