"""A plan's rows, and the rows as text."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from dtrak_jax.files import size_text
from dtrak_jax.planning.costs import Cost
from dtrak_jax.planning.programs import Planned
from dtrak_jax.planning.topology import Chip, Topology

ASSUMPTIONS = """\
Compiled for these devices and not run: planned, not measured. Memory is what XLA
reserves; a gradient step and the projection before it are both there. Arithmetic and
bytes are XLA's counts, bodies of loops times their trips; bytes are those of all
operations, also where they stay on the chip. Hours are at the chip's published peak
rates, each program at the slower of its arithmetic and its bytes: a bfloat16 product
for each of float32 (what JAX does on a TPU by default), six at precision "highest", all
else at the rate of products (random numbers of a dense projection take several times
as long); no time for the host, input, compiling, checkpoints or communication. A real
run takes longer. Not planned: features of kept checkpoints, of further models, by layer
and of sampling trajectories, and the stages counterfactual and ablate."""


class Row(NamedTuple):
    """The cost of a step of a stage."""

    stage: str
    step: str  # what is done at a time
    devices: int  # those a step runs on; processes share the steps of one process
    memory: int  # bytes on each device at the peak
    fits: bool | None  # whether a device has that much; None if this is not known
    flops: float | None  # of a step on each device; None if memory was too small
    bytes: float | None  # read and written in a step on each device
    steps: int  # of the process that has the most
    seconds: float | None  # of the stage at peak rates; None if these are not known
    useful: float | None  # arithmetic of plain gradients, over that of a step
    collectives: dict[str, list[float]]  # {kind: [count, bytes on a device]} of a step
    written: int  # bytes that all processes write
    stored: int  # bytes of these that stay


def total(step: Planned, costs: Sequence[Cost], chip: Chip | None) -> Row:
    """Adds up the calls of a step, given the costs of its `programs`."""
    counts = [count for _, count in step.calls]
    calls, steps = costs[: len(counts)], counts[-1]

    def mean(*values: float) -> float:
        return sum(v * n for v, n in zip(values, counts, strict=True)) / steps

    memory = max(call.memory for call in calls)
    if step.overlapping:
        # Parts of an averaged gradient are added up: two more of its results.
        sums = 2 * calls[0].results if counts[0] > steps else 0
        memory = sum(call.memory for call in calls) + sums
    fits = None if chip is None else memory <= chip.memory
    flops = size = seconds = useful = None
    collectives = {}
    if any(call.flops is None for call in calls):
        fits = False
    else:
        _, _, flops, _, size, collectives = jax.tree.map(mean, *calls)
        if chip:
            rates = chip.flops, chip.bandwidth
            slower = (max(c.passes / rates[0], c.bytes / rates[1]) for c in calls)
            seconds = steps * mean(*slower)
        if step.plain and costs[-1].flops is not None:
            useful = costs[-1].flops * step.plain[1] / (flops * steps)
    return Row(
        *(step.name, step.step, step.programs[0].mesh.size, memory, fits),
        *(flops, size, steps, seconds, useful),
        {kind: numbers for kind, numbers in collectives.items() if numbers[0]},
        *(step.written, step.stored),
    )


HEADS = (
    *("stage", "devices", "GiB", "fits", "Gflop/step", "GB/step", "steps"),
    *("hours", "useful", "written", "stored", "collectives in a step"),
)


def as_text(rows: list[Row], topology: Topology) -> str:
    """Returns the rows, their total and what they assume, as text."""
    chip, known = topology.chip, "of unknown memory and rates; no hours"
    if chip:
        known = (
            f"{chip.memory / 2**30:.0f} GiB, {chip.flops / 1e12:.0f} Tflop/s, "
            f"{chip.bandwidth / 1e9:.0f} GB/s each"
        )
    seconds = [row.seconds for row in rows]
    hours = None if None in seconds else sum(seconds) / 3600
    sizes = sum(row.written for row in rows), sum(row.stored for row in rows)
    last = ("total", *[""] * 6, _number(hours), "", *map(size_text, sizes), "")
    cells = [HEADS, *map(_cells, rows), last]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *middle, end in cells:
        padded = map(str.rjust, middle, widths[1:])
        lines.append("  ".join([first.ljust(widths[0]), *padded, end]).rstrip())
    steps = [f"{row.stage}: a step is {row.step}" for row in rows]
    return "\n".join([f"{topology}; {known}", "", *lines, "", *steps, "", ASSUMPTIONS])


def _cells(row: Row) -> tuple[str, ...]:
    collectives = ", ".join(
        f"{count:.0f} {kind} ({size_text(size)})"
        for kind, (count, size) in row.collectives.items()
    )
    return (
        *(row.stage, str(row.devices), f"{row.memory / 2**30:.2f}"),
        {True: "yes", False: "NO", None: "?"}[row.fits],
        *(_number(row.flops, 1e9), _number(row.bytes, 1e9), str(row.steps)),
        _number(row.seconds, 3600),
        "" if row.useful is None else f"{row.useful:.0%}",
        *(size_text(row.written), size_text(row.stored), collectives or "none"),
    )


def _number(value: float | None, unit: float = 1) -> str:
    return "?" if value is None else f"{value / unit:.3g}"
