"""The floor: what is no better than chance is below it, and what was planted above."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax.attribution import floor, group_floor, group_scores, pixel_cosine

N, QUERIES = 120, 40


def static(seed, n):
    """Pictures of noise."""
    return np.random.default_rng(seed).uniform(-1, 1, (n, 4, 4, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def attributed():
    """A function of queries that returns their scores under an untrained network."""
    keys = jax.random.split(jax.random.key(0), 2)
    shapes = (16, 24), (24, 16)
    params = [0.5 * jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True)]

    def apply(params, x, t, cond):
        hidden = jnp.tanh(x.reshape(len(x), 16) @ params[0])
        return (hidden @ params[1]).reshape(x.shape)

    task = dtrak.Task(apply, dtrak.linear_schedule(), timesteps=(100, 500))
    projection = dtrak.Projection("none")

    def features(images):
        return dtrak.featurize(task, params, images, projection, batch_size=160)

    train = features(static(0, N))
    return lambda queries: dtrak.attribute(train, features(queries)).scores


def test_static_stands_out_in_at_most_one_of_ten_queries(attributed):
    queries = static(1, QUERIES)
    for scores in (attributed(queries), pixel_cosine(static(0, N), queries)):
        above = scores > floor(scores)
        assert 0 <= above.any(axis=1).mean() <= 0.1
        columns = np.random.default_rng(0).integers(0, 6, N).astype(str)
        groups = group_scores(scores, columns)[1] > group_floor(scores, columns)
        assert groups.any(axis=1).mean() <= 0.1


@pytest.mark.parametrize("planted", [10, QUERIES])
def test_a_query_that_is_a_training_image_or_nearly_always_stands_out(
    attributed, planted
):
    """Also where every query is: the floor is not learnt from what it judges."""
    queries, train = static(1, QUERIES), static(0, N)
    near = 0.05 * static(2, planted)
    queries[:planted] = np.clip(train[:planted] + near, -1, 1)
    scores = attributed(queries)
    above = scores > floor(scores)
    rows = np.arange(planted)
    assert above[rows, rows].all() and above[rows].sum() <= np.ceil(1.1 * planted)
    assert above[planted:].any(axis=1).sum() <= 0.1 * QUERIES
    # And a group of it alone, or with two others.
    columns = np.arange(N) // 3
    groups = group_scores(scores, columns)[1] > group_floor(scores, columns)
    assert groups[rows, rows // 3].all()


def test_two_that_are_equally_strong_stand_out_and_so_do_copies():
    scores = np.random.default_rng(0).normal(size=(20, 100))
    scores[5, [3, 8]] = 30, 29
    assert np.flatnonzero((scores > floor(scores))[5]).tolist() == [3, 8]
    scores[:, 20:30] = scores[:, [3]] * (1 + 1e-6 * np.arange(10))
    assert (scores > floor(scores))[5].sum() == 12


def test_a_whole_group_stands_out_where_no_image_does():
    scores = np.random.default_rng(0).normal(size=(20, 100))
    columns = np.arange(100) % 5
    scores[:4, columns == 2] += 1.2
    above = group_scores(scores, columns)[1] > group_floor(scores, columns)
    assert above[:4, 2].all() and above[4:].any(axis=1).sum() <= 2
    assert not (scores > floor(scores))[:4].any()


def test_what_is_high_for_every_query_says_nothing_of_one():
    """Neither an image that is always first nor one whose gradient is huge stands out."""
    scores = np.random.default_rng(0).normal(size=(40, 200))
    scores[:, 0] += 50
    scores[:, 1:4] *= 30
    above = scores > floor(scores)
    assert not above[:, 0].any() and above[:, 1:].any(axis=1).mean() <= 0.15


def test_the_floor_does_not_depend_on_order_or_on_the_scale_of_a_query():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(12, 50))
    limit = floor(scores)
    rows, columns = rng.permutation(12), rng.permutation(50)
    np.testing.assert_allclose(
        floor(scores[rows][:, columns]), limit[rows][:, columns], atol=1e-12
    )
    np.testing.assert_allclose(floor(3 * scores - 1), 3 * limit - 1, atol=1e-12)
    more = rng.normal(size=(4, 50))
    together = floor(np.concatenate([scores, more]))
    np.testing.assert_array_equal(
        floor(more, unrelated=scores), together[[*range(12, 16)]]
    )


def test_too_few_are_not_judged_and_constant_scores_never_stand_out():
    rng = np.random.default_rng(0)
    assert floor(rng.normal(size=(7, 50))) is None
    assert floor(rng.normal(size=(50, 11))) is None
    assert floor(rng.normal(size=(7, 50)), rng.normal(size=(1, 50))) is not None
    assert group_floor(rng.normal(size=(20, 50)), np.zeros(50, int)) is None
    assert not (np.zeros((9, 20)) > floor(np.zeros((9, 20)))).any()
    scores = rng.normal(size=(20, 50))
    scores[3] = 2
    assert not (scores > floor(scores))[3].any()
    with pytest.raises(ValueError, match="finite"):
        floor(np.full((9, 20), np.nan))
