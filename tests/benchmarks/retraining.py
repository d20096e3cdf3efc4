"""Retraining an ensemble, members per hour, against PyTorch one after another.

Ours is `train_members` as `dtrak-jax retrain` calls it, a member on each core, with
its checkpoints. Theirs trains as many diffusers UNets with the same optimiser and
batches, on all cores, and saves each.
"""

import itertools
import tempfile
from pathlib import Path

import jax
import numpy as np

from dtrak_jax import models, training
from dtrak_jax.models import convert
from dtrak_jax.streams import fold_in, stream
from dtrak_jax.training.batches import batch
from dtrak_jax.training.ensemble import Member
from dtrak_jax.training.loop import TrainState, init_state, train_step
from tests.benchmarks import peers
from tests.benchmarks.rows import Row, in_turn
from tests.benchmarks.workload import Workload, digits

CHECKED_STEPS = 3
