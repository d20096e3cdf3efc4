"""Several processes do the same as one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

import dtrak_jax as dtrak
from dtrak_jax import cli, files, models, pipeline, training

CONFIG = Path(__file__).parent.parent / "configs" / "digits.py"
FLAGS = {
    "data.train": "130",
    "data.validation": "6",
    "model.block-out-channels": "4 8",
    "model.norm-num-groups": "2",
    "train.steps": "20",
    "train.log-every": "1",
    "sample.count": "0",
    "features.timesteps": "100 300",
    "features.dim": "64",
}


def losses(directory):
    """The loss of every step."""
    return [row["loss"] for row in files.read_json_lines(directory / "metrics.jsonl")]


def test_two_processes_equal_one(tmp_path):
    """One training run and one feature store between them."""
    line = ["run", str(CONFIG), "--workdir", str(tmp_path / "two")]
    for name, value in FLAGS.items():
        line += [f"--{name}", *value.split()]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dtrak_jax", *line],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "DTRAK_DISTRIBUTED": "1",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
                "JAX_NUM_CPU_DEVICES": "1",
            },
        )
        for i in range(2)
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said

    _, config, options = cli.parse(line)
    workdir = pipeline.open_run(config, options.workdir)
    params = pipeline.load_params(config, workdir)
    model = models.build(config.model)
    images = pipeline.load_data(config, workdir).train.images
    training.train(
        lambda key: models.init(model, key),
        models.train_apply_fn(model),
        dtrak.linear_schedule(),
        images,
        config.train,
        tmp_path / "one",
    )
    one, two = (losses(path) for path in (tmp_path / "one", workdir))
    np.testing.assert_allclose(one, two, rtol=1e-4)

    features = dtrak.featurize(
        pipeline.task(config, "common"),
        params,
        images,
        dtrak.Projection(dim=64),
        ids=pipeline.load_data(config, workdir).train.ids,
    )
    for name, ours in features.items():
        both = np.asarray(dtrak.Features.load(workdir / "features" / "train", name))
        ours = np.asarray(ours)
        np.testing.assert_allclose(ours, both, atol=1e-5 * np.abs(both).max())
