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


def layer(name):
    """The layer of a tensor: conv1 has conv1.weight and conv1.bias."""
    return name.rpartition(".")[0]


@pytest.fixture(scope="module")
def unet():
    model = models.build(TINY)
    x = jax.random.uniform(jax.random.key(1), (16, 8, 8, 1), minval=-1, maxval=1)
    return model, models.init(model, jax.random.key(0)), x, jnp.arange(16) * 60


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

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params):
        t = jnp.asarray(golden["t"], jnp.int32)
        output = models.apply_fn(model)(params, x, t, None)
        return (weights * output).mean(), output

    (_, output), grads = run(params)
    output, expected = np.transpose(output, (0, 3, 1, 2)), golden["output"]
    assert output.shape == expected.shape
    np.testing.assert_allclose(
        output, expected, rtol=0, atol=5e-6 * abs(expected).max()
    )

    grads = by_name(grads)
    assert grads.keys() == own.keys()
    # Relative to the layer: the gradient of to_k.bias is zero but for rounding.
    largest = dict.fromkeys(map(layer, own), 0)
    for name in own:
        size = abs(golden[f"grad/{name}"]).max()
        largest[layer(name)] = max(size, largest[layer(name)])
    for name, grad in grads.items():
        error = abs(grad - golden[f"grad/{name}"]).max() / largest[layer(name)]
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


@pytest.mark.parametrize(
    ("conditioning", "count"), [("scale_shift", 38_307_203), ("default", 35_746_307)]
)
def test_parameter_count(conditioning, count):
    """Of the paper's CIFAR model, with and without its change to config.json."""
    model = models.build(ModelConfig(resnet_time_scale_shift=conditioning))
    shapes = jax.eval_shape(functools.partial(models.init, model), jax.random.key(0))
    assert models.parameter_count(shapes) == count


def test_init_is_uniform_in_the_fan_in(unet):
    model, params, _, _ = unet
    same, other = (models.init(model, jax.random.key(seed)) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert not jnp.array_equal(*(p["conv_in"]["kernel"] for p in (params, other)))
    params = flatten_dict(params)
    unit = {"kernel": [], "bias": []}
    for path, value in params.items():
        kernel = params.get((*path[:-1], "kernel"))
        if kernel is None:
            assert (value == (path[-1] == "scale")).all(), path
        else:
            bound = 1 / math.sqrt(np.prod(kernel.shape[:-1]))
            assert abs(value).max() <= bound, path
            unit[path[-1]].append(np.ravel(value) / bound)
    for values in map(np.concatenate, unit.values()):
        # A uniform variable on [-1, 1] has mean 0 and variance 1/3.
        assert abs(values.mean()) < 4 / math.sqrt(3 * values.size)
        assert abs(values.var() - 1 / 3) < 4 * math.sqrt(4 / 45 / values.size)


def test_gradients_of_single_examples(unet):
    """vmap(grad), sharded over devices, equals a loop of grad on one."""
    model, params, x, t = unet
    apply = models.apply_fn(model)

    def loss(params, x, t):
        return jnp.mean(apply(params, x[None], t[None], None) ** 2)

    grad = jax.grad(loss)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    data = jax.P("data")
    many = jax.shard_map(
        jax.vmap(grad, (None, 0, 0)),
        mesh=mesh,
        in_specs=(jax.P(), data, data),
        out_specs=data,
        check_vma=False,
    )
    split = jax.device_put((x, t), jax.NamedSharding(mesh, data))
    found = jax.jit(many)(params, *split)
    one = jax.jit(grad)
    loop = [one(params, x[i], t[i]) for i in range(len(x))]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *loop)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        expected,
    )


def test_dropout_only_in_training(unet):
    model, params, x, t = unet
    train = jax.jit(models.train_apply_fn(model))
    plain = jax.jit(models.apply_fn(model))(params, x, t, None)
    without = models.build(dataclasses.replace(TINY, dropout=0.0))
    expected = jax.jit(models.apply_fn(without))(params, x, t, None)
    np.testing.assert_array_equal(plain, expected)
    first, second, again = (
        train(params, x, t, None, jax.random.key(seed)) for seed in (0, 1, 0)
    )
    assert not jnp.allclose(first, plain) and not jnp.allclose(first, second)
    np.testing.assert_array_equal(first, again)


def test_equal_models_share_their_functions():
    one, other = models.build(TINY), models.build(dataclasses.replace(TINY))
    assert models.apply_fn(one) is models.apply_fn(other)
    assert models.train_apply_fn(one) is models.train_apply_fn(other)
    different = models.build(dataclasses.replace(TINY, dropout=0.1))
    assert models.apply_fn(one) is not models.apply_fn(different)


def test_apply_refuses_wrong_input(unet):
    model, params, x, t = unet
    apply, train = models.apply_fn(model), models.train_apply_fn(model)
    with pytest.raises(ValueError, match="cond is given.*pass None"):
        apply(params, x, t, jnp.zeros(16))
    with pytest.raises(ValueError, match="cond is given.*pass None"):
        train(params, x, t, jnp.zeros(16), jax.random.key(0))
    for wrong_x, wrong_t in ((x[0], t), (x, t[:2]), (x[:, :7], t), (x[..., [0, 0]], t)):
        with pytest.raises(ValueError, match=r"x has shape .*\[B, H, W, 1\].* 2\."):
            apply(params, wrong_x, wrong_t, None)


def test_reads_old_spellings(small_golden, tmp_path):
    """diffusers <= 0.17 named the attention's layers and the blocks differently."""
    _, own = write_golden(small_golden, tmp_path)
    new = models.from_diffusers(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict.fromkeys(own)
    for name, tensor in own.items():
        for after, before in old.items():
            name = name.replace(f".{after}.", f".{before}.")
        renamed[name] = tensor
    assert "mid_block.attentions.0.proj_attn.bias" in renamed
    config = {
        "_diffusers_version": "0.2.4",
        "sample_size": [8, 8],
        "down_block_types": ["UNetResAttnDownBlock2D"],
        "act_fn": "swish",
        "decay": 0.9999,
    }
    write_golden(small_golden, tmp_path, config, renamed)
    found = models.from_diffusers(tmp_path)
    assert found[0] == new[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], new[1])


def test_middle_attention_with_and_without_norm(small_golden, tmp_path):
    """Under scale_shift it has a norm in diffusers 0.16, and since 0.17 only on
    request, which config.json of 0.16 cannot tell."""
    write_golden(small_golden, tmp_path)
    assert not models.from_diffusers(tmp_path)[0].config.mid_attention_norm
    norm = {
        f"mid_block.attentions.0.group_norm.{k}": np.ones(8) for k in ("weight", "bias")
    }
    for config in ({}, {"attn_norm_num_groups": 2}):
        write_golden(small_golden, tmp_path, config, norm)
        model, params = models.from_diffusers(tmp_path)
        assert model.config.mid_attention_norm
    models.to_diffusers(model, params, tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["attn_norm_num_groups"] == 2
    )
    with pytest.raises(ValueError, match="model.mid_attention_norm is False"):
        ModelConfig(mid_attention_norm=False, resnet_time_scale_shift="default")


def test_defaults_are_those_of_diffusers():
    """As the documentation of UNet2DModel states them."""
    config = convert.model_config({"sample_size": 64}, {})
    assert config == ModelConfig(
        sample_size=64,
        block_out_channels=(224, 448, 672, 896),
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
        attention_head_dim=8,
        resnet_time_scale_shift="default",
        flip_sin_to_cos=True,
        freq_shift=0,
        downsample_padding=1,
        norm_eps=1e-5,
        dropout=0.0,
    )


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("_class_name", "UNet2DConditionModel", "'UNet2DModel'"),
        ("class_embed_type", "timestep", "None"),
        ("num_class_embeds", 10, "None"),
        ("time_embedding_type", "fourier", "'positional'"),
        ("time_embedding_dim", 7, "None, 32"),
        ("attn_norm_num_groups", 4, "None, 2"),
        ("act_fn", "gelu", "'silu', 'swish'"),
        ("mid_block_type", None, "'UNetMidBlock2D'"),
        ("downsample_type", "resnet", "'conv'"),
        ("upsample_type", "resnet", "'conv'"),
        ("down_block_types", ["SkipDownBlock2D"], "'DownBlock2D', 'AttnDownBlock2D'"),
        ("up_block_types", ["SkipUpBlock2D"], "'UpBlock2D', 'AttnUpBlock2D'"),
        ("resnet_time_scale_shift", "spatial", "'scale_shift', 'default'"),
        ("sample_size", None, "an integer >= 1"),
        ("sample_size", [8, 16], "an integer >= 1"),
        ("encoder_hid_dim", 3, "this field is unknown"),
    ],
)
def test_refuses_other_configs(small_golden, tmp_path, field, value, allowed):
    write_golden(small_golden, tmp_path, {field: value})
    shown = value[0] if field.endswith("block_types") else value
    with pytest.raises(ValueError) as error:
        models.from_diffusers(tmp_path)
    for part in (field, repr(shown), allowed):
        assert part in str(error.value)


def test_refuses_other_tensors(small_golden, tmp_path):
    name = "conv_in.weight"
    for tensors, words in (
        ({name: None}, (name, "no tensor", "(8, 3, 3, 3)")),
        ({name: np.zeros((8, 3, 1, 1))}, (name, "(8, 3, 1, 1)", "(8, 3, 3, 3)")),
        ({"extra.bias": np.zeros(5)}, ("extra.bias", "(5,)", "no place")),
    ):
        write_golden(small_golden, tmp_path, tensors=tensors)
        with pytest.raises(ValueError) as error:
            models.from_diffusers(tmp_path)
        for word in words:
            assert word in str(error.value)


def test_refuses_missing_and_damaged_files(small_golden, tmp_path):
    write_golden(small_golden, tmp_path)
    weights = tmp_path / convert.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{convert.WEIGHTS} is damaged"):
        models.from_diffusers(tmp_path)
    header = b'{"x":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    weights.write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    with pytest.raises(ValueError, match="BF16.*must be float32 or float16"):
        models.from_diffusers(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {convert.WEIGHTS}; it must"):
        models.from_diffusers(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no config.json and no diffusion"):
        models.from_diffusers(tmp_path / "absent")


def test_config_refuses_what_diffusers_cannot_compute():
    widths = {
        "block_out_channels": (6, 8),
        "norm_num_groups": 2,
        "attention_head_dim": 4,
    }
    dataclasses.replace(TINY, **widths)
    down = ("AttnDownBlock2D", "DownBlock2D")
    with pytest.raises(ValueError, match="attention_head_dim=4 does not divide"):
        dataclasses.replace(TINY, **widths, down_block_types=down)
    with pytest.raises(ValueError, match="freq_shift=1 it must begin with 4 or more"):
        dataclasses.replace(TINY, block_out_channels=(2, 8))
