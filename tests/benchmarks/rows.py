"""Timing of two sides in turn, and what is said of it."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one comparison found.

    Attributes:
      name: what is compared.
      ours: what was timed here.
      theirs: what was timed on the other side.
      seconds: of the repetitions, ours.
      their_seconds: of the repetitions, theirs.
      goal: ("at least", r): ours must be r times as fast; ("at most", r): ours may
        take r times their time; None where there is none.
      settings: sizes, and whatever else a reader must know.
      agreement: by how much the two sides' results differ, or what else was checked.
      items: how many things one repetition makes.
      unit: in which their rate is given, such as "images/s"; "" gives none.
      stands_for: what was timed of theirs stands for so many times as much.
    """

    name: str
    ours: str
    theirs: str
    seconds: list[float]
    their_seconds: list[float]
    goal: tuple[str, float] | None
    settings: dict
    agreement: dict
    items: int = 1
    unit: str = ""
    stands_for: float = 1.0

    def ratio(self) -> dict[str, float]:
        """Median and range over repetitions of the ratio that the goal is about."""
        pairs = zip(self.seconds, self.their_seconds, strict=True)
        faster = [theirs * self.stands_for / ours for ours, theirs in pairs]
        if self.goal and self.goal[0] == "at most":
            faster = [1 / value for value in faster]
        return {
            "median": statistics.median(faster),
            "low": min(faster),
            "high": max(faster),
        }

    def met(self) -> bool | None:
        """Whether the median meets the goal."""
        if self.goal is None:
            return None
        bound, value = self.goal
        median = self.ratio()["median"]
        return median >= value if bound == "at least" else median <= value

    def rates(self) -> tuple[float, float]:
        """Of both sides in `unit`, from their median times."""
        items = self.items * (3600 if self.unit.endswith("/hour") else 1)
        ours, theirs = map(statistics.median, (self.seconds, self.their_seconds))
        return items / ours, items / (theirs * self.stands_for)

    def as_dict(self) -> dict:
        """For the JSON file."""
        ours, theirs = self.rates()
        return dataclasses.asdict(self) | {
            "ratio": self.ratio(),
            "met": self.met(),
            "rate": ours,
            "their_rate": theirs,
        }

    def __str__(self) -> str:
        ratio = self.ratio()
        what = "times its time" if self.goal and self.goal[0] == "at most" else "times"
        text = f"{self.name}: {ratio['median']:.3g} {what}"
        text += f" ({ratio['low']:.3g} to {ratio['high']:.3g})"
        if self.goal:
            text += f", goal {self.goal[0]} {self.goal[1]:g}: "
            text += "met" if self.met() else "MISSED"
        if self.unit:
            ours, theirs = self.rates()
            text += f"; {ours:.4g} against {theirs:.4g} {self.unit}"
        return text


def in_turn(
    ours: Callable, theirs: Callable, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of both, alternating, after one call of each that does not count.

    Both must have done their work when they return, or return JAX arrays.
    """
    jax.block_until_ready(ours())
    theirs()
    seconds, their_seconds = [], []
    for _ in range(repetitions):
        seconds.append(_time(ours))
        their_seconds.append(_time(theirs))
    return {"seconds": seconds, "their_seconds": their_seconds}


def _time(function: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start
