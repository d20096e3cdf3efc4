"""Retraining an ensemble, members per hour, against PyTorch one after another.

Ours is `train_members` as `dtrak-jax retrain` calls it, a member on each core, with
its checkpoints. Theirs trains as many diffusers UNets with the same optimiser and the
same batches, each on all cores, and saves them.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from dtrak_jax import models, training
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.tensors import to_params
from dtrak_jax.rng import fold_in, stream
from dtrak_jax.training import Member, batch
from tests.benchmarks import peers
from tests.benchmarks.rows import Row, in_turn
from tests.benchmarks.workload import Workload, digits


def measure(small: bool, repetitions: int) -> list[Row]:
    """As many members as there are cores; the digits job's batch, 500 steps."""
    work = digits(small, 32 if small else 1000)
    error = step_error(with_steps(work, 3))
    work = with_steps(work, 5 if small else 500)
    members = subsets(work, len(jax.local_devices()))

    def theirs():
        for member in members:
            network = peers.untrained(work)
            peers.train(network, work, batches(work, member))
            network.save_pretrained(tempfile.mkdtemp())

    return [
        Row(
            name="retraining",
            ours="train_members, one on each core",
            theirs="diffusers UNets one after another, each on all cores",
            goal=("at least", 3),
            settings=work.settings(
                members=len(members),
                steps=work.config.train.steps,
                batch=work.config.train.batch_size,
            ),
            agreement={"parameters after 3 steps": error},
            items=len(members),
            unit="members/hour",
            **in_turn(lambda: ours(work, members), theirs, repetitions),
        )
    ]


def with_steps(work: Workload, steps: int) -> Workload:
    """The same work with another length of training."""
    train = dataclasses.replace(work.config.train, steps=steps)
    return work._replace(config=dataclasses.replace(work.config, train=train))


def subsets(work: Workload, count: int) -> list[Member]:
    """Members on random halves of the images."""
    n = len(work.images)
    rows = [np.random.default_rng(i).permutation(n)[: n // 2] for i in range(count)]
    return [Member(f"member-{i}", r, i) for i, r in enumerate(rows)]


def ours(work: Workload, members: list[Member]) -> Path:
    """Trains the members; returns the folder with their checkpoints."""
    model = models.build(work.config.model)
    folder = Path(tempfile.mkdtemp())
    recipe = training.Recipe(
        models.init_fn(model),
        models.train_apply_fn(model),
        work.schedule,
        work.config.train,
    )
    training.train_members(recipe, work.images, members, folder)
    return folder


def batches(work: Workload, member: Member) -> Iterator[np.ndarray]:
    """The training images of every step, as `train_members` takes them."""
    settings = work.config.train
    for step in range(settings.steps):
        rows, weights = batch(len(member.rows), settings.batch_size, member.seed, step)
        yield member.rows[rows[weights > 0]]


def step_error(work: Workload) -> float:
    """How far apart a few steps from one start, with one noise, leave both sides.

    |theta - theta'| / |theta - theta_0|.
    """
    model = models.build(work.config.model)
    (member,) = subsets(work, 1)
    steps, folder = work.config.train.steps, ours(work, [member])
    trained = training.load_members(models.init_fn(model), [member.name], steps, folder)
    start = models.init(model, stream(member.seed, "init"))
    folder = Path(tempfile.mkdtemp())
    models.to_diffusers(model, start, folder)
    network = peers.unet(work._replace(folder=folder)).train()
    position = {row: i for i, row in enumerate(member.rows)}

    def draw(step, rows, shape):
        key = fold_in(stream(member.seed, "train"), step)
        t, eps = [], []
        for row in rows:
            t_key, eps_key, _ = jax.random.split(fold_in(key, 1, position[row]), 3)
            t.append(int(jax.random.randint(t_key, (), 0, work.schedule.steps)))
            noise = jax.random.normal(eps_key, work.images.shape[1:])
            eps.append(np.asarray(noise).transpose(2, 0, 1))
        return peers.torch.tensor(t), peers.torch.from_numpy(np.stack(eps))

    peers.train(network, work, batches(work, member), draw)
    tensors = {n: p.detach().numpy() for n, p in network.named_parameters()}
    theirs = to_params(parameter_shapes(model), tensors, "torch")

    def flat(tree, index=...):
        leaves = (np.asarray(leaf)[index] for leaf in jax.tree.leaves(tree))
        return np.concatenate([leaf.ravel() for leaf in leaves])

    moved = np.linalg.norm(flat(theirs) - flat(start))
    error = float(np.linalg.norm(flat(trained, 0) - flat(theirs)) / moved)
    assert error < 0.02, f"the same steps lead elsewhere, by {error:.1e}"
    return error
