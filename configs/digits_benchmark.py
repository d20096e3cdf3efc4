"""Every method on digits but those of whole gradients and weights of layers: how far are they to be trusted?

    dtrak-jax lds configs/digits_benchmark.py --workdir runs/benchmark
    dtrak-jax ablate configs/digits_benchmark.py --workdir runs/benchmark
    dtrak-jax counterfactual configs/digits_benchmark.py --workdir runs/benchmark
    dtrak-jax report configs/digits_benchmark.py --workdir runs/benchmark

The first command retrains 130 models, which took 66 minutes on two busy CPU cores.
`configs/results/README.md` shows what came out. It takes one noise draw at each of five
timesteps, so that scores have no standard errors: retrained models judge them here.
"""

import dataclasses
import runpy
from pathlib import Path

from dtrak_jax.config import Config, SampleConfig
from dtrak_jax.methods import METHODS

HERE = Path(__file__).parent


def get_config() -> Config:
    digits = runpy.run_path(str(HERE / "digits.py"))["get_config"]()
    measurements = ("square", "loss", "mean", "l1", "l2", "linf", "elbo")
    methods = tuple(
        name
        for name, row in METHODS.items()
        if not (row.embeds or row.replays or row.curved or row.weighs_layers)
    )
    return dataclasses.replace(
        digits,
        sample=SampleConfig(count=200),
        features=dataclasses.replace(
            digits.features,
            measurements=measurements,
            timesteps=(100, 200, 300, 400, 500),
            draws=1,
        ),
        attribution=dataclasses.replace(digits.attribution, methods=methods),
        ensemble=dataclasses.replace(digits.ensemble, models=2),
        counterfactual=dataclasses.replace(
            digits.counterfactual,
            methods=("dtrak", "trak", "pixel-cosine"),
            squared=("dtrak",),
        ),
    )
