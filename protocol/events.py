"""What a connection reports: events, the fate of publications, and its errors, one per cause."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedmpt.protocol.errors import FedmptError


class BrokerUnreachable(FedmptError):
    """No connection: refused, unknown host, TLS failure, or the broker does not accept us."""


class IdentityTaken(FedmptError):
    """The broker keeps closing our connection, most likely because another client uses our id."""


class PayloadTooLarge(FedmptError):
    """A payload exceeds the broker's maximum packet size."""


class PublishRefused(FedmptError):
    """The broker refused a publication, or there is no room to keep it until the broker is back."""


class SubscribeRefused(FedmptError):
    """The broker refused a subscription."""


class Message(NamedTuple):
    """One received publication; hand it to ``Connection.acknowledge`` once its effect is durable.

    ``examined`` is what the connection's ``examine`` found, None without one.
    """

    topic: str
    payload: bytes
    retained: bool
    packet: int
    qos: int
    generation: int
    examined: Any = None


@dataclass(frozen=True)
class Connected:
    """The broker accepted us, for the first time or again; publications resume by themselves."""

    protocol: str


@dataclass(frozen=True)
class Disconnected:
    """The connection is lost; it is being made again."""

    reason: str


Event = Message | Connected | Disconnected


class Delivery:
    """The fate of one publication. All of a connection share ``changed``: an event for each would cost more."""

    def __init__(self, topic: str, changed: threading.Condition) -> None:
        self.topic = topic
        self.refusal = ""
        self._done = False
        self._changed = changed

    def finish(self, refusal: str) -> None:
        """The broker has answered; called by the connection."""
        with self._changed:
            self.refusal, self._done = refusal, True
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the broker has the message; False when the time ran out. Raises PublishRefused."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._done, timeout)
        if self.refusal:
            raise PublishRefused(
                f"{self.topic}: the broker refused it ({self.refusal}); check the certificate and the ACL"
            )
        return done
