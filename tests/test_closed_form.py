"""Scores against the retraining of a denoiser whose best parameters have a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax.attribution import random_scores
from dtrak_jax.evaluation import lds
from dtrak_jax.evaluation.truth import RetrainedLosses
from dtrak_jax.rng import id_words

SHAPE, D = (2, 2, 1), 4
N, QUERIES, SUBSETS = 600, 24, 48
SCHEDULE = dtrak.linear_schedule()


def linear(params, x, t, cond):
    """A denoiser that is linear in its parameters [D + 1, D]."""
    return (inputs(x) @ params["w"]).reshape(x.shape)


def inputs(x):
    """What the parameters are multiplied with [n, D + 1]."""
    return jnp.concatenate([x.reshape(len(x), D), jnp.ones((len(x), 1))], axis=1)


TASK = dtrak.Task(
    linear,
    SCHEDULE,
    measurement="loss",
    timesteps=(200, 500),
    noise="independent",
    per_timestep=False,
)


@jax.jit
def noised(x, words):
    """Inputs [n, T, D + 1] and noise [n, T, D] of all images, at every timestep."""

    def noise(pair):
        return jax.vmap(lambda w: TASK.eps(jnp.int32(pair), w, 0, SHAPE))(words)

    pairs = []
    for pair, (t, _) in enumerate(TASK.pairs):
        eps = noise(pair)
        x_t = SCHEDULE.add_noise(x, eps, jnp.full(len(x), t))
        pairs.append((inputs(x_t), eps.reshape(len(x), D)))
    return tuple(jnp.stack(columns, axis=1) for columns in zip(*pairs, strict=True))


def best(z, eps):
    """The parameters of the least squared error, by the normal equations."""
    z, eps = z.reshape(-1, D + 1), eps.reshape(-1, D)
    return np.linalg.solve(z.T @ z + 1e-6 * np.eye(D + 1), z.T @ eps)


@pytest.fixture(scope="module")
def retrained():
    """(images by role, parameters of all, the queries' losses under every subset's)."""
    rng = np.random.default_rng(0)
    images, data = {}, {}
    for role, count in (("train", N), ("query", QUERIES)):
        images[role] = rng.uniform(-1, 1, (count, *SHAPE)).astype(np.float32)
        words = id_words([f"{role} {role}-{i}" for i in range(count)])
        data[role] = [np.asarray(a, np.float64) for a in noised(images[role], words)]
    (z, eps), (query_z, query_eps) = data.values()
    masks = rng.permuted(np.tile(np.arange(N) % 2 == 0, (SUBSETS, 1)), axis=1)
    losses = [
        np.mean((query_z @ best(z[mask], eps[mask]) - query_eps) ** 2, axis=(1, 2))
        for mask in masks
    ]
    ids = [
        np.array([f"{role}-{i}" for i in range(len(images[role]))]) for role in images
    ]
    truth = RetrainedLosses(np.stack(losses)[:, None], masks, ids[1], ids[0])
    return images, {"w": jnp.float32(best(z, eps))}, truth


@pytest.fixture(scope="module")
def trak(retrained):
    """TRAK's scores, of gradients that are not projected."""
    images, params, truth = retrained
    train, query = (
        dtrak.featurize(TASK, params, x, dtrak.Projection("none"), ids=ids, role=role)
        for (role, x), ids in zip(
            images.items(), (truth.train_ids, truth.query_ids), strict=True
        )
    )
    return dtrak.attribute(train, query, method="trak").scores


def test_trak_predicts_exact_retraining(retrained, trak):
    _, _, truth = retrained
    estimate, _ = lds.bootstrap(truth.predict(trak), truth)
    assert estimate.value > 0.9 and estimate.low > 0.85


def test_controls_predict_nothing(retrained, trak):
    """Nor does TRAK, of other queries."""
    _, _, truth = retrained
    guess = random_scores(truth.train_ids, truth.query_ids, 0)
    for scores in (guess, np.roll(trak, 1, axis=0)):
        estimate, _ = lds.bootstrap(truth.predict(scores), truth)
        assert estimate.low < 0 < estimate.high
        assert abs(estimate.value) < 0.15
    assert lds.lds(truth.predict(np.ones_like(trak)), truth) == 0
