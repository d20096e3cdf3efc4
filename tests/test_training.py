"""Training continues bit for bit, and does not depend on the devices."""

import dataclasses
import functools
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NO_ATTENTION, init, losses, train_apply

from dtrak_jax import diffusion, files, models, parallel, training
from dtrak_jax.config import TrainConfig
from dtrak_jax.models.blocks import Dropout
from dtrak_jax.rng import stream
from dtrak_jax.switches import standard
from dtrak_jax.training import loop, metrics, step

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
SMALL = dataclasses.replace(NO_ATTENTION, dropout=0.5)
RECIPE = training.Recipe(init, train_apply, SCHEDULE, CONFIG)


def run(images, directory, config=CONFIG, view=None):
    recipe = RECIPE._replace(config=config, view=view)
    return training.train(recipe, images, directory)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), a, b)


@pytest.mark.parametrize(("n", "size"), [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_every_epoch_sees_every_example_once(n, size):
    steps = -(-n // size)
    orders = []
    for epoch in range(3):
        seen = []
        for position in range(epoch * steps, (epoch + 1) * steps):
            rows, weights = training.batch(n, size, seed=0, step=position)
            assert rows.shape == weights.shape == (size,)
            seen += rows[weights == 1].tolist()
        assert sorted(seen) == list(range(n))
        orders.append(seen)
    assert n < 8 or orders[0] != orders[1]


def test_the_learning_rate_is_the_papers():
    config = TrainConfig(steps=1000, learning_rate=1e-4, warmup=0.1)
    rate = step.learning_rate(config)
    steps = np.arange(1001)
    cosine = 0.5e-4 * (1 + np.cos(np.pi * (steps - 100) / 900))
    expected = np.where(steps < 100, 1e-4 * steps / 100, cosine)
    with standard():
        rates = [rate(s) for s in steps]
    np.testing.assert_allclose(rates, expected, atol=1e-9)


def test_a_single_step_has_no_warm_up():
    config = TrainConfig(steps=1, learning_rate=1e-4, warmup=0.1)
    assert step.learning_rate(config)(0) == np.float32(1e-4)


def stepper(recipe):
    """`train_step` alone, without a mesh."""
    return jax.jit(functools.partial(step.train_step, recipe))


def test_a_step_is_adamw_on_the_clipped_gradient(images, tmp_path, one_device):
    """The second step by hand; the first has a rate of 0."""
    config = dataclasses.replace(
        CONFIG, steps=2, warmup=0.5, batch_size=12, ema_decay=0.0, weight_decay=0.01,
        clip_norm=1e-3, log_every=1,
    )  # fmt: skip
    params = jax.device_get(init(stream(config.seed, "init")))
    gradients = []
    for position in range(2):
        state = step.first_state(init, config, config.seed)
        state = state._replace(step=jnp.int32(position))
        rows, weights = training.batch(12, 12, config.seed, position)
        batch = step.Batch(images[rows], rows, weights)
        gradients.append(numerical_gradient(state, batch, config))
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


def numerical_gradient(state, batch, config):
    """By central differences of the loss that a step adds to `loss_sum`."""
    flat, unravel = jax.flatten_util.ravel_pytree(state.params)
    take_step = stepper(RECIPE._replace(config=config))

    def loss(point):
        moved = state._replace(params=unravel(point))
        return float(take_step(moved, batch, np.uint32(config.seed)).loss_sum)

    width = 1e-2
    unit = np.eye(len(flat), dtype=np.float32) * width
    return np.array([(loss(flat + u) - loss(flat - u)) / (2 * width) for u in unit])


def test_dropout_masks_do_not_depend_on_the_devices(images):
    """Bit for bit, though the batch is split; nor do they on the rest of the batch."""
    model = models.build(dataclasses.replace(SMALL, dropout=0.1))
    params = models.init(model, jax.random.key(0))
    x, t = np.concatenate([images, images[:4]]), np.arange(16)

    def masks(key, index, x, t):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        _, state = model.apply(
            {"params": params},
            x,
            t,
            keys=keys,
            capture_intermediates=lambda module, _: isinstance(module, Dropout),
            mutable=["intermediates"],
        )
        return jax.tree.map(lambda h: h == 0, jax.tree.leaves(state))

    key = jax.random.key(1)
    found = {}
    for count in (1, 2, 8):
        mesh = parallel.mesh(jax.devices()[:count])
        spread = jax.NamedSharding(mesh, jax.P("data"))
        shardings = (jax.NamedSharding(mesh, jax.P()), spread, spread, spread)
        jitted = jax.jit(masks, in_shardings=shardings, out_shardings=spread)
        found[count] = jax.device_get(jitted(key, t, x, t))
    assert len(found[1]) == 5
    assert_same(found[1], found[2])
    assert_same(found[1], found[8])
    shares = [1 - np.mean(mask) for mask in found[1]]
    np.testing.assert_allclose(shares, 0.9, atol=0.05)
    # No two blocks and no two examples share a mask.
    first, second = found[1][:2]
    assert (first != second).any() and (first[0] != first[1]).any()
    company = jax.device_get(jax.jit(masks)(key, t[3:5], x[3:5], t[3:5]))
    assert_same(company, [mask[3:5] for mask in found[1]])


def test_dropout_trains_the_same_model_on_any_devices(images, tmp_path, request):
    """Also where the batch does not divide by the devices, and as a member of an
    ensemble: "nothing removed, the same seed" is a control."""
    config = TrainConfig(
        steps=50, batch_size=5, learning_rate=1e-3, checkpoints=(1.0,), log_every=1
    )
    model = models.build(SMALL)
    recipe = training.Recipe(
        models.init_fn(model), models.train_apply_fn(model), SCHEDULE, config
    )
    many = training.train(recipe, images, tmp_path / "many")
    request.getfixturevalue("one_device")
    one = training.train(recipe, images, tmp_path / "one")
    assert_close(many, one, 1e-5)
    assert_close(losses(tmp_path / "many"), losses(tmp_path / "one"), 1e-5)
    member = training.Member("all", np.arange(len(images)), config.seed)
    training.train_members(recipe, images, [member], tmp_path)
    stack = training.load_members(recipe.init, ["all"], config.steps, tmp_path)
    assert_close(jax.tree.map(lambda leaf: leaf[0], stack), one, 1e-5)


def test_order_and_filling_of_a_batch_change_nothing(images):
    """With dropout, one step on twelve images and on these in another order and filled
    up with others of weight 0."""
    config = dataclasses.replace(CONFIG, warmup=0.0)
    model = models.build(SMALL)
    recipe = training.Recipe(
        models.init_fn(model), models.train_apply_fn(model), SCHEDULE, config
    )
    state = step.first_state(recipe.init, config, 0)
    take_step = stepper(recipe)
    index = np.arange(12)
    plain = step.Batch(images, index, np.ones(12, np.float32))
    mixed = np.append(np.random.default_rng(0).permutation(12), [3, 3, 7, 11])
    filled = step.Batch(images[mixed], mixed, np.repeat(np.float32([1, 0]), [12, 4]))
    one, other = (take_step(state, batch, np.uint32(0)) for batch in (plain, filled))
    np.testing.assert_allclose(one.loss_sum, other.loss_sum, rtol=1e-6)
    assert_close(one.opt_state, other.opt_state, 1e-6)
    moved = step.Batch(images, index + 1, np.ones(12, np.float32))
    assert abs(take_step(state, moved, np.uint32(0)).loss_sum - one.loss_sum) > 1e-3


def test_random_numbers_do_not_depend_on_the_flag(images):
    """That of older JAX code, which would change all noise."""
    batch = step.Batch(images, np.arange(12), np.ones(12, np.float32))
    found = []
    for flag in (True, False):
        with jax.threefry_partitionable(flag):
            state = step.first_state(init, CONFIG, 3)
            found.append(stepper(RECIPE)(state, batch, np.uint32(3)))
    assert_same(*found)


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
    mesh = parallel.mesh(jax.devices())
    cond = {"number": np.arange(12) ** 2}
    batch = loop.put_batch(mesh, (recorded, cond), rows, weights)
    assert recorded.read == [[7], [3], [11], [0], [2], [0], [0], [0]]
    np.testing.assert_array_equal(batch.x[:5], images[rows])
    np.testing.assert_array_equal(batch.index[:5], rows)
    np.testing.assert_array_equal(batch.cond["number"][:5], rows**2)
    assert np.asarray(batch.weights).tolist() == [1] * 5 + [0] * 3


@pytest.mark.parametrize("stop_at", [7, 11])
def test_an_interrupted_run_continues_bit_for_bit(
    images, tmp_path, monkeypatch, stop_at
):
    whole = run(images, tmp_path / "whole")

    def interrupt(n, size, seed, step):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return training.batch(n, size, seed, step)

    monkeypatch.setattr(loop, "batch", interrupt)
    # The step after the one that was asked knows of it.
    done = min(stop_at + 2, 12)
    with pytest.raises(KeyboardInterrupt, match=f"after step {done} of 12"):
        run(images, tmp_path / "cut")
    monkeypatch.undo()
    # What a kill may have left besides.
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "lo')
    assert_same(run(images, tmp_path / "cut"), whole)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [number for number, _ in losses(tmp_path / "cut")] == [3, 6, 9, 12]


def test_a_lost_checkpoint_costs_only_time(images, tmp_path):
    """Lines after the checkpoint are written again, not twice."""
    whole = run(images, tmp_path)
    lines = losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    assert_same(run(images, tmp_path), whole)
    assert losses(tmp_path) == lines


def test_a_line_is_appended_in_one_write(tmp_path, monkeypatch):
    """So that all lines together take time in proportion to their number."""
    log = metrics.Metrics(tmp_path / "metrics.jsonl", 0, CONFIG)
    rewritten, rewrite = [], files.write_json_lines

    def record(path, lines):
        rewritten.append(path)
        rewrite(path, lines)

    monkeypatch.setattr(files, "write_json_lines", record)
    for number in range(3, 303, 3):
        log.write(number, jnp.float32(3 * number))
    assert len(rewritten) == 1
    assert losses(tmp_path) == [(number, number) for number in range(3, 303, 3)]


def test_a_bucket_is_written_at_a_bounded_rate(bucket, monkeypatch):
    """Nothing is appended there, but no checkpoint comes before its lines."""
    log = metrics.Metrics("gs://bucket/metrics/metrics.jsonl", 0, CONFIG)
    for number in range(3, 303, 3):
        log.write(number, jnp.float32(0))
    name = "metrics/metrics.jsonl"
    assert bucket.objects[name][1].count(b"\n") == 1
    log.flush()
    assert bucket.objects[name][1].count(b"\n") == 100
    monkeypatch.setattr(metrics, "REMOTE_SECONDS", 0)
    log.write(303, jnp.float32(0))
    assert bucket.objects[name][1].count(b"\n") == 101


def test_checkpoints_at_the_fractions_are_kept(images, tmp_path, monkeypatch):
    whole = run(images, tmp_path)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"6", "12"}
    assert training.saved_steps(CONFIG) == [4, 6, 8, 12]
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
            run(x, tmp_path / f"{same}-{view}", view=view)
            for view in (None, training.mirror)
        )
        assert (np.abs(straight["w"] - flipped["w"]).max() == 0) == same


def test_frozen_parameters_stay_as_they_are(images, tmp_path, one_device):
    """As if their gradients were 0, with no decay of weights: bit for bit."""
    config = dataclasses.replace(CONFIG, weight_decay=0.0, ema_decay=0.0)
    model = models.build(dataclasses.replace(SMALL, dropout=0.1))
    init_whole, apply = models.init_fn(model), models.train_apply_fn(model)
    frozen = {"mid_block": init_whole(stream(config.seed, "init"))["mid_block"]}
    traced = []

    def init_rest(key):
        params = init_whole(key)
        del params["mid_block"]
        return params

    def apply_pair(pair, *arguments):
        traced.append(pair)
        params, frozen = pair
        return apply(params | frozen, *arguments)

    def apply_masked(params, *arguments):
        stopped = jax.lax.stop_gradient(params["mid_block"])
        return apply(params | {"mid_block": stopped}, *arguments)

    def train(init, apply, folder, **options):
        recipe = training.Recipe(init, apply, SCHEDULE, config)
        return training.train(recipe, images, tmp_path / folder, **options)

    rest = train(init_rest, apply_pair, "pair", frozen=frozen)
    assert "mid_block" not in rest
    masked = train(init_whole, apply_masked, "masked")
    assert_same(masked.pop("mid_block"), frozen["mid_block"])
    assert_close(rest, masked, 1e-6)
    # They are in no checkpoint, and none is in a program: others need no new one.
    assert_same(training.load_params(init_rest, config, tmp_path / "pair"), rest)
    moved = jax.tree.map(lambda leaf: leaf + 1, frozen)
    other = train(init_rest, apply_pair, "other", frozen=moved)
    assert len(traced) == 1
    assert np.abs(other["conv_in"]["bias"] - rest["conv_in"]["bias"]).max() > 0


def test_a_checkpoint_of_another_model(images, tmp_path):
    run(images, tmp_path)

    def wider(key):
        return {"w": jnp.zeros((5, 5, 1, 1)), "b": jnp.zeros(1)}

    with pytest.raises(ValueError, match=r"another model: .*w is of shape \(3, 3"):
        training.load_params(wider, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="another model"):
        training.train(RECIPE._replace(init=wider), images, tmp_path)


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
        training.train(RECIPE._replace(apply=explode), images, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
