"""What a run takes on devices that need not be there: `dtrak-jax plan`."""

from collections.abc import Collection

from etils import epath
from tqdm import tqdm

from dtrak_jax import files
from dtrak_jax.config import Config, flatten, one_of
from dtrak_jax.planning.costs import Cost, Program, cost, versions
from dtrak_jax.planning.stages import Stage, stages_of
from dtrak_jax.planning.table import Row, as_text
from dtrak_jax.planning.topology import Chip, Topology, find

__all__ = ["Row", "Topology", "as_text", "find", "plan", "run"]


def run(
    config: Config,
    name: str | None,
    stages: Collection[str],
    output: epath.PathLike | None,
) -> None:
    """Prints a plan, and writes it as JSON where a path is given."""
    topology = find(name)
    rows = plan(config, topology, stages)
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


def plan(config: Config, topology: Topology, stages: Collection[str] = ()) -> list[Row]:
    """Compiles every stage's programs for the devices, and adds up what they take.

    Takes minutes for each program of a large network. Nothing runs, and no data is
    read.

    Args:
      config: the run.
      topology: see `find`.
      stages: of which a plan is wanted, such as "featurize"; all if there are none.

    Returns:
      A row for each stage; three for featurize.

    Raises:
      ValueError: the run has no such stage.
    """
    planned = stages_of(config, topology)
    if stages:
        names = [stage.name.partition(" ")[0] for stage in planned]
        for name in stages:
            one_of("--stages", name, list(dict.fromkeys(names)))
        planned = [s for s, name in zip(planned, names, strict=True) if name in stages]
    wanted: dict[int, Program] = {}
    for stage in planned:
        programs = [program for program, _ in stage.calls]
        if stage.plain:
            programs.append(stage.plain[0])
        wanted |= {id(program): program for program in programs}
    costs = {
        name: cost(program)
        for name, program in tqdm(
            wanted.items(), desc="compile", unit="program", disable=None
        )
    }
    return [row(stage, costs, topology.chip) for stage in planned]


def row(stage: Stage, costs: dict[int, Cost], chip: Chip | None) -> Row:
    """Adds up a stage's calls."""
    each = [(costs[id(program)], calls) for program, calls in stage.calls]
    steps = stage.calls[-1][1]
    collectives: dict[str, list[float]] = {}
    for one, calls in each:
        for kind, (count, size) in one.collectives.items():
            before = collectives.get(kind, [0, 0])
            collectives[kind] = [
                before[0] + count * calls / steps,
                before[1] + size * calls / steps,
            ]
    memory = max(one.memory for one, _ in each)
    if stage.together:
        memory = sum(one.memory for one, _ in each)
        # Parts of an averaged gradient are added up: two more of its results.
        memory += 2 * each[0][0].results if each[0][1] > steps else 0
    fits = None if chip is None else memory <= chip.memory
    flops = size = seconds = useful = None
    if all(one.flops is not None for one, _ in each):
        total = sum(one.flops * calls for one, calls in each)
        flops = total / steps
        size = sum(one.bytes * calls for one, calls in each) / steps
        if chip:
            seconds = sum(
                max(one.passes / chip.flops, one.bytes / chip.bandwidth) * calls
                for one, calls in each
            )
        if stage.plain:
            program, calls = stage.plain
            plain = costs[id(program)].flops
            useful = None if plain is None else plain * calls / total
    else:
        fits = False
    return Row(
        stage.name,
        stage.step,
        stage.devices,
        memory,
        fits,
        flops,
        size,
        steps,
        seconds,
        useful,
        collectives,
        stage.written,
        stage.stored,
    )
