"""A small Stable Diffusion that a run trains itself, and then adapts like a given one.

It is made as Rombach et al. 2022 (arXiv 2112.10752) made theirs, in small: first an
autoencoder of pictures, then a UNet of its latents that attends to the states of a text
network. The text network is random and stays so, which is enough to tell captions apart.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dtrak_jax import data, locks, models, parallel, training
from dtrak_jax.diffusion import scaled_linear_schedule
from dtrak_jax.encoding import adapted
from dtrak_jax.encoding.config import BaseConfig
from dtrak_jax.models.autoencoder import AutoencoderConfig
from dtrak_jax.models.clip import CLIPTextConfig
from dtrak_jax.models.conditional_unet import ConditionalConfig
from dtrak_jax.network import Init, Params
from dtrak_jax.rng import fold_in, normal, stream
from dtrak_jax.training.step import Batch

if TYPE_CHECKING:
    from dtrak_jax.run import Run

SEED = 0
WIDTH = 32
"""The size of the text network's states."""

LENGTH = 16
"""The number of tokens of a caption."""

CAPTION_DROPOUT = 0.1
KL_WEIGHT = 1e-4

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
"""Noise and sampling of Stable Diffusion, in diffusers' names."""


class AutoencoderRecipe(NamedTuple):
    """An autoencoder and how it is trained, in the place of a `training.Recipe`."""

    vae: models.AutoencoderKL
    config: training.TrainConfig

    @property
    def init(self) -> Init:
        """Its initialisation."""
        return models.init_fn(self.vae)

    def losses(
        self, params: Params, frozen: None, batch: Batch, key: jax.Array
    ) -> jax.Array:
        """Returns each picture's squared error and divergence, weighted, [B].

        l_b = mean (decode(z) - x)^2 + KL_WEIGHT mean (m^2 + v - 1 - log v) / 2, where z
        is drawn from N(m, v), to which x is encoded (Kingma & Welling 2013).
        """
        x, variables = batch.x, {"params": params}
        mean, log_variance = self.vae.apply(variables, x, method="encode")

        def draw(index):
            return normal(fold_in(key, index), mean.shape[1:])

        z = mean + jnp.exp(log_variance / 2) * jax.vmap(draw)(batch.index)
        errors = (self.vae.apply(variables, z, method="decode") - x) ** 2
        divergences = (mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2
        axes = 1, 2, 3
        return errors.mean(axes) + KL_WEIGHT * divergences.mean(axes)


def train_base(run: "Run") -> None:
    """Trains a small Stable Diffusion on plain pictures, or continues: base/."""
    if parallel.agreed(is_trained_base(run)):
        return
    locks.claim(run, locks.BASE)
    settings, workdir = run.config.base, run.workdir / locks.BASE
    plain = plain_pictures(settings)
    tokenizer = models.Tokenizer.learn(plain.captions, LENGTH)
    text = models.CLIPText(text_config(tokenizer))
    text_params = models.init(text, stream(SEED, "text"))
    embed = jax.jit(lambda params, ids: text.apply({"params": params}, ids).last)
    empty, *contexts = np.asarray(embed(text_params, tokenizer(["", *plain.captions])))

    vae = models.AutoencoderKL(autoencoder_config(settings.small_resolution))
    recipe = AutoencoderRecipe(vae, train_config(settings.autoencoder_steps, 8e-3))
    vae_params = training.train(
        recipe, plain.images, workdir / "autoencoder", description="autoencoder"
    )
    encode = jax.jit(functools.partial(vae.apply, method="encode"))
    mean, log_variance = map(np.asarray, encode({"params": vae_params}, plain.images))
    factor = 1 / float(np.std(mean))
    config = dataclasses.replace(vae.config, scaling_factor=factor)

    unet = models.UNet2DCondition(unet_config(vae.config.sample_size // config.factor))
    unet_params = training.train(
        unet_recipe(unet, train_config(settings.steps, 4e-3)),
        {
            "mean": factor * mean[:, None],
            "std": factor * np.exp(log_variance[:, None] / 2),
        },
        workdir / "unet",
        cond=np.stack(contexts),
        frozen={"empty": empty},
        description="base",
    )
    if parallel.is_main_process():
        models.to_stable_diffusion(
            models.StableDiffusion(
                unet,
                models.AutoencoderKL(config),
                text,
                tokenizer,
                scaled_linear_schedule(),
                SCHEDULER,
            ),
            {"unet": unet_params, "vae": vae_params, "text": text_params},
            run.space.folder,
        )


def is_trained_base(run: "Run") -> bool:
    """Returns whether the base is there, or is not to be trained."""
    if not run.config.base.pictures:
        return True
    locks.check(run, locks.BASE)
    return (run.space.folder / models.INDEX).exists()


def plain_pictures(settings: BaseConfig) -> data.Dataset:
    """Returns the pictures that a base is trained on."""
    prepare = functools.partial(
        data.preprocess, size=settings.small_resolution, channels=3
    )
    return data.plain_pictures(prepare, settings.pictures)


def train_config(steps: int, learning_rate: float) -> training.TrainConfig:
    """Returns how a network of the base is trained."""
    return training.TrainConfig(
        steps=steps,
        batch_size=64,
        learning_rate=learning_rate,
        checkpoints=(1.0,),
        save_every=500,
        seed=SEED,
    )


def text_config(tokenizer: models.Tokenizer) -> CLIPTextConfig:
    """Returns a text network for the tokens that there are."""
    return CLIPTextConfig(
        vocab_size=tokenizer.backend.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.length,
        eos_token_id=tokenizer.end,
    )


def autoencoder_config(size: int) -> AutoencoderConfig:
    """Returns an autoencoder that halves the height of pictures."""
    return AutoencoderConfig(
        sample_size=size,
        block_out_channels=(16, 16),
        down_block_types=2 * ("DownEncoderBlock2D",),
        up_block_types=2 * ("UpDecoderBlock2D",),
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def unet_config(size: int) -> ConditionalConfig:
    """Returns a UNet of latents of this height, which attends to text at half of it."""
    return ConditionalConfig(
        sample_size=size,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
    )


@functools.cache
def unet_recipe(
    unet: models.UNet2DCondition, config: training.TrainConfig
) -> training.Recipe:
    """Returns how the UNet is trained: on samples of the latents, and some without text."""
    apply = models.train_apply_fn(unet)

    def apply_alone(params, x, t, cond, keys):
        # The frozen half is the empty caption, which the view takes.
        return apply(params[0], x, t, cond, keys)

    return training.Recipe(
        models.init_fn(unet),
        apply_alone,
        scaled_linear_schedule(),
        config,
        adapted.posterior_view(CAPTION_DROPOUT),
    )
