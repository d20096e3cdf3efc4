"""Several processes do the same as one, share one fate, and lose nothing."""

import os
import resource
import signal
import time

import jax
import numpy as np
import pytest
from conftest import (
    digits_command,
    draw_nothing,
    environments,
    run_arrays,
    start_process,
    store_of,
    use_simple_network,
    use_two_devices,
)

import dtrak_jax as dtrak
from dtrak_jax import cli, files, parallel, training
from dtrak_jax.run import Run

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
COMMANDS = ("lds", "ablate", "counterfactual", "report")
"""They make everything else first."""


def several(commands, line, pause):
    """What a process does: commands one after the other, so that it compiles once for all;
    of a network that compiles fast, and with a pause before each step of retraining."""
    jax.config.update("jax_num_cpu_devices", 1)
    patch, batch = pytest.MonkeyPatch(), training.ensemble.batch
    use_simple_network(patch)
    draw_nothing(patch)

    def slow_batch(*arguments):
        time.sleep(pause)
        return batch(*arguments)

    patch.setattr(training.ensemble, "batch", slow_batch)
    for command in commands:
        cli.main([command, *line])
        # The processes are joined until they end.
        os.environ.pop("DTRAK_DISTRIBUTED", None)


FULL = 4000
"""Bytes of the longest file on a full disk: less than a chunk of a store."""
HEARTBEAT = 5
"""Seconds of silence after which a process counts as dead, where a test waits for it."""
SOON = 15
"""Seconds that an error may take from one process to another through a connection."""


@pytest.fixture(scope="module")
def start():
    """Starts commands in `count` processes with a device each.

    Each has a umask of its own, which tells from a file's mode who wrote it: see
    `writer`. Processes that still run when the module ends are killed.
    """
    started = []

    def start(count, workdir, *commands, full_disk=False, pause=0.0, heartbeat=None):
        _, *line = digits_command("", workdir, FLAGS, {})
        changes = {"DTRAK_DISTRIBUTED": "1"}
        changes["DTRAK_HEARTBEAT"] = str(heartbeat or parallel.TIMEOUT)
        processes = []
        for i, environment in enumerate(environments(count, **changes)):
            error = workdir.with_name(f"{workdir.name}-{i}.txt")
            given = {"environment": environment, "error": error, "umask": 2 * i}
            process = start_process(several, commands, line, pause, **given)
            process.error = error
            processes.append(process)
        started.extend(processes)
        if full_disk:
            # For the last one: no file may be longer than this.
            limits = (FULL, FULL)
            resource.prlimit(processes[-1].pid, resource.RLIMIT_FSIZE, limits)
        return processes

    yield start
    for process in started:
        process.kill()


def said(process):
    """What a process wrote to its standard error."""
    return process.error.read_text()


def code_of(process, timeout=None):
    """Its exit code, once it has ended."""
    process.join(timeout)
    assert process.exitcode is not None
    return process.exitcode


def succeed(processes):
    """Waits until all of them are through."""
    codes = [code_of(process) for process in processes]
    assert not any(codes), [said(process) for process in processes]


def writer(path):
    """The process that wrote a file."""
    return (0o666 & ~path.stat().st_mode & 0o6) // 2


def await_sign(processes, sign):
    """Waits until sign() is true, while all processes are still at work."""
    deadline = time.time() + 600
    while not sign():
        assert time.time() < deadline
        assert [p.exitcode for p in processes] == [None] * len(processes), [
            said(process) for process in processes
        ]
        time.sleep(0.002)


def kill(processes, victim):
    """kill -9 of one; returns how long the others lived on, and their codes."""
    processes[victim].kill()
    killed = time.time()
    processes[victim].join()
    survivors = [process for process in processes if process is not processes[victim]]
    codes = [code_of(process, 3 * parallel.TIMEOUT) for process in survivors]
    return time.time() - killed, codes


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run directory of all commands, by one process with two devices."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as patch:
        use_two_devices(patch)
        use_simple_network(patch)
        draw_nothing(patch)
        for command in COMMANDS:
            cli.main(digits_command(command, workdir, FLAGS, {}))
    return workdir


@pytest.fixture(scope="module")
def cut(start, tmp_path_factory):
    """A run directory of all commands, by two processes, stopped twice on the way.

    First the disk of process 1 is full when it writes features; then process 0 is
    killed while both retrain, each on its own; then the same command is through.
    """
    workdir = tmp_path_factory.mktemp("runs") / "cut"
    processes = start(2, workdir, "featurize", full_disk=True)
    assert code_of(processes[1]) == 2, said(processes[1])
    failed = time.time()
    assert code_of(processes[0]) != 0
    assert time.time() - failed < SOON, said(processes[0])
    assert "free space" in said(processes[1])
    (store,) = (workdir / "features").glob("*/train-*")
    with pytest.raises(ValueError, match="examples have no features yet"):
        dtrak.Features.load(store, "loss")

    ensemble = workdir / "ensemble"
    processes = start(2, workdir, *COMMANDS, pause=0.02)
    await_sign(processes, lambda: any((ensemble / "0001-0").glob("[1-9]0")))
    seconds, (code,) = kill(processes, 0)
    assert code != 0
    assert seconds < SOON, said(processes[1])
    assert not (ensemble / "outputs.npz").exists()

    succeed(start(2, workdir, *COMMANDS))
    return workdir


@pytest.fixture(scope="module")
def four(start, tmp_path_factory):
    """(run directory of features, by four processes; what became of three of them).

    The last process was killed while all of them retrained, each on its own.
    """
    workdir = tmp_path_factory.mktemp("runs") / "four"
    commands = ("featurize", "retrain")
    processes = start(4, workdir, *commands, pause=0.5, heartbeat=HEARTBEAT)
    folders = [workdir / "ensemble" / f"{subset:04d}-0" for subset in range(4)]
    await_sign(processes, lambda: all(any(f.glob("[1-9]0")) for f in folders))
    seconds, codes = kill(processes, 3)
    return workdir, (seconds, codes, [said(process) for process in processes[:3]])


def artefacts(workdir):
    """Every array and number that a run directory ends with."""
    _, config, _ = cli.parse(digits_command("run", workdir, FLAGS, {}))
    with pytest.MonkeyPatch.context() as patch:
        use_simple_network(patch)
        # It is not opened, which would write config.json.
        found = run_arrays(Run(config, files.at(workdir)))
    for path in [*workdir.glob("*.json"), workdir / "features" / "distortion.json"]:
        found[path.name] = files.read_json(path)
    # The minute in which a run began is its own.
    del found["config.json"]["begun"]
    return found


def test_two_processes_equal_one_and_lose_nothing(one, cut):
    """Every artefact bit for bit, after a full disk and a kill -9."""
    found, expected = artefacts(cut), artefacts(one)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_equal(found[name], value, err_msg=str(name))
    for leftover in ("*orbax-checkpoint-tmp*", "*.partial"):
        assert not list(cut.rglob(leftover))


def test_four_processes_equal_one(one, four):
    """But for rounding."""
    workdir, _ = four
    found, expected = artefacts(workdir), artefacts(one)
    names = {"params", "losses", "splits.npz", "samples.npz"}
    names |= {"config.json", "distortion.json"}
    assert set(found) == {n for n in expected if isinstance(n, tuple) or n in names}
    # The digest of the model knows no rounding.
    for arrays in (found, expected):
        del arrays["samples.npz"]["model"], arrays["distortion.json"]["made_from"]
    for name, value in found.items():
        pairs = zip(*map(jax.tree.leaves, (value, expected[name])), strict=True)
        for several, single in pairs:
            several, single = np.asarray(several), np.asarray(single)
            if single.dtype.kind != "f":
                np.testing.assert_array_equal(several, single, str(name))
                continue
            largest = max(np.abs(single).max(initial=0), 0.1)
            np.testing.assert_allclose(
                several, single, rtol=0, atol=1e-6 * largest, err_msg=str(name)
            )


def test_each_process_writes_its_own_share(cut, four):
    """And process 0 alone what there is one of."""
    for workdir, count in ((cut, 2), (four[0], 4)):
        shared = [path for path in workdir.iterdir() if path.is_file()]
        shared += [workdir / "samples" / "samples.npz"]
        store = store_of(workdir, "train")
        shared += [workdir / "features" / "distortion.json", store / "metadata.json"]
        assert {path: writer(path) for path in shared} == dict.fromkeys(shared, 0)
        for name in ("loss/phi/c/0", "square/phi/c/0", "losses/c/0"):
            written = (store / name).rglob("*")
            owners = [writer(path) for path in written if path.is_file()]
            assert set(owners) == set(range(count)), (name, owners)
        pictures = sorted((workdir / "samples").glob("*.png"))
        rows = -(-len(pictures) // count)
        owners = [i // rows for i in range(len(pictures))]
        assert [writer(path) for path in pictures] == owners
        for member in (workdir / "ensemble").glob("*-0"):
            owners = {writer(path) for path in member.rglob("*") if path.is_file()}
            assert owners == {int(member.name.removesuffix("-0")) % count}
    written_once = [*(cut / "scores").iterdir(), *(cut / "kernels").rglob("*")]
    written_once += [cut / "ensemble" / "outputs.npz"]
    assert len(list((cut / "ensemble").glob("*-0"))) == 16
    assert {writer(path) for path in written_once if path.is_file()} == {0}


def test_a_death_is_noticed_where_processes_do_not_talk(four):
    """Within the stated time, though the others would train on for long."""
    _, (seconds, codes, errors) = four
    assert codes == [-signal.SIGABRT] * 3
    assert seconds < HEARTBEAT + SOON
    assert "another task died" in errors[0]
