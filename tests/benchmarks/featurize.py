"""Features, examples/s: `featurize` against the D-TRAK reference's way in PyTorch.

The reference: for each batch of 52 images and each timestep vmap(grad), then a dense
Gaussian projection on the CPU by traker or dattri. Here: the default sketch. Both sides
compute the same gradients, of the same noised images; ours also draw the noise.
"""

import jax
import numpy as np

import dtrak_jax as dtrak
from dtrak_jax import models
from dtrak_jax.models.functions import parameter_shapes
from dtrak_jax.models.tensors import to_params
from tests.benchmarks import peers
from tests.benchmarks.rows import Row, in_turn
from tests.benchmarks.stage import BATCH
from tests.benchmarks.workload import Workload, digits, noised, task


def measure(small: bool, repetitions: int) -> list[Row]:
    """T = 10, k = 2,048 and 32,768; averaged over timesteps as in the reference, and
    at k = 2,048 also kept apart as by default.

    At the larger k once, as it takes minutes; kept apart it would be ten times as many.
    """
    work = digits(small, 4 if small else peers.BATCH)
    timesteps, dims = (2, (128, 256)) if small else (10, (2048, 32768))
    p = models.parameter_count(work.params)
    gradient = peers.gradients(peers.unet(work))
    rows = []
    for apart in (False, True):
        one = task(work, timesteps=timesteps, per_timestep=apart)
        x_t, t = noised(work, one)
        x_t = np.ascontiguousarray(x_t.transpose(0, 1, 4, 2, 3))
        agreement = {"gradients": gradient_error(work, gradient, one, x_t, t)}
        for k in dims:
            large = k > dims[0]
            if large and apart:
                continue
            projection = dtrak.Projection("sketch", k)

            def ours(one=one, projection=projection):
                features = dtrak.featurize(
                    one, work.params, work.images, projection, batch_size=BATCH
                )
                return np.asarray(features)

            for package, project in peers.projections("normal", p, k).items():

                def theirs(project=project, x_t=x_t, t=t, apart=apart):
                    return peers.features(gradient, project, x_t, t, apart)

                assert ours().shape == theirs().shape
                kept = "kept apart" if apart else "averaged"
                rows.append(
                    Row(
                        name=f"featurize {kept}, k={k}, {package}",
                        ours="featurize, in memory, sketch",
                        theirs=f"vmap(grad) per timestep, then {package}'s projection",
                        goal=("at least", 10),
                        settings=work.settings(
                            timesteps=timesteps, dim=k, batch=peers.BATCH
                        ),
                        agreement=agreement,
                        items=len(work.images),
                        unit="images/s",
                        **in_turn(ours, theirs, 1 if large else repetitions),
                    )
                )
    return rows


def gradient_error(work: Workload, gradient, one, x_t, t) -> float:
    """|g - g'| / |g| of both sides' gradients before projection, the largest."""
    count = 2
    exact = dtrak.featurize(
        one, work.params, work.images[:count], dtrak.Projection("none")
    )
    shapes = parameter_shapes(models.build(work.config.model))
    theirs = []
    for x, s in zip(x_t[:, :count], t, strict=True):
        found = gradient(peers.torch.from_numpy(x), s)
        trees = [
            to_params(shapes, {n: g[i].numpy() for n, g in found.items()}, "torch")
            for i in range(count)
        ]
        leaves = [jax.tree.leaves(tree) for tree in trees]
        theirs.append([np.concatenate([a.ravel() for a in own]) for own in leaves])
    theirs = np.array(theirs)
    if not one.per_timestep:
        theirs = theirs.mean(axis=0)
    norms = np.linalg.norm(theirs, axis=-1)
    error = float((np.linalg.norm(np.asarray(exact) - theirs, axis=-1) / norms).max())
    assert error < 1e-3, f"the two sides' gradients differ by {error:.1e}"
    return error
