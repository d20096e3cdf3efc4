"""Retraining on subsets: the ensemble is trained, measured, and written as the truth."""

from collections.abc import Sequence

import numpy as np
from etils import epath

from dtrak_jax import files, locks, parallel, training
from dtrak_jax.config import Config
from dtrak_jax.evaluation import truth
from dtrak_jax.evaluation.outputs import measure, timestep_grid
from dtrak_jax.progress import progress
from dtrak_jax.run import Run


def retrain(run: Run) -> None:
    """Trains the ensemble, or continues or extends it, and measures its losses."""
    settings, images = run.config.ensemble, run.splits.train
    # A wrong setting of the measurement is refused before any model is trained.
    timestep_grid(settings.timesteps, run.schedule)
    how = settings.seed, settings.subsets, settings.fraction
    masks = truth.subset_masks(images.ids, images.strata, *how)
    ensemble = truth.ensemble(masks, settings.seeds)
    train(run, ensemble, member_steps(run.config), "retrain")
    train(run, full_members(run), run.config.train.steps, "train models")
    names = [member.name for member in ensemble]
    measure_members(run, names)
    if parallel.is_main_process() and truth.differing(run):
        losses = [files.read_npz(outputs_path(run, name))["outputs"] for name in names]
        truth.save(run, truth.by_subset(losses, settings.subsets), masks)
    parallel.barrier("retrain")


def is_retrained(run: Run) -> bool:
    """Returns whether the truth is of this config, and all further models are trained."""
    further = are_trained(run, full_members(run), run.config.train.steps)
    return further and not truth.differing(run)


def full_members(run: Run) -> list[training.Member]:
    """Returns the further models that are trained on everything, a seed each."""
    rows = np.arange(len(run.splits.train))
    names = run.config.ensemble.model_names
    return [training.Member(name, rows, seed) for seed, name in enumerate(names)]


def member_steps(config: Config) -> int:
    """Returns the steps of a member: as many epochs as on everything."""
    return max(1, round(config.ensemble.fraction * config.train.steps))


def train(
    run: Run,
    members: Sequence[training.Member],
    steps: int,
    description: str,
    folder: str = "ensemble",
) -> None:
    """Trains members as the run's model was trained, but for their rows and steps."""
    # Images are decoded only where they are needed.
    if not parallel.agreed(are_trained(run, members, steps, folder)):
        locks.claim(run, folder)
        training.train_members(
            run.recipe(steps),
            run.space.training_examples,
            members,
            run.workdir / folder,
            cond=run.space.cond("train"),
            frozen=run.space.frozen,
            per_device=run.config.ensemble.per_device,
            description=description,
        )


def are_trained(
    run: Run, members: Sequence[training.Member], steps: int, folder: str = "ensemble"
) -> bool:
    """Returns whether members have the last checkpoint of so many steps.

    Raises:
      ValueError: there are models that were trained with something else.
    """
    locks.check(run, folder)
    paths = (run.workdir / folder / member.name for member in members)
    return all(training.latest_step(path) == steps for path in paths)


def measure_members(run: Run, names: Sequence[str]) -> None:
    """Writes the losses of every query under every member, ensemble/NAME/outputs.npz."""
    made_from = truth.measured_from(run)
    unmeasured = [
        name
        for name in parallel.of_process(names)
        if not files.holds(outputs_path(run, name), made_from)
    ]
    if unmeasured:
        x, cond = truth.query_inputs(run)
    ids, settings = made_from["query_ids"], run.config.ensemble
    steps, folder = member_steps(run.config), run.workdir / "ensemble"
    groups = parallel.groups(unmeasured)
    for group in progress(groups, "measure", unit="group"):
        params = training.load_members(run.network.init, group, steps, folder)
        network = run.network.apply, run.schedule, params
        losses = measure(*network, x, ids, settings, cond, run.space.frozen)
        for name, outputs in zip(group, losses, strict=True):
            files.write_npz(outputs_path(run, name), outputs=outputs, **made_from)
    parallel.barrier("measure the ensemble")


def outputs_path(run: Run, name: str) -> epath.Path:
    """Returns the file of a member's losses."""
    return run.workdir / "ensemble" / name / "outputs.npz"
