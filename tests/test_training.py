"""Training continues bit for bit, and does not depend on the devices."""

import dataclasses
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import init, losses, train_apply

from dtrak_jax import diffusion, training
from dtrak_jax.config import TrainConfig
from dtrak_jax.training import loop

SCHEDULE = diffusion.linear_schedule()
CONFIG = TrainConfig(
    steps=12,
    batch_size=5,
    learning_rate=1e-2,
    ema_decay=0.9,
    checkpoints=(0.5, 1.0),
    save_every=4,
    log_every=3,
)


def run(images, directory, config=CONFIG, **options):
    return training.train(
        init, train_apply, SCHEDULE, images, config, directory, **options
    )


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("n", "size"), [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_every_epoch_sees_every_example_once(n, size):
    steps = -(-n // size)
    orders = []
    for epoch in range(3):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            rows, weights = training.batch(n, size, seed=0, step=step)
            assert rows.shape == weights.shape == (size,)
            seen += rows[weights == 1].tolist()
        assert sorted(seen) == list(range(n))
        orders.append(seen)
    assert n < 8 or orders[0] != orders[1]


def test_the_learning_rate_is_the_papers():
    config = TrainConfig(steps=1000, learning_rate=1e-4, warmup=0.1)
    rate = loop.learning_rate(config)
    step = np.arange(1001)
    cosine = 0.5e-4 * (1 + np.cos(np.pi * (step - 100) / 900))
    expected = np.where(step < 100, 1e-4 * step / 100, cosine)
    np.testing.assert_allclose([rate(s) for s in step], expected, atol=1e-9)


def test_a_step_is_adamw_on_the_clipped_gradient(images, tmp_path, one_device):
    """The second step by hand; the first has a rate of 0."""
    config = dataclasses.replace(
        CONFIG, steps=2, warmup=0.5, batch_size=12, ema_decay=0.0, weight_decay=0.01,
        clip_norm=1e-3, log_every=1,
    )  # fmt: skip
    params = jax.device_get(init(loop.stream(config.seed, "init")))
    weights = jnp.ones(12)
    gradients = []
    for step in range(2):
        state = loop.init_state(params, config)._replace(step=jnp.int32(step))
        rows, _ = training.batch(12, 12, config.seed, step)
        gradients.append(numerical_gradient(state, images[rows], rows, weights, config))
    clipped = [g * min(1, 1e-3 / np.linalg.norm(g)) for g in gradients]
    m = v = 0
    for g in clipped:
        m, v = 0.95 * m + 0.05 * g, 0.999 * v + 0.001 * g**2
    m, v = m / (1 - 0.95**2), v / (1 - 0.999**2)
    flat = np.concatenate([params["b"], params["w"].ravel()])
    expected = flat - 1e-2 * (m / (np.sqrt(v) + 1e-8) + 0.01 * flat)
    trained = run(images, tmp_path, config)
    ours = np.concatenate([trained["b"], trained["w"].ravel()])
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def numerical_gradient(state, x, rows, weights, config):
    """By central differences of the loss that a step adds to `loss_sum`."""
    mesh = loop.parallel.mesh(jax.devices())
    step = loop._compile(train_apply, SCHEDULE, config, False, mesh)
    flat, unravel = jax.flatten_util.ravel_pytree(state.params)

    def loss(point):
        # The step reuses its buffers, so each call gets its own.
        fresh = jax.tree.map(jnp.array, state._replace(params=unravel(point)))
        asked = np.zeros(mesh.size, np.int32)
        arrays = x, rows.astype(np.int32), weights, asked, np.uint32(config.seed)
        return float(step(fresh, *arrays)[0].loss_sum)

    width = 1e-2
    unit = np.eye(len(flat), dtype=np.float32) * width
    return np.array([(loss(flat + u) - loss(flat - u)) / (2 * width) for u in unit])


def test_eight_devices_equal_one(images, tmp_path, monkeypatch):
    """Also where the batch does not divide by the devices."""
    many = run(images, tmp_path / "many")
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    one = run(images, tmp_path / "one")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), many, one)


class Recorded:
    """Images that note which of them are read."""

    def __init__(self, images):
        self.images, self.shape, self.read = images, images.shape, []

    def __getitem__(self, rows):
        self.read.append(rows.tolist())
        return self.images[rows]


def test_a_device_reads_the_images_of_its_own_examples(images):
    """JAX asks a process for those of its own devices only."""
    recorded = Recorded(images)
    rows, weights = np.array([7, 3, 11, 0, 2]), np.ones(5, np.float32)
    mesh = loop.parallel.mesh(jax.devices())
    x, index, weights, asked = loop._place(mesh, recorded, rows, weights, True)
    assert recorded.read == [[7], [3], [11], [0], [2], [0], [0], [0]]
    np.testing.assert_array_equal(x[:5], images[rows])
    np.testing.assert_array_equal(index[:5], rows)
    assert np.asarray(weights).tolist() == [1] * 5 + [0] * 3
    assert np.asarray(asked).tolist() == [1] * 8


@pytest.mark.parametrize("stop_at", [2, 7])
def test_an_interrupted_run_continues_bit_for_bit(
    images, tmp_path, monkeypatch, stop_at
):
    whole = run(images, tmp_path / "whole")

    def interrupt(n, size, seed, step):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return training.batch(n, size, seed, step)

    monkeypatch.setattr(loop, "batch", interrupt)
    with pytest.raises(KeyboardInterrupt, match=f"after step {stop_at + 1} of 12"):
        run(images, tmp_path / "cut")
    monkeypatch.undo()
    assert_same(run(images, tmp_path / "cut"), whole)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "cut")] == [3, 6, 9, 12]


def test_a_lost_checkpoint_costs_only_time(images, tmp_path):
    """Lines after the checkpoint are written again, not twice."""
    whole = run(images, tmp_path)
    before = losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    assert_same(run(images, tmp_path), whole)
    assert losses(tmp_path) == before


def test_checkpoints_at_the_fractions_are_kept(images, tmp_path, monkeypatch):
    whole = run(images, tmp_path)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"6", "12"}
    assert_same(training.load_params(init, CONFIG, tmp_path), whole)
    half = training.load_params(init, CONFIG, tmp_path, step=6)
    assert np.abs(half["w"] - whole["w"]).max() > 1e-4
    monkeypatch.setattr(loop, "batch", None)
    assert_same(run(images, tmp_path), whole)


def test_averaged_parameters_are_the_model(images, tmp_path):
    averaged = run(images, tmp_path / "a")
    plain = run(images, tmp_path / "b", dataclasses.replace(CONFIG, ema_decay=0.0))
    assert np.abs(averaged["w"] - plain["w"]).max() > 1e-4


def test_flips_mirror_about_half_of_the_images(images, tmp_path):
    """Nothing changes for images that are their own mirror image."""
    mirrored = np.concatenate([images, images[:, :, ::-1]], axis=2)
    for x, same in [(mirrored, True), (images, False)]:
        straight, flipped = (
            run(x, tmp_path / f"{same}-{flip}", flip=flip) for flip in (False, True)
        )
        assert (np.abs(straight["w"] - flipped["w"]).max() == 0) == same


def test_a_checkpoint_of_another_model(images, tmp_path):
    run(images, tmp_path)

    def wider(key):
        return {"w": jnp.zeros((5, 5, 1, 1)), "b": jnp.zeros(1)}

    with pytest.raises(ValueError, match=r"another model: .*w is of shape \(3, 3"):
        training.load_params(wider, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="another model"):
        training.train(wider, train_apply, SCHEDULE, images, CONFIG, tmp_path)


def test_a_damaged_checkpoint(images, tmp_path):
    run(images, tmp_path)
    for path in (tmp_path / "checkpoints" / "12").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="may be damaged; delete that folder"):
        training.load_params(init, CONFIG, tmp_path)


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `dtrak-jax train`"):
        training.load_params(init, CONFIG, tmp_path)


def test_divergence_is_an_error(images, tmp_path):
    def explode(*arguments):
        return train_apply(*arguments) * jnp.inf

    with pytest.raises(FloatingPointError, match="smaller train.learning_rate"):
        training.train(init, explode, SCHEDULE, images, CONFIG, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
