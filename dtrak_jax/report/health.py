"""Health: may a reader believe the page? Each check is a finding in words."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import scipy.stats

from dtrak_jax.attribution.scores import Scores
from dtrak_jax.data import trained_on
from dtrak_jax.evaluation.changes import NOT_REMADE, Remade, remade
from dtrak_jax.report.record import Record
from dtrak_jax.report.standing import Standing
from dtrak_jax.report.text import between, grouped, method_name, number
from dtrak_jax.report.trust import HEADLINES

EVERYWHERE = 0.25
"""A training image that is first for more than this share of queries is suspicious."""

CHANCE = 0.05
"""The share of queries for which something stands out by chance."""


class Finding(NamedTuple):
    """A check's outcome: "good", "bad", or "open" where nobody can know yet."""

    verdict: str
    title: str
    text: str


def is_untrained(record: Record) -> bool:
    """Returns whether the model is known to have learnt next to nothing."""
    return record.learning is not None and record.learning.is_nothing


def remaking(record: Record) -> Remade | None:
    """Returns whether retraining makes the model again; None where nobody tried."""
    removal = record.counterfactual
    return remade(removal["summary"]) if removal else None


def alarm(record: Record) -> str:
    """Returns what a reader must know before all else; "" if there is nothing."""
    if is_untrained(record):
        return (
            "The model has learnt next to nothing of these images. Nothing on this page "
            "is evidence of what stands behind a picture."
        )
    made = remaking(record)
    if made and not made.is_remade:
        return NOT_REMADE
    verdicts = {finding.verdict for finding in _lds(record)}
    if verdicts == {"bad"}:
        return (
            "The scores do not predict what retraining does: their LDS is no different "
            "from chance. Do not take them for influence."
        )
    return ""


def findings(
    record: Record, standings: Mapping[str, Mapping[str, Standing]]
) -> list[Finding]:
    """Returns all checks of a page, the bad ones first."""
    by_method = grouped(
        (s for of_set in record.scores.values() for s in of_set.values()),
        lambda scores: scores.method,
    )
    checks = [_training(record), *_remaking(record), *_lds(record)]
    checks += _standing(standings, is_untrained(record))
    checks += [_first(method, scores) for method, scores in by_method.items()]
    checks += _copies(record)
    order = ("bad", "open", "good")
    return sorted(checks, key=lambda finding: order.index(finding.verdict))


def _training(record: Record) -> Finding:
    """Says whether the model was trained."""
    title, learning = "Was the model trained?", record.learning
    if learning is None:
        return Finding(
            "open",
            title,
            "Nothing here tells: its loss is not known at enough timesteps.",
        )
    loss = f"the mean squared error of training images is {learning.loss:.3g}"
    if record.metrics:
        first, last = record.metrics[0], record.metrics[-1]
        loss += f" at step {last['step']:,}"
        if len(record.metrics) > 1:
            loss += f" ({first['loss']:.3g} at step {first['step']:,})"
    told = f"{loss}; knowing only their mean and spread would give {learning.baseline:.3g}."
    if learning.is_nothing:
        text = f"Hardly: {told} No score on this page is evidence of anything."
        return Finding("bad", title, text)
    return Finding("good", title, f"Yes: {told}")


def _remaking(record: Record) -> Iterator[Finding]:
    """Says whether retraining makes the model again, if it was tried."""
    title, made = "Does retraining make the model again?", remaking(record)
    if made and made.is_remade:
        yield Finding("good", title, f"Yes: {made.sentence}.")
    elif made:
        text = (
            f"No: {made.sentence}. Neither removal nor an LDS of models that are trained "
            "so tells anything of this one. Are they trained as it was, and pictures "
            "generated from the same seeds?"
        )
        yield Finding("bad", title, text)


def _lds(record: Record) -> Iterator[Finding]:
    """Says whether scores predict what retraining does, better than chance."""
    title = "Do the scores predict what retraining does?"
    if not record.lds:
        how = (
            "; dtrak-jax retrain and dtrak-jax lds measure it" if record.is_run else ""
        )
        yield Finding("open", title, f"Nobody has measured it for this model{how}.")
        return
    made = remaking(record)
    if made and not made.is_remade:
        text = "Not known: the LDS is of models that retraining does not make like this one."
        yield Finding("open", title, text)
        return
    methods = {method for of_set in record.scores.values() for method in of_set}
    for name, result in record.lds["queries"].items():
        for row in result["rows"]:
            shown = row["method"] in methods and row["damping_rule"] in HEADLINES
            if not shown or row["transform"] != "linear" or row["lds"] is None:
                continue
            better = row["low"] > 0
            text = (
                f"{method_name(row['method'])}, {name} images: the LDS is "
                f"{number(row['lds'])} {between(row['low'], row['high'])}, "
                f"{'better than' if better else 'no different from'} chance, which is 0."
            )
            yield Finding("good" if better else "bad", title, text)


def _standing(
    standings: Mapping[str, Mapping[str, Standing]], untrained: bool
) -> Iterator[Finding]:
    """Says for how many queries some training image stands out, method by method."""
    title = "Does any training image stand out?"
    judged_sets = [(m, n, s) for n, of in standings.items() for m, s in of.items()]
    for method, of_method in grouped(judged_sets, lambda judged: judged[0]).items():
        told, often, judged = [], False, True
        for _, name, standing in of_method:
            if standing.supporting is None:
                told.append(f"{name} images are not judged: {standing.why}")
                judged = False
                continue
            has_one = standing.supporting.any(axis=1)
            hits, total = int(has_one.sum()), len(has_one)
            chance = scipy.stats.binom.ppf(0.95, total, CHANCE)
            often |= hits > chance
            told.append(
                f"for {hits:,} of {total:,} {name} images"
                + (", more than the one in 20 by chance" if hits > chance else "")
            )
        if judged and not often:
            told[-1] += "; no more than the one in 20 by chance"
        if judged or not untrained:
            text = f"{method_name(method)}: {'; '.join(told)}."
            yield Finding("good" if often else "open", title, text)


def _first(method: str, scores: list[Scores]) -> Finding:
    """Says whether one image comes first for many queries."""
    title = "Does one image come first everywhere?"
    firsts = np.concatenate([s.scores.argmax(axis=1) for s in scores])
    index, count = Counter(firsts.tolist()).most_common(1)[0]
    text = (
        f"{method_name(method)}: {scores[0].train_ids[index]} is first for "
        f"{count:,} of {len(firsts):,} queries"
    )
    if count > max(2, EVERYWHERE * len(firsts)):
        return Finding(
            "bad",
            title,
            f"{text}. Either the queries are much alike, or it is high for anything "
            "and says little of any one query.",
        )
    return Finding("good", title, f"{text}, and none is more often.")


def _copies(record: Record) -> Iterator[Finding]:
    """Says which queries are training images, if any are."""
    for name, images in record.queries.items():
        same = trained_on(images, record.train)
        copies = [str(images.ids[i]) for i, ids in enumerate(same) if ids]
        if copies:
            yield Finding(
                "bad",
                "Are queries training images?",
                f"{len(copies):,} of {len(images.ids):,} {name} images are, pixel for "
                f"pixel, such as {copies[0]}: such a query ranks itself first.",
            )
