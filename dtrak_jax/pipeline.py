"""The stages, in the order of the story: from images to a report.

    (base ─► encode ─►) train ─► sample ─► featurize ─► attribute ─► report, export
                           └───────► retrain ─► lds, counterfactual, ablate ─┘

Only text-to-image has what is in brackets.

A stage reads from the `Run`, makes what is not there yet and writes it to the run
directory; interrupted, it continues. A command makes what it needs first.
"""

import io
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from dtrak_jax import (
    ahead,
    data,
    feature_sets,
    files,
    locks,
    parallel,
    results,
    score_sets,
    training,
)
from dtrak_jax.config import Config
from dtrak_jax.encoding.base import is_trained_base, train_base
from dtrak_jax.encoding.encode import are_encoded, encode, encode_sets, is_encoded
from dtrak_jax.evaluation.ablations import ablate
from dtrak_jax.evaluation.counterfactual import counterfactual
from dtrak_jax.evaluation.lds import evaluate
from dtrak_jax.evaluation.retrain import is_retrained, retrain
from dtrak_jax.features import distortion
from dtrak_jax.methods import METHODS
from dtrak_jax.planning import messages, programs
from dtrak_jax.planning.programs import Planned
from dtrak_jax.planning.topology import Topology
from dtrak_jax.report import of_run, page
from dtrak_jax.report.export import exports
from dtrak_jax.run import Run
from dtrak_jax.switches import standard

DISTORTION_EXAMPLES = 8
"""Training images whose gradients are compared before and after the projection."""

DISTORTION = "features/distortion"
"""The file of what comes of that, without its suffix."""


class Stage(NamedTuple):
    """A row of the table of stages."""

    name: str
    needs: Callable[[Config], tuple[str, ...]]
    """Returns the stages whose artefacts it reads."""
    body: Callable[[Run], None]
    """Makes its artefacts, or what is missing of them, as its docstring says."""
    is_done: Callable[[Run], bool] | None = None
    """Returns whether its artefacts are there, made from what is before it; None for a
    stage that no other needs."""
    programs: Callable[[Run, Topology], list[Planned]] | None = None
    """Returns the compiled programs that it calls on some devices, and how often."""

    @property
    def summary(self) -> str:
        """The work of the stage in one sentence."""
        return self.body.__doc__.splitlines()[0]


def train(run: Run) -> None:
    """Trains the model, or continues: checkpoints/, metrics.jsonl."""
    space, recipe = run.space, run.recipe(run.config.train.steps)
    if not parallel.agreed(is_trained(run)):
        locks.claim(run, "checkpoints")
        examples = space.training_examples
        more = {"cond": space.cond("train"), "frozen": space.frozen}
        training.train(recipe, examples, run.workdir, **more)
    space.export(run.params())


def is_trained(run: Run) -> bool:
    """Returns whether the last checkpoint is there, or the model is given.

    Raises:
      ValueError: there is a model that was trained with something else.
    """
    if run.config.is_given:
        return True
    locks.check(run, "checkpoints")
    return training.latest_step(run.workdir / "checkpoints") == run.config.train.steps


def sample(run: Run) -> None:
    """Generates images: samples/00000.png, ..., and all of them in samples.npz.

    Each process generates its share, and writes these pictures.
    """
    if parallel.agreed(has_samples(run)):
        return
    count, share = len(run.seeds), parallel.share(len(run.seeds))
    # All processes load the model together.
    made_from = locks.samples_made_from(run)
    run.space.prepare_prompts()
    images = run.space.decode(run.generate(run.params(), run.seeds[share]))
    if not np.isfinite(images).all():
        raise FloatingPointError(
            "a generated image has pixels that are not finite; is the model trained?"
        )
    pixels = data.to_pixels(images)
    for i, image in enumerate(pixels, start=share.start):
        buffer = io.BytesIO()
        data.to_picture(image).save(buffer, "png")
        files.write_bytes(run.samples.parent / f"{i:05d}.png", buffer.getvalue())
    # The array is written last: it says that all pictures are there.
    pixels = parallel.gather(pixels, count)
    if parallel.is_main_process():
        ids = np.array([f"generated-{i:05d}" for i in range(count)])
        saved = {"images": pixels, "ids": ids, "seeds": run.seeds} | made_from
        saved |= run.space.generated_columns
        files.write_npz(run.samples, **saved)
        # There may have been more of them before.
        for path in run.samples.parent.glob("*.png"):
            if path.stem.isdecimal() and int(path.stem) >= count:
                path.unlink()
    parallel.barrier("sample")
    encode_sets(run, run.sampled_sets)


def has_samples(run: Run) -> bool:
    """Returns whether samples of this model and settings are there, or are to be none."""
    if not run.is_sampled:
        return True
    # Where there are none, nothing needs to be known of the model.
    made = run.samples.exists() and files.holds(
        run.samples, locks.samples_made_from(run)
    )
    return made and are_encoded(run, run.sampled_sets)


def featurize(run: Run) -> None:
    """Computes all gradient features that the methods need: features/."""
    stores = {}
    for feature_set in feature_sets.wanted(run):
        feature_sets.featurize(run, feature_set)
        name = feature_set.store.removeprefix(f"{feature_sets.place(run)}/")
        stores[name] = str(feature_sets.path(run, feature_set).relative_to(run.workdir))
    if parallel.is_main_process():
        files.write_json(run.workdir / "features" / "stores.json", stores)
    measure_distortion(run)


def is_featurized(run: Run) -> bool:
    """Returns whether all features are there, and of this model and these images."""
    made = all(feature_sets.is_made(run, s) for s in feature_sets.wanted(run))
    return made and has_distortion(run)


def has_distortion(run: Run) -> bool:
    """Returns whether the distortion of these features is there, or cannot be measured."""
    if run.config.features.projection == "none" or run.counts["train"] < 2:
        return True
    path = run.workdir / f"{DISTORTION}.json"
    saved = files.read_json(path) if path.exists() else {}
    return bool(saved) and not results.stale(run, saved.get("made_from", {}))


def measure_distortion(run: Run) -> None:
    """Compares inner products before and after the projection: distortion.json."""
    if parallel.agreed(has_distortion(run)):
        return
    settings, examples = run.config.features, run.splits.train
    first, space = slice(DISTORTION_EXAMPLES), run.space
    errors = distortion(
        run.task(),
        run.params(),
        space.x("train")[first],
        run.projection,
        frozen=space.frozen,
        cond=jax.tree.map(lambda column: column[first], space.cond("train")),
        bounds=space.bounds or (-math.inf, math.inf),
        ids=examples.ids[first],
        batch_size=settings.batch_size,
        proj_devices=settings.proj_devices,
    )
    result = {k: v._asdict() for k, v in errors.items()}
    results.save(run, DISTORTION, result, ["features"])


def attribute(run: Run) -> None:
    """Turns features into scores of every method: scores/METHOD-QUERIES.npz."""
    for method, queries in score_sets.wanted(run):
        run.scores(method, queries)


def is_attributed(run: Run) -> bool:
    """Returns whether all scores are there, and of these features and this damping."""
    return all(score_sets.is_made(run, *names) for names in score_sets.wanted(run))


def report(run: Run) -> None:
    """Writes report.html, from whatever the other stages left."""
    content = page(of_run(run)).encode()
    if parallel.is_main_process():
        files.write_bytes(run.workdir / "report.html", content)


def export(run: Run) -> None:
    """Writes scores, groups and errors for other programs: CSV and JSON in export/.

    What an earlier export left, perhaps of other scores, is removed.
    """
    folder, written = run.workdir / "export", set()
    for name, content in exports(run):
        written.add(name)
        if parallel.is_main_process():
            files.write_bytes(folder / name, content)
    if parallel.is_main_process():
        for path in folder.iterdir():
            if path.suffix in (".csv", ".json") and path.name not in written:
                path.unlink()


def always(*names: str) -> Callable[[Config], tuple[str, ...]]:
    """Returns the needs of a stage that are the same for every config."""
    return lambda config: names


def features_need(config: Config) -> tuple[str, ...]:
    """Returns the needs of featurize: retrained models, where their features count."""
    others = any(f.startswith("models/") for f in feature_sets.folders(config))
    return ("sample", "retrain") if others else ("sample",)


def scores_need(config: Config) -> tuple[str, ...]:
    """Returns the needs of attribute: those of the methods."""
    needs = {name for method in config.methods for name in METHODS[method].needs}
    return ("sample", *sorted(needs))


STAGES = (
    Stage("base", always(), train_base, is_trained_base),
    Stage("encode", always("base"), encode, is_encoded, programs.encode),
    Stage("train", always("encode"), train, is_trained, programs.train),
    Stage("sample", always("train"), sample, has_samples, programs.sample),
    Stage("retrain", always("sample"), retrain, is_retrained, programs.retrain),
    Stage("featurize", features_need, featurize, is_featurized, programs.featurize),
    Stage("attribute", scores_need, attribute, is_attributed, programs.attribute),
    Stage("lds", always("attribute", "retrain"), evaluate),
    Stage("counterfactual", always("attribute"), counterfactual),
    Stage("ablate", always("retrain"), ablate),
    Stage("report", always("attribute"), report),
    Stage("export", always("attribute"), export),
)
"""All stages, each after those that it may need."""


def needed(command: str, config: Config) -> list[Stage]:
    """Returns a stage and all that it needs, in order."""
    names = {command}
    for stage in reversed(STAGES):
        if stage.name in names:
            names.update(stage.needs(config))
    return [stage for stage in STAGES if stage.name in names]


@standard()
def run(command: str, config: Config, workdir: epath.PathLike) -> Run:
    """Runs a stage, once what it needs is there; "run" is everything up to the report.

    All settings and files that these stages need are checked before anything is written.

    Raises:
      ValueError: settings, files and the run directory do not fit together; says what
        would be right.
      MemoryError: features or kernels do not fit the memory.
      OSError: a file is missing, or features do not fit the disk.
    """
    opened = Run.at(config, workdir)
    stages = needed("report" if command == "run" else command, config)
    check(opened, stages)
    *_, last = stages
    # The last one goes through what it has done, however little there is to do.
    undone = missing(opened, stages)
    taken = ahead.fits(opened, [stage.name for stage in undone])
    todo = [*(stage for stage in undone if stage is not last), last]
    messages.before(command, opened, [stage.name for stage in todo], taken)
    opened.record()
    for stage, following in itertools.zip_longest(todo, todo[1:]):
        stage.body(opened)
        parallel.barrier(stage.name)
        messages.after(opened, stage.name, following and following.name)
    return opened


def check(opened: Run, stages: Sequence[Stage]) -> None:
    """Raises the first error that settings or files would lead to, before it is late.

    Warns of what would stop the stages that are likely to follow.
    """
    for stage in stages:
        ahead.check(opened, stage.name)
    names = {stage.name for stage in stages}
    later = {s.name for s in needed("report", opened.config)}
    if "retrain" in names:
        later.add("lds")
    for stage in STAGES if parallel.is_main_process() else ():
        if stage.name in later - names:
            try:
                ahead.check(opened, stage.name)
            except (ValueError, OSError, FloatingPointError) as error:
                text = f"`dtrak-jax {stage.name}` will refuse these settings: {error}"
                warnings.warn(text, stacklevel=3)


def missing(opened: Run, stages: Sequence[Stage]) -> list[Stage]:
    """Returns the stages that are not done, and those that need one of them."""
    incomplete: list[Stage] = []
    for stage in stages:
        stale = {s.name for s in incomplete} & set(stage.needs(opened.config))
        is_last = stage.is_done is None
        if stale or is_last or not parallel.agreed(stage.is_done(opened)):
            incomplete.append(stage)
    return incomplete
