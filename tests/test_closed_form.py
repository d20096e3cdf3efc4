"""Scores against the retraining of a denoiser whose best parameters have a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax.attribution import random_scores
from dtrak_jax.digests import digest_rows
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
    """(images by role, how to train, a model's losses, those under every subset's)."""
    rng = np.random.default_rng(0)
    images, data, ids = {}, {}, {}
    for role, count in (("train", N), ("query", QUERIES)):
        images[role] = rng.uniform(-1, 1, (count, *SHAPE)).astype(np.float32)
        # Noise is known by an image's content, or by an id that says the same.
        ids[role] = digest_rows(images[role])
        columns = noised(images[role], id_words(ids[role]))
        data[role] = [np.asarray(a, np.float64) for a in columns]
    (z, eps), (query_z, query_eps) = data.values()

    def train(rows, seed):
        return best(z[rows], eps[rows])

    def losses(w):
        return np.mean((query_z @ w - query_eps) ** 2, axis=(1, 2))

    truth = dtrak.retrain(
        *(train, N, losses),
        subsets=SUBSETS,
        ids=ids["train"],
        query_ids=ids["query"],
    )
    return images, train, losses, truth


@pytest.fixture(scope="module")
def trak(retrained):
    """TRAK's scores, of gradients that are not projected."""
    images, best_of, _, truth = retrained
    params = {"w": jnp.float32(best_of(np.arange(N), 0))}
    train, query = (
        dtrak.featurize(TASK, params, x, dtrak.Projection("none"), ids=ids)
        for x, ids in zip(
            images.values(), (truth.train_ids, truth.query_ids), strict=True
        )
    )
    return dtrak.attribute(train, query, method="trak")


def test_trak_predicts_exact_retraining(retrained, trak):
    *_, truth = retrained
    found = dtrak.lds(trak, truth)
    assert found.value > 0.9 and found.low > 0.85
    guess = dtrak.lds(random_scores(truth.train_ids, truth.query_ids, 0), truth)
    better = found.less(guess)
    assert 0 < better.low < better.value == found.value - guess.value


def test_controls_predict_nothing(retrained, trak):
    """Nor does TRAK, of other queries."""
    *_, truth = retrained
    guess = random_scores(truth.train_ids, truth.query_ids, 0)
    for scores in (guess, np.roll(trak.scores, 1, axis=0)):
        found = dtrak.lds(scores, truth)
        assert found.low < 0 < found.high
        assert abs(found.value) < 0.15
    with pytest.raises(ValueError, match="the same prediction for every subset"):
        dtrak.lds(np.ones((QUERIES, N)), truth)


def test_removing_what_trak_ranks_first_raises_the_loss(retrained, trak):
    """More than removing random images, for every query; on everything nothing changes."""
    images, train, losses, _ = retrained

    def generate(w, rows):
        return np.asarray(inputs(images["query"][rows]) @ w).reshape(-1, *SHAPE)

    originals = generate(train(np.arange(N), 0), np.arange(QUERIES))
    options = {"count": N // 10, "queries": 6, "losses": losses}
    found = dtrak.counterfactual(trak, train, generate, originals, **options)
    medians = {(row["method"], row["metric"]): row["median"] for row in found.summary}
    assert medians["trak", "pixel_l2"] > 3 * medians["random", "pixel_l2"]
    assert medians["trak", "loss_increase"] > 10 * abs(
        medians["random", "loss_increase"]
    )
    for control in ("everything", "other-seed"):
        assert medians[control, "loss_increase"] == 0
        assert medians[control, "pixel_l2"] < 1e-6
    above = [row["loss_increase"] for row in found.rows if row["method"] == "trak"]
    assert len(above) == 6 and min(above) > 0
