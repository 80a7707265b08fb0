"""A daily window in local time, such as ``22:00-06:00``, outside of which a site does not train."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

from fedmpt.protocol.errors import FedmptError

_WINDOW = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)-([01]?\d|2[0-3]):([0-5]\d)")


class ScheduleError(FedmptError):
    """A window is not written as HH:MM-HH:MM."""


@dataclass(frozen=True)
class Window:
    """From ``start`` (included) to ``end`` (excluded), past midnight where end is before start."""

    start: datetime.time
    end: datetime.time

    def contains(self, moment: datetime.time) -> bool:
        if self.start < self.end:
            return self.start <= moment < self.end
        return moment >= self.start or moment < self.end


def parse_window(text: str) -> Window:
    """Read ``HH:MM-HH:MM``; equal times mean the whole day. Raises ScheduleError."""
    match = _WINDOW.fullmatch(text.strip())
    if not match:
        raise ScheduleError(f"window {text!r}: write it as HH:MM-HH:MM in local time, such as 22:00-06:00")
    hours = [int(part) for part in match.groups()]
    return Window(datetime.time(hours[0], hours[1]), datetime.time(hours[2], hours[3]))
