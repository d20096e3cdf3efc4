"""Training, retraining ensembles, and the checkpoints they leave."""

from dtrak_jax.training.batches import batch
from dtrak_jax.training.ensemble import Member, load_members, train_members
from dtrak_jax.training.loop import TrainState, kept_steps, load_params, train

__all__ = [
    "Member",
    "TrainState",
    "batch",
    "kept_steps",
    "load_members",
    "load_params",
    "train",
    "train_members",
]
