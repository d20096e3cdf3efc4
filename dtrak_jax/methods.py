"""The methods: one table, in which each of them is defined once.

To add a method, write its function in `dtrak_jax.attribution`, and its row here.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from dtrak_jax.attribution import (
    Damping,
    Kernels,
    Scores,
    coverage,
    das,
    datamodels,
    ekfac_influence,
    embedding_cosine,
    embedding_dot,
    empirical_influence,
    gas,
    gauss_newton_influence,
    gradient_cosine,
    gradient_dot,
    influence,
    metagradient,
    pixel_cosine,
    pixel_dot,
    random_scores,
    relative_influence,
    renormalised_influence,
    tracin,
)
from dtrak_jax.attribution.coverage import DAMPINGS
from dtrak_jax.attribution.damping import GAUSS_NEWTON_DAMPING
from dtrak_jax.attribution.ekfac import EKFAC_DAMPING
from dtrak_jax.attribution.scoring import (
    CHECKPOINTS,
    CURVATURE,
    EMBEDDINGS,
    GAUSS_NEWTON,
    IDS,
    IMAGES,
    JOURNEY,
    LAYERS,
    MODELS,
    ONE_MODEL,
    OUTPUTS,
    PROBES,
    REPLAY,
    SEARCH,
    Inputs,
)

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
    damping: Damping | None = None  # where none is given; None of one without lambda
    decomposed: bool = False  # whether it needs kernels decomposed: by solver "eigh"
    signed: bool = True  # whether positive means that the example lowered the loss

    @property
    def kernel(self) -> bool:
        """True if the scores are those of one model's kernels, at any damping."""
        return self.inputs in (ONE_MODEL, GAUSS_NEWTON) and self.function is influence

    @property
    def objective(self) -> str | None:
        """The objective of a `removal_set` by its kernels; None without any."""
        names = {influence: "influence", coverage: "coverage"}
        return names.get(self.function) if self.inputs is ONE_MODEL else None

    @property
    def embeds(self) -> bool:
        """True if the scores are those of CLIP's embeddings, which need `clip.folder`."""
        return self.inputs is EMBEDDINGS

    @property
    def replays(self) -> bool:
        """True if the model is trained again and differentiated; needs `train.eps_root`."""
        return self.inputs is REPLAY

    @property
    def curved(self) -> bool:
        """True if the scores are made from EK-FAC's curvature."""
        return self.inputs in (CURVATURE, SEARCH)

    @property
    def of_output(self) -> bool:
        """True if its kernels are Gauss-Newton matrices of the network's output."""
        return self.inputs in (GAUSS_NEWTON, PROBES)

    @property
    def probed(self) -> bool:
        """True if its queries' features are those of several probes of the output."""
        return self.inputs is PROBES

    def kernels(self, run: "Run") -> Kernels:
        """Returns the kernels of one model, of a method that has them."""
        return run.output_kernels() if self.of_output else run.kernels(self.measurement)

    @property
    def weighs_layers(self) -> bool:
        """True if layers have weights, learnt from the queries' features by layer."""
        return self.inputs is LAYERS

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
DAS, EKFAC = "arXiv 2410.18639", "arXiv 2410.13850"
LAYER_WEIGHTS = "arXiv 2506.05647"
TRACIN, GAS, DMIN = "arXiv 2002.08484", "arXiv 2201.10055", "arXiv 2412.08637"


def _kernel(
    name, label, measurement, note, source=DTRAK, inputs=ONE_MODEL, function=influence
) -> Method:
    """Returns the row of a method with a kernel, decomposed but for influence and coverage."""
    row = Method(name, label, function, note, source, inputs, measurement)
    decomposed, signed = function not in (influence, coverage), function is not coverage
    damping = DAMPINGS["influence" if signed else "coverage"]
    return row._replace(decomposed=decomposed, signed=signed, damping=damping)


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
    Method(
        "ekfac",
        "EK-FAC",
        ekfac_influence,
        "influence of whole gradients of the loss, with the Gauss-Newton matrix by EK-FAC",
        EKFAC,
        CURVATURE,
        damping=Damping(EKFAC_DAMPING),
    ),
    Method(
        "gauss-newton",
        "Gauss-Newton",
        influence,
        "trak with the Gauss-Newton matrix of the output in place of the kernel",
        EKFAC,
        GAUSS_NEWTON,
        "loss",
        damping=Damping(GAUSS_NEWTON_DAMPING),
        decomposed=True,
    ),
    Method(
        *("das", "DAS", das),
        "how far the output moves without the image, with the Gauss-Newton matrix",
        *(DAS, PROBES, "loss"),
        damping=Damping(GAUSS_NEWTON_DAMPING),
        decomposed=True,
        signed=False,
    ),
    Method(
        "gauss-newton-cg",
        "GGN by CG",
        gauss_newton_influence,
        "ekfac with that matrix itself, by conjugate gradients for each query",
        *("arXiv 2507.14740", SEARCH),
        damping=Damping(EKFAC_DAMPING),
    ),
    _kernel(
        "journey-trak",
        "Journey TRAK",
        "loss",
        "trak along the sampling trajectory; generated images only",
        "arXiv 2312.06205",
        JOURNEY,
    ),
    _kernel(
        *("trak-layers", "TRAK by layers", "loss"),
        *("trak with weights of layers, learnt without labels", LAYER_WEIGHTS, LAYERS),
    ),
    _kernel(
        *("dtrak-layers", "D-TRAK by layers", "square"),
        *("dtrak with weights of layers, learnt without labels", LAYER_WEIGHTS, LAYERS),
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
        "metagradient",
        "MAGIC",
        metagradient,
        "exact derivative by the example's weight in training; for a few queries",
        "arXiv 2504.16430",
        REPLAY,
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
