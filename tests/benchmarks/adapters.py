"""Features of a small Stable Diffusion's adapters, against the reference's way in PyTorch.

As `featurize` compares those of a whole network: vmap(grad) for each batch of 52 and each
timestep, of the adapters alone, averaged, then a dense Gaussian projection. Both sides
load one base and one file of adapters, and see the same noised latents and texts.
"""

import numpy as np

import dtrak_jax as dtrak
from dtrak_jax import models
from tests.benchmarks import peers
from tests.benchmarks.rows import Row, in_turn
from tests.benchmarks.stage import BATCH
from tests.benchmarks.workload import Adapted, adapted, noised, task

RAW = dtrak.Projection("none")


def measure(small: bool, repetitions: int) -> list[Row]:
    """T = 10, averaged: the gradients alone, and with projections to k = 2,048."""
    work = adapted(small, 4 if small else peers.BATCH)
    timesteps, k = (2, 128) if small else (10, 2048)
    one = task(work, timesteps=timesteps, per_timestep=False)
    x_t, t = noised(work, one)
    x_t = np.ascontiguousarray(x_t.transpose(0, 1, 4, 2, 3))
    gradient = peers.gradients(peers.adapted(work))

    def ours(projection):
        return np.asarray(
            dtrak.featurize(
                one,
                work.params,
                work.images,
                projection,
                frozen=work.frozen,
                cond=work.cond,
                bounds=None,
                batch_size=BATCH,
            )
        )

    def theirs(project):
        return peers.features(gradient, project, x_t, t, False, work.cond)

    error = gradient_error(work, gradient, ours(RAW), x_t, t)
    p = models.parameter_count(work.params)
    cases = [("gradients alone", "", RAW, lambda g: g)] + [
        (f"k={k}, {package}", f", then {package}'s projection", sketch, project)
        for sketch in [dtrak.Projection("sketch", k)]
        for package, project in peers.projections("normal", p, k).items()
    ]
    return [
        Row(
            name=f"adapters averaged, {name}",
            ours=f"featurize, in memory, projection {projection.kind}",
            theirs=f"vmap(grad) of the adapters per timestep{after}",
            goal=None,
            settings=work.settings(
                timesteps=timesteps,
                batch=peers.BATCH,
                **({} if projection is RAW else {"dim": k}),
            ),
            agreement={"gradients": error},
            items=len(work.images),
            unit="images/s",
            **in_turn(
                lambda projection=projection: ours(projection),
                lambda project=project: theirs(project),
                repetitions,
            ),
        )
        for name, after, projection, project in cases
    ]


def gradient_error(work: Adapted, gradient, ours, x_t, t) -> float:
    """|g - g'| / |g| of both sides' gradients before projection, the largest."""
    count = 4
    x, cond = (peers.torch.from_numpy(a) for a in (x_t[:, :count], work.cond[:count]))
    found = [gradient(part, s, cond) for part, s in zip(x, t, strict=True)]
    means = {
        tuple(name.split(".lora_")): sum(one[name] for one in found) / len(t)
        for name in found[0]
    }
    # {("PATH", "A.default_0.weight"): [count, r, in]}, and "B": [count, out, r].
    parts = [mean.mT.reshape(count, -1).numpy() for _, mean in sorted(means.items())]
    theirs = np.concatenate(parts, axis=1)
    norms = np.linalg.norm(theirs, axis=1)
    error = float((np.linalg.norm(ours[:count] - theirs, axis=1) / norms).max())
    assert error < 1e-4, f"the two sides' gradients differ by {error:.1e}"
    return error
