"""The UNet equals diffusers', and its checkpoints go both ways."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from configs import celeba, cifar2
from dtrak_jax import models
from dtrak_jax.config import ModelConfig
from dtrak_jax.models import convert

GOLDENS = sorted(Path(__file__).with_name("goldens").glob("unet_*.npz"))
TINY = ModelConfig(
    sample_size=8,
    in_channels=1,
    out_channels=2,
    block_out_channels=(4, 8),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=2,
    dropout=0.5,
)


def write_golden(path, folder, config=None, tensors=None):
    """Makes a diffusers folder of a golden file, with changes."""
    golden = dict(np.load(path))
    config = json.loads(str(golden["config"])) | (config or {})
    names = (name for name in golden if name.startswith("param/"))
    own = {name.removeprefix("param/"): golden[name] for name in names}
    own = {k: v for k, v in (own | (tensors or {})).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(own, folder / convert.WEIGHTS)
    return golden, own


def by_name(params):
    """Parameters by diffusers' names and axes."""
    return {
        convert.tensor_name(path): np.transpose(leaf, convert.AXES[leaf.ndim])
        for path, leaf in flatten_dict(params).items()
    }


@pytest.fixture(scope="module")
def tiny():
    model = models.build(TINY)
    x = jax.random.uniform(jax.random.key(1), (8, 8, 8, 1), minval=-1, maxval=1)
    return model, models.init(model, jax.random.key(0)), x, jnp.arange(8) * 100


@pytest.fixture(scope="module")
def small_golden():
    return next(path for path in GOLDENS if path.stem == "unet_one_level")


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_equals_diffusers(path, tmp_path):
    golden, own = write_golden(path, tmp_path)
    model, params = models.from_diffusers(tmp_path)
    x, weights = (
        jnp.asarray(golden[name].transpose(0, 2, 3, 1), jnp.float32)
        for name in ("x", "weights")
    )

    # Code of lower quality, compiled in half the time.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params):
        t = jnp.asarray(golden["t"], jnp.int32)
        output = models.apply_fn(model)(params, x, t, None)
        return (weights * output).mean(), output

    (_, output), grads = run(params)
    output, expected = np.transpose(output, (0, 3, 1, 2)), golden["output"]
    assert output.shape == expected.shape
    np.testing.assert_allclose(output, expected, rtol=0, atol=5e-6 * abs(expected).max())

    grads = by_name(grads)
    assert grads.keys() == own.keys()
    largest = {}
    for name in grads:
        layer = name.rpartition(".")[0]
        size = abs(golden[f"grad/{name}"]).max()
        largest[layer] = max(size, largest.get(layer, 0))
    for name, grad in grads.items():
        # Relative to the layer, since the gradient of to_k.bias is zero but for rounding.
        error = abs(grad - golden[f"grad/{name}"]).max() / largest[name.rpartition(".")[0]]
        assert error < 4e-5, (name, error)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_round_trip(path, tmp_path):
    _, own = write_golden(path, tmp_path)
    model, params = models.from_diffusers(tmp_path)
    models.to_diffusers(model, params, tmp_path / "new" / "unet")
    written = safetensors.numpy.load_file(tmp_path / "new" / "unet" / convert.WEIGHTS)
    assert written.keys() == own.keys()
    for name, tensor in written.items():
        expected = own[name].astype(np.float32)
        assert tensor.shape == expected.shape and tensor.dtype == np.float32, name
        assert tensor.tobytes() == expected.tobytes(), name
    again, same = models.from_diffusers(tmp_path / "new" / "unet")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_parameter_counts():
    for config, count in ((cifar2, 38_307_203), (celeba, 118_795_011)):
        model = models.build(config.get_config().model)
        shapes = jax.eval_shape(functools.partial(models.init, model), jax.random.key(0))
        assert models.parameter_count(shapes) == count
    plain = dataclasses.replace(model.config, resnet_time_scale_shift="default")
    shapes = jax.eval_shape(
        functools.partial(models.init, models.build(plain)), jax.random.key(0)
    )
    assert models.parameter_count(shapes) == 113_673_219


def test_init_is_uniform_in_the_fan_in(tiny):
    _, params, _, _ = tiny
    params = flatten_dict(params)
    unit = []
    for path, value in params.items():
        kernel = params.get((*path[:-1], "kernel"))
        if kernel is None:
            assert (value == (path[-1] == "scale")).all(), path
        else:
            bound = 1 / math.sqrt(np.prod(kernel.shape[:-1]))
            assert abs(value).max() <= bound, path
            unit.append(np.ravel(value) / bound)
    biases = np.concatenate(
        [u for u, path in zip(unit, (p for p in params if (*p[:-1], "kernel") in params))
         if path[-1] == "bias"]
    )
    for values in (np.concatenate(unit), biases):
        # A uniform variable on [-1, 1] has mean 0 and variance 1/3.
        assert abs(values.mean()) < 4 / math.sqrt(3 * values.size)
        assert abs(values.var() - 1 / 3) < 4 * math.sqrt(4 / 45 / values.size)


def test_init_depends_on_the_key_alone(tiny):
    model, params, _, _ = tiny
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    stacked = jax.vmap(functools.partial(models.init, model))(keys)
    for leaf, both in zip(jax.tree.leaves(params), jax.tree.leaves(stacked)):
        np.testing.assert_array_equal(leaf, both[0])
    assert not jnp.array_equal(*stacked["conv_in"]["kernel"])


def test_gradients_of_single_examples(tiny):
    """vmap(grad), alone and sharded over devices, equals a loop of grad."""
    model, params, x, t = tiny
    apply = models.apply_fn(model)

    def loss(params, x, t):
        return jnp.mean(apply(params, x[None], t[None], None) ** 2)

    grad = jax.grad(loss)
    many = jax.vmap(grad, (None, 0, 0))
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    sharded = jax.shard_map(
        many,
        mesh=mesh,
        in_specs=(jax.P(), jax.P("data"), jax.P("data")),
        out_specs=jax.P("data"),
        check_vma=False,
    )
    one = jax.jit(grad)
    loop = [one(params, x[i], t[i]) for i in range(len(x))]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *loop)
    for found in (jax.jit(many)(params, x, t), jax.jit(sharded)(params, x, t)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            found,
            expected,
        )


def test_dropout_only_in_training(tiny):
    model, params, x, t = tiny
    apply = models.apply_fn(model)
    train = jax.jit(models.train_apply_fn(model))
    plain = jax.jit(apply)(params, x, t, None)
    none = models.build(dataclasses.replace(TINY, dropout=0.0))
    np.testing.assert_array_equal(plain, jax.jit(models.apply_fn(none))(params, x, t, None))
    first = train(params, x, t, None, jax.random.key(0))
    second = train(params, x, t, None, jax.random.key(1))
    assert not jnp.allclose(first, plain) and not jnp.allclose(first, second)
    np.testing.assert_array_equal(first, train(params, x, t, None, jax.random.key(0)))
