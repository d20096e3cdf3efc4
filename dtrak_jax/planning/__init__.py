"""Plans: memory, arithmetic and time of a run, on devices that need not be there."""

from collections.abc import Collection, Iterable

from etils import epath

from dtrak_jax import files
from dtrak_jax.checks import one_of
from dtrak_jax.config import Config, flatten
from dtrak_jax.models.stable_diffusion import stable_diffusion_1
from dtrak_jax.planning.costs import DISTRIBUTIONS, cost
from dtrak_jax.planning.table import Row, as_text, total
from dtrak_jax.planning.topology import Topology, find
from dtrak_jax.progress import progress
from dtrak_jax.provenance import versions
from dtrak_jax.run import Run

__all__ = ["Row", "Topology", "as_text", "find", "plan", "save"]


def plan(
    stages: Iterable, config: Config, topology: Topology, names: Collection[str] = ()
) -> list[Row]:
    """Compiles every stage's programs for the devices, and adds up what they take.

    Takes minutes for each program of a large network. Nothing runs, and no training
    image is read. Of `pipeline.STAGES` only those with these names are planned, if
    there are any names. A row is a step of a stage, or of a set of examples.
    """
    planned = {stage.name: stage.programs for stage in stages if stage.programs}
    for name in names:
        one_of("--stages", name, planned)
    run, steps = Run(config, None), []
    if config.base.pictures:
        raise ValueError(
            "base.pictures is set: a base that the run trains itself is not planned; "
            "name a base.folder."
        )
    if config.base.folder and not files.at(config.base.folder).exists():
        print(f"Planned for Stable Diffusion 1: there is no {config.base.folder}.")
        run.space.resolved = stable_diffusion_1()
    for name, programs in planned.items():
        if not names or name in names:
            steps += programs(run, topology)
    # Several steps call the same program.
    called = {id(program): program for step in steps for program in step.programs}
    compiled = progress(called.items(), "compile", unit="program")
    costs = {key: cost(program) for key, program in compiled}
    return [
        total(step, [costs[id(p)] for p in step.programs], topology.chip)
        for step in steps
    ]


def save(
    rows: list[Row], config: Config, topology: Topology, path: epath.PathLike
) -> None:
    """Writes a plan as JSON."""
    described = {
        "topology": topology.name,
        "kind": topology.kind,
        "devices": len(topology.devices),
        "processes": topology.processes,
        "versions": versions(DISTRIBUTIONS),
        "config": flatten(config),
        "stages": [row._asdict() for row in rows],
    }
    files.write_json(path, described)
