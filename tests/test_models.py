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
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.tensors import to_params, to_tensors
from dtrak_jax.models.unet import model_config

GOLDENS = sorted(Path(__file__).with_name("goldens").glob("unet_*.npz"))
LARGE = [path for path in GOLDENS if path.stem in ("unet_celeba", "unet_cifar")]
SMALL = [path for path in GOLDENS if path not in LARGE]
TINY = ModelConfig(
    sample_size=8,
    in_channels=1,
    out_channels=2,
    block_out_channels=(4, 8),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
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


def objective(path, folder):
    """(golden file, its tensors, model, parameters, params -> (loss, output))."""
    golden, tensors = write_golden(path, folder)
    model, params = models.from_diffusers(folder)
    x, weights = (
        jnp.asarray(golden[name].transpose(0, 2, 3, 1), jnp.float32)
        for name in ("x", "weights")
    )
    t, classes = jnp.asarray(golden["t"], jnp.int32), golden.get("classes")

    def loss(params):
        output = models.apply_fn(model)(params, x, t, classes)
        return (weights * output).mean(), output

    return golden, tensors, model, params, loss


def check_output(output, golden):
    """Asserts that outputs are those of diffusers."""
    output, expected = np.transpose(output, (0, 3, 1, 2)), golden["output"]
    assert output.shape == expected.shape
    np.testing.assert_allclose(
        output, expected, rtol=0, atol=5e-6 * abs(expected).max()
    )


def largest_gradients(golden, tensors):
    """The largest gradient of each layer: that of to_k.bias is zero but for rounding."""
    largest = dict.fromkeys(map(layer, tensors), 0)
    for name in tensors:
        size = abs(golden[f"grad/{name}"]).max()
        largest[layer(name)] = max(size, largest[layer(name)])
    return largest


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_equals_diffusers(path, tmp_path):
    golden, tensors, _, params, loss = objective(path, tmp_path)
    (_, output), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    check_output(output, golden)
    grads, largest = to_tensors(grads), largest_gradients(golden, tensors)
    assert grads.keys() == tensors.keys()
    for name, grad in grads.items():
        error = abs(grad - golden[f"grad/{name}"]).max() / largest[layer(name)]
        assert error < 4e-5, (name, error)


@pytest.mark.parametrize("name", ["unet_attention_everywhere", "unet_one_level"])
def test_bfloat16_errs_as_that_of_diffusers(name, tmp_path):
    (path,) = (path for path in GOLDENS if path.stem == name)
    golden, _ = write_golden(path, tmp_path)
    model, params = models.from_diffusers(tmp_path, dtype=jnp.bfloat16)
    x = jnp.asarray(golden["x"].transpose(0, 2, 3, 1), jnp.float32)
    t = jnp.asarray(golden["t"], jnp.int32)
    output = np.asarray(jax.jit(models.apply_fn(model))(params, x, t, None))
    expected = golden["output"].transpose(0, 2, 3, 1)
    error = np.sqrt(np.mean((output - expected) ** 2) / np.mean(expected**2))
    theirs = float(np.load(path.with_name("bfloat16.npz"))[name])
    assert 0.5 * theirs < error < 1.3 * theirs


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_large_models_equal_diffusers(path, tmp_path):
    """Their derivatives along three directions, in which every layer counts as much."""
    golden, tensors, model, params, loss = objective(path, tmp_path)
    largest = largest_gradients(golden, tensors)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(model)
    derivative = jax.jit(
        lambda params, along: jax.jvp(loss, (params,), (along,), has_aux=True)
    )
    for _ in range(3):
        along = {
            name: rng.normal(size=tensor.shape) / largest[layer(name)]
            for name, tensor in tensors.items()
        }
        along = {name: tensor / tensor.size**0.5 for name, tensor in along.items()}
        expected = [(along[name] * golden[f"grad/{name}"]).sum() for name in tensors]
        _, found, output = derivative(params, to_params(shapes, along, "along"))
        assert abs(found - sum(expected)) < 4e-5 * np.linalg.norm(expected)
        check_output(output, golden)


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
    """The paper's CIFAR model, with and without its change to config.json."""
    model = models.build(ModelConfig(resnet_time_scale_shift=conditioning))
    shapes = jax.eval_shape(functools.partial(models.init, model), jax.random.key(0))
    assert models.parameter_count(shapes) == count


def test_init_is_uniform_in_the_fan_in(unet):
    model, params, _, _ = unet
    same, other = (models.init(model, jax.random.key(seed)) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert not np.array_equal(*(p["conv_in"]["kernel"] for p in (params, other)))
    params = flatten_dict(jax.device_get(params))
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


def test_dropout_only_in_training(unet):
    model, params, x, t = unet
    train = jax.jit(models.train_apply_fn(model))
    plain = jax.jit(models.apply_fn(model))(params, x, t, None)
    without = models.build(dataclasses.replace(TINY, dropout=0.0))
    programs = (
        jax.jit(models.apply_fn(network)).lower(params, x, t, None).as_text()
        for network in (model, without)
    )
    assert len(set(programs)) == 1
    first, second, again = (
        train(params, x, t, None, jax.random.split(jax.random.key(seed), len(x)))
        for seed in (0, 1, 0)
    )
    assert not np.allclose(first, plain) and not np.allclose(first, second)
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
        train(params, x, t, jnp.zeros(16), jax.random.split(jax.random.key(0), len(x)))
    for wrong_x, wrong_t in ((x[0], t), (x, t[:2]), (x[:, :7], t), (x[..., [0, 0]], t)):
        with pytest.raises(ValueError, match=r"x has shape .*\[B, H, W, 1\].* 2\."):
            apply(params, wrong_x, wrong_t, None)
    with pytest.warns(UserWarning, match="x has 6x8 pixels, .* was made for 8x8"):
        apply(params, x[:, :6], t, None)


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
    """The documentation of UNet2DModel states these."""
    config = model_config({"sample_size": 64}, {})
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
        ("class_embed_type", "projection", "None, 'timestep', 'identity'"),
        ("num_class_embeds", 0, "an integer >= 1"),
        ("out_channels", 5, "model.in_channels is 3"),
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

    def refused(error, match):
        with pytest.raises(error, match=match):
            models.from_diffusers(tmp_path)
        with pytest.raises(error, match=match):
            models.resolve(ModelConfig(folder=str(tmp_path)))

    content = weights.read_bytes()
    size = f"{len(content):,}"
    weights.write_bytes(content[:-1])
    refused(ValueError, f"{convert.WEIGHTS} is damaged: .* by its header {size}")
    for content in (b"", b"\x09" + 7 * b"\0" + b"{", b"\xff" * 9, b"\x01" + 9 * b"\0"):
        weights.write_bytes(content)
        refused(ValueError, f"{convert.WEIGHTS} is damaged")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    refused(ValueError, f"{convert.WEIGHTS} is a pointer of Git LFS.* lfs pull")
    config = tmp_path / "config.json"
    kept = config.rename(tmp_path / "kept.json")
    config.write_bytes(weights.read_bytes())
    refused(ValueError, "config.json is a pointer of Git LFS.* lfs pull")
    kept.rename(config)
    for dtype, match in (
        ("I16", "type of x is 'I16'; .* 'F16', 'BF16'"),
        ("F32", "has not the size"),
    ):
        header = b'{"x":{"dtype":"%s","shape":[1],"data_offsets":[0,2]}}'
        header %= dtype.encode()
        weights.write_bytes(len(header).to_bytes(8, "little") + header + b"12")
        with pytest.raises(ValueError, match=match):
            models.from_diffusers(tmp_path)
    weights.unlink()
    refused(FileNotFoundError, f"has no {convert.WEIGHTS}, which is to hold")
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"anything")
    refused(
        ValueError, "diffusion_pytorch_model.bin alone.*pickle.*refs/pr/9` of lambda"
    )
    with pytest.raises(FileNotFoundError, match="has no config.json, nor has a folder"):
        models.from_diffusers(tmp_path / "absent")


def test_reads_shards_and_variants(small_golden, tmp_path):
    _, tensors = write_golden(small_golden, tmp_path)
    model, params = models.from_diffusers(tmp_path)
    weights = tmp_path / convert.WEIGHTS
    variant = weights.rename(weights.with_suffix(".fp16.safetensors"))
    assert models.resolve(ModelConfig(folder=str(tmp_path))) == model.config
    variant.unlink()
    shards = {f"{i}.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for name, members in shards.items():
        tensors_of_shard = {member: tensors[member] for member in members}
        safetensors.numpy.save_file(tensors_of_shard, tmp_path / name)
    index = {member: name for name, members in shards.items() for member in members}
    path = tmp_path / f"{convert.WEIGHTS}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    found = models.from_diffusers(tmp_path)
    assert found[0] == model
    jax.tree.map(np.testing.assert_array_equal, found[1], params)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no 1.safetensors, which .*index"):
        models.from_diffusers(tmp_path)


def test_reads_halves(small_golden, tmp_path):
    """Tensors of 16 bits are the numbers that they were rounded to."""
    _, tensors = write_golden(small_golden, tmp_path)
    for dtype in (jnp.bfloat16, np.float16, np.float64):
        halves = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        write_golden(small_golden, tmp_path, tensors=halves)
        _, params = models.from_diffusers(tmp_path)
        for name, leaf in to_tensors(params).items():
            assert leaf.dtype == np.float32
            np.testing.assert_array_equal(leaf, halves[name].astype(np.float32))


def test_a_given_folder_decides_the_model(small_golden, tmp_path, monkeypatch):
    folder = tmp_path / "pipeline" / "unet"
    folder.mkdir(parents=True)
    write_golden(small_golden, folder)
    model, params = models.from_diffusers(folder)
    assert models.from_diffusers(folder.parent)[0] == model
    monkeypatch.setattr(convert, "read_weights", None)  # No weight is read.
    monkeypatch.chdir(tmp_path)
    for path in (folder, folder.parent, "pipeline"):
        config = ModelConfig(folder=str(path))
        assert models.resolve(config) == model.config
        with pytest.raises(ValueError, match="model.folder is '.*pipeline.*resolve"):
            models.build(config)
    assert models.resolve(TINY) is TINY
    with pytest.raises(
        ValueError, match="model.dropout is 0.5, but .* leave it at 0.1"
    ):
        ModelConfig(folder="pipeline", dropout=0.5)
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config.json, nor"):
        models.resolve(ModelConfig(folder="nowhere"))
    models.to_diffusers(model, params, tmp_path / "new")
    assert models.resolve(ModelConfig(folder=str(tmp_path / "new"))) == model.config


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
