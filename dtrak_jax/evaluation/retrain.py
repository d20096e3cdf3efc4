"""Retraining on subsets: the ensemble is trained, measured, and read as the truth."""

from collections.abc import Sequence

import numpy as np
from etils import epath
from tqdm import tqdm

from dtrak_jax import data, files, parallel, training
from dtrak_jax.config import Config
from dtrak_jax.evaluation.outputs import measure, timestep_grid
from dtrak_jax.evaluation.truth import staleness
from dtrak_jax.network import Params
from dtrak_jax.run import Run


def retrain(run: Run) -> None:
    """Trains the ensemble, or continues or extends it, and measures its losses."""
    # A wrong setting of the measurement is refused before any model is trained.
    timestep_grid(run.config.ensemble.timesteps, run.schedule)
    ensemble = members(run)
    train(run, ensemble, member_steps(run.config), "retrain")
    train(run, full_members(run), run.config.train.steps, "train models")
    _measure(run, [member.name for member in ensemble])
    if parallel.is_main_process() and staleness(run):
        _write_truth(run, ensemble)
    parallel.barrier("retrain")


def is_retrained(run: Run) -> bool:
    """Returns whether the truth is of this config, and all further models are trained."""
    further = are_trained(run, full_members(run), run.config.train.steps)
    return further and not staleness(run)


def members(run: Run) -> list[training.Member]:
    """Returns the ensemble: all subsets with the first seed, then with the next one."""
    rows = [np.flatnonzero(mask) for mask in subset_masks(run)]
    return [
        training.Member(f"{subset:04d}-{seed}", rows[subset], seed)
        for seed in range(run.config.ensemble.seeds)
        for subset in range(run.config.ensemble.subsets)
    ]


def full_members(run: Run) -> list[training.Member]:
    """Returns the further models that are trained on everything, a seed each."""
    rows = np.arange(len(run.splits.train.ids))
    return [
        training.Member(name, rows, seed)
        for seed, name in enumerate(run.config.ensemble.model_names)
    ]


def subset_masks(run: Run) -> np.ndarray:
    """Returns whether a training image is in a subset, bool [subsets, train]."""
    settings, images = run.config.ensemble, run.splits.train
    return np.stack(
        [
            data.subset_mask(
                images.ids, images.labels, settings.seed, subset, settings.fraction
            )
            for subset in range(settings.subsets)
        ]
    )


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
    if parallel.agreed(are_trained(run, members, steps, folder)):
        return
    training.train_members(
        run.recipe(steps),
        run.splits.train.images,
        members,
        run.workdir / folder,
        description=description,
    )


def are_trained(
    run: Run, members: Sequence[training.Member], steps: int, folder: str = "ensemble"
) -> bool:
    """Returns whether members have the last checkpoint of so many steps."""
    paths = (run.workdir / folder / member.name for member in members)
    return all(training.latest_step(path) == steps for path in paths)


def load_members(
    run: Run, names: Sequence[str], steps: int, folder: str = "ensemble"
) -> Params:
    """Returns the parameters of trained members, stacked along a new first axis."""
    return training.load_members(run.init, names, steps, run.workdir / folder)


def _measure(run: Run, names: Sequence[str]) -> None:
    """Writes the losses of every query under every member, ensemble/NAME/outputs.npz."""
    made_from = _described_queries(run) | {
        "settings": np.array(run.config.ensemble.measured)
    }
    unmeasured = [
        name
        for name in parallel.of_process(names)
        if not files.holds(_outputs_path(run, name), made_from)
    ]
    if unmeasured:
        images = np.concatenate([examples.images for examples in run.queries.values()])
    groups = parallel.groups(unmeasured)
    for group in tqdm(groups, "measure", unit="group", disable=None):
        losses = measure(
            run.apply,
            run.schedule,
            load_members(run, group, member_steps(run.config)),
            images,
            made_from["query_ids"],
            run.config.ensemble,
        )
        for name, member_losses in zip(group, losses, strict=True):
            path = _outputs_path(run, name)
            files.write_npz(path, outputs=member_losses, **made_from)
    parallel.barrier("measure the ensemble")


def _write_truth(run: Run, ensemble: Sequence[training.Member]) -> None:
    """Gathers the members' losses in ensemble/outputs.npz."""
    settings = run.config.ensemble
    losses = np.stack(
        [files.read_npz(_outputs_path(run, m.name))["outputs"] for m in ensemble]
    )
    by_seed = losses.reshape(settings.seeds, settings.subsets, -1)
    sizes = [len(examples.ids) for examples in run.queries.values()]
    files.write_npz(
        run.outputs,
        outputs=by_seed.swapaxes(0, 1).astype(np.float32),
        masks=subset_masks(run),
        train_ids=run.splits.train.ids,
        **_described_queries(run),
        query_set=np.repeat(list(run.queries), sizes),
        settings=run.config.ensemble.measured,
    )


def _outputs_path(run: Run, name: str) -> epath.Path:
    return run.workdir / "ensemble" / name / "outputs.npz"


def _described_queries(run: Run) -> dict[str, np.ndarray]:
    """Returns the ids and digests of all queries, one set after the other."""
    sets = run.queries.values()
    return {
        "query_ids": np.concatenate([examples.ids for examples in sets]),
        "query_digests": np.concatenate([examples.digests for examples in sets]),
    }
