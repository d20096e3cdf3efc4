"""Schedules and samplers against diffusers (goldens/make_diffusion.py)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dtrak_jax import diffusion
from dtrak_jax.config import DiffusionConfig
from dtrak_jax.diffusion.sampling import sampling_step

GOLDEN = np.load(Path(__file__).parent / "goldens" / "diffusion.npz")
X, EPS = (GOLDEN[name].astype(np.float32) for name in ("x", "eps"))


def network(x, t):
    return 0.8 * jnp.sin(1.3 * x + t / 500) + 0.1 * x


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_schedules_equal_diffusers(kind):
    config = DiffusionConfig(schedule=kind, beta_start=1e-4, beta_end=0.02)
    schedule = diffusion.build(config)
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


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_perfect_prediction_is_inverted(prediction):
    schedule = diffusion.linear_schedule(prediction=prediction)
    t = np.array([300])
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


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("t", [980, 500, 0])
@pytest.mark.parametrize("sampler", ["ddim/0.0", "ddim/0.7", "ancestral"])
def test_a_sampling_step_equals_diffusers(prediction, t, sampler):
    kind, _, eta = sampler.partition("/")
    schedule = diffusion.linear_schedule(prediction=prediction)
    z = EPS if float(eta or 0) else None
    ours, _ = sampling_step(
        schedule,
        network(X, t),
        X,
        t,
        t - 20,
        z,
        ancestral=kind == "ancestral",
        eta=float(eta or 0),
        clip=True,
    )
    name = f"{kind}/{prediction}/{eta}/{t}" if eta else f"{kind}/{prediction}/{t}"
    np.testing.assert_allclose(ours, GOLDEN[name], atol=2e-4)


def apply(params, x, t, cond):
    shift = 0 if cond is None else cond.reshape(-1, 1, 1, 1)
    return network(x, t.reshape(-1, 1, 1, 1)) * params + shift


@pytest.mark.parametrize("options", [{}, {"eta": 0.5}, {"sampler": "ancestral"}])
def test_an_image_depends_on_its_seed_alone(options):
    """Not on its batch, nor on the devices."""
    schedule = diffusion.linear_schedule()
    options = options | {"steps": 5}
    shape, seeds = (2, 2, 3), np.arange(11)
    whole = diffusion.sample(apply, 0.5, schedule, seeds, shape, **options)
    parts = diffusion.sample(
        apply, 0.5, schedule, seeds[[7, 2]], shape, batch_size=1, **options
    )
    np.testing.assert_allclose(parts, whole[[7, 2]], atol=1e-5)
    assert np.abs(whole[7] - whole[2]).max() > 0.01


def test_conditions_follow_their_images():
    schedule = diffusion.linear_schedule()
    cond = np.linspace(0, 1, 11, dtype=np.float32)
    seeds = np.zeros(11, int)
    images = diffusion.sample(
        apply, 0.5, schedule, seeds, (2, 2, 3), steps=5, cond=cond, clip=False
    )
    assert (np.diff(images.reshape(11, -1), axis=0) != 0).all()
    one = diffusion.sample(
        apply, 0.5, schedule, seeds[:1], (2, 2, 3), steps=5, cond=cond[4:5], clip=False
    )
    np.testing.assert_allclose(one[0], images[4], rtol=1e-5)


def test_a_trajectory_ends_in_the_image():
    """The image predicted in the last step is the sample; none leaves [-1, 1]."""
    schedule = diffusion.linear_schedule()
    images, predicted = diffusion.sample(
        apply, 0.5, schedule, np.arange(3), (2, 2, 3), steps=5, trajectory=True
    )
    assert predicted.shape == (3, 5, 2, 2, 3)
    np.testing.assert_allclose(predicted[:, -1], images, atol=1e-6)
    assert np.abs(predicted).max() <= 1
    assert np.abs(predicted[:, 0] - images).max() > 0.01
    assert diffusion.sampling_timesteps(schedule, 5).tolist() == [800, 600, 400, 200, 0]


def test_no_seeds_make_no_images():
    none = diffusion.sample(
        apply, 1.0, diffusion.linear_schedule(), np.arange(0), (2, 2, 3)
    )
    assert none.shape == (0, 2, 2, 3)


def test_wrong_settings():
    with pytest.raises(ValueError, match="betas must be"):
        diffusion.Schedule((0.1, 1.0))
    with pytest.raises(ValueError, match="'epsilon', 'v'"):
        diffusion.linear_schedule(prediction="x0")
    schedule = diffusion.linear_schedule(10)
    for options, message in [
        ({"sampler": "euler"}, "'ddim', 'ancestral'"),
        ({"steps": 11}, "steps is 11; it must be a finite number between 1 and 10"),
        ({"eta": 2.0, "steps": 5}, "eta is 2.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            diffusion.sample(apply, 1.0, schedule, np.arange(2), (2, 2, 3), **options)
