"""Computes an LDS on digits again, in seconds.

    python configs/results/digits_check.py WORKDIR

writes digits_check.npz from a finished run of configs/digits_benchmark.py: the trained
parameters in float16, the first features that the code makes of them, and the LDS of
TRAK with one draw of noise at one timestep. A test makes these again: it notices when the
split, the network, the noise, the measurement, the sketch, the kernel, the damping or the
sign gives other numbers than those that are printed.
"""

import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

import dtrak_jax as dtrak
from dtrak_jax import data, models, training
from dtrak_jax.config import Config
from dtrak_jax.network import Params

HERE = Path(__file__).parent
FILE = HERE / "digits_check.npz"
IMAGES, ENTRIES = 4, 64
"""How many features are kept, and how many numbers of each."""

TIMESTEP = 300


def main(workdir: str) -> None:
    """Writes digits_check.npz."""
    config = get_config()
    init = models.init_fn(models.build(config.model))
    params = training.load_params(init, config.train, Path(workdir))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)
    features, lds = compute(config, params)
    leaves = {f"leaf{i}": leaf for i, leaf in enumerate(jax.tree.leaves(params))}
    np.savez_compressed(FILE, **leaves, features=features, lds=lds)
    print(f"LDS {lds:.4f}")


def get_config() -> Config:
    """Returns the settings of the benchmark."""
    return runpy.run_path(str(HERE.parent / "digits_benchmark.py"))["get_config"]()


def load(config: Config) -> tuple[Params, np.ndarray, float]:
    """Returns the trained parameters, and the features and LDS that they had."""
    saved = dict(np.load(FILE))
    init = models.init_fn(models.build(config.model))
    tree = jax.tree.structure(jax.eval_shape(init, jax.random.key(0)))
    leaves = [saved[f"leaf{i}"] for i in range(tree.num_leaves)]
    return jax.tree.unflatten(tree, leaves), saved["features"], float(saved["lds"])


def compute(config: Config, params: Params) -> tuple[np.ndarray, float]:
    """Returns the first features of the training images, and the LDS."""
    settings = config.features
    splits = data.load(config.data, config.model.sample_size, config.model.in_channels)
    task = dtrak.Task(
        models.apply_fn(models.build(config.model)),
        dtrak.linear_schedule(),
        measurement="loss",
        timesteps=(TIMESTEP,),
        seed=settings.seed,
    )
    projection = dtrak.Projection(settings.projection, settings.dim, settings.seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    train, query = (
        dtrak.featurize(
            task, params, one.images, projection, ids=one.ids, batch_size=25
        )
        for one in (splits.train, splits.validation)
    )
    scores = dtrak.attribute(train, query, method="trak").scores
    return np.asarray(train)[0, :IMAGES, :ENTRIES], lds(scores)


def lds(scores: np.ndarray) -> float:
    """Returns the LDS of scores of the validation images, by SciPy."""
    saved = np.load(HERE / "digits_outputs.npz")
    losses = saved["outputs"].mean(axis=1)[:, saved["query_set"] == "validation"]
    sums = saved["masks"].astype(np.float64) @ scores.T
    pairs = zip(sums.T, -losses.T, strict=True)
    return float(np.mean([spearmanr(a, b).statistic for a, b in pairs]))


if __name__ == "__main__":
    main(sys.argv[1])
