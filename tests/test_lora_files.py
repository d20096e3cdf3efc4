"""Adapters' files: those of diffusers, PEFT and kohya mean here what they mean there."""

import json
import math
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_lora import GOLDEN, golden_adapters, golden_unet

from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.lora_files import read_lora, write_diffusers, write_peft
from dtrak_jax.models.tensors import read_header, to_params

golden = dict(np.load(GOLDEN))
LAYOUTS = json.loads(str(golden["layouts"]))
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
KOHYA = f"lora_unet_{ATTENTION.replace('.', '_')}"
PEFT = f"base_model.model.{ATTENTION}"


@pytest.fixture(scope="module")
def base():
    return parameter_shapes(golden_unet(golden))


def tensors_of(layout):
    """The tensors of a golden layout; its adapter's arrays were exact in float16."""
    return {
        name: np.asarray(golden[key] if isinstance(key, str) else key, np.float32)
        for name, key in layout["tensors"].items()
    }


def write(folder, layout, tensors=None, config=None, **metadata):
    """Makes a file of a golden layout, with changes."""
    layout = LAYOUTS[layout]
    tensors = tensors_of(layout) | (tensors or {})
    tensors = {name: array for name, array in tensors.items() if array is not None}
    metadata = (layout["metadata"] or {}) | metadata
    safetensors.numpy.save_file(tensors, folder / layout["file"], metadata or None)
    if layout["config"]:
        settings = json.loads(layout["config"]) | (config or {})
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder / layout["file"]


def check(found, expected):
    """Asserts that adapters are the same, and scales but for their rounding."""
    (adapters, scales), (expected_adapters, expected_scales) = found, expected
    jax.tree.map(np.testing.assert_array_equal, adapters, expected_adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {np.dtype("float32")}
    assert scales.keys() == expected_scales.keys()
    for name, scale in scales.items():
        assert math.isclose(scale, expected_scales[name], rel_tol=1e-7), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_reads_every_layout(name, base, tmp_path):
    path = write(tmp_path, name)
    adapters, scales = golden_adapters(golden, LAYOUTS[name]["adapter"])
    if name in ("plain 1 plain", "plain 4"):
        scales = dict.fromkeys(scales, 1.0)
    for source in (tmp_path, path):
        with warnings.catch_warnings(record=True) as said:
            check(read_lora(source, base), (adapters, scales))
        assert bool(said) == (name in ("plain 1 plain", "plain 4"))


def test_adapters_may_be_of_smaller_types(base, tmp_path):
    halves = tensors_of(LAYOUTS["plain 4"])
    halves = {name.removeprefix("unet."): a.astype("f2") for name, a in halves.items()}
    safetensors.numpy.save_file(halves, tmp_path / "any.safetensors")
    adapters, scales = golden_adapters(golden, "plain")
    check(read_lora(tmp_path, base), (adapters, dict.fromkeys(scales, 1.0)))


def test_kohya_without_alpha_has_scale_one(base, tmp_path):
    names = LAYOUTS["mixed 5"]["tensors"]
    write(tmp_path, "mixed 5", {name: None for name in names if "alpha" in name})
    with pytest.warns(UserWarning, match="tells no alpha: .* taken at scale 1"):
        _, scales = read_lora(tmp_path, base)
    assert set(scales.values()) == {1.0}


@pytest.mark.parametrize("name", ["plain", "mixed"])
def test_writes_what_diffusers_and_peft_write(name, base, tmp_path):
    """The tensors of their files; `make_lora.py check` has them load files made here."""
    adapters, scales = golden_adapters(golden, name)
    for kind, layout, write_layout in (
        ("diffusers", f"{name} 1 metadata", write_diffusers),
        ("peft", f"{name} 3", write_peft),
    ):
        folder = tmp_path / kind
        write_layout(folder, base, adapters, scales)
        check(read_lora(folder, base), (adapters, scales))
        (path,) = folder.glob("*.safetensors")
        written, expected = safetensors.numpy.load_file(path), LAYOUTS[layout]
        assert path.name == expected["file"]
        # Of layers outside of the attentions diffusers writes names that it misreads.
        renamed = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
        for tensor, array in tensors_of(expected).items():
            for old, new in renamed.items() if kind == "diffusers" else ():
                tensor = tensor.replace(old, new)
            np.testing.assert_array_equal(written.pop(tensor), array)
        assert not written
        assert read_header(path)[1]["format"] == "pt"


def test_a_written_folder_is_replaced_as_a_whole(base, tmp_path):
    adapters, _ = golden_adapters(golden, "plain")
    for rank in (2, 3):
        smaller = {
            module: {"down": parts["down"][:, :rank], "up": parts["up"][:rank]}
            for module, parts in adapters.items()
        }
        scales = dict.fromkeys(adapters, 1 / 3)
        write_peft(tmp_path, base, smaller, scales)
        check(read_lora(tmp_path, base), (smaller, scales))
    with pytest.raises(
        ValueError, match=r"shape \(4, 3\); in this base it must be \(8"
    ):
        wrong = {ATTENTION + ".to_q": {"down": ones(4, 3), "up": ones(3, 8)}}
        write_peft(tmp_path, base, wrong, scales)


def ones(*shape):
    return np.ones(shape, np.float32)


REFUSED = {
    "DoRA": (
        "plain 3",
        {f"{PEFT}.to_q.lora_magnitude_vector": ones(8)},
        "that is DoRA",
    ),
    "kohya's DoRA": ("plain 5", {f"{KOHYA}_to_q.dora_scale": ones(8)}, "that is DoRA"),
    "LoHa": ("plain 5", {f"{KOHYA}_to_q.hada_w1_a": ones(8, 2)}, "that is LoHa"),
    "LoKr": ("plain 5", {f"{KOHYA}_to_q.lokr_w1": ones(8, 2)}, "that is LoKr"),
    "Tucker": ("plain 5", {f"{KOHYA}_to_q.lora_mid.weight": ones(2, 2)}, "Tucker core"),
    "bias": ("plain 3", {f"{PEFT}.to_q.lora_B.bias": ones(8)}, "that is a bias"),
    "unknown": ("plain 3", {f"{PEFT}.to_q.weight": ones(8, 8)}, "none of the layouts"),
    "convolution": (
        "plain 5",
        {
            "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": ones(
                2, 8, 3, 3
            ),
            "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": ones(8, 2, 1, 1),
            "lora_unet_down_blocks_0_resnets_0_conv1.alpha": ones(),
        },
        r"down_blocks\.0\.resnets\.0\.conv1, a convolution with a window of \(3, 3\)",
    ),
    "window": (
        "plain 2",
        {f"{ATTENTION}.to_q.lora_A.weight": ones(4, 8, 3, 3)},
        r"attn1\.to_q has shape \(4, 8, 3, 3\)",
    ),
    "text encoder": (
        "plain 1 plain",
        {"text_encoder.text_model.a.q_proj.lora_linear_layer.up.weight": ones(2, 2)},
        "1 tensors of an adapter of the text encoder",
    ),
    "kohya's text encoder": ("plain 5", {"lora_te1_a.alpha": ones()}, "text encoder"),
    "ranks": (
        "plain 2",
        {f"{ATTENTION}.to_q.lora_A.weight": ones(3, 8)},
        r"attn1\.to_q has rank 3 in A and 4 in B",
    ),
    "half": ("plain 2", {f"{ATTENTION}.to_q.lora_A.weight": None}, "no tensor 'down'"),
    "module": (
        "plain 2",
        {"mid_block.a.to_q.lora_A.weight": ones(2, 8)},
        r"another base: this one has not all .* lacks mid_block\.a\.to_q",
    ),
    "kohya's module": ("plain 5", {"lora_unet_a_b.alpha": ones()}, "lacks a_b"),
    "channels": (
        "plain 2",
        {f"{ATTENTION}.to_q.lora_A.weight": ones(4, 9)},
        "another base: .*attn1.to_q maps 9 channels to 8 there and 8 to 8 here",
    ),
    "alpha": (
        "plain 5",
        {f"{KOHYA}_to_q.alpha": None},
        r"no alpha for .*attn1\.to_q, but for others",
    ),
    "alpha of 0": ("plain 5", {f"{KOHYA}_to_q.alpha": np.zeros(())}, "alpha of .* 0"),
    "nan": (
        "plain 2",
        {f"{ATTENTION}.to_q.lora_A.weight": np.nan * ones(4, 8)},
        "attn1.to_q is not finite",
    ),
    "integers": (
        "plain 2",
        {f"{ATTENTION}.to_q.lora_A.weight": np.ones((4, 8), np.int64)},
        "attn1.to_q is int64",
    ),
    "use_dora": ("plain 3", {"use_dora": True}, "use_dora is True"),
    "lora_bias": ("plain 3", {"lora_bias": True}, "lora_bias is True"),
    "bias=all": ("plain 3", {"bias": "all"}, "bias is 'all'; it must be one of"),
    "other method": ("plain 3", {"peft_type": "LOKR"}, "peft_type is 'LOKR'"),
    "alora": ("plain 3", {"alora_invocation_tokens": [1]}, r"alora_.* is \[1\]"),
    "PiSSA": (
        "plain 3",
        {"init_lora_weights": "pissa"},
        "init_lora_weights is 'pissa'",
    ),
    "saved modules": ("plain 3", {"modules_to_save": ["a"]}, "modules_to_save is"),
    "newer setting": ("plain 3", {"use_magic": True}, "use_magic is True"),
    "rank": ("plain 3", {"r": 5}, "has rank 4, and by its configuration 5"),
    "pattern": ("plain 3", {"alpha_pattern": {"(": 1}}, "must be a regular expression"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, base, tmp_path):
    layout, changes, message = REFUSED[name]
    of_tensors = all(isinstance(v, np.ndarray | None) for v in changes.values())
    path = write(tmp_path, layout, **{"tensors" if of_tensors else "config": changes})
    with pytest.raises(ValueError, match=message) as error:
        read_lora(tmp_path, base)
    assert str(path.parent) in str(error.value)


def test_the_text_encoder_may_be_left_out(base, tmp_path):
    names = ("lora_te_a.alpha", "lora_te_a.lora_down.weight")
    write(tmp_path, "plain 5", {name: ones() for name in names})
    expected = golden_adapters(golden, "plain")
    check(read_lora(tmp_path, base, leave_out_text_encoder=True), expected)
    prefixed = json.dumps({"text_encoder.r": 3, "text_encoder.use_dora": True})
    both = json.loads(LAYOUTS["plain 1 metadata"]["metadata"]["lora_adapter_metadata"])
    both = json.dumps(both | json.loads(prefixed))
    for metadata, scale in ((prefixed, 1.0), (both, 0.5)):
        write(tmp_path, "plain 1 metadata", lora_adapter_metadata=metadata)
        _, scales = read_lora(tmp_path, base)
        assert set(scales.values()) == {scale}


def test_an_adapter_of_a_network_without_its_modules(tmp_path):
    write(tmp_path, "plain 3")
    other = {"conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 4, 4), np.float32)}}
    with pytest.raises(ValueError, match="this one has none of its 32 modules"):
        read_lora(tmp_path, other)


def test_files_that_are_not_read(base, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="is no .safetensors file, and no folder"
    ):
        read_lora(tmp_path, base)
    path = write(tmp_path, "plain 3")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="needs adapter_config.json beside it"):
        read_lora(path, base)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        read_lora(path, base)
    path.rename(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(ValueError, match=r"has a\.safetensors, b\.safetensors; name"):
        read_lora(tmp_path, base)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").rename(tmp_path / f"pytorch_{name}.bin")
    for source in (tmp_path, tmp_path / "pytorch_a.bin"):
        with pytest.raises(ValueError, match=r"pytorch_a\.bin.*are pickles.*save_file"):
            read_lora(source, base)


def test_a_base_that_was_saved_with_an_adapter_on_it():
    shapes = {"conv": {"kernel": jax.ShapeDtypeStruct((2, 2), np.float32)}}
    with pytest.raises(ValueError, match="was saved with an adapter on it"):
        to_params(shapes, {"conv.base_layer.weight": ones(2, 2)}, "unet")
