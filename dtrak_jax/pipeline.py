"""The stages, in the order of the story: from images to a report.

    (base ─► encode ─►) train ─► sample ─► featurize ─► attribute ─► report
                           └───────► retrain ─► lds, counterfactual, ablate ─┘

Only text-to-image has what is in brackets.

A stage reads from the `Run`, makes what is not there yet and writes it to the run
directory; interrupted, it continues. A command makes what it needs first.
"""

import io
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from dtrak_jax import data, feature_sets, files, parallel, score_sets, training
from dtrak_jax.config import Config
from dtrak_jax.encoding.base import is_trained_base, train_base
from dtrak_jax.encoding.encode import are_encoded, encode, encode_sets, is_encoded
from dtrak_jax.evaluation.ablations import ablate
from dtrak_jax.evaluation.counterfactual import counterfactual
from dtrak_jax.evaluation.lds import evaluate
from dtrak_jax.evaluation.retrain import is_retrained, retrain
from dtrak_jax.features import distortion
from dtrak_jax.methods import METHODS
from dtrak_jax.planning import programs, work
from dtrak_jax.planning.programs import Planned
from dtrak_jax.planning.topology import Topology
from dtrak_jax.report import page
from dtrak_jax.run import Run
from dtrak_jax.switches import standard

DISTORTION_EXAMPLES = 8
"""Training images whose gradients are compared before and after the projection."""


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
        examples = space.training_examples
        more = {"cond": space.cond("train"), "frozen": space.frozen}
        training.train(recipe, examples, run.workdir, **more)
    space.export(run.params())


def is_trained(run: Run) -> bool:
    """Returns whether the last checkpoint is there, or the model is given."""
    if run.config.is_given:
        return True
    return training.latest_step(run.workdir / "checkpoints") == run.config.train.steps


def sample(run: Run) -> None:
    """Generates images: samples/00000.png, ..., and all of them in samples.npz.

    Each process generates its share, and writes these pictures.
    """
    if parallel.agreed(has_samples(run)):
        return
    count, share = len(run.seeds), parallel.share(len(run.seeds))
    # All processes load the model together.
    model = run.params_digest()
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
        saved = {"images": pixels, "ids": ids, "seeds": run.seeds, "model": model}
        if run.space.prompts is not None:
            saved["prompts"] = run.space.prompts
        files.write_npz(run.samples, **saved)
    parallel.barrier("sample")
    encode_sets(run, run.sampled_sets)


def has_samples(run: Run) -> bool:
    """Returns whether the samples are there and of this model, or there are to be none."""
    if not run.is_sampled:
        return True
    if not run.samples.exists():
        return False
    # Samples of an older format do not say which model made them.
    model = files.read_npz(run.samples).get("model", run.params_digest())
    return str(model) == run.params_digest() and are_encoded(run, run.sampled_sets)


def featurize(run: Run) -> None:
    """Computes all gradient features that the methods need: features/."""
    for feature_set in feature_sets.wanted(run):
        feature_sets.featurize(run, feature_set)
    measure_distortion(run)


def is_featurized(run: Run) -> bool:
    """Returns whether all features are there, and of this model and these images."""
    return all(feature_sets.is_made(run, s) for s in feature_sets.wanted(run))


def measure_distortion(run: Run) -> None:
    """Compares inner products before and after the projection: distortion.json."""
    settings, examples = run.config.features, run.splits.train
    path = run.workdir / "features" / "distortion.json"
    if settings.projection == "none" or len(examples) < 2:
        return
    if parallel.agreed(path.exists()):
        return
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
    if parallel.is_main_process():
        files.write_json(path, {k: v._asdict() for k, v in errors.items()})


def attribute(run: Run) -> None:
    """Turns features into scores of every method: scores/METHOD-QUERIES.npz."""
    for method, queries in score_sets.wanted(run):
        run.scores(method, queries)


def is_attributed(run: Run) -> bool:
    """Returns whether all scores are there, and of these features and this damping."""
    return all(score_sets.is_made(run, *names) for names in score_sets.wanted(run))


def report(run: Run) -> None:
    """Writes report.html, from whatever the other stages left."""
    content = page(run).encode()
    if parallel.is_main_process():
        files.write_bytes(run.workdir / "report.html", content)


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
    Stage("encode", always("base"), encode, is_encoded),
    Stage("train", always("encode"), train, is_trained, programs.train),
    Stage("sample", always("train"), sample, has_samples, programs.sample),
    Stage("retrain", always("sample"), retrain, is_retrained, programs.retrain),
    Stage("featurize", features_need, featurize, is_featurized, programs.featurize),
    Stage("attribute", scores_need, attribute, is_attributed, programs.attribute),
    Stage("lds", always("attribute", "retrain"), evaluate),
    Stage("counterfactual", always("attribute"), counterfactual),
    Stage("ablate", always("retrain"), ablate),
    Stage("report", always("attribute"), report),
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

    Raises:
      ValueError: the run directory is of another config, or settings and data do not
        fit together; says what would be right.
    """
    opened = Run.open(config, workdir)
    *before, last = needed("report" if command == "run" else command, config)
    stages = missing(opened, before)
    announce(command, opened, stages, last)
    for stage in (*stages, last):
        stage.body(opened)
        parallel.barrier(stage.name)
    return opened


def missing(opened: Run, stages: Sequence[Stage]) -> list[Stage]:
    """Returns the stages that are not done, and those that need one of them."""
    incomplete: list[Stage] = []
    for stage in stages:
        stale = {s.name for s in incomplete} & set(stage.needs(opened.config))
        if stale or not parallel.agreed(stage.is_done(opened)):
            incomplete.append(stage)
    return incomplete


def announce(command: str, opened: Run, missing: Sequence[Stage], last: Stage) -> None:
    """Prints what a command makes before its own stage, and about how long all takes."""
    if not missing or not parallel.is_main_process():
        return
    lines = [f"{command} first makes what it needs:"]
    lines += [f"  {s.name}: {work.describe(s.name, opened)}" for s in missing]
    seconds = work.seconds([stage.name for stage in (*missing, last)], opened)
    if seconds:
        took = work.duration(seconds)
        lines.append(f"From nothing, all of it takes about {took} on these devices.")
    # Standard output is for results.
    print(*lines, sep="\n", file=sys.stderr)
