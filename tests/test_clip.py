"""CLIP's networks and preprocessing equal those of transformers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from PIL import Image

from dtrak_jax import models
from dtrak_jax.models import clip, clip_folder
from dtrak_jax.models.clip_folder import from_transformers
from dtrak_jax.models.clip_images import CLIPImages
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.tensors import to_tensors

FOLDER = Path(__file__).with_name("goldens")
NETWORKS = ("clip_text", "clip_text_projection", "clip_vision", "clip_whole")


def write_golden(name, folder, config=None, tensors=None, prefix=""):
    """Makes a folder of transformers of a golden file, with changes."""
    golden = dict(np.load(FOLDER / f"{name}.npz"))
    shapes = json.loads(str(golden["shapes"]))
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])
    for kind in ("params", "grads"):
        parts = np.split(golden[kind], ends[:-1])
        golden[kind] = {
            name: part.reshape(shape)
            for (name, shape), part in zip(shapes.items(), parts)
        }
    settings = json.loads(str(golden["config"])) | (config or {})
    own = {
        k: v for k, v in (golden["params"] | (tensors or {})).items() if v is not None
    }
    own = {prefix + name: np.ascontiguousarray(value) for name, value in own.items()}
    (folder / "config.json").write_text(json.dumps(settings))
    safetensors.numpy.save_file(own, folder / "model.safetensors")
    return golden


def load(golden, folder, dtype=np.float32):
    """({"text": module, "vision": module}, their parameters), of what the golden has."""
    networks = {
        "text": ("ids", clip.CLIPText),
        "vision": ("pixels", clip.CLIPVision),
    }
    loaded = {
        part: from_transformers(folder, network, dtype)
        for part, (name, network) in networks.items()
        if name in golden
    }
    return tuple({part: pair[i] for part, pair in loaded.items()} for i in (0, 1))


def outputs(golden, modules, params):
    """The outputs by the golden's names."""
    named = {}
    if "text" in modules:
        ids = jnp.asarray(golden["ids"])
        output = modules["text"].apply({"params": params["text"]}, ids)
        named |= {f"state{i}": state for i, state in enumerate(output.states)}
        named |= {key: getattr(output, key) for key in ("last", "pooled", "embeds")}
    if "vision" in modules:
        pixels = jnp.asarray(golden["pixels"].transpose(0, 2, 3, 1), jnp.float32)
        apply = modules["vision"].apply
        named["image_embeds"] = apply({"params": params["vision"]}, pixels)
    return {name: x for name, x in named.items() if f"output/{name}" in golden}


def by_name(grads):
    """Gradients by PyTorch's names, where a text network is below `text_model`."""
    named = {}
    for part, tree in grads.items():
        for name, grad in to_tensors(tree, clip_folder.clip_tensor_name).items():
            alone = "_projection" in name
            named[name if alone else f"{part}_model.{name}"] = grad
    return named


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_transformers(name, tmp_path):
    golden = write_golden(name, tmp_path)
    modules, params = load(golden, tmp_path)

    def loss(params):
        named = outputs(golden, modules, params)
        return sum((golden[f"weights/{k}"] * x).mean() for k, x in named.items()), named

    (_, named), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert {f"output/{k}" for k in named} == {k for k in golden if k[:7] == "output/"}
    for key, output in named.items():
        expected = golden[f"output/{key}"]
        assert output.dtype == np.float32 and output.shape == expected.shape
        atol = 2e-6 * abs(expected).max()
        np.testing.assert_allclose(output, expected, rtol=0, atol=atol, err_msg=key)

    expected = {
        f"text_model.{key}" if key.split(".")[0] in OWN else key: grad
        for key, grad in golden["grads"].items()
        if key != "logit_scale"
    }
    grads = by_name(grads)
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        # The gradient of k_proj.bias is zero but for rounding, that of weight is not.
        layer = key.rpartition(".")[0]
        size = max(abs(g).max() for k, g in expected.items() if k.startswith(layer))
        error = abs(grad - expected[key]).max() / size
        assert error < 1e-5, (key, error)


OWN = ("embeddings", "encoder", "final_layer_norm")
"""What text networks of transformers 5 begin with, and older ones do below `text_model`."""


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_old_names(tmp_path):
    """Text networks were below `text_model`, and saved the numbers of positions."""
    write_golden("clip_text", tmp_path)
    model, params = from_transformers(tmp_path, clip.CLIPText)
    positions = {"embeddings.position_ids": np.arange(9)[None]}
    write_golden("clip_text", tmp_path, tensors=positions, prefix="text_model.")
    again, same = from_transformers(tmp_path, clip.CLIPText)
    assert again == model
    equal(same, params)
    _, halves = from_transformers(tmp_path, clip.CLIPText, None)
    assert halves["final_layer_norm"]["scale"].dtype == np.float16


def test_penultimate_state_and_old_ends(tmp_path):
    """Stable Diffusion 2 takes that state by a network without the last layer. Up to
    transformers 4.31 the end of a text was the token of the highest number."""
    golden = write_golden("clip_text", tmp_path)
    dropped = dict.fromkeys(name for name in golden["params"] if "layers.1" in name)
    change = {"num_hidden_layers": 1, "eos_token_id": 2}
    write_golden("clip_text", tmp_path, change, dropped)
    model, params = from_transformers(tmp_path, clip.CLIPText)
    output = jax.jit(model.apply)({"params": params}, golden["ids"])
    assert len(output.states) == 2
    state = golden["output/state1"]
    np.testing.assert_allclose(output.states[1], state, rtol=0, atol=1e-5)
    centred = state - state.mean(axis=-1, keepdims=True)
    norm = jax.device_get(params["final_layer_norm"])
    expected = centred / np.sqrt(state.var(axis=-1, keepdims=True) + 1e-5)
    expected = expected * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(output.last, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(output.pooled, output.last[jnp.arange(3), [3, 6, 2]])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_computes_in_the_type_of_the_parameters(dtype, tmp_path):
    golden = write_golden("clip_whole", tmp_path)
    modules, params = load(golden, tmp_path, dtype)
    lowered = jax.jit(lambda params: outputs(golden, modules, params)).lower(params)
    lines = [x for x in lowered.as_text().splitlines() if "dot_general" in x]
    assert len(lines) == 2 * 8 + 2
    assert not any("f32" in line.partition("->")[0] for line in lines)
    for key, output in lowered.compile()(params).items():
        assert output.dtype == np.float32
        expected = golden[f"output/{key}"]
        error = abs(output - expected).max() / abs(expected).max()
        assert error < 16 * jnp.finfo(dtype).eps


def test_real_sizes():
    """The text network of Stable Diffusion 1 and CLIP ViT-B/32's vision network."""
    config = clip.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12
    )
    for module, count, tensors, name in (
        (clip.CLIPText(config), 123_060_480, 196, "final_layer_norm.weight"),
        (
            clip.CLIPVision(clip.CLIPVisionConfig()),
            87_849_216,
            200,
            "embeddings.class_embedding",
        ),
    ):
        shapes = parameter_shapes(module)
        assert models.parameter_count(shapes) == count
        names = {clip_folder.clip_tensor_name(path) for path in flatten_dict(shapes)}
        assert len(names) == tensors
        assert {name, "encoder.layers.11.self_attn.out_proj.bias"} < names


def test_init_draws_embeddings():
    config = clip.CLIPTextConfig(
        vocab_size=64, hidden_size=8, num_attention_heads=1, num_hidden_layers=0
    )
    params = models.init(clip.CLIPText(config), jax.random.key(0))
    table = params["embeddings"]["token_embedding"]["embedding"]
    # A uniform variable on [-1, 1] has variance 1/3.
    assert abs(table.var() - 1 / 3) < 4 * (4 / 45 / table.size) ** 0.5


def test_config_of_old_whole_models():
    """They hold what all networks have, and each part twice."""
    base = {"top_k": 50, "torch_dtype": None, "_name_or_path": "", "id2label": {}}
    text = base | {"model_type": "clip_text_model", "hidden_size": 9, "eos_token_id": 2}
    settings = {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": text | {"projection_dim": 5},
        "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
        "vision_config": base | {"patch_size": 16},
        "vision_config_dict": None,
    }
    expected = clip.CLIPTextConfig(
        hidden_size=768, num_attention_heads=12, projection_dim=768
    )
    tensors = {"text_projection.weight"}
    assert clip_folder.text_config(settings, tensors) == expected
    expected = clip.CLIPVisionConfig(patch_size=16, projection_dim=768)
    assert clip_folder.vision_config(settings) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "t5"}, ("model_type is 't5'", "'clip_text_model', 'clip'")),
        ({"hidden_act": "gelu_new"}, ("hidden_act is 'gelu_new'", "'quick_gelu'")),
        ({"rope_theta": 1.0}, ("rope_theta is 1.0", "unknown")),
        ({"num_attention_heads": 3}, ("num_attention_heads is 3", "hidden_size, 8")),
        ({"vocab_size": 0}, ("vocab_size is 0", ">= 1")),
        ({"layer_norm_eps": 0}, ("layer_norm_eps is 0",)),
        ({"max_position_embeddings": 8}, ("position_embedding.weight", "(8, 8)")),
        ({"num_hidden_layers": 1}, ("encoder.layers.1.", "no place")),
    ],
)
def test_refuses_other_configs(change, words, tmp_path):
    write_golden("clip_text", tmp_path, change)
    with pytest.raises(ValueError) as error:
        from_transformers(tmp_path, clip.CLIPText)
    for word in words:
        assert word in str(error.value)


def test_refuses_other_parts_and_shapes(tmp_path):
    golden = write_golden("clip_vision", tmp_path)
    with pytest.raises(ValueError, match="model_type is 'clip_vision_model'"):
        from_transformers(tmp_path, clip.CLIPText)
    model, params = from_transformers(tmp_path, clip.CLIPVision)
    with pytest.raises(ValueError, match=r"\(2, 1, 7, 7\).*\[B, 7, 7, 1\]"):
        model.apply({"params": params}, golden["pixels"])
    text = clip.CLIPText(clip.CLIPTextConfig(max_position_embeddings=5))
    with pytest.raises(ValueError, match=r"\(1, 6\).*at most 5"):
        text.apply({}, jnp.zeros((1, 6), jnp.int32))
    name = "visual_projection.weight"
    write_golden("clip_vision", tmp_path, tensors={name: None})
    with pytest.raises(ValueError, match=f"no tensor {name}"):
        from_transformers(tmp_path, clip.CLIPVision)
    write_golden("clip_text", tmp_path, tensors={name: np.zeros((6, 8))})
    with pytest.raises(ValueError, match=f"tensor {name} .*no place"):
        from_transformers(tmp_path, clip.CLIPText)
    with pytest.raises(ValueError, match="patch_size is 33.* image_size, 32"):
        clip.CLIPVisionConfig(image_size=32, patch_size=33)


IMAGES = FOLDER / "clip_images.npz"


def test_preprocessing_equals_transformers(tmp_path):
    golden = dict(np.load(IMAGES))
    settings = json.loads(str(golden["config"]))
    old = settings | {"size": 15, "crop_size": 14, "device": None}
    old["feature_extractor_type"] = "CLIPFeatureExtractor"
    del old["rescale_factor"], old["image_processor_type"]
    whole = {"image_processor": settings, "processor_class": "CLIPProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    preprocess = [CLIPImages.from_folder(tmp_path)]
    for written in (settings, old):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
        preprocess.append(CLIPImages.from_folder(tmp_path))
    assert len(set(preprocess)) == 1
    for name in ("wide", "tall", "clear", "grey"):
        pixels = preprocess[0](Image.fromarray(golden[f"picture/{name}"]))
        assert pixels.dtype == np.float32
        expected = golden[f"pixels/{name}"].transpose(1, 2, 0)
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resample": 2}, ("resample is 2", "3")),
        ({"do_center_crop": False}, ("do_center_crop is False", "True")),
        ({"image_processor_type": "ViTImageProcessor"}, ("'CLIPImageProcessor'",)),
        ({"size": {"height": 15, "width": 15}}, ("size is {'height'",)),
        ({"crop_size": {"height": 14, "width": 15}}, ("crop_size is {'height'",)),
        ({"size": 13}, ("size is 13", ">= 14")),
        ({"antialias": True}, ("antialias is True", "unknown")),
    ],
)
def test_preprocessing_refuses_other_steps(change, words, tmp_path):
    settings = json.loads(str(np.load(IMAGES)["config"])) | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError) as error:
        CLIPImages.from_folder(tmp_path)
    for word in words:
        assert word in str(error.value)
