"""The settings of a run: frozen dataclasses, refused on construction where wrong.

Field names follow diffusers and the D-TRAK paper; defaults are the paper's CIFAR-2
setting, except for the features, whose defaults are this project's own
(`FeaturesConfig.reference` gives the paper's). A file in `configs/` is a module whose
`get_config()` returns a `Config`.
"""

import dataclasses
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field

MEASUREMENTS = {
    "loss": "loss",
    "square": "square",
    "mean": "mean",
    "l1": "l1",
    "l2": "l2",
    "linf": "linf",
    "elbo": "elbo",
    "mean-squared-l2-norm": "square",
    "l1-norm": "l1",
    "l2-norm": "l2",
    "linf-norm": "linf",
    "weighted-mse": "elbo",
}
"""Every accepted name of a measurement, with the name it stands for."""

KERNELS = {
    "dtrak": "square",
    "trak": "loss",
    "kernel-mean": "mean",
    "kernel-l1": "l1",
    "kernel-l2": "l2",
    "kernel-linf": "linf",
    "kernel-elbo": "elbo",
}
"""Methods with a kernel and nothing more, each with its measurement."""

METHODS = KERNELS | {
    "gradient-dot": "loss",
    "gradient-cosine": "loss",
    "tracin": "loss",
    "gas": "loss",
    "relative-influence": "loss",
    "renormalised-influence": "loss",
    "journey-trak": "loss",
    "trak-ensemble": "loss",
    "dtrak-ensemble": "square",
    "empirical-influence": None,
    "datamodels": None,
    "pixel-dot": None,
    "pixel-cosine": None,
    "random": None,
}
"""Attribution methods, with the measurement whose features each one needs, if any."""

DECOMPOSED = ("relative-influence", "renormalised-influence")
"""Those that only solver "eigh" can make."""

SQUARED = "-squared"
"""After a method's name in `counterfactual.methods`."""

NOISES = ("common", "independent", "reference", "cyclic")
STRATEGIES = ("uniform", "cumulative")
PROJECTIONS = ("sketch", "rademacher", "gaussian", "factorized", "none")
DENSE = {"rademacher": 32, "gaussian": 1}
"""Those with a matrix, and how many of its entries come from one random word."""
SOLVERS = ("eigh", "cg")
SCHEDULES = ("linear", "scaled_linear", "cosine")
PREDICTIONS = ("epsilon", "v")
SAMPLERS = ("ddim", "ancestral")
SOURCES = ("digits", "tfds", "folder")


def one_of(name: str, value: object, allowed: Collection) -> None:
    """Raises a ValueError that lists what is allowed, unless `value` is in it."""
    if value not in allowed:
        known = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name} is {value!r}; it must be one of: {known}.")


def at_least(name: str, value: object, low: int) -> None:
    """Raises a ValueError unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be an integer >= {low}.")


def between(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raises a ValueError unless `value` is a number in [low, high]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        what = f"between {low} and {high}" if high < math.inf else f">= {low}"
        raise ValueError(f"{name} is {value!r}; it must be a finite number {what}.")


def positive(name: str, value: object) -> None:
    """Raises a ValueError unless `value` is a finite number above zero."""
    between(name, value, 0)
    if value == 0:
        raise ValueError(f"{name} is 0; it must be a finite number above 0.")


def pattern(name: str, value: str) -> None:
    """Raises a ValueError unless `value` is a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{name} is {value!r}; it must be a regular expression ({error})."
        ) from error


def check_columns(projection: str, dim: int, devices: int) -> None:
    """Raises a ValueError unless devices can share the columns of a projection."""
    at_least("proj_devices", devices, 1)
    unit = DENSE.get(projection, 1) * devices
    if projection in DENSE and devices > 1 and dim % unit:
        raise ValueError(
            f"proj_devices is {devices}: that many devices share the columns of a "
            f"{projection} projection if dim is a multiple of {unit}; it is {dim}."
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how many of them for training and for validation."""

    source: str = "digits"
    """digits (scikit-learn's), tfds (tensorflow-datasets), or folder (PNG/JPEG)."""
    name: str = ""
    """The tfds data set, e.g. cifar10; or the path of the folder."""
    train_split: str = "train"
    """tfds split of the training images."""
    validation_split: str = "test"
    """tfds split of the validation images; if it is the training split, what
    training left is used."""
    labels: tuple[str, ...] = ()
    """Keep only the examples with these labels (names, or numbers as text)."""
    csv: str = ""
    """A CSV in the folder with a `file` column and a `label` or `caption` column."""
    center_crop: int = 0
    """Cut this square from the centre before resizing; 0 cuts nothing."""
    flip: bool = False
    """Mirror training images at random; features never see mirrored images."""
    train: int = 5000
    """Number of training images."""
    validation: int = 1000
    """Number of validation images, used as queries."""
    seed: int = 42
    """Decides which images are training and which are validation images."""

    def __post_init__(self):
        one_of("data.source", self.source, SOURCES)
        if self.source != "digits" and not self.name:
            what = "a data set's name" if self.source == "tfds" else "a folder"
            raise ValueError(
                f"data.name is empty; data.source={self.source!r} needs {what}."
            )
        at_least("data.center_crop", self.center_crop, 0)
        at_least("data.train", self.train, 1)
        at_least("data.validation", self.validation, 0)
        at_least("data.seed", self.seed, 0)


DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A UNet, in the field names of diffusers' `UNet2DModel`."""

    sample_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "DownBlock2D",
        "DownBlock2D",
    )
    up_block_types: tuple[str, ...] = (
        "UpBlock2D",
        "UpBlock2D",
        "AttnUpBlock2D",
        "UpBlock2D",
    )
    attention_head_dim: int | None = None
    """Channels of one attention head; None means a single head."""
    add_attention: bool = True
    """Whether the middle block has attention."""
    mid_attention_norm: bool = True
    """Whether that attention normalises first. Since 0.17 diffusers leaves this out
    under scale_shift, unless its attn_norm_num_groups is set."""
    resnet_time_scale_shift: str = "scale_shift"
    """scale_shift, or default (the time embedding is added)."""
    flip_sin_to_cos: bool = False
    freq_shift: int = 1
    downsample_padding: int = 0
    """1 pads symmetrically; 0 pads right and bottom only."""
    center_input_sample: bool = False
    mid_block_scale_factor: float = 1.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    dropout: float = 0.1

    def __post_init__(self):
        for name in ("sample_size", "in_channels", "out_channels", "layers_per_block"):
            at_least(f"model.{name}", getattr(self, name), 1)
        levels = len(self.block_out_channels)
        if levels == 0:
            raise ValueError("model.block_out_channels is empty; name one or more.")
        for name, allowed in (
            ("down_block_types", DOWN_BLOCKS),
            ("up_block_types", UP_BLOCKS),
        ):
            kinds = getattr(self, name)
            for kind in kinds:
                one_of(f"model.{name}", kind, allowed)
            if len(kinds) != levels:
                raise ValueError(
                    f"model.{name} has {len(kinds)} entries; it must have one for "
                    f"each of the {levels} entries of model.block_out_channels."
                )
        at_least("model.norm_num_groups", self.norm_num_groups, 1)
        for channels in self.block_out_channels:
            at_least("model.block_out_channels", channels, 1)
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"model.block_out_channels has {channels}, which "
                    f"model.norm_num_groups={self.norm_num_groups} does not divide."
                )
        if self.attention_head_dim is not None:
            at_least("model.attention_head_dim", self.attention_head_dim, 1)
            widths = self.block_out_channels
            levels_and_mid = (
                *zip(self.down_block_types, widths),
                *zip(self.up_block_types, widths[::-1]),
                ("AttnMid" if self.add_attention else "Mid", widths[-1]),
            )
            for kind, channels in levels_and_mid:
                if kind.startswith("Attn") and channels % self.attention_head_dim:
                    raise ValueError(
                        f"model.block_out_channels has {channels}, which "
                        f"model.attention_head_dim={self.attention_head_dim} does not "
                        "divide."
                    )
        factor = 2 ** (levels - 1)
        if self.sample_size % factor:
            raise ValueError(
                f"model.sample_size is {self.sample_size}; {levels} levels halve it "
                f"{levels - 1} times, so it must be a multiple of {factor}."
            )
        one_of(
            "model.resnet_time_scale_shift",
            self.resnet_time_scale_shift,
            ("scale_shift", "default"),
        )
        one_of("model.freq_shift", self.freq_shift, (0, 1))
        one_of("model.downsample_padding", self.downsample_padding, (0, 1))
        if not self.mid_attention_norm and self.resnet_time_scale_shift == "default":
            raise ValueError(
                "model.mid_attention_norm is False, which diffusers has only for "
                "model.resnet_time_scale_shift='scale_shift'; it must be True."
            )
        if self.freq_shift == 1 and self.block_out_channels[0] < 4:
            raise ValueError(
                f"model.block_out_channels begins with {self.block_out_channels[0]}; "
                "with model.freq_shift=1 it must begin with 4 or more."
            )
        positive("model.mid_block_scale_factor", self.mid_block_scale_factor)
        positive("model.norm_eps", self.norm_eps)
        between("model.dropout", self.dropout, 0, 0.999)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The noise schedule, and what the network predicts."""

    schedule: str = "linear"
    steps: int = 1000
    beta_start: float = 1e-4
    """Of linear and scaled_linear; cosine has no such setting."""
    beta_end: float = 0.02
    prediction: str = "epsilon"

    def __post_init__(self):
        one_of("diffusion.schedule", self.schedule, SCHEDULES)
        at_least("diffusion.steps", self.steps, 1)
        between("diffusion.beta_start", self.beta_start, 1e-12, 0.999)
        between("diffusion.beta_end", self.beta_end, self.beta_start, 0.999)
        one_of("diffusion.prediction", self.prediction, PREDICTIONS)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """AdamW with linear warm-up, half-cosine decay and clipping."""

    steps: int = 8000
    batch_size: int = 128
    learning_rate: float = 1e-4
    warmup: float = 0.1
    """Fraction of the steps over which the rate grows from 0."""
    b1: float = 0.95
    b2: float = 0.999
    weight_decay: float = 1e-6
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    """Decay of the averaged parameters, which then are the model; 0 is off."""
    checkpoints: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Fractions of the run whose state is kept; the last one must be 1."""
    save_every: int = 1000
    """Steps between the checkpoints that an interrupted run continues from."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    fsdp: bool = False
    """Spread the parameters, their averages and AdamW's moments over the devices (fully
    sharded data parallelism), for a network whose state one device cannot hold. Changes
    results by rounding only. Retrained members always live on one device each."""
    seed: int = 42

    def __post_init__(self):
        for name in ("steps", "batch_size", "save_every", "log_every"):
            at_least(f"train.{name}", getattr(self, name), 1)
        positive("train.learning_rate", self.learning_rate)
        between("train.warmup", self.warmup, 0, 1)
        between("train.b1", self.b1, 0, 0.999999)
        between("train.b2", self.b2, 0, 0.999999)
        between("train.weight_decay", self.weight_decay, 0)
        positive("train.clip_norm", self.clip_norm)
        between("train.ema_decay", self.ema_decay, 0, 0.999999)
        for fraction in self.checkpoints:
            between("train.checkpoints", fraction, 0, 1)
        if not self.checkpoints or self.checkpoints[-1] != 1:
            raise ValueError(
                f"train.checkpoints is {self.checkpoints}; the last one must be 1.0, "
                "the end of the run."
            )
        at_least("train.seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The images to generate; they are the second set of queries."""

    count: int = 1000
    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    """Noise of DDIM, from 0 (none) to 1."""
    clip: bool = True
    """Clip the predicted image to [-1, 1] in every step."""
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self):
        at_least("sample.count", self.count, 0)
        one_of("sample.sampler", self.sampler, SAMPLERS)
        at_least("sample.steps", self.steps, 1)
        between("sample.eta", self.eta, 0, 1)
        at_least("sample.batch_size", self.batch_size, 1)
        at_least("sample.seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The gradient features: what `dtrak_jax.Task` and `Projection` are made of."""

    measurements: tuple[str, ...] = ("square", "loss")
    timesteps: int | tuple[int, ...] = 10
    """How many, chosen by the strategy; or the timesteps themselves."""
    strategy: str = "uniform"
    """uniform: every (steps/timesteps)-th from 0 on; cumulative: the first ones."""
    noise: str = "common"
    """common, independent, reference or cyclic."""
    noise_batch: int = 52
    """Batch size whose slots share noise under noise=reference."""
    draws: int = 1
    """Noise draws per timestep."""
    per_timestep: bool = True
    """Keep (timestep, draw) pairs apart, or average gradients over them."""
    projection: str = "sketch"
    dim: int = 4096
    parameters: str = ""
    """Use only the parameters whose path this regular expression finds."""
    batch_size: int = 64
    """Gradients computed at once on each device; changes results by rounding only. On a
    TPU v5e 8 or more: XLA cuts up the images of smaller batches, which takes a quarter
    more arithmetic."""
    proj_devices: int = 1
    """Devices of a host that share the columns of a dense projection, so that its
    entries are made once by all of them; changes results by rounding only."""
    seed: int = 0

    def __post_init__(self):
        if not self.measurements:
            raise ValueError("features.measurements is empty; name one or more.")
        for name in self.measurements:
            one_of("features.measurements", name, MEASUREMENTS)
        one_of("features.strategy", self.strategy, STRATEGIES)
        one_of("features.noise", self.noise, NOISES)
        one_of("features.projection", self.projection, PROJECTIONS)
        for name in ("noise_batch", "draws", "dim", "batch_size"):
            at_least(f"features.{name}", getattr(self, name), 1)
        check_columns(self.projection, self.dim, self.proj_devices)
        pattern("features.parameters", self.parameters)
        at_least("features.seed", self.seed, 0)

    @classmethod
    def reference(cls, **changes) -> "FeaturesConfig":
        """The paper's own recipe: 100 timesteps averaged into one gradient, noise
        shared by batch slot, dense Gaussian projection to 32,768 dimensions."""
        paper = {
            "timesteps": 100,
            "noise": "reference",
            "per_timestep": False,
            "projection": "gaussian",
            "dim": 32768,
        }
        return cls(**paper | changes)


@dataclass(frozen=True, kw_only=True)
class AttributionConfig:
    """From features to scores."""

    methods: tuple[str, ...] = ("dtrak", "trak")
    damping: float = 0.1
    """lambda, in units of the kernel's mean eigenvalue unless `absolute`."""
    absolute: bool = False
    solver: str = "eigh"
    """eigh decomposes every kernel on the host; cg, for kernels too large for that,
    iterates for every query, and leaves lds without curves over the damping."""

    def __post_init__(self):
        if not self.methods:
            raise ValueError("attribution.methods is empty; name one or more.")
        one_of("attribution.solver", self.solver, SOLVERS)
        for method in self.methods:
            one_of("attribution.methods", method, METHODS)
            if self.solver == "cg" and method in DECOMPOSED:
                raise ValueError(
                    f"attribution.methods has {method!r}, which needs kernels decomposed: "
                    "attribution.solver is 'cg'; it must be 'eigh'."
                )
        positive("attribution.damping", self.damping)


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """Models retrained on subsets of the training images: what scores must predict."""

    subsets: int = 64
    """How many subsets; more may be asked for later."""
    seeds: int = 3
    """Models trained on each subset, with the seeds 0, 1, ...; from 2 on there is a
    noise ceiling."""
    models: int = 0
    """Models trained on everything, with the seeds 0, 1, ...: what the scores of
    trak-ensemble and dtrak-ensemble are averaged over, beside the main model."""
    fraction: float = 0.5
    """Share of the training images, and of `train.steps`, that a member gets."""
    timesteps: int | tuple[int, ...] = 1000
    """At which the loss of a query is measured; how many, evenly spaced, or which."""
    draws: int = 3
    """Noise draws at each of them, the same for all members."""
    batch_size: int = 256
    """Noised queries at once on each device when losses are measured."""
    seed: int = 0
    """Decides the subsets and the noise of the measured losses."""

    def __post_init__(self):
        for name in ("subsets", "seeds", "draws", "batch_size"):
            at_least(f"ensemble.{name}", getattr(self, name), 1)
        at_least("ensemble.models", self.models, 0)
        between("ensemble.fraction", self.fraction, 0.01, 0.99)
        at_least("ensemble.seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class CounterfactualConfig:
    """Retraining without the strongest training images of some generated images."""

    queries: int = 60
    """How many generated images, chosen by hash of their ids."""
    count: int = 1000
    """How many training images are removed for each."""
    methods: tuple[str, ...] = ("dtrak", "trak")
    """Whose strongest images; with "-squared" after the name those of the largest squared
    scores, whatever their sign. A random choice is always there too."""
    seed: int = 0
    """Chooses the queries and the random images."""

    def __post_init__(self):
        at_least("counterfactual.queries", self.queries, 1)
        at_least("counterfactual.count", self.count, 1)
        at_least("counterfactual.seed", self.seed, 0)
        for method in self.methods:
            name = method.removesuffix(SQUARED)
            one_of("counterfactual.methods", name, METHODS.keys() - {"random"})


STUDIES = ("noise", "draws", "timesteps", "measurement", "projection", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Which choices `dtrak-jax ablate` compares; the rest is as in `features`."""

    studies: tuple[str, ...] = STUDIES
    timesteps: tuple[int, ...] = (100, 200, 300, 400, 500)
    draws: int = 2
    """Noise draws per timestep where noises and kernels are compared."""
    noise_seeds: int = 2
    """How often that comparison is repeated with other noise."""
    most_draws: int = 64
    """Up to how many draws of one timestep are tried; a power of 2."""
    dims: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Dimensions of the sketch."""

    def __post_init__(self):
        if not self.studies:
            raise ValueError("ablation.studies is empty; name one or more.")
        for study in self.studies:
            one_of("ablation.studies", study, STUDIES)
        for name in ("draws", "noise_seeds", "most_draws"):
            at_least(f"ablation.{name}", getattr(self, name), 1)
        for name in ("timesteps", "dims"):
            if not getattr(self, name):
                raise ValueError(f"ablation.{name} is empty; name one or more.")
        for dim in self.dims:
            at_least("ablation.dims", dim, 1)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What report.html shows."""

    queries: int = 16
    """Queries shown of each kind; the scores of all are in scores/."""
    methods: tuple[str, ...] = ("dtrak", "trak")
    """Whose scores are shown, of those in `attribution.methods`; all of these if none
    of them is."""
    top: int = 6
    """Supporting and opposing training images shown for each query."""

    def __post_init__(self):
        at_least("report.queries", self.queries, 0)
        for method in self.methods:
            one_of("report.methods", method, METHODS)
        at_least("report.top", self.top, 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, from images to report."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    counterfactual: CounterfactualConfig = field(default_factory=CounterfactualConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self):
        have = {MEASUREMENTS[name] for name in self.features.measurements}
        for method in self.attribution.methods:
            if METHODS[method] not in have | {None}:
                raise ValueError(
                    f"attribution.methods has {method!r}, which needs "
                    f"features.measurements to have {METHODS[method]!r}; "
                    f"it has {', '.join(sorted(have))}."
                )
            if method.endswith("-ensemble") and not self.ensemble.models:
                raise ValueError(
                    f"attribution.methods has {method!r}, which averages over further "
                    "models: ensemble.models is 0; it must be 1 or more."
                )
        if self.sample.steps > self.diffusion.steps:
            raise ValueError(
                f"sample.steps is {self.sample.steps}; it must be at most "
                f"diffusion.steps={self.diffusion.steps}."
            )
        if self.data.validation + self.sample.count == 0:
            raise ValueError(
                "data.validation and sample.count are both 0: there is no query."
            )


def shown_methods(config: Config) -> tuple[str, ...]:
    """The methods whose scores the report shows query by query."""
    methods = config.attribution.methods
    return tuple(m for m in methods if m in config.report.methods) or methods


def flatten(config: Config) -> dict[str, object]:
    """{"train.steps": 8000, ...}: every setting by its dotted name."""
    return {
        f"{section}.{name}": list(value) if isinstance(value, tuple) else value
        for section, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
    }
