"""The memory and arithmetic of a program on each device, by XLA's own account."""

import hashlib
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.extend import core
from jax.extend.core import primitives

from dtrak_jax import files
from dtrak_jax.parallel import P, Program, sharded
from dtrak_jax.provenance import versions

PASSES = 6
"""A TPU adds up so many bfloat16 products for a float32 one at precision "highest"."""

DISTRIBUTIONS = ("dtrak-jax", "jax", "jaxlib", "libtpu")
"""The packages whose versions decide what a program takes."""

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    "collective-permute",
)
"""The operations in which devices exchange something."""


class Cost(NamedTuple):
    """The cost of a call on each device; counts are None if memory is too small."""

    memory: int  # bytes at the peak: arguments, results and what is between them
    results: int  # bytes of the results alone
    flops: float | None
    passes: float | None  # flops, products at precision "highest" `PASSES` times
    bytes: float | None  # read and written by all operations, also within the chip
    collectives: dict[str, list[int]] | None  # {kind: [count, bytes of their results]}


def cost(program: Program) -> Cost:
    """Compiles a program and adds up what it takes.

    XLA counts the body of a loop once. So each `scan`, which is also what JAX makes of
    a `fori_loop` between fixed bounds, has its body compiled as a program of its own,
    and counted for all of its trips. Loops, and products at precision "highest", must
    be in a `shard_map`: only there are their shapes those of a device.

    Raises:
      ValueError: there is a loop whose number of trips is not known, or XLA has no
        program for these devices.
    """
    return _account_and_cost(program)[1]


def _account_and_cost(program: Program) -> tuple[Cost, Cost]:
    """Returns XLA's account, and that with all trips of all loops and all passes."""
    traced = program.function.trace(*program.arguments)
    account = total = _kept_account(traced, program.mesh)
    if account.flops is None:
        return account, account
    for equation in _equations(traced.jaxpr.jaxpr):
        if equation.primitive is primitives.while_p:
            raise ValueError("a `while_loop` has no fixed number of trips to count.")
        if equation.primitive is primitives.dot_general_p:
            further = (PASSES - 1) * _flops_at_highest(equation)
            total = total._replace(passes=total.passes + further)
        if equation.primitive is primitives.scan_p:
            trips, body = equation.params["length"], _body(equation, program.mesh)
            total = jax.tree.map(
                lambda whole, once, full, trips=trips: whole + trips * full - once,
                *(total, *_account_and_cost(body)),
            )
    return account, total._replace(memory=account.memory, results=account.results)


def _equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Yields all operations, also of inner functions, but not of the bodies of loops."""

    def is_jaxpr(value) -> bool:
        return isinstance(value, core.Jaxpr | core.ClosedJaxpr)

    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive is not primitives.scan_p:
            values = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
            for inner in filter(is_jaxpr, values):
                yield from _equations(getattr(inner, "jaxpr", inner))


def _body(equation: core.JaxprEqn, mesh: jax.sharding.Mesh) -> Program:
    """Returns the body of a `scan` as a program."""
    body = equation.params["jaxpr"]
    arguments = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in body.in_avals)
    return Program(sharded(core.jaxpr_as_fun(body), mesh, P(), P()), arguments, mesh)


def _flops_at_highest(equation: core.JaxprEqn) -> int:
    """Returns the arithmetic of a matrix product that takes several passes, else 0."""
    precision = equation.params["precision"]
    if precision is None or jax.lax.Precision.HIGHEST not in precision:
        return 0
    (summed, _), _ = equation.params["dimension_numbers"]
    lhs, result = equation.invars[0].aval, equation.outvars[0].aval
    return 2 * result.size * math.prod(lhs.shape[axis] for axis in summed)


def _kept_account(traced: jax.stages.Traced, mesh: jax.sharding.Mesh) -> Cost:
    """Returns XLA's account of a program, from the folder of JAX's compilation cache.

    The cache itself cannot read programs for devices that are not there. Places of
    devices count as seen from the first: they are alike for a host of any slice.
    """
    lowered, devices = traced.lower(), mesh.devices.flat
    places = np.array([getattr(d, "coords", (d.id,)) for d in devices])
    installed = versions(DISTRIBUTIONS)
    about = devices[0].device_kind, (places - places[0]).tolist(), installed
    key = hashlib.sha256(f"{about} {lowered.as_text()}".encode()).hexdigest()
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        return _account(lowered, mesh)
    path = epath.Path(folder) / f"plan-{key}.json"
    if not path.exists():
        files.write_json(path, _account(lowered, mesh)._asdict())
    return Cost(**files.read_json(path))


def _account(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> Cost:
    """Compiles a program, outside of JAX's cache, and reads what XLA says of it."""
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return Cost(_memory_wanted(error, mesh), 0, None, None, None, None)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)
    memory, counts = compiled.memory_analysis(), compiled.cost_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    flops, size = counts.get("flops", 0.0), counts.get("bytes accessed", 0.0)
    return Cost(
        max(memory.peak_memory_in_bytes, parts + memory.generated_code_size_in_bytes),
        *(results, flops, flops, size, collectives(compiled.as_text())),
    )


def _memory_wanted(error: jax.errors.JaxRuntimeError, mesh: jax.sharding.Mesh) -> int:
    """Returns the bytes of a program for which the compiler found too little memory."""
    if "should include all slice devices" in str(error):
        raise ValueError(
            f"XLA has no program for {mesh.size} chips, those of one host, of so large "
            f"a slice of {mesh.devices.flat[0].device_kind}, only for all of its chips "
            "or for one. Name a smaller --topology (TPU v5e: at most 16 chips), or only "
            "--stages that run on all chips, such as train,attribute."
        ) from error
    used = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", str(error))
    if not used:
        raise error
    return int(float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[used[2]])


def collectives(text: str) -> dict[str, list[int]]:
    """Returns {kind: [count, bytes of their results]} of a compiled program's text."""
    totals = {kind: [0, 0] for kind in KINDS}
    pattern = rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\((.*)"
    for shapes, kind, attributes in re.findall(pattern, text):
        if _each_alone(attributes):
            continue
        totals[kind][0] += 1
        for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
            # All types but "pred" say how many bits they have.
            size = int(re.sub(r"\D", "", dtype) or 8) // 8
            totals[kind][1] += size * math.prod(int(d) for d in dims.split(",") if d)
    return totals


def _each_alone(attributes: str) -> bool:
    """Returns whether every device is a group of its own, as on an axis of size 1."""
    if re.search(r"replica_groups=(?:\{\{\d+\}|\[\d+,1\])", attributes):
        return True
    # JAX 0.12 writes mesh['data'=8,'proj'=1] {'proj'}.
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes)
    if not named:
        return False
    sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
    return all(sizes[axis] == "1" for axis in re.findall(r"'\w+'", named[2]))
