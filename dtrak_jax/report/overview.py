"""The overview: for how many queries something stands out, and whose images lead."""

from collections.abc import Mapping, Sequence

from dtrak_jax.report.standing import Standing


def overview(
    standings: Mapping[str, Mapping[str, Standing]], groupings: Sequence[Mapping]
) -> dict:
    """Returns a row for each set of queries and method, and a ranking for each grouping.

    A row counts the queries for which an image, or a group of each column, stands out.
    The rankings are of the first set and its first method.
    """
    rows = []
    for name, of_set in standings.items():
        views = [grouping["sets"][name] for grouping in groupings]
        for method, standing in of_set.items():
            above = standing.supporting
            hits = [None if above is None else int(above.any(axis=1).sum())]
            hits += [view["methods"][method]["above"] for view in views]
            total = None if above is None else len(above)
            counts = [
                "not judged" if hit is None else f"{hit:,} of {total:,}" for hit in hits
            ]
            rows.append({"set": name, "method": method, "counts": counts})
    return {
        "columns": [f"a {grouping['column']}" for grouping in groupings],
        "rows": rows,
        "rankings": [_first(grouping) for grouping in groupings],
    }


def _first(grouping: Mapping) -> tuple[str, dict, dict]:
    """Returns a grouping's column, and what the first method says of the first set."""
    name, view = next(iter(grouping["sets"].items()))
    method, of_method = next(iter(view["methods"].items()))
    shown = {"set": name, "method": method, "total": len(view["own"])}
    return grouping["column"], shown, of_method
