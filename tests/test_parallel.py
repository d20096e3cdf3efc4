"""Several processes do the same as one, share one fate, and lose nothing."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import DIGITS, digits_command, free_port, init, run_arrays

import dtrak_jax as dtrak
from dtrak_jax import cli, files, models, parallel

TESTS = Path(__file__).parent
FLAGS = {
    "data.train": "250",
    "data.validation": "6",
    "train.steps": "60",
    "train.batch-size": "16",
    "train.save-every": "10",
    "train.log-every": "1",
    "sample.count": "6",
    "sample.steps": "5",
    "features.timesteps": "100 300",
    "features.dim": "8",
    "features.batch-size": "2",
    "ensemble.subsets": "16",
    "ensemble.seeds": "1",
    "ensemble.timesteps": "2",
    "ensemble.draws": "1",
    "attribution.methods": "dtrak trak journey-trak",
    "ablation.studies": "checkpoint",
    "ablation.timesteps": "100 300",
    "counterfactual.queries": "1",
    "counterfactual.count": "20",
    "counterfactual.methods": "dtrak",
}
MAIN = ("train", "sample", "featurize", "retrain", "attribute")
EVALUATED = {"lds.json", "ablations.json", "counterfactual.json", "images.npz"}
STAGES = (*MAIN, "lds", "ablate", "counterfactual", "report")

SEVERAL = """
import os, sys
import conftest, jax
from dtrak_jax import cli, models
from dtrak_jax.evaluation import counterfactual
jax.config.update("jax_num_cpu_devices", 1)
models.init_fn = lambda model: conftest.init
models.apply_fn = lambda model: conftest.apply
models.train_apply_fn = lambda model: conftest.train_apply
counterfactual.bottleneck = lambda *_: counterfactual.pixels
for stage in sys.argv[1].split(","):
    cli.main([stage, *sys.argv[2:]])
    # The processes are joined until they end.
    os.environ.pop("DTRAK_DISTRIBUTED", None)
"""
"""Stages one after the other, so that a process starts and compiles once for all; of a
network that compiles fast."""

FULL = 4000
"""Bytes of the longest file on a full disk: less than a chunk of a store."""
SOON = 15
"""Seconds that an error may take from one process to another through a connection."""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts stages in `count` processes with a device each.

    All share what was compiled. Each has a umask of its own, which tells from a file's
    mode who wrote it: see `writer`.
    """
    cache = tmp_path_factory.mktemp("cache")

    def start(count, workdir, *stages, full_disk=False, **changes):
        _, *line = digits_command("", workdir, FLAGS, changes)
        environment = os.environ | {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(map(str, (DIGITS.parent.parent, TESTS))),
        }
        if count > 1:
            environment |= {
                "DTRAK_DISTRIBUTED": "1",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
                "JAX_NUM_PROCESSES": str(count),
            }
        processes = []
        for i in range(count):
            error = workdir.with_name(f"{workdir.name}-{i}.txt").open("w+")
            process = subprocess.Popen(
                [sys.executable, "-c", SEVERAL, ",".join(stages), *line],
                stdout=subprocess.DEVNULL,
                stderr=error,
                env=environment | {"JAX_PROCESS_ID": str(i)},
                umask=2 * i,
            )
            process.error = error
            processes.append(process)
        if full_disk:
            # For the last one: no file may be longer than this.
            limits = (FULL, FULL)
            resource.prlimit(processes[-1].pid, resource.RLIMIT_FSIZE, limits)
        return processes

    return start


def said(process):
    """What a process wrote to its standard error."""
    process.error.seek(0)
    return process.error.read()


def succeed(processes):
    """Waits until all of them are through."""
    codes = [process.wait() for process in processes]
    assert not any(codes), [said(process) for process in processes]


def writer(path):
    """The process that wrote a file."""
    return (0o666 & ~path.stat().st_mode & 0o6) // 2


def await_sign(processes, sign):
    """Waits until sign() is true, while all processes are still at work."""
    deadline = time.time() + 600
    while not sign():
        assert time.time() < deadline
        assert [p.poll() for p in processes] == [None] * len(processes), [
            said(process) for process in processes
        ]
        time.sleep(0.002)


def kill(processes, victim):
    """kill -9 of one of two; returns how long the other one lived on, and its code."""
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.time()
    code = processes[1 - victim].wait(timeout=3 * parallel.TIMEOUT)
    processes[victim].wait()
    return time.time() - killed, code


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """Run directories of all stages, by the number of processes."""
    folder = tmp_path_factory.mktemp("runs")
    for count in (1, 2, 4):
        stages = MAIN if count == 4 else STAGES
        succeed(start(count, folder / str(count), *stages))
    return {count: folder / str(count) for count in (1, 2, 4)}


def artefacts(workdir):
    """Every array that a run directory ends with."""
    _, config, _ = cli.parse(digits_command("run", workdir, FLAGS, {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "init_fn", lambda model: init)
        found = run_arrays(config, workdir)
    for path in [*workdir.glob("*.json"), workdir / "features" / "distortion.json"]:
        found[path.name] = files.read_json(path)
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_equal_one(runs, count):
    """Every artefact, but for rounding."""
    one, several = artefacts(runs[1]), artefacts(runs[count])
    wanted = set(one) if count == 2 else set(one) - EVALUATED
    assert set(several) == wanted
    for name, found in several.items():
        # An LDS is made of ranks, which rounding may exchange.
        tolerance = 1e-2 if name in ("lds.json", "ablations.json") else 1e-6
        a, b = (jax.tree.flatten_with_path(tree)[0] for tree in (one[name], found))
        for (path, ours), (other, theirs) in zip(a, b, strict=True):
            assert path == other
            ours, theirs = np.asarray(ours), np.asarray(theirs)
            if ours.dtype.kind != "f":
                np.testing.assert_array_equal(theirs, ours, f"{name} {path}")
                continue
            largest = max(np.abs(ours).max(initial=0), 0.1)
            np.testing.assert_allclose(
                theirs, ours, rtol=0, atol=tolerance * largest, err_msg=f"{name} {path}"
            )


@pytest.mark.parametrize("count", [2, 4])
def test_each_process_writes_its_own_share(runs, count):
    """And process 0 alone what there is one of."""
    workdir, everyone = runs[count], set(range(count))
    shared = [path for path in workdir.iterdir() if path.is_file()]
    shared += list((workdir / "scores").iterdir())
    for name in ("samples/samples.npz", "ensemble/outputs.npz"):
        shared.append(workdir / name)
    for name in ("distortion.json", "train/metadata.json"):
        shared.append(workdir / "features" / name)
    assert {path: writer(path) for path in shared} == dict.fromkeys(shared, 0)
    for name in ("loss/phi/c/0", "square/phi/c/0", "losses/c/0"):
        written = (workdir / "features" / "train" / name).rglob("*")
        owners = [writer(path) for path in written if path.is_file()]
        assert set(owners) == everyone, (name, owners)
    pictures = sorted((workdir / "samples").glob("*.png"))
    rows = -(-len(pictures) // count)
    assert [writer(p) for p in pictures] == [i // rows for i in range(len(pictures))]
    for subset in range(16):
        written = (workdir / "ensemble" / f"{subset:04d}-0").rglob("*")
        owners = {writer(path) for path in written if path.is_file()}
        assert owners == {subset % count}


def test_killed_processes_lose_nothing(start, runs, tmp_path):
    """kill -9 of either process, a full disk, the same command: bit for bit."""
    workdir = tmp_path / "cut"
    checkpoints, ensemble = workdir / "checkpoints", workdir / "ensemble"

    processes = start(2, workdir, *STAGES)
    await_sign(processes, lambda: any(checkpoints.glob("[1-9]0")))
    seconds, code = kill(processes, 1)
    assert code != 0
    assert seconds < parallel.TIMEOUT + SOON, said(processes[0])
    assert not (checkpoints / "60").exists()

    processes = start(2, workdir, *STAGES, full_disk=True)
    assert processes[1].wait() == 2, said(processes[1])
    failed = time.time()
    assert processes[0].wait() != 0
    assert time.time() - failed < SOON, said(processes[0])
    assert "free space" in said(processes[1])
    with pytest.raises(ValueError, match="examples have no features yet"):
        dtrak.Features.load(workdir / "features" / "train", "loss")

    processes = start(2, workdir, *STAGES)
    await_sign(processes, lambda: any((ensemble / "0001-0").glob("[1-9]0")))
    seconds, code = kill(processes, 0)
    assert code != 0
    assert seconds < SOON, said(processes[1])
    assert not (ensemble / "outputs.npz").exists()

    succeed(start(2, workdir, *STAGES))
    cut, whole = artefacts(workdir), artefacts(runs[2])
    for name, value in whole.items():
        np.testing.assert_equal(cut[name], value, err_msg=str(name))
    assert not list(workdir.rglob("*orbax-checkpoint-tmp*"))


def test_a_death_is_noticed_where_processes_do_not_talk(start, tmp_path):
    """Within the stated time, though the other one would train on for hours."""
    workdir = tmp_path / "run"
    processes = start(2, workdir, "retrain", sample__count="0", train__steps="1000000")
    await_sign(processes, lambda: any(workdir.glob("ensemble/0000-0/[1-9]0")))
    seconds, code = kill(processes, 1)
    assert code == -signal.SIGABRT
    assert seconds < parallel.TIMEOUT + SOON
    assert "another task died" in said(processes[0])
