"""The settings of a run: frozen dataclasses, refused on construction where wrong.

Field names follow diffusers and the D-TRAK paper; defaults are the paper's CIFAR-2
setting, except for the features, whose defaults are this project's own
(`FeaturesConfig.reference` gives the paper's). A file in `configs/` is a module whose
`get_config()` returns a `Config`.

Every setting may change within a run directory. What is trained belongs to the settings
that decide it, `locks.TRAINED`, and is refused under others; everything else is made again,
or beside what is there.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from dtrak_jax.attribution.config import AttributionConfig
from dtrak_jax.checks import (
    at_least,
    check_choices,
    distinct,
    free,
    pattern,
    seed,
)
from dtrak_jax.data.config import DataConfig
from dtrak_jax.diffusion.config import DiffusionConfig, SampleConfig
from dtrak_jax.encoding.config import BaseConfig, ClipConfig
from dtrak_jax.evaluation.config import (
    AblationConfig,
    CounterfactualConfig,
    EnsembleConfig,
)
from dtrak_jax.features.layers import Layers, check_layers
from dtrak_jax.features.measurements import MEASUREMENTS, MeasurementName
from dtrak_jax.features.projection import ProjectionKind, check_columns
from dtrak_jax.features.task import Noise, Strategy
from dtrak_jax.methods import METHODS, MethodName
from dtrak_jax.models.config import ModelConfig
from dtrak_jax.models.lora import LoRAConfig
from dtrak_jax.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """Pictures that were generated elsewhere, asked about instead of samples."""

    folder: str = ""
    """A folder of pictures; if it is empty, the model generates `sample.count` images."""
    csv: str = ""
    """A CSV in the folder with a `file` column, which names the files to take, and
    perhaps `prompt` (or `caption`), `label` and the columns of `data.groups`."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The gradient features: what `dtrak_jax.Task` and `Projection` are made of."""

    measurements: tuple[MeasurementName, ...] = ("square", "loss")
    """The functions of the prediction whose gradients are taken: square is D-TRAK's,
    loss TRAK's."""
    timesteps: int | tuple[int, ...] = 10
    """The number of timesteps, which the strategy chooses; or the timesteps themselves."""
    strategy: Strategy = "uniform"
    """uniform: evenly spaced from 0 on; cumulative: the first ones."""
    noise: Noise = "common"
    """common: all pictures share the noise of a timestep and draw; independent: none do;
    reference: those in one slot of the paper's batches do; cyclic, a control: as common,
    but queries have that of the next draw."""
    noise_batch: int = 52
    """Batch size whose slots share noise under noise=reference."""
    draws: int = 1
    """Noise draws per timestep; 2 or more, kept apart, give scores standard errors."""
    per_timestep: bool = True
    """Keep (timestep, draw) pairs apart, or average gradients over them."""
    projection: ProjectionKind = "sketch"
    """The random projection of gradients to `dim` columns; none keeps them whole."""
    dim: int = 4096
    """Columns of a projected gradient; more are more exact, and take more disk."""
    parameters: str = ""
    """Use only the parameters whose path this regular expression finds."""
    layers: tuple[str, ...] = free(())
    """Groups of parameters that methods such as `trak-layers` weigh, each NAME=PATTERN, a
    regular expression of their paths; empty: one for each block of the network."""
    batch_size: int = free(64)
    """Gradients computed at once on each device; changes results by rounding only. On a
    TPU v5e 8 or more: XLA cuts up the images of smaller batches, which takes a quarter
    more arithmetic."""
    proj_devices: int = free(1)
    """Devices of a host that share the columns of a dense projection, so that its
    entries are made once by all of them; changes results by rounding only."""
    seed: int = 0
    """Decides noise and projection."""

    def __post_init__(self):
        if not self.measurements:
            raise ValueError("features.measurements is empty; name one or more.")
        check_choices("features", self)
        distinct(
            "features.measurements", tuple(MEASUREMENTS[m] for m in self.measurements)
        )
        for name in ("noise_batch", "draws", "dim", "batch_size"):
            at_least(f"features.{name}", getattr(self, name), 1)
        check_columns(self.projection, self.dim, self.proj_devices)
        pattern("features.parameters", self.parameters)
        seed("features.seed", self.seed)
        for text in self.layers:
            if "=" not in text:
                raise ValueError(
                    f"features.layers has {text!r}; it must be NAME=PATTERN."
                )
        names = tuple(text.partition("=")[0] for text in self.layers)
        distinct("features.layers", names)
        if self.layers:
            check_layers("features.layers", self.layer_groups)

    @property
    def layer_groups(self) -> Layers:
        """The groups of parameters as `featurize` takes them."""
        return dict(text.partition("=")[::2] for text in self.layers) or "blocks"

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
class ReportConfig:
    """The contents of report.html."""

    queries: int = free(16)
    """Queries shown of each kind; the scores of all are in scores/."""
    methods: tuple[MethodName, ...] = free(("dtrak", "trak"))
    """Methods whose scores are shown, of those in `attribution.methods`; all signed ones of
    these if none of them is."""
    top: int = free(6)
    """Supporting and opposing training images shown for each query."""

    def __post_init__(self):
        check_choices("report", self)
        distinct("report.methods", self.methods)
        unsigned = [name for name in self.methods if not METHODS[name].signed]
        if unsigned:
            raise ValueError(
                f"report.methods has {unsigned[0]!r}, whose scores have no sign; the report "
                "shows signed ones. Its scores are in scores/ and in the export."
            )
        at_least("report.queries", self.queries, 0)
        at_least("report.top", self.top, 1)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The files of export/, for other programs."""

    format: Literal["both", "csv", "json"] = free("both")
    """The tables in CSV, JSON with all that decides the numbers, or both. The command
    also takes --format."""
    top: int = free(100)
    """Pictures of each query: so many with the highest scores, and so many with the
    lowest; 0 exports all. The command also takes --top."""
    shares: bool = free(False)
    """Give each query's groups shares of its positive scores, which add up to one; and
    the size of the negative ones, which they leave out, as a part of the positive ones."""

    def __post_init__(self):
        check_choices("export", self)
        at_least("export.top", self.top, 0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, from images to report."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    queries: QueriesConfig = field(default_factory=QueriesConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    counterfactual: CounterfactualConfig = field(default_factory=CounterfactualConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self):
        self._check_base()
        self._check_methods()
        if not self.is_given:
            at_least("train.steps", self.train.steps, 1)
        if not self.is_latent:
            self.model.check_variance()
        takes_classes = self.model.folder or self.model.takes_classes
        if self.sample.labels and (self.is_latent or not takes_classes):
            raise ValueError(
                f"sample.labels is {self.sample.labels}, but the model is not given "
                "classes (model.num_class_embeds)."
            )
        # A given model's folder may decide another number of timesteps.
        if not self.is_given and self.sample.steps > self.diffusion.steps:
            raise ValueError(
                f"sample.steps is {self.sample.steps}; it must be at most "
                f"diffusion.steps={self.diffusion.steps}."
            )
        if not self.query_sets:
            raise ValueError(
                "data.validation and sample.count are both 0 and queries.folder is "
                "empty: there is no query."
            )

    def _check_base(self):
        """Raises a ValueError unless what a base decides is left to it."""
        none = LoRAConfig(), BaseConfig()
        if not self.is_latent and (self.lora, self.base) != none:
            raise ValueError(
                "base and lora have settings of text-to-image, but base.folder is empty "
                "and base.pictures 0; name a Stable Diffusion, or leave them out."
            )
        defaults = {"model": ModelConfig(), "diffusion": DiffusionConfig()}
        for name, default in defaults.items() if self.is_latent else ():
            if getattr(self, name) != default:
                raise ValueError(
                    f"base.folder={self.base.folder!r} or base.pictures="
                    f"{self.base.pictures} decides all of `{name}`; leave it out."
                )
        if self.lora.file and self.base.pictures:
            raise ValueError(
                f"lora.file is {self.lora.file!r}, adapters of a Stable Diffusion: "
                "base.folder must be its folder."
            )

    @property
    def is_latent(self) -> bool:
        """True of text-to-image: a Stable Diffusion, given or trained in the run."""
        return bool(self.base.folder or self.base.pictures)

    @property
    def is_given(self) -> bool:
        """True if the model is given, not trained."""
        return bool(self.model.folder or self.lora.file)

    def _check_methods(self):
        """Raises a ValueError unless everything is there that the methods need."""
        measured = {MEASUREMENTS[name] for name in self.features.measurements}
        iterated = self.attribution.solver == "cg"
        if iterated and self.counterfactual.sets:
            raise ValueError(
                "counterfactual.sets needs kernels decomposed: attribution.solver is "
                "'cg'; it must be 'eigh'."
            )
        for name, setting in self.methods.items():
            method, folders = METHODS[name], METHODS[name].folders(self)
            of_checkpoints = any(f.startswith("checkpoints/") for f in folders)
            missing = ""
            if method.measurement not in measured | {None}:
                missing = (
                    f"features.measurements to have {method.measurement!r}; it has "
                    f"{', '.join(sorted(measured))}"
                )
            elif name.endswith("-ensemble") and not self.ensemble.models:
                missing = "further models: ensemble.models is 0; it must be 1 or more"
            elif "journey" in folders and self.queries.folder:
                missing = "each query's sampling: queries.folder must be empty"
            elif method.embeds and not self.clip.folder:
                missing = "CLIP: clip.folder is empty; it must be a CLIP model's folder"
            elif method.curved and self.features.noise == "cyclic":
                missing = "features.noise other than 'cyclic', which only queries have"
            elif of_checkpoints and self.is_given:
                missing = (
                    "checkpoints of training: model.folder and lora.file must be empty"
                )
            elif method.replays and self.is_given:
                missing = "the training: model.folder and lora.file must be empty"
            elif method.replays and not self.train.eps_root:
                missing = "train.eps_root above 0, such as 1e-8; it is 0"
            elif iterated and method.decomposed:
                missing = "kernels decomposed: attribution.solver 'eigh', not 'cg'"
            elif iterated and self.attribution.damping_of(method).share:
                missing = (
                    "kernels decomposed for its share: attribution.solver 'eigh', not "
                    "'cg', or attribution.coverage_share 0"
                )
            if missing:
                raise ValueError(f"{setting} has {name!r}, which needs {missing}.")

    @property
    def methods(self) -> dict[str, str]:
        """Every method that some stage makes, with the setting that names it."""
        removal = self.counterfactual
        return {
            **dict.fromkeys(self.attribution.methods, "attribution.methods"),
            **dict.fromkeys(removal.sets, "counterfactual.sets"),
            **dict.fromkeys(removal.squared, "counterfactual.squared"),
            **dict.fromkeys(removal.methods, "counterfactual.methods"),
        }

    @property
    def removal_methods(self) -> tuple[tuple[str, str], ...]:
        """The (method, transform) that choose what is removed, see `Choice`."""
        removal = self.counterfactual
        linear = removal.methods or self.attribution.methods
        return (
            *((name, "linear") for name in linear if name != "random"),
            *((name, "squared") for name in removal.squared),
            *((name, "set") for name in removal.sets),
        )

    @property
    def query_sets(self) -> tuple[str, ...]:
        """The sets of queries that have images, of "validation" and "generated"."""
        generated = self.queries.folder or self.sample.count
        validation = self.data.validation or self.data.validation_folder
        counts = {"validation": validation, "generated": generated}
        return tuple(name for name, count in counts.items() if count)

    @property
    def shown_methods(self) -> tuple[str, ...]:
        """The methods whose scores the report shows query by query: signed ones."""
        methods = self.attribution.methods
        signed = tuple(name for name in methods if METHODS[name].signed)
        return tuple(m for m in signed if m in self.report.methods) or signed


def flatten(config: Config) -> dict[str, object]:
    """Returns every setting by its dotted name, {"train.steps": 8000, ...}."""
    return {
        f"{section}.{name}": list(value) if isinstance(value, tuple) else value
        for section, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
    }
