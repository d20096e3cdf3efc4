"""A folder that diffusers wrote loads in one call, and computes what diffusers does."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dtrak_jax import diffusion, parallel
from dtrak_jax.config import BaseConfig, Config
from dtrak_jax.diffusion import sampling, scaled_linear_schedule
from dtrak_jax.evaluation.counterfactual import latents
from dtrak_jax.models import apply_fn
from dtrak_jax.models.clip_folder import clip_tensor_name
from dtrak_jax.models.stable_diffusion import (
    from_stable_diffusion,
    resolve_stable_diffusion,
    to_stable_diffusion,
)
from dtrak_jax.models.tensors import tensor_name, to_tensors
from dtrak_jax.models.tokenizer import Tokenizer
from dtrak_jax.run import Run

GOLDEN = Path(__file__).with_name("goldens") / "stable_diffusion.npz"
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture
def folder(golden, tmp_path):
    for name, content in golden.items():
        if name.startswith("file/"):
            path = tmp_path / name.removeprefix("file/")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content.tobytes())
    return tmp_path


def change(path, **fields):
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def nhwc(x):
    return jnp.asarray(np.transpose(x, (0, 2, 3, 1)), jnp.float32)


def test_equals_diffusers(golden, folder):
    parts, params = from_stable_diffusion(folder)
    assert parts.schedule == scaled_linear_schedule()
    assert parts.scheduler["steps_offset"] == 1
    prompts = json.loads(str(golden["prompts"]))
    ids = parts.tokenizer(prompts)
    np.testing.assert_array_equal(ids, golden["ids"])
    assert [parts.tokenizer.cut(prompt) != "" for prompt in prompts] == [True, True]

    @jax.jit
    def compute(params, latents, t, ids, picture):
        context = parts.text.apply({"params": params["text"]}, ids).last
        vae = {"params": params["vae"]}
        scaled = latents / parts.vae.config.scaling_factor
        return {
            "context": context,
            "prediction": parts.unet.apply(
                {"params": params["unet"]}, latents, t, context
            ),
            "image": parts.vae.apply(vae, scaled, method="decode"),
            "mean": parts.vae.apply(vae, picture, method="encode")[0],
        }

    latents, picture = nhwc(golden["latents"]), nhwc(golden["picture"])
    computed = compute(
        params, latents, jnp.asarray(golden["t"], jnp.int32), ids, picture
    )
    for name, value in computed.items():
        expected = golden[name]
        expected = nhwc(expected) if expected.ndim == 4 else expected
        atol = 5e-6 * abs(expected).max()
        np.testing.assert_allclose(value, expected, rtol=0, atol=atol, err_msg=name)


def test_guided_sampling_equals_diffusers(golden, folder, one_device):
    """Two steps of DDIM from the same noise, with guidance and negative prompts."""
    parts, params = from_stable_diffusion(folder)
    context, negative = (
        parts.text.apply({"params": params["text"]}, parts.tokenizer(texts)).last
        for texts in (json.loads(str(golden[name])) for name in ("prompts", "negative"))
    )
    sampler = diffusion.Sampler(
        parts.schedule,
        steps=2,
        clip=False,
        offset=parts.scheduler["steps_offset"],
        to_one=parts.scheduler["set_alpha_to_one"],
    )
    apply = diffusion.guided(apply_fn(parts.unet), 3.0)
    step = sampling.step_function(apply, sampler, parallel.mesh(jax.local_devices()))
    x, cond = nhwc(golden["latents"]), (context, negative)
    timesteps = diffusion.sampling_timesteps(
        sampler.schedule, sampler.steps, sampler.offset
    )
    assert timesteps.tolist() == [501, 1]
    for t, s in zip(timesteps, [1, -1], strict=True):
        x, _ = step(params["unet"], x, np.zeros(2, np.uint32), cond, t, s)
    expected = nhwc(golden["sample"])
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_counterfactuals_compare_modes_without_the_scaling_factor(golden, folder):
    run = Run(Config(base=BaseConfig(folder=str(folder), batch_size=1)), None)
    computed = latents(run, np.asarray(nhwc(golden["picture"])))
    expected = nhwc(golden["mean"]).reshape(computed.shape)
    atol = 5e-6 * abs(expected).max()
    np.testing.assert_allclose(computed, expected, rtol=0, atol=atol)


def test_parameters_are_those_of_the_files(folder):
    _, params = from_stable_diffusion(folder, None)
    for part, name in WEIGHTS.items():
        expected = safetensors.numpy.load_file(folder / part / name)
        name_of = clip_tensor_name if part == "text_encoder" else tensor_name
        computed = to_tensors(params[part.removesuffix("_encoder")], name_of)
        assert computed.keys() == expected.keys()
        for key, tensor in computed.items():
            assert tensor.dtype == np.float16
            np.testing.assert_array_equal(tensor, expected[key])


def test_other_parts_are_ignored(folder):
    """Real folders have them, some as pickles."""
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    before = resolve_stable_diffusion(folder)
    change(folder / "model_index.json", safety_checker=checker)
    assert resolve_stable_diffusion(folder)[:3] == before[:3]


def test_pictures_may_have_another_size(folder):
    """The UNet's own, or that of the config; without either there is none."""

    def shape(resolution):
        base = BaseConfig(folder=str(folder), resolution=resolution)
        return Run(Config(base=base), None).space.image_shape

    change(folder / "unet" / "config.json", sample_size=6)
    side = shape(0)[0]
    assert shape(0) == (side, side, 3) and shape(2 * side) == (2 * side, 2 * side, 3)
    with pytest.raises(ValueError, match=f"base.resolution is {side + 1}; it must be"):
        shape(side + 1)
    change(folder / "unet" / "config.json", sample_size=None)
    assert shape(side) == (side, side, 3)
    with pytest.raises(ValueError, match="0 where the UNet of .* has a sample_size"):
        shape(0)


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline"},
            ("'StableDiffusionXLPipeline'", "'StableDiffusionPipeline'"),
        ),
        (
            "model_index.json",
            {"transformer": ["d", "Flux"]},
            ("transformer", "unknown"),
        ),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            ("text_encoder is 'T5EncoderModel'", "'CLIPTextModel'"),
        ),
        (
            "unet/config.json",
            {"cross_attention_dim": 9},
            ("cross_attention_dim is 9", "text_encoder: hidden_size is 8"),
        ),
        (
            "unet/config.json",
            {"in_channels": 9},
            ("in_channels is 9", "vae: latent_channels is 4"),
        ),
        (
            "text_encoder/config.json",
            {"max_position_embeddings": 77},
            ("model_max_length is 12", "77 positions"),
        ),
        (
            "text_encoder/config.json",
            {"vocab_size": 519},
            ("'<|endoftext|>' with id 519", "519 tokens"),
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EDMEulerScheduler"},
            ("'EDMEulerScheduler'", "'DDIMScheduler'"),
        ),
    ],
)
def test_refuses_what_does_not_fit(file, fields, words, folder):
    change(folder / file, **fields)
    with pytest.raises(ValueError) as error:
        resolve_stable_diffusion(folder)
    for word in words:
        assert word in str(error.value)


def test_refuses_flow_matching_pickles_and_missing_parts(folder):
    scheduler = folder / "scheduler" / "scheduler_config.json"
    kept = scheduler.read_text()
    scheduler.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    with pytest.raises(ValueError, match="one of flow matching, which Stable Diff"):
        resolve_stable_diffusion(folder)
    scheduler.write_text(kept)
    weights = folder / "vae" / WEIGHTS["vae"]
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="vae has its weights in .*pickle"):
        resolve_stable_diffusion(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no model_index.json; it must be"):
        from_stable_diffusion(folder)


def test_what_is_written_loads_again(golden, folder, tmp_path):
    """Networks, weights in their type, tokens of any prompt, and the scheduler."""
    parts, params = from_stable_diffusion(folder, None)
    copy = tmp_path / "copy"
    to_stable_diffusion(parts, params, copy)
    assert not copy.with_name("copy.partial").exists()
    again, same = from_stable_diffusion(copy, None)
    assert (again.unet, again.vae, again.text) == (parts.unet, parts.vae, parts.text)
    assert (again.schedule, again.scheduler) == (parts.schedule, parts.scheduler)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    prompts = [*json.loads(str(golden["prompts"])), "an Émeu's <|endoftext|> 12", ""]
    np.testing.assert_array_equal(again.tokenizer(prompts), parts.tokenizer(prompts))
    with pytest.raises(FileExistsError, match="copy holds something already"):
        to_stable_diffusion(parts, params, copy)


def test_a_write_that_is_cut_off_leaves_no_folder(folder, tmp_path, monkeypatch):
    parts, params = from_stable_diffusion(folder)
    copy = tmp_path / "copy"
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", lambda self, folder: folder / 0)
        with pytest.raises(TypeError):
            to_stable_diffusion(parts, params, copy)
    assert not copy.exists()
    to_stable_diffusion(parts, params, copy)
    assert resolve_stable_diffusion(copy)[:3] == parts[:3]


def test_in_a_bucket_the_index_is_written_last(folder, bucket):
    """A folder without it is none, so that a write that is cut off is done again."""
    parts, params = from_stable_diffusion(folder)
    to_stable_diffusion(parts, params, "gs://bucket/whole")
    written = {
        name: generation
        for name, (generation, _) in bucket.objects.items()
        if name.startswith("whole/")
    }
    assert max(written, key=written.get) == "whole/model_index.json"
    assert resolve_stable_diffusion("gs://bucket/whole")[:3] == parts[:3]
