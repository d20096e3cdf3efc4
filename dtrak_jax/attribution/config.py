"""The settings of attribution."""

from dataclasses import dataclass
from typing import Literal

from dtrak_jax.attribution.coverage import COVERAGE_SHARE
from dtrak_jax.attribution.damping import GAUSS_NEWTON_DAMPING, Damping, effective
from dtrak_jax.attribution.ekfac import EKFAC_DAMPING
from dtrak_jax.checks import at_least, between, check_choices, distinct, free, positive
from dtrak_jax.methods import METHODS, Method, MethodName


@dataclass(frozen=True, kw_only=True)
class AttributionConfig:
    """From features to scores."""

    methods: tuple[MethodName, ...] = free(("dtrak", "trak"))
    """The methods of attribution; `dtrak-jax methods` lists them."""
    damping: float = free(0.1)
    """The damping lambda, in units of the kernel's mean eigenvalue unless `absolute` or
    `share`; `ekfac`, `gauss-newton`, `das`, `gauss-newton-cg` and `coverage` have one of
    their own."""
    absolute: bool = free(False)
    """Take `damping` as lambda itself."""
    share: bool = free(False)
    """Take `damping` as the share of min(n, k) that a kernel's effective dimension is, such
    as .05: each kernel has its own lambda from that, without labels (dtrak.effective)."""
    solver: Literal["eigh", "cg"] = free("eigh")
    """eigh decomposes every kernel on the host; cg, for kernels too large for that,
    iterates for every query, and leaves lds without curves over the damping."""
    cotangents: int = free(1)
    """Random cotangents of each image, timestep and draw that make the curvature of
    `ekfac` and `gauss-newton-cg`; 0 takes one for each entry of the output, which leaves
    nothing to chance."""
    ekfac_damping: float = free(EKFAC_DAMPING)
    """The damping of `ekfac` and `gauss-newton-cg`, in units of each layer's mean
    eigenvalue."""
    ggn_iterations: int = free(20)
    """The iterations of `gauss-newton-cg` for each query, at most; with 0 it is `ekfac`."""
    ggn_tolerance: float = free(0.01)
    """A query of `gauss-newton-cg` is done once its residual is this part of its gradient;
    with 0 all iterations are made."""
    ggn_images: int = free(0)
    """The noised images of the Gauss-Newton matrix of `gauss-newton-cg`, spread over training
    images, and in turn over timesteps and draws; 0 takes all."""
    gauss_newton_cotangents: int = free(16)
    """The cotangents that make the Gauss-Newton matrices of `gauss-newton` and `das`; 0 as
    above."""
    gauss_newton_damping: float = free(GAUSS_NEWTON_DAMPING)
    """The damping of `gauss-newton` and `das`, in units of the matrix's mean eigenvalue."""
    das_probes: int = free(8)
    """The random cotangents of each query, timestep and draw that `das` takes."""
    coverage_share: float = free(COVERAGE_SHARE)
    """The damping of `coverage`: the share of min(n, k) that a kernel's effective dimension
    is (dtrak.effective). 0 takes that of the other methods, `damping`."""

    def __post_init__(self):
        if not self.methods:
            raise ValueError("attribution.methods is empty; name one or more.")
        check_choices("attribution", self)
        distinct("attribution.methods", self.methods)
        if not any(METHODS[name].signed for name in self.methods):
            raise ValueError(
                f"attribution.methods is {self.methods}, which have no sign; a report "
                "needs one that has, such as 'dtrak'."
            )
        positive("attribution.damping", self.damping)
        if self.share and (self.absolute or self.damping >= 1 or self.solver == "cg"):
            raise ValueError(
                f"attribution.share is on; it needs a damping below 1 (it is "
                f"{self.damping:g}), attribution.absolute off and solver 'eigh'."
            )
        positive("attribution.ekfac_damping", self.ekfac_damping)
        between("attribution.coverage_share", self.coverage_share, 0, 0.99)
        positive("attribution.gauss_newton_damping", self.gauss_newton_damping)
        between("attribution.ggn_tolerance", self.ggn_tolerance, 0, 1)
        at_least("attribution.das_probes", self.das_probes, 1)
        counts = "cotangents", "gauss_newton_cotangents", "ggn_iterations", "ggn_images"
        for name in counts:
            at_least(f"attribution.{name}", getattr(self, name), 0)

    def damping_of(self, method: Method) -> Damping:
        """Returns the lambda of a method by these settings, if it has one."""
        if method.curved:
            return Damping(self.ekfac_damping)
        if method.of_output:
            return Damping(self.gauss_newton_damping)
        if method.objective == "coverage" and self.coverage_share:
            return effective(self.coverage_share)
        return Damping(self.damping, self.absolute, self.share)
