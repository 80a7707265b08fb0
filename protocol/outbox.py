"""What we publish until the broker has it: QoS 1 with a window, kept over reconnections."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from fedmpt.protocol.events import Delivery
from fedmpt.protocol.wire import encode_publish

_LAST_PACKET = 65535


class _Publication(NamedTuple):
    topic: bytes
    payload: bytes
    retain: bool
    delivery: Delivery | None


class Outbox:
    """Publications in order; each call returns the bytes that are to be sent now. Not for several threads."""

    def __init__(self) -> None:
        self._window = 0  # nothing is sent while there is no connection
        self._five = True
        self._waiting: deque[_Publication] = deque()
        self._sent: dict[int, _Publication] = {}
        self._last = 0
        self.payload_bytes = 0  # of all that is kept

    def __len__(self) -> int:
        return len(self._waiting) + len(self._sent)

    def add(self, topic: str, payload: bytes, retain: bool, delivery: Delivery | None) -> bytes:
        """Take a publication."""
        publication = _Publication(topic.encode(), payload, retain, delivery)
        self.payload_bytes += len(payload)
        if self._waiting or len(self._sent) >= self._window:
            self._waiting.append(publication)
            return b""
        return self._send(publication)

    def acknowledged(self, packet: int) -> tuple[Delivery | None, bytes]:
        """The broker has answered; whose delivery that is."""
        publication = self._sent.pop(packet, None)
        if publication is None:
            return None, b""
        self.payload_bytes -= len(publication.payload)
        return publication.delivery, self._send_waiting()

    def largest(self) -> tuple[str, int]:
        """Topic and payload bytes of the largest publication under way; empty and 0 where there is none."""
        sent = max(self._sent.values(), key=lambda publication: len(publication.payload), default=None)
        return (sent.topic.decode(), len(sent.payload)) if sent else ("", 0)

    def connected(self, window: int, five: bool) -> bytes:
        """Connected (again): what was sent and not acknowledged goes first, in its old order."""
        self._window, self._five = window, five
        again = list(self._sent.items())
        # A broker that now allows fewer in flight gets the rest later.
        for packet, publication in reversed(again[window:]):
            del self._sent[packet]
            self._waiting.appendleft(publication)
        parts = [self._encode(packet, sent, duplicate=True) for packet, sent in again[:window]]
        return b"".join([*parts, self._send_waiting()])

    def disconnected(self) -> None:
        """Keep everything until the next connection."""
        self._window = 0

    def _send_waiting(self) -> bytes:
        parts = []
        while self._waiting and len(self._sent) < self._window:
            parts.append(self._send(self._waiting.popleft()))
        return b"".join(parts)

    def _send(self, publication: _Publication) -> bytes:
        self._last = self._last % _LAST_PACKET + 1
        while self._last in self._sent:
            self._last = self._last % _LAST_PACKET + 1
        self._sent[self._last] = publication
        return self._encode(self._last, publication, duplicate=False)

    def _encode(self, packet: int, publication: _Publication, duplicate: bool) -> bytes:
        return encode_publish(
            publication.topic,
            publication.payload,
            packet,
            retain=publication.retain,
            duplicate=duplicate,
            five=self._five,
        )
