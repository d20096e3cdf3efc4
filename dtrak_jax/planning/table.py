"""A plan as text."""

from typing import NamedTuple

from dtrak_jax.planning.topology import Topology


class Row(NamedTuple):
    """What a stage takes."""

    stage: str
    step: str
    """What is done at a time."""
    devices: int
    """On which a step runs; processes share the steps where it is one process's."""
    memory: int
    """Bytes on each device at the peak."""
    fits: bool | None
    """Whether a device has that much; None where this is not known."""
    flops: float | None
    """Of a step, on each device; None where the compiler found too little memory."""
    bytes: float | None
    """Read and written in a step, on each device."""
    steps: int
    """Of the process that has the most."""
    seconds: float | None
    """Of the stage at peak rates; None where these are not known."""
    useful: float | None
    """Arithmetic of plain gradients of the same noised images, over that of a step."""
    collectives: dict[str, list[float]]
    """{kind: [count, bytes on each device]} of a step."""
    written: int
    """Bytes, by all processes."""
    stored: int
    """Bytes of these that stay."""


ASSUMPTIONS = """\
Compiled for these devices and not run: planned, not measured. Memory is what XLA
reserves; a gradient step and the projection before it are both there. Arithmetic and
bytes are XLA's counts, bodies of loops times their trips; bytes are those of all
operations, also where they stay on the chip. Hours are at the chip's published peak
rates, each program at the slower of its arithmetic and its bytes: a bfloat16 product
for each of float32 (what JAX does on a TPU by default), six at precision "highest", all
else at the rate of products (random numbers of a dense projection take several times
as long); no time for the host, input, compiling, checkpoints or communication. A real
run takes longer."""


def as_text(rows: list[Row], topology: Topology) -> str:
    """The rows, their total and what they assume."""
    chip = topology.chip
    known = "of unknown memory and rates; no hours"
    if chip:
        known = (
            f"{chip.memory / 2**30:.0f} GiB, {chip.flops / 1e12:.0f} Tflop/s, "
            f"{chip.bandwidth / 1e9:.0f} GB/s each"
        )
    lines = [
        f"{topology.name}: {topology.described}; {known}",
        "",
    ]
    heads = (
        *("stage", "devices", "GiB", "fits", "Gflop/step", "GB/step", "steps"),
        *("hours", "useful", "written", "stored", "collectives in a step"),
    )
    cells = [heads, *map(_cells, rows), _total(rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *others = (
            cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    steps = [f"{row.stage}: a step is {row.step}" for row in rows]
    return "\n".join([*lines, "", *steps, "", ASSUMPTIONS])


def _cells(row: Row) -> tuple[str, ...]:
    collectives = ", ".join(
        f"{count:.0f} {kind} ({_size(size)})"
        for kind, (count, size) in row.collectives.items()
    )
    return (
        row.stage,
        str(row.devices),
        f"{row.memory / 2**30:.2f}",
        {True: "yes", False: "NO", None: "?"}[row.fits],
        _number(row.flops, 1e9),
        _number(row.bytes, 1e9),
        str(row.steps),
        _number(row.seconds, 3600),
        "" if row.useful is None else f"{row.useful:.0%}",
        _size(row.written),
        _size(row.stored),
        collectives or "none",
    )


def _total(rows: list[Row]) -> tuple[str, ...]:
    seconds = [row.seconds for row in rows]
    hours = "?" if None in seconds else _number(sum(seconds), 3600)
    written = _size(sum(row.written for row in rows))
    stored = _size(sum(row.stored for row in rows))
    return ("total", *[""] * 6, hours, "", written, stored, "")


def _number(value: float | None, unit: float) -> str:
    return "?" if value is None else f"{value / unit:.3g}"


def _size(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"
