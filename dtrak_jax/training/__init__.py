"""Training, and the checkpoints it leaves."""

from dtrak_jax.training.batches import batch
from dtrak_jax.training.loop import TrainState, load_params, train

__all__ = ["TrainState", "batch", "load_params", "train"]
