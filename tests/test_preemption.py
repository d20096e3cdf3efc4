"""A signal to one of two processes stops both, and the same command continues."""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from conftest import digits_command, free_port, losses

from dtrak_jax import cli, files, pipeline
from dtrak_jax.evaluation import stages
from dtrak_jax.training import ensemble

FLAGS = {
    "data.train": "40",
    "data.validation": "4",
    "sample.count": "0",
    # Little to compile.
    "model.block-out-channels": "4",
    "model.down-block-types": "DownBlock2D",
    "model.up-block-types": "UpBlock2D",
    "model.norm-num-groups": "2",
    "model.no-add-attention": "",
    "train.batch-size": "8",
    "train.log-every": "1",
}


def start(line):
    """Two processes of one device each that share the work."""
    ours = os.environ | {
        "DTRAK_DISTRIBUTED": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "dtrak_jax", *line],
            stderr=subprocess.PIPE,
            text=True,
            env=ours | {"JAX_PROCESS_ID": str(i)},
        )
        for i in range(2)
    ]


def end(processes, code):
    """What they say on the way to ending with this code."""
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [code, code], said
    return said


def wait_until(happened, processes):
    """Returns once there is a sign of progress, with both processes still at work."""
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.02)


def lines(directory):
    """How many steps metrics.jsonl tells of so far."""
    return len(losses(directory)) if (directory / "metrics.jsonl").exists() else 0


def test_training_stops_at_a_step_that_all_agree_on(tmp_path, monkeypatch):
    """On SIGTERM to one process, and on Ctrl-C, which reaches all."""
    changes = {"train__steps": "60"}
    line = digits_command("train", tmp_path / "two", FLAGS, changes)
    for sent, reached in ((signal.SIGTERM, [1]), (signal.SIGINT, [0, 1])):
        before = lines(tmp_path / "two")
        processes = start(line)
        wait_until(lambda b=before: lines(tmp_path / "two") >= b + 3, processes)
        for i in reached:
            processes[i].send_signal(sent)
        said = end(processes, 130)
        steps = [re.search(r"stopped after step (\d+) of 60", text)[1] for text in said]
        assert steps[0] == steps[1]
        assert (tmp_path / "two" / "checkpoints" / steps[0]).exists()
    end(start(line), 0)

    # The same devices in one process, and no signal.
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    line = digits_command("train", tmp_path / "one", FLAGS, changes)
    pipeline.run("train", cli.parse(line)[1], tmp_path / "one")
    one, two = (np.array(losses(tmp_path / name)) for name in ("one", "two"))
    np.testing.assert_array_equal(two[:, 0], np.arange(1, 61))
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_retraining_stops_wherever_each_process_is(tmp_path):
    """Also where the one that is told has nothing left to do but to wait."""
    steps = 1000
    flags = FLAGS | {
        "train.steps": str(2 * steps),
        "train.save-every": "100",
        "ensemble.seeds": "1",
        "ensemble.timesteps": "2",
        "ensemble.draws": "1",
    }

    def retrain(subsets, name="two"):
        changes = {"ensemble__subsets": str(subsets)}
        return digits_command("retrain", tmp_path / name, flags, changes)

    members = tmp_path / "two" / "ensemble"

    def at(member):
        return ensemble._latest_step(members / member)

    processes = start(retrain(1))
    wait_until(lambda: at("0000-0"), processes)
    processes[1].send_signal(signal.SIGTERM)
    said = end(processes, 130)
    assert 0 < at("0000-0") < steps
    assert f"step {at('0000-0')} of {steps} of 0000-0 saved; the same" in said[0]
    assert "stopped with 0 of 0 models trained; the same command" in said[1]

    processes = start(retrain(2))
    wait_until(lambda: at("0001-0"), processes)
    processes[0].send_signal(signal.SIGTERM)
    said = end(processes, 130)
    assert 0 < at("0001-0") < steps
    assert f"step {at('0001-0')} of {steps} of 0001-0 saved; the same" in said[1]

    end(start(retrain(2)), 0)
    stages.run("retrain", cli.parse(retrain(2, "one"))[1], tmp_path / "one")
    for member in ("0000-0", "0001-0"):
        one, two = (
            files.read_npz(tmp_path / name / "ensemble" / member / "outputs.npz")
            for name in ("one", "two")
        )
        np.testing.assert_allclose(two["outputs"], one["outputs"], rtol=1e-5)
