"""Training and validation images: sources, preprocessing, splits and subsets."""

from dtrak_jax.data.checks import check_ids, check_images
from dtrak_jax.data.dataset import Dataset, Splits, load
from dtrak_jax.data.preprocess import preprocess
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
]
