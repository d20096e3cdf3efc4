"""Training and validation images: sources, preprocessing, splits and subsets."""

from dtrak_jax.data.checks import check_ids, check_images
from dtrak_jax.data.dataset import Dataset, Splits, load
from dtrak_jax.data.preprocess import preprocess, to_picture, to_pixels
from dtrak_jax.data.splits import choose, subset_mask

__all__ = [
    "Dataset",
    "Splits",
    "check_ids",
    "check_images",
    "choose",
    "load",
    "preprocess",
    "subset_mask",
    "to_picture",
    "to_pixels",
]
