"""Runs whose network sees latents and text embeddings: adapters of a Stable Diffusion."""

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dtrak_jax import diffusion, files, models, parallel
from dtrak_jax.data import Dataset
from dtrak_jax.diffusion.config import blocks, build_sampler
from dtrak_jax.digests import digest, digest_tree
from dtrak_jax.encoding import adapted, encode
from dtrak_jax.models import lora
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.lora_files import read_lora, write_diffusers, write_peft
from dtrak_jax.network import Apply, Network, Params, Shapes

if TYPE_CHECKING:
    from dtrak_jax.run import Run


class Latents:
    """Adapters beside a frozen base; `Pixels` has the same properties."""

    bounds = None

    def __init__(self, run: "Run"):
        self.run, self.config = run, run.config
        self.parts, self.digests = {}, {}

    @property
    def folder(self) -> epath.Path:
        """The folder of the Stable Diffusion."""
        given = self.config.base.folder
        return files.at(given) if given else self.run.workdir / "base"

    @functools.cached_property
    def resolved(self) -> models.StableDiffusion:
        """The contents of the folder, but for weights."""
        return models.resolve_stable_diffusion(self.folder)

    @functools.cached_property
    def pipeline(self) -> models.StableDiffusion:
        """Its networks, tokenizer and schedule, for pictures of the run's size."""
        parts = self.resolved
        resolution, factor = self.config.base.resolution, parts.vae.config.factor
        size = resolution // factor or parts.unet.config.sample_size
        if resolution % factor or not size:
            raise ValueError(
                f"base.resolution is {resolution}; it must be a multiple of {factor}, "
                f"or 0 where the UNet of {self.folder} has a sample_size."
            )
        unet = dataclasses.replace(parts.unet.config, sample_size=size)
        return parts._replace(unet=models.UNet2DCondition(unet))

    def part(self, name: str) -> Params:
        """Returns the parameters of its "unet", "vae" or "text", on the host."""
        if name not in self.parts:
            dtype = self.config.base.dtype
            dtype = None if dtype == "folder" else jnp.dtype(dtype)
            self.parts[name] = models.read_part(self.folder, name, dtype)
        return self.parts[name]

    def part_shapes(self, name: str) -> Params:
        """Returns the shapes of these parameters; float32 where the folder decides."""
        dtype = self.config.base.dtype.replace("folder", "float32")
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype),
            parameter_shapes(getattr(self.pipeline, name)),
        )

    def part_digest(self, name: str) -> str:
        """Returns the hash of these parameters.

        Raises:
          ValueError: they are others than those that the first stage saw.
        """
        if name not in self.digests:
            self.digests[name] = digest_tree(self.part(name))
            seen = files.read_json(self.record)[name] if self.record.exists() else None
            if seen not in (None, self.digests[name]):
                raise ValueError(
                    f"the {name} in {self.folder} has other weights than the first stage "
                    "of this run saw. Restore them, or name another --workdir."
                )
        return self.digests[name]

    @property
    def record(self) -> epath.Path:
        """The file of the hashes that the first stage saw."""
        return self.run.workdir / "encoded" / "base.json"

    def note_base(self) -> None:
        """Records the hashes, for the stages after the first one."""
        digests = {name: self.part_digest(name) for name in models.PARTS}
        if parallel.is_main_process():
            files.write_json(self.record, digests)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The height, width and channels of a picture."""
        if self.config.base.pictures:
            size, channels = self.config.base.small_resolution, 3
        else:
            vae = self.pipeline.vae.config
            size, channels = self.network.shape[0] * vae.factor, vae.in_channels
        return size, size, channels

    @functools.cached_property
    def adapters(self) -> tuple[Params, dict[str, float]] | None:
        """The adapters and scales of `lora.file`, if it is set."""
        settings, shapes = self.config.lora, parameter_shapes(self.pipeline.unet)
        if not settings.file:
            return None
        adapters = read_lora(settings.file, shapes, settings.leave_out_text_encoder)
        if not any(adapter["up"].any() for adapter in adapters[0].values()):
            raise ValueError(
                f"lora.file is {settings.file!r}, whose adapters are all zero: they "
                "change nothing, as before the first step of training."
            )
        return adapters

    @property
    def given(self) -> Params:
        """The adapters of `lora.file`."""
        return self.adapters[0]

    @functools.cached_property
    def network(self) -> Network:
        """The adapters beside the UNet."""
        unet, settings = self.pipeline.unet, self.config.lora
        dropout = self.config.train.caption_dropout
        sizes = adapted.sizes(unet, settings, self.adapters and self.adapters[0])
        return adapted.network(unet, sizes, self.scales, settings.dropout, dropout)

    @property
    def scales(self) -> dict[str, float]:
        """The scale of every adapter."""
        if self.adapters:
            return self.adapters[1]
        return lora.scales_of(self.config.lora, parameter_shapes(self.pipeline.unet))

    @functools.cached_property
    def frozen(self) -> Params:
        """The UNet's parameters, and the embedding of an empty caption."""
        self.part_digest("unet")  # It must be the one of the stages before.
        empty = encode.load_contexts(self.run, "train", [""])[0]
        return {"unet": self.part("unet"), "empty": empty}

    @property
    def schedule(self) -> diffusion.Schedule:
        """The noise schedule of the folder."""
        return self.pipeline.schedule

    @property
    def sampler(self) -> diffusion.Sampler:
        """The sampler of the queries, with what the folder says of sampling."""
        scheduler = self.pipeline.scheduler
        return build_sampler(self.config.sample, self.schedule, scheduler, clip=False)

    @property
    def shapes(self) -> Shapes:
        """The shapes of what the network is given."""
        shape, text = jax.ShapeDtypeStruct, self.pipeline.text.config
        size = text.max_position_embeddings, text.hidden_size
        variants = 1 + self.config.data.flip
        moments = shape((1, variants, *self.network.shape), np.float32)
        frozen = {"unet": self.part_shapes("unet"), "empty": shape(size, np.float32)}
        return Shapes(
            shape((1, *self.network.shape), np.float32),
            shape((1, *size), np.float32),
            frozen,
            {"mean": moments, "std": moments},
        )

    @property
    def sampled_cond(self) -> tuple:
        """The shapes of prompt and negative prompt of one picture that is sampled."""
        return self.shapes.cond, self.shapes.cond

    @property
    def sampled(self) -> Apply:
        """The network under guidance, which is sampled."""
        return diffusion.guided(self.network.apply, self.config.sample.guidance)

    def x(self, name: str) -> np.ndarray:
        """Returns the latents of a set, the posterior's mode, float32 [n, h, w, c]."""
        return encode.load_latents(self.run, name)["mean"][:, 0]

    def cond(self, name: str) -> encode.Rows:
        """Returns the text embeddings of a set's captions, [n, S, D]."""
        captions = self.run.examples(name).captions
        return encode.load_contexts(self.run, name, captions)

    @property
    def deciding(self) -> tuple[str, ...]:
        """The columns that the network is given, see `Dataset.recorded_in`."""
        return ("caption",)

    def check_conditions(self, examples: Dataset, name: str) -> None:
        """Raises a ValueError unless there is a caption for each example."""
        encode.check_captions(name, examples)

    @property
    def training_examples(self) -> dict[str, np.ndarray]:
        """The moments of the training images' latents."""
        return encode.load_latents(self.run, "train")

    @functools.cached_property
    def digest(self) -> str:
        """The hash of the base."""
        return digest(*map(self.part_digest, models.PARTS))

    @functools.cached_property
    def prompts(self) -> np.ndarray:
        """The prompt of every picture to generate, str [count]."""
        settings, captions = self.config.sample, self.run.splits.train.captions
        texts = np.array(settings.prompts or sorted(set(map(str, captions))))
        return texts[blocks(settings.count, len(texts))]

    @property
    def generated_columns(self) -> dict[str, np.ndarray]:
        """The prompt of every picture to generate."""
        return {"prompts": self.prompts}

    def prepare_prompts(self) -> None:
        """Embeds the prompts of the pictures to generate."""
        encode.embed(self.run, "generated", self.prompts)

    def export(self, params: Params) -> None:
        """Writes adapters/, in the layouts of diffusers and of PEFT."""
        shapes = parameter_shapes(self.pipeline.unet)
        folder, scales = self.run.workdir / "adapters", self.scales
        if parallel.is_main_process() and not self.adapters:
            write_diffusers(folder / "diffusers", shapes, params, scales)
            write_peft(folder / "peft", shapes, params, scales)

    def generator(
        self, params: Params, seeds: np.ndarray
    ) -> tuple[Apply, tuple, tuple]:
        """Returns network, parameters and conditions with which to sample from seeds."""
        settings = self.config.sample
        prompts = self.prompts[np.asarray(seeds) - self.run.seeds[0]]
        context, negative = (
            encode.load_contexts(self.run, "generated", texts)[:]
            for texts in (prompts, [settings.negative] * len(prompts))
        )
        return self.sampled, (params, self.frozen), (context, negative)

    def decode(self, x: np.ndarray) -> np.ndarray:
        """Returns the pictures of latents, [n, H, W, C] in [-1, 1]."""
        return encode.decode(self.run, x)
