"""Signals that ask a command to stop, as an event that its loops look at."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stop(threading.Event):
    """Set by a signal; ``number`` is that of the last one, 0 before."""

    number = 0


@contextlib.contextmanager
def stop_on(*numbers: int) -> Iterator[Stop]:
    """An event that these signals set, instead of ending the process; the handlers before are restored."""
    stop = Stop()

    def handle(number: int, frame: object) -> None:
        stop.number = number
        stop.set()

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
