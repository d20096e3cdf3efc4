"""Text-to-image in small: whose pictures taught the model this hand?

    dtrak-jax run configs/tiny_text2image.py --workdir runs/tiny_text2image

It downloads nothing and takes about three minutes on two CPU cores. It first trains a small
Stable Diffusion on digits in any colours, with captions like "the digit three". Then it
trains adapters beside it on 600 pictures by five contributors, each of whom has a hand of
their own, with captions like "the digit three by ada". A generated picture "by ada" should
be due to ada's pictures, and her threes above all: attribution can be seen to be right.

Two noise draws at each of two timesteps give scores standard errors, and name the prompt's
hand for 60 (D-TRAK) and 58 (TRAK) of 60 generated pictures, as one draw at each of four
does: 100, 300, 500 and 700.
"""

from dtrak_jax.config import (
    AttributionConfig,
    BaseConfig,
    Config,
    CounterfactualConfig,
    DataConfig,
    EnsembleConfig,
    FeaturesConfig,
    LoRAConfig,
    SampleConfig,
    TrainConfig,
)

HANDS = ("ada", "ben", "cleo", "dov", "eva")
DIGITS = ("zero", "three", "four", "seven")


def get_config() -> Config:
    return Config(
        data=DataConfig(
            source="hands", groups=("contributor",), train=600, validation=60
        ),
        base=BaseConfig(pictures=3000, batch_size=64),
        # All linear layers: there are few of them, and colours are new as well as strokes.
        lora=LoRAConfig(
            rank=16,
            targets=r"(attentions.*(to_(q|k|v|out\.0)|proj|proj_in|proj_out|net\.2)|"
            r"time_emb_proj)$",
        ),
        train=TrainConfig(
            steps=1600,
            batch_size=64,
            learning_rate=4e-3,
            caption_dropout=0.1,
            save_every=400,
        ),
        sample=SampleConfig(
            count=60,
            steps=25,
            guidance=4.0,
            prompts=tuple(f"the digit {d} by {h}" for h in HANDS for d in DIGITS),
        ),
        features=FeaturesConfig(timesteps=(300, 500), draws=2, dim=2048, batch_size=32),
        attribution=AttributionConfig(methods=("dtrak", "trak", "pixel-cosine")),
        counterfactual=CounterfactualConfig(queries=10, count=120),
        ensemble=EnsembleConfig(
            subsets=32, seeds=2, timesteps=25, draws=2, per_device=4
        ),
    )
