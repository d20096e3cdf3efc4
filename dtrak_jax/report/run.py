"""Sections of the page about the run: model, features, settings, files."""

import json
from collections.abc import Mapping
from html import escape

import numpy as np
from etils import epath

from dtrak_jax import diffusion, files
from dtrak_jax.attribution.scores import Scores
from dtrak_jax.config import METHODS, Config, flatten
from dtrak_jax.features import Task
from dtrak_jax.report.figures import captioned, data_uri, spectrum, training_curve
from dtrak_jax.report.text import listed, method_name

SAMPLES = 64
"""Generated images in the grid."""

LISTED_TIMESTEPS = 12
"""With more of them, only the range is written out."""

GRADIENTS = {
    "loss": "the loss",
    "square": "the squared output",
    "mean": "the mean output",
    "l1": "the L1 norm of the output",
    "l2": "the L2 norm of the output",
    "linf": "the largest output",
    "elbo": "the loss weighted as in the ELBO",
}

NOISES = {
    "common": "At a given timestep every image gets the same noise.",
    "independent": "Every image gets noise of its own.",
    "reference": "Images in the same slot of a batch share their noise, as in the "
    "paper's code.",
    "cyclic": "A control: queries get the noise of the next timestep, so that they "
    "share none with training images.",
}

FILES = {
    "report.html": "this page",
    "config.json": "settings and versions of the run",
    "splits.npz": "ids and labels of the training and validation images",
    "metrics.jsonl": "loss, learning rate and speed of training, a line per interval",
    "checkpoints": "states of training; the last one is the model",
    "samples": "the generated images as PNG, and all of them in samples.npz",
    "features": "projected gradients of training images and queries",
    "features/distortion.json": "how far the projection changed inner products",
    "ensemble": "models trained on subsets, and the queries' losses under them",
    "lds.json": "linear datamodeling scores",
    "counterfactual.json": "what became of images without their top training images",
    "counterfactual": "the models trained without them, and their images",
    "ablations.json": "linear datamodeling scores of other choices",
    "ablations": "their features and results",
    "scores": "METHOD-QUERIES.npz: a score for each query and training image",
}


def model_section(
    workdir: epath.Path, queries: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> str:
    """The training curve and some generated images; "" if there is neither."""
    parts = []
    path = workdir / "metrics.jsonl"
    metrics = files.read_json_lines(path) if path.exists() else []
    if metrics:
        caption = (
            f"Training: the mean loss was {metrics[-1]['loss']:.3g} just before step "
            f"{metrics[-1]['step']:,}."
        )
        parts.append(captioned(training_curve(metrics), caption))
    if "generated" in queries:
        images, ids = queries["generated"]
        grid = "".join(
            f'<img src="{data_uri(image)}" alt="{escape(str(name))}" '
            f'title="{escape(str(name))}">'
            for image, name in zip(images[:SAMPLES], ids[:SAMPLES], strict=True)
        )
        caption = f"{min(SAMPLES, len(ids)):,} of {len(ids):,} generated images."
        parts.append(captioned(f'<div class="grid">{grid}</div>', caption))
    if not parts:
        return ""
    return (
        '<section id="model"><h2>The model</h2>'
        f'<div class="plots">{"".join(parts)}</div></section>'
    )


def features_section(
    config: Config, workdir: epath.Path, scores: Mapping[tuple[str, str], Scores]
) -> str:
    """What the features are, and the spectra of kernels; "" if no method uses any."""
    timesteps, kernels = _kernels(config)
    # Kernels are of the training images: the same for every set of queries.
    of_method = {method: one for (_, method), one in scores.items()}
    users: dict[str, list[str]] = {}
    for method in of_method:
        if METHODS[method]:
            users.setdefault(METHODS[method], []).append(method_name(method))
    if not users:
        return ""
    uses = listed(
        [f"{GRADIENTS[m]} ({', '.join(names)})" for m, names in users.items()]
    )
    unit = "" if config.attribution.absolute else " of a kernel's mean eigenvalue"
    with_kernels = {m: s for m, s in of_method.items() if s.eigenvalues is not None}
    plots, rows = [], []
    for method, one in with_kernels.items():
        name, size = method_name(method), one.eigenvalues.shape[1]
        dims = np.sum(one.eigenvalues / (one.eigenvalues + one.lambdas[:, None]), 1)
        spread = " to ".join(dict.fromkeys(f"{d:.0f}" for d in (min(dims), max(dims))))
        plots.append(
            captioned(
                spectrum(one.eigenvalues, one.lambdas, kernels, name),
                f"{name}: eigenvalues of the kernels. The effective dimension, the sum "
                f"of e / (e + λ), is {spread} of {size:,}.",
            )
        )
        rows += [
            f"<tr><td>{name}<td>{kernel}<td>{value:.4g}<td>{dim:.1f}"
            for kernel, value, dim in zip(kernels, one.lambdas, dims, strict=True)
        ]
    return f"""<section id="features"><h2>Features and kernels</h2>
<p>Features are gradients of {uses}, {timesteps}. {NOISES[config.features.noise]} The
damping λ is {config.attribution.damping:g}{unit}.</p>
{_distortion(config, workdir)}{_spectra(plots, rows)}</section>"""


def _spectra(plots: list[str], rows: list[str]) -> str:
    """The spectra with their table; "" without kernels."""
    if not plots:
        return ""
    return f"""<div class="plots">{"".join(plots)}</div>
<p class="note">Directions whose eigenvalue is above λ (left of the dot) shape the
scores; those below it are damped away. Eigenvalues below the plot's lower edge are
rounding errors.</p>
<details><summary>λ and effective dimension of every kernel</summary><table><thead><tr>
<th>method<th>kernel<th>λ<th>effective dimension</thead><tbody>{"".join(rows)}</tbody>
</table></details>"""


def _kernels(config: Config) -> tuple[str, list[str]]:
    """(the timesteps in words, the name of every kernel)."""
    settings = config.features
    # The task alone knows which timesteps a number and a strategy stand for.
    task = Task(
        lambda *_: None,
        diffusion.build(config.diffusion),
        timesteps=settings.timesteps,
        strategy=settings.strategy,
        draws=settings.draws,
    )
    grid = task.grid
    if len(grid) > LISTED_TIMESTEPS:
        words = f"at {len(grid):,} timesteps from {min(grid)} to {max(grid)}"
    else:
        words = f"at timestep{'s'[: len(grid) > 1]} {', '.join(map(str, grid))}"
    if settings.draws > 1:
        words += f" with {settings.draws} draws of noise each"
    if not settings.per_timestep:
        return f"{words}, averaged into one kernel", ["average"]
    names = [
        f"t = {t}, draw {draw}" if settings.draws > 1 else f"t = {t}"
        for t, draw in task.pairs
    ]
    return f"{words}, a kernel for each", names


def _distortion(config: Config, workdir: epath.Path) -> str:
    """The projection in words, with its errors if they were measured."""
    settings = config.features
    if settings.projection == "none":
        return "<p>The gradients are not projected.</p>"
    projected = (
        f"They are projected ({settings.projection}) to {settings.dim:,} dimensions."
    )
    path = workdir / "features" / "distortion.json"
    measured = files.read_json(path) if path.exists() else {}
    if not measured:
        return f"<p>{projected}</p>"
    examples = max(errors["examples"] for errors in measured.values())
    each = "; ".join(
        f"for {GRADIENTS.get(name, escape(name))} by {errors['rms']:.3f} (at most "
        f"{errors['largest']:.3f}), and squared norms by {errors['norm_rms']:.1%}"
        for name, errors in measured.items()
    )
    return (
        f"<p>{projected} Among {examples} training images this changed normalised "
        f"inner products, in root mean square, {each}. A random projection is expected "
        f"to cost about 1/√{settings.dim} = {settings.dim**-0.5:.3f} where gradients "
        "are unrelated, and more where they are alike.</p>"
    )


def configuration_section(config: Config, workdir: epath.Path) -> str:
    """All settings, and the versions that config.json names."""
    path = workdir / "config.json"
    versions = files.read_json(path)["versions"] if path.exists() else {}
    rows = [
        f"<tr><td><code>{escape(name)}</code><td>{escape(json.dumps(value))}"
        for name, value in flatten(config).items()
    ]
    rows += [
        f"<tr><td>version of {escape(name)}<td>{escape(version)}"
        for name, version in versions.items()
    ]
    return (
        '<section id="configuration"><h2>Configuration</h2><details><summary>All '
        f"settings{' and versions' if versions else ''}</summary><table><tbody>"
        f"{''.join(rows)}</tbody></table></details></section>"
    )


def files_section(workdir: epath.Path) -> str:
    """What is in the run directory, a line each."""
    rows = "".join(
        f"<dt><code>{name}</code><dd>{text}"
        for name, text in FILES.items()
        # This page is listed although it may not have been written yet.
        if name == "report.html" or (workdir / name).exists()
    )
    return (
        '<section id="files"><h2>Files in the run directory</h2>'
        f"<dl>{rows}</dl></section>"
    )
