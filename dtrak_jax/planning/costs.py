"""What a program takes on each device, by XLA's own account."""

import collections
import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.extend import core
from jax.extend.core import primitives

from dtrak_jax import files
from dtrak_jax.parallel import P, over_mesh

PASSES = 6
"""bfloat16 products that a TPU adds up for a float32 one at precision "highest"."""


DISTRIBUTIONS = ("dtrak-jax", "jax", "jaxlib", "libtpu")
"""Whose versions decide what a program takes."""


class Program(NamedTuple):
    """A compiled function that runs on a mesh, and what it is called with."""

    function: Callable
    """Made by `jax.jit`."""
    arguments: tuple
    """With shapes in place of arrays."""
    mesh: jax.sharding.Mesh


class Cost(NamedTuple):
    """Of one call, on each device."""

    memory: int
    """Bytes at the peak: arguments, results and what is between them."""
    results: int
    """Bytes of the results alone."""
    flops: float | None
    """None, as are the following, where the compiler found too little memory."""
    passes: float | None
    """The same, with products at precision "highest" counted `PASSES` times."""
    bytes: float | None
    """Read and written by all operations, also where that stays on the chip."""
    collectives: dict[str, list[int]]
    """{kind: [count, bytes of their results]}."""


def cost(program: Program) -> Cost:
    """Compiles a program and adds up what it takes.

    XLA counts the body of a loop once. So each `scan`, which is also what JAX makes of
    a `fori_loop` between fixed bounds, has its body compiled as a program of its own,
    and counted for all of its trips.

    Raises:
      ValueError: there is a loop whose number of trips is not known.
    """
    _, total = _once_and_total(program)
    return total


def _once_and_total(program: Program) -> tuple[Cost, Cost]:
    """The cost with every loop run through once, and with all of its trips."""
    traced = program.function.trace(*program.arguments)
    once = _compiled(traced, program.mesh)
    if once.flops is None:
        return once, once
    bodies, highest = [], 0
    for equation in _equations(traced.jaxpr.jaxpr):
        if equation.primitive is primitives.while_p:
            raise ValueError("a `while_loop` has no fixed number of trips to count.")
        if equation.primitive is primitives.dot_general_p:
            highest += (PASSES - 1) * _flops_at_highest(equation)
        if equation.primitive is primitives.scan_p:
            body = _once_and_total(_body(equation, program.mesh))
            bodies.append((equation.params["length"], *body))
            highest += body[0].passes - body[0].flops
    once = total = once._replace(passes=once.flops + highest)
    for trips, body_once, body_total in bodies:
        total = _plus(_plus(total, body_total, trips), body_once, -1)
    return once, total


def _equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """All operations, also those of functions within; not those of loops' bodies."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive is primitives.scan_p:
            continue
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda leaf: isinstance(leaf, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(value, core.ClosedJaxpr):
                value = value.jaxpr
            if isinstance(value, core.Jaxpr):
                yield from _equations(value)


def _body(equation: core.JaxprEqn, mesh: jax.sharding.Mesh) -> Program:
    """The body of a `scan` on its own."""
    body = equation.params["jaxpr"]
    arguments = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in body.in_avals)
    return Program(over_mesh(core.jaxpr_as_fun(body), mesh, P(), P()), arguments, mesh)


def _plus(total: Cost, body: Cost, times: int) -> Cost:
    """The cost of a program, and that of a body so many times."""
    collectives = {k: list(v) for k, v in total.collectives.items()}
    for kind, (count, size) in body.collectives.items():
        before = collectives.get(kind, [0, 0])
        collectives[kind] = [before[0] + times * count, before[1] + times * size]
    collectives = {k: v for k, v in collectives.items() if v[0]}
    return total._replace(
        flops=total.flops + times * body.flops,
        passes=total.passes + times * body.passes,
        bytes=total.bytes + times * body.bytes,
        collectives=collectives,
    )


def _flops_at_highest(equation: core.JaxprEqn) -> int:
    """The arithmetic of a matrix product, if it is to be done in several passes."""
    precision = equation.params["precision"]
    if precision is None or jax.lax.Precision.HIGHEST not in precision:
        return 0
    (summed, _), _ = equation.params["dimension_numbers"]
    lhs, result = equation.invars[0].aval, equation.outvars[0].aval
    return 2 * result.size * math.prod(lhs.shape[axis] for axis in summed)


def _compiled(traced: jax.stages.Traced, mesh: jax.sharding.Mesh) -> Cost:
    """What XLA says of a program, whose loops it runs through once.

    Kept in the folder of JAX's own compilation cache, which cannot read programs for
    devices that are not there.
    """
    lowered = traced.lower()
    about = (
        mesh.devices.flat[0].device_kind,
        _places(mesh),
        list(versions().values()),
    )
    key = hashlib.sha256(f"{about} {lowered.as_text()}".encode()).hexdigest()
    folder = jax.config.jax_compilation_cache_dir
    path = epath.Path(folder) / f"plan-{key}.json" if folder else None
    if path and path.exists():
        return Cost(**files.read_json(path))
    found = _account(lowered)
    if path:
        files.write_json(path, found._asdict())
    return found


def _places(mesh: jax.sharding.Mesh) -> list[tuple[int, ...]]:
    """Where the devices are, seen from the first: alike for a host of any slice."""
    places = [getattr(d, "coords", (d.id,)) for d in mesh.devices.flat]
    return [tuple(np.subtract(place, places[0]).tolist()) for place in places]


def versions() -> dict[str, str]:
    """Of what decides what a program takes, where it is installed."""
    found = {}
    for distribution in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[distribution] = metadata.version(distribution)
    return found


def _account(lowered: jax.stages.Lowered) -> Cost:
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", str(error))
        if not used:
            raise
        size = float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[used[2]]
        return Cost(int(size), 0, None, None, None, {})
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    parts = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Cost(
        memory=max(memory.peak_memory_in_bytes, parts),
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        flops=costs.get("flops", 0.0),
        passes=costs.get("flops", 0.0),
        bytes=costs.get("bytes accessed", 0.0),
        collectives=collectives(compiled.as_text()),
    )


BYTES = {"pred": 1, "bf16": 2, "f16": 2}


def collectives(text: str) -> dict[str, list[int]]:
    """{kind: [count, bytes of their results]} of a compiled program's text."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = collections.defaultdict(lambda: [0, 0])
    for shapes, kind, rest in re.findall(rf" = (.*?) ({kinds})(?:-start)?\((.*)", text):
        if _each_alone(rest):
            continue
        found[kind][0] += 1
        for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
            size = BYTES.get(dtype) or int(re.sub(r"\D", "", dtype)) // 8
            found[kind][1] += size * math.prod(int(d) for d in dims.split(",") if d)
    return dict(found)


def _each_alone(attributes: str) -> bool:
    """Whether every device is a group of its own, as for a mesh axis of size 1."""
    if re.search(r"replica_groups=(?:\{\{\d+\}|\[\d+,1\])", attributes):
        return True
    # As JAX 0.12 says it: mesh['data'=8,'proj'=1] {'proj'}.
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes)
    if not named:
        return False
    sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
    return all(sizes[axis] == "1" for axis in re.findall(r"'\w+'", named[2]))
