"""The settings of the data."""

from dataclasses import dataclass
from typing import Literal

from dtrak_jax.checks import at_least, check_choices, distinct, seed
from dtrak_jax.data.preprocess import check_colour

SourceName = Literal["digits", "hands", "tfds", "folder", "artbench"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images of a run, and how many are for training and for validation."""

    source: SourceName = "digits"
    """digits (scikit-learn's), hands (the same, drawn in colour by five contributors),
    tfds (tensorflow-datasets), folder (of pictures) or artbench (ArtBench-10)."""
    name: str = ""
    """The tfds data set, e.g. cifar10; or the path of the folder."""
    train_split: str = "train"
    """Split of the training images, where the source is tfds or artbench."""
    validation_split: str = "test"
    """Split of the validation images; if it is the training split, validation images
    are chosen from the examples that training left."""
    validation_folder: str = ""
    """A folder of pictures that are the validation images, whatever the source is; it
    may have a CSV of the name `csv`. `labels` does not choose among them."""
    labels: tuple[str, ...] = ()
    """Keep only the examples with these labels: names; for tfds also their numbers."""
    csv: str = ""
    """A CSV in the folder with a `file` column and a `label` or `caption` column. If it
    is empty and every picture is in a subfolder, their names are labels."""
    groups: tuple[str, ...] = ()
    """Further columns of the CSV, such as contributor or licence, whose values group
    the images; for tfds, text or label features; for artbench, artist and the like;
    for hands, contributor."""
    caption: str = ""
    """Captions by a template, such as "a {label} painting by {artist}": its fields are
    the label and groups, in which a space stands for each underscore. If it is empty,
    captions are the source's own; artbench has "a {label} painting"."""
    center_crop: int = 0
    """Cut this square from the centre before resizing; 0 cuts nothing."""
    background: str = "white"
    """The colour that is seen through transparent pictures, such as "#ffffff"."""
    flip: bool = False
    """Mirror training images at random; features never see mirrored images."""
    train: int = 5000
    """Number of training images; 0 takes all that validation leaves."""
    validation: int = 1000
    """Number of validation images, used as queries; with `validation_folder`, 0 takes
    all of it."""
    seed: int = 42
    """Decides which images are training and which are validation images."""

    def __post_init__(self):
        check_choices("data", self)
        if self.source not in ("digits", "hands") and not self.name:
            required = "a data set's name" if self.source == "tfds" else "a folder"
            raise ValueError(
                f"data.name is empty; data.source={self.source!r} needs {required}."
            )
        if self.groups and self.source == "digits":
            raise ValueError(
                f"data.groups is {self.groups}, but data.source='digits' has none; "
                "groups are columns of a folder's CSV (source 'folder', data.csv) or "
                "features of a tfds data set."
            )
        if self.source == "hands" and self.groups not in ((), ("contributor",)):
            raise ValueError(
                f"data.groups is {self.groups}; data.source='hands' has one column, "
                "'contributor'."
            )
        if self.groups and self.source == "folder" and not self.csv:
            raise ValueError(
                f"data.groups is {self.groups}, but data.csv is empty; name the CSV in "
                "the folder that has these columns, such as data.csv='captions.csv'."
            )
        distinct("data.groups", self.groups)
        distinct("data.labels", self.labels)
        at_least("data.center_crop", self.center_crop, 0)
        check_colour("data.background", self.background)
        at_least("data.train", self.train, 0)
        at_least("data.validation", self.validation, 0)
        seed("data.seed", self.seed)

    @property
    def has_splits(self) -> bool:
        """True if the source keeps training and validation images apart."""
        return self.source in ("tfds", "artbench")
