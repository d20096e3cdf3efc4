"""The command line: `dtrak-jax COMMAND CONFIG --workdir DIR [--section.field VALUE]`."""

import argparse
import contextlib
import logging
import os
import platform
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from dtrak_jax import methods, parallel, pipeline, planning
from dtrak_jax.config import Config

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

PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=1000000"
"""XLA's flag of how long CPU devices wait for each other; jaxlib 0.10 to 0.12 have it."""

MOST_CORES = 8
"""Devices that share the work on one model: each holds a batch and its gradients."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; exits with 2 on an error and 130 on an interrupt.

    An error of one process of several ends the others too, see `parallel.start`.
    """
    if os.environ.get("DTRAK_DISTRIBUTED"):
        parallel.start()
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        execute(*parse(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "stopped; the same command continues"
        print(f"dtrak-jax: {message}", file=sys.stderr)
        sys.exit(130)
    except EXPECTED as error:
        if os.environ.get("DTRAK_TRACEBACK"):
            raise
        hint = "DTRAK_TRACEBACK=1 shows where."
        if jax.distributed.is_initialized():
            hint += " Of several processes, the first one that ended says why."
        print(f"dtrak-jax: {error}\n({hint})", file=sys.stderr)
        parallel.abandon(2)


def execute(command: str, config: Config | None, options: argparse.Namespace) -> None:
    """Runs a parsed command."""
    if command == "methods":
        print(methods.table())
        return
    use_cores(os.cpu_count() if command in ENSEMBLE else MOST_CORES)
    keep_compilations()
    if command == "plan":
        names = options.stages.split(",") if options.stages else ()
        topology = planning.find(options.topology)
        rows = planning.plan(pipeline.STAGES, config, topology, names)
        print(planning.as_text(rows, topology))
        if options.output:
            planning.save(rows, config, topology, options.output)
        return
    profile = jax.profiler.trace(options.profile) if options.profile else None
    with profile or contextlib.nullcontext():
        run = pipeline.run(command, config, options.workdir)
    if command in ("run", "report") and parallel.is_main_process():
        print(f"wrote {run.workdir / 'report.html'}")


def use_cores(most: int) -> None:
    """Makes a CPU device of each core, unless JAX_NUM_CPU_DEVICES says otherwise.

    An ensemble trains a member on each device. In all other stages two devices do the
    same work faster than one with two threads: many operations have no use for them.
    They wait for each other however busy the machine is, where XLA by itself would end
    the process after a minute.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if PATIENCE.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {PATIENCE}".strip()
    if jax.config.jax_num_cpu_devices < 0:
        # It is too late where something has used the devices, as in a notebook.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(most, os.cpu_count()))


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
    """Returns (command, config, further options such as workdir) of a command line.

    Raises:
      SystemExit: it is no command line; says what is wrong.
      ValueError: a setting is wrong.
    """
    parser = _parser(with_help=not any(a.endswith(".py") for a in arguments))
    options, flags = parser.parse_known_args(arguments)
    command, usage = options.command, "--workdir DIR"
    if command == "methods":
        if flags or options.config:
            parser.error("methods takes no config and no settings.")
        return command, None, options
    if not options.config:
        parser.error("CONFIG is missing: name a file such as configs/digits.py.")
    if command == "plan":
        usage = "[--topology T] [--stages S] [--output FILE]"
    config = tyro.cli(
        Config,
        prog=f"dtrak-jax {command} {options.config} {usage}",
        default=load_config(options.config),
        args=flags,
        description=COMMANDS[command],
    )
    if command != "plan" and (options.topology or options.stages or options.output):
        parser.error("--topology, --stages and --output are for `dtrak-jax plan`.")
    if command != "plan" and not options.workdir:
        parser.error("--workdir is missing: name a folder for the results.")
    return command, config, options


def _parser(with_help: bool) -> argparse.ArgumentParser:
    """Returns the parser of everything but the config's settings."""
    commands = "\n".join(f"  {name:<15} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="dtrak-jax",
        usage="dtrak-jax COMMAND CONFIG --workdir DIR [--section.field VALUE ...]",
        description="Data attribution for diffusion models.",
        epilog=f"commands:\n{commands}\n\nEach makes what it needs first. Every setting "
        "of the config is a flag; `dtrak-jax COMMAND CONFIG --help` lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=with_help,
    )
    add = parser.add_argument
    add("command", choices=COMMANDS, metavar="COMMAND")
    add("config", metavar="CONFIG", nargs="?", help="such as configs/digits.py")
    add("--workdir", metavar="DIR", help="the run directory; also gs://BUCKET/FOLDER")
    add("--profile", metavar="DIR", help="write a trace of the JAX profiler there")
    add("--topology", help="what to plan for; the devices at hand")
    add("--stages", help="what to plan, such as train,featurize; all")
    add("--output", metavar="FILE", help="the plan as JSON")
    return parser


def load_config(path: str) -> Config:
    """Returns what `get_config()` of a config file returns.

    Raises:
      FileNotFoundError: there is no such file.
      TypeError: it has no get_config, or that returns something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {path}.")
    module = runpy.run_path(path)
    config = module["get_config"]() if "get_config" in module else None
    if not isinstance(config, Config):
        raise TypeError(
            f"{path} must define get_config() that returns a dtrak_jax Config."
        )
    return config
