"""A signal to one of two processes stops both, and training continues from there."""

import os
import re
import signal
import time

import jax
import numpy as np
import pytest
from conftest import environments, init, losses, start_process, train_apply

from dtrak_jax import diffusion, files, parallel, training
from dtrak_jax.config import TrainConfig
from dtrak_jax.training import checkpoint, loop

SCHEDULE = diffusion.linear_schedule()
CONFIG = TrainConfig(
    steps=60, batch_size=8, checkpoints=(1.0,), save_every=20, log_every=1
)
MEMBERS = [training.Member(name, np.arange(i, 12), i) for i, name in enumerate("ab")]


RECIPE = training.Recipe(init, train_apply, SCHEDULE, CONFIG)


def train(images, folder):
    return training.train(RECIPE, images, folder)


def retrain(images, folder, members):
    training.train_members(RECIPE, images, members, folder / "ensemble")


def work(folder):
    """What each of the two processes does, slowly; it leaves a file after each part."""
    jax.config.update("jax_num_cpu_devices", 1)
    parallel.start()

    def slow_batch(*arguments):
        time.sleep(0.02)
        return training.batch(*arguments)

    loop.batch = training.ensemble.batch = slow_batch
    images = files.read_npz(folder / "images.npz")["images"]

    def until_stopped(name, run):
        try:
            result = run()
        except KeyboardInterrupt as interrupt:
            result, said = None, str(interrupt)
        else:
            said = "finished"
        files.write_json(folder / f"{name}-{jax.process_index()}.json", said)
        return result

    until_stopped("train 1", lambda: train(images, folder))
    until_stopped("train 2", lambda: train(images, folder))
    params = until_stopped("train 3", lambda: train(images, folder))
    if jax.process_index() == 1:
        files.write_npz(folder / "params.npz", **params)
    until_stopped("retrain 1", lambda: retrain(images, folder, MEMBERS[:1]))
    until_stopped("retrain 2", lambda: retrain(images, folder, MEMBERS))
    until_stopped("retrain 3", lambda: retrain(images, folder, MEMBERS))


@pytest.fixture(scope="module")
def processes(tmp_path_factory, images):
    """(two processes of one device each that share the work, their folder)."""
    folder = tmp_path_factory.mktemp("two")
    files.write_npz(folder / "images.npz", images=images)
    started = [start_process(work, folder, environment=e) for e in environments(2)]
    yield started, folder
    for process in started:
        process.kill()


def wait_until(happened, processes):
    """Returns once there is a sign of progress, with both processes still at work."""
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline
        assert [process.exitcode for process in processes] == [None, None]
        time.sleep(0.02)


def outcomes(processes, name):
    """What both processes say of this part of their work, once it has ended."""
    started, folder = processes
    paths = [folder / f"{name}-{i}.json" for i in range(2)]
    wait_until(lambda: all(path.exists() for path in paths), started)
    return [files.read_json(path) for path in paths]


def lines(folder):
    """How many steps metrics.jsonl tells of so far."""
    return len(losses(folder)) if (folder / "metrics.jsonl").exists() else 0


def test_training_stops_at_a_step_that_all_agree_on(processes, images, monkeypatch):
    """On SIGTERM to one process, and on Ctrl-C, which reaches all."""
    started, folder = processes
    signals = ("train 1", signal.SIGTERM, [1]), ("train 2", signal.SIGINT, [0, 1])
    for name, sent, reached in signals:
        before = lines(folder)
        wait_until(lambda b=before: lines(folder) >= b + 3, started)
        for i in reached:
            os.kill(started[i].pid, sent)
        said = outcomes(processes, name)
        steps = [re.search(r"stopped after step (\d+) of 60", text)[1] for text in said]
        assert steps[0] == steps[1]
        assert int(steps[0]) in checkpoint.steps(folder / "checkpoints")
    assert outcomes(processes, "train 3") == ["finished"] * 2

    # The same devices in one process, and no signal.
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    params = train(images, folder / "one")
    found = np.array(losses(folder))
    np.testing.assert_array_equal(found[:, 0], np.arange(1, 61))
    np.testing.assert_allclose(found, losses(folder / "one"), rtol=1e-5)
    loaded = files.read_npz(folder / "params.npz")
    for name, leaf in params.items():
        np.testing.assert_allclose(loaded[name], leaf, rtol=1e-5)


def test_retraining_stops_wherever_each_process_is(processes, images, monkeypatch):
    """Also where the one that is told has nothing left to do but to wait."""
    started, folder = processes

    def at(member):
        return training.latest_step(folder / "ensemble" / member)

    def stopped_at(member, text):
        """The saved step; the next part of the work goes on from it at once."""
        pattern = rf"step (\d+) of 60 of {member} saved; the same"
        return int(re.search(pattern, text)[1])

    wait_until(lambda: at("a"), started)
    os.kill(started[1].pid, signal.SIGTERM)
    first, second = outcomes(processes, "retrain 1")
    assert 0 < stopped_at("a", first) < 60
    assert stopped_at("a", first) <= at("a")
    assert "stopped with 0 of 0 models trained; the same command" in second

    wait_until(lambda: at("b"), started)
    os.kill(started[0].pid, signal.SIGTERM)
    _, second = outcomes(processes, "retrain 2")
    assert 0 < stopped_at("b", second) < 60
    assert stopped_at("b", second) <= at("b")

    for process in started:
        process.join(timeout=300)
    assert [process.exitcode for process in started] == [0, 0]
    assert outcomes(processes, "retrain 3") == ["finished"] * 2
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    retrain(images, folder / "one", MEMBERS)
    found, expected = (
        training.load_members(init, ["a", "b"], CONFIG.steps, where / "ensemble")
        for where in (folder, folder / "one")
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
