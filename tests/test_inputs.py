"""What users hand over, and what they see: numbers, arrays, ranges, roles, reprs."""

import dataclasses
import functools
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax import checks, host
from dtrak_jax.attribution import Damping, Kernels
from dtrak_jax.config import FeaturesConfig
from dtrak_jax.data import Dataset
from dtrak_jax.features.fingerprint import noise_words

SCHEDULE = dtrak.linear_schedule()
SKETCH = dtrak.Projection(dim=16)
PARAMS = np.eye(3, dtype=np.float32)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (20, 4, 4, 3)).astype(np.float32)


def network(params, x, t, cond):
    shift = 0.0
    if cond is not None:
        shift = jnp.reshape(cond["y"], (-1, 1, 1, 1)) * 0.1
    return jnp.tanh(x @ params) + shift


def task(**changes):
    settings = {"measurement": "loss", "timesteps": (300,), "schedule": SCHEDULE}
    return dtrak.Task(network, **settings | changes)


TASK = task()


def features(images=IMAGES, params=PARAMS, task=TASK, **options):
    return dtrak.featurize(task, params, images, SKETCH, **options)


# Numbers


def test_numbers_of_any_library_are_numbers(tmp_path):
    same = task(timesteps=4, draws=2, seed=3)
    for kind in (np.int64, np.uint8, jnp.int32, np.array):
        other = task(timesteps=kind(4), draws=kind(2), seed=kind(3))
        assert other == same and other.grid == same.grid and hash(other)
        assert dtrak.Projection(dim=kind(16), seed=kind(0)) == SKETCH
    for grid in ([1, 5], np.array([1, 5]), range(1, 9, 4), (np.int64(1), 5)):
        assert task(timesteps=grid) == task(timesteps=(1, 5))
    assert Damping.of(np.float32(0.5)) == Damping.of(jnp.float32(0.5)) == Damping(0.5)
    # A store has them in its metadata.
    numbers = {"batch_size": np.int64(8), "store": tmp_path}
    other = features(task=task(timesteps=np.int64(1), draws=np.int64(2)), **numbers)
    scores = dtrak.attribute(other, other, damping=dtrak.absolute(np.float32(2)))
    scores.save(tmp_path / "scores.npz")
    assert dtrak.Scores.load(tmp_path / "scores.npz").damping == dtrak.absolute(2.0)
    assert type(FeaturesConfig(dim=np.int64(64)).dim) is int


@pytest.mark.parametrize(
    "value", [True, np.True_, 1.5, "1", None, 2**32, -1, [1], 1j, np.float32(1)]
)
def test_what_is_no_seed_is_refused(value):
    with pytest.raises(ValueError, match="seed is .*; it must be an integer between 0"):
        task(seed=value)


@pytest.mark.parametrize("value", [True, np.True_, "1", np.nan, [1.0], 1j, -1])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="damping is .*; it must be a finite number"):
        dtrak.attribute(IMAGES[:, 0, 0], IMAGES[:, 0, 0], damping=value)


@pytest.mark.parametrize("value", [1.5, (1.5,), np.array([100.0, 400.0]), True, "10"])
def test_timesteps_that_are_no_integers_are_refused(value):
    with pytest.raises(ValueError, match="timestep.* is .*; it must be an integer"):
        task(timesteps=value)


# Arrays


def test_arrays_of_any_kind_give_the_same_features():
    coarse = np.round(IMAGES * 4) / 4
    labels = np.arange(20, dtype=np.int32)
    expected = features(coarse, cond={"y": labels})
    for images, params, cond in (
        (coarse.tolist(), PARAMS.tolist(), {"y": labels.tolist()}),
        (coarse.astype(np.float64), PARAMS.astype(np.float64), {"y": list(labels)}),
        (coarse.astype(np.float16), jnp.asarray(PARAMS), {"y": labels.astype(int)}),
        (jnp.asarray(coarse, jnp.bfloat16), PARAMS, {"y": jnp.asarray(labels)}),
    ):
        other = features(images, params, cond=cond)
        np.testing.assert_array_equal(other, expected)
        assert other.fingerprint == expected.fingerprint


def test_what_is_too_large_is_refused_before_it_is_made(tmp_path, monkeypatch):
    """A dim beyond the gradient's size is said, and one beyond the host's refused."""
    with pytest.warns(UserWarning, match="dim is 16, and a gradient has 9 numbers"):
        made = features(IMAGES[:2], store=tmp_path / "made")
    large, pairs = dtrak.Projection(dim=10**10), task(timesteps=3)
    what = "features of 20 images with 3 gradients each of dim=10000000000 take about "
    with pytest.raises(MemoryError, match=f"{what}.*; this host has"):
        dtrak.featurize(pairs, PARAMS, IMAGES, large)
    monkeypatch.setattr(host, "free_disk", lambda folder: 2 * 4 * (16 + 1 + 1) - 1)
    with pytest.raises(OSError, match="take 144 B on the disk of .*other"):
        features(IMAGES[:2], store=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    # What is there already takes no more.
    again = features(IMAGES[:2], store=tmp_path / "made")
    np.testing.assert_array_equal(again, made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"params": {"w": jnp.tanh}},
            "params: w is .*; it must be an array of numbers",
        ),
        ({"params": [[1.0], [1.0, 2.0]]}, "params is a list of unequal lists"),
        ({"cond": {"y": np.int64(3)}}, "cond: y is 3; it must be an array with rows"),
        ({"cond": {"y": ["cat"] * 20}}, "cond: y/0 is 'cat'; it must be an array"),
        (
            {"cond": {"y": [2**40] * 20}},
            "cond: y has integers that do not fit in int32",
        ),
        ({"cond": {"y": [1] * 19}}, "cond: y has 19 rows and images 20"),
        ({"images": [[1, 2], [3]]}, "images are lists of unequal lengths"),
        ({"images": IMAGES > 0}, "images are bool; they must be float32"),
        ({"images": IMAGES + 1j}, "images are complex64; they must be float32"),
        ({"bounds": (1, -1)}, r"bounds is \(1, -1\); it must be \(least, largest\)"),
        ({"role": "test"}, "role is 'test'; it must be one of: 'train', 'query'"),
    ],
)
def test_what_is_no_array_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        features(**arguments)


def test_numbers_are_no_ids():
    with pytest.raises(TypeError, match=r"ids\[0\] is 0; ids must be strings"):
        features(ids=range(20))
    for ids in ("abcdefghijklmnopqrst", 20):
        with pytest.raises(TypeError, match="ids is .*; it must be a list"):
            features(ids=ids)


@pytest.mark.parametrize(
    ("scale", "shift", "said"),
    [
        (1, 0, None),
        (3, 0, r"between -2.99\d* and 2.99\d*. .*bounds=\(-3, 3\)"),
        (0.5, 0.5, r"They look like pixels in \[0, 1\]"),
        (127, 128, r"They look like pixels in \[0, 255\]"),
    ],
)
def test_images_without_declared_bounds_are_warned_of(scale, shift, said):
    images = IMAGES * scale + shift
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checks.check_images(images, None)
        checks.check_images(images, (images.min(), images.max()))
    assert len(caught) == (said is not None)
    if said:
        with pytest.warns(UserWarning, match=said):
            undeclared = features(images)
        declared = features(images, bounds=(-999, 999))
        np.testing.assert_array_equal(undeclared, declared)
        with pytest.raises(ValueError, match=r"they must be in \[-0.4, 0.4\]"):
            features(images, bounds=(-0.4, 0.4))


def test_bytes_are_pixels_only_where_that_is_declared():
    pixels = np.arange(20 * 48).reshape(IMAGES.shape).astype(np.uint8)
    with pytest.raises(ValueError, match="uint8; they must be float32 .*127.5"):
        features(pixels)
    expected = features(pixels.astype(np.float32), bounds=(0, 255))
    np.testing.assert_array_equal(features(pixels, bounds=(0, 255)), expected)


# Networks and measurements


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
def test_networks_of_half_precision_are_measured_in_float32(half):
    def halved(params, x, t, cond):
        return network(params.astype(half), x.astype(half), t, cond)

    def rounded(params, x, t, cond):
        return halved(params, x, t, cond).astype(jnp.float32)

    tasks = (dataclasses.replace(task(), apply=apply) for apply in (halved, rounded))
    made, expected = (features(task=task) for task in tasks)
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(made.losses, expected.losses)


def named(name, value=jnp.mean):
    def measurement(prediction, target, t, schedule):
        return value(prediction)

    measurement.__name__ = name
    return measurement


@pytest.mark.parametrize(
    ("measurement", "message"),
    [
        ((named("f"), named("f")), "2 entries that are called 'f'"),
        (("square", "mean-squared-l2-norm"), "2 entries that are called 'square'"),
        (named("loss"), "is called 'loss', which is known already"),
        (named("losses"), "is called 'losses', which is known already"),
        (functools.partial(named("f")), "no name .* set its __name__"),
    ],
)
def test_measurements_have_names_of_their_own(measurement, message):
    with pytest.raises(ValueError, match=message):
        task(measurement=measurement)


def test_a_measurement_makes_a_number():
    for value in (jnp.tanh, lambda y: (y > 0).sum(), lambda y: None):
        with pytest.raises(ValueError, match="the measurement 'f' makes .* one number"):
            features(task=task(measurement=named("f", value)))
    own = features(task=task(measurement=named("dtrak")))
    # It is not the method of that name.
    assert dtrak.attribute(own, own).method == "kernel-dtrak"


def one_picture(**changes):
    """The arguments of a report, of which some are wrong."""
    made = dtrak.attribute(IMAGES[:, 0, 0], IMAGES[:2, 0, 0])
    good = {"path": "none/page.html", "scores": made, "images": IMAGES}
    return dtrak.write_report(**good | {"queries": IMAGES[:2]} | changes)


RETRAIN = functools.partial(dtrak.retrain, n=9, losses=len, subsets=8)
LDS = functools.partial(dtrak.lds, np.ones((2, 20)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dtrak.featurize(None, PARAMS, IMAGES, SKETCH), "task is None"),
        (lambda: dtrak.featurize(TASK, PARAMS, IMAGES, 16), "projection is 16"),
        (lambda: features(IMAGES[0]), r"images have shape \(4, 4, 3\)"),
        (lambda: features(store=IMAGES), r"an array of float32 \(20, .* as a path"),
        (lambda: features(ids=range(20)), r"ids\[0\] is 0; ids must be strings"),
        (lambda: features(bounds=1), "bounds is 1; it must be a list"),
        (lambda: features(bounds=(1, -1)), r"bounds is \(1, -1\)"),
        (lambda: dtrak.Task(3, SCHEDULE), "apply is 3; it must be a function"),
        (lambda: task(schedule=None), "schedule is None; it must be Schedule"),
        (lambda: task(noise=IMAGES), "noise is an array .*; it must be one of"),
        (
            lambda: task(measurement=[["loss"]]),
            "measurement is .'loss'.; it must be one",
        ),
        (lambda: dtrak.Schedule("0.1"), "betas is '0.1'; it must be a list"),
        (lambda: dtrak.linear_schedule("9"), "steps is '9'; it must be an integer"),
        (lambda: dtrak.attribute(IMAGES[0], IMAGES[0], method=["trak"]), "method is "),
        (lambda: dtrak.damping_path(PARAMS, PARAMS, 0.1), "dampings is 0.1"),
        (
            lambda: dtrak.damping_path(PARAMS, PARAMS, subsets=[1]),
            r"must be bool .*3\]",
        ),
        (lambda: RETRAIN(IMAGES), r"train is an array of float32 \(20, 4, 4, 3\)"),
        (lambda: RETRAIN(len, n=IMAGES), "n is an array"),
        (
            lambda: RETRAIN(len, ids="abcdefghi"),
            "ids is 'abcdefghi'; it must be a list",
        ),
        (lambda: LDS(PARAMS), "truth is an array"),
        (lambda: dtrak.load_images(3), "folder is 3; it must be str"),
        (lambda: dtrak.load_images(".", groups="ab", csv="x"), "groups is 'ab'"),
        (lambda: dtrak.merge("abc", "d"), "stores is 'abc'; it must be a list"),
        (
            lambda: dtrak.models.apply_fn({"w": 1}),
            "model is {'w': 1}; it must be Module",
        ),
        (lambda: one_picture(groups=["a"]), r"groups is \['a'\]; it must be dict"),
        (lambda: one_picture(truth=1), "truth is 1; it must be RetrainedLosses"),
        (lambda: one_picture(lds=LDS), "lds is functools.*; give truth="),
        (
            lambda: one_picture(images=IMAGES[0]),
            r"images: images have shape \(4, 4, 3\)",
        ),
        (
            lambda: one_picture(metrics=[{"step": 1}]),
            "has 'step'; it must have step, loss",
        ),
        (lambda: one_picture(counterfactual={}), "it must have settings, rows"),
        (lambda: one_picture(grops={}), "an option is 'grops'; it must be one of"),
    ],
)
def test_what_is_of_another_kind_is_named(call, message):
    """The error has the argument, what it is without the numbers, and what it must be."""
    with pytest.raises((TypeError, ValueError), match=message) as error:
        call()
    assert len(str(error.value)) < 500


# Noise


def test_no_independent_noise_is_shared_by_accident():
    """A query finds itself without roles; it does not by its place, nor with roles."""
    independent = task(noise="independent")
    other = np.random.default_rng(1).uniform(-1, 1, IMAGES.shape).astype(np.float32)
    hashes = {"ids": ["0", "1"], "images": ["a", "b"]}
    words = [noise_words(hashes, role).tolist() for role in (None, "train", "query")]
    assert len({tuple(pair) for pairs in words for pair in pairs}) == 6
    assert noise_words(hashes | {"ids": ["5", "6"]}, None).tolist() == words[0]

    def features_of(images, role=None):
        return features(images, task=independent, role=role)

    alone, train = features_of(IMAGES), features_of(IMAGES, "train")
    np.testing.assert_array_equal(alone, features_of(IMAGES))
    assert (np.asarray(alone) != np.asarray(train)).any(axis=-1).all()
    dtrak.attribute(train, features_of(other, "query"))
    dtrak.attribute(train, train)
    with pytest.raises(ValueError, match="both made with role='train'"):
        dtrak.attribute(train, features_of(other, "train"))
    # Other kinds of noise have no role.
    train, query = [features(role=role) for role in ("train", "query")]
    assert train.fingerprint == query.fingerprint
    dtrak.attribute(train, query)
    with pytest.raises(ValueError, match="role='query' and .* in each other's place"):
        dtrak.attribute(query, train)


def test_scores_that_tell_nothing_apart_are_warned_of():
    """A query without a gradient, and training images that are one."""
    phi, query = np.eye(4), np.array([[1.0, 2, 3, 4], [0, 0, 0, 0]])
    with pytest.warns(UserWarning, match="1 of 2 queries, such as '1', have the same"):
        dtrak.attribute(phi.tolist(), query.tolist())
    with pytest.warns(UserWarning, match="2 of 2 queries, such as '0', have the same"):
        dtrak.attribute(np.ones((3, 4)), query + 1)


def test_noise_of_a_slot_is_warned_of():
    made = features(task=task(noise="reference"))
    with pytest.warns(UserWarning, match="one in 52 of all"):
        dtrak.attribute(made, made)


# What is shown


def test_reprs_are_a_line(tmp_path):
    several = task(timesteps=5, draws=2, measurement=("loss", "square"))
    made = features(store=tmp_path / "s", task=task(timesteps=5, draws=2))
    scores = dtrak.attribute(made, made)
    store, data = f"{tmp_path}/s/", Dataset.of(IMAGES, list(map(str, range(20))))
    for value, shown in (
        (made, f"Features(loss, 20 images × 5 timesteps × 2 draws × 16, {store}, 12.8 kB)"),
        (features(), "Features(loss, 20 images × 1 timestep × 16, in memory, 1.28 kB)"),
        (several, "Task(loss, square, 5 timesteps 0 … 800 × 2 draws, common noise, seed 0)"),
        (SCHEDULE, "Schedule(1000 steps, alpha_bar 0.9999 … 4.036e-05, epsilon)"),
        (scores, "Scores(trak, 20 queries × 20 training images, damping 0.1)"),
        (Kernels(np.ones((5, 4))), "Kernels(array of 5 × 4, eigh)"),
        (data, "Dataset(20 images)"),
    ):  # fmt: skip
        assert repr(value) == shown


@pytest.fixture
def scores():
    values = np.array([[1, 3, 2], [0, -1, 5]], np.float32)
    return dtrak.Scores(
        values, np.array(["a", "<b>", "c"]), np.array(["x", "y"]), "trak"
    )


def test_scores_of_a_query(scores):
    top = scores["y"]
    assert top.ids.tolist() == ["c", "a", "<b>"]
    assert (top.scores.tolist(), top.index.tolist()) == ([5, 0, -1], [2, 0, 1])
    for unknown in ("z", 0):
        with pytest.raises(KeyError, match="is no query's id; they are 'x', 'y'"):
            scores[unknown]


def test_scores_are_shown_as_pictures(scores):
    pixels = ((IMAGES[:3] + 1) * 127).astype(np.uint8)
    shown = scores.show(pixels, IMAGES[:2], top=2)
    html = shown._repr_html_()
    assert html.count("<tr>") == 2 and html.count('src="data:image/png') == 6
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert repr(shown).startswith("Gallery(2 queries × 2 images)")
    once = dataclasses.replace(scores, copies=np.array(["a", "a", "c"]))
    html = once.show(pixels, IMAGES[:2], top=3)._repr_html_()
    assert html.count('src="data:image/png') == 6 and "&lt;b&gt;" not in html
    with pytest.raises(ValueError, match="queries have shape .* 2 that were scored"):
        scores.show(pixels, IMAGES[:3])


def test_scores_for_pandas(scores, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        with pytest.raises(ImportError, match=r'pip install "dtrak-jax\[pandas\]"'):
            scores.to_pandas()
    pytest.importorskip("pandas")
    assert scores.to_pandas().loc["y", "c"] == 5
