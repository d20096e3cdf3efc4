"""The checks of each stage before a command writes anything.

Every function takes the run and raises the error that the stage itself would raise later,
from settings, names of files and shapes. Training images are decoded where their files
were written since an earlier stage, or where settings changed that may decide their pixels.
"""

import warnings
from collections.abc import Sequence

from dtrak_jax import feature_sets, files, host, locks
from dtrak_jax.attribution.scoring import OUTPUTS
from dtrak_jax.checks import seed
from dtrak_jax.encoding.clip import Clip
from dtrak_jax.evaluation import ablations, counterfactual
from dtrak_jax.evaluation.arms import arms
from dtrak_jax.evaluation.outputs import timestep_grid
from dtrak_jax.evaluation.truth import MIN_SUBSETS, check_fraction
from dtrak_jax.features.gradients import variables
from dtrak_jax.features.layers import groups_of
from dtrak_jax.features.projection import warn_of_dim
from dtrak_jax.methods import METHODS
from dtrak_jax.models import INDEX
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.lora import targets
from dtrak_jax.planning import footprint
from dtrak_jax.planning.footprint import Footprint
from dtrak_jax.run import Run
from dtrak_jax.training import TrainConfig, checkpoint, metagradient
from dtrak_jax.training.step import learning_rate


def data(run: Run) -> None:
    """Checks the pictures, the queries that are given, and CLIP."""
    # What an earlier stage has seen must still be there.
    train, validation = run.recorded or run.chosen
    given = {"train": train, "validation": validation}
    if run.config.queries.folder:
        given["generated"] = run.generated
        # They are decoded now, not after training.
        run.generated.digest  # noqa: B018
    if run.config.clip.folder:
        Clip.from_folder(run.config.clip.folder)
    for name, images in given.items():
        if len(images):
            run.space.check_conditions(images, name)


def has_network(run: Run) -> bool:
    """Returns whether the network is known, which a base that is not trained decides."""
    return not run.config.base.pictures or (run.space.folder / INDEX).exists()


def model(run: Run) -> None:
    """Checks the network, its weights if it is given, and the base of text-to-image."""
    locks.check(run, locks.BASE)
    if has_network(run):
        run.param_shapes  # noqa: B018
        if run.config.is_given:
            run.params()


def train(run: Run) -> None:
    """Checks the settings of training, and that what is trained belongs to them."""
    if run.config.is_given:
        return
    learning_rate(run.config.train)
    locks.check(run, "checkpoints")
    if run.config.base.folder:
        check_rank(run)


def check_rank(run: Run) -> None:
    """Warns of adapters with more columns than their layer has."""
    rank = run.config.lora.rank
    layers = targets(run.config.lora, parameter_shapes(run.space.pipeline.unet))
    narrow = {path: min(sizes) for path, sizes in layers.items() if min(sizes) < rank}
    if narrow:
        path, width = min(narrow.items(), key=lambda item: item[1])
        warnings.warn(
            f"lora.rank is {rank}, more than the {width} channels of {path}: adapters of "
            "a higher rank can do no more than those of that rank.",
            stacklevel=2,
        )


def sample(run: Run) -> None:
    """Checks the settings of sampling."""
    settings = run.config.sample
    if not run.is_sampled:
        return
    for name in ("prompts", "labels"):
        number = len(getattr(settings, name))
        if number > settings.count:
            raise ValueError(
                f"sample.{name} has {number} {name} and sample.count is "
                f"{settings.count}; there must be an image or more for each of them."
            )
    if settings.prompts and not run.config.is_latent:
        raise ValueError(
            f"sample.prompts is {settings.prompts}, but the model takes no prompts: "
            "base.folder is empty and base.pictures 0. Leave the prompts out."
        )
    if has_network(run):
        run.space.sampler  # noqa: B018
        if not run.config.is_latent:
            # Its labels must be classes of the model.
            run.space.generated_columns  # noqa: B018


def featurize(run: Run) -> None:
    """Checks that every task can be made, that groups of layers have each parameter once,
    and of kept steps that they were kept."""
    if not has_network(run):
        return
    for folder in feature_sets.folders(run.config):
        try:
            for features in feature_sets.sets(run, folder):
                p = sum(
                    leaf.size for leaf in variables(features.task, run.param_shapes, {})
                )
                groups_of(features.task, run.param_shapes, features.layers)
        except ValueError as error:
            raise ValueError(f"features.{error}") from error
        if folder.startswith("checkpoints/") and not run.config.is_given:
            check_kept(run, int(folder.partition("/")[2]))
    warn_of_dim(features.projection, p)


def check_kept(run: Run, step: int) -> None:
    """Raises a ValueError if training has passed a step without keeping it."""
    steps = checkpoint.steps(run.workdir / "checkpoints")
    if step not in steps and max(steps, default=0) > step:
        raise ValueError(
            f"train.checkpoints is {run.config.train.checkpoints}, but training has "
            f"passed step {step} and did not keep it; the steps that are there are "
            f"{sorted(steps)}."
        )


def attribute(run: Run) -> None:
    """Checks that there are as many subsets as a method that learns from them needs, and
    memory for metagradients."""
    learnt = [name for name in run.config.methods if METHODS[name].inputs is OUTPUTS]
    if learnt:
        check_subsets(run, f"method {learnt[0]!r}")
    if has_network(run) and any(METHODS[name].replays for name in run.config.methods):
        size = metagradient.state_bytes(run.network.init, run.config.train)
        queries = sum(run.query_counts.values())
        timestep_grid(run.config.ensemble.timesteps, run.schedule)
        metagradient.check(run.config.train, queries, size, run.counts["train"])


def retrain(run: Run) -> None:
    """Checks the subsets and the measurement of losses."""
    settings, n = run.config.ensemble, len(run.chosen.train)
    if has_network(run):
        timestep_grid(settings.timesteps, run.schedule)
    locks.check(run, "ensemble")
    check_fraction("ensemble.fraction", settings.fraction, n)
    members, whole = settings.subsets * settings.seeds, settings.models
    check_recipe(run, members + whole, members * settings.fraction + whole)


def check_recipe(run: Run, models: int, trainings: float) -> None:
    """Raises a ValueError unless it is said how a given model was trained, or warns of it.

    Args:
      models: the number of models that are to be trained in the same way.
      trainings: the steps of all of them, in units of one training on all images.
    """
    train = run.config.train
    if not run.config.is_given:
        return
    if not train.steps:
        settings = locks.deciding(run.config, ("train",))
        del settings["train.steps"]
        others = ", ".join(f"{name}={value}" for name, value in settings.items())
        usual = TrainConfig().steps
        raise ValueError(
            f"{models} models are to be trained as the given one was, which its files do "
            "not tell: name its train.steps (--train.steps N). Unless they are named too, "
            f"the other settings are {others} (--help train). The {models} models take "
            f"{trainings:g} times train.steps in all: {trainings * usual:,.0f} steps if it "
            f"was trained for {usual:,}."
        )
    warnings.warn(
        f"Models are trained from nothing by `train`, {train.steps:,} steps of "
        f"{train.batch_size} images with learning rate {train.learning_rate:g}: they "
        "tell of the given model only if it was trained so.",
        stacklevel=2,
    )


def lds(run: Run) -> None:
    """Checks that there are as many subsets as an interval needs."""
    check_subsets(run, "the LDS")


def check_subsets(run: Run, what: str) -> None:
    """Raises a ValueError unless there are as many subsets as an interval needs."""
    subsets = run.config.ensemble.subsets
    if subsets < MIN_SUBSETS:
        raise ValueError(
            f"ensemble.subsets is {subsets}; {what} needs at least {MIN_SUBSETS}."
        )


def removal(run: Run) -> None:
    """Checks how many training images counterfactuals remove, and which models."""
    counterfactual.check(run)
    queries = min(run.config.counterfactual.queries, run.config.sample.count)
    # A model for each choice and query, one without random images, and two controls.
    models = queries * (len(run.config.removal_methods) + 1) + 2
    check_recipe(run, models, models)
    locks.check(run, "counterfactual")


def ablate(run: Run) -> None:
    """Checks the timesteps and seeds of all arms."""
    check_subsets(run, "an ablation")
    if run.config.is_given and "checkpoint" in run.config.ablation.studies:
        raise ValueError(
            "ablation.studies has 'checkpoint', but the model is given and has no "
            "checkpoints of training; leave it out."
        )
    for spec in {arm.spec for arm in arms(run.config)} if has_network(run) else ():
        seed("features.seed + ablation.noise_seeds - 1", spec.seed)
        changes = {
            name: getattr(spec, name) for name in ("timesteps", "draws", "noise")
        }
        run.task(measurement=spec.measurements, per_timestep=True, **changes)


def report(run: Run) -> None:
    """Checks that the page can be written."""
    files.check_file("the report", run.workdir / "report.html")


def export(run: Run) -> None:
    """Checks that the export can be written."""
    files.check_folder("the folder of the export", run.workdir / "export")


CHECKS = {
    "base": model,
    "encode": data,
    "train": train,
    "sample": sample,
    "retrain": retrain,
    "featurize": featurize,
    "attribute": attribute,
    "lds": lds,
    "counterfactual": removal,
    "ablate": ablate,
    "report": report,
    "export": export,
}
"""The function that checks a stage."""


def check(run: Run, stage: str) -> None:
    """Raises what a stage would raise of settings and files."""
    CHECKS[stage](run)


def fits(run: Run, stages: Sequence[str]) -> Footprint:
    """Returns the disk and memory that models, features and kernels of stages take.

    Raises:
      MemoryError: this host has too little memory for them.
      OSError: they do not fit the disk of the run directory.
    """
    if not has_network(run):
        return Footprint()
    taken, config = footprint.models(run, stages), run.config
    if "featurize" in stages:
        stores = feature_sets.wanted(run)
        # Where all stages before are done, stores are known that are there already.
        besides_made = stages[0] == "featurize"
        taken = taken.beside(footprint.features(run, stores, besides_made))
    if "attribute" in stages:
        taken = taken.beside(footprint.kernels(run)).beside(footprint.curvature(run))
        taken = taken.beside(footprint.gauss_newton(run))
    if "ablate" in stages:
        specs = {arm.spec for arm in arms(config)}
        names = ("train", *config.query_sets)
        stores = [ablations.store(run, spec, name) for spec in specs for name in names]
        taken = taken.beside(footprint.features(run, stores, stages[0] == "ablate"))
    what = (
        f"models, features and kernels of {len(run.chosen.train)} training images with "
        f"features.timesteps={config.features.timesteps}, features.dim="
        f"{config.features.dim} and ensemble.subsets={config.ensemble.subsets}"
    )
    host.check_fits(what, taken.memory, taken.disk, run.workdir)
    return taken
