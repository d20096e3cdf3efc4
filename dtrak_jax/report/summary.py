"""The summary: which groups come first over all queries, in a line each."""

from collections.abc import Iterator, Mapping

import numpy as np

from dtrak_jax.attribution.scores import Scores

LISTED = 5
"""Groups in a line."""


def summary(scores: Mapping[tuple[str, str], Scores]) -> Iterator[str]:
    """Yields the ranking of each grouping's groups, of {(method, queries): scores}.

    A grouping with a single group has none.
    """
    begun = False
    for (method, queries), s in scores.items():
        for name in s.columns:
            groups = s.group(name)
            if len(groups.names) < 2:
                continue
            if not begun:
                yield (
                    "groups over all queries, by the mean of their scores, each as a part "
                    "of the query's largest:"
                )
                begun = True
            value = groups.overall()
            first = np.argsort(-value, kind="stable")[:LISTED]
            sign = "+" if s.signed else ""
            listed = [f"{groups.names[i]} {value[i]:{sign}.2f}" for i in first]
            more = len(value) - len(first)
            listed += [f"and {more:,} more"] if more else []
            yield f"  {method}, {queries}, {name}: {', '.join(listed)}"
