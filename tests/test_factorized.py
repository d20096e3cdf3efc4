"""Sketches made layer by layer are those of the exact gradients, weight by weight."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_features import close, task_of

import dtrak_jax as dtrak
from dtrak_jax import parallel
from dtrak_jax.digests import named_leaves
from dtrak_jax.features import step_programs
from dtrak_jax.features.factorized import channel_sketches, channels_of
from dtrak_jax.features.gradients import gradient_function, network_inputs
from dtrak_jax.features.microbatches import Microbatch
from dtrak_jax.models.conditional_unet import ConditionalConfig, Transformer
from dtrak_jax.models.tags import ChannelSketch


class Crossed(nn.Module):
    """A block of Stable Diffusion, conditioned on two of the image's rows."""

    @nn.compact
    def __call__(self, h):
        config = ConditionalConfig(
            block_out_channels=4 * (6,), attention_head_dim=2, norm_num_groups=3
        )
        context = h[:, :2].reshape(len(h), -1, h.shape[-1])
        return Transformer(config, 2, 1, name="transformer")(h, context)


LAYERS = {
    "dense": partial(nn.Dense, 5),
    "stride": partial(nn.Conv, 5, (3, 3), strides=2),
    "valid": partial(nn.Conv, 5, (3, 2), strides=(1, 3), padding="VALID"),
    "explicit": partial(nn.Conv, 5, (3, 3), padding=((0, 1), (2, 3))),
    "integer": partial(nn.Conv, 5, (3, 3), padding=2, use_bias=False),
    "one_by_one": partial(nn.Conv, 5, (1, 1)),
    "dilated": partial(nn.Conv, 5, (3, 3), kernel_dilation=(2, 1)),
    "spread": partial(nn.Conv, 5, (3, 3), padding=1, input_dilation=2),
    "attention": partial(nn.MultiHeadDotProductAttention, 2, qkv_features=6),
    "crossed": Crossed,
    "two_axes": partial(nn.DenseGeneral, 5, axis=(-2, -1)),
}
UNKNOWN = {
    "groups": partial(nn.Conv, 6, (3, 3), feature_group_count=2),
    "circular": partial(nn.Conv, 5, (3, 3), padding="CIRCULAR"),
    "group_norm": partial(nn.GroupNorm, 3),
    "layer_norm": partial(nn.LayerNorm),
    "other_axis": partial(nn.DenseGeneral, 5, axis=1),
}


class Net(nn.Module):
    """All of these side by side, after a Dense on the time and before another."""

    @nn.compact
    def __call__(self, x, t):
        h = nn.Dense(6, name="embedding")(jnp.sin(t[:, None] / 100))
        h = x * h[:, None, None, :]
        branches = LAYERS | UNKNOWN
        means = [
            nn.tanh(layer(name=name)(h)).reshape(len(x), -1).mean(axis=1)
            for name, layer in branches.items()
        ]
        out = nn.Dense(1, name="out")(jnp.stack(means, axis=1))
        return x * out[:, None, None, :]


@pytest.fixture(scope="module")
def net():
    """(apply, params), no parameter being 0."""
    shapes = jax.eval_shape(
        Net().init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2, shapes
    )["params"]
    return lambda params, x, t, cond: Net().apply({"params": params}, x, t), params


def tagged(params, x, t, cond):
    """A network without flax, each layer tagged, one weight used twice."""
    w, v = params["conv"], params["dense"]
    options = {"padding": [(1, 2), (0, 1)]}
    h = jax.lax.conv_general_dilated(
        x, w, (2, 1), **options, rhs_dilation=(1, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    h = dtrak.layer(w, x, h, **options, strides=(2, 1), dilation=(1, 2))
    h = jnp.tanh(h).mean(axis=(1, 2))
    for _ in range(2):
        h = jnp.tanh(dtrak.layer(v, h, h @ v) + params["bias"].reshape(1, -1))
    return x * h[:, None, None, :1]


@pytest.fixture(scope="module")
def bare():
    """(tagged, its parameters)."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 2, 1, 5), "dense": (5, 5), "bias": (5,)}
    return tagged, {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def sketches_of(task, params, dim, seed=0):
    projection = dtrak.Projection("factorized", dim=dim, seed=seed)
    inputs = network_inputs(np.zeros((1, 8, 8, 1)), None, 1)
    return channel_sketches(task, params, None, projection, inputs)


def identities(sketches):
    """The same layers, and maps that lose nothing and change no sign."""

    def identity(sketch):
        return ChannelSketch(np.ones_like(sketch.signs), len(sketch.signs))

    return {i: tuple(map(identity, pair)) for i, pair in sketches.items()}


def short(task, params, sketches, images):
    """{measurement: [3, p]}: gradients averaged over two timesteps of unequal weight."""
    microbatch = Microbatch(
        x=images[:3, None],
        words=np.zeros((3, 2), np.uint32),
        position=np.arange(3, dtype=np.int32),
        pair=np.tile(np.array([1, 2], np.int32), (3, 1)),
        weight=np.tile(np.array([0.3, 0.7], np.float32), (3, 1)),
        cond=None,
    )
    function = gradient_function(task, parallel.mesh(jax.local_devices()[:1]))
    gradient, _ = function(params, None, sketches, microbatch)
    return {name: np.concatenate(parts, axis=1) for name, parts in gradient.items()}


@pytest.mark.parametrize("name", ["net", "tiny", "bare"])
def test_with_identities_they_are_the_gradients(name, request, images):
    """Leaf by leaf, in the gradient's own order; `test_features` has those from grad."""
    network = request.getfixturevalue(name)
    measurements = ("square", "loss") if name == "bare" else ("square",)
    task, params = task_of(network, measurement=measurements), network[1]
    sketches = identities(sketches_of(task, params, 1))
    exact, ours = (short(task, params, f, images) for f in ({}, sketches))
    leaves = named_leaves(params)
    ends = np.cumsum([leaf.size for leaf in leaves.values()])
    for measurement, gradient in exact.items():
        assert ours[measurement].shape == gradient.shape
        parts = (np.split(g, ends[:-1], axis=1) for g in (ours[measurement], gradient))
        for path, mine, right in zip(leaves, *parts, strict=True):
            error = np.abs(mine - right).max()
            assert error <= 1e-5 * max(np.abs(right).max(), np.abs(gradient).max()), (
                path
            )
    assert len(sketches) == {"net": 27, "bare": 2}.get(name, len(sketches))


def test_known_layers(net, tiny):
    """All weights of the UNet; and those of `LAYERS`, where attention has four."""
    for network, is_layer in [
        (tiny, lambda path: True),
        (net, lambda path: path.split("/")[0] not in UNKNOWN),
    ]:
        paths = list(named_leaves(network[1]))
        found = {paths[i] for i in sketches_of(task_of(network), network[1], 1)}
        kernels = {path for path in paths if path.endswith("kernel")}
        assert found == set(filter(is_layer, kernels))


def test_inner_products_are_unbiased(bare, images):
    """Mean over seeds of the sketches alone, which here lose much."""
    task, params = task_of(bare, measurement="loss"), bare[1]
    exact = short(task, params, {}, images)["loss"]
    grams = []
    for seed in range(300):
        sketches = sketches_of(task, params, 1, seed)
        phi = short(task, params, sketches, images)["loss"]
        assert phi.shape[1] < exact.shape[1] / 2
        grams.append(phi @ phi.T)
    error = np.array(grams) - exact @ exact.T
    assert np.abs(error[0]).max() > 0.05 * np.abs(exact @ exact.T).max()
    assert (np.abs(error.mean(axis=0)) < 4 * error.std(axis=0) / 300**0.5).all()


@pytest.mark.parametrize("per_timestep", [True, False])
def test_wide_features_lose_nothing(bare, images, per_timestep):
    task = task_of(bare, per_timestep=per_timestep)
    exact, ours = (
        dtrak.featurize(task, bare[1], images[:4], projection)
        for projection in (dtrak.Projection("none"), dtrak.Projection("factorized"))
    )
    for name in exact:
        close(ours[name].squared_norms, exact[name].squared_norms)
        pairs = zip(ours[name].by_pair(), exact[name].by_pair(), strict=True)
        for phi, g in pairs:
            close(phi @ phi.T, g @ g.T)
    measured = dtrak.distortion(
        task, bare[1], images[:4], dtrak.Projection("factorized")
    )
    assert all(errors.largest < 1e-5 for errors in measured.values())


def test_batches_devices_and_timesteps(bare, images, request):
    """Another batch size on one device; another order; and averaging is linear."""
    projection, params = dtrak.Projection("factorized", dim=6), bare[1]
    task = task_of(bare, measurement="loss")
    few, ids = images[:5], ("a", "b", "c", "d", "e")
    apart = dtrak.featurize(task, params, few, projection, ids=ids, batch_size=2)
    assert apart.shape == (3, 5, 6)
    averaged = dtrak.featurize(
        task_of(bare, measurement="loss", per_timestep=False),
        params, few, projection, ids=ids, batch_size=2,
    )  # fmt: skip
    close(averaged, np.asarray(apart).mean(axis=0))
    request.getfixturevalue("one_device")
    order = [3, 0, 4, 2, 1]
    again = dtrak.featurize(
        task, params, few[order], projection, ids=[ids[i] for i in order], batch_size=3
    )
    close(again, np.asarray(apart)[:, order])


def test_dimensions_are_shared_out():
    """As many entries as allowed, equally many to each layer; small weights whole."""
    sizes = {0: (9, 16, 16), 1: (9, 16, 1), 2: (1, 64, 512), 3: (9, 256, 256)}
    for length in (500, 5_000, 50_000):
        channels = channels_of(sizes, length)
        entries = {i: sizes[i][0] * math.prod(channels[i]) for i in sizes}
        assert length / 2 < sum(entries.values()) <= length
        for i, (_, c_in, c_out) in sizes.items():
            assert channels[i] == (
                min(max(channels[i]), c_in),
                min(max(channels[i]), c_out),
            )
    assert channels_of(sizes, 50_000)[1] == (16, 1)
    assert set(channels_of(sizes, 1).values()) == {(1, 1)}
    everything = channels_of(sizes, 10**9)
    assert everything == {i: size[1:] for i, size in sizes.items()}


def test_weight_gradients_are_not_formed():
    """XLA counts under three quarters of a plain batched gradient's operations for the
    first measurement, and under 0.45 of them for the second, which is one more way back.
    """

    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            for channels in (32, 32, 1):
                x = nn.tanh(nn.Conv(channels, (3, 3))(x))
            return x

    def apply(params, x, t, cond):
        return Wide().apply({"params": params}, x, t)

    n, mesh = 16, parallel.mesh(jax.local_devices()[:1])
    x = jax.ShapeDtypeStruct((n, 8, 8, 1), np.float32)
    params = jax.eval_shape(Wide().init, jax.random.key(0), x, None)["params"]

    def loss(params, x):
        return jnp.sum(apply(params, x, None, None) ** 2)

    def flops(function, *arguments):
        return function.lower(*arguments).cost_analysis()["flops"]

    plain = flops(jax.jit(jax.grad(loss)), params, x)
    for measurements, share in [(("square",), 0.75), (("square", "loss"), 1.2)]:
        task = task_of((apply,), measurement=measurements)
        programs = step_programs(
            task, params, x, dtrak.Projection("factorized", 64), mesh, batch_size=n
        )
        assert (
            flops(*programs.gradients[:1], *programs.gradients.arguments)
            < share * plain
        )


def test_some_layers_only(bare, images):
    """A layer that is not chosen has no part in them."""
    task = task_of(bare, parameters="conv|bias", measurement="loss")
    sketches = identities(sketches_of(task, bare[1], 1))
    exact, ours = (short(task, bare[1], f, images)["loss"] for f in ({}, sketches))
    assert len(sketches) == 1
    close(ours, exact)


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (lambda p, x, t, cond: x * p["dense"][:1, :1].reshape(1, 1, 1, 1), ""),
        (jax.jit(tagged), ""),
        (tagged, "bias"),
    ],
)
def test_networks_without_a_known_layer(bare, images, network, parameters):
    task = task_of((network,), parameters=parameters)
    with pytest.raises(ValueError, match=r"found no layer .* by `dtrak_jax.layer`"):
        dtrak.featurize(task, bare[1], images, dtrak.Projection("factorized"))


@pytest.mark.parametrize(
    "options", [{"padding": "SAME"}, {"padding": "VALID", "strides": 2}, {}]
)
def test_wrong_tags(bare, images, options):
    def apply(params, x, t, cond):
        w = params["conv"]
        h = jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x * dtrak.layer(w, x, h, **options).mean(axis=(1, 2, 3), keepdims=True)

    with pytest.raises(ValueError, match=r"weight of shape \(3, 2, 1, 5\) is tagged"):
        dtrak.featurize(
            task_of((apply,)), bare[1], images, dtrak.Projection("factorized")
        )


def circular(params, x, t, cond):
    """Pads with the other side, and says with zeros."""
    w = params["conv"]
    wide = jnp.pad(x, [(0, 0), (1, 1), (0, 1), (0, 0)], mode="wrap")
    h = jax.lax.conv_general_dilated(
        wide, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = dtrak.layer(w, x, h, padding=[(1, 1), (0, 1)])
    return x * jnp.tanh(h).mean(axis=-1, keepdims=True)


def scaled(params, x, t, cond):
    """Tags what was made of the product, not the product."""
    h = x.reshape(len(x), -1)[:, :5] @ params["dense"]
    h = dtrak.layer(params["dense"], x.reshape(len(x), -1)[:, :5], jnp.tanh(h))
    return x * h.mean(axis=1).reshape(-1, 1, 1, 1)


def hidden(params, x, t, cond):
    """Tags other inputs, in front of a layer that is right and 0, which hides it."""
    h = x.reshape(len(x), -1)[:, :5]
    h = dtrak.layer(params["dense"], h, jnp.sin(h) @ params["dense"])
    out = dtrak.layer(params["last"], h, h @ params["last"])
    return x * out.mean(axis=1).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("network", "leaf"), [(circular, "conv"), (scaled, "dense"), (hidden, "dense")]
)
def test_wrong_tags_of_the_right_shape(bare, images, network, leaf, tmp_path):
    """They are refused by the gradient of one image, before anything is written."""
    params = bare[1] | {"last": np.zeros((5, 5), np.float32)}
    given, store = (task_of((network,)), params, images), tmp_path / "store"
    factorized = dtrak.Projection("factorized")
    for function, how in ((dtrak.ekfac, ()), (dtrak.featurize, (factorized,))):
        with pytest.raises(ValueError, match=f"^{leaf} is tagged by .* differ by"):
            function(*given, *how, store=store)
        assert not store.exists()


def test_every_use_of_a_weight_is_tagged(bare, images):
    """Or that part of the gradient would be missing."""

    def also(params, x, t, cond):
        return tagged(params, x, t, cond) * params["dense"].sum()

    message = "dense is tagged as the weight of 2 layers; the network uses it 3 times"
    with pytest.raises(ValueError, match=message):
        dtrak.featurize(
            task_of((also,)), bare[1], images, dtrak.Projection("factorized")
        )


def test_stores_know_the_layers(bare, images, tmp_path):
    """A layer that is tagged now and was not before gives other features."""

    def half(params, x, t, cond):
        return tagged(params | {"dense": params["dense"] + 0}, x, t, cond)

    projection = dtrak.Projection("factorized", dim=4)
    for network, message in [(tagged, None), (half, "network|layers")]:
        arguments = (task_of((network,)), bare[1], images, projection)
        if message is None:
            dtrak.featurize(*arguments, store=tmp_path / "s")
            continue
        with pytest.raises(ValueError, match=f"holds other features: ({message})"):
            dtrak.featurize(*arguments, store=tmp_path / "s")
