"""Holds weights of layers, learnt without labels, against retrained models.

    python configs/results/layer_weights.py digits configs/digits_benchmark.py WORKDIR
    python configs/results/layer_weights.py mnist configs/mnist.py WORKDIR

WORKDIR is the run of `dtrak-jax lds` with this config; its ensemble/outputs.npz may be
digits_outputs.npz. What comes out replaces the part NAME of layer_weights.json.
"""

import dataclasses
import itertools
import re
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from studies import estimate, saved, truths

import dtrak_jax as dtrak
from dtrak_jax import feature_sets, files
from dtrak_jax.attribution import influence
from dtrak_jax.digests import named_leaves
from dtrak_jax.evaluation.datamodeling import from_halves
from dtrak_jax.run import Run

HERE = Path(__file__).parent
METHODS = {"trak-layers": "loss", "dtrak-layers": "square"}
SHARES = {"digits": 0.125, "mnist": 0.05}
"""For `dtrak.effective`, beside the default damping."""

TOPS = (10, 50, 100)


def main(name: str, path: str, workdir: str) -> None:
    """Computes features that are not there, and writes the results."""
    config = runpy.run_path(path)["get_config"]()
    modules = module_patterns(Run.at(config, workdir))
    config = dataclasses.replace(
        config,
        features=dataclasses.replace(
            config.features,
            measurements=tuple(METHODS.values()),
            layers=tuple("=".join(group) for group in modules.items()),
        ),
        attribution=dataclasses.replace(config.attribution, methods=tuple(METHODS)),
    )
    run = Run.at(config, workdir)
    for feature_set in feature_sets.wanted(run):
        feature_sets.featurize(run, feature_set)
    dampings = {"label-free": 0.1, "effective": dtrak.effective(SHARES[name])}
    rows = [row for method in METHODS for row in compared(run, method, dampings)]
    path = HERE / "layer_weights.json"
    files.write_json(path, saved(path) | {"shares": SHARES, name: rows})


def module_patterns(run: Run) -> dict[str, str]:
    """Returns a group for each module: its layers' paths begin with two components, or with
    one where that is the layer itself."""
    paths = [path.split("/") for path in named_leaves(run.param_shapes)]
    names = dict.fromkeys(
        "/".join(parts[: 2 if len(parts) > 3 else 1]) for parts in paths
    )
    return {name.replace("/", "."): f"^{re.escape(name)}/" for name in names}


def compared(run: Run, method: str, dampings: dict) -> Iterator[dict]:
    """Yields the LDS of plain scores, of those with weights, and of weights by labels."""
    measurement, by_queries = METHODS[method], truths(run.outputs)
    kernels = run.kernels(measurement)
    for queries, (rule, damping) in itertools.product(run.queries, dampings.items()):
        truth = by_queries[queries]
        by_module = run.features_by_layer(queries, measurement)
        of_method = {"method": method, "queries": queries, "damping_rule": rule}
        plain = influence(kernels, run.features(queries, measurement), damping)
        before = dtrak.lds(plain, truth)
        yield of_method | {"groups": "none"} | estimate(before)
        for groups, by_layer in (
            ("blocks", joined(by_module)),
            ("modules", {k: np.asarray(f) for k, f in by_module.items()}),
        ):
            for top in TOPS if groups == "blocks" else TOPS[:1]:
                start = time.process_time()
                fitted = dtrak.layer_weights(
                    kernels, by_layer, damping=damping, top=top
                )
                seconds = time.process_time() - start
                after = dtrak.lds(influence(kernels, fitted.query, damping), truth)
                row = of_method | {"groups": groups, "top": top} | estimate(after)
                row |= {"gain": after.less(before)._asdict(), "seconds": seconds}
                by_group = zip(fitted.weights, fitted.shares, strict=True)
                row["layers"] = dict(zip(fitted.names, by_group, strict=True))
                yield row
            print(method, queries, rule, groups, row["gain"], flush=True)
        yield of_method | labelled(kernels, joined(by_module), damping, truth, plain)


def joined(by_module: dict[str, dtrak.Features]) -> dict[str, np.ndarray]:
    """Returns features by block, sums of those of its modules."""
    blocks: dict[str, np.ndarray] = {}
    for name, features in by_module.items():
        block = name.partition(".")[0]
        blocks[block] = blocks.get(block, 0) + np.asarray(features)
    return blocks


def labelled(kernels, by_layer: dict, damping, truth, plain: np.ndarray) -> dict:
    """Returns the LDS of weights of blocks that labels chose, by the correlation on one
    half of the subsets, on the other half; and of plain scores on the same."""
    parts = np.stack([influence(kernels, f, damping) for f in by_layer.values()])

    @jax.jit
    def correlation(logits, predicted, target):
        weights = jax.nn.softmax(logits) * len(logits)
        total = jnp.einsum("m,mqs->qs", weights, predicted)
        total -= total.mean(axis=1, keepdims=True)
        return -jnp.mean(
            jnp.sum(total * target, axis=1) / jnp.linalg.norm(total, axis=1)
        )

    def fitted(masks: np.ndarray, losses: np.ndarray) -> np.ndarray:
        predicted = parts @ masks.T.astype(np.float64)
        target = -(losses - losses.mean(axis=0)).T
        target /= np.linalg.norm(target, axis=1, keepdims=True)
        arrays = predicted.astype(np.float32) / np.abs(predicted).max(), target
        both = jax.value_and_grad(correlation)

        def objective(logits):
            value, gradient = both(jnp.float32(logits), *map(jnp.float32, arrays))
            return float(value), np.asarray(gradient, np.float64)

        logits = scipy.optimize.minimize(objective, np.zeros(len(parts)), jac=True).x
        return np.einsum("m,mqn->qn", jax.nn.softmax(logits), parts)

    by_labels = from_halves(fitted, truth)
    before = from_halves(lambda masks, losses: plain, truth)
    row = {"groups": "blocks by labels"} | by_labels._asdict()
    row["lds"] = row.pop("value")
    return row | {"gain": {"value": by_labels.value - before.value}}


if __name__ == "__main__":
    main(*sys.argv[1:])
