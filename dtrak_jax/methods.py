"""The methods: one table, in which each of them is defined once.

To add a method, write its function in `dtrak_jax.attribution`, and its row here.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from dtrak_jax.attribution import (
    DEFAULT_DAMPING,
    Damping,
    Kernels,
    Scores,
    coverage,
    datamodels,
    embedding_cosine,
    embedding_dot,
    empirical_influence,
    gas,
    gradient_cosine,
    gradient_dot,
    influence,
    pixel_cosine,
    pixel_dot,
    random_scores,
    relative_influence,
    renormalised_influence,
    tracin,
)
from dtrak_jax.attribution.inputs import Array
from dtrak_jax.attribution.scoring import (
    CHECKPOINTS,
    EMBEDDINGS,
    IDS,
    IMAGES,
    JOURNEY,
    MODELS,
    ONE_MODEL,
    OUTPUTS,
    Inputs,
    score,
)
from dtrak_jax.checks import instance, one_of
from dtrak_jax.data import look_alikes
from dtrak_jax.features import Features
from dtrak_jax.switches import standard

if TYPE_CHECKING:
    from dtrak_jax.config import Config
    from dtrak_jax.run import Run


class Method(NamedTuple):
    """A row of the table."""

    name: str  # in configs and files
    label: str  # that its paper gives it
    function: Callable[..., np.ndarray]
    """Makes scores [q, n] of the inputs; of features, adds up a `PairSum`, its last one."""
    note: str  # a few words on what the scores are
    source: str = ""  # the paper
    inputs: Inputs = ONE_MODEL  # the function's arguments, as artefacts of a run
    measurement: str | None = None  # whose features it is given, if any
    damped: bool = False  # whether the function has a damping
    decomposed: bool = False  # whether it needs kernels decomposed: by solver "eigh"
    signed: bool = True  # whether positive means that the example lowered the loss

    @property
    def kernel(self) -> bool:
        """True if the scores are those of one model's kernels, at any damping."""
        return self.inputs is ONE_MODEL and self.function is influence

    @property
    def objective(self) -> str | None:
        """What a `removal_set` by its kernels raises, or lowers; None without any."""
        names = {influence: "influence", coverage: "coverage"}
        return names.get(self.function) if self.inputs is ONE_MODEL else None

    @property
    def embeds(self) -> bool:
        """True if the scores are those of CLIP's embeddings, which need `clip.folder`."""
        return self.inputs is EMBEDDINGS

    @property
    def learn(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
        """The function if it learns from retrained models, to be scored on unseen ones."""
        return self.function if self.inputs is OUTPUTS else None

    @property
    def needs(self) -> tuple[str, ...]:
        """The stages whose artefacts it reads, beyond training images and queries."""
        return self.inputs.needs

    def folders(self, config: "Config") -> Sequence[str]:
        """Returns the folders in features/ that it reads; "" is the main one."""
        return self.inputs.folders(config)

    def applies_to(self, queries: str) -> bool:
        """Returns whether it scores these queries: a trajectory is of what was generated."""
        return self.inputs is not JOURNEY or queries == "generated"

    def scores(self, run: "Run") -> dict[str, Scores]:
        """Returns the scores for each set of queries, or says which stage must run first."""
        return self.inputs.scores(run, self)


DTRAK, TRAK, RELATIF = "arXiv 2311.00500", "arXiv 2303.14186", "arXiv 2003.11630"
DAS = "arXiv 2410.18639"
TRACIN, GAS, DMIN = "arXiv 2002.08484", "arXiv 2201.10055", "arXiv 2412.08637"


def _kernel(
    name, label, measurement, note, source=DTRAK, inputs=ONE_MODEL, function=influence
) -> Method:
    """Returns the row of a method with a kernel, decomposed but for influence and coverage."""
    row = Method(name, label, function, note, source, inputs, measurement, damped=True)
    decomposed = function not in (influence, coverage)
    return row._replace(decomposed=decomposed, signed=function is not coverage)


def _loss(name, label, function, note, source, inputs=ONE_MODEL) -> Method:
    """Returns the row of a method that compares gradients of the loss."""
    return Method(name, label, function, note, source, inputs, "loss")


ROWS = (
    _kernel("dtrak", "D-TRAK", "square", "kernel of gradients of the squared output"),
    _kernel("trak", "TRAK", "loss", "kernel of gradients of the loss", TRAK),
    _kernel("kernel-mean", "mean", "mean", "kernel of gradients of the output's mean"),
    _kernel("kernel-l1", "L1", "l1", "kernel of gradients of its L1 norm"),
    _kernel("kernel-l2", "L2", "l2", "kernel of gradients of its L2 norm"),
    _kernel("kernel-linf", "L∞", "linf", "kernel of gradients of its largest entry"),
    _kernel("kernel-elbo", "ELBO", "elbo", "kernel of gradients of the weighted loss"),
    _kernel(
        *("coverage", "coverage", "square"),
        "how much of what the query needs the example holds: dtrak's kernels, squared",
        *(DAS, ONE_MODEL, coverage),
    ),
    _loss(
        "gradient-dot", "gradient dot", gradient_dot, "gradients' inner product", TRACIN
    ),
    _loss(
        "gradient-cosine", "gradient cosine", gradient_cosine, "gradients' cosine", DMIN
    ),
    _loss(
        "tracin",
        "TracInCP",
        tracin,
        "gradient-dot over checkpoints",
        TRACIN,
        CHECKPOINTS,
    ),
    _loss("gas", "GAS", gas, "gradient-cosine over checkpoints", GAS, CHECKPOINTS),
    _kernel(
        "relative-influence",
        "relative influence",
        "loss",
        "trak over the size of the example's influence",
        RELATIF,
        function=relative_influence,
    ),
    _kernel(
        "renormalised-influence",
        "renormalised influence",
        "loss",
        "trak over the size of the example's gradient",
        GAS,
        function=renormalised_influence,
    ),
    _kernel(
        "journey-trak",
        "Journey TRAK",
        "loss",
        "trak along the sampling trajectory; generated images only",
        "arXiv 2312.06205",
        JOURNEY,
    ),
    _kernel("trak-ensemble", "TRAK ensemble", "loss", "trak over models", TRAK, MODELS),
    _kernel(
        *("dtrak-ensemble", "D-TRAK ensemble", "square", "dtrak over models"),
        *(DTRAK, MODELS),
    ),
    Method(
        "empirical-influence",
        "empirical influence",
        empirical_influence,
        "mean loss of retrained models without the example, less that with it",
        "arXiv 2008.03703",
        OUTPUTS,
    ),
    Method(
        "datamodels",
        "datamodels",
        datamodels,
        "ridge regression of retrained models' losses on their subsets",
        "arXiv 2202.00622",
        OUTPUTS,
    ),
    Method(
        "pixel-dot",
        "pixel dot",
        pixel_dot,
        "inner product of pixels, or of latents in text-to-image",
        DTRAK,
        IMAGES,
    ),
    Method(
        "pixel-cosine",
        "pixel cosine",
        pixel_cosine,
        "cosine of pixels, or of latents in text-to-image",
        DTRAK,
        IMAGES,
    ),
    Method(
        "clip-dot",
        "CLIP dot",
        embedding_dot,
        "inner product of CLIP's embeddings; needs clip.folder",
        DTRAK,
        EMBEDDINGS,
    ),
    Method(
        "clip-cosine",
        "CLIP cosine",
        embedding_cosine,
        "cosine of CLIP's embeddings; needs clip.folder",
        DTRAK,
        EMBEDDINGS,
    ),
    Method(
        "random", "random", random_scores, "chance, which a method must beat", "", IDS
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in ROWS}
"""All methods, by name."""

MethodName = Literal[*METHODS]
"""The type of a setting that names a method."""

RemovalName = Literal[*(name for name in METHODS if name != "random")]
"""The type of one that is held against chance, which is always there."""

KernelName = Literal[*(name for name, row in METHODS.items() if row.objective)]
"""The type of one that names a method of one model's kernels."""


@standard()
def attribute(
    train: Array | Kernels,
    query: Array | dict[str, Array],
    *,
    method: str | None = None,
    damping: float | Damping = DEFAULT_DAMPING,
    solver: str = "eigh",
    groups: Mapping[str, Sequence[str]] | None = None,
    draws: int | None = None,
) -> Scores | dict[str, Scores]:
    """Scores every training example for every query, by any method of one model's features.

    Formulas and sources are in the functions' docstrings in `dtrak_jax.attribution`. The
    methods with a kernel, such as "trak" with gradients of the loss and "dtrak" with those
    of the squared output, are

    tau(q, n) = sum_j phi_j(q)^T (Phi_j^T Phi_j + lambda_j I)^-1 phi_j(n)

    over the pairs j of a timestep and a noise draw that the features keep apart, or with
    the single kernel of averaged features.

    Args:
      train: features of the training set, [T, n, k] or [n, k]; or `Kernels`, to share
        what is decomposed with other calls.
      query: of the queries, [T, q, k] or [q, k], computed with the same task,
        parameters and projection; or several sets of them by name.
      method: its name; None takes the kernel method of the features' measurement.
      damping: lambda_j in units of that kernel's mean eigenvalue,
        trace(Phi_j Phi_j^T) / min(n, k); or `absolute(lambda)` or `effective(share)`.
      solver: "eigh", one eigendecomposition of each kernel on the host; or "cg", where
        min(n, k) is too large for that: conjugate gradients on all devices, right to
        1e-5, at a price for every query (see `attribution.iterative.solve`).
      groups: {grouping: the name of each training example's group [n]}, such as
        {"contributor": [...]}; `scores.group("contributor")` adds up their scores.
      draws: the noise draws of each timestep, which arrays do not say: their pairs are
        then timesteps x draws, those of a timestep one after the other.

    Returns:
      The scores; {name: scores} of several sets. All processes must call this together.
      With 2 independent draws or more, kept apart, they have standard errors: those of
      estimating the score that many draws would give, see `attribution.PairSum`.

    Raises:
      ValueError: a method that is unknown or needs more than features; features of
        different tasks, or with the wrong measurement or shape; groups of other
        examples, or draws of other features; or a damping that is not above rounding
        errors.
      MemoryError: min(n, k) is too large for solver "eigh" on this host.
    """
    kernels, damping = Kernels.of(train, solver), Damping.of(damping)
    row = _choose(kernels.train, method)
    queries = query if isinstance(query, dict) else {"": query}
    scores = score(row, kernels, queries, damping, groups, draws)
    for name, column in next(iter(scores.values())).columns.items():
        if text := look_alikes(name, column):
            warnings.warn(text, stacklevel=3)
    return scores if isinstance(query, dict) else scores[""]


def _choose(train: Array, method: str | None) -> Method:
    """Returns the row of a method, once the features are sure to fit it."""
    measurement = train.measurement if isinstance(train, Features) else None
    rows = {name: row for name, row in METHODS.items() if row.inputs is ONE_MODEL}
    if method is None:
        for row in rows.values():
            if row.kernel and row.measurement == measurement:
                return row
        # A measurement of the user's own has a kernel like the others, and no name.
        name = measurement or "kernel"
        name = f"kernel-{name}" if name in METHODS else name
        return METHODS["trak"]._replace(name=name)
    instance("method", method, str)
    if method in METHODS and method not in rows:
        raise ValueError(
            f"method is {method!r}, which is made from {METHODS[method].inputs.words}; "
            f"from one model's features are made: {', '.join(map(repr, rows))}."
        )
    one_of("method", method, rows)
    row = rows[method]
    if measurement not in (None, row.measurement):
        raise ValueError(
            f"method {method!r} needs features of the measurement {row.measurement!r}; "
            f"these are of {measurement!r}."
        )
    return row


def table() -> str:
    """Returns the table as text, a line for each method."""
    rows = [
        ("method", "called", "measurement", "made from", "signed", "scores", "source")
    ]
    for row in METHODS.values():
        what = row.measurement or "-", row.inputs.words, "yes" if row.signed else "no"
        rows.append((row.name, row.label, *what, row.note, row.source or "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
