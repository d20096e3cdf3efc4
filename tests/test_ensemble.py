"""Retrained models are those that would be trained alone, whatever interrupts them."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest
from conftest import apply, init, train_apply

from dtrak_jax import diffusion, parallel, training
from dtrak_jax.config import EnsembleConfig, TrainConfig
from dtrak_jax.evaluation import outputs
from dtrak_jax.rng import fold_in, id_words, normal, stream
from dtrak_jax.training import programs
from dtrak_jax.training.ensemble import Member

SCHEDULE = diffusion.linear_schedule()
CONFIG = TrainConfig(steps=12, batch_size=5, learning_rate=1e-2, save_every=4)
MEMBERS = [
    Member("a", np.array([0, 1, 2, 5, 7, 11]), 0),
    Member("b", np.array([3, 4, 6, 8, 9, 10, 11]), 0),
    Member("c", np.array([0, 1, 2, 5, 7, 11]), 5),
]


RECIPE = training.Recipe(init, train_apply, SCHEDULE, CONFIG)


def train(images, directory, members=MEMBERS):
    training.train_members(RECIPE, images, members, directory)


def train_alone(images, member, directory, recipe=RECIPE, **options):
    config = dataclasses.replace(CONFIG, seed=member.seed)
    recipe = recipe._replace(config=config)
    return training.train(recipe, images[member.rows], directory, **options)


def load(directory, names="abc"):
    return training.load_members(init, list(names), CONFIG.steps, directory)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ensemble")
    train(images, directory)
    return directory


def test_members_equal_those_trained_alone(images, trained, tmp_path, one_device):
    stack = load(trained)
    for i, member in enumerate(MEMBERS):
        alone = train_alone(images, member, tmp_path / member.name)
        params = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        # Another program, so its last digit may differ.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), params, alone)
    # They differ in their images, and in their seeds.
    w = stack["w"]
    assert np.abs(w[0] - w[1]).max() > 1e-4
    assert np.abs(w[0] - w[2]).max() > 1e-4


def test_conditions_and_frozen_parameters_are_a_members_too(images, tmp_path):
    """Each member's examples have their own rows of cond; all share what is frozen."""
    cond = {"level": np.linspace(-1, 1, len(images), dtype=np.float32)}
    frozen = {"gain": np.float32(0.5)}

    def conditioned(pair, x, t, cond, keys):
        params, frozen = pair
        level = cond["level"].reshape(-1, 1, 1, 1)
        return apply(params, x, t, None) + frozen["gain"] * level

    def train_both(name, cond):
        member, folder = MEMBERS[2], tmp_path / name
        recipe = RECIPE._replace(apply=conditioned, view=training.mirror)
        own = {"level": cond["level"][member.rows]}
        alone = train_alone(
            images, member, folder / "alone", recipe, cond=own, frozen=frozen
        )
        training.train_members(
            recipe, images, [member], folder, cond=cond, frozen=frozen
        )
        return alone, jax.tree.map(lambda leaf: leaf[0], load(tmp_path / name, "c"))

    alone, params = train_both("as-given", cond)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), params, alone)
    other, _ = train_both("turned", {"level": cond["level"][::-1].copy()})
    assert np.abs(other["w"] - alone["w"]).max() > 1e-4


def test_one_device_and_other_company_change_nothing(
    images, trained, tmp_path, one_device
):
    train(images, tmp_path, MEMBERS[::-1])
    assert_same(load(tmp_path), load(trained))


def test_members_share_a_device_and_equal_those_alone(
    images, trained, tmp_path, request
):
    """Three at a time on the first device; of more, what is left over is spread evenly."""
    assert [len(g) for g in parallel.groups(range(8 * 2 + 11), 2)] == [16, 8, 3]
    request.getfixturevalue("one_device")
    training.train_members(RECIPE, images, MEMBERS, tmp_path / "three", per_device=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5),
        load(tmp_path / "three"),
        load(trained),
    )


def test_growing_trains_the_new_members_alone(images, tmp_path, monkeypatch, trained):
    train(images, tmp_path, MEMBERS[:1])
    seen = count_steps(monkeypatch)
    train(images, tmp_path)
    assert len(seen) == CONFIG.steps  # one group of the two new ones
    assert_same(load(tmp_path), load(trained))
    seen.clear()
    train(images, tmp_path)
    assert not seen


def count_steps(monkeypatch, then=lambda count: None):
    """A list that grows with every training step of a group."""
    seen, compiled = [], programs.member_step_function

    def compile_and_count(*arguments):
        step = compiled(*arguments)

        def counted(*arrays):
            seen.append(len(arrays[2]))
            then(len(seen))
            return step(*arrays)

        return counted

    monkeypatch.setattr(programs, "member_step_function", compile_and_count)
    return seen


@pytest.mark.parametrize("at", [6, 12])
def test_an_interrupt_loses_no_step(images, tmp_path, monkeypatch, trained, at):
    def interrupt(count):
        if count == at:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        count_steps(patch, interrupt)
        if at < CONFIG.steps:
            with pytest.raises(KeyboardInterrupt, match=f"step {at} of 12"):
                train(images, tmp_path)
        else:
            train(images, tmp_path)
    seen = count_steps(monkeypatch)
    train(images, tmp_path)
    assert len(seen) == CONFIG.steps - at
    assert_same(load(tmp_path), load(trained))


def test_a_kill_loses_no_finished_member(
    images, tmp_path, monkeypatch, trained, one_device
):
    def kill(count):
        if count == 18:  # the second member, two steps after it was saved
            raise SystemExit

    with monkeypatch.context() as patch:
        count_steps(patch, kill)
        with pytest.raises(SystemExit):
            train(images, tmp_path)
    seen = count_steps(monkeypatch)
    train(images, tmp_path)
    assert len(seen) == 3 * 12 - 16
    assert_same(load(tmp_path), load(trained))


def test_missing_and_diverging_members_are_named(images, trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="1 models are not trained: d"):
        load(trained, "ad")
    with pytest.raises(FloatingPointError, match="the training loss of a"):
        train(images * np.float32(np.nan), tmp_path, MEMBERS[:1])


def measured(images, trained, names="abc", **changes):
    options = {"timesteps": 4, "draws": 2, "seed": 0, "batch_size": 5} | changes
    ids = np.array([f"query-{i}" for i in range(len(images))])
    settings = EnsembleConfig(**options)
    return outputs.measure(apply, SCHEDULE, load(trained, names), images, ids, settings)


def test_losses_are_means_over_timesteps_and_draws(images, trained):
    """A loop that shares nothing with `measure` but the noise."""
    losses = measured(images, trained)
    assert losses.shape == (3, 12)
    params = jax.tree.map(lambda leaf: leaf[1], load(trained))
    words = id_words(["query-7"])[0]
    total = []
    for t in (125, 375, 625, 875):
        for draw in range(2):
            key = fold_in(stream(0, "outputs"), *words, t, draw)
            eps = normal(key, (8, 8, 1))
            signal_share = SCHEDULE.alpha_bar[t]
            x_t = np.sqrt(signal_share) * images[7] + np.sqrt(1 - signal_share) * eps
            prediction = apply(params, x_t[None], np.array([t]), None)[0]
            total.append(np.mean((prediction - eps) ** 2))
    np.testing.assert_allclose(losses[1, 7], np.mean(total), rtol=1e-5)


def test_losses_do_not_depend_on_batches_or_company(images, trained):
    losses = measured(images, trained)
    np.testing.assert_allclose(
        measured(images, trained, batch_size=100), losses, rtol=1e-5
    )
    np.testing.assert_allclose(measured(images, trained, "b")[0], losses[1], rtol=1e-5)
    assert np.abs(measured(images, trained, seed=1) - losses).max() > 1e-4


def test_timesteps():
    grid = outputs.timestep_grid
    assert grid(1000, SCHEDULE).tolist() == list(range(1000))
    assert grid(4, SCHEDULE).tolist() == [125, 375, 625, 875]
    assert grid((7, 3), SCHEDULE).tolist() == [7, 3]
    for wrong in (0, 1001, (), (1000,), (-1,)):
        with pytest.raises(ValueError, match=r"ensemble\.timesteps is"):
            grid(wrong, SCHEDULE)
