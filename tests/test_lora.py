"""Adapters: x W + s (x A) B on any flax network, and nothing of the base but its output."""

import dataclasses
import json
import math
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_factorized import identities
from test_features import IDS, close, one_by_one, task_of

import dtrak_jax as dtrak
from dtrak_jax import models, parallel
from dtrak_jax.features import Store, step_programs
from dtrak_jax.features.factorized import channel_sketches
from dtrak_jax.features.gradients import gradient_function, network_inputs
from dtrak_jax.features.microbatches import Microbatch
from dtrak_jax.models import lora
from dtrak_jax.models.conditional_unet import ConditionalConfig, UNet2DCondition
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.lora import LoRAConfig
from dtrak_jax.models.tensors import tensor_axes, tensor_name, to_params

GOLDEN = Path(__file__).with_name("goldens") / "lora.npz"
SMALL = LoRAConfig(rank=3, alpha=1.5, targets=r"to_(q|k|v|out\.0)$|proj_in")


class Block(nn.Module):
    """Attention on a context, after a convolution by one pixel."""

    @nn.compact
    def __call__(self, x, context):
        h = nn.Conv(9, (1, 1), name="proj_in")(x)
        q = nn.Dense(7, name="to_q", use_bias=False)(h)
        k = nn.Dense(7, name="to_k", use_bias=False)(context)
        v = nn.Dense(7, name="to_v", use_bias=False)(context)
        weights = nn.softmax(jnp.einsum("bhwc,bsc->bhws", q, k))
        h = jnp.einsum("bhws,bsc->bhwc", weights, v)
        return nn.Dense(9, name="to_out_0")(h)


class Net(nn.Module):
    """A block between convolutions."""

    @nn.compact
    def __call__(self, x, t, context):
        h = nn.Conv(6, (3, 3), name="conv_in")(x)
        h = h + nn.Dense(6, name="time")(jnp.sin(t[:, None] / 100))[:, None, None, :]
        h = Block(name="blocks_0")(nn.tanh(h), context)
        return nn.Conv(1, (3, 3), name="conv_out")(h)


def base(frozen, x, t, cond):
    return Net().apply({"params": frozen}, x, t, cond)


def train_base(frozen, x, t, cond, keys):
    return base(frozen, x, t, cond)


@pytest.fixture(scope="module")
def inputs():
    """(x, t, context) of six examples."""
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, (6, 8, 8, 1)).astype(np.float32)
    return x, np.arange(6) * 100, rng.normal(size=(6, 5, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def frozen(inputs):
    shapes = jax.eval_shape(Net().init, jax.random.key(0), *inputs)["params"]
    return random_like(shapes, 0)


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / 2).astype(np.float32), shapes
    )


@pytest.fixture(scope="module")
def adapters(frozen):
    return random_like(lora.init(SMALL, frozen, jax.random.key(0)), 1)


@pytest.fixture(scope="module")
def adapted(frozen):
    return lora.apply_fn(base, lora.scales_of(SMALL, frozen))


def test_adapted_equals_merged_weights(frozen, adapters, adapted, inputs):
    scales = lora.scales_of(SMALL, frozen)
    assert len(scales) == 5 and set(scales.values()) == {0.5}
    merged = jax.jit(base)(lora.merge(frozen, adapters, scales), *inputs)
    close(jax.jit(adapted)((adapters, frozen), *inputs), merged)
    assert np.abs(merged - jax.jit(base)(frozen, *inputs)).max() > 0.1


def test_new_adapters_change_nothing(frozen, adapted, inputs):
    config = LoRAConfig(rank=64)
    adapters = lora.init(config, frozen, jax.random.key(1))
    scales = lora.scales_of(config, frozen)
    assert scales == dict.fromkeys(adapters, 1.0) and len(adapters) == 4
    downs = np.concatenate([a["down"].ravel() for a in adapters.values()])
    assert abs(downs.std() * 64 - 1) < 0.05 and abs(downs.mean() * 64) < 0.1
    apply = lora.apply_fn(base, scales)
    same = jax.jit(apply)((adapters, frozen), *inputs)
    np.testing.assert_array_equal(same, jax.jit(base)(frozen, *inputs))


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_products_are_in_float32_on_a_smaller_base(precision):
    """The layer's input is rounded as its base has it, and the sum once more."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4, 6)), rng.normal(size=(6, 5))
    down, up = (rng.normal(size=s).astype(np.float32) for s in ((6, 3), (3, 5)))
    x, w = (jnp.asarray(a, precision) for a in (x, w))
    layer = nn.Sequential([nn.Dense(5, use_bias=False, name="a")])
    path = "layers.0"
    with lora.adapting({path: {"down": down, "up": up}}, {path: 2.0}):
        y = layer.apply({"params": {"layers_0": {"kernel": w}}}, x)
    exact = np.asarray(x @ w, np.float64)
    exact += 2 * np.asarray(x, np.float64) @ down @ up
    assert y.dtype == precision
    np.testing.assert_array_equal(y, np.asarray(exact.astype(np.float32), y.dtype))


def test_equal_to_peft_on_a_base_of_float16():
    golden = {k.removeprefix("half/"): v for k, v in np.load(GOLDEN).items()}
    params = {"kernel": golden["weight"].T}

    def loss(adapter):
        with lora.adapting({"": adapter}, {"": 5 / 3}):
            y = nn.Dense(5, use_bias=False).apply({"params": params}, golden["x"])
        return jnp.sum(y.astype(jnp.float32) ** 2), y

    adapter = {"down": golden["down"].T, "up": golden["up"].T}
    grads, y = jax.grad(loss, has_aux=True)(adapter)
    assert y.dtype == np.float16 and grads["down"].dtype == np.float32
    np.testing.assert_array_equal(y, golden["output"])
    close(grads["down"].T, golden["grad"], 2e-3)


def test_equal_settings_give_one_function(frozen, adapted):
    scales = lora.scales_of(SMALL, frozen)
    assert lora.apply_fn(base, dict(reversed(scales.items()))) is adapted
    assert lora.apply_fn(base, dict.fromkeys(scales, 1.0)) is not adapted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "to_x"}, "'to_x', which fits no layer.*blocks.0.to_q"),
        ({"targets": "conv_in"}, r"conv_in, whose weight has shape \(3, 3, 1, 6\)"),
        ({"targets": "("}, "lora.targets is '\\('; it must be a regular expression"),
        ({"rank": 0}, "lora.rank is 0; it must be an integer >= 1"),
        ({"alpha": 0}, "lora.alpha is 0"),
        ({"dropout": 1}, "lora.dropout is 1; it must be a number below 1"),
    ],
)
def test_refused_settings(settings, message, frozen):
    with pytest.raises(ValueError, match=message):
        lora.init(LoRAConfig(**settings), frozen, jax.random.key(0))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("blocks.1.to_q", "no Dense and no Conv by one pixel at blocks.1.to_q, for"),
        ("conv_in", r"conv_in is a convolution with window \(3, 3\)"),
        ("", "no Dense and no Conv"),
    ],
)
def test_refused_layers(path, message, frozen, inputs):
    """No adapter is left aside in silence."""
    adapter = {"down": np.ones((1, 3)), "up": np.ones((3, 6))}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lora.apply_fn(base, {path: 1.0}), ({path: adapter}, frozen), *inputs
        )
    with pytest.raises(ValueError, match="must have the same paths, unlike"):
        lora.apply_fn(base, {"conv_in": 1.0})(({"a": adapter}, frozen), *inputs)


def members_of(adapters, count):
    """(adapters of each member, the same with a leading axis)."""
    each = [random_like(adapters, 10 + i) for i in range(count)]
    return each, jax.tree.map(lambda *leaves: np.stack(leaves), *each)


def test_members_in_one_batch_equal_each_alone(frozen, adapters, adapted, inputs):
    """Outputs and gradients of three members with two examples each."""
    each, stacked = members_of(adapters, 3)
    weights = np.random.default_rng(4).normal(size=(6, 8, 8, 1)).astype(np.float32)

    @jax.jit
    def gradient(adapters, *inputs):
        *inputs, weights = inputs

        def loss(adapters):
            y = adapted((adapters, frozen), *inputs)
            return (weights * y).sum(), y

        return jax.grad(loss, has_aux=True)(adapters)

    grads, y = gradient(stacked, *inputs, weights)
    for i, member in enumerate(each):
        rows = slice(2 * i, 2 * i + 2)
        alone = gradient(member, *(a[rows] for a in (*inputs, weights)))
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], grads), y[rows]
        jax.tree.map(close, mine, alone)


def test_the_base_is_not_copied_for_members(frozen, adapters, adapted, inputs):
    """No array of the program has the size of three bases, or a weight thrice."""
    _, stacked = members_of(adapters, 3)
    program = jax.make_jaxpr(adapted)((stacked, frozen), *inputs)
    text = str(program)
    for leaf in jax.tree.leaves(frozen):
        assert f"[3,{','.join(map(str, leaf.shape))}]" not in text
    with pytest.raises(ValueError, match="5 rows; .* each of 3 members"):
        adapted((stacked, frozen), *(a[:5] for a in inputs))


def test_dropout_follows_from_each_examples_key(frozen, adapters, adapted, inputs):
    scales = lora.scales_of(SMALL, frozen)
    apply = jax.jit(lora.train_apply_fn(train_base, scales, 0.5))
    params, keys = (adapters, frozen), jax.random.split(jax.random.key(0), 6)
    y = apply(params, *inputs, keys)
    order = np.array([3, 1, 0, 5, 4, 2])
    close(apply(params, *(a[order] for a in inputs), keys[order]), y[order])
    without = jax.jit(adapted)(params, *inputs)
    assert np.abs(y - without).max() > 0.1
    off = lora.train_apply_fn(train_base, scales)
    np.testing.assert_array_equal(jax.jit(off)(params, *inputs, keys), without)


def test_dropout_keeps_the_mean():
    x, keys = jnp.ones((40, 500)), jax.random.split(jax.random.key(0), 40)
    adapter = {"down": jnp.ones((500, 1)), "up": jnp.ones((1, 1))}
    layer = nn.Dense(1, use_bias=False)

    @jax.jit
    def dropped(x):
        with lora.adapting({"": adapter}, {"": 1 / 500}, 0.2, keys):
            return layer.apply({"params": {"kernel": jnp.zeros((500, 1))}}, x)

    y = dropped(x)
    assert abs(y.mean() - 1) < 0.02 and 0.005 < y.std() < 0.05


def test_features_equal_a_loop_of_grad(frozen, adapters, adapted, inputs):
    """On eight devices, with the base beside the adapters that are differentiated."""
    x, _, context = inputs
    task = task_of((adapted,), measurement="square", timesteps=(0, 600))
    features = dtrak.featurize(
        task,
        adapters,
        x,
        dtrak.Projection("none"),
        ids=IDS[:6],
        frozen=frozen,
        cond=np.tile(context[:1], (6, 1, 1)),
        batch_size=1,
    )

    def same(adapters, x, t, cond):
        return adapted((adapters, frozen), x, t, context[:1])

    loop = dataclasses.replace(task, apply=same)
    close(features, one_by_one(loop, adapters, x)["square"])


def test_factorized_sketches_every_product(frozen, adapters, adapted, inputs):
    """A and B are layers; sketched with identities they are the exact gradients."""
    x, _, context = inputs
    task = task_of((adapted,), measurement="square")
    projection = dtrak.Projection("factorized", dim=1)
    shapes = network_inputs(x[:1], context[:1], 1)
    sketches = channel_sketches(task, adapters, frozen, projection, shapes)
    assert len(sketches) == 10 == len(jax.tree.leaves(adapters))
    microbatch = Microbatch(
        x=x[:3, None],
        words=np.zeros((3, 2), np.uint32),
        position=np.arange(3, dtype=np.int32),
        pair=np.tile(np.array([1, 2], np.int32), (3, 1)),
        weight=np.tile(np.array([0.3, 0.7], np.float32), (3, 1)),
        cond=context[:3],
    )
    function = gradient_function(task, parallel.mesh(jax.local_devices()[:1]))
    exact, ours = (
        function(adapters, frozen, kept, microbatch)[0]["square"]
        for kept in ({}, identities(sketches))
    )
    largest = max(np.abs(part).max() for part in exact)
    for right, mine in zip(exact, ours, strict=True):
        assert np.abs(mine - right).max() <= 1e-5 * largest


def gradient_program(task, params, inputs, frozen=None, n=6):
    """The compiled gradients of featurize on n images, two at once on one device."""
    x, _, context = (
        jax.ShapeDtypeStruct((n, *a.shape[1:]), np.float32) for a in inputs
    )
    mesh = parallel.mesh(jax.local_devices()[:1])
    function, arguments, _ = step_programs(
        task, params, x, dtrak.Projection(), mesh, 2, frozen=frozen, cond=context
    ).gradients
    return function.lower(*arguments).compile()


def product_sizes(compiled):
    """The sizes of the results of all products and convolutions."""
    product = r"= f32\[([\d,]*)\]\S* (?:dot|convolution)\("
    shapes = re.findall(product, compiled.as_text())
    return {math.prod(map(int, shape.split(","))) for shape in shapes}


def test_the_base_is_an_argument_and_not_differentiated(
    frozen, adapters, adapted, inputs
):
    """No product of featurize's program makes an array as large as two gradients of a
    weight; of an adapter's, all are made. All weights are arguments."""

    def gradients(tree):
        # Those of biases and of the layer of one input, the time, are no products.
        return {2 * leaf.size for leaf in jax.tree.leaves(tree) if leaf.size > 9}

    program = gradient_program(
        task_of((adapted,), measurement="square"), adapters, inputs, frozen
    )
    made = product_sizes(program)
    assert gradients(adapters) <= made and not gradients(frozen) & made
    weights = jax.tree.leaves((adapters, frozen))
    constants = re.findall(r"= f32\[([\d,]+)\]\S* constant\(", program.as_text())
    shapes = {",".join(map(str, weight.shape)) for weight in weights}
    assert constants and shapes.isdisjoint(constants)
    held = program.memory_analysis().argument_size_in_bytes
    assert held > sum(weight.nbytes for weight in weights)
    whole = gradient_program(task_of((base,), measurement="square"), frozen, inputs)
    assert gradients(frozen) <= product_sizes(whole)


def test_device_memory_does_not_grow_with_examples(
    frozen, adapters, adapted, inputs, monkeypatch
):
    """The program's by XLA's account; and the base is on each device once."""
    task = task_of((adapted,), measurement="square")
    few, many = (
        gradient_program(task, adapters, inputs, frozen, n).memory_analysis()
        for n in (6, 60_000)
    )
    assert str(few) == str(many) and few.argument_size_in_bytes > 0

    weights = [w for w in jax.tree.leaves(frozen) if w.ndim > 1]
    shapes, copies, write = {w.shape for w in weights}, [], Store.write

    def count(*arguments):
        found = [a for a in jax.live_arrays() if a.shape in shapes]
        copies.append(sum(a.nbytes * len(a.devices()) for a in found))
        return write(*arguments)

    monkeypatch.setattr(Store, "write", count)
    x, _, context = inputs
    for repeats in (1, 4):
        images, cond = (np.repeat(a, repeats, 0) for a in (x, context))
        dtrak.featurize(
            task,
            adapters,
            images,
            dtrak.Projection("none"),
            frozen=frozen,
            cond=cond,
            batch_size=1,
        )
    size = sum(weight.nbytes for weight in weights)
    assert set(copies) == {size * jax.local_device_count()}


def golden_unet(golden):
    """The golden file's UNet."""
    config = json.loads(str(golden["config"]))
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    return UNet2DCondition(ConditionalConfig(**config))


def golden_params(golden, model):
    """The parameters of that UNet, drawn as the golden file's script does."""
    shapes = parameter_shapes(model)
    flat = {
        tensor_name(path): [leaf.shape[a] for a in tensor_axes(path, leaf.ndim)]
        for path, leaf in flatten_dict(shapes).items()
    }
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in sorted(flat.items()):
        values = rng.standard_normal(shape)
        if "norm" in name:
            values = name.endswith("weight") + 0.3 * values
        else:
            values = values / np.sqrt(np.prod(shape[1:]))
        tensors[name] = values.astype(np.float32)
    return to_params(shapes, tensors, GOLDEN)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def golden_adapters(golden, name):
    """(adapters, scales) of the golden file, float32."""
    scales = json.loads(str(golden[f"{name}/scales"]))
    adapters = {
        module: {
            side: golden[f"{name}/{module}/{side}"].reshape(shape).T.astype(np.float32)
            for side in ("down", "up")
            for shape in [golden[f"{name}/{module}/{side}"].shape[:2]]
        }
        for module in scales
    }
    return adapters, scales


def test_equals_diffusers(golden):
    """The output and the gradients of A and B, in a UNet with ranks of all kinds."""
    model = golden_unet(golden)
    params = golden_params(golden, model)
    adapters, scales = golden_adapters(golden, "mixed")
    apply = lora.apply_fn(models.apply_fn(model), scales)
    x, weights = (golden[key].transpose(0, 2, 3, 1) for key in ("x", "weights"))

    def loss(adapters, params):
        y = apply((adapters, params), x, golden["t"], golden["context"])
        return (weights * y).mean(), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(adapters, params)
    close(y.transpose(0, 3, 1, 2), golden["output"], 5e-6)
    for module, parts in grads.items():
        for side, grad in parts.items():
            expected = golden[f"grad/{module}/{side}"]
            close(grad.T.reshape(expected.shape), expected, 4e-5)


def test_stable_diffusions_adapters_are_those_of_the_paper():
    unet = UNet2DCondition(ConditionalConfig(cross_attention_dim=768))
    base, key = parameter_shapes(unet), jax.eval_shape(jax.random.key, 0)
    adapters = jax.eval_shape(lambda key: lora.init(LoRAConfig(), base, key), key)
    assert models.parameter_count(adapters) == 25_509_888
    assert len(jax.tree.leaves(adapters)) == 256
    assert set(lora.scales_of(LoRAConfig(), base).values()) == {1.0}
