"""Models of others: their schedule, classes and variance, and what is refused by name."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NO_ATTENTION, UNET_APPLY_FN

import dtrak_jax as dtrak
from dtrak_jax import ahead, files, models
from dtrak_jax import pipeline as stages
from dtrak_jax.config import (
    Config,
    CounterfactualConfig,
    DataConfig,
    DiffusionConfig,
    EnsembleConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
)
from dtrak_jax.diffusion import sampling_timesteps
from dtrak_jax.encoding.classes import classes_of
from dtrak_jax.features.dependence import differentiable_inputs
from dtrak_jax.run import Run

CLASSES = dataclasses.replace(NO_ATTENTION, num_class_embeds=10)


def write_scheduler(folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "DDPMScheduler"} | settings))


def write_index(folder, name, *parts):
    """Writes a pipeline's model_index.json."""
    index = {part: ["diffusers", "Class"] for part in parts} | {"_class_name": name}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def params():
    model = models.build(NO_ATTENTION)
    return models.init(model, jax.random.key(0))


@pytest.fixture
def pipeline(tmp_path, params):
    """The folder of a DDPMPipeline with a cosine schedule."""
    models.to_diffusers(models.build(NO_ATTENTION), params, tmp_path / "pipe" / "unet")
    write_scheduler(tmp_path / "pipe/scheduler", beta_schedule="squaredcos_cap_v2")
    write_index(tmp_path / "pipe", "DDPMPipeline", "unet", "scheduler")
    return tmp_path / "pipe"


def given(folder, tmp_path, diffusion=None, **model):
    """The run of a model that is given."""
    model = ModelConfig(folder=str(folder), **model)
    config = Config(model=model, diffusion=diffusion or DiffusionConfig())
    return Run(config, tmp_path / "run")


def test_a_given_models_scheduler_decides_noise_and_prediction(pipeline, tmp_path):
    cosine = dtrak.cosine_schedule()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert given(pipeline, tmp_path).schedule == cosine
        equal = DiffusionConfig(schedule="cosine")
        assert given(pipeline, tmp_path, equal).schedule == cosine
    with pytest.warns(UserWarning, match="noise schedule is that of .*scheduler/"):
        assert given(pipeline / "unet", tmp_path).schedule == cosine
    for other in ({"schedule": "cosine", "prediction": "v"}, {"beta_end": 0.01}):
        run = given(pipeline, tmp_path, DiffusionConfig(**other))
        with pytest.raises(ValueError, match="json decides the noise .*`diffusion`"):
            _ = run.schedule
    (pipeline / "scheduler/scheduler_config.json").unlink()
    described = DiffusionConfig(steps=10, prediction="sample")
    with pytest.warns(UserWarning, match=r"no scheduler_config.json: .*linear, 10 st"):
        schedule = given(pipeline, tmp_path, described).schedule
    assert schedule == dtrak.linear_schedule(10, prediction="sample")
    write_scheduler(
        pipeline / "scheduler", _class_name="FlowMatchEulerDiscreteScheduler"
    )
    with pytest.raises(ValueError, match="is of flow matching, which runs do not"):
        _ = given(pipeline, tmp_path).schedule


def test_a_given_models_scheduler_says_where_sampling_starts(pipeline, tmp_path):
    """timestep_spacing="trailing", with which a zero terminal SNR is sampled, starts at
    the last timestep: 999, 979, ..., 19 in 50 steps, as in diffusers."""
    for settings, expected in (
        ({"timestep_spacing": "trailing"}, [*range(999, 0, -20)]),
        ({"steps_offset": 1}, [*range(981, 0, -20)]),
    ):
        write_scheduler(pipeline / "scheduler", **settings)
        sampler = given(pipeline, tmp_path).space.sampler
        timesteps = sampling_timesteps(sampler.schedule, sampler.steps, sampler.offset)
        assert timesteps.tolist() == expected


def test_other_pipelines_are_refused_by_name(pipeline, tmp_path):
    """Their networks see latents or text; nothing is read of them as if they did not."""
    write_index(pipeline, "LDMPipeline", "unet", "scheduler", "vqvae")
    for folder in (pipeline, pipeline / "unet"):
        with pytest.raises(ValueError, match="of a LDMPipeline, which has vqvae"):
            _ = given(folder, tmp_path).network
    config = pipeline / "unet/config.json"
    config.write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    write_index(pipeline, "DDPMPipeline", "unet")
    with pytest.raises(ValueError, match="'UNet2DConditionModel'; .*'UNet2DModel'"):
        _ = given(pipeline, tmp_path).network
    other = tmp_path / "sd3"
    (other / "transformer").mkdir(parents=True)
    write_index(other, "StableDiffusion3Pipeline", "transformer", "vae")
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline.* no unet/config"):
        _ = given(other, tmp_path).network
    (other / "transformer/config.json").write_text(
        json.dumps({"_class_name": "SD3Transformer2DModel"})
    )
    with pytest.raises(ValueError, match="SD3Transformer2DModel'; .*'UNet2DModel'"):
        models.from_diffusers(other / "transformer")


def test_channels_that_are_not_those_of_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model.out_channels is 3, but model.in_chann"):
        dataclasses.replace(NO_ATTENTION, out_channels=3)
    double = dataclasses.replace(NO_ATTENTION, out_channels=2)
    with pytest.raises(ValueError, match="out_channels is 2, .*variance='ignore'"):
        Config(model=double)
    for source, channels in (("digits", 3), ("hands", 2)):
        colour = dataclasses.replace(
            NO_ATTENTION, in_channels=channels, out_channels=channels
        )
        run = Run(Config(model=colour, data=DataConfig(source=source)), tmp_path)
        with pytest.raises(ValueError, match=f"model.in_channels is {channels}, but"):
            _ = run.network


def test_a_learned_variance_is_refused_or_ignored(pipeline, tmp_path, params, images):
    """Ignored, the features are those of the network that predicts the mean alone."""
    double = models.build(dataclasses.replace(NO_ATTENTION, out_channels=2))
    more = jax.tree.map(lambda leaf: leaf, params)
    out = more["conv_out"]
    more["conv_out"] = jax.tree.map(lambda a: jnp.concatenate([a, a + 1], -1), out)
    models.to_diffusers(double, more, pipeline / "unet")
    with pytest.raises(ValueError, match="twice model.in_channels=1: .*variance"):
        _ = given(pipeline, tmp_path).network
    network = given(pipeline, tmp_path, variance="ignore").network
    x, t = images[:2], jnp.array([3, 400])
    apply, single = UNET_APPLY_FN(double), UNET_APPLY_FN(models.build(NO_ATTENTION))
    task = dtrak.Task(apply, dtrak.linear_schedule(), timesteps=(3,))
    ignoring = dataclasses.replace(task, variance="ignore")

    @jax.jit
    def predictions(keys):
        return single(params, x, t, None), (
            network.apply(more, x, t, None),
            network.train_apply(more, x, t, None, keys),
            ignoring.network(more, x, t, None),
        )

    mean, same = predictions(jax.random.split(jax.random.key(0), 2))
    for prediction in same:
        np.testing.assert_allclose(prediction, mean, atol=1e-6)
    with pytest.raises(ValueError, match=r"Task\(variance='ignore'\) takes the mean"):
        dtrak.featurize(task, more, x, dtrak.Projection("none"))
    with pytest.raises(ValueError, match="variance is 'mean'; it must be one of"):
        dataclasses.replace(task, variance="mean")


def test_labels_are_the_classes_of_a_conditional_model(tmp_path):
    """In training and features those of the pictures, in sampling equal blocks."""
    sample = SampleConfig(count=4, labels=("7", "3"), steps=2)
    data = DataConfig(source="digits", train=20, validation=3)
    run = Run(Config(data=data, model=CLASSES, sample=sample), tmp_path)
    train = run.splits.train
    np.testing.assert_array_equal(run.space.cond("train"), train.labels)
    path, other = tmp_path / "splits.npz", np.roll(train.labels, 1)
    saved = files.read_npz(path)
    files.write_npz(path, **saved | {"train_labels": other})
    with pytest.raises(
        ValueError, match=r"label of digit-\d+: \d -> \d: .* of 20 train"
    ):
        Run(run.config, tmp_path).splits  # noqa: B018
    assert run.space.cond("train").dtype == run.space.shapes.cond.dtype == np.int32
    labels = run.space.generated_columns["labels"]
    assert labels.tolist() == ["7", "7", "3", "3"]
    *_, cond = run.space.generator({}, run.seeds[[2, 0]])
    assert cond.tolist() == [3, 7]
    model = models.build(CLASSES)
    params, x = models.init(model, jax.random.key(0)), np.zeros((2, 8, 8, 1), "f4")
    apply = UNET_APPLY_FN(model)
    first, second = jax.jit(apply)(params, x, jnp.array([5, 5]), cond)
    assert np.abs(first - second).max() > 1e-3
    for wrong in (None, np.zeros(2, "f4"), np.zeros(3, int)):
        with pytest.raises(
            ValueError, match=r"cond is .*class of each image, integers"
        ):
            apply(params, x, jnp.array([5, 5]), wrong)

    names = ("2", "7")
    assert classes_of(["7", "2"], names, CLASSES, "x").tolist() == [7, 2]
    assert classes_of(["b"], ("a", "b"), CLASSES, "x").tolist() == [1]
    with pytest.raises(ValueError, match="label '3', which is none of .*: 2, 7"):
        classes_of(["3"], names, CLASSES, "x")
    with pytest.raises(ValueError, match="labels '01' and '1' are both class 1"):
        classes_of(["1"], ("01", "1"), CLASSES, "x")
    few = dataclasses.replace(CLASSES, num_class_embeds=5)
    with pytest.raises(ValueError, match="'7', which is class 7; .* classes 0 to 4"):
        classes_of(["7"], names, few, "x")
    run.__dict__["generated"] = dataclasses.replace(train, labels=None)
    with pytest.raises(ValueError, match="the generated images have no labels.*CSV"):
        run.space.cond("generated")
    with pytest.raises(ValueError, match="sample.labels is .* not given classes"):
        Config(model=NO_ATTENTION, sample=sample)


def test_wrong_settings_of_sampling_are_refused_ahead(pipeline, tmp_path):
    """They must fit a model that is given, or its labels, and are known before training."""
    for model, sample, message in (
        (ModelConfig(folder=str(pipeline)), {"steps": 1001}, "steps is 1001; .* 1000"),
        (
            CLASSES,
            {"labels": ("x",)},
            "sample.labels have the label 'x', which is none",
        ),
        (CLASSES, {"labels": ("3", "4", "5")}, "has 3 labels and sample.count is 2"),
    ):
        sample, data = (
            SampleConfig(count=2, **sample),
            DataConfig(train=9, validation=1),
        )
        config = Config(model=model, sample=sample, data=data)
        with pytest.raises(ValueError, match=message):
            ahead.sample(Run(config, tmp_path))


def test_models_are_trained_only_as_the_given_one_was(pipeline, tmp_path):
    """Nothing is written where nobody says how that was, and nothing trained by default."""
    config = Config(
        data=DataConfig(train=20, validation=3),
        model=ModelConfig(folder=str(pipeline)),
        train=TrainConfig(steps=0, batch_size=7),
        sample=SampleConfig(count=2, steps=2),
        ensemble=EnsembleConfig(models=1),
        counterfactual=CounterfactualConfig(count=5),
    )
    for command, count, steps in (
        ("retrain", 193, "776,000"),
        ("lds", 193, "776,000"),
        ("ablate", 193, "776,000"),
        ("counterfactual", 8, "64,000"),
    ):
        message = f"{count} models .*--train.steps N.*batch_size=7.* {steps} steps if"
        with pytest.raises(ValueError, match=message):
            stages.run(command, config, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    check, needed = stages.check, stages.needed("run", config)
    check(Run.at(config, tmp_path / "w"), needed)
    named = dataclasses.replace(config, train=TrainConfig(steps=300))
    with pytest.warns(UserWarning, match="from nothing by `train`, 300 steps of 128"):
        ahead.retrain(Run(named, tmp_path / "w"))
    with pytest.raises(
        ValueError, match="train.steps is 0; it must be an integer >= 1"
    ):
        dataclasses.replace(config, model=NO_ATTENTION)


def test_a_network_that_does_not_use_its_parameters_is_refused(images):
    """Nor may it use them by way of whole numbers alone; a part of them is warned of."""
    x, schedule = images[:2], dtrak.linear_schedule()
    params = {"w": jnp.float32(1), "rest": jnp.ones(3, jnp.float32)}

    def featurize(apply):
        task = dtrak.Task(apply, schedule, timesteps=(3,))
        return dtrak.featurize(task, params, x, dtrak.Projection("none"))

    stop = jax.lax.stop_gradient
    for ignoring in (
        lambda p, x, t, cond: x * params["w"],
        lambda p, x, t, cond: x * stop(p["w"]),
        jax.jit(lambda p, x, t, cond: x * p["w"].astype(int).astype(x.dtype)),
    ):
        with pytest.raises(ValueError, match="depend on any .*rest, w: every gradient"):
            featurize(ignoring)
    for apply in (f := lambda p, x, t, cond: x * p["w"], jax.jit(f)):
        with pytest.warns(
            UserWarning, match="depend on 1 of 2 parameters, rest; their"
        ):
            assert np.abs(featurize(apply)).max() > 0

    def loop(a, b):
        return jax.lax.fori_loop(0, 2, lambda i, c: c * a + stop(b), a)

    program = jax.make_jaxpr(loop)(1.0, 1.0).jaxpr
    assert differentiable_inputs(program, [True])[0]


def test_flow_matching_features_are_gradients_at_the_networks_own_time(images):
    """A network of one's own is given T sigma, and is to predict eps - x."""
    schedule = dtrak.flow_schedule(10, shift=3.0)
    sigma = np.float32(schedule.sigmas[4])

    def apply(p, x, t, cond):
        return p * x * (t / 10).reshape(-1, 1, 1, 1)

    task = dtrak.Task(apply, schedule, "loss", timesteps=(4,))
    features = dtrak.featurize(
        task, jnp.float32(0.5), images[:2], dtrak.Projection("none")
    )
    eps = task.eps(jnp.int32(0), jnp.zeros(2, jnp.uint32), 0, images.shape[1:])
    for phi, x in zip(np.asarray(features)[0], images):
        seen = sigma * ((1 - sigma) * x + sigma * eps)
        expected = 2 * np.mean((0.5 * seen - (eps - x)) * seen)
        np.testing.assert_allclose(phi, [expected], rtol=2e-4)
