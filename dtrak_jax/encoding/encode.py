"""The encode stage: pictures become latents, and captions text embeddings, once.

encoded/SET/ has a file for every CHUNK pictures, which says what it was made from, so
that an interrupted stage continues, and prompts.npz with the embedding of every distinct
caption. Latents are those of the autoencoder times its scaling factor.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dtrak_jax import files, parallel
from dtrak_jax.batches import in_batches
from dtrak_jax.data import Dataset
from dtrak_jax.digests import digest
from dtrak_jax.models import AutoencoderKL, CLIPText
from dtrak_jax.parallel import P, Program
from dtrak_jax.progress import progress

if TYPE_CHECKING:
    from dtrak_jax.run import Run

CHUNK = 256
"""The pictures in a file of latents."""


class Rows:
    """Rows of a table, an array to whoever slices it: each row is kept once.

    Attributes:
      table: [P, ...].
      index: int [n], the row of the table that every row is.
    """

    def __init__(self, table: np.ndarray, index: np.ndarray):
        self.table, self.index = table, index
        self.shape, self.dtype = (len(index), *table.shape[1:]), table.dtype
        self.ndim = table.ndim

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows) -> np.ndarray:
        return self.table[self.index[rows]]


def encode(run: "Run") -> None:
    """Turns pictures and captions into latents and text embeddings: encoded/."""
    if run.config.is_latent:
        names = given_sets(run)
        run.space.note_base()
        encode_sets(run, names)


def is_encoded(run: "Run") -> bool:
    """Returns whether all is encoded that there is before training."""
    if not run.config.is_latent:
        return True
    return run.space.record.exists() and are_encoded(run, given_sets(run))


def given_sets(run: "Run") -> list[str]:
    """Returns the sets of pictures that are there before training.

    Raises:
      ValueError: a picture has no caption.
    """
    queries = [n for n in run.config.query_sets if n not in run.sampled_sets]
    for name in ("train", *queries):
        check_captions(name, run.examples(name))
    return ["train", *queries]


def encode_sets(run: "Run", names: Sequence[str]) -> None:
    """Encodes sets, but for what is there already; nothing of a network of pixels."""
    for name in names if run.config.is_latent else ():
        _encode_set(run, name)


def are_encoded(run: "Run", names: Sequence[str]) -> bool:
    """Returns whether sets are encoded with this base, these pictures and captions."""
    return all(_is_encoded(run, name) for name in names if run.config.is_latent)


def _encode_set(run: "Run", name: str) -> None:
    examples = run.examples(name)
    embed(run, name, examples.captions)
    missing = [
        rows
        for rows in parallel.of_process(chunks(len(examples)))
        if not files.holds(_path(run, name, rows), _made_from(run, examples, rows))
    ]
    for rows in progress(missing, f"encode {name}", unit="file"):
        # Pictures are large: no more of them than a file has are in memory.
        images = examples.take(np.arange(rows.start, rows.stop)).images
        mean, std = moments(run, images, mirrored(run, name))
        made_from = _made_from(run, examples, rows)
        files.write_npz(_path(run, name, rows), mean=mean, std=std, **made_from)
    parallel.barrier(f"encode {name}")


def _is_encoded(run: "Run", name: str) -> bool:
    examples = run.examples(name)
    return files.holds(
        prompts_path(run, name), _prompts_made_from(run, examples.captions)
    ) and all(
        files.holds(_path(run, name, rows), _made_from(run, examples, rows))
        for rows in chunks(len(examples))
    )


def chunks(count: int) -> list[slice]:
    """Returns the rows of every file of latents."""
    return [slice(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]


def mirrored(run: "Run", name: str) -> bool:
    """Returns whether latents of the mirrored pictures are kept too."""
    return run.config.data.flip and name == "train"


def check_captions(name: str, examples: Dataset) -> None:
    """Raises a ValueError unless every picture has a caption."""
    captions = [""] if examples.captions is None else examples.captions
    missing = [i for i, text in enumerate(captions) if not str(text).strip()]
    if missing:
        raise ValueError(
            f"{len(missing) if examples.captions is not None else 'all'} of "
            f"{len(examples)} {name} pictures have no caption, such as "
            f"{examples.ids[missing[0]]}; text-to-image needs one for each (a column "
            "`caption` of the CSV, or `prompt` for queries)."
        )


def load_latents(run: "Run", name: str) -> dict[str, np.ndarray]:
    """Returns the moments of a set's latents, "mean" and "std" [n, V, h, w, c].

    V is 2 where the mirrored pictures are kept too, the second ones, and else 1.
    """
    paths = [_path(run, name, rows) for rows in chunks(len(run.examples(name)))]
    if missing := [path for path in paths if not path.exists()]:
        raise FileNotFoundError(
            f"there is no {missing[0]}; run `dtrak-jax encode` with this config and "
            "workdir first."
        )
    saved = [files.read_npz(path) for path in paths]
    return {key: np.concatenate([s[key] for s in saved]) for key in ("mean", "std")}


def moments(
    run: "Run", images: np.ndarray, mirror: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of latents, times the scaling factor.

    Args:
      images: [n, H, W, 3] in [-1, 1].
      mirror: whether those of the mirrored images come as a second one.

    Returns:
      Both [n, V, h, w, c], float32.
    """
    vae = run.space.pipeline.vae
    variants = [images, images[:, :, ::-1]] if mirror else [images]
    encoded = [_in_batches(run, encode_function, vae, "vae", x) for x in variants]
    mean, log_variance = (np.stack(arrays, axis=1) for arrays in zip(*encoded))
    scale = vae.config.scaling_factor
    return mean * scale, np.exp(log_variance / 2) * scale


def decode(run: "Run", latents: np.ndarray) -> np.ndarray:
    """Returns the images [n, H, W, 3] of scaled latents [n, h, w, c], in [-1, 1]."""
    vae = run.space.pipeline.vae
    latents = latents / vae.config.scaling_factor
    (images,) = _in_batches(run, decode_function, vae, "vae", latents)
    return np.clip(images, -1, 1)


def embed(run: "Run", name: str, prompts: Sequence[str]) -> None:
    """Writes the embedding of each distinct prompt of a set: encoded/SET/prompts.npz."""
    made_from, path = _prompts_made_from(run, prompts), prompts_path(run, name)
    if parallel.agreed(files.holds(path, made_from)):
        return
    texts, tokenizer = made_from["prompts"].tolist(), run.space.pipeline.tokenizer
    cut = {text: end for text in texts if (end := tokenizer.cut(text))}
    if cut and parallel.is_main_process():
        text, end = next(iter(cut.items()))
        print(
            f"warning: {len(cut)} prompts are longer than the text model reads; of "
            f"{text!r} it does not read {end!r}.",
            file=sys.stderr,
        )
    ids = tokenizer(texts)
    (contexts,) = _in_batches(run, text_function, run.space.pipeline.text, "text", ids)
    if parallel.is_main_process():
        files.write_npz(path, contexts=contexts, **made_from)
    parallel.barrier(f"embed {name}")


def load_contexts(run: "Run", name: str, prompts: Sequence[str]) -> Rows:
    """Returns the text embeddings of prompts that a set has, [n, S, D]."""
    path = prompts_path(run, name)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; run `dtrak-jax encode` with this config and workdir "
            "first."
        )
    saved = files.read_npz(path)
    positions = {text: i for i, text in enumerate(saved["prompts"].tolist())}
    return Rows(saved["contexts"], np.array([positions[str(text)] for text in prompts]))


def prompts_path(run: "Run", name: str) -> epath.Path:
    """Returns the file of a set's text embeddings."""
    return run.workdir / "encoded" / name / "prompts.npz"


def _prompts_made_from(run: "Run", prompts: Sequence[str]) -> dict[str, np.ndarray]:
    texts = sorted({"", run.config.sample.negative, *map(str, prompts)})
    return {"prompts": np.array(texts), "text": np.array(run.space.part_digest("text"))}


def _path(run: "Run", name: str, rows: slice) -> epath.Path:
    return run.workdir / "encoded" / name / f"{rows.start:06d}.npz"


def _made_from(run: "Run", examples: Dataset, rows: slice) -> dict[str, np.ndarray]:
    """Returns what decides the latents of some rows."""
    pixels = digest(*examples.ids[rows].tolist(), *examples.digests[rows].tolist())
    flip = str(run.config.data.flip)
    return {"made_from": np.array(digest(pixels, run.space.part_digest("vae"), flip))}


def _in_batches(run: "Run", function_of, module, part: str, array: np.ndarray) -> tuple:
    """Returns what a part of the base makes of the rows of an array, float32."""
    mesh = parallel.mesh(jax.local_devices())
    function, params = (
        function_of(module, mesh),
        parallel.put(run.space.part(part), mesh),
    )
    size = run.config.base.batch_size * mesh.size
    return in_batches(functools.partial(function, params), array, size, part)


def planned_batches(
    run: "Run", function_of: Callable, part: str, row: jax.ShapeDtypeStruct, devices
) -> tuple[Program, int]:
    """Returns the program of a batch of such rows on a process's devices, and its rows."""
    mesh, space = parallel.mesh(devices), run.space
    size = run.config.base.batch_size * mesh.size
    batch = jax.ShapeDtypeStruct((size, *row.shape), row.dtype)
    function = function_of(getattr(space.pipeline, part), mesh)
    return Program(function, (space.part_shapes(part), batch), mesh), size


def _compiled(function, mesh: jax.sharding.Mesh):
    return parallel.sharded(function, mesh, (P(), P("data")), P("data"))


@functools.cache
def encode_function(vae: AutoencoderKL, mesh: jax.sharding.Mesh):
    """Compiles (params, images [B, H, W, 3]) -> (mean, log-variance) of the latents."""

    def encode_pictures(params, x):
        return vae.apply({"params": params}, x, method="encode")

    return _compiled(encode_pictures, mesh)


@functools.cache
def decode_function(vae: AutoencoderKL, mesh: jax.sharding.Mesh):
    """Compiles (params, latents [B, h, w, c]) -> (images,)."""

    def decode_latents(params, z):
        return (vae.apply({"params": params}, z, method="decode"),)

    return _compiled(decode_latents, mesh)


@functools.cache
def text_function(text: CLIPText, mesh: jax.sharding.Mesh):
    """Compiles (params, ids [B, S]) -> (text embeddings [B, S, D],)."""

    def embed_prompts(params, ids):
        return (text.apply({"params": params}, ids).last.astype(jnp.float32),)

    return _compiled(embed_prompts, mesh)
