"""Training and validation images: sources, preprocessing, splits and subsets."""

from dtrak_jax.data.config import DataConfig
from dtrak_jax.data.corrections import corrections, recorded_texts
from dtrak_jax.data.dataset import Dataset
from dtrak_jax.data.hands import plain_pictures
from dtrak_jax.data.preprocess import (
    Picture,
    from_pixels,
    preprocess,
    to_picture,
    to_pixels,
)
from dtrak_jax.data.remarks import (
    NAMES,
    look_alikes,
    remarks,
    remarks_on_groups,
    trained_on,
)
from dtrak_jax.data.sources import load_images, load_queries, samples
from dtrak_jax.data.splits import Splits, choose, load, subset_mask

__all__ = [
    "NAMES",
    "DataConfig",
    "Dataset",
    "Picture",
    "Splits",
    "choose",
    "corrections",
    "from_pixels",
    "load",
    "load_images",
    "load_queries",
    "look_alikes",
    "plain_pictures",
    "preprocess",
    "recorded_texts",
    "remarks",
    "remarks_on_groups",
    "samples",
    "subset_mask",
    "to_picture",
    "to_pixels",
    "trained_on",
]
