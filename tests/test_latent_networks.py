"""The networks of Stable Diffusion's latents equal diffusers'."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from goldens.seeded import along_directions, parameters, values

import dtrak_jax as dtrak
from dtrak_jax import models, parallel
from dtrak_jax.digests import named_leaves
from dtrak_jax.features.factorized import channel_sketches
from dtrak_jax.features.gradients import network_inputs
from dtrak_jax.models import AutoencoderKL, UNet2DCondition, convert
from dtrak_jax.models.autoencoder import AutoencoderConfig, autoencoder_config
from dtrak_jax.models.conditional_unet import ConditionalConfig, conditional_config
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.tensors import tensor_axes, tensor_name, to_params, to_tensors

FOLDER = Path(__file__).with_name("goldens")
CLASSES = {
    "UNet2DConditionModel": (UNet2DCondition, conditional_config),
    "AutoencoderKL": (AutoencoderKL, autoencoder_config),
}
UNETS = ("sd1", "sd2", "unusual")
AUTOENCODERS = ("vae", "plain_vae")
TIMESTEPS = (0, 1, 417, 999)
TINY = ConditionalConfig(
    sample_size=4,
    block_out_channels=(4, 8),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=2,
    cross_attention_dim=3,
    norm_num_groups=2,
    dropout=0.5,
)
TINY_VAE = AutoencoderConfig(block_out_channels=(4,), norm_num_groups=2)


def tensor_shapes(shapes):
    """{PyTorch's name of a tensor: its shape there} of a module's parameters."""
    return {
        tensor_name(path): tuple(leaf.shape[i] for i in tensor_axes(path, leaf.ndim))
        for path, leaf in flatten_dict(shapes).items()
    }


def model_of(settings):
    network, config_of = CLASSES[settings["_class_name"]]
    return network(config_of(settings))


def image(seed, name, shape):
    """Values in the order of PyTorch, as images of JAX."""
    return jnp.asarray(values(seed, name, shape).transpose(0, 2, 3, 1))


def unet(model, seed):
    """(params, inputs) -> {name: output}, and the inputs."""
    config, batch = model.config, len(TIMESTEPS)
    x = image(seed, "x", (batch, config.in_channels, 4, 8))
    context = values(seed, "context", (batch, 7, config.cross_attention_dim))
    apply = models.apply_fn(model)
    return (
        lambda params, inputs: {"output": apply(params, *inputs)},
        (x, np.asarray(TIMESTEPS, np.int32), context),
    )


def autoencoder(model, seed):
    """The same of an autoencoder."""
    config = model.config
    x = image(seed, "x", (2, config.in_channels, 8, 16))
    z = image(seed, "z", (2, config.latent_channels, 4, 8))

    def outputs(params, inputs):
        variables, (x, z) = {"params": params}, inputs
        mean, log_variance = model.apply(variables, x, method="encode")
        decoded = model.apply(variables, z, method="decode")
        return {"mean": mean, "log_variance": log_variance, "decoded": decoded}

    return outputs, (x, z)


@pytest.mark.parametrize("name", UNETS + AUTOENCODERS)
def test_equals_diffusers(name):
    """Also with examples spread over devices, as in training."""
    golden = np.load(FOLDER / f"latent_{name}.npz")
    model, seed = model_of(json.loads(str(golden["config"]))), int(golden["seed"])
    shapes = parameter_shapes(model)
    tensors = parameters(seed, tensor_shapes(shapes))
    params = to_params(shapes, tensors, name)
    outputs_of, inputs = (unet if name in UNETS else autoencoder)(model, seed)
    if name == "sd1":
        mesh = parallel.mesh(jax.devices()[:2])
        params = parallel.put(params, mesh)
        inputs = parallel.put(inputs, mesh, parallel.P("data"))

    def loss(params, inputs):
        outputs = outputs_of(params, inputs)
        means = []
        for key, value in outputs.items():
            batch, height, width, channels = value.shape
            shape = (batch, channels, height, width)
            means.append((image(seed, f"weights of {key}", shape) * value).mean())
        return sum(means), outputs

    grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(params, inputs)
    for key, value in outputs.items():
        expected = golden[key].transpose(0, 2, 3, 1)
        assert value.shape == expected.shape and value.dtype == np.float32
        np.testing.assert_allclose(
            value, expected, rtol=0, atol=2e-6 * abs(expected).max(), err_msg=key
        )
    if name == "vae":
        assert (outputs["log_variance"] == -30).any()
    sums, expected = along_directions(seed, to_tensors(grads)), golden["grads"]
    assert sums.shape == expected.shape
    # That of to_k.bias is zero but for rounding, so a layer is the unit.
    layers = [key.rpartition(".")[0] for key in sorted(tensors)]
    norms = dict.fromkeys(layers, 0)
    for layer, (norm, *_) in zip(layers, expected):
        norms[layer] = max(norm, norms[layer])
    rounding = 1e-8 * np.linalg.norm(expected[:, 0])
    for key, layer, error in zip(sorted(tensors), layers, abs(sums - expected)):
        assert error.max() < 3e-5 * norms[layer] + rounding, key


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_bfloat16_errs_as_that_of_diffusers(name):
    golden = np.load(FOLDER / f"latent_{name}.npz")
    model, seed = model_of(json.loads(str(golden["config"]))), int(golden["seed"])
    shapes = parameter_shapes(model)
    params = to_params(shapes, parameters(seed, tensor_shapes(shapes)), name)
    outputs_of, inputs = unet(model, seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    output = np.asarray(jax.jit(outputs_of)(params, inputs)["output"])
    expected = golden["output"].transpose(0, 2, 3, 1)
    error = np.sqrt(np.mean((output - expected) ** 2) / np.mean(expected**2))
    theirs = float(np.load(FOLDER / "bfloat16.npz")[f"latent_{name}"])
    assert 0.5 * theirs < error < 1.3 * theirs


@pytest.mark.parametrize(
    ("name", "class_name", "count", "tensors"),
    [
        ("sd1", "UNet2DConditionModel", 859_520_964, 686),
        ("sd2", "UNet2DConditionModel", 865_910_724, 686),
        ("vae", "AutoencoderKL", 83_653_863, 248),
    ],
)
def test_real_sizes(name, class_name, count, tensors):
    """Every tensor of Stable Diffusion, by its name and shape in PyTorch."""
    config, expected = json.loads(str(np.load(FOLDER / "latent_names.npz")[name]))
    shapes = parameter_shapes(model_of({"_class_name": class_name, **config}))
    assert models.parameter_count(shapes) == count and len(expected) == tensors
    assert tensor_shapes(shapes) == {
        key: tuple(shape) for key, shape in expected.items()
    }


@pytest.fixture(scope="module")
def tiny():
    """(model, parameters, (x, t, context)) of a conditional UNet."""
    model = UNet2DCondition(TINY)
    x = jnp.asarray(values(0, "x", (2, 4, 4, 4)))
    inputs = x, jnp.array([3, 800]), jnp.asarray(values(0, "context", (2, 5, 3)))
    return model, models.init(model, jax.random.key(0)), inputs


@pytest.fixture(scope="module")
def tiny_vae():
    """(model, parameters) of an autoencoder."""
    model = AutoencoderKL(TINY_VAE)
    shapes = parameter_shapes(model)
    tensors = parameters(0, tensor_shapes(shapes))
    return model, jax.tree.map(jnp.asarray, to_params(shapes, tensors, "seed"))


def test_folders(tiny, tiny_vae, tmp_path):
    """A pipeline's folder has both; types are kept or changed as asked."""
    networks = {"unet": tiny, "vae": tiny_vae}
    for part, (model, params, *_) in networks.items():
        halves = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
        models.to_diffusers(model, halves, tmp_path / part)
        for dtype in (np.float32, None):
            found, same = models.from_diffusers(tmp_path, type(model), dtype)
            assert found == model
            pairs = zip(*map(jax.tree.leaves, (same, halves)), strict=True)
            for leaf, half in pairs:
                assert leaf.dtype == (dtype or np.float16)
                np.testing.assert_array_equal(leaf, half.astype(leaf.dtype))
    with pytest.raises(
        ValueError, match="_class_name is 'UNet2DConditionModel'.*UNet2DM"
    ):
        models.resolve(models.ModelConfig(folder=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="nor has a folder `vae` in it"):
        models.from_diffusers(tmp_path / "unet" / "x", AutoencoderKL)


def test_old_autoencoders(tiny_vae, tmp_path):
    """Attention under its old names, and with weights of 1x1 convolutions."""
    model, params = tiny_vae
    models.to_diffusers(model, params, tmp_path)
    path = tmp_path / convert.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for conv in (False, True):
        renamed = {}
        for name, tensor in tensors.items():
            for after, before in old.items():
                if f".{after}." in name and tensor.ndim == 2 and conv:
                    tensor = tensor[:, :, None, None]
                name = name.replace(f".{after}.", f".{before}.")
            renamed[name] = tensor
        assert "encoder.mid_block.attentions.0.proj_attn.weight" in renamed
        safetensors.numpy.save_file(renamed, path)
        found, same = models.from_diffusers(tmp_path, AutoencoderKL)
        assert found == model
        jax.tree.map(np.testing.assert_array_equal, same, params)


def programs(jaxpr):
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from programs(inner)


def test_halves_compute_in_halves(tiny, tiny_vae):
    """Every convolution and matrix product does; outputs are float32."""
    (unet_model, unet_params, inputs), (vae, vae_params) = tiny, tiny_vae
    for apply, params, arguments in (
        (models.apply_fn(unet_model), unet_params, inputs),
        (
            lambda params, x: vae.apply({"params": params}, x),
            vae_params,
            (inputs[0][..., :3],),
        ),
    ):
        halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        jaxpr, output = jax.make_jaxpr(apply, return_shape=True)(halves, *arguments)
        assert output.dtype == np.float32
        products = [
            {operand.aval.dtype for operand in equation.invars}
            for equation in programs(jaxpr.jaxpr)
            if equation.primitive.name in ("dot_general", "conv_general_dilated")
        ]
        assert len(products) > 20
        assert all(types == {jnp.dtype(jnp.bfloat16)} for types in products)


def test_functions_of_the_conditional_unet(tiny):
    model, params, inputs = tiny
    keys = jax.random.split(jax.random.key(0), 2)
    text = [
        jax.jit(function).lower(params, *inputs, *more).as_text()
        for network in (model, UNet2DCondition(dataclasses.replace(TINY, dropout=0.0)))
        for function, more in (
            (models.apply_fn(network), ()),
            (models.train_apply_fn(network), (keys,)),
        )
    ]
    # Dropout is in the first model's training alone.
    assert text[0] == text[2] != text[1] and "shift_right_logical" not in text[3]
    bottleneck = models.bottleneck_fn(model)
    assert jax.eval_shape(bottleneck, params, *inputs).shape == (2, 8)
    assert "up_blocks" not in bottleneck.lower(params, *inputs).as_text(debug_info=True)


def test_every_weight_is_tagged(tiny):
    """For the projection "factorized"; `test_factorized` compares its numbers."""
    model, params, (x, _, context) = tiny
    task = dtrak.Task(models.apply_fn(model), dtrak.linear_schedule(), timesteps=2)
    inputs = network_inputs(np.asarray(x), np.asarray(context), 1)
    projection = dtrak.Projection("factorized", dim=8)
    found = channel_sketches(task, params, None, projection, inputs)
    paths = list(named_leaves(params))
    kernels = [i for i, path in enumerate(paths) if path.endswith("kernel")]
    assert sorted(found) == kernels


def test_refuses_wrong_shapes(tiny, tiny_vae):
    model, params, (x, t, context) = tiny
    apply = models.apply_fn(model)
    for wrong in (None, context[0], context[:1], context[..., :2]):
        with pytest.raises(ValueError, match=r"condition has shape .* \[2, S, 3\]"):
            apply(params, x, t, wrong)
    for wrong in (x[..., :3], x[:, :3]):
        with pytest.raises(
            ValueError, match=r"must be \[B, H, W, 4\] .*multiples of 2"
        ):
            apply(params, wrong, t, context)
    vae = AutoencoderKL(
        dataclasses.replace(
            TINY_VAE,
            block_out_channels=(4, 4),
            down_block_types=2 * ("DownEncoderBlock2D",),
            up_block_types=2 * ("UpDecoderBlock2D",),
        )
    )
    with pytest.raises(
        ValueError, match=r"\(2, 3, 4, 3\).*W, 3\], H and W multiples of 2"
    ):
        jax.eval_shape(vae.init, jax.random.key(0), x[:, :3, :, :3])
    vae, params = tiny_vae
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 3\).*\[B, H, W, 4\]"):
        vae.apply({"params": params}, x[..., :3], method="decode")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel'.*'UNet2DCondit"),
        (
            {"addition_embed_type": "text_time"},
            "addition_embed_type is 'text_time'.*None",
        ),
        ({"num_class_embeds": 7}, "num_class_embeds is 7"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
        ({"dual_cross_attention": True}, "dual_cross_attention is True"),
        ({"only_cross_attention": [True, False]}, "only_cross_attention is"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
        ({"time_embedding_dim": 7}, "time_embedding_dim is 7.*None, 1280"),
        (
            {"down_block_types": 4 * ["AttnDownBlock2D"]},
            "down_block_types is 'AttnDown",
        ),
        (
            {"cross_attention_dim": [4, 8, 8, 8]},
            r"cross_attention_dim is \[4, 8, 8, 8\]",
        ),
        (
            {"attention_head_dim": [5, 10]},
            r"attention_head_dim is \(5, 10\).* or 4, one",
        ),
        ({"attention_head_dim": 7}, "attention_head_dim has 7.*not divide 320"),
        (
            {"transformer_layers_per_block": [[1], 1, 1, 1]},
            "transformer_layers_per_bl.*int",
        ),
        ({"norm_num_groups": 48}, "norm_num_groups=48 does not divide"),
        ({"up_block_types": ["UpBlock2D"]}, r"have \[4, 4, 1\] entries"),
        ({"sample_size": [32, 64]}, r"sample_size is \[32, 64\]"),
        ({"flavour": 1}, "flavour is 1; this field is unknown"),
    ],
)
def test_refuses_other_unets(settings, message):
    with pytest.raises(ValueError, match=message):
        conditional_config(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "VQModel"}, "_class_name is 'VQModel'.*'AutoencoderKL'"),
        ({"shift_factor": 0.1}, "shift_factor is 0.1.*None"),
        ({"latents_mean": [0.0]}, "latents_mean is"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types is 'Attn"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"layers_per_block": 0}, "layers_per_block is 0"),
    ],
)
def test_refuses_other_autoencoders(settings, message):
    with pytest.raises(ValueError, match=message):
        autoencoder_config(settings)


def test_settings_of_real_folders():
    """What these files hold beside the defaults changes nothing."""
    config = conditional_config(
        {
            "_class_name": "UNet2DConditionModel",
            "_diffusers_version": "0.6.0",
            "act_fn": "silu",
            "cross_attention_dim": 4 * [768],
            "num_attention_heads": None,
            "sample_size": [32, 32],
            "upcast_attention": True,
        }
    )
    assert config == ConditionalConfig(cross_attention_dim=768, sample_size=32)
    config = autoencoder_config({"force_upcast": True, "scaling_factor": 0.5})
    assert config == AutoencoderConfig(scaling_factor=0.5)
