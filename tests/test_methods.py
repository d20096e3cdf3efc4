"""Every attribution method against its closed form or an independent implementation."""

import dataclasses
import operator
import zlib
from types import SimpleNamespace
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from sklearn.linear_model import RidgeCV

import dtrak_jax as dtrak
from dtrak_jax import attribution
from dtrak_jax.attribution import GRID, Damping, Kernels, Scores, ensemble_mean
from dtrak_jax.config import AttributionConfig, Config, EnsembleConfig, TrainConfig
from dtrak_jax.features.measurements import FUNCTIONS
from dtrak_jax.methods import METHODS, Method, MethodName, table

SHAPES = [(12, 40), (40, 12)]
"""n and k: dual, and primal."""


def features(n, k, pairs=3, q=5, seed=0):
    rng = np.random.default_rng(seed)
    train, query = rng.normal(size=(pairs, n, k)), rng.normal(size=(pairs, q, k))
    scale = 10.0 ** np.arange(pairs)[:, None, None]
    return (scale * train).astype(np.float32), (scale * query).astype(np.float32)


def wide(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def assert_close(actual, expected, tolerance=1e-5):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def lambdas(train, damping):
    """damping times the mean eigenvalue of each kernel."""
    return [damping * np.sum(phi**2) / min(phi.shape) for phi in train]


# Gradients


def test_gradient_dot_is_the_mean_over_pairs():
    train, query = features(6, 9)
    expected = np.einsum("jqk,jnk->qn", *wide(query, train)) / 3
    scores = attribution.gradient_dot(train, query)
    assert scores.dtype == np.float64
    assert_close(scores, expected, 1e-12)
    assert_close(
        attribution.gradient_dot(train[1], query[1]), wide(query[1])[0] @ train[1].T
    )


def test_gradient_cosine_normalises_each_pair_by_itself():
    """So the pair with the largest gradients does not decide."""
    train, query = features(6, 9)
    a, b = (x / np.linalg.norm(x, axis=2, keepdims=True) for x in wide(train, query))
    expected = np.einsum("jqk,jnk->qn", b, a) / 3
    assert_close(attribution.gradient_cosine(train, query), expected, 1e-12)
    itself = attribution.gradient_cosine(train, train)
    np.testing.assert_allclose(np.diag(itself), 1)
    assert np.abs(itself).max() <= 1 + 1e-12
    scaled = attribution.gradient_cosine(train * np.float32(7), query)
    assert_close(scaled, expected)


@pytest.mark.parametrize(
    ("method", "single"),
    [
        (attribution.tracin, attribution.gradient_dot),
        (attribution.gas, attribution.gradient_cosine),
    ],
)
def test_checkpoints_count_equally_and_none_is_dropped(method, single):
    checkpoints = [features(6, 9, seed=seed) for seed in range(3)]
    trains, queries = zip(*checkpoints, strict=True)
    expected = np.mean([single(*checkpoint) for checkpoint in checkpoints], axis=0)
    assert_close(method(trains, queries), expected, 1e-12)
    assert_close(method(trains[:1], queries[:1]), single(*checkpoints[0]), 1e-12)


def test_checkpoints_that_do_not_belong_together():
    (a, b), (other, _) = features(6, 9), features(7, 9)
    with pytest.raises(ValueError, match="trains has 2 checkpoints and queries has 1"):
        attribution.tracin([a, a], [b])
    with pytest.raises(ValueError, match="one or more"):
        attribution.gas([], [])
    with pytest.raises(ValueError, match=r"trains\[1\] and trains\[0\] have different"):
        attribution.tracin([a, other], [b, b])


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("relative", [True, False])
def test_relative_and_renormalised_influence_by_explicit_inverse(n, k, relative):
    train, query = wide(*features(n, k))
    expected = 0
    for phi, g, value in zip(train, query, lambdas(train, 0.2), strict=True):
        inverse = np.linalg.inv(phi.T @ phi + value * np.eye(k))
        size = np.linalg.norm(phi @ inverse if relative else phi, axis=1)
        expected = expected + g @ inverse @ phi.T / size
    name = "relative_influence" if relative else "renormalised_influence"
    assert_close(getattr(attribution, name)(train, query, 0.2), expected)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_renormalised_influence_of_a_rescaled_example(n, k):
    """With a damping that outweighs the kernel it only knows the direction."""
    train, query = features(n, k, pairs=1)
    louder = train.copy()
    louder[:, 2] *= 3
    damping = dtrak.absolute(1e6)
    for method in (attribution.relative_influence, attribution.renormalised_influence):
        before, after = (method(phi, query, damping) for phi in (train, louder))
        assert_close(after[:, 2], before[:, 2], 1e-3)
    plain = dtrak.attribute(train, query, damping=damping).scores
    loud = dtrak.attribute(louder, query, damping=damping).scores
    assert_close(loud[:, 2], 3 * plain[:, 2], 1e-3)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize(
    "method",
    [
        attribution.gradient_cosine,
        attribution.relative_influence,
        attribution.renormalised_influence,
    ],
)
def test_a_gradient_of_zeros_has_score_0(method, n, k):
    train, query = features(n, k)
    train[:, 4], query[:, 1] = 0, 0
    scores = method(train, query)
    assert np.isfinite(scores).all()
    assert (scores[:, 4] == 0).all()
    assert (scores[1] == 0).all()
    assert np.count_nonzero(scores) == (n - 1) * 4


def test_gradient_methods_refuse_what_attribute_refuses():
    train, query = features(6, 9)
    for method in (attribution.gradient_dot, attribution.relative_influence):
        with pytest.raises(ValueError, match="differ in the number of examples only"):
            method(train, query[:2])
        with pytest.raises(ValueError, match="not finite"):
            method(train * np.nan, query)
    with pytest.raises(ValueError, match="damping is -1"):
        attribution.relative_influence(train, query, -1.0)


@pytest.fixture(scope="module")
def stored():
    """Features of the measurement "mean" for training images and queries."""

    def apply(params, x, t, cond):
        return jnp.sin(params * x)

    images = np.random.default_rng(0).uniform(-1, 1, (9, 3, 3, 1)).astype(np.float32)
    params = np.linspace(0.5, 1.5, 9, dtype=np.float32).reshape(1, 3, 3, 1)
    schedule = dtrak.linear_schedule()
    task = dtrak.Task(apply, schedule, measurement="mean", timesteps=(50, 400))
    exact = dtrak.Projection("none")
    return [dtrak.featurize(task, params, part, exact) for part in (images, images[:2])]


@pytest.mark.parametrize(
    "method",
    [
        attribution.gradient_dot,
        attribution.gradient_cosine,
        attribution.relative_influence,
        attribution.renormalised_influence,
    ],
)
def test_stored_features_score_as_their_arrays(method, stored):
    assert_close(method(*stored), method(*map(np.asarray, stored)), 1e-12)


def test_every_measurement_has_a_kernel_method(stored):
    assert dtrak.attribute(*stored).method == "kernel-mean"
    assert dtrak.attribute(*stored, method="kernel-mean").scores.shape == (2, 9)
    rows = [row for row in METHODS.values() if row.kernel and not row.of_output]
    named = [row.measurement for row in rows]
    assert sorted(named) == sorted(FUNCTIONS)


# The table


def test_attribute_takes_every_method_of_one_models_features():
    """One set of queries or several; the scores are those of the method's function."""
    train, query = features(12, 40)
    queries = {"a": query, "b": query[:, 3:]}
    functions = {
        "dtrak": attribution.influence,
        "kernel-l1": attribution.influence,
        "gradient-dot": attribution.gradient_dot,
        "gradient-cosine": attribution.gradient_cosine,
        "relative-influence": attribution.relative_influence,
        "renormalised-influence": attribution.renormalised_influence,
    }
    for name, function in functions.items():
        damped = bool(METHODS[name].damping)
        expected = function(train, query, *[0.3] * damped)
        scores = dtrak.attribute(train, queries, method=name, damping=0.3)
        assert scores["a"].method == name
        assert scores["a"].scores.dtype == np.float32
        assert scores["a"].damping == (Damping(0.3) if damped else None)
        assert (scores["a"].lambdas is not None) == METHODS[name].kernel
        assert_close(scores["a"].scores, expected, 1e-6)
        assert_close(scores["b"].scores, expected[3:], 1e-6)
        single = dtrak.attribute(train, query, method=name, damping=0.3)
        np.testing.assert_array_equal(single.scores, scores["a"].scores)


def test_attribute_says_what_a_method_needs(stored):
    for name, words, way in (
        ("tracin", "features at several checkpoints", "dtrak_jax.attribution.tracin"),
        ("datamodels", "models retrained on subse", "dtrak_jax.attribution.datamodels"),
        ("journey-trak", "features along sampling trajectories", "`attribute`, meth"),
        ("trak-ensemble", "features of further models", "dtrak_jax.ensemble_mean, of"),
        ("trak-layers", "features of queries by layer", "`attribute`, method 'trak'"),
        ("gauss-newton", "features, and the Gauss-Newton", "attribute with curvature="),
        ("das", "features of probes, and the Gauss-N", "attribute with curvature="),
        ("pixel-dot", "images", "dtrak_jax.attribution.pixel_dot"),
        ("clip-dot", "CLIP's embeddings", "dtrak_jax.attribution.embedding_dot"),
        ("ekfac", "the curvature, and images", "dtrak_jax.attribution.ekfac_influence"),
        ("metagradient", "training again", "dtrak_jax.metagradients"),
    ):
        with pytest.raises(ValueError, match=f"made from {words}.*, by {way}") as error:
            dtrak.attribute(*stored, method=name)
        if way.startswith("dtrak_jax"):
            assert callable(operator.attrgetter(way.split(",")[0][10:])(dtrak))
        assert "'relative-influence'" in str(error.value)
        assert "'gas'" not in str(error.value)
    with pytest.raises(ValueError, match="measurement 'loss'; these are of 'mean'"):
        dtrak.attribute(*stored, method="gradient-dot")
    for name in ("relative-influence", "renormalised-influence"):
        with pytest.raises(ValueError, match=r"solver is 'cg'; re.* needs kernels"):
            dtrak.attribute(*features(6, 9), method=name, solver="cg")
        assert METHODS[name].decomposed


class SmallRun:
    """Artefacts of a run in memory, under the names that methods ask for."""

    def __init__(self, solver="eigh"):
        rng = np.random.default_rng(0)
        self.config = Config(
            train=TrainConfig(steps=30, checkpoints=(0.1, 0.5, 1.0)),
            ensemble=EnsembleConfig(models=2),
            attribution=AttributionConfig(damping=0.2, coverage_share=0.3),
        )
        self.solver, self.asked = solver, []
        images = rng.uniform(-1, 1, (15, 2, 2, 1)).astype(np.float32)
        ids = np.array([f"i{i}" for i in range(15)])
        groupings = {"label": np.where(np.arange(15) < 4, "few", "rest")}
        train = SimpleNamespace(images=images, ids=ids, groupings=groupings)
        self.splits = SimpleNamespace(train=train)
        self.queries = {
            "validation": SimpleNamespace(images=images[:4] / 2, ids=ids[:4]),
            "generated": SimpleNamespace(images=images[:3] / 3, ids=ids[4:7]),
        }
        shown = {"train": images} | {k: q.images for k, q in self.queries.items()}
        self.space = SimpleNamespace(
            x=shown.__getitem__, cond=lambda name: None, bounds=None
        )
        self.masks = rng.random((20, 15)) < 0.5
        self.losses = {
            name: rng.normal(size=(20, 2, len(examples.ids)))
            for name, examples in self.queries.items()
        }

    def features(self, examples, measurement, folder=""):
        self.asked.append(folder or examples.replace("train", ""))
        sizes = {"train": 15, "validation": 4, "generated": 3, "journey": 3}
        seed = zlib.crc32(f"{examples} {measurement} {folder}".encode())
        phi = np.random.default_rng(seed).normal(size=(2, sizes[examples], 9))
        array = ts.array(phi.astype(np.float32))
        ids = [f"{examples}{i}" for i in range(len(phi[0]))]
        made, beside = {"noise": "common", "draws": 2}, np.zeros(phi.shape[:-1])
        program = measurement if folder == "probes" else "program"
        made["measurements"] = {measurement: program}
        return dtrak.Features(measurement, ids, array, beside, beside, made)

    def features_by_layer(self, examples, measurement):
        parts = {}
        for group in ("deep", "last"):
            name = f"{measurement}/{group}"
            made = {"measurements": {name: ["program", group]}}
            made["groups"] = {"deep": "deep", "last": "last"}
            part = self.features(examples, name, "layers")
            fingerprint = part.fingerprint | made
            parts[group] = dataclasses.replace(part, fingerprint=fingerprint)
        return parts

    def kernels(self, measurement, folder=""):
        train = self.features("train", measurement, folder)
        return Kernels(train, solver=self.solver)

    def curvature(self):
        def apply(params, x, t, cond):
            flat = x.reshape(len(x), -1)
            return dtrak.layer(params, flat, flat @ params).reshape(x.shape)

        params = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
        task = dtrak.Task(apply, dtrak.linear_schedule(), "loss", timesteps=(50, 400))
        return dtrak.ekfac(task, params, self.splits.train.images)

    def output_kernels(self):
        h = np.random.default_rng(1).normal(size=(2, 9, 9)).astype(np.float32)
        h = h @ h.swapaxes(1, 2)
        made = dtrak.features.GaussNewton(
            h.shape, {"noise": "common", "draws": 2}, 1, h.__getitem__
        )
        return Kernels(self.features("train", "loss"), curvature=made)

    def clip(self, examples):
        seed = zlib.crc32(examples.encode())
        size = {"train": 15, "validation": 4, "generated": 3}[examples]
        return np.random.default_rng(seed).normal(size=(size, 6)).astype(np.float32)

    def truth(self):
        return {
            name: SimpleNamespace(masks=self.masks, outputs=losses)
            for name, losses in self.losses.items()
        }

    def metagradients(self):
        return {name: losses[:15, 0].T for name, losses in self.losses.items()}

    def arrays(self, queries, measurement, folder=""):
        """The features of training images and of queries."""
        both = "train", queries
        return [np.asarray(self.features(e, measurement, folder)) for e in both]


CHECKPOINTS = ["checkpoints/3", "checkpoints/15", ""]
MODELS = ["", "models/full-0", "models/full-1"]
FOLDERS = {
    "tracin": CHECKPOINTS,
    "gas": CHECKPOINTS,
    "trak-ensemble": MODELS,
    "dtrak-ensemble": MODELS,
    "journey-trak": ["", "journey"],
    "trak-layers": ["", "layers"],
    "dtrak-layers": ["", "layers"],
    "das": ["", "probes"],
}


def damping_of(run, row):
    """Returns the lambda of a method: curvature and coverage have their own."""
    by_name = {"coverage": dtrak.effective(0.3)}
    by_name |= dict.fromkeys(
        ("ekfac", "gauss-newton", "gauss-newton-cg", "das"), Damping(0.001)
    )
    return by_name.get(row.name, Damping(0.2))


def expected_scores(run, name, queries):
    """Returns what the method's function alone makes of a run's artefacts."""
    row = METHODS[name]
    if name in ("tracin", "gas"):
        folders = row.folders(run.config)
        arrays = [run.arrays(queries, "loss", folder) for folder in folders]
        return row.function(*zip(*arrays, strict=True))
    if name.endswith("-ensemble"):
        folders = row.folders(run.config)
        models = [run.arrays(queries, row.measurement, folder) for folder in folders]
        return np.mean([row.function(*arrays, 0.2) for arrays in models], axis=0)
    if row.weighs_layers:
        train = np.asarray(run.features("train", row.measurement))
        by_layer = run.features_by_layer(queries, row.measurement)
        fitted = attribution.layer_weights(train, by_layer, damping=0.2)
        return row.function(train, np.asarray(fitted.query), 0.2)
    if name == "journey-trak":
        return row.function(*run.arrays("journey", "loss"), 0.2)
    if row.learn:
        return row.function(run.masks, run.losses[queries].mean(axis=1))
    if name == "metagradient":
        return -run.metagradients()[queries]
    if name.startswith("pixel"):
        return row.function(run.splits.train.images, run.queries[queries].images)
    if name.startswith("clip"):
        return row.function(run.clip("train"), run.clip(queries))
    if row.curved:
        images = run.splits.train.images, run.queries[queries].images
        return row.function(run.curvature(), *images, damping=0.001).scores
    if name == "gauss-newton":
        query = run.features(queries, "loss")
        return row.function(run.output_kernels(), query, 0.001)
    if name == "das":
        probes = [run.features(queries, f"probe{v}", "probes") for v in range(8)]
        return row.function(run.output_kernels(), probes, 0.001)
    if name == "random":
        return row.function(run.splits.train.ids, run.queries[queries].ids)
    return row.function(
        *run.arrays(queries, row.measurement),
        *[damping_of(run, row)] * bool(row.damping),
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_scores_a_run(name):
    """The values are its function's; folders and stages are those that it names."""
    run, row = SmallRun(), METHODS[name]
    results = row.scores(run)
    folders = FOLDERS.get(name, [""] if row.measurement else [])
    assert list(row.folders(run.config)) == folders
    assert {*run.asked} - {*run.queries, ""} == {*folders} - {""}
    kinds = {"featurize"} if row.measurement else {"retrain"} if row.learn else set()
    kinds |= {"train"} if row.replays else set()
    assert {*row.needs} == kinds
    assert results.keys() == {q for q in run.queries if row.applies_to(q)}
    for queries, scores in results.items():
        assert scores.method == name
        assert scores.scores.dtype == np.float32
        assert_close(scores.scores, expected_scores(run, name, queries), 1e-6)
        assert len(scores.train_ids) == 15
        assert len(scores.query_ids) == len(run.queries[queries].ids)
        assert scores.damping == (damping_of(run, row) if row.damping else None)
        with_kernels = row.objective or row.of_output or name == "journey-trak"
        with_kernels = with_kernels or row.weighs_layers
        assert list(scores.layers) == ["deep", "last"] * row.weighs_layers
        assert (scores.eigenvalues is not None) == bool(with_kernels)
        # Two draws of a timestep for what is made from features.
        has_errors = bool(row.measurement)
        assert scores.freedom == has_errors
        for errors in (scores.errors, scores.group("label").errors):
            assert (np.isfinite(errors) == has_errors).all()
        assert (scores.spread is not None) == name.endswith("-ensemble")


def test_conjugate_gradients_serve_all_methods_that_need_no_decomposition():
    for name in ("trak", "journey-trak", "trak-ensemble"):
        ours, theirs = (METHODS[name].scores(SmallRun(s)) for s in ("cg", "eigh"))
        assert ours["generated"].eigenvalues is None
        assert_close(ours["generated"].scores, theirs["generated"].scores, 1e-4)


def test_a_row_is_all_that_a_new_method_needs():
    def minus_distance(train, query, total):
        for phi, g in zip(train.by_pair(), query.by_pair(), strict=True):
            total.add(-np.linalg.norm(g[:, None] - phi, axis=2))

    row = Method("near", "Near", minus_distance, "minus distance", measurement="loss")
    run = SmallRun()
    scores = row.scores(run)["validation"]
    phi, g = run.arrays("validation", "loss")
    pairs = -np.linalg.norm(g[:, :, None] - phi[:, None], axis=3)
    assert_close(scores.scores, pairs.sum(axis=0), 1e-6)
    # Two draws of one timestep: sqrt(2 sum_r (tau_r - mean)^2) = |tau_0 - tau_1|.
    assert_close(scores.errors, np.abs(pairs[0] - pairs[1]), 1e-6)
    assert (scores.method, scores.freedom) == ("near", 1)


def test_the_table_is_printed_whole():
    lines = table().splitlines()
    assert len(lines) == 1 + len(METHODS)
    for row, line in zip(METHODS.values(), lines[1:], strict=True):
        assert line.startswith(row.name)
        assert row.label in line
    assert get_args(MethodName) == tuple(METHODS)


# Kernels


@pytest.mark.parametrize(("n", "k"), [(5, 40), (12, 30), (40, 12)])
def test_pooled_scores_equal_the_plain_inverse(n, k):
    """The dual form; one that is dual for a pair and primal for all; and the primal."""
    train, query = wide(*features(n, k))
    grid = [dtrak.absolute(1e3), dtrak.absolute(1e5)]
    path = attribution.damping_path(train, query, grid, pooled=True)
    assert path.shape == (2, 5, n)
    for (value, *_), scores in zip(grid, path, strict=True):
        hessian = np.einsum("jnk,jnl->kl", train, train) + value * np.eye(k)
        inverse = np.linalg.inv(hessian)
        expected = sum(g @ inverse @ phi.T for g, phi in zip(query, train, strict=True))
        assert_close(scores, expected)


def test_pooled_damping_is_relative_to_the_pooled_kernel():
    train, query = features(12, 20)
    value = 0.1 * np.sum(train.astype(np.float64) ** 2) / 20
    relative = attribution.damping_path(train, query, [0.1], pooled=True)
    grid = [dtrak.absolute(value)]
    assert_close(relative, attribution.damping_path(train, query, grid, pooled=True))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_one_pair_pooled_is_one_pair_apart(n, k):
    train, query = features(n, k, pairs=1)
    apart = attribution.damping_path(train, query, (0.01, 1.0))
    for t, q in ((train, query), (train[0], query[0])):
        pooled = attribution.damping_path(t, q, (0.01, 1.0), pooled=True)
        np.testing.assert_array_equal(pooled, apart)
    three = features(n, k)
    different = attribution.damping_path(*three, (0.1,), pooled=True)
    assert np.abs(different - attribution.damping_path(*three, (0.1,))).max() > 1e-3


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("k", [20, 7])
def test_sums_over_subsets_are_sums_of_scores(pooled, k):
    train, query = features(12, k)
    masks = np.random.default_rng(1).random((8, 12)) < 0.5
    path = attribution.damping_path(train, query, pooled=pooled)
    sums = attribution.damping_path(train, query, pooled=pooled, subsets=masks)
    assert sums.shape == (len(GRID), 5, 8)
    assert_close(sums, path @ masks.T, 1e-10)


# Images, embeddings and chance


def test_pixel_similarities():
    images = np.random.default_rng(0).uniform(-1, 1, (7, 4, 4, 3)).astype(np.float32)
    images[5] = 0
    train, query = images[2:], images[:2]
    flat_train, flat_query = train.reshape(5, 48), query.reshape(2, 48)
    dots = wide(flat_query)[0] @ flat_train.T
    assert_close(attribution.pixel_dot(train, query), dots, 1e-12)
    norms = [np.sqrt(np.sum(wide(x)[0] ** 2, axis=(1, 2, 3))) for x in (query, train)]
    expected = dots / norms[0][:, None] / np.where(norms[1], norms[1], 1)
    cosines = attribution.pixel_cosine(train, query)
    assert_close(cosines, expected, 1e-12)
    assert (cosines[:, 3] == 0).all()
    np.testing.assert_array_equal(
        attribution.embedding_cosine(flat_train, flat_query), cosines
    )


def test_wrong_images_and_embeddings():
    images = np.zeros((3, 4, 4, 1), np.float32)
    with pytest.raises(ValueError, match="differ in the number of images only"):
        attribution.pixel_dot(images, images[:, :3])
    with pytest.raises(ValueError, match="uint8"):
        attribution.pixel_cosine(images.astype(np.uint8), images)
    with pytest.raises(ValueError, match=r"must be \[n, d\] and \[q, d\]"):
        attribution.embedding_cosine(np.zeros((3, 4)), np.zeros((3, 5)))


def test_random_scores_belong_to_pairs_of_ids():
    train, query = [f"t{i}" for i in range(300)], [f"q{i}" for i in range(40)]
    scores = attribution.random_scores(train, query)
    assert scores.shape == (40, 300)
    order = np.random.default_rng(0).permutation(300)
    shuffled = attribution.random_scores([train[i] for i in order], query)
    np.testing.assert_array_equal(shuffled, scores[:, order])
    fewer = attribution.random_scores(train[5:9], query[3:4])
    np.testing.assert_array_equal(fewer, scores[3:4, 5:9])
    other = attribution.random_scores(train, query, seed=1)
    assert abs(np.corrcoef(other.ravel(), scores.ravel())[0, 1]) < 0.05


def test_random_scores_are_standard_normal_and_independent():
    ids = [f"x{i}" for i in range(200)]
    scores = attribution.random_scores(ids, ids)
    assert abs(scores.mean()) < 0.02
    assert abs(scores.std() - 1) < 0.02
    assert len(np.unique(scores)) > 0.99 * scores.size
    # A query and a training example of swapped ids are another pair.
    assert abs(np.corrcoef(scores.ravel(), scores.T.ravel())[0, 1]) < 0.05
    rows = np.corrcoef(scores)
    assert np.abs(rows - np.eye(200)).max() < 0.4


# Retraining


def retrained(models=30, n=50, q=7, seed=0):
    """Losses that are linear in the masks, and noise."""
    rng = np.random.default_rng(seed)
    masks = rng.random((models, n)) < 0.5
    effect = rng.normal(size=(n, q)) * (rng.random((n, q)) < 0.2)
    noise = rng.normal(size=(models, q)) * np.geomspace(0.01, 10, q)
    return masks, masks @ effect + noise + 5


def test_empirical_influence_is_a_difference_of_means():
    masks, outputs = retrained()
    expected = [
        [f[~masks[:, n]].mean() - f[masks[:, n]].mean() for n in range(masks.shape[1])]
        for f in outputs.T
    ]
    assert_close(attribution.empirical_influence(masks, outputs), expected, 1e-12)


@pytest.mark.parametrize(
    "method", [attribution.empirical_influence, attribution.datamodels]
)
def test_an_example_that_lowers_the_loss_has_positive_influence(method):
    masks = np.random.default_rng(0).random((60, 5)) < 0.5
    outputs = 1 - masks[:, [2]] + 0.5 * masks[:, [4]]
    (scores,) = method(masks, outputs)
    assert np.argmax(scores) == 2
    assert scores[2] > 0.5
    assert np.argmin(scores) == 4
    assert scores[4] < -0.2


@pytest.mark.parametrize(
    "method", [attribution.empirical_influence, attribution.datamodels]
)
def test_nothing_is_known_of_examples_in_all_or_no_subsets(method):
    masks, outputs = retrained()
    masks[:, 3], masks[:, 8] = True, False
    scores = method(masks, outputs)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores[:, [3, 8]], 0, atol=1e-12)
    assert np.abs(scores[:, 4]).max() > 0.01


@pytest.mark.parametrize(("models", "n", "folds"), [(30, 50, 5), (33, 12, 4)])
def test_datamodels_equal_sklearns_ridge_one_query_at_a_time(models, n, folds):
    """More examples than models and fewer; folds of equal and of unequal size."""
    masks, outputs = retrained(models, n, q=12)
    outputs[:, 4] = 2.0
    alphas = (0.1, 1.0, 10.0)
    fits = [RidgeCV(alphas, cv=folds).fit(masks, f) for f in outputs.T]
    assert len({fit.alpha_ for fit in fits}) >= 2
    expected = -np.array([fit.coef_ for fit in fits])
    scores = attribution.datamodels(masks, outputs, alphas, folds)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-8)


def test_wrong_retrained_models():
    masks, outputs = retrained()
    with pytest.raises(ValueError, match="has 9 models; .* at least 10, two in each"):
        attribution.datamodels(masks[:9], outputs[:9], folds=5)
    few, four = (
        attribution.datamodels(masks[:9], outputs[:9], **folds)
        for folds in ({}, {"folds": 4})
    )
    np.testing.assert_array_equal(few, four)
    with pytest.raises(ValueError, match="alphas is empty"):
        attribution.datamodels(masks, outputs, alphas=())
    with pytest.raises(ValueError, match="alphas is 0"):
        attribution.datamodels(masks, outputs, alphas=(0.0,))
    with pytest.raises(ValueError, match="folds is 1"):
        attribution.datamodels(masks, outputs, folds=1)
    for method in (attribution.empirical_influence, attribution.datamodels):
        with pytest.raises(ValueError, match="masks are float64; they must be bool"):
            method(masks.astype(np.float64), outputs)
        with pytest.raises(ValueError, match="a row for each of M models"):
            method(masks, outputs[:-1])
        with pytest.raises(ValueError, match="outputs have entries"):
            method(masks, outputs * np.nan)


# Scores


def plain_scores(value=1.0, **changes):
    settings = {
        "scores": np.full((2, 3), value, np.float32),
        "train_ids": np.array(["a", "b", "c"]),
        "query_ids": np.array(["q", "r"]),
        "method": "trak",
    }
    return Scores(**settings | changes)


def test_an_ensembles_scores_are_the_mean_of_its_models():
    models = [features(6, 9, seed=seed) for seed in range(3)]
    members = [dtrak.attribute(*model, damping=0.2) for model in models]
    mean = ensemble_mean(members)
    expected = np.mean([member.scores for member in members], axis=0)
    np.testing.assert_allclose(mean.scores, expected, rtol=1e-5, atol=1e-7)
    assert mean.scores.dtype == np.float32
    assert mean.damping == Damping(0.2)
    assert mean.eigenvalues is None
    assert ensemble_mean([plain_scores()]).method == "trak"


def test_ensembles_of_what_does_not_belong_together():
    with pytest.raises(ValueError, match="scores is empty"):
        ensemble_mean([])
    reordered = np.array(["b", "a", "c"])
    for name, value, words in (
        ("train_ids", reordered, "training images"),
        ("query_ids", np.array(["q", "p"]), "queries"),
        ("method", "dtrak", r"method \('dtrak' and 'trak'\)"),
        ("damping", dtrak.effective(0.2), r"damping \(share 0.2 and damping 0.2\)"),
        ("damping", None, r"damping \(None and damping 0.2\)"),
    ):
        first = plain_scores(damping=Damping(0.2))
        other = dataclasses.replace(first, **{name: value})
        with pytest.raises(ValueError, match=rf"scores\[0\] differ in {words}"):
            ensemble_mean([first, other])
    copied = plain_scores(copies=np.array(["a", "a", "c"]))
    with pytest.warns(UserWarning, match="other groups or copies, 'copies', than"):
        assert ensemble_mean([plain_scores(), copied]).copies is None
