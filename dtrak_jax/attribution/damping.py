"""The damping lambda of a kernel, in one of the units in which it may be given."""

from typing import NamedTuple

import numpy as np

from dtrak_jax.checks import positive

GRID = tuple(10.0**e for e in np.arange(-4, 1.01, 0.25))
"""Values of lambda worth trying, in units of the mean eigenvalue."""

DEFAULT_DAMPING = 0.1
"""lambda in these units. It was chosen without labels of any kind: on digits the linear
datamodeling score is within 8% of its best for anything from .01 to .3."""

GAUSS_NEWTON_DAMPING = 0.001
"""lambda in these units where a Gauss-Newton matrix is the kernel. On digits and MNIST ten
times as much changes the linear datamodeling score by a hundredth or less; and no matrix up
to 8,192 x 8,192 has eigenvalues so large that this is below their rounding errors."""


class Damping(NamedTuple):
    """lambda: `value` times the kernel's mean eigenvalue, or `value` itself, or by the share
    `value` of min(n, k), see `effective`."""

    value: float
    absolute: bool = False
    share: bool = False

    @classmethod
    def of(cls, damping: "float | Damping") -> "Damping":
        """Returns a damping that may be given as a number of mean eigenvalues; above 0."""
        given = damping if isinstance(damping, Damping) else cls(damping)
        value = positive("damping", given.value)
        if given.share and value >= 1:
            raise ValueError(f"the share of min(n, k) is {value}; it must be below 1.")
        return given._replace(value=value)

    @property
    def words(self) -> str:
        """The damping in words, such as "damping 0.1"."""
        kind = "share" if self.share else "λ =" if self.absolute else "damping"
        return f"{kind} {self.value:g}"


def absolute(value: float) -> Damping:
    """Returns lambda itself, in the units of Phi^T Phi, as the paper gives it."""
    return Damping.of(Damping(value, absolute=True))


def effective(share: float) -> Damping:
    """Returns the lambda of each kernel at which its effective dimension is a share of
    min(n, k).

    With the kernel's eigenvalues e_i lambda solves

      sum_i e_i / (e_i + lambda) = share min(n, k)

    (Hastie and Tibshirani 1990, "Generalized Additive Models", section 3.5, call it the
    degrees of freedom). It is a function of the features alone, and every pair has its
    own, so that no timestep is damped more than others. Of a pooled kernel it is the
    geometric mean of its pairs' lambdas. A twentieth, coverage's default, was best for it
    on digits, and a fiftieth on MNIST: see configs/results/README.md.
    """
    return Damping.of(Damping(share, share=True))
