"""Features do not depend on the mesh, and devices exchange no more than they must."""

import re

import conftest
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compiler
from test_features import one_by_one

import dtrak_jax as dtrak
from dtrak_jax import models, parallel, training
from dtrak_jax.config import EnsembleConfig, FeaturesConfig, TrainConfig
from dtrak_jax.evaluation import outputs
from dtrak_jax.features import gradients, project

K = 128
KINDS = ("sketch", "rademacher", "gaussian", "factorized", "none")
DENSE = ("rademacher", "gaussian")
MESHES = [(1, 1), (2, 1), (8, 1), (8, 2), (8, 4)]
"""Devices, and how many of them share columns: 1, 2, 8, 4x2 and 2x4."""


class Net(nn.Module):
    """Convolutions, which automatic sharding gets wrong."""

    @nn.compact
    def __call__(self, x, t):
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


@pytest.mark.parametrize(
    ("per_timestep", "meshes"), [(True, MESHES), (False, [(1, 1), (8, 2), (8, 4)])]
)
def test_features_equal_a_loop_of_grad_on_every_mesh(
    network, images, monkeypatch, per_timestep, meshes
):
    """With an explicit product by R, to 1e-5 of the largest feature.

    But "factorized", which has no R to be had from unit vectors, with one device's.
    """
    task = task_of(network, per_timestep)
    exact = one_by_one(task, network[1], images[:5], ids=tuple("01234"))
    if not per_timestep:
        exact = {name: gradient.mean(axis=0) for name, gradient in exact.items()}
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(network[1])])
    parts = np.split(np.eye(ends[-1], dtype=np.float32), ends[:-1], axis=1)
    expected = {"none": exact}
    for kind in ("sketch", *DENSE):
        matrix = np.asarray(project(dtrak.Projection(kind, K), parts))
        expected[kind] = {name: gradient @ matrix for name, gradient in exact.items()}
    for devices, proj_devices in meshes:
        use(monkeypatch, devices)
        for kind in KINDS:
            features = compute(network, images, kind, per_timestep, proj_devices)
            ours = {name: np.asarray(one) for name, one in features.items()}
            for name, theirs in expected.setdefault(kind, ours).items():
                assert ours[name].shape == theirs.shape
                off = np.abs(ours[name] - theirs).max()
                assert off < 1e-5 * np.abs(theirs).max(), (kind, devices, proj_devices)
            if kind != "factorized":
                norms = np.sum(exact["square"] ** 2, axis=-1)
                np.testing.assert_allclose(
                    features["square"].squared_norms, norms, rtol=2e-5
                )


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("proj", [2, 4])
def test_devices_make_the_very_columns_that_one_makes(kind, proj, monkeypatch):
    """Unit vectors, gathered from all devices: R to the bit, in several tiles."""
    monkeypatch.setattr("dtrak_jax.features.projection.TILE_ENTRIES", 7 * K)
    mesh = parallel.mesh(jax.devices(), proj=proj)
    projection = dtrak.Projection(kind, K, seed=3)
    sharded = parallel.over_mesh(
        lambda g: project(projection, g, "proj"),
        mesh,
        (gradients.EXAMPLES,),
        parallel.P("data", "proj"),
    )
    identity = np.eye(72, dtype=np.float32)
    np.testing.assert_array_equal(sharded(identity), project(projection, identity))


@pytest.fixture
def one_by_one_only(monkeypatch):
    """As on a slice whose compiler has programs for one device or for all of them.

    Four devices of eight, in an order of their own: nothing was compiled for them yet.
    """
    devices = jax.devices()[5:1:-1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(parallel, "_compiles", lambda mesh: mesh.size in (1, 8))
    compile_any = compiler.compile_or_get_cached

    def compile_some(backend, module, devices, *arguments, **options):
        assert devices.size in (1, 8), "no such program on that slice"
        return compile_any(backend, module, devices, *arguments, **options)

    monkeypatch.setattr(compiler, "compile_or_get_cached", compile_some)


@pytest.mark.parametrize("per_timestep", [True, False])
@pytest.mark.parametrize("kind", ["sketch", "gaussian"])
def test_devices_that_have_no_program_together(
    network, images, one_by_one_only, monkeypatch, kind, per_timestep
):
    """Each runs its own: features are the same, also where parts are added up."""
    ours = compute(network, images, kind, per_timestep)["square"]
    use(monkeypatch, 1)
    theirs = compute(network, images, kind, per_timestep)["square"]
    np.testing.assert_allclose(
        ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max()
    )
    np.testing.assert_allclose(ours.squared_norms, theirs.squared_norms, rtol=1e-5)


def test_stages_whose_devices_have_no_program_together(
    images, one_by_one_only, monkeypatch, tmp_path
):
    """Samples, trained members, and what is measured of them."""
    schedule = dtrak.linear_schedule()
    settings = EnsembleConfig(timesteps=3, draws=1, batch_size=5)
    members = [training.Member(str(i), np.arange(12), seed=i) for i in range(3)]

    def stages(folder):
        config = TrainConfig(steps=4, batch_size=4)
        training.train_members(
            *(conftest.init, conftest.train_apply, schedule, images, members),
            *(config, folder),
        )
        params = training.load_members(conftest.init, list("012"), config, folder)
        ids = np.array(list("abcdefghijkl"))
        measured = outputs.measure(
            conftest.apply, schedule, params, images, ids, settings
        )
        one = jax.tree.map(lambda leaf: leaf[0], params)
        seeds = np.arange(7)
        samples = dtrak.diffusion.sample(
            conftest.apply, one, schedule, seeds, (8, 8, 1), steps=3, eta=0.5
        )
        return params, measured, samples

    ours = stages(tmp_path / "ours")
    monkeypatch.undo()
    theirs = stages(tmp_path / "theirs")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        ours,
        theirs,
    )


def test_a_sum_over_devices_that_have_no_program_together_is_refused(one_by_one_only):
    mesh = parallel.mesh(jax.local_devices())
    function = parallel.over_mesh(
        lambda x: jax.lax.psum(x, "data"), mesh, parallel.P("data"), parallel.P()
    )
    with pytest.raises(NameError, match="unbound axis name: data"):
        function(np.ones(4, np.float32))
    with pytest.raises(ValueError, match="proj_devices is 2; it must be 1"):
        gradients.projection_function(
            dtrak.Projection("gaussian", K), parallel.mesh(jax.local_devices(), proj=2)
        )


def collectives(compiled):
    """The operations of a compiled program that send anything, with their lines."""
    found = r"= \S+ ((?:all|collective|reduce-scatter|send|recv)[\w-]*)\("
    lines = compiled.as_text().splitlines()
    return [(m[1], line) for line in lines if (m := re.search(found, line))]


def test_gradients_are_sent_to_no_other_device(network, images):
    mesh = parallel.mesh(jax.devices(), proj=2)
    task = task_of(network, True)
    slots = gradients.Slots(
        x=jax.ShapeDtypeStruct((16, 1, 8, 8, 1), np.float32),
        words=jax.ShapeDtypeStruct((16, 2), np.uint32),
        position=jax.ShapeDtypeStruct((16,), np.int32),
        pair=jax.ShapeDtypeStruct((16, 1), np.int32),
        weight=jax.ShapeDtypeStruct((16, 1), np.float32),
        cond=None,
    )
    function = gradients.gradient_function(task, mesh)
    assert not collectives(function.lower(network[1], {}, slots).compile())


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
