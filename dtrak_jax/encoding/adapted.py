"""Adapters beside a frozen Stable Diffusion, as the functions that all stages call."""

import functools

import jax.numpy as jnp

from dtrak_jax.models import UNet2DCondition, lora
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.network import Apply, Init, Network, TrainApply, View
from dtrak_jax.rng import below, bernoulli, normal, split

Sizes = tuple[tuple[str, tuple[int, int, int]], ...]
"""The (path, (in, rank, out)) of adapters."""


def sizes(
    unet: UNet2DCondition, settings: lora.LoRAConfig, given: lora.Adapters | None
) -> Sizes:
    """Returns the sizes of given adapters, or of those that settings describe."""
    if given:
        return tuple(
            (path, (*pair["down"].shape, pair["up"].shape[1]))
            for path, pair in given.items()
        )
    layers = lora.targets(settings, parameter_shapes(unet))
    return tuple((path, (i, settings.rank, o)) for path, (i, o) in layers.items())


def network(
    unet: UNet2DCondition,
    sizes: Sizes,
    scales: lora.Scales,
    dropout: float,
    caption_dropout: float,
) -> Network:
    """Returns a UNet's adapters as a network; the UNet's parameters are frozen ones."""
    size = unet.config.sample_size
    return Network(
        init=adapter_init(sizes),
        apply=lora.apply_fn(base_apply(unet), scales),
        train_apply=lora.train_apply_fn(base_train_apply(unet), scales, dropout),
        shape=(size, size, unet.config.in_channels),
        view=posterior_view(caption_dropout),
        settings=f"{unet.config} {sizes} {sorted(scales.items())}",
    )


@functools.cache
def base_apply(unet: UNet2DCondition) -> Apply:
    """Returns the frozen network, ({"unet": params, ...}, x, t, context) -> prediction."""

    def apply(frozen, x, t, context):
        return unet.apply({"params": frozen["unet"]}, x, t, context)

    return apply


@functools.cache
def base_train_apply(unet: UNet2DCondition) -> TrainApply:
    """Returns the frozen network in training mode, with keys for its dropout."""

    def apply(frozen, x, t, context, keys):
        return unet.apply({"params": frozen["unet"]}, x, t, context, keys=keys)

    return apply


@functools.cache
def adapter_init(sizes: Sizes) -> Init:
    """Returns the initialisation of adapters of these sizes."""

    def init(key):
        return lora.draw(dict(sizes), key)

    return init


@functools.cache
def posterior_view(caption_dropout: float) -> View:
    """Returns the `View` of latents: a sample of the posterior, of the picture or, where
    it is kept, of the mirrored one; and the caption, or in a share of steps none."""

    def view(key, example, frozen):
        moments, context = example
        variant_key, noise_key, caption_key = split(key, 3)
        variants = len(moments["mean"])
        variant = below(variant_key, variants)
        mean, std = moments["mean"][variant], moments["std"][variant]
        left_out = bernoulli(caption_key, caption_dropout)
        context = jnp.where(left_out, frozen["empty"], context)
        return mean + std * normal(noise_key, mean.shape), context

    return view
