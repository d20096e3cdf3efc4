"""Locks: trained models belong to what they were trained with.

Training is what costs, so no command takes a model of other settings or pictures for its
own, or throws it away. Everything else in a run directory is made again where what it is
made from has changed.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from dtrak_jax import files, parallel, training
from dtrak_jax.config import Config, flatten
from dtrak_jax.data import Dataset
from dtrak_jax.digests import digest, digest_tree

if TYPE_CHECKING:
    from dtrak_jax.run import Run

BASE = "base_training"
"""The folder of models that are trained on other pictures than the run's."""

PLACES = ("data.name", "data.csv", "model.folder", "base.folder", "lora.file")
"""Settings that say where something is: its contents decide, wherever they are."""

TRAINING = ("model", "base", "lora", "diffusion", "train", "data.flip")
"""Sections and settings that decide how a model is trained."""

TRAINED = {
    BASE: ("base",),
    "checkpoints": TRAINING,
    "ensemble": (*TRAINING, "ensemble.fraction", "ensemble.seed"),
    "counterfactual": TRAINING,
}
"""The folders of trained models, and what decides these beside the training images."""

RECORD = "made_from.json"
"""The file that says what the models of a folder were trained with."""

OTHER = {
    "ids": "there are other training images there",
    "images": "the training images have other pixels or captions there",
    "network": "the network is another there",
    "schedule": "the noise schedule is another there",
}


def check(run: "Run", folder: str) -> None:
    """Raises a ValueError that names what a folder's models were trained with, if this
    run would train them with something else.

    Nothing is written. Images are decoded where there are models, and splits.npz is not
    of these settings of the data.
    """
    path, saved = run.workdir / folder, _recorded(run, folder)
    if saved is None:
        return
    current = _made_from(run, folder)
    defaults = deciding(Config(), TRAINED[folder])
    differing = files.differences(
        {name: {**defaults, **saved["settings"]}.get(name) for name in defaults},
        current["settings"],
    )
    # Contents decide, and settings explain.
    other = [p for p in OTHER if p in saved and saved[p] != current.get(p, saved[p])]
    if other and not differing:
        differing = files.differences(saved["data"], current["data"])
        differing = differing or [OTHER[other[0]]]
    if differing:
        raise ValueError(
            f"{path} has what was trained with other settings or pictures: "
            f"{'; '.join(differing)}. Go back to these; or name another --workdir; or "
            f"delete {path}, and it is trained again."
        )


def claim(run: "Run", folder: str) -> None:
    """Records what a folder's models are trained with, or raises as `check` does."""
    check(run, folder)
    path = run.workdir / folder / RECORD
    if folder != BASE:
        # All processes look at the pictures together.
        run.splits  # noqa: B018
    made_from = _made_from(run, folder)
    if parallel.is_main_process() and _recorded(run, folder) is None:
        files.write_json(path, made_from)
    parallel.barrier(f"write {path}")


def deciding(config: Config, names: Sequence[str]) -> dict[str, object]:
    """Returns the settings of some sections, or with these names, that decide contents.

    Free ones, which do not, and `PLACES` are left out.
    """
    free_names = {
        f"{section.name}.{setting.name}"
        for section in dataclasses.fields(Config)
        for setting in dataclasses.fields(section.type)
        if setting.metadata.get("free")
    }
    return {
        name: value
        for name, value in flatten(config).items()
        if {name, name.partition(".")[0]} & set(names)
        and name not in free_names | set(PLACES)
    }


def data_settings(config: Config) -> dict[str, object]:
    """Returns the settings that decide which images there are, and their pixels."""
    settings = deciding(config, ("data",))
    return {n: v for n, v in settings.items() if n not in ("data.flip", "data.groups")}


def splits_made_from(run: "Run") -> np.ndarray:
    """Returns the settings that decide splits.npz, as this file has them."""
    described = [data_settings(run.config), run.space.image_shape]
    return np.array(json.dumps(described))


def examples_digest(run: "Run", examples: Dataset, name: str) -> str:
    """Returns the hash of all that the network is given of "train" or of queries."""
    if base := run.space.digest:
        return digest(examples.digest, base, *map(str, examples.captions))
    classes = run.space.classes_if_taken(examples, name)
    return (
        examples.digest
        if classes is None
        else digest(examples.digest, *map(str, classes))
    )


def samples_made_from(run: "Run") -> dict[str, np.ndarray]:
    """Returns all that decides the generated images, as their file has it."""
    columns = run.space.generated_columns
    described = {
        "settings": deciding(run.config, ("sample",)),
        "network": run.network.settings,
        "schedule": schedule_digest(run.schedule),
        "base": run.space.digest,
        **{name: column.tolist() for name, column in columns.items()},
    }
    model = np.array(run.params_digest())
    return {"made_from": np.array(json.dumps(described)), "model": model}


@functools.cache
def schedule_digest(schedule) -> str:
    """Returns the hash of all that a noise schedule is made of.

    It is kept, since every path of features asks for that of a thousand numbers.
    """
    return digest_tree(dataclasses.astuple(schedule))


def _made_from(run: "Run", folder: str) -> dict:
    """Returns what models of a folder are trained with."""
    settings = {"settings": deciding(run.config, TRAINED[folder])}
    if folder == BASE:
        return settings
    # A process may be alone here, so `run.splits` must wait.
    train = (run.recorded or run.chosen).train
    made_from = settings | {
        "data": data_settings(run.config),
        "ids": digest(*map(str, train.ids)),
        "images": examples_digest(run, train, "train"),
    }
    if run.config.model.folder or run.config.is_latent:
        # A folder decides what settings decide otherwise.
        made_from["network"] = digest(run.network.settings)
        made_from["schedule"] = schedule_digest(run.schedule)
    return made_from


def _recorded(run: "Run", folder: str) -> dict | None:
    """Returns what models of a folder were trained with; None if there are none."""
    path = run.workdir / folder
    if not _has_models(path):
        return None
    if (path / RECORD).exists():
        return files.read_json(path / RECORD)
    # Directories of earlier versions have one config for all.
    saved, names = run.json("config"), deciding(Config(), TRAINED[folder])
    settings = flatten(Config()) | (saved["config"] if saved else {})
    return {"settings": {name: settings[name] for name in names}}


def _has_models(path: epath.Path) -> bool:
    """Returns whether there is a checkpoint in a folder, or in one that it has."""
    if training.latest_step(path):
        return True
    inner = (p for p in path.iterdir() if p.is_dir()) if path.exists() else ()
    return any(
        training.latest_step(folder) for p in inner for folder in (p, p / "checkpoints")
    )
