"""ArtBench-10 (Liao et al. 2022, arXiv 2206.11404): paintings of ten styles."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from dtrak_jax.checks import one_of
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.folder import stamp
from dtrak_jax.data.preprocess import Picture, decode
from dtrak_jax.data.table import read_table
from dtrak_jax.files import at, is_remote

CSV = "ArtBench-10.csv"
FOLDERS = ("artbench-10-imagefolder", "artbench-10-imagefolder-split")
CAPTION = "a {label} painting"
COLUMNS = ("name", "label", "split")


def artbench(
    path: str,
    split: str,
    groups: Sequence[str],
    prepare: Callable[[Image.Image], Picture],
) -> Dataset:
    """Returns a split of ArtBench-10, "train" or "test", in the order of its CSV.

    The folder, on a local disk or gs://, has ArtBench-10.csv and either
    artbench-10-imagefolder/LABEL/NAME or artbench-10-imagefolder-split/SPLIT/LABEL/NAME.
    An id is LABEL/NAME; labels are styles, and groups are columns of the CSV, such as
    artist. Only pictures that are used need to be there.
    """
    root = at(path)
    folder = next((root / name for name in FOLDERS if (root / name).is_dir()), None)
    if folder is None or not (root / CSV).is_file():
        raise ValueError(
            f"data.name is {path!r}, in which there is no "
            f"{CSV if folder else ' or '.join(FOLDERS)}; launch/README.md says where "
            "ArtBench-10 is from."
        )

    table, _ = read_table(root / CSV, COLUMNS, groups=groups)
    rows = [cells for _, cells in table]
    one_of(
        "data.train_split or data.validation_split",
        split,
        sorted({row["split"] for row in rows}),
    )
    label_names = sorted({row["label"] for row in rows})
    rows = [row for row in rows if row["split"] == split]
    ids = [f"{row['label']}/{row['name']}" for row in rows]
    if folder.name == FOLDERS[1]:
        folder /= split

    def read(index: int) -> Picture:
        picture = folder / ids[index]
        if not picture.is_file():
            raise ValueError(f"there is no file {picture}.")
        with picture.open("rb") as file:
            return prepare(decode(file))

    return Dataset(
        ids=np.array(ids),
        read=read,
        # Files in a bucket are not asked one by one.
        stamp=None if is_remote(root) else lambda index: stamp(folder / ids[index]),
        labels=np.array([label_names.index(row["label"]) for row in rows]),
        label_names=tuple(label_names),
        groups={name: np.array([row[name] for row in rows]) for name in groups},
    )
