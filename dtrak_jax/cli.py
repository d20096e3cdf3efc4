"""The command line: `dtrak-jax STAGE CONFIG --workdir DIR [--section.field VALUE]`."""

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

from dtrak_jax import parallel, pipeline, planning
from dtrak_jax.config import Config
from dtrak_jax.evaluation import stages as evaluation

EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    FloatingPointError,
    MemoryError,
    jax.errors.JaxRuntimeError,
)
"""What needs no traceback: it says itself what is wrong."""

COMMANDS = {
    "run": "the five stages below, in order",
    "train": "train the model on the training images",
    "sample": "generate images with it",
    "featurize": "compute gradient features of training images and queries",
    "attribute": "turn features into scores",
    "report": "write report.html",
    "retrain": "train models on subsets, and measure the queries' losses under them",
    "lds": "how well scores predict those losses; lds.json",
    "counterfactual": "retrain without what scores say matters; counterfactual.json",
    "ablate": "the same for other noises, kernels, timesteps, ...; ablations.json",
    "plan": "what all this takes, on a --topology such as v5e:4x4; runs nothing",
}

MOST_CORES = 8
"""Devices that share the work on one model: each holds a batch and its gradients."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `dtrak-jax`; exits with 2 on an error and 130 on an interrupt.

    An error of one process of several ends the others too, see `parallel.start`.
    """
    if os.environ.get("DTRAK_DISTRIBUTED"):
        parallel.start()
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        stage, config, options = parse(sys.argv[1:] if arguments is None else arguments)
        use_cores(os.cpu_count() if stage in evaluation.STAGES else MOST_CORES)
        keep_compilations()
        if stage == "plan":
            stages = options.stages.split(",") if options.stages else ()
            planning.run(config, options.topology, stages, options.output)
            return
        runner = evaluation if stage in evaluation.STAGES else pipeline
        workdir = runner.run(stage, config, options.workdir)
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or "stopped; the same command continues"
        print(f"dtrak-jax: {said}", file=sys.stderr)
        sys.exit(130)
    except EXPECTED as error:
        if os.environ.get("DTRAK_TRACEBACK"):
            raise
        hint = "DTRAK_TRACEBACK=1 shows where."
        if jax.distributed.is_initialized():
            hint += " Of several processes, the first one that ended says why."
        print(f"dtrak-jax: {error}\n({hint})", file=sys.stderr)
        parallel.abandon(2)
    if stage in ("run", "report") and parallel.is_primary():
        print(f"wrote {workdir / 'report.html'}")


def use_cores(most: int) -> None:
    """One CPU device for each core, unless JAX_NUM_CPU_DEVICES says otherwise.

    An ensemble trains a member on each device. In all other stages two devices do the
    same work faster than one with two threads: many operations have no use for them.
    """
    if jax.config.jax_num_cpu_devices < 0:
        # It is too late where something has used the devices, as in a notebook.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(most, os.cpu_count()))


def keep_compilations() -> None:
    """What is compiled once is read from disk from then on.

    In ~/.cache/dtrak_jax, by host, as programs fit the processor that they were made
    on; unless JAX's own settings name a folder (JAX_COMPILATION_CACHE_DIR) or turn it
    off (JAX_ENABLE_COMPILATION_CACHE=false).
    """
    if jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "dtrak_jax" / platform.node()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def parse(arguments: Sequence[str]) -> tuple[str, Config, argparse.Namespace]:
    """(stage, config, what else was given: workdir, ...) of a command line.

    Raises:
      SystemExit: it is not one; says what is wrong.
      ValueError: a setting is.
    """
    stages = "\n".join(f"  {name:<14} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="dtrak-jax",
        usage="dtrak-jax COMMAND CONFIG --workdir DIR [--section.field VALUE ...]",
        description="Data attribution for diffusion models.",
        epilog=f"commands:\n{stages}\n\nEvery setting of the config is a flag; "
        "`dtrak-jax COMMAND CONFIG --help` lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=not any(argument.endswith(".py") for argument in arguments),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("config", metavar="CONFIG", help="such as configs/digits.py")
    parser.add_argument(
        "--workdir", metavar="DIR", help="the run directory; also gs://BUCKET/FOLDER"
    )
    parser.add_argument("--topology", help="what to plan for; the devices at hand")
    parser.add_argument("--stages", help="what to plan, such as train,featurize; all")
    parser.add_argument("--output", metavar="FILE", help="the plan as JSON")
    known, flags = parser.parse_known_args(arguments)
    default, planned = load_config(known.config), known.command == "plan"
    own = "[--topology T] [--stages S] [--output FILE]" if planned else "--workdir DIR"
    config = tyro.cli(
        Config,
        prog=f"dtrak-jax {known.command} {known.config} {own}",
        default=default,
        args=flags,
        description=f"{COMMANDS[known.command].capitalize()}.",
    )
    if not planned and (known.topology or known.stages or known.output):
        parser.error("--topology, --stages and --output are for `dtrak-jax plan`.")
    if not planned and not known.workdir:
        parser.error("--workdir is missing: name a folder for the results.")
    return known.command, config, known


def load_config(path: str) -> Config:
    """What `get_config()` of a config file returns.

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
