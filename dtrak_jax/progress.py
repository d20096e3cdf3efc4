"""Progress of long work: a bar that moves, or plain lines where nobody looks on."""

import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Self

import jax
from tqdm import TqdmWarning

with warnings.catch_warnings():
    # A notebook without ipywidgets has bars of text, which need no advice.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm import auto

EVERY = 30
"""Seconds between two plain lines; what takes less has none."""


def progress(
    iterable: Iterable | None = None,
    desc: str = "",
    total: int | None = None,
    unit: str = "it",
    initial: int = 0,
    delay: float = 0,
) -> "auto.tqdm | Lines":
    """Returns what shows progress, used like tqdm: iterated over, or by `with` and update.

    It is tqdm's bar in a terminal or a notebook, and lines of text elsewhere, as in a log
    file. Only the main process shows any.

    Args:
      iterable: what to go through, if anything.
      desc: what is being done.
      total: the number of steps, if `iterable` has no length.
      unit: the name of a step.
      initial: steps that were done before.
      delay: seconds before a bar appears.
    """
    # A process that is alone needs not be asked, which would start all devices.
    quiet = jax.distributed.is_initialized() and jax.process_index() > 0
    how = {"unit": unit, "initial": initial, "delay": delay, "disable": quiet}
    if not in_notebook():
        if not sys.stderr.isatty():
            return Lines(iterable, desc, total, unit, initial, quiet)
        # tqdm shows nothing in a terminal that does not know its size.
        how["ncols"], how["nrows"] = shutil.get_terminal_size()
    bar = auto.tqdm(iterable, desc, total, **how)
    # A bar inside another one goes when it is done.
    bar.leave = quiet or bar.pos == 0
    return bar


def counted(number: int, noun: str) -> str:
    """Returns a number of things in words, such as "1 query" or "2,000 queries"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook, such as Colab's."""
    return "ipykernel.zmqshell" in sys.modules


class Lines:
    """Progress as plain lines: one every `EVERY` seconds, and after these one at the end."""

    def __init__(
        self,
        iterable: Iterable | None,
        desc: str,
        total: int | None,
        unit: str,
        initial: int,
        quiet: bool,
    ):
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self.iterable, self.desc, self.total, self.unit = iterable, desc, total, unit
        self.n, self.quiet, self.postfix = initial, quiet, ""
        self.start, self.closed = time.monotonic(), threading.Event()
        self.first: tuple[float, int] | None = None

    def __iter__(self) -> Iterator:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def __enter__(self) -> Self:
        # A step may take long, as the first one does that compiles.
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Counts n more steps."""
        self.n += n
        # The first step may compile, and says nothing of the others' time.
        self.first = self.first or (time.monotonic(), self.n)

    def tell(self) -> None:
        """Prints a line of what is done by now."""
        self._print(*self._speed(time.monotonic()))

    def close(self) -> None:
        """Prints the last line, if all took `EVERY` seconds or more."""
        self.closed.set()
        seconds = time.monotonic() - self.start
        if seconds >= EVERY:
            self._print(f"took {clock(seconds)}")

    def set_postfix_str(self, text: str) -> None:
        """Sets what the next lines end with."""
        self.postfix = text

    def set_postfix(self, **values: Any) -> None:
        """Sets what the next lines end with, as name=value."""
        self.postfix = ", ".join(f"{name}={value}" for name, value in values.items())

    def _watch(self) -> None:
        """Prints a line every `EVERY` seconds until all is done."""
        while not self.closed.wait(EVERY):
            self.tell()

    def _speed(self, now: float) -> list[str]:
        """Returns the time of a step and of all that are left, as far as they are known."""
        start, steps = self.first or (now, self.n)
        if self.n == steps:
            return []
        seconds = max(now - start, 1e-9) / (self.n - steps)
        per = f"{seconds:.1f} s/{self.unit}"
        facts = [f"{1 / seconds:.1f} {self.unit}s/s" if seconds < 1 else per]
        if self.total is not None:
            facts.append(f"{clock(seconds * (self.total - self.n))} left")
        return facts

    def _print(self, *facts: str) -> None:
        """Prints a line of what is done and these facts."""
        done = counted(self.n, self.unit)
        if self.total is not None:
            done = f"{self.n}/{counted(self.total, self.unit)}"
        parts = [done, *facts, self.postfix]
        if not self.quiet:
            # In one piece, as two threads may print.
            sys.stderr.write(f"{self.desc}: {', '.join(filter(None, parts))}\n")


def clock(seconds: float) -> str:
    """Returns seconds as minutes:seconds, or with hours before them."""
    return auto.tqdm.format_interval(seconds)
