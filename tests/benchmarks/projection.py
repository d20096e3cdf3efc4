"""Projections alone: the sketch against the gradient that it projects, and ours against
traker's and dattri's on the CPU.

The gradient is that of one compiled step of `featurize`, all of whose images are kept
apart; the peers project the very gradients that it makes.
"""

import functools

import jax
import numpy as np

import dtrak_jax as dtrak
from dtrak_jax import parallel
from dtrak_jax.features import gradients
from dtrak_jax.features.microbatches import Microbatch
from dtrak_jax.features.projection import project_all
from dtrak_jax.rng import id_words
from tests.benchmarks import missing_peers
from tests.benchmarks.rows import Row, in_turn
from tests.benchmarks.workload import Workload, digits, task

KINDS = {"sketch": "rademacher", "rademacher": "rademacher", "gaussian": "normal"}
"""Our projections, with the peers' that each is compared with."""

GOALS = {"rademacher": ("at least", 3)}


def measure(small: bool, repetitions: int) -> list[Row]:
    """64 gradients; k = 2,048, and for the sketch against the gradient also 32,768."""
    work = digits(small, 8 if small else 64)
    dims = (128, 256) if small else (2048, 32768)
    gradient = gradient_step(work)
    given = jax.block_until_ready(gradient())
    count = len(given[0])
    settings = work.settings(gradients=count)
    rows = []
    for k in dims:
        rows.append(
            Row(
                name=f"sketch against gradient, k={k}",
                ours="the sketch alone",
                theirs="the gradients that it projects",
                goal=("at most", 0.05),
                settings=settings | {"dim": k},
                agreement={"distortion": distortion(given, ours("sketch", k, given)())},
                items=count,
                unit="gradients/s",
                **in_turn(ours("sketch", k, given), gradient, repetitions),
            )
        )
    return rows + against_peers(given, dims[0], settings, repetitions)


def against_peers(given: list, k: int, settings: dict, repetitions: int) -> list[Row]:
    """Each of our projections with both peers' of its kind, at equal p and k."""
    if missing_peers():
        print(
            f"  the rows with {' and '.join(missing_peers())} are left out; "
            'pip install ".[benchmark]" installs them.'
        )
        return []
    from tests.benchmarks import peers

    rows = []
    tensor = peers.torch.from_numpy(np.concatenate(given, axis=1))
    for kind, their_kind in KINDS.items():
        found = peers.projections(their_kind, tensor.shape[1], k)
        for package, function in found.items():

            def theirs(function=function):
                return function(tensor)

            rows.append(
                Row(
                    name=f"{kind}, k={k}, {package} {their_kind}",
                    ours=f"the {kind} projection alone",
                    theirs=f"{package}'s BasicProjector, {their_kind}",
                    goal=GOALS.get(kind),
                    settings=settings | {"dim": k},
                    agreement={
                        "distortion": distortion(given, ours(kind, k, given)()),
                        "their_distortion": distortion(given, theirs().numpy()),
                    },
                    items=len(tensor),
                    unit="gradients/s",
                    **in_turn(ours(kind, k, given), theirs, repetitions),
                )
            )
    return rows


def ours(kind: str, k: int, given: list[jax.Array]):
    """A function that projects the parts [n, p_i] of gradients to [n, k]."""
    project = jax.jit(functools.partial(project_all, dtrak.Projection(kind, k)))
    return lambda: project({"square": given})["square"]


def gradient_step(work: Workload):
    """A function that returns the parts of the images' own gradients at t = 300."""
    one = task(work, timesteps=(300,))
    n = len(work.images)
    mesh = parallel.mesh(jax.local_devices()[:1])
    step = gradients.gradient_function(one, mesh)
    microbatch = Microbatch(
        x=work.images[:, None],
        words=id_words(map(str, range(n))),
        position=np.arange(n, dtype=np.int32),
        pair=np.zeros((n, 1), np.int32),
        weight=np.ones((n, 1), np.float32),
        cond=None,
    )
    return lambda: step(work.params, None, {}, microbatch)[0]["square"]


def distortion(given: list[jax.Array], projected: np.ndarray) -> float:
    """Root mean square error of the normalised inner products; 1/sqrt(k) is promised
    where gradients are unrelated."""
    g = np.concatenate(given, axis=1).astype(np.float64)
    phi = np.asarray(projected, np.float64)
    norms = np.linalg.norm(g, axis=1)
    error = (phi @ phi.T - g @ g.T) / np.outer(norms, norms)
    found = float(np.sqrt(np.mean(error[np.triu_indices(len(g), 1)] ** 2)))
    assert found < 3 / projected.shape[1] ** 0.5, f"inner products are off by {found}"
    return found
