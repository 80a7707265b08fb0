"""The round state machine: plain functions on plain data, with time passed in (Unix seconds).

A round opens when enough clients are present, and closes at its quorum, or at its deadline if any update came.
A deadline without any update renews the round: the same base state, the clients chosen anew. A round is renewed, too,
where all its chosen clients have left, were refused, or (without a deadline) muted before any update came.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from fedmpt.protocol.errors import FedmptError

MAXIMUM_CHOSEN = 10_000  # the round message names them all


class RoundError(FedmptError):
    """A setting of the rounds is out of range."""


@dataclass(frozen=True)
class RoundSettings:
    """How many rounds, whether round 0 calibrates, and whom a round waits for.

    ``fraction`` of the clients present is chosen, but at least ``clients_min``, without whom no round opens.
    ``quorum`` is the fraction of the chosen whose updates close the round; ``deadline`` is the seconds after
    which it closes with what it has (None: never). ``seed`` draws the choice.
    """

    rounds: int
    calibrate: bool
    clients_min: int = 1
    fraction: float = 1.0
    quorum: float = 1.0
    deadline: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        in_range = {
            "rounds must be 1 to 100000": 1 <= self.rounds <= 100_000,
            "the least number of clients must be 1 to 10000": 1 <= self.clients_min <= MAXIMUM_CHOSEN,
            "the fraction of clients must be above 0 and at most 1": 0 < self.fraction <= 1,
            "the quorum must be above 0 and at most 1": 0 < self.quorum <= 1,
            "the deadline must be positive": self.deadline is None or 0 < self.deadline < math.inf,
        }
        for text, good in in_range.items():
            if not good:
                raise RoundError(f"round settings: {text}")


@dataclass(frozen=True)
class RoundState:
    """Where the federation stands; ``opened`` is None while round ``number`` waits for clients.

    ``edition`` grows with every change, beyond a restart and beyond a store that was begun anew (see ``edit``).
    """

    number: int
    phase: str
    opened: float | None
    deadline: float | None
    chosen: tuple[str, ...]
    edition: int = 0


def first_round(settings: RoundSettings) -> RoundState:
    """The state before anybody has trained: round 0 if it is to calibrate, else round 1."""
    return _waiting(0 if settings.calibrate else 1, settings)


def edit(before: RoundState, after: RoundState, now: float) -> RoundState:
    """``after`` as the successor of ``before``: its edition is the time in milliseconds, or one more than before.

    So editions grow though a clock is set back, and a store that is begun anew goes on above the old one.
    """
    return replace(after, edition=max(before.edition + 1, int(now * 1000)))


def following_round(state: RoundState, settings: RoundSettings, now: float) -> RoundState:
    """The state after ``state``'s round has closed: the next round waits, or all is finished."""
    return edit(state, _waiting(state.number + 1, settings), now)


def renewed_round(state: RoundState, now: float) -> RoundState:
    """The same round waiting anew, where no update came or can come."""
    return edit(state, replace(state, opened=None, deadline=None, chosen=()), now)


def open_round(
    state: RoundState, settings: RoundSettings, present: Collection[str], now: float
) -> RoundState:
    """Choose among the clients present and open the round; too few clients: ``state`` as it is."""
    chosen = choose(settings, state.number, present)
    if state.phase == "finished" or not chosen:
        return state
    deadline = None if settings.deadline is None else now + settings.deadline
    return edit(state, replace(state, opened=now, deadline=deadline, chosen=chosen), now)


def choose(settings: RoundSettings, number: int, present: Collection[str]) -> tuple[str, ...]:
    """The clients of one round in name order, at most 10,000; nobody while too few are present.

    Each client's lot depends on seed, round and name alone, so that who else is present does not matter.
    """
    if len(present) < settings.clients_min:
        return ()
    count = max(settings.clients_min, math.ceil(settings.fraction * len(present)))
    lots = sorted(
        present, key=lambda name: hashlib.sha256(f"{settings.seed}/{number}/{name}".encode()).digest()
    )
    return tuple(sorted(lots[: min(count, MAXIMUM_CHOSEN)]))


def should_close(state: RoundState, settings: RoundSettings, received: int, silent: int, now: float) -> bool:
    """Whether the open round has what it waits for. Of the chosen, ``silent`` clients will not answer."""
    if received == 0:
        return False
    quorum = math.ceil(settings.quorum * (len(state.chosen) - silent))
    return received >= quorum or is_overdue(state, now)


def is_exhausted(state: RoundState, received: int, silent: int, gone: int = 0) -> bool:
    """Whether the open round waits in vain: all chosen clients are ``silent``.

    A deadline is waited for, since it forgives those who are muted; but not if all are ``gone`` (have left, or were
    refused): somebody else may take their place.
    """
    return received == 0 and silent >= len(state.chosen) and (state.deadline is None or gone >= silent)


def is_overdue(state: RoundState, now: float) -> bool:
    """Whether the open round's deadline has passed."""
    return state.deadline is not None and now >= state.deadline


def _waiting(number: int, settings: RoundSettings) -> RoundState:
    phase = "calibrate" if number == 0 else "train" if number <= settings.rounds else "finished"
    return RoundState(number, phase, None, None, ())
