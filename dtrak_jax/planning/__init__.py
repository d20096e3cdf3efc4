"""Plans: memory, arithmetic and time of a run, on devices that need not be there."""

from collections.abc import Collection, Iterable

from etils import epath
from tqdm import tqdm

from dtrak_jax import files
from dtrak_jax.checks import one_of
from dtrak_jax.config import Config, flatten
from dtrak_jax.planning.costs import cost, versions
from dtrak_jax.planning.table import Row, as_text, total
from dtrak_jax.planning.topology import Topology, find
from dtrak_jax.run import Run

__all__ = ["Row", "Topology", "as_text", "find", "plan", "run"]


def run(
    stages: Iterable,
    config: Config,
    topology: Topology,
    names: Collection[str] = (),
    output: epath.PathLike | None = None,
) -> None:
    """Prints a plan, and writes it as JSON where a path is given; see `plan`."""
    rows = plan(stages, config, topology, names)
    print(as_text(rows, topology))
    if output:
        described = {
            "topology": topology.name,
            "kind": topology.kind,
            "devices": len(topology.devices),
            "processes": topology.processes,
            "versions": versions(),
            "config": flatten(config),
            "stages": [row._asdict() for row in rows],
        }
        files.write_json(output, described)


def plan(
    stages: Iterable, config: Config, topology: Topology, names: Collection[str] = ()
) -> list[Row]:
    """Compiles every stage's programs for the devices, and adds up what they take.

    Takes minutes for each program of a large network. Nothing runs, and no training
    image is read.

    Args:
      stages: the rows of `pipeline.STAGES`.
      config: the run's settings.
      topology: the devices, see `find`.
      names: the stages to plan, such as "featurize"; all if there are none.

    Returns:
      A row for each step of a stage; one for each set of examples of featurize.

    Raises:
      ValueError: no stage of that name has programs; or XLA has none for these devices.
    """
    programs = {stage.name: stage.programs for stage in stages if stage.programs}
    for name in names:
        one_of("--stages", name, programs)
    opened = Run(config, None)
    steps = [
        step
        for name, steps_of in programs.items()
        if not names or name in names
        for step in steps_of(opened, topology)
    ]
    # Several steps call the same program.
    called = {id(program): program for step in steps for program in step.programs}
    progress = tqdm(called.items(), desc="compile", unit="program", disable=None)
    costs = {key: cost(program) for key, program in progress}
    return [
        total(step, [costs[id(p)] for p in step.programs], topology.chip)
        for step in steps
    ]
