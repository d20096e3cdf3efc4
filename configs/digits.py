"""scikit-learn's digits: 1,797 real images of 8x8. This is the default job.

    dtrak-jax run configs/digits.py --workdir runs/digits

It downloads nothing and takes about two minutes on two CPU cores. The other commands
retrain 128 models, which takes about an hour.

Two noise draws at each of three timesteps give scores standard errors. They were chosen
among several by their LDS on 16 subsets x 2 seeds and 200 validation images: .591 (D-TRAK)
and .563 (TRAK), against .551 and .556 of one draw at each of five, 100 to 500, which are
about as many gradients; part of that is the choice.
"""

from dtrak_jax.config import (
    AttributionConfig,
    Config,
    CounterfactualConfig,
    DataConfig,
    EnsembleConfig,
    FeaturesConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(source="digits", train=1000, validation=200),
        model=ModelConfig(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            dropout=0.0,
        ),
        train=TrainConfig(
            steps=2000, batch_size=64, learning_rate=2e-3, save_every=250
        ),
        sample=SampleConfig(count=64),
        attribution=AttributionConfig(methods=("dtrak", "trak", "pixel-cosine")),
        counterfactual=CounterfactualConfig(queries=10, count=200),
        ensemble=EnsembleConfig(subsets=64, seeds=2, timesteps=25, draws=2),
        features=FeaturesConfig(
            timesteps=(100, 200, 300), draws=2, dim=2048, batch_size=32
        ),
    )
