"""Schedules and samplers against diffusers (goldens/make_diffusion.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtrak_jax import diffusion
from dtrak_jax.diffusion import sampling
from dtrak_jax.diffusion.config import DiffusionConfig, build_schedule
from dtrak_jax.diffusion.sampling import batch_of, sampling_step, step_function
from dtrak_jax.features.measurements import elbo

GOLDEN = np.load(Path(__file__).parent / "goldens" / "diffusion.npz")
X, EPS = (GOLDEN[name].astype(np.float32) for name in ("x", "eps"))


def network(x, t):
    return 0.8 * jnp.sin(1.3 * x + t / 500) + 0.1 * x


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_schedules_equal_diffusers(kind):
    config = DiffusionConfig(schedule=kind, beta_start=1e-4, beta_end=0.02)
    schedule = build_schedule(config)
    alpha_bar = GOLDEN[f"{kind}/alpha_bar"]
    np.testing.assert_allclose(schedule.alpha_bar, alpha_bar, rtol=3e-4, atol=1e-8)
    np.testing.assert_allclose(schedule.alpha_bar[:900], alpha_bar[:900], rtol=2e-5)
    t = np.array([123])
    noised = schedule.add_noise(X, EPS, t)
    np.testing.assert_allclose(noised, GOLDEN[f"{kind}/x_123"], atol=1e-5)
    in_v = diffusion.Schedule(schedule.betas, "v")
    np.testing.assert_allclose(
        in_v.target(X, EPS, t), GOLDEN[f"{kind}/v_123"], atol=1e-5
    )
    np.testing.assert_array_equal(schedule.target(X, EPS, t), EPS)


def test_the_papers_alpha_bars():
    alpha_bar = diffusion.linear_schedule().alpha_bar[[0, 100, 500, 900, 999]]
    paper = [0.99990, 0.89514, 0.07780, 2.702e-4, 4.036e-5]
    np.testing.assert_allclose(alpha_bar, paper, rtol=2e-4)


def test_the_papers_elbo_weights():
    weights = diffusion.linear_schedule().elbo_weights[[0, 1, 10, 500, 999]]
    np.testing.assert_allclose(
        weights, [0.500, 0.273, 0.068, 0.0055, 0.0102], rtol=5e-3
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_a_perfect_prediction_is_inverted(prediction):
    """And an error in it counts in the bound by the error in the noise that it makes."""
    schedule = diffusion.linear_schedule()
    if prediction == "flow":
        schedule = diffusion.flow_schedule(shift=3.0)
    else:
        schedule = diffusion.linear_schedule(prediction=prediction)
    t = np.array([300])
    alpha_bar = schedule.alpha_bar.astype(float)
    alpha = alpha_bar[300] / alpha_bar[299]
    target = schedule.target(X, EPS, t)
    off = schedule.denoise(target + 0.1, schedule.add_noise(X, EPS, t), t)[1] - EPS
    weight = (1 - alpha) / (2 * alpha * (1 - alpha_bar[300]))
    np.testing.assert_allclose(
        elbo(target + 0.1, target, 300, schedule), weight * (off**2).mean(), rtol=2e-3
    )
    x_t = schedule.add_noise(X, EPS, t)
    x, eps = schedule.denoise(schedule.target(X, EPS, t), x_t, t)
    np.testing.assert_allclose(x, X, atol=1e-5)
    np.testing.assert_allclose(eps, EPS, atol=1e-5)


def test_the_loss_is_the_mean_square_and_0_for_a_perfect_network():
    schedule = diffusion.linear_schedule()
    batch = np.concatenate([X, X / 2])
    noise = np.concatenate([EPS, -EPS])
    t = np.array([5, 800])
    perfect = diffusion.denoising_loss(lambda x, t: noise, schedule, batch, t, noise)
    np.testing.assert_array_equal(perfect, [0, 0])
    off = diffusion.denoising_loss(lambda x, t: noise + 0.5, schedule, batch, t, noise)
    np.testing.assert_allclose(off, [0.25, 0.25], rtol=1e-6)
    with pytest.raises(ValueError, match="a prediction must have the shape"):
        diffusion.denoising_loss(lambda x, t: x[..., :1], schedule, batch, t, noise)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("t", [980, 500, 0])
@pytest.mark.parametrize("sampler", ["ddim/0.0", "ddim/0.7", "ancestral"])
def test_a_sampling_step_equals_diffusers(prediction, t, sampler):
    kind, _, eta = sampler.partition("/")
    schedule = diffusion.linear_schedule(prediction=prediction)
    sampler = diffusion.Sampler(schedule, kind, eta=float(eta or 0))
    z = EPS if sampler.eta else None
    ours, _ = sampling_step(sampler, network(X, t), X, t, t - 20, z)
    name = f"{kind}/{prediction}/{eta}/{t}" if eta else f"{kind}/{prediction}/{t}"
    np.testing.assert_allclose(ours, GOLDEN[name], atol=2e-4)


def apply(params, x, t, cond):
    shift = 0 if cond is None else cond.reshape(-1, 1, 1, 1)
    return network(x, t.reshape(-1, 1, 1, 1)) * params + shift


@pytest.mark.parametrize("options", [{}, {"eta": 0.5}, {"kind": "ancestral"}])
def test_an_image_depends_on_its_seed_alone(options):
    """It does not depend on its batch, nor on the devices."""
    sampler = diffusion.Sampler(diffusion.linear_schedule(), steps=5, **options)
    shape, seeds = (2, 2, 3), np.arange(11)
    whole = diffusion.sample(apply, 0.5, sampler, seeds, shape)
    parts = diffusion.sample(apply, 0.5, sampler, seeds[[7, 2]], shape, batch_size=1)
    np.testing.assert_allclose(parts, whole[[7, 2]], atol=1e-5)
    assert np.abs(whole[7] - whole[2]).max() > 0.01


@pytest.mark.parametrize(
    ("options", "pixels"),
    [
        ({}, [-0.638270, -0.507768, -0.518491, -0.597398]),
        ({"eta": 0.5}, [-0.717209, 0.261891, -0.823994, -0.692591]),
        ({"kind": "ancestral"}, [-0.944914, 0.372251, -0.992140, -0.879909]),
    ],
)
def test_samples_never_change(options, pixels):
    sampler = diffusion.Sampler(diffusion.linear_schedule(), steps=4, **options)
    images = diffusion.sample(apply, 0.5, sampler, np.array([3]), (2, 2, 1))
    np.testing.assert_allclose(images.ravel(), pixels, atol=2e-5)


def test_conditions_follow_their_images():
    """Conditions may be any pytree with a row for each image."""
    schedule = diffusion.linear_schedule()
    sampler = diffusion.Sampler(schedule, steps=5, clip=False)
    cond = np.linspace(0, 1, 11, dtype=np.float32)
    seeds = np.zeros(11, int)
    images = diffusion.sample(apply, 0.5, sampler, seeds, (2, 2, 3), cond=cond)
    assert (np.diff(images.reshape(11, -1), axis=0) != 0).all()
    one = diffusion.sample(apply, 0.5, sampler, seeds[:1], (2, 2, 3), cond=cond[4:5])
    np.testing.assert_allclose(one[0], images[4], rtol=1e-5)

    def of_tree(params, x, t, cond):
        return apply(params, x, t, cond["a"][0] - cond["b"].mean(axis=1))

    tree = {"a": (2 * cond,), "b": np.stack([cond, cond], axis=1)}
    same = diffusion.sample(of_tree, 0.5, sampler, seeds, (2, 2, 3), cond=tree)
    np.testing.assert_allclose(same, images, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cond has 10 rows; there are 11 seeds"):
        diffusion.sample(apply, 0.5, sampler, seeds, (2, 2, 3), cond=cond[1:])


def test_a_trajectory_ends_in_the_image():
    """The image predicted in the last step is the sample; none leaves [-1, 1]."""
    schedule = diffusion.linear_schedule()
    sampler = diffusion.Sampler(schedule, steps=5)
    images, predicted = diffusion.sample(
        apply, 0.5, sampler, np.arange(3), (2, 2, 3), trajectory=True
    )
    assert predicted.shape == (3, 5, 2, 2, 3)
    np.testing.assert_allclose(predicted[:, -1], images, atol=1e-6)
    assert np.abs(predicted).max() <= 1
    assert np.abs(predicted[:, 0] - images).max() > 0.01
    assert diffusion.sampling_timesteps(schedule, 5).tolist() == [
        *(800, 600, 400, 200, 0)
    ]


def test_no_seeds_make_no_images():
    sampler = diffusion.Sampler(diffusion.linear_schedule())
    none = diffusion.sample(apply, 1.0, sampler, np.arange(0), (2, 2, 3))
    assert none.shape == (0, 2, 2, 3)


@pytest.mark.parametrize(
    ("count", "batch_size", "devices", "size"),
    [(11, 2, 4, 8), (3, 128, 4, 4), (5, 128, 4, 8), (1, 1, 1, 1), (0, 2, 8, 8)],
)
def test_a_batch_is_as_large_as_it_needs_to_be(count, batch_size, devices, size):
    assert batch_of(count, batch_size, devices) == size


def test_the_planned_program_is_the_one_that_runs(monkeypatch):
    """It is the same function, called as often, with arguments of the same shapes."""
    sampler = diffusion.Sampler(diffusion.linear_schedule(), steps=3)
    program, calls = diffusion.sample_program(
        apply, jnp.float32(0.5), sampler, (2, 2, 3), 19, 1, jax.local_devices()
    )
    shapes = []

    def spy(apply, sampler, mesh):
        function = step_function(apply, sampler, mesh)
        assert function is program.function and mesh == program.mesh

        def call(*arguments):
            shapes.append(jax.tree.map(np.shape, arguments))
            return function(*arguments)

        return call

    monkeypatch.setattr(sampling, "step_function", spy)
    diffusion.sample(
        apply, jnp.float32(0.5), sampler, np.arange(19), (2, 2, 3), batch_size=1
    )
    assert shapes == calls * [jax.tree.map(np.shape, program.arguments)]
    assert "sample_step" in program.function.lower(*program.arguments).as_text()


def test_wrong_settings():
    for betas in ((), (0.1, 1.5), (1.0, 0.1), (0.0,)):
        with pytest.raises(ValueError, match="betas must be"):
            diffusion.Schedule(betas)
    with pytest.raises(ValueError, match="prediction is 'epsilon'.*'v' or 'sample'"):
        diffusion.Schedule((0.1, 1.0))
    for sigmas in ((), (0.5, 0.5), (0.5, 1.1), (0.0, 0.5)):
        with pytest.raises(ValueError, match="sigmas of flow matching must be"):
            diffusion.Schedule((), "flow", sigmas)
    with pytest.raises(ValueError, match="sigmas are for prediction='flow'"):
        diffusion.Schedule((0.1,), "v", (0.5,))
    with pytest.raises(ValueError, match="one of flow matching, which these samplers"):
        diffusion.Sampler(diffusion.flow_schedule())
    with pytest.raises(ValueError, match="'epsilon', 'v'"):
        diffusion.linear_schedule(prediction="x0")
    schedule = diffusion.linear_schedule(10)
    for options, message in [
        ({"kind": "euler"}, "sampler.kind is 'euler'; .* 'ddim', 'ancestral'"),
        ({}, "sampler.steps is 50; it must be at most 10, the number of timesteps"),
        ({"steps": 0}, "sampler.steps is 0; it must be an integer >= 1"),
        ({"eta": 2.0, "steps": 5}, "sampler.eta is 2.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            diffusion.Sampler(schedule, **options)


# Schedules of diffusers' folders


def write_scheduler(folder, name="scheduler_config.json", **settings):
    """Writes a scheduler's file as diffusers writes it."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    settings = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.30"} | settings
    path.write_text(json.dumps(settings))
    return folder


def test_a_file_without_fields_has_the_defaults_of_ddpm(tmp_path):
    schedule = diffusion.Schedule.from_diffusers(write_scheduler(tmp_path))
    beta = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    np.testing.assert_allclose(schedule.betas, beta, rtol=1e-12)
    np.testing.assert_allclose(
        schedule.alpha_bar, np.cumprod(1 - np.array(beta)), rtol=1e-6
    )
    assert schedule.prediction == "epsilon"
    assert schedule == diffusion.linear_schedule()


def test_every_kind_of_schedule_is_read(tmp_path):
    settings = {"num_train_timesteps": 4, "beta_start": 0.01, "beta_end": 0.09}
    settings["prediction_type"] = "v_prediction"
    u = np.arange(5) / 4
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    for kind, betas in {
        "linear": [0.01, 0.11 / 3, 0.19 / 3, 0.09],
        "scaled_linear": [0.01, (0.5 / 3) ** 2, (0.7 / 3) ** 2, 0.09],
        "squaredcos_cap_v2": np.minimum(0.999, 1 - alpha_bar[1:] / alpha_bar[:-1]),
    }.items():
        write_scheduler(
            tmp_path,
            "scheduler/scheduler_config.json",
            beta_schedule=kind,
            clip_sample=True,
            trained_betas=None,
            **settings,
        )
        schedule = diffusion.Schedule.from_diffusers(tmp_path)
        np.testing.assert_allclose(schedule.betas, betas, rtol=1e-12)
        assert schedule.prediction == "v"


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear"}
STABLE_DIFFUSION |= {"beta_start": 0.00085, "beta_end": 0.012}
TRAINED = {"trained_betas": [0.1, 0.2, 0.05, 0.3], "prediction_type": "sample"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


@pytest.mark.parametrize(
    ("settings", "t", "alpha_bar", "noised", "velocity"),
    [
        (
            ZERO_SNR | STABLE_DIFFUSION,
            [0, 123, 999],
            [0.99914998, 0.85526067, 0.0],
            [-0.47646334, -0.15804454, 0.8],
            [0.81423749, 0.93006555, 0.5],
        ),
        (
            ZERO_SNR | COSINE | {"_class_name": "EulerDiscreteScheduler"},
            [0, 123, 999],
            [0.99995887, 0.95842832, 0.0],
            [-0.49485928, -0.32638369, 0.8],
            [0.80319007, 0.88514049, 0.5],
        ),
        (
            TRAINED | {"_class_name": "DPMSolverMultistepScheduler"},
            [0, 1, 3],
            [0.9, 0.72, 0.4788],
            [-0.2213594, -0.00094383, 0.2315766],
            [0.91706053, 0.9433976, 0.91453391],
        ),
        (
            {"_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": True},
            [0, 123, 999],
            [0.99914998, 0.82640409, 0.00157896],
            *(None, None),
        ),
    ],
)
def test_noise_and_velocity_equal_diffusers(
    settings, t, alpha_bar, noised, velocity, tmp_path
):
    """alphas_cumprod, add_noise and get_velocity of x = -0.5 and eps = 0.8 in torch
    diffusers 0.42.1, the latter two of its DDPMScheduler with these betas."""
    schedule = diffusion.Schedule.from_diffusers(write_scheduler(tmp_path, **settings))
    np.testing.assert_allclose(schedule.alpha_bar[t], alpha_bar, atol=5e-7)
    assert np.isfinite(schedule.elbo_weights).all()
    if noised:
        x, eps = np.full((2, 3, 1), [[[-0.5]], [[0.8]]], np.float32)
        t = np.array(t)
        found = schedule.add_noise(x, eps, t).ravel()
        np.testing.assert_allclose(found, noised, atol=2e-5)
        in_v = diffusion.Schedule(schedule.betas, "v")
        found = in_v.target(x, eps, t).ravel()
        np.testing.assert_allclose(found, velocity, atol=2e-5)


def test_flow_matching_equals_diffusers(tmp_path):
    """timesteps and scale_noise of FlowMatchEulerDiscreteScheduler(shift=3.0), torch
    diffusers 0.42.1, whose timesteps fall; the network is given them, and eps - x is
    what it predicts."""
    settings = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    folder = write_scheduler(tmp_path, "scheduler/scheduler_config.json", **settings)
    schedule = diffusion.Schedule.from_diffusers(folder)
    assert schedule == diffusion.flow_schedule(1000, shift=3.0)
    t, x, eps = np.array([0, 499, 999]), np.full((3, 1), -0.5), np.full((3, 1), 0.8)
    times = [2.9940121173858643, 750.0, 1000.0]
    np.testing.assert_allclose(schedule.times(t), times, rtol=1e-6)
    noised = [-0.4961077842, 0.475, 0.8]
    found = schedule.add_noise(x, eps, t).ravel()
    np.testing.assert_allclose(found, noised, atol=1e-6)
    np.testing.assert_allclose(schedule.target(x, eps, t), 1.3, rtol=1e-6)
    seen = []
    diffusion.denoising_loss(
        lambda x, t: seen.append(t) or x, schedule, x, t, np.float32(eps)
    )
    np.testing.assert_allclose(seen[0], times, rtol=1e-6)
    assert diffusion.flow_schedule(10).times(np.arange(10)).tolist() == [*range(1, 11)]
    dynamic = write_scheduler(tmp_path, use_dynamic_shifting=True, **settings)
    (dynamic / "scheduler" / "scheduler_config.json").unlink()
    assert diffusion.Schedule.from_diffusers(dynamic) == diffusion.flow_schedule()


def test_a_schedule_beside_a_network_is_found(tmp_path):
    """So from_diffusers of a pipeline's `unet` folder has the pipeline's schedule."""
    write_scheduler(tmp_path, "scheduler/scheduler_config.json", **STABLE_DIFFUSION)
    (tmp_path / "unet").mkdir()
    with pytest.raises(FileNotFoundError, match="folder `scheduler` beside it"):
        diffusion.Schedule.from_diffusers(tmp_path / "unet")
    (tmp_path / "unet" / "config.json").write_text("{}")
    found = diffusion.Schedule.from_diffusers(tmp_path / "unet")
    assert found == diffusion.scaled_linear_schedule()


def test_other_schedulers_are_refused(tmp_path):
    for field, value, allowed in [
        ("_class_name", "EDMEulerScheduler", "'DDPMScheduler', 'DDIM"),
        ("beta_schedule", "sigmoid", "'linear', 'scaled_linear', 'squaredcos_cap_v2'"),
        ("prediction_type", "flow_prediction", "'epsilon', 'v_prediction', 'sample'"),
        ("use_flow_sigmas", True, "False"),
        ("sigma_min", 0.1, "None"),
        ("snr_shift_scale", 3.0, "this field is unknown"),
        ("num_train_timesteps", "10", "an integer >= 1"),
        ("beta_start", -0.1, "a finite number"),
        ("beta_end", 0.0, "a finite number"),
    ]:
        with pytest.raises(ValueError) as error:
            diffusion.Schedule.from_diffusers(
                write_scheduler(tmp_path, **{field: value})
            )
        for part in ("scheduler_config.json", field, repr(value), allowed):
            assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match="no scheduler_config.json; it must"):
        diffusion.Schedule.from_diffusers(tmp_path / "absent")
