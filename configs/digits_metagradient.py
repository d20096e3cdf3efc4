"""A small, short training on digits, to be differentiated as a whole.

    dtrak-jax attribute configs/digits_metagradient.py --workdir runs/metagradient

A UNet of a single level (45,233 parameters) learns 100 steps of 128 images with AdamW's
`eps_root` above 0. Its scores are exact for the weights of the training images: what
approximations are measured against. They cost about four steps of training for each
query in every step, so there are eight queries: 164 seconds of one core, where a training
takes 4. `configs/results/README.md` shows what they predict.
"""

import dataclasses
import runpy
from pathlib import Path

from dtrak_jax.config import Config, SampleConfig

HERE = Path(__file__).parent


def get_config() -> Config:
    digits = runpy.run_path(str(HERE / "digits.py"))["get_config"]()
    return dataclasses.replace(
        digits,
        data=dataclasses.replace(digits.data, validation=8),
        model=dataclasses.replace(
            digits.model,
            block_out_channels=(16,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
        ),
        train=dataclasses.replace(
            digits.train,
            steps=100,
            batch_size=128,
            learning_rate=4e-3,
            eps_root=1e-8,
        ),
        sample=SampleConfig(count=0),
        features=dataclasses.replace(
            digits.features, timesteps=(100, 200, 300, 400, 500)
        ),
    )
