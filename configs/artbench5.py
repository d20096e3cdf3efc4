"""ArtBench-5: miniSD finetuned on 12,500 paintings of five styles, as in the D-TRAK paper.

    dtrak-jax run configs/artbench5.py --workdir runs/artbench5

It needs the folders of ArtBench-2, and has not been run at full size. Checkpoints take
1.2 GB on disk, features 3.8 GB and the ensemble 20 GB (176 GB more pass through while
members are trained). On 16 chips of a TPU v5e it is planned, not measured, to take 0.28
hours of training, 0.28 of gradients, 10.2 of retraining 192 models and 31.3 of measuring
their losses, at peak rates, and 14 of a chip's 16 GiB; on 8 chips of a v5p
0.07, 0.13, 5.1 and 18.1 hours, and 31 of 95 GiB:

    dtrak-jax plan configs/artbench5.py --topology v5e:4x4 --base.dtype bfloat16

For the project's own features, which are not planned, the flags are those of
`artbench2.py`:

    --features.noise common --features.per-timestep --features.timesteps 10
    --features.dim 4096 --features.batch-size 16

As many gradients with `--features.timesteps 5 --features.draws 2` give scores standard
errors.

The notebooks of github.com/sail-sg/D-TRAK let expect this LDS in percent, the mean and
standard deviation of a bootstrap over 64 subsets, with one model, 100 timesteps and the
best damping for each figure:

             validation    generated
    TRAK     21.03±0.42    19.54±0.61
    D-TRAK   27.46±0.37    23.85±0.74

`attribution.damping` is the paper's lambda=200 in this project's units, which is the
best for D-TRAK on generated images; on validation images that is 100.

What differs from the paper's code is in `artbench2.py`, but for two points. Steps are
the same, also of a model on half of the pictures. TracIn and GAS are means over the four
checkpoints at 25, 50, 75 and 100% of training; the paper's notebook leaves the first one
out by mistake. The paper has no counterfactuals of this setting.
"""

import dataclasses
import runpy
from pathlib import Path

from dtrak_jax.config import Config

HERE = Path(__file__).parent
STYLES = ("ukiyo_e", "post_impressionism", "romanticism", "renaissance", "baroque")
"""In the order of the generated images."""


def get_config() -> Config:
    artbench2 = runpy.run_path(str(HERE / "artbench2.py"))["get_config"]()
    prompts = tuple(f"a {style.replace('_', ' ')} painting" for style in STYLES)
    return dataclasses.replace(
        artbench2,
        data=dataclasses.replace(artbench2.data, labels=STYLES, train=12500),
        # 100 epochs. Members write as rarely as those of ArtBench-2.
        train=dataclasses.replace(artbench2.train, steps=19600, save_every=2500),
        sample=dataclasses.replace(artbench2.sample, prompts=prompts),
    )
