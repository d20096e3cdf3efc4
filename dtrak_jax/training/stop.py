"""Stopping on SIGINT or SIGTERM: no step is cut in two, no process left waiting.

JAX's own notifier (`multihost_utils.reached_preemption_sync_point`) does not serve
here, and `parallel.start` turns it off: it would take SIGTERM from stages that never ask
it, such as featurize; it knows nothing of SIGINT; and it needs all processes to count
the same steps, which those that train members do not.
"""

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Iterator

import jax

# The key-value store of `jax.distributed` has no public name; Orbax takes it from here.
from jax._src import distributed

POLL_SECONDS = 0.2
"""The time between two looks at whether another process was asked to stop."""


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yields an event set by the first SIGINT or SIGTERM, so that no step is cut in two.

    A second SIGINT acts as if this were not here. SIGTERM may well come twice, from
    Slurm and from the script around this, and is heard once.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, _) -> None:
        stop.set()
        if number == signal.SIGINT:
            restore()

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    numbers = signal.SIGINT, signal.SIGTERM
    handlers = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


_notices = itertools.count()


class Notice:
    """A request to stop that processes without common steps pass on to each other.

    All processes make one at the same point of the program. Its messages are kept by
    the coordination service of `jax.distributed`; the devices take no part.
    """

    def __init__(self, stop: threading.Event):
        self.stop, self.looked = stop, 0.0
        self.folder = f"dtrak_jax/notice/{next(_notices)}"
        self.client = distributed.global_state.client  # None if there is one process

    def given(self) -> bool:
        """Returns whether this process was asked to stop, or another one just before."""
        if self.client and time.monotonic() > self.looked + POLL_SECONDS:
            self._exchange()
        return self.stop.is_set()

    def barrier(self) -> bool:
        """Waits for every process; returns whether any of them was asked to stop."""
        if not self.client:
            return False
        # A process that sees all of them here must see what each was asked before.
        self._exchange()
        self._say("here")
        while len(self._said("here")) < jax.process_count():
            self.given()
            time.sleep(POLL_SECONDS)
        self._exchange()
        return self.stop.is_set()

    def _exchange(self) -> None:
        """Passes a request on, or hears of one."""
        self.looked = time.monotonic()
        if self._said("stop"):
            self.stop.set()
        elif self.stop.is_set():
            self._say("stop")

    def _say(self, what: str) -> None:
        self.client.key_value_set(f"{self.folder}/{what}/{jax.process_index()}", "")

    def _said(self, what: str) -> list:
        return self.client.key_value_dir_get(f"{self.folder}/{what}")
