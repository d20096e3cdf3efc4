"""CLIP's embeddings of pictures (Radford et al. 2021, arXiv 2103.00020)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath

from dtrak_jax import data, digests, files, models, parallel
from dtrak_jax.batches import in_batches
from dtrak_jax.diffusion.sampling import batch_of
from dtrak_jax.models.clip_folder import STEM, vision_config
from dtrak_jax.models.tensors import CONFIG, model_folder, weights_files
from dtrak_jax.network import Params
from dtrak_jax.parallel import P

BATCH_SIZE = 64
"""Pictures at once on each device."""


@dataclass(frozen=True, eq=False)
class Clip:
    """The vision network of a folder of transformers, whose weights are read when used.

    Called with images [n, H, W, 1 or 3] in [-1, 1], it returns their embeddings,
    float32 [n, P], not normalised. CLIP is shown them as pictures of 8 bits; grey ones
    have three equal channels. This process's devices share the images out.
    """

    folder: epath.Path
    model: models.CLIPVision
    preprocess: models.CLIPImages

    @classmethod
    def from_folder(cls, folder: epath.PathLike) -> "Clip":
        """Returns the network of a `CLIPModel` or a `CLIPVisionModelWithProjection`.

        Raises:
          FileNotFoundError: config.json, the weights or preprocessor_config.json is
            missing.
          ValueError: a setting is not CLIP's, network and preprocessing do not fit each
            other, or the weights are a pickle.
        """
        folder = model_folder(folder, "image_encoder")
        config = vision_config(files.read_json(folder / CONFIG))
        preprocess = models.CLIPImages.from_folder(folder)
        weights_files(folder, STEM)
        made, taken = (preprocess.size, 3), (config.image_size, config.num_channels)
        if made != taken:
            raise ValueError(
                f"{folder}: (crop_size, channels) of preprocessed pictures are {made}, "
                f"but (image_size, num_channels) of config.json are {taken}; they must "
                "be equal."
            )
        return cls(folder, models.CLIPVision(config), preprocess)

    @functools.cached_property
    def params(self) -> Params:
        """The parameters, float32, on the host."""
        network = models.from_transformers(self.folder, models.CLIPVision)
        return jax.device_get(network[1])

    @functools.cached_property
    def digest(self) -> str:
        """The hash of the settings and the parameters."""
        settings = repr((self.model.config, self.preprocess))
        return digests.digest(settings, digests.digest_tree(self.params))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        mesh = parallel.mesh(jax.local_devices())
        function = embed_function(self.model, mesh)
        params = parallel.put(self.params, mesh)

        def embed(batch: np.ndarray) -> jax.Array:
            pictures = map(data.to_picture, data.to_pixels(batch))
            return function(params, np.stack([self.preprocess(p) for p in pictures]))

        size = batch_of(len(images), BATCH_SIZE, mesh.size)
        if not len(images):
            return np.zeros((0, self.model.config.projection_dim), np.float32)
        return in_batches(embed, images, size, "CLIP")


@functools.cache
def embed_function(model: models.CLIPVision, mesh: jax.sharding.Mesh) -> Callable:
    """Returns the compiled network of a batch of pixels that is sharded over the mesh."""

    def embed(params, pixels):
        return model.apply({"params": params}, pixels)

    return parallel.sharded(embed, mesh, (P(), P("data")), P("data"))


def kept_embeddings(clip: Clip, examples: data.Dataset, path: epath.Path) -> np.ndarray:
    """Returns the embeddings of examples, float32 [n, P], which are kept in an .npz.

    They are made anew where ids, pixels or CLIP have changed. Processes share the
    examples out, and must call this together.
    """
    made_from = {"ids": examples.ids, "digests": examples.digests}
    made_from["clip"] = np.array(clip.digest)
    if not parallel.agreed(files.holds(path, made_from)):
        count = len(examples)
        rows = parallel.gather(clip(examples.images[parallel.share(count)]), count)
        if parallel.is_main_process():
            files.write_npz(path, embeddings=rows, **made_from)
        parallel.barrier(f"write {path}")
    return files.read_npz(path)["embeddings"]
