"""CIFAR-10: all 50,000 training images, as in the D-TRAK paper.

    dtrak-jax run configs/cifar10.py --workdir runs/cifar10

It has not been run at full size. On 16 chips of TPU v5e it is planned to take, at a
chip's peak rates, 0.17 hours of training, 0.11 of gradients, 7.7 of retraining 192
models and 2.4 of measuring 2,000 queries under them at 1,000 timesteps; and 12 of a
chip's 16 GiB. Checkpoints take 1.8 GB on disk, features 13.6 GB and the ensemble 29 GB
(264 GB more pass through while members are trained). The kernel is 32,768 x 32,768;
its eigenvectors take 32 GiB of the host's memory. This plans other slices:

    dtrak-jax plan configs/cifar10.py --topology v5e:4x4

The project's own features, with common noise, kept apart at ten timesteps, take a tenth
of the gradients, and 12 GiB of a chip of any kind:

    --features.noise common --features.per-timestep --features.timesteps 10
    --features.dim 4096 --features.batch-size 16

As many gradients with `--features.timesteps 5 --features.draws 2` give scores standard
errors; the plans are of one draw.

The notebooks of github.com/sail-sg/D-TRAK let expect this LDS in percent, the mean and
standard deviation of a bootstrap over 64 subsets, with one model, 100 timesteps and the
best damping for each figure:

             validation    generated
    TRAK     13.62±0.38    10.33±0.42
    D-TRAK   20.56±0.42    16.11±0.36

`attribution.damping` is the paper's lambda=5,000 in this project's units, which is the
best for D-TRAK.

`configs/README.md` lists what differs from the paper's code. Here the validation images
are a stratified draw by this project's own hash, and a model on half of the images takes
half of the steps, 39,100, where the paper's epochs, rounded up to whole batches, make
39,200.
"""

import dataclasses
import runpy
from pathlib import Path

from dtrak_jax.config import AttributionConfig, Config

HERE = Path(__file__).parent


def get_config() -> Config:
    cifar2 = runpy.run_path(str(HERE / "cifar2.py"))["get_config"]()
    return dataclasses.replace(
        cifar2,
        data=dataclasses.replace(cifar2.data, labels=(), train=50000),
        # 200 epochs. Members write no more often than a run that is ten times as short.
        train=dataclasses.replace(cifar2.train, steps=78200, save_every=10000),
        attribution=AttributionConfig(damping=5000 / 32768, absolute=True),
    )
