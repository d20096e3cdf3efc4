"""Makes the tables of the ablations' LDS; `tables.py` writes them."""

import itertools
import re

from cells import DATA, SETS, Lines, interval, number, pick, read

NOISES = ("common", "cyclic", "reference", "independent")
KERNELS = ("apart", "pooled", "averaged", "cosine")
MEASUREMENTS = {"loss": "TRAK", "square": "D-TRAK"}


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


TABLES = {
    "headline": headline,
    "noise": noise,
    "rules": rules,
    "draws": draws,
    "studies": studies,
    "measurements": measurements,
    "coverage": coverage,
}
