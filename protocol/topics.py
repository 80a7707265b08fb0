"""Topic names of protocol v1: everything lies under ``fedmpt/v1/{federation}/``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from fedmpt.protocol.errors import FedmptError

PREFIX = "fedmpt/v1"
MAXIMUM_ROUND = 1_000_000
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of a federation or client
_NAME = re.compile(NAME)
_ROUND = re.compile(r"0|[1-9][0-9]{0,6}")
_UPDATE = re.compile(rf"({_ROUND.pattern})/({NAME})")


class TopicError(FedmptError):
    """A federation's or client's name does not fit into a topic."""


def check_name(kind: str, name: str) -> str:
    """Return ``name`` if it may stand in a topic, a file name and a certificate; raises TopicError."""
    if not _NAME.fullmatch(name):
        raise TopicError(
            f"{kind} name {name[:80]!r} cannot be used: take 1 to 64 letters (a-z), digits, '.', '-' or '_', "
            "the first a letter or digit"
        )
    return name


@dataclass(frozen=True)
class Topics:
    """The topics of one federation."""

    federation: str

    def __post_init__(self) -> None:
        check_name("federation", self.federation)

    @cached_property
    def root(self) -> str:
        return f"{PREFIX}/{self.federation}"

    @property
    def manifest(self) -> str:
        return f"{self.root}/manifest"

    @property
    def round(self) -> str:
        return f"{self.root}/round"

    @property
    def status(self) -> str:
        return f"{self.root}/status"

    def state(self, round_number: int) -> str:
        return f"{self.root}/state/{round_number}"

    def update(self, round_number: int, client: str) -> str:
        return f"{self.root}/update/{round_number}/{check_name('client', client)}"

    def receipt(self, client: str) -> str:
        return f"{self.root}/receipt/{check_name('client', client)}"

    def presence(self, client: str) -> str:
        return f"{self.root}/presence/{check_name('client', client)}"

    @property
    def all_updates(self) -> str:
        return f"{self.root}/update/+/+"

    @property
    def all_presence(self) -> str:
        return f"{self.root}/presence/+"

    @property
    def all_states(self) -> str:
        return f"{self.root}/state/+"

    def client_of_presence(self, topic: str) -> str | None:
        """The client whose presence ``topic`` is, or None if it is none of this federation's."""
        parts = topic.removeprefix(self.root + "/").split("/")
        if len(parts) == 2 and parts[0] == "presence" and _NAME.fullmatch(parts[1]):
            return parts[1]
        return None

    def round_and_client_of_update(self, topic: str) -> tuple[int, str] | None:
        """(round, client) of an update's topic, or None if it is none of this federation's."""
        start = f"{self.root}/update/"
        if topic.startswith(start) and (match := _UPDATE.fullmatch(topic, len(start))):
            return int(match[1]), match[2]
        return None

    def round_of_state(self, topic: str) -> int | None:
        """The round whose global state ``topic`` carries, or None if it is none of this federation's."""
        parts = topic.removeprefix(self.root + "/").split("/")
        if len(parts) == 2 and parts[0] == "state" and _ROUND.fullmatch(parts[1]):
            return int(parts[1])
        return None
