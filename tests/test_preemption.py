"""A signal to one of two processes stops both, and the same command continues."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from conftest import digits_command

from dtrak_jax import cli, diffusion, files, models, pipeline, training
from dtrak_jax.evaluation import ensemble

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


def start(line, cache):
    """Two processes of one device each that share the work."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ours = os.environ | {
        "DTRAK_DISTRIBUTED": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "1",
        # A command that is given again need not compile again.
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    ours.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
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


def losses(directory):
    path = directory / "metrics.jsonl"
    lines = files.read_json_lines(path) if path.exists() else []
    return [(line["step"], line["loss"]) for line in lines]


def test_training_stops_at_a_step_that_all_agree_on(tmp_path, monkeypatch):
    """On SIGTERM to one process, and on Ctrl-C, which reaches all."""
    changes = {"train__steps": "60"}
    line = digits_command("train", tmp_path / "two", FLAGS, changes)
    for sent, reached in ((signal.SIGTERM, [1]), (signal.SIGINT, [0, 1])):
        before = len(losses(tmp_path / "two"))
        processes = start(line, tmp_path / "cache")
        wait_until(lambda b=before: len(losses(tmp_path / "two")) >= b + 3, processes)
        for i in reached:
            processes[i].send_signal(sent)
        said = end(processes, 130)
        steps = [re.search(r"stopped after step (\d+) of 60", text)[1] for text in said]
        assert steps[0] == steps[1]
        assert (tmp_path / "two" / "checkpoints" / steps[0]).exists()
    end(start(line, tmp_path / "cache"), 0)

    # The same devices in one process, and no signal.
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    pipeline.run(*cli.parse(digits_command("train", tmp_path / "one", FLAGS, changes)))
    one, two = (np.array(losses(tmp_path / name)) for name in ("one", "two"))
    np.testing.assert_array_equal(two[:, 0], np.arange(1, 61))
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_retraining_stops_everywhere_wherever_each_process_is(tmp_path):
    """While both train, and while one has nothing left to do but to wait."""
    changes = {
        "train__steps": "800",
        "train__save_every": "20",
        "ensemble__subsets": "3",
        "ensemble__seeds": "1",
        "ensemble__timesteps": "2",
        "ensemble__draws": "1",
    }
    changes = {name.replace("_every", "-every"): v for name, v in changes.items()}
    line = digits_command("retrain", tmp_path / "two", FLAGS, changes)
    members = tmp_path / "two" / "ensemble"

    def steps(member):
        return max(training.ensemble._latest_step(members / member), 0)

    processes = start(line, tmp_path / "cache")
    wait_until(lambda: steps("0000-0") and steps("0001-0"), processes)
    processes[0].send_signal(signal.SIGTERM)
    for member, text in zip(("0000-0", "0001-0"), end(processes, 130), strict=True):
        assert f"step {steps(member)} of 400 of {member} saved" in text
        assert 0 < steps(member) < 400

    processes = start(line, tmp_path / "cache")
    wait_until(lambda: steps("0001-0") == 400 and steps("0002-0"), processes)
    processes[1].send_signal(signal.SIGTERM)
    said = end(processes, 130)
    assert f"step {steps('0002-0')} of 400 of 0002-0 saved" in said[0]
    assert "stopped with 1 of 1 models trained; the same command" in said[1]

    end(start(line, tmp_path / "cache"), 0)
    _, config, workdir = cli.parse(line)
    splits = pipeline.load_data(config, pipeline.open_run(config, workdir))
    model, schedule = models.build(config.model), diffusion.build(config.diffusion)
    train_config = ensemble.dataclasses.replace(config.train, steps=400)
    alone = ensemble.members(config, splits)
    init = models.init_fn(model)
    training.train_members(
        init, models.train_apply_fn(model), schedule, splits.train.images, alone,
        train_config, tmp_path / "one", flip=config.data.flip,
    )  # fmt: skip
    names = [member.name for member in alone]
    one, two = (
        training.load_members(init, names, train_config, folder)
        for folder in (tmp_path / "one", members)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)
