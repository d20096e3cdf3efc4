"""The images of a run: those that its first stage saw, in splits.npz."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dtrak_jax import data, files, locks, parallel

if TYPE_CHECKING:
    from dtrak_jax.run import Run

MADE = ("report.html", "export")
"""The files that hold the groups of their time until their commands are run again."""


def chosen(run: "Run") -> data.Splits:
    """Returns the images that the source has now, see `Run.chosen`."""
    size, _, channels = run.space.image_shape
    return data.load(run.config.data, size, channels, _saved(run))


def recorded(run: "Run") -> data.Splits | None:
    """Returns the images that were recorded, see `Run.recorded`."""
    saved = _saved(run)
    return run.chosen.recorded_in(saved, run.space.deciding) if saved else None


def splits(run: "Run") -> data.Splits:
    """Returns the images, and records them if they are not, see `Run.splits`."""
    path, saved = run.workdir / "splits.npz", _saved(run)
    is_new = not parallel.agreed(run.recorded is not None)
    if not parallel.agreed(not is_new and _has_texts(run.recorded, saved)):
        if parallel.is_main_process():
            images, lines = run.recorded, _corrected(run, saved)
            if is_new:
                # Models of other settings may be of the same images.
                before = files.read_npz(path) if path.exists() else {}
                train = run.chosen.train.stratified_as(before, "train")
                images, lines = run.chosen._replace(train=train), _remarks(run)
            for text in lines:
                warnings.warn(text, stacklevel=4)
            settings = locks.splits_made_from(run)
            files.write_npz(path, settings=settings, **images.columns())
        parallel.barrier(f"write {path}")
    if is_new:
        vars(run)["recorded"] = run.chosen.recorded_in(files.read_npz(path))
    return run.recorded


def _saved(run: "Run") -> dict[str, np.ndarray]:
    """Returns the contents of splits.npz; {} if it is of other settings, or not there."""
    path, settings = run.workdir / "splits.npz", locks.splits_made_from(run)
    saved = files.read_npz(path) if path.exists() else {}
    # Files of earlier versions do not say by which settings images were chosen.
    return saved if saved.get("settings", settings) == settings else {}


def _has_texts(images: data.Splits, saved: Mapping[str, np.ndarray]) -> bool:
    """Returns whether labels, captions and groups are those of splits.npz."""
    for role, examples in images._asdict().items():
        before, texts = data.recorded_texts(saved, role), examples.texts
        # Files of earlier versions do not say what was chosen from.
        same = before.keys() == texts.keys() and f"{role}_pool" in saved
        if not (same and all(np.array_equal(before[k], texts[k]) for k in texts)):
            return False
    return True


def _remarks(run: "Run") -> list[str]:
    """Returns what is remarkable of images that are chosen."""
    sets = run.chosen._asdict()
    if run.config.queries.folder:
        sets["generated"] = run.generated
    return data.remarks(sets, run.config.is_latent)


def _corrected(run: "Run", saved: Mapping[str, np.ndarray]) -> list[str]:
    """Returns a line on what is said of the images now, and what was said before."""
    if not saved:
        return []
    clauses = []
    for role, images in run.recorded._asdict().items():
        before = data.recorded_texts(saved, role)
        for column, rows, example in data.corrections(images.ids, before, images.texts):
            of = f"{len(rows)} of {len(images)} {data.NAMES[role]}"
            clauses.append(f"{of} have another {column} than before ({example})")
    line = "; ".join(clauses)
    if line:
        line += ". This is taken over, and nothing is trained again"
        made = [name for name in MADE if (run.workdir / name).exists()]
        if made:
            line += f"; until written anew, as before: {', '.join(made)}"
    return [
        *([f"{line}."] if line else []),
        *data.remarks_on_groups(run.recorded.train),
    ]
