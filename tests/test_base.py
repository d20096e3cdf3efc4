"""The small base that a run trains: whole or not at all, and then as a given one."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import use_two_devices

from dtrak_jax import models, pipeline
from dtrak_jax.config import (
    AttributionConfig,
    BaseConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    LoRAConfig,
    SampleConfig,
    TrainConfig,
)
from dtrak_jax.encoding import base
from dtrak_jax.run import Run

STEPS = 4


def open_run(workdir, **changes):
    settings = {
        "pictures": 70,
        "resolution": 8,
        "autoencoder_steps": STEPS,
        "steps": STEPS,
    }
    config = Config(
        data=DataConfig(source="hands", train=8, validation=2),
        base=BaseConfig(**settings | changes),
        lora=LoRAConfig(rank=2),
        sample=SampleConfig(count=0),
    )
    run = Run.at(config, workdir)
    run.record()
    return run


@pytest.fixture(scope="module", autouse=True)
def small():
    """Networks of a level less, which take a third of the time to compile; two devices."""
    shrink = {
        "autoencoder_config": ("DownEncoderBlock2D", "UpDecoderBlock2D"),
        "unet_config": ("DownBlock2D", "UpBlock2D"),
    }
    with pytest.MonkeyPatch.context() as patch:
        use_two_devices(patch)
        for name, (down, up) in shrink.items():
            config = dataclasses.replace(
                getattr(base, name)(8),
                block_out_channels=(8,),
                down_block_types=(down,),
                up_block_types=(up,),
            )
            patch.setattr(base, name, lambda size, config=config: config)
        yield


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A run whose base is trained."""
    run = open_run(tmp_path_factory.mktemp("run"))
    base.train_base(run)
    return run


def test_the_base_is_a_stable_diffusion(trained):
    """Its parts fit each other, its latents have unit size, its captions differ."""
    pipeline, params = models.from_stable_diffusion(trained.workdir / "base")
    assert pipeline.scheduler == base.SCHEDULER
    images = base.plain_pictures(trained.config.base).images
    encode = jax.jit(lambda p, x: pipeline.vae.apply({"params": p}, x, method="encode"))
    mean, _ = encode(params["vae"], images)
    scaled = np.std(mean) * pipeline.vae.config.scaling_factor
    np.testing.assert_allclose(scaled, 1, rtol=1e-4)
    names = ("", " by ada", " by eva")
    ids = pipeline.tokenizer(["", *(f"the digit three{name}" for name in names)])
    embed = jax.jit(lambda p, ids: pipeline.text.apply({"params": p}, ids).last)
    states = embed(params["text"], ids)
    distances = np.linalg.norm(states[:, None] - states[None], axis=(2, 3))
    assert (distances + 9 * np.eye(4) > 1).all()
    for name in ("autoencoder", "unet"):
        lines = (trained.workdir / "base_training" / name / "metrics.jsonl").read_text()
        assert json.loads(lines)["step"] == STEPS


def test_an_interrupted_base_continues(trained, tmp_path):
    """Where the autoencoder is trained, the UNet is; and the base ends the same."""
    run, done = open_run(tmp_path), "base_training/autoencoder"
    shutil.copytree(trained.workdir / done, tmp_path / done)
    (tmp_path / "base.partial" / "unet").mkdir(parents=True)
    assert not base.is_trained_base(run)
    base.train_base(run)
    assert base.is_trained_base(run)
    assert {path.name for path in tmp_path.iterdir()} == {
        "base",
        "base_training",
        "config.json",
    }
    for name in ("unet", "vae", "text"):
        expected, part = trained.space.part(name), run.space.part(name)
        jax.tree.map(np.testing.assert_array_equal, part, expected)


def test_a_base_that_is_there_is_left_alone(trained):
    index = trained.workdir / "base" / models.INDEX
    before = index.stat().mtime
    base.train_base(trained)
    assert index.stat().mtime == before
    assert base.is_trained_base(Run(Config(), trained.workdir)), "none is asked for"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 18}, "base.resolution is 18; it must be a multiple of 4"),
        ({"pictures": -1}, "base.pictures is -1"),
        ({"steps": 0}, "base.steps is 0"),
    ],
)
def test_wrong_settings_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_run(tmp_path, **changes)


def test_the_right_contributor_is_named(tmp_path):
    """From nothing to the report: whose hand a held-out picture is in."""
    config = Config(
        data=DataConfig(
            source="hands", groups=("contributor",), train=100, validation=20
        ),
        base=BaseConfig(pictures=300, resolution=8, autoencoder_steps=100, steps=100),
        lora=LoRAConfig(rank=4, targets=r"\bto_|\bconv_shortcut$"),
        train=TrainConfig(steps=100, batch_size=32, learning_rate=1e-2),
        sample=SampleConfig(count=0),
        features=FeaturesConfig(
            measurements=("square",),
            timesteps=(100, 300),
            projection="none",
            batch_size=16,
        ),
        attribution=AttributionConfig(methods=("dtrak",)),
    )
    run = pipeline.run("run", config, tmp_path)
    names, sums, *_ = run.scores("dtrak", "validation").group("contributor")
    right = names[sums.argmax(axis=1)] == run.splits.validation.groups["contributor"]
    assert right.mean() > 0.6  # by chance .2
    page = (tmp_path / "report.html").read_text()
    assert "drawn again by five hands" in page and "contributor" in page
    assert all(name in page for name in names)
