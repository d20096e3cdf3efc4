"""The command line: its commands, and how errors and warnings are told."""

import argparse
import contextlib
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import jax

from dtrak_jax import arguments as command_line
from dtrak_jax import files, methods, parallel, pipeline, planning, score_sets
from dtrak_jax.arguments import load_config
from dtrak_jax.config import Config
from dtrak_jax.planning.topology import COMPILER
from dtrak_jax.report.summary import summary

__all__ = ["COMMANDS", "load_config", "main", "parse"]

EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    FloatingPointError,
    MemoryError,
    jax.errors.JaxRuntimeError,
)
"""Errors that need no traceback: they say themselves what is wrong."""

COMMANDS = {
    "run": "Makes everything up to the report: which training images, for each query.",
    **{stage.name: stage.summary for stage in pipeline.STAGES},
    "plan": "Says what all this takes on a --topology such as v5e:4x4; runs nothing.",
    "methods": "Lists the attribution methods; needs no config.",
}

ENSEMBLE = ("retrain", "lds", "counterfactual", "ablate")
"""Commands that may train a model on each device."""

QUIET = [
    "absl",
    "etils",
    "flax",
    "grain",
    "jax",
    "jaxlib",
    "matplotlib",
    "numpy",
    "optax",
    "orbax",
    "scipy",
    "sklearn",
    "tensorflow_datasets",
    "tensorstore",
]
"""Packages whose warnings are for whoever writes programs."""

PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=1000000"
"""XLA's flag of how long CPU devices wait for each other."""

PATIENT = [["0", "10"], ["0", "11"], ["0", "12"]]
"""The versions of jaxlib that have this flag."""

MOST_CORES = 8
"""Devices that share the work on one model: each holds a batch and its gradients."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; exits with 2 on an error and 130 on an interrupt.

    An error of one process of several ends the others too, see `parallel.start`.
    """
    if os.environ.get("DTRAK_DISTRIBUTED"):
        parallel.start()
    logging.getLogger("absl").setLevel(logging.ERROR)
    hint = ""
    try:
        with notes():
            parsed = parse(sys.argv[1:] if arguments is None else arguments)
            hint = "\n(DTRAK_TRACEBACK=1 shows where.)"
            execute(*parsed)
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "stopped; the same command continues"
        print(f"dtrak-jax: {message}", file=sys.stderr)
        sys.exit(130)
    except EXPECTED as error:
        if os.environ.get("DTRAK_TRACEBACK"):
            raise
        if jax.distributed.is_initialized():
            hint += "\n(Of several processes, the first one that ended says why.)"
        print(f"dtrak-jax: {error}{hint}", file=sys.stderr)
        parallel.abandon(2)


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Prints warnings as lines "note: ...", each text once, and none of other packages.

    Python's own -W and PYTHONWARNINGS decide instead, where they are given.
    """
    told: set[str] = set()

    def line(message, category, filename, lineno, line=None) -> str:
        text = " ".join(str(message).split())
        if text in told or not parallel.is_main_process():
            return ""
        told.add(text)
        return f"note: {text}\n"

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            for package in QUIET:
                warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
        usual, warnings.formatwarning = warnings.formatwarning, line
        try:
            yield
        finally:
            warnings.formatwarning = usual


def execute(command: str, config: Config | None, options: argparse.Namespace) -> None:
    """Runs a parsed command."""
    if command == "methods":
        print(methods.table())
        return
    quieten_libtpu()
    use_cores(os.cpu_count() if command in ENSEMBLE else MOST_CORES)
    keep_compilations()
    if options.output:
        files.check_file("--output", options.output)
    if options.profile:
        files.check_folder("--profile", options.profile)
    if command == "plan":
        names = options.stages.split(",") if options.stages else ()
        topology = planning.find(options.topology or None)
        rows = planning.plan(pipeline.STAGES, config, topology, names)
        print(planning.as_text(rows, topology))
        if options.output:
            planning.save(rows, config, topology, options.output)
        return
    profile = jax.profiler.trace(options.profile) if options.profile else None
    with profile or contextlib.nullcontext():
        run = pipeline.run(command, config, options.workdir)
    lines = []
    if command == "attribute":
        made = {pair: run.scores(*pair) for pair in score_sets.wanted(run)}
        lines = summary(made)
    elif command in ("run", "report"):
        lines = [f"wrote {run.workdir / 'report.html'}"]
    for line in lines if parallel.is_main_process() else ():
        print(line)


def use_cores(most: int) -> None:
    """Makes a CPU device of each core, unless JAX_NUM_CPU_DEVICES says otherwise.

    An ensemble trains a member on each device. In all other stages two devices do the
    same work faster than one with two threads: many operations have no use for them.
    They wait for each other however busy the machine is, where XLA by itself would end
    the process after a minute.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    # XLA ends a process over a flag that it does not know.
    known = metadata.version("jaxlib").split(".")[:2] in PATIENT
    if known and PATIENCE.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {PATIENCE}".strip()
    if jax.config.jax_num_cpu_devices < 0:
        # It is too late where something has used the devices, as in a notebook.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(most, os.cpu_count()))


def quieten_libtpu() -> None:
    """Keeps libtpu, which planning needs, from printing errors where there is no TPU."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    google = "0x1ae0"
    # JAX, too, looks for a TPU by the vendor, unless it is told the platform.
    if jax.config.jax_platforms or google in {v.read_text().strip() for v in vendors}:
        return
    for variable, value in COMPILER.items():
        os.environ.setdefault(variable, value)


def keep_compilations() -> None:
    """Has JAX keep what it compiles on disk, and read it from there.

    The folder is ~/.cache/dtrak_jax/HOST, as programs fit the processor that they were
    made on; unless JAX's own settings name a folder (JAX_COMPILATION_CACHE_DIR) or turn
    it off (JAX_ENABLE_COMPILATION_CACHE=false).
    """
    if jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "dtrak_jax" / platform.node()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def parse(arguments: Sequence[str]) -> tuple[str, Config | None, argparse.Namespace]:
    """Returns (command, config, options) of a command line; see `arguments.parse`."""
    return command_line.parse(arguments, COMMANDS)


if __name__ == "__main__":
    main()
