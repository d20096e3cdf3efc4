"""Arms that are compared differ in what is named, and in nothing else."""

import dataclasses
import runpy

import numpy as np
import pytest
from conftest import DIGITS

import dtrak_jax as dtrak
from dtrak_jax.evaluation import datamodeling
from dtrak_jax.evaluation.ablations import arm_rows
from dtrak_jax.evaluation.arms import KERNELS, STUDIES, arms
from dtrak_jax.evaluation.truth import RetrainedLosses

CONFIG = runpy.run_path(str(DIGITS))["get_config"]()
ARMS = arms(CONFIG)


def study(name):
    """The arms of one study."""
    return [arm for arm in ARMS if arm.study == name]


def test_noises_and_kernels_are_compared_at_equal_cost():
    noise = study("noise")
    assert {len(arm.pairs) for arm in noise} == {10}
    cells = {(a.spec.noise, a.kernel, a.measurement, a.spec.seed) for a in noise}
    assert len(cells) == len(noise) == 4 * 4 * 2 * CONFIG.ablation.noise_seeds
    # But for the noise and its seed they have one spec.
    assert len({dataclasses.replace(a.spec, noise="", seed=0) for a in noise}) == 1


def test_few_stores_serve_all_arms():
    assert {arm.study for arm in ARMS} == STUDIES.keys() == set(CONFIG.ablation.studies)
    assert len({arm.key for arm in ARMS}) == len(ARMS)
    for name in STUDIES:
        specs = {arm.spec for arm in study(name)}
        assert len({spec.name for spec in specs}) == len(specs)
        assert len(specs) <= len(study(name)) / 2
    for arm in ARMS:
        assert max(arm.pairs) < len(arm.spec.timesteps) * arm.spec.draws


def test_pairs_are_those_of_the_arms_timesteps_and_draws():
    arm = next(a for a in ARMS if a.study == "draws" and a.draws == 2)
    spec = dataclasses.replace(arm.spec, timesteps=(100, 200, 300), draws=4)
    chosen = dataclasses.replace(arm, spec=spec, timesteps=(300, 100), draws=2)
    assert chosen.pairs == [8, 9, 0, 1]


def test_draws_are_doubled_and_share_what_they_can():
    draws = [arm for arm in study("draws") if arm.spec.noise == "independent"]
    assert sorted({arm.draws for arm in draws}) == [1, 2, 4, 8, 16, 32, 64]
    assert len({arm.spec for arm in draws}) == 1
    two = next(arm for arm in draws if arm.draws == 2)
    four = next(arm for arm in draws if arm.draws == 4)
    assert two.pairs == four.pairs[:2]
    assert {arm.queries for arm in study("draws")} == {("validation",)}
    without = dataclasses.replace(CONFIG.data, validation=0)
    others = arms(dataclasses.replace(CONFIG, data=without))
    assert {a.queries for a in others if a.study == "draws"} == {("generated",)}


@pytest.fixture(scope="module")
def made():
    """Features of 2 pairs, and an ensemble that their kernels predict."""
    rng = np.random.default_rng(0)
    train, query = rng.normal(size=(2, 30, 50)), rng.normal(size=(2, 6, 50))
    masks = rng.random((40, 30)) < 0.5
    scores = np.einsum("tqk,tnk->qn", query, train)
    losses = -(masks @ scores.T) + 10 * rng.normal(size=(40, 6))
    ids = np.arange(6).astype(str), np.arange(30).astype(str)
    return train, query, RetrainedLosses(losses[:, None], masks, *ids)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_a_kernel(made, kernel):
    train, query, truth = made
    arm = next(a for a in study("noise") if a.kernel == kernel)
    other = dataclasses.replace(truth, outputs=truth.outputs[..., ::-1])
    both = np.concatenate([query, query], axis=1)
    rows = arm_rows(arm, train, both, {"one": truth, "other": other})
    assert [row["queries"] for row in rows][:: len(rows) // 2] == ["one", "other"]
    rows = rows[: len(rows) // 2]
    by_rule = {(row["damping_rule"], row["transform"]): row["lds"] for row in rows}
    if kernel == "cosine":
        unit_train, unit_query = (
            a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (train, query)
        )
        scores = np.einsum("tqk,tnk->qn", unit_query, unit_train) / 2
        assert by_rule.keys() == {(None, "linear"), (None, "squared")}
        expected = datamodeling.lds(truth.predict(scores), truth)
        assert by_rule[None, "linear"] == pytest.approx(expected, abs=1e-6)
        return
    if kernel == "averaged":
        train, query = train.mean(axis=0)[None], query.mean(axis=0)[None]
    grams = [phi.T @ phi for phi in train]
    if kernel == "pooled":
        grams = [sum(grams)] * len(train)
    units = min(len(train[0]) * (len(train) if kernel == "pooled" else 1), 50)
    scores = sum(
        q @ np.linalg.inv(g + 0.1 * np.trace(g) / units * np.eye(50)) @ phi.T
        for q, g, phi in zip(query, grams, train, strict=True)
    )
    for transform, values in (("linear", scores), ("squared", scores**2)):
        expected = datamodeling.lds(truth.predict(values), truth)
        assert by_rule["label-free", transform] == pytest.approx(expected, abs=2e-3)
    assert by_rule["oracle", "linear"] >= by_rule["label-free", "linear"]


@pytest.mark.parametrize("kernel", ["apart", "pooled"])
def test_rows_of_coverage(made, kernel):
    train, query, truth = made
    arm = next(a for a in study("coverage") if a.kernel == kernel)
    rows = arm_rows(arm, train, query, {"one": truth})
    pooled = kernel == "pooled"
    by_rule = {
        row["damping_rule"]: row["lds"] for row in rows if row["transform"] == "exact"
    }
    linear = {
        row["damping_rule"]: row["lds"] for row in rows if row["transform"] == "linear"
    }
    dampings = {"label-free": 0.1, "effective": dtrak.effective(0.05)}
    assert linear == (
        {}
        if pooled
        else {
            rule: datamodeling.lds(
                truth.predict(dtrak.attribution.coverage(train, query, damping)), truth
            )
            for rule, damping in dampings.items()
        }
    )
    for rule, damping in dampings.items():
        how = {"damping": damping, "pooled": pooled}
        predicted = dtrak.predict(train, query, truth.masks, **how)
        assert by_rule[rule] == datamodeling.lds(predicted.values, truth)
    assert by_rule["oracle"] >= max(by_rule["label-free"], by_rule["cross-fitted"])
    # A kernel of rank 1 has no such share.
    rows = arm_rows(arm, np.repeat(train[:, :1], 30, axis=1), query, {"one": truth})
    assert {row["damping_rule"] for row in rows} == by_rule.keys() - {"effective"}
