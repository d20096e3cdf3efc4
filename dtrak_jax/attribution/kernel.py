"""The kernels of a training set, each decomposed once for all methods and every lambda.

The eigendecomposition is SciPy's, the one step of the solver that JAX does not compile.
`jnp.linalg.eigh` calls the same routine of LAPACK, syevd (in float64 on one core it takes
.96 and 1.16 of SciPy's time for 1,000 and 2,000 rows, medians of alternating runs), but in
the memory of five matrices where SciPy needs three; and from 32,767 rows on, where the
size of syevd's workspace overflows 32-bit integers, JAX has no other driver.
"""

import dataclasses
import functools
import io
import json
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.optimize
from etils import epath

from dtrak_jax import files, host, parallel
from dtrak_jax.attribution.damping import Damping
from dtrak_jax.attribution.inputs import Array, as_features, by_pair
from dtrak_jax.attribution.linalg import gram_matrix
from dtrak_jax.checks import instance, one_of
from dtrak_jax.digests import digest
from dtrak_jax.features.output_curvature import GaussNewton
from dtrak_jax.features.store import Features
from dtrak_jax.progress import progress

MATRICES = {"evd": 4, "evr": 3}
"""The m x m float64 matrices in memory while a driver works, with one to spare."""

KEPT_IN_MEMORY, KEPT_ON_DISK = 2**30, 10 * 2**30
"""The bytes of eigenvectors, of all pairs together, that `Kernels` keeps in memory, and up
to which it keeps them on disk: the 8.6 GB of the paper's CIFAR-10, and not much more."""


class Kernel(NamedTuple):
    """The kernel Phi Phi^T (dual, n <= k) or Phi^T Phi (primal), [m, m], m = min(n, k)."""

    dual: bool
    mean_eigenvalue: float  # trace(Phi Phi^T) / m
    eigenvalues: np.ndarray | None = None  # float64 [m], ascending; None without them
    eigenvectors: np.ndarray | None = None  # float64 [m, m], one in each row, or None

    def lambda_of(self, damping: Damping, strict: bool = True) -> float:
        """Returns lambda of what `Damping.of` returned.

        If rounding errors would decide the scores, it is a ValueError, or else NaN.
        """
        if damping.share:
            return self._lambda_of_share(damping.value, strict)
        unit = 1 if damping.absolute else self.mean_eigenvalue
        value = damping.value * unit
        # A kernel that was not decomposed shows it when scores are made.
        if self.eigenvalues is None:
            return value
        floor = np.finfo(np.float32).eps * self.eigenvalues[-1]
        if value >= floor or self.eigenvalues[0] >= floor:
            return value
        if not strict:
            return math.nan
        raise ValueError(
            f"damping is {damping.value}, lambda = {value:.3g}; the kernel has "
            f"eigenvalues below {floor:.3g}, which are rounding errors of float32 "
            "features, and lambda must be at least that: damping >= "
            f"{floor / unit:.3g}."
        )

    def _lambda_of_share(self, share: float, strict: bool) -> float:
        """Returns the lambda of `effective`; see `lambda_of`."""
        if self.eigenvalues is None:
            raise ValueError(
                f"damping is by a share of min(n, k), {share:g}, which needs kernels "
                "decomposed: solver must be 'eigh', or damping a number of mean "
                "eigenvalues, or absolute(lambda)."
            )
        values, goal = self.eigenvalues, share * len(self.eigenvalues)
        floor = np.finfo(np.float32).eps * values[-1]

        def excess(log_lambda: float) -> float:
            return np.sum(values / (values + np.exp(log_lambda))) - goal

        if excess(np.log(floor)) <= 0:
            if not strict:
                return math.nan
            most = np.sum(values / (values + floor)) / len(values)
            raise ValueError(
                f"the share is {share}; above rounding errors of float32 features this "
                f"kernel's effective dimension is at most {most:.2g} of min(n, k). Take a "
                "smaller share, or damping as a number of mean eigenvalues."
            )
        # At the largest eigenvalue over the share, every term is below the share.
        ends = np.log(floor), np.log(values[-1] / share)
        return float(np.exp(scipy.optimize.brentq(excess, *ends)))


def factorize(phi: np.ndarray) -> Kernel:
    """Decomposes the kernel of features phi [n, k], unless it is too large or all 0."""
    m, dual = min(phi.shape), len(phi) <= phi.shape[1]
    check_memory(m)
    return decompose(gram_matrix(phi if dual else phi.T), dual)


def decompose(matrix: np.ndarray, dual: bool) -> Kernel:
    """Decomposes a kernel [m, m], unless it is too large or all 0."""
    check_memory(len(matrix))
    eigenvalues, columns = scipy.linalg.eigh(
        matrix.astype(np.float64, order="F"),
        overwrite_a=True,
        driver=driver_for(len(matrix)),
    )
    if not eigenvalues[-1] > 0:
        raise ValueError(
            "all features of the training set are 0; nothing to attribute."
        )
    # What is below 0 is a rounding error of the Gram matrix.
    eigenvalues = np.maximum(eigenvalues, 0)
    return Kernel(dual, float(eigenvalues.mean()), eigenvalues, columns.T)


def driver_for(m: int) -> str:
    """Returns LAPACK's driver: "evd" if a query knows its workspace's size, else "evr".

    The size, 1 + 6 m + 2 m^2, overflows LAPACK's 32-bit integers from m = 32,767 on.
    """
    workspace, *_ = scipy.linalg.lapack.dsyevd_lwork(m, lower=1)
    return "evd" if workspace >= 1 + 6 * m + 2 * m**2 else "evr"


def eigh_bytes(m: int) -> int:
    """Returns the bytes of the host that an m x m eigendecomposition needs."""
    return 8 * MATRICES[driver_for(m)] * m**2


def check_memory(m: int) -> None:
    """Raises a MemoryError if an m x m eigendecomposition does not fit this host."""
    size, memory = eigh_bytes(m), host.memory()
    if size <= memory:
        return
    sizes = {name: int((memory / 8 / c) ** 0.5) for name, c in MATRICES.items()}
    largest = max(rows for name, rows in sizes.items() if driver_for(rows) == name)
    raise MemoryError(
        f"an eigendecomposition of {m} x {m} needs about {size / 2**30:.0f} GiB, this "
        f"host has {memory / 2**30:.0f}. min(n, k) must be at most {largest}: take a "
        "smaller projection dim, or solver 'cg', which decomposes nothing."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Kernels:
    """The features of a training set with the kernel of each pair, decomposed once.

    Functions that take features of a training set also take this, and share what is
    decomposed: in memory up to `KEPT_IN_MEMORY`, and on disk up to `KEPT_ON_DISK`.
    Beyond that every function decomposes anew. Solver "cg" decomposes nothing. With
    several processes all must ask for the same.
    """

    train: Array  # [T, n, k] or [n, k]
    store: epath.PathLike | None = None
    """The folder of PAIR.npz, made anew if they are of other features; None keeps none."""
    solver: str = "eigh"
    curvature: GaussNewton | None = None
    """Matrices in place of these features' own Phi^T Phi."""
    seen: dict[int, Kernel] = dataclasses.field(default_factory=dict, repr=False)
    """{pair: kernel} of all that were asked for, some without their eigenvectors."""

    def __post_init__(self):
        object.__setattr__(self, "train", as_features(self.train))
        one_of("solver", self.solver, ("eigh", "cg"))
        if self.curvature is not None:
            instance("curvature", self.curvature, GaussNewton)
            self.require_decomposed("a Gauss-Newton matrix")
            self.curvature.check(self.train)

    @classmethod
    def of(
        cls,
        train: "Array | Kernels",
        solver: str = "eigh",
        curvature: GaussNewton | None = None,
    ) -> "Kernels":
        """Returns the kernels of features; those that are given if they are kernels."""
        if not isinstance(train, Kernels):
            return cls(train, solver=solver, curvature=curvature)
        if curvature is not None and curvature is not train.curvature:
            raise ValueError(
                "train is Kernels and has its curvature, or none; give the curvature to "
                "these, or features as train."
            )
        return train

    def __repr__(self) -> str:
        train = self.train
        if not isinstance(train, Features):
            train = f"array of {' × '.join(map(str, train.shape))}"
        curved = ", Gauss-Newton" if self.curvature else ""
        return f"Kernels({train}{curved}, {self.solver})"

    def __iter__(self) -> Iterator[tuple[np.ndarray, Kernel]]:
        """Yields each pair's features [n, k] and their kernel."""
        pairs, total = by_pair(self.train), math.prod(self.train.shape[:-2])
        for pair, phi in enumerate(
            progress(pairs, "kernels", total, "kernel", delay=2)
        ):
            yield phi, self._kernel(pair, phi)

    @functools.cached_property
    def pooled(self) -> tuple[np.ndarray, Kernel]:
        """The features of all pairs, one pair after the other [T n, k]; their kernel."""
        phi = np.concatenate(list(by_pair(self.train)))
        if self.curvature:
            pairs = range(math.prod(self.train.shape[:-2]))
            return phi, decompose(sum(map(self.curvature.matrix, pairs)), dual=False)
        return phi, factorize(phi)

    def of_pooled(self, damping: float | Damping, strict: bool = True) -> Damping:
        """Returns the damping of the pooled kernel: of a share, the geometric mean of the
        pairs' lambdas, which may be NaN unless `strict`."""
        damping = Damping.of(damping)
        if not damping.share:
            return damping
        lambdas = [kernel.lambda_of(damping, strict) for _, kernel in self]
        return Damping(float(np.exp(np.mean(np.log(lambdas)))), absolute=True)

    def require_decomposed(self, what: str) -> None:
        """Raises a ValueError if the solver does not decompose kernels."""
        if self.solver != "eigh":
            raise ValueError(
                f"solver is {self.solver!r}; {what} needs kernels decomposed, and it "
                "must be 'eigh'."
            )

    def require_own(self, what: str) -> None:
        """Raises a ValueError if the kernels are not those of the features themselves."""
        if self.curvature is not None:
            raise ValueError(
                f"{what} takes kernels of the training features themselves; these have a "
                "Gauss-Newton matrix in their place."
            )

    def _kernel(self, pair: int, phi: np.ndarray) -> Kernel:
        kernel = self.seen.get(pair)
        if kernel and (self.solver == "cg" or kernel.eigenvectors is not None):
            return kernel
        if not phi.any():
            raise ValueError(
                f"all features of the training set are 0{self._describe(pair)}; nothing "
                "to attribute. Does the measurement depend on the network there?"
            )
        if self.solver == "cg":
            trace = np.einsum("nk,nk->", phi, phi, dtype=np.float64)
            kernel = Kernel(len(phi) <= phi.shape[1], float(trace) / min(phi.shape))
        else:
            kernel = self._stored(pair, phi)
        fits = (pair + 1) * 8 * self._side**2 <= KEPT_IN_MEMORY
        self.seen[pair] = kernel if fits else kernel._replace(eigenvectors=None)
        return kernel

    @property
    def _side(self) -> int:
        """The number of a kernel's eigenvalues."""
        *_, n, k = self.train.shape
        return k if self.curvature else min(n, k)

    def _made(self, pair: int, phi: np.ndarray) -> Kernel:
        """Returns a decomposed kernel, made anew."""
        if self.curvature:
            return decompose(self.curvature.matrix(pair), dual=False)
        return factorize(phi)

    def _describe(self, pair: int) -> str:
        """Returns which pair this is, in words; "" if it is the only one."""
        if len(self.train.shape) == 2:
            return ""
        if not isinstance(self.train, Features):
            return f" in pair {pair}"
        timesteps, draws = map(self.train.fingerprint.get, ("timesteps", "draws"))
        return f" at timestep {timesteps[pair // draws]}, draw {pair % draws}"

    def _stored(self, pair: int, phi: np.ndarray) -> Kernel:
        """Returns a decomposed kernel, read from the disk if it is there."""
        too_large = 8 * math.prod(self.train.shape[:-2]) * self._side**2 > KEPT_ON_DISK
        # Arrays have no fingerprint, by which to know them again.
        if self.store is None or too_large or not isinstance(self.train, Features):
            return self._made(pair, phi)
        path = files.at(self.store) / f"{pair}.npz"
        saved = files.read_npz(path) if path.exists() else {}
        made_from = digest(json.dumps(self.train.fingerprint, sort_keys=True))
        if self.curvature:
            made_from = self.curvature.digest
        if parallel.agreed(str(saved.get("features")) == made_from):
            values, vectors = saved["eigenvalues"], saved["eigenvectors"]
            return Kernel(bool(saved["dual"]), float(values.mean()), values, vectors)
        kernel = self._made(pair, phi)
        if parallel.is_main_process():
            # Not compressed, as eigenvectors do not become smaller.
            archive = io.BytesIO()
            np.savez(archive, **kernel._asdict(), features=made_from)
            files.write_bytes(path, archive.getvalue())
        return kernel
