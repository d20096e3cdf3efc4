"""Makes the tables of LDS by method, damping and cost; `tables.py` writes them."""

import functools
import itertools

from cells import DATA, SETS, Lines, interval, number, pick, read

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


def das() -> Lines:
    """The LDS of DAS by the number of probes, beside signed scores by the same matrices."""
    counts = (1, 2, 4, 8, 16)
    heads = ["one probe", *(f"{count} probes" for count in counts[1:])]
    heads = ["signed", "squared", *heads, "16, less signed", "16, loss's kernel"]
    lines, rows = [["data", "images", "columns", *heads]], read("das")["rows"]
    keys = "data", "queries", "dim"
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        named = dict(zip(keys, key, strict=True))
        kinds = [("gauss-newton", 0), ("gauss-newton squared", 0)]
        kinds += [("das", count) for count in counts]
        cells = [pick(rows, **named, method=m, probes=c) for m, c in kinds]
        less = interval(cells[-1]["less_signed"], "value")
        own = {"method": "das by own kernels"} | named
        own = [row for row in rows if own.items() <= row.items()]
        last = [number(row["lds"]) for row in own] or [""]
        lds = [number(row["lds"]) for row in cells]
        lines.append([*map(str, key), *lds, less, *last])
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


def ekfac() -> Lines:
    """The LDS on digits of EK-FAC beside TRAK's."""
    lines = [["method", *SETS]]
    for name, result in (("ekfac", "digits_ekfac_lds"), ("trak", "digits_lds")):
        sets = read(result)["queries"]
        rule = {"damping_rule": "oracle", "transform": "linear", "method": name}
        lines.append([name, *(interval(pick(sets[q]["rows"], **rule)) for q in SETS)])
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


TABLES = {
    "methods": methods,
    "digits lds": functools.partial(lds, "digits"),
    "digits damping": damping,
    "digits differences": lds_differences,
    "mnist lds": functools.partial(lds, "mnist"),
    "metagradients": metagradients,
    "damping rules": damping_rules,
    "gauss-newton": gauss_newton,
    "das": das,
    "gauss-newton-cg": gauss_newton_cg,
    "ekfac": ekfac,
    "cost": cost,
    "layer weights": layer_weights,
    "layer shares": layer_shares,
}
