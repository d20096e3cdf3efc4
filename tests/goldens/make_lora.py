"""Writes lora.npz: adapters of a small diffusers UNet, and what it computes with them.

    python tests/goldens/make_lora.py

Needs torch, diffusers and peft (made with 2.13, 0.42.1 and 0.21.2), which the tests do
not. The UNet's parameters are drawn by NumPy, as `parameters` in tests/test_lora.py does.

There are two adapters: "plain", rank 4, alpha 2, of the attentions' layers; and "mixed",
with ranks and alphas of their own for some modules, and convolutions. The file holds
`config` (JSON), `x`, `t`, `context`, `weights`; for each adapter ADAPTER/MODULE/down,
.../up [out, r] in PyTorch's layout and its `scales` (JSON); for the mixed one `output` and
grad/... of mean(weights * output), computed in float64. `layouts` (JSON) has, for each
file, its adapter, {name of a tensor: array of this file, or alpha}, its metadata and the
configuration beside it. `half/...` is one layer whose base is float16 and whose
adapter is float32.

All files but two are loaded again by diffusers or PEFT, and the UNet computes the same,
or with scale 1 where the file has no alpha. Diffusers does not load its own file "mixed 1
metadata" right (it names ff's tensors lora_A and the attentions' lora.down, and then
looks at the first alone), nor different alphas of kohya's ("mixed 5"); it warns of both.

    python tests/goldens/make_lora.py check FOLDER

loads FOLDER/diffusers and FOLDER/peft, written by `write_diffusers` and `write_peft` of
the mixed adapter, in diffusers and PEFT, and compares what the UNet computes.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import safetensors
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, logging
from peft.tuners.lora import LoraLayer

PATH = Path(__file__).with_name("lora.npz")
CONFIG = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 10,
    "norm_num_groups": 4,
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
NOT_LOADED_RIGHT = ("mixed 1 metadata", "mixed 5")
ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 2, "target_modules": ATTENTION},
    "mixed": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": [*ATTENTION, "proj_in", "ff.net.0.proj"],
        # The first that fits counts, and files have them in alphabetical order.
        "rank_pattern": {"attn2.to_k": 3, "mid_block.*proj_in": 5},
        "alpha_pattern": {"attn2.to_k": 7, "mid_block.*proj_in": 4, "to_[qk]": 1},
        "use_rslora": True,
    },
}


def parameters(shapes, seed):
    """Random parameters of about the size that trained ones have."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in sorted(shapes.items()):
        values = rng.standard_normal(shape)
        if "norm" in name:
            values = name.endswith("weight") + 0.3 * values
        else:
            values = values / np.sqrt(np.prod(shape[1:]))
        params[name] = values.astype(np.float32)
    return params


def base():
    """The UNet without adapters."""
    model = UNet2DConditionModel(**CONFIG).eval()
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    state = {k: torch.from_numpy(v) for k, v in parameters(shapes, 0).items()}
    model.load_state_dict(state)
    return model


def adapted(name):
    """A UNet with an adapter of random weights."""
    model = base()
    model.add_adapter(peft.LoraConfig(init_lora_weights="gaussian", **ADAPTERS[name]))
    state = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    values = parameters(shapes, 1 + list(ADAPTERS).index(name))
    with torch.no_grad():
        for key, p in state.items():
            p.copy_(torch.from_numpy(values[key].astype(np.float16)))
    return model


def lora_layers(model):
    """{module: PEFT's layer}, without the prefix of a PeftModel."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def parts(model, gradients=False):
    """{MODULE/down or up: array} of the adapter, or of its gradients."""
    arrays = {}
    for module, layer in lora_layers(model).items():
        for side, holder in (("down", layer.lora_A), ("up", layer.lora_B)):
            (weight,) = holder.values()
            weight = weight.weight.grad if gradients else weight.weight.detach()
            arrays[f"{module}/{side}"] = weight.numpy().astype(np.float32)
    return arrays


def scales(model):
    """{module: scale} as PEFT applies it."""
    found = {n: list(m.scaling.values()) for n, m in lora_layers(model).items()}
    return {name: float(scale) for name, (scale,) in found.items()}


def output(model, inputs):
    """The UNet's output in float64."""
    x, t, context = (torch.from_numpy(inputs[n]) for n in ("x", "t", "context"))
    return model.double()(x.double(), t, context.double()).sample


def save_tensors(tensors, folder):
    """Writes a file that is no other than its tensors."""
    folder.mkdir()
    path = folder / "pytorch_lora_weights.safetensors"
    safetensors.torch.save_file(tensors, path)


def save(name, folder):
    """Writes an adapter in all of its layouts, each into a folder of its own."""
    model = adapted(name)
    state = peft.get_peft_model_state_dict(model, adapter_name="default")
    state = {key: value.contiguous() for key, value in state.items()}
    metadata = model.peft_config["default"].to_dict()
    old = convert_state_dict_to_diffusers(state)
    write = StableDiffusionPipeline.save_lora_weights
    if name == "plain":
        write(folder / "1 plain", unet_lora_layers=old)
        processors = {}
        for key, value in old.items():
            attention, layer, *_ = key.replace(".to_out.0", ".to_out").rsplit(".", 4)
            side = key.split(".")[-2]
            new = f"unet.{attention}.processor.{layer}_lora.{side}.weight"
            processors[new] = value
        save_tensors(processors, folder / "4")
    kohya = {}
    for key, value in state.items():
        module, side = key.removesuffix(".weight").split(".lora_")
        new = "lora_unet_" + module.replace(".", "_")
        side = {"A": "down", "B": "up"}[side]
        kohya[f"{new}.lora_{side}.weight"] = value
        layer = lora_layers(model)[module]
        scale, rank = layer.scaling["default"], layer.r["default"]
        kohya[f"{new}.alpha"] = torch.tensor(scale * rank)
    save_tensors(kohya, folder / "5")
    write(
        folder / "1 metadata",
        unet_lora_layers=old,
        unet_lora_adapter_metadata=dict(metadata),
    )
    model.save_lora_adapter(folder / "2")
    wrapped = peft.PeftModel(
        base(), peft.LoraConfig(init_lora_weights="gaussian", **ADAPTERS[name])
    )
    state = {f"base_model.model.{key}": value for key, value in state.items()}
    peft.set_peft_model_state_dict(wrapped, state)
    wrapped.save_pretrained(folder / "3")


def load(folder):
    """The UNet with the adapter in a folder, loaded by diffusers or PEFT."""
    model = base()
    if (folder / "adapter_config.json").exists():
        return peft.PeftModel.from_pretrained(model, folder)
    if folder.name == "2":
        name = "pytorch_lora_weights.safetensors"
        model.load_lora_adapter(folder, prefix=None, weight_name=name)
        return model
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        folder, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, model, metadata=metadata)
    return model


def layout(folder, name, arrays):
    """What the file in a folder holds, with names for its arrays."""
    (path,) = folder.glob("*.safetensors")
    known = {array.tobytes(): key for key, array in arrays.items()}
    with safetensors.safe_open(path, "np") as file:
        names, metadata = list(file.keys()), file.metadata()
        tensors = {name: file.get_tensor(name) for name in names}
    config = folder / "adapter_config.json"
    return {
        "adapter": name,
        "tensors": {
            key: float(value) if value.ndim == 0 else known[value.tobytes()]
            for key, value in tensors.items()
        },
        "metadata": metadata,
        "file": path.name,
        "config": config.read_text() if config.exists() else None,
    }


def half():
    """A layer with a base of float16 and an adapter of float32."""
    torch.manual_seed(0)
    rng = np.random.default_rng(9)
    linear = torch.nn.Linear(6, 5, bias=False).half()
    layer = peft.get_peft_model(
        torch.nn.Sequential(linear),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"]),
    )
    (lora,) = lora_layers(layer).values()
    x = torch.from_numpy(rng.standard_normal((4, 6))).half().requires_grad_()
    with torch.no_grad():
        lora.lora_B["default"].weight.copy_(
            torch.from_numpy(rng.standard_normal((5, 3)))
        )
    y = layer(x)
    assert y.dtype == torch.float16
    assert lora.lora_A["default"].weight.dtype == torch.float32
    y.float().pow(2).sum().backward()
    return {
        "half/x": x.detach().numpy(),
        "half/weight": lora.base_layer.weight.detach().numpy(),
        "half/down": lora.lora_A["default"].weight.detach().numpy(),
        "half/up": lora.lora_B["default"].weight.detach().numpy(),
        "half/output": y.detach().numpy(),
        "half/grad": lora.lora_A["default"].weight.grad.numpy(),
    }


def main():
    logging.set_verbosity_error()
    rng = np.random.default_rng(0)
    t = np.array([0, 417, 999])
    inputs = {
        "x": rng.uniform(-1, 1, (3, 3, 8, 4)),
        "context": rng.standard_normal((3, 5, 10)),
        "weights": rng.standard_normal((3, 3, 8, 4)),
    }
    inputs = {key: value.astype(np.float32) for key, value in inputs.items()}
    inputs["t"] = t
    saved, layouts = dict(inputs), {}
    for name in ADAPTERS:
        model = adapted(name)
        arrays = {f"{name}/{key}": value for key, value in parts(model).items()}
        saved |= {key: value.astype(np.float16) for key, value in arrays.items()}
        result = output(model, inputs)
        (torch.from_numpy(inputs["weights"]).double() * result).mean().backward()
        saved[f"{name}/scales"] = json.dumps(scales(model))
        if name == "mixed":
            saved["output"] = result.detach().numpy().astype(np.float32)
            grads = parts(model, gradients=True)
            saved |= {f"grad/{key}": value for key, value in grads.items()}
        for layer in lora_layers(model).values():
            layer.scaling["default"] = 1.0
        one = output(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            save(name, Path(folder))
            for child in sorted(Path(folder).iterdir()):
                key = f"{name} {child.name}"
                layouts[key] = layout(child, name, arrays)
                expected = one if child.name in ("1 plain", "4") else result
                error = abs(output(load(child), inputs) - expected).max().item()
                print(key, error)
                assert (error < 1e-6) == (key not in NOT_LOADED_RIGHT)
    saved |= half()
    np.savez_compressed(
        PATH, config=json.dumps(CONFIG), layouts=json.dumps(layouts), **saved
    )
    print(PATH.stat().st_size)


def check(folder):
    logging.set_verbosity_error()
    golden = dict(np.load(PATH))
    for layout in ("diffusers", "peft"):
        model = load(Path(folder) / layout)
        result = output(model, golden).detach().numpy()
        assert scales(model).keys() == json.loads(str(golden["mixed/scales"])).keys()
        print(layout, abs(result - golden["output"]).max())


if __name__ == "__main__":
    check(sys.argv[2]) if sys.argv[1:2] == ["check"] else main()
