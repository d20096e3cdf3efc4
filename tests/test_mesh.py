"""Features do not depend on the mesh, and devices exchange no more than they must."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_features import one_by_one

import dtrak_jax as dtrak
from dtrak_jax import models, parallel
from dtrak_jax.config import FeaturesConfig
from dtrak_jax.features import gradients, step_programs
from dtrak_jax.features.projection import project_all

K = 128
KINDS = ("sketch", "rademacher", "gaussian", "factorized", "none")
DENSE = ("rademacher", "gaussian")


class Net(nn.Module):
    """Convolutions, which automatic sharding gets wrong."""

    @nn.compact
    def __call__(self, x, t, context=None):
        for channels in (8, 1):
            x = jnp.tanh(nn.Conv(channels, (3, 3))(x))
        return x


@pytest.fixture(scope="module")
def network():
    """(apply, params), p = 153."""
    net, x = Net(), jnp.zeros((1, 8, 8, 1))
    return models.apply_fn(net), net.init(jax.random.key(0), x, None)["params"]


def task_of(network, per_timestep):
    return dtrak.Task(
        network[0],
        dtrak.linear_schedule(),
        measurement=("square",),
        timesteps=(0, 150, 600),
        per_timestep=per_timestep,
    )


def use(monkeypatch, devices):
    chosen = jax.devices()[:devices]
    monkeypatch.setattr(jax, "local_devices", lambda: chosen)


def compute(network, images, kind, per_timestep, proj_devices=1):
    """{measurement: features} of an odd number of examples."""
    return dtrak.featurize(
        task_of(network, per_timestep),
        network[1],
        images[:5],
        dtrak.Projection(kind, K),
        batch_size=2,
        proj_devices=proj_devices,
    )


@pytest.mark.parametrize("per_timestep", [True, False])
def test_features_equal_a_loop_of_grad_on_every_mesh(
    network, images, monkeypatch, per_timestep
):
    """With an explicit product by R, to 1e-5 of the largest feature.

    But "factorized", which has no R to be had from unit vectors, with one device's.
    """
    task = task_of(network, per_timestep)
    exact = one_by_one(task, network[1], images[:5], ids=tuple("01234"))["square"]
    if not per_timestep:
        exact = exact.mean(axis=0)
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(network[1])])
    parts = np.split(np.eye(ends[-1], dtype=np.float32), ends[:-1], axis=1)
    expected = {"none": exact}
    for kind in ("sketch", *DENSE):
        matrix = project_all(dtrak.Projection(kind, K), {"R": parts})["R"]
        expected[kind] = exact @ np.asarray(matrix)
    runs = [(mesh, kind) for mesh in ((1, 1), (8, 2)) for kind in KINDS]
    runs += [(mesh, "sketch") for mesh in ((2, 1), (8, 1), (8, 4))]
    if not per_timestep:
        runs = [((1, 1), "sketch"), ((8, 2), "sketch"), ((8, 2), "gaussian")]
    for (devices, proj_devices), kind in runs:
        use(monkeypatch, devices)
        features = compute(network, images, kind, per_timestep, proj_devices)["square"]
        target = expected.setdefault(kind, np.asarray(features))
        assert features.shape == target.shape
        error = np.abs(np.asarray(features) - target).max()
        assert error < 1e-5 * np.abs(target).max(), (kind, devices, proj_devices)
        if kind != "factorized":
            norms = np.sum(exact**2, axis=-1)
            np.testing.assert_allclose(features.squared_norms, norms, rtol=2e-5)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("proj", [2, 4])
def test_devices_make_the_very_columns_that_one_makes(kind, proj, monkeypatch):
    """Unit vectors, gathered from all devices: R to the bit, in several tiles."""
    monkeypatch.setattr("dtrak_jax.features.projection.TILE_ENTRIES", 7 * K)
    mesh = parallel.mesh(jax.devices(), proj=proj)
    projection = dtrak.Projection(kind, K, seed=3)
    sharded = parallel.sharded(
        lambda g: project_all(projection, {"R": [g]}, "proj")["R"],
        mesh,
        (gradients.EXAMPLES,),
        parallel.P("data", "proj"),
    )
    identity = np.eye(72, dtype=np.float32)
    whole = project_all(projection, {"R": [identity]})["R"]
    np.testing.assert_array_equal(sharded(identity), whole)


def collectives(compiled):
    """The operations of a compiled program that send anything, with their lines."""
    found = r"= \S+ ((?:all|collective|reduce-scatter|send|recv)[\w-]*)\("
    lines = compiled.as_text().splitlines()
    return [(m[1], line) for line in lines if (m := re.search(found, line))]


def test_gradients_are_sent_to_no_other_device(network, images):
    mesh = parallel.mesh(jax.devices(), proj=2)
    task = task_of(network, True)
    programs = step_programs(
        task, network[1], images, dtrak.Projection(), mesh, batch_size=2
    )
    function, arguments, _ = programs.gradients
    assert not collectives(function.lower(*arguments).compile())


@pytest.mark.parametrize("kind", KINDS)
def test_only_dense_projections_exchange_and_only_a_tile_at_a_time(kind):
    """One gather a tile, within a group of `proj`; nothing grows with the examples."""
    per_device, p, k = 3, 40_000, 1024
    given = {"square": [jax.ShapeDtypeStruct((8 * per_device, p), np.float32)]}
    for proj in (1, 4):
        mesh = parallel.mesh(jax.devices(), proj=proj)
        function = gradients.projection_function(dtrak.Projection(kind, k), mesh)
        found = collectives(function.lower(given).compile())
        if kind in DENSE and proj > 1:
            ((name, line),) = found
            assert name == "all-gather"
            groups = ["{0,1,2,3},{4,5,6,7}", "[2,4]<=[8]", "'proj'=4] {'proj'}"]
            assert any(said in line for said in groups)
            rows = 2**22 // (k // proj)
            assert f"f32[{proj * per_device},{rows}]" in line
        else:
            assert not found


def test_wrong_numbers_of_devices(network, images, monkeypatch):
    use(monkeypatch, 8)
    with pytest.raises(ValueError, match="proj_devices is 3; it must divide 8"):
        compute(network, images, "sketch", True, 3)
    with pytest.raises(ValueError, match="proj_devices is 0"):
        compute(network, images, "sketch", True, 0)
    with pytest.raises(ValueError, match="a multiple of 256; it is 128"):
        compute(network, images, "rademacher", True, 8)
    with pytest.raises(ValueError, match="a multiple of 4; it is 126"):
        FeaturesConfig(projection="gaussian", dim=126, proj_devices=4)
    assert FeaturesConfig(dim=126, proj_devices=4).dim == 126
