"""Metagradients against finite differences of training, in float64, and what is refused."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest
from conftest import apply, init, train_apply

import dtrak_jax as dtrak
from dtrak_jax import diffusion, host, training
from dtrak_jax.config import AttributionConfig, Config, TrainConfig
from dtrak_jax.evaluation.outputs import measure, measured_gradients
from dtrak_jax.training import metagradient, step, weighted
from dtrak_jax.training.weighted import Course, train_weighted

SCHEDULE = diffusion.linear_schedule()
# A high rate, so that 14 steps go far; the last batch of every epoch is filled up.
CONFIG = TrainConfig(
    steps=14, batch_size=5, learning_rate=3e-2, eps_root=1e-6, weight_decay=1e-2,
    clip_norm=0.5, log_every=4,
)  # fmt: skip
RECIPE = training.Recipe(init, train_apply, SCHEDULE, CONFIG)
N, QUERIES = 12, 3


def changed(recipe=RECIPE, **changes):
    return recipe._replace(config=dataclasses.replace(recipe.config, **changes))


def query_losses(images):
    settings = {"timesteps": 4, "draws": 2, "batch_size": 3}
    return dtrak.QueryLosses(apply, SCHEDULE, images[:QUERIES], **settings)


@pytest.fixture
def float64(monkeypatch):
    """Training in float64, which the package's own switches prevent."""
    for name in ("train_step", "first_state"):
        monkeypatch.setattr(weighted, name, inspect.unwrap(getattr(step, name)))
    weighted.replayed_step.cache_clear()
    with jax.enable_x64(True):
        yield
    weighted.replayed_step.cache_clear()


def wide_init(key):
    return jax.tree.map(lambda leaf: leaf.astype(float), init(key))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_metagradients_are_finite_differences_of_training(images, ema_decay, float64):
    """With flips, clipping in some of the steps, weight decay and short batches."""
    recipe = RECIPE._replace(init=wide_init, view=training.mirror)
    wide = images.astype(np.float64)
    course = Course(changed(recipe, ema_decay=ema_decay), (wide, None))
    losses = query_losses(images)
    queries = wide[:QUERIES], losses.ids, losses

    def measured(params):
        return measured_gradients(apply, SCHEDULE, params, *queries)

    def after(weights):
        params = inspect.unwrap(train_weighted)(course, weights)
        assert params["w"].dtype == np.float64
        stack = jax.tree.map(lambda leaf: leaf[None], params)
        return measure(apply, SCHEDULE, stack, *queries)[0]

    ours = metagradient.metagradient(course, measured, QUERIES)
    width = 1e-4
    for n in (0, 4, 11):
        unit = width * np.eye(N)[n]
        expected = (after(1 + unit) - after(1 - unit)) / (2 * width)
        np.testing.assert_allclose(ours[:, n], expected, rtol=1e-5)
    # However many states are kept, and queries pulled back at a time.
    for interval, per_device in ((1, 1), (5, 2), (14, 1)):
        how = {"interval": interval, "per_device": per_device}
        again = metagradient.metagradient(course, measured, QUERIES, **how)
        np.testing.assert_allclose(again, ours, rtol=1e-9)


def test_weights_of_one_train_as_training_does(images, tmp_path, one_device):
    ours = train_weighted(Course(RECIPE, (images, None)), np.ones(N, np.float32))
    expected = training.train(RECIPE, images, tmp_path)
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_an_example_of_weight_0_may_be_any(images):
    weights, other = np.ones(N, np.float32), images.copy()
    weights[3], other[3] = 0, 0
    a, b = (train_weighted(Course(RECIPE, (x, None)), weights) for x in (images, other))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_scores_of_one_step_are_inner_products_of_gradients(images):
    """Far below the root AdamW is descent: m / sqrt(eps_root), unclipped, without decay."""
    recipe = changed(
        steps=1, batch_size=N, warmup=0.0, eps_root=1e6, clip_norm=1e9, weight_decay=0.0,
        learning_rate=1e-2,
    )  # fmt: skip
    losses, course = query_losses(images), Course(recipe, (images, None))
    scores = dtrak.metagradients(
        recipe, images, losses, ids=[f"i{n}" for n in range(N)]
    )
    assert repr(scores) == "Scores(metagradient, 3 queries × 12 training images)"
    state, batch = course.first(), course.batch(0)

    def loss(params, i):
        (_, values), _ = step.gradient(recipe, params, 0, batch, course.seed_word, None)
        return values[i]

    rows = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(state.params, np.arange(N))
    queries = losses.images, losses.ids, losses
    params = train_weighted(course, np.ones(N, np.float32))
    query = measured_gradients(apply, SCHEDULE, params, *queries)
    flat = [
        np.concatenate([t["b"], t["w"].reshape(-1, 9)], axis=1) for t in (query, rows)
    ]
    expected = 1e-2 / N / 1e3 * flat[0] @ flat[1].T
    ours = scores.scores[:, batch.index]
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_what_was_stopped_continues(images, tmp_path, monkeypatch):
    """Bit for bit, and from where it was; in the end nothing is left."""
    losses, pulled = query_losses(images), []
    expected = dtrak.metagradients(RECIPE, images, losses, interval=4).scores
    pull = metagradient.WayBack.pull

    def stopping(self, step, state):
        pulled.append(step)
        if len(pulled) == 7:
            raise KeyboardInterrupt
        pull(self, step, state)

    monkeypatch.setattr(metagradient.WayBack, "pull", stopping)
    with pytest.raises(KeyboardInterrupt):
        dtrak.metagradients(RECIPE, images, losses, interval=4, store=tmp_path)
    again = dtrak.metagradients(RECIPE, images, losses, interval=5, store=tmp_path)
    assert pulled == [*range(13, 6, -1), *range(7, -1, -1)]
    np.testing.assert_allclose(again.scores, expected, rtol=1e-4, atol=1e-7)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_differentiated_is_refused(images, monkeypatch):
    losses = query_losses(images)
    with pytest.raises(ValueError, match="train.eps_root is 0.* such as 1e-8"):
        dtrak.metagradients(changed(eps_root=0.0), images, losses)
    with pytest.raises(ValueError, match="interval is 0"):
        dtrak.metagradients(RECIPE, images, losses, interval=0)
    with pytest.raises(ValueError, match="per_device"):
        dtrak.metagradients(RECIPE, images, losses, per_device=0)
    with pytest.raises(ValueError, match="cond has 1 rows and images"):
        dtrak.metagradients(RECIPE, images, losses, cond=np.zeros(1))
    with pytest.raises(ValueError, match="uint8"):
        dtrak.metagradients(RECIPE, np.zeros(images.shape, np.uint8), losses)

    def other(params, x, t, cond):
        return 1.5 * apply(params, x, t, cond)

    def lacking(params, x, t, cond):
        return x * params["gain"]

    steep = diffusion.linear_schedule(beta_end=0.03)
    for changes, words in (
        ({"apply": other}, "predicts otherwise than recipe.apply .* mean square"),
        ({"apply": lacking}, "does not take the parameters of recipe.init: 'gain'"),
        ({"schedule": steep}, r"losses.schedule is .* and recipe.schedule"),
    ):
        wrong = dataclasses.replace(losses, **changes)
        with pytest.raises(ValueError, match=words):
            dtrak.metagradients(RECIPE, images, wrong)
    with pytest.raises(TypeError, match="losses is"):
        dtrak.metagradients(RECIPE, images, images)
    methods = AttributionConfig(methods=("metagradient",))
    with pytest.raises(ValueError, match="'metagradient', which needs train.eps_root"):
        Config(attribution=methods)
    monkeypatch.setattr(host, "memory", lambda: 1500)
    with pytest.raises(MemoryError, match="3 queries through 14 steps take about"):
        dtrak.metagradients(RECIPE, images, losses)
