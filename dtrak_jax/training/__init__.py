"""Training, retraining ensembles, and the checkpoints they leave."""

from dtrak_jax.training.checkpoint import latest_step
from dtrak_jax.training.config import TrainConfig, kept_steps, saved_steps
from dtrak_jax.training.ensemble import Member, load_members, train_members
from dtrak_jax.training.loop import load_params, train
from dtrak_jax.training.programs import planned_member_step, planned_step
from dtrak_jax.training.step import Recipe, abstract_params, batch, mirror

__all__ = [
    "Member",
    "Recipe",
    "TrainConfig",
    "abstract_params",
    "batch",
    "kept_steps",
    "latest_step",
    "load_members",
    "load_params",
    "mirror",
    "planned_member_step",
    "planned_step",
    "saved_steps",
    "train",
    "train_members",
]
