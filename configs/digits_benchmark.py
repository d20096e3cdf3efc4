"""How far every method can be trusted on digits: the tables of the README.

for stage in train sample retrain featurize attribute lds ablate counterfactual report
do dtrak-jax $stage configs/digits_benchmark.py --workdir runs/benchmark; done

Some methods score with retrained models, so that `retrain` comes before `featurize`.
"""

import dataclasses
import runpy
from pathlib import Path

from dtrak_jax.config import METHODS, Config, SampleConfig

HERE = Path(__file__).parent


def get_config() -> Config:
    digits = runpy.run_path(str(HERE / "digits.py"))["get_config"]()
    measurements = ("square", "loss", "mean", "l1", "l2", "linf", "elbo")
    return dataclasses.replace(
        digits,
        sample=SampleConfig(count=200),
        features=dataclasses.replace(digits.features, measurements=measurements),
        attribution=dataclasses.replace(digits.attribution, methods=tuple(METHODS)),
        ensemble=dataclasses.replace(digits.ensemble, models=2),
        counterfactual=dataclasses.replace(
            digits.counterfactual,
            methods=("dtrak", "dtrak-squared", "trak", "pixel-cosine"),
        ),
    )
