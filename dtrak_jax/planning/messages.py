"""The messages of a command on its stages, before and after, on standard error.

Standard output is for results.
"""

import sys
from collections.abc import Sequence

from dtrak_jax import parallel
from dtrak_jax.files import size_text
from dtrak_jax.planning import work
from dtrak_jax.planning.footprint import Footprint
from dtrak_jax.run import Run

AFTER = {
    "base": ("base", "encode"),
    "encode": ("encoded", "train"),
    "train": ("checkpoints", "sample"),
    "sample": ("samples", "featurize"),
    "retrain": ("ensemble", "lds"),
    "featurize": ("features", "attribute"),
    "attribute": ("scores", "report"),
    "lds": ("lds.json", "report"),
    "counterfactual": ("counterfactual.json", "report"),
    "ablate": ("ablations.json", "report"),
    "report": ("", ""),
    "export": ("export", "report"),
}
"""The place of a stage's artefacts in the run directory, and the command that follows."""

CHECKS = {
    "lds": "measures how far the scores can be trusted",
    "counterfactual": "shows what pictures become without their strongest images",
}
"""The commands that a report is worth more after, and what they do."""


def before(command: str, run: Run, stages: Sequence[str], taken: Footprint) -> None:
    """Prints what a command will do, and what that takes of time, disk and memory."""
    if not parallel.is_main_process():
        return
    lines = [f"  {name}: {work.describe(name, run)}" for name in stages]
    lines = [f"{command} does:", *lines] if len(stages) > 1 else [lines[0].strip()]
    seconds = work.seconds(stages, run)
    if seconds:
        took = work.duration(seconds)
        lines.append(f"From nothing, it takes about {took} here, beside compiling.")
    if taken.disk:
        lines.append(f"What stays on disk takes {size_text(taken.disk)}.")
    if taken.memory:
        memory = size_text(taken.memory)
        lines.append(f"Features and kernels take up to {memory} of memory.")
    print(*lines, sep="\n", file=sys.stderr)


def after(run: Run, stage: str, following: str | None) -> None:
    """Prints where a stage's artefacts are, and what comes next."""
    if not parallel.is_main_process():
        return
    if stage == "report" and not following:
        # Whoever called the command for its report says where that is.
        _after_report(run)
        return
    place, command = AFTER[stage]
    path = run.workdir / place
    made = f"{path} is complete" if path.exists() else "there was nothing to make"
    coming = following or f"`dtrak-jax {command}`"
    print(f"{stage}: {made}; next: {coming}.", file=sys.stderr)


def _after_report(run: Run) -> None:
    """Prints the first of `CHECKS` that is open, and nothing if none is."""
    possible = [name for name in CHECKS if name == "lds" or run.is_sampled]
    command = next((name for name in possible if run.json(name) is None), None)
    if command:
        recipe = (
            ", with `train` (at least --train.steps) as the given model was trained"
        )
        how = recipe if run.config.is_given else ""
        text = f"next: `dtrak-jax {command}` {CHECKS[command]}{how}."
        print(text, file=sys.stderr)
