"""Writes the tables of the documents from the results that they show.

    python configs/results/tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of
`TABLES`. A test makes every table again and compares, so that no printed figure can
differ from the committed result.
"""

import itertools
import json
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FOLDERS = (
    ".",
    "configs/results",
    "configs/results/plans",
    "launch",
    "tests/benchmarks",
)
DOCUMENTS = [ROOT / folder / "README.md" for folder in FOLDERS]
TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)

Lines = Sequence[Sequence[str]]
"""A table: its first line has the heads of the columns."""

METHODS = {
    ("trak",): "kernel score of gradients of the loss, (1/d)\\|ε̂ − ε\\|²",
    ("dtrak",): "kernel score of gradients of the output, (1/d)\\|ε̂\\|²",
    ("trak-ensemble", "dtrak-ensemble"): "the mean of these over three models",
    ("kernel-elbo", "kernel-l2", "kernel-l1", "kernel-mean", "kernel-linf"): (
        "the same kernel score of other measurements"
    ),
    ("relative-influence", "renormalised-influence", "journey-trak"): (
        "`trak` over the size of its influence, or of the training gradient; or along the "
        "path that generated the query"
    ),
    ("gauss-newton", "ekfac"): (
        "`trak` with the curvature of the whole output as its kernel; or with that of "
        "each layer, and mean gradients"
    ),
    ("coverage",): "how much of what the query needs the image holds; without a sign",
    ("gradient-dot", "gradient-cosine", "tracin", "gas"): (
        "dot products or cosines of gradients; the last two a mean over checkpoints"
    ),
    ("pixel-dot", "pixel-cosine"): "pixels alone: what a method must beat",
    ("empirical-influence", "datamodels"): "learnt from half of the retrained models",
    ("random",): "chance",
}
"""The methods of the README's table, in its order, and what they are."""
DATA = ("digits", "mnist")
NOISES = ("common", "cyclic", "reference", "independent")
KERNELS = ("apart", "pooled", "averaged", "cosine")
SETS = ("validation", "generated")
MEASUREMENTS = {"loss": "TRAK", "square": "D-TRAK"}
MEASURED = {"loss_increase": "loss increase", "pixel_l2": "distance"}
MEASURED |= {"bottleneck_cosine": "cosine in the bottleneck"}
REMOVED = {
    "pixel-cosine": "pixel-cosine",
    "dtrak": "dtrak",
    "dtrak-squared": "dtrak, largest squares",
    "trak": "trak",
    "reference": "dtrak by the paper's recipe",
    "random": "random images",
    "other-seed": "nothing, another seed",
    "everything": "nothing, the same seed",
}
IN_SETS = {
    "trak-set": "a set by trak's kernels",
    "pixel-cosine": "pixel-cosine",
    "dtrak": "dtrak, the highest scores",
    "random": "random images",
    "other-seed": "nothing, another seed",
}
"""The removals beside sets."""

COVERING = {
    "coverage-set": "the set that covers most",
    "coverage": "coverage, the highest scores",
}
"""The removals by coverage."""

CURVED = {
    "gauss-newton": "gauss-newton, the highest scores",
    "trak": "trak, the highest scores",
}
"""The removals by scores with the curvature of the output, and those of the same gradients
without it."""


def main() -> None:
    """Rewrites every document."""
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text()))


def filled(text: str) -> str:
    """Returns a document with its tables made anew."""

    def fill(found: re.Match) -> str:
        before, name, after = found.groups()
        return before + markdown(TABLES[name]()) + after

    return TABLE.sub(fill, text)


def markdown(lines: Lines) -> str:
    """Returns a table of Markdown."""
    head, *rest = lines
    rows = [head, ["---"] * len(head), *rest]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def read(name: str) -> dict:
    """Returns a result of this folder."""
    return json.loads((HERE / f"{name}.json").read_text())


def number(value: float) -> str:
    """Returns a figure with three significant digits or three decimals, as .605."""
    text = f"{value:.3f}" if abs(value) < 0.9995 else f"{value:.2f}"
    return re.sub(r"^(-?)0\.", r"\1.", text).replace("-.000", ".000").replace("-", "−")


def interval(
    row: dict, value: str = "lds", low: str = "low", high: str = "high"
) -> str:
    """Returns a figure with its interval, as .605 [.581, .628]."""
    return "{} [{}, {}]".format(*(number(row[key]) for key in (value, low, high)))


def pick(rows: list[dict], **wanted) -> dict:
    """Returns the one row with these fields."""
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    return row


def lds_row(rows: list[dict], method: str, transform: str = "linear") -> dict | None:
    """Returns the row of a method with the damping that was chosen without labels."""
    found = [
        row
        for row in rows
        if (row["method"], row["transform"]) == (method, transform)
        and row["damping_rule"] in (None, "label-free", "halves")
    ]
    return found[0] if found else None


def methods() -> Lines:
    """The methods, with the LDS of each on held-out digits."""
    validation = read("digits_lds")["queries"]["validation"]
    ceiling = number(validation["ceiling"]["value"])
    lines = [
        ["method", "what it is", "LDS on digits"],
        ["*noise ceiling*", "what the true mean losses would have", f"*{ceiling}*"],
    ]
    covering = {"queries": "validation", "measurement": "square", "draws": 1}
    covering |= {"transform": "linear", "damping_rule": "effective"}
    elsewhere = [pick(read("digits_coverage_ablations")["rows"], **covering)]
    elsewhere += read("digits_ekfac_lds")["queries"]["validation"]["rows"]
    key = {"data": "digits", "queries": "validation", "dim": 2048, "cotangents": 16}
    elsewhere.append(pick(read("gauss_newton")["rows"], **key))
    rows = validation["rows"] + [
        row | {"method": name, "damping_rule": None, "transform": "linear"}
        for name, row in zip(
            ("coverage", "ekfac", "gauss-newton"), elsewhere, strict=True
        )
    ]
    for names, said in METHODS.items():
        found = [lds_row(rows, name) for name in names]
        figures = [number(row["lds"]) if row else "generated only" for row in found]
        lines.append([", ".join(f"`{n}`" for n in names), said, ", ".join(figures)])
    return lines


def lds(data: str) -> Lines:
    """The LDS of every method of a data set, for both sets of queries."""
    sets = read(f"{data}_lds")["queries"]
    columns = [(q, t) for t in ("linear", "squared") for q in sets]
    ceilings = [f"*{interval(one['ceiling'], 'value')}*" for one in sets.values()]
    lines = []
    for name in dict.fromkeys(row["method"] for row in sets["generated"]["rows"]):
        rows = [lds_row(sets[q]["rows"], name, t) for q, t in columns]
        cells = [interval(row) if row else "" for row in rows]
        lines.append((-rows[1]["lds"], [name, *cells]))
    head = ["method", *(q if t == "linear" else f"{q}, squared" for q, t in columns)]
    ceiling = ["*noise ceiling*", *ceilings, "", ""]
    return [head, ceiling, *(line for _, line in sorted(lines))]


def damping() -> Lines:
    """The LDS on digits by the rule that chooses the damping."""
    rows = read("digits_lds")["queries"]["validation"]["rows"]
    rows = [row for row in rows if row["transform"] == "linear"]
    chosen = ("label-free", "cross-fitted", "oracle")
    lines = [["method", *chosen]]
    for name in [row["method"] for row in rows if row["damping_rule"] == "oracle"]:
        own = [pick(rows, damping_rule=rule, method=name) for rule in chosen]
        lines.append([name, *map(interval, own)])
    return lines


def lds_differences() -> Lines:
    """The paired differences of D-TRAK and other methods on digits."""
    sets = read("digits_lds")["queries"]
    lines = [["D-TRAK minus", *(f"{name} queries" for name in sets)]]
    for other in ("trak", "gradient-cosine", "pixel-cosine"):
        rows = [pick(one["differences"], b=other) for one in sets.values()]
        lines.append([other, *(interval(row, "value") for row in rows)])
    return lines


def metagradients() -> Lines:
    """The LDS on digits of exact metagradients and of kernel scores, by what is left out."""
    rows, said = read("digits_metagradient")["rows"], {"metagradient": "metagradient"}
    said |= {"trak": "TRAK", "dtrak": "D-TRAK", "losses": "the other training's losses"}
    counts = dict.fromkeys(row["dropped"] for row in rows)
    lines = [["training", "predicted by", *(f"{n} images left out" for n in counts)]]
    for seed, (method, text) in itertools.product(("same", "other"), said.items()):
        own = [r for r in rows if (r["seed"], r["method"]) == (seed, method)]
        cells = [interval(r) if "low" in r else number(r["lds"]) for r in own]
        lines += [[f"{seed} seed", text, *cells]] if own else []
    return lines


def study(data: str, name: str, rule: str | None = "cross-fitted", **fields) -> list:
    """Returns the rows of a study: held-out images, first seed, one rule for damping."""
    wanted = {"name": name, "queries": "validation", "seed": 0, "transform": "linear"}
    wanted |= fields
    rows = read(f"{data}_ablations")["rows"]
    rows = [row for row in rows if wanted.items() <= row.items()]
    return [row for row in rows if row["damping_rule"] in (None, rule)]


def both(rows: list[dict], **fields) -> list[str]:
    """Returns the cells of TRAK and D-TRAK for the rows with these fields."""
    return [interval(pick(rows, measurement=m, **fields)) for m in MEASUREMENTS]


def headline() -> Lines:
    """The LDS on digits by the noise of the gradients, where they are kept apart."""
    rows = study("digits", "noise", kernel="apart")
    said = {
        "common": "shared by all images",
        "independent": "drawn for every image",
        "cyclic": "shared, but the queries' shifted by one draw",
    }
    lines = [[text, *both(rows, noise=name)] for name, text in said.items()]
    return [["noise of the gradients", *MEASUREMENTS.values()], *lines]


def noise() -> Lines:
    """The LDS by noise and kernel, on two data sets."""
    heads = [f"{d} {label}" for d in DATA for label in MEASUREMENTS.values()]
    ceilings = []
    for d in DATA:
        ceiling = interval(read(f"{d}_ablations")["ceiling"]["validation"], "value")
        ceilings += [f"*{ceiling}*", ""]
    rows = [study(d, "noise") for d in DATA]
    lines = [["noise", "kernel", *heads], ["*noise ceiling*", "", *ceilings]]
    for name in NOISES:
        for kernel in KERNELS:
            cells = [both(one, noise=name, kernel=kernel) for one in rows]
            lines.append([name, kernel, *itertools.chain(*cells)])
    return lines


def rules() -> Lines:
    """The LDS with common noise by the rule for the damping, and of squared scores."""
    columns = {
        "label-free": {"rule": "label-free"},
        "cross-fitted": {},
        "oracle": {"rule": "oracle"},
        "squared, label-free": {"rule": "label-free", "transform": "squared"},
    }
    lines = [["data", "kernel", "measurement", *columns]]
    for d in DATA:
        rows = [study(d, "noise", noise="common", **key) for key in columns.values()]
        for kernel in ("apart", "pooled"):
            cells = zip(*(both(one, kernel=kernel) for one in rows), strict=True)
            for label, own in zip(MEASUREMENTS.values(), cells, strict=True):
                lines.append([d, kernel, label, *own])
    return lines


def draws() -> Lines:
    """The LDS against the number of draws at one timestep."""
    rows = study("digits", "draws")
    counts = sorted({row["draws"] for row in rows})
    keys = dict.fromkeys((r["noise"], r["kernel"], r["measurement"]) for r in rows)
    lines = [["noise", "kernel", "measurement", *map(str, counts)]]
    for name, kernel, measurement in sorted(keys):
        key = {"noise": name, "kernel": kernel, "measurement": measurement}
        own = {r["draws"]: number(r["lds"]) for r in rows if key.items() <= r.items()}
        cells = (own.get(count, "") for count in counts)
        lines.append([name, kernel, MEASUREMENTS[measurement], *cells])
    return lines


def studies() -> Lines:
    """The LDS by timesteps, projection and checkpoint, on digits with common noise."""
    described = {
        "timesteps": lambda row: ", ".join(map(str, row["timesteps"])),
        "projection": lambda row: f"{row['projection']} of dimension {row['dim']}",
        "checkpoint": lambda row: f"step {row['checkpoint']}",
    }
    lines = [["study", "choice", "kernel", *MEASUREMENTS.values()]]
    for name, text in described.items():
        rows = [row | {"choice": text(row)} for row in study("digits", name)]
        choices = dict.fromkeys((row["choice"], row["kernel"]) for row in rows)
        for choice, kernel in sorted(choices, key=lambda pair: in_order(pair[0])):
            cells = both(rows, choice=choice, kernel=kernel)
            lines.append([name, choice, kernel, *cells])
    return lines


def in_order(choice: str) -> list[int]:
    """Returns the whole numbers in a choice, by which choices are sorted."""
    return [int(text) for text in re.findall(r"\d+", choice)]


def measurements() -> Lines:
    """The LDS by measurement, on digits with common noise."""
    rows = study("digits", "measurement")
    kernels = ("apart", "averaged")
    apart = [row for row in rows if row["kernel"] == "apart"]
    lines = [["measurement", *kernels]]
    for best in sorted(apart, key=lambda row: -row["lds"]):
        name = best["measurement"]
        own = [pick(rows, measurement=name, kernel=kernel) for kernel in kernels]
        lines.append([name, *map(interval, own)])
    return lines


def removals(part: str) -> list[dict]:
    """Returns "rows" or "summary" of both runs; the second one has "reference"."""
    reference = [
        row | {"method": "reference"}
        for row in read("digits_reference_counterfactual")[part]
        if row["method"] == "dtrak"
    ]
    return read("digits_counterfactual")[part] + reference


def removal() -> Lines:
    """Returns the table of what removing 200 training images did to generated digits."""
    rows, lines = removals("summary"), [["removed", *MEASURED.values()]]
    for name, text in REMOVED.items():
        own = [pick(rows, method=name, metric=metric) for metric in MEASURED]
        cells = [interval(row, "mean", "mean_low", "mean_high") for row in own]
        lines.append([text, *cells])
    return lines


def removal_differences() -> Lines:
    """Returns the table of how much more one removal did than another, image by image."""
    rows = removals("rows")
    by_method = {m: [row for row in rows if row["method"] == m] for m in REMOVED}
    pairs = [("dtrak", name) for name in ("trak", "dtrak-squared", "reference")]
    pairs.append(("pixel-cosine", "dtrak"))
    return differences(
        [(REMOVED[a], by_method[a], REMOVED[b], by_method[b]) for a, b in pairs]
    )


def differences(pairs: Sequence[tuple]) -> Lines:
    """The metrics of (a removal, its rows) less those of another, query by query."""
    lines = [["removed", "compared with", *MEASURED.values()]]
    for text, ours, other, theirs in pairs:
        cells = []
        for metric in MEASURED:
            values = [(a[metric], b[metric]) for a, b in zip(ours, theirs, strict=True)]
            cells.append(interval(paired(np.subtract(*np.transpose(values))), "value"))
        lines.append([text, other, *cells])
    return lines


def coverage() -> Lines:
    """The LDS of coverage: of its scores, and of each subset's own."""
    scores, exact = {"transform": "linear"}, {"transform": "exact"}
    columns = {
        "scores": scores | {"damping_rule": "label-free"},
        "scores, λ by share": scores | {"damping_rule": "effective"},
        "exact, λ by share": exact | {"damping_rule": "effective"},
        "exact, λ cross-fitted": exact | {"damping_rule": "cross-fitted"},
    }
    lines = [["data", "images", "readout", "gradients", *columns]]
    for data, name in itertools.product(DATA, SETS):
        rows = read(f"{data}_coverage_ablations")["rows"]
        for measurement, draws in sorted(
            {(r["measurement"], r["draws"]) for r in rows}
        ):
            key = {"queries": name, "measurement": measurement, "draws": draws}
            cells = [interval(pick(rows, **key, **c)) for c in columns.values()]
            lines.append([data, name, f"`{measurement}`", str(5 * draws), *cells])
    return lines


def damping_rules() -> Lines:
    """The LDS of signed scores, kernels apart, by the rule that chooses lambda."""
    rows = read("damping_rules")["rows"]
    shares = list(rows[0]["shares"])
    heads = [
        "best multiple",
        "a tenth",
        *(f"share {share.lstrip('0')}" for share in shares),
    ]
    lines = [["data", "images", "readout", *heads]]
    for row in rows:
        multiples = [value for value in row["multiples"].values() if value is not None]
        values = [max(multiples), row["multiples"]["0.1"], *row["shares"].values()]
        cells = ["" if value is None else number(value) for value in values]
        named = row["data"], row["queries"], f"`{row['measurement']}`"
        lines.append([*named, *cells])
    return lines


def gauss_newton() -> Lines:
    """The LDS with Gauss-Newton matrices, beside TRAK's of the same features."""
    heads = ["ten times λ", "100 times", "less TRAK", "less TRAK, pooled"]
    lines = [["data", "images", "columns", "kernel", "gradients", "LDS", *heads]]
    for row in read("gauss_newton")["rows"]:
        said = f"TRAK, {row['kernel']}"
        if row["method"] == "gauss-newton":
            said = f"of {row['cotangents'] or 'all'} cotangents"
        own = [row.get(f"less_{kernel}") for kernel in ("apart", "pooled")]
        compared = [interval(one, "value") if one else "" for one in own]
        beside = row.get("by_damping", {})
        others = [number(beside[d]) if d in beside else "" for d in ("0.01", "0.1")]
        named = row["data"], row["queries"], str(row["dim"]), said
        cells = str(row["gradients"]), interval(row), *others
        lines.append([*named, *cells, *compared])
    return lines


def cost() -> Lines:
    """The LDS on digits by every way to spend gradients of the loss."""
    rows = [r for r in read("cost")["rows"] if r["damping_rule"] == "cross-fitted"]
    columns = list(itertools.product(SETS, ("apart", "pooled")))
    lines = [["way", "models", "gradients", *(f"{q}, {k}" for q, k in columns)]]
    for key in dict.fromkeys((r["way"], r["models"], r["gradients"]) for r in rows):
        named = dict(zip(("way", "models", "gradients"), key, strict=True))
        cells = [pick(rows, **named, queries=q, kernel=k) for q, k in columns]
        lines.append([*map(str, key), *map(interval, cells)])
    return lines


def layer_weights() -> Lines:
    """The LDS of scores without weights of layers, and what these add."""
    heads = ["blocks", "modules", "blocks, top 50", "blocks, top 100", "by labels"]
    lines = [["data", "images", "kernel", "λ", "no weights", *heads]]
    ways = [("blocks", 10), ("modules", 10), ("blocks", 50), ("blocks", 100)]
    for data in DATA:
        rows, share = (read("layer_weights")[part] for part in (data, "shares"))
        for plain in (row for row in rows if row["groups"] == "none"):
            same = {k: plain[k] for k in ("method", "queries", "damping_rule")}
            cells = [interval(plain)]
            for groups, top in ways:
                gain = pick(rows, groups=groups, top=top, **same)["gain"]
                cells.append(interval(gain, "value"))
            labelled = pick(rows, groups="blocks by labels", **same)["gain"]
            effective = f"share {share[data]:g}".replace("0.", ".")
            rule = {"label-free": "a tenth", "effective": effective}
            kernel = same["method"].removesuffix("-layers")
            named = [data, same["queries"], kernel, rule[same["damping_rule"]]]
            lines.append([*named, *cells, number(labelled["value"])])
    return lines


def layer_shares() -> Lines:
    """The weight and share of each block of digits' network."""
    columns = {}
    for row in read("layer_weights")["digits"]:
        wanted = row["groups"], row.get("top"), row["damping_rule"]
        if wanted == ("blocks", 10, "label-free"):
            columns[f"{row['method']}, {row['queries']}"] = row["layers"]
    lines = [["block", *columns]]
    for block in next(iter(columns.values())):
        pairs = [layers[block] for layers in columns.values()]
        lines.append([block, *(f"{w:.2f} ({share:.0%})" for w, share in pairs)])
    return lines


def ekfac() -> Lines:
    """The LDS on digits of EK-FAC beside TRAK's."""
    lines = [["method", *SETS]]
    for name, result in (("ekfac", "digits_ekfac_lds"), ("trak", "digits_lds")):
        sets = read(result)["queries"]
        rule = {"damping_rule": "oracle", "transform": "linear", "method": name}
        lines.append([name, *(interval(pick(sets[q]["rows"], **rule)) for q in SETS)])
    return lines


def gauss_newton_cg() -> Lines:
    """The LDS on digits of conjugate gradients on the Gauss-Newton matrix, beside EK-FAC and
    TRAK on the same queries."""
    heads = ["images", "queries", "method", "λ", "iterations", "residual", "seconds"]
    lines = [[*heads, "LDS", "less ekfac", "less trak"]]
    rows = read("digits_gauss_newton_cg")["rows"]
    for row in sorted(rows, key=lambda row: SETS.index(row["queries"])):
        named = row["queries"], str(row["count"]), row["method"]
        how = number(row["damping"]), str(row["iterations"] or "")
        residual = number(row["residual"]) if "residual" in row else ""
        less = (row.get(f"less_{other}") for other in ("ekfac", "trak"))
        cells = [interval(one, "value") if one else "" for one in less]
        taken = residual, f"{row['processor_seconds']:.0f}", interval(row)
        lines.append([*named, *how, *taken, *cells])
    return lines


def sets(result: str) -> Lines:
    """What the removal of a set did to generated digits, beside other removals."""
    rows, lines = read(result)["summary"], [["removed", *MEASURED.values()]]
    for name, text in IN_SETS.items():
        own = [pick(removed(rows, name), metric=metric) for metric in MEASURED]
        cells = [interval(row, "mean", "mean_low", "mean_high") for row in own]
        lines.append([text, *cells])
    return lines


def set_differences(result: str) -> Lines:
    """How much more the removal of a set did than another, image by image."""
    rows = read(result)["rows"]
    pairs = [("trak-set", "pixel-cosine"), ("trak-set", "dtrak")]
    return differences(
        [(IN_SETS[a], removed(rows, a), IN_SETS[b], removed(rows, b)) for a, b in pairs]
    )


def removals_beside_sets(of: str, said: dict[str, str]) -> Lines:
    """What some removals did, and how much more than others on the same pictures."""
    result = read(of)
    queries = result["settings"]["queries"]
    lines = [["removed", "", *MEASURED.values()]]
    for name, text in said.items():
        own = [pick(removed(result["summary"], name), metric=m) for m in MEASURED]
        cells = [interval(row, "mean", "mean_low", "mean_high") for row in own]
        lines.append([text, "", *cells])
    others = read("digits_sets_counterfactual")["rows"]
    others = [row for row in others if row.get("query") in queries]
    pairs = [
        (text, removed(result["rows"], name), IN_SETS[other], removed(others, other))
        for name, text in said.items()
        for other in ("trak-set", "pixel-cosine", "dtrak")
    ]
    _, *compared = differences(pairs)
    return lines + [[text, f"less {other}", *rest] for text, other, *rest in compared]


def removed(rows: Sequence[dict], name: str) -> list[dict]:
    """Returns the rows of one removal, such as "trak-set"."""
    method, _, rule = name.rpartition("-")
    key = (method, "set") if rule == "set" else (name, "linear")
    return [row for row in rows if (row["method"], row["transform"]) == key]


def paired(differences: np.ndarray) -> dict:
    """Returns the mean and its 95% interval over 10,000 resamples."""
    shape = (10_000, len(differences))
    draws = np.random.default_rng(0).integers(len(differences), size=shape)
    low, high = np.percentile(differences[draws].mean(axis=1), [2.5, 97.5])
    return {"value": differences.mean(), "low": low, "high": high}


TABLES: dict[str, Callable[[], Lines]] = {
    "methods": methods,
    "headline": headline,
    "digits lds": lambda: lds("digits"),
    "digits damping": damping,
    "digits differences": lds_differences,
    "mnist lds": lambda: lds("mnist"),
    "metagradients": metagradients,
    "noise": noise,
    "rules": rules,
    "draws": draws,
    "studies": studies,
    "measurements": measurements,
    "removal": removal,
    "removal differences": removal_differences,
    "coverage": coverage,
    "damping rules": damping_rules,
    "gauss-newton": gauss_newton,
    "cost": cost,
    "ekfac": ekfac,
    "gauss-newton-cg": gauss_newton_cg,
    "layer weights": layer_weights,
    "layer shares": layer_shares,
    "covering removals": lambda: removals_beside_sets(
        "digits_coverage_counterfactual", COVERING
    ),
    "gauss-newton removals": lambda: removals_beside_sets(
        "digits_gauss_newton_counterfactual", CURVED
    ),
    "sets": lambda: sets("digits_sets_counterfactual"),
    "set differences": lambda: set_differences("digits_sets_counterfactual"),
    "small sets": lambda: sets("digits_small_sets_counterfactual"),
    "small set differences": lambda: set_differences(
        "digits_small_sets_counterfactual"
    ),
    **runpy.run_path(str(HERE / "plans" / "table.py"))["TABLES"],
    **runpy.run_path(str(ROOT / "tests" / "benchmarks" / "table.py"))["TABLES"],
}

if __name__ == "__main__":
    main()
