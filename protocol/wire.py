"""The socket under paho-mqtt, which takes PUBLISH and PUBACK out of the stream in bulk.

paho handles one packet at a time: several system calls, locks and objects for each, twice what all the rest of
taking in an update costs. So these two, nearly all of the traffic, are read from large blocks and written many at
once here; every other packet (connecting, subscribing, keeping alive) passes through to paho, in order.
Byte layouts: MQTT 5.0, sections 2.1, 3.3 and 3.4; 3.1.1 differs by the properties alone.
"""

from __future__ import annotations

import ssl
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

BLOCK_BYTES = 256 << 10
_PUBLISH, _PUBACK = 0x30, 0x40
_DUPLICATE, _RETAIN = 0x08, 0x01
_SHORT = struct.Struct("!H")


class Publish(NamedTuple):
    """A received PUBLISH; ``packet`` is its number, 0 with QoS 0."""

    topic: bytes
    payload: bytes
    retained: bool
    packet: int
    qos: int


class Puback(NamedTuple):
    """A received PUBACK; ``reason`` is 128 or more where the broker refused the message."""

    packet: int
    reason: int


Taken = Callable[[list[Publish], list[Puback]], None]


class Wire:
    """What paho takes for its socket. ``taken`` gets packets in the order of their coming, from paho's thread."""

    def __init__(self, stream: Any, five: bool, taken: Taken) -> None:
        self._stream = stream
        self._five = five
        self._taken = taken
        self._lock = threading.Lock()  # a TLS stream must not be read and written at once
        self._unsent = bytearray()
        self._parts: list[bytes] = []  # received and not yet looked at
        self._missing = 0  # bytes until there is something to look at
        self._for_paho = b""

    def write(self, packets: bytes) -> None:
        """Send what the connection takes now, and the rest as soon as it takes more; from any thread."""
        with self._lock:
            self._unsent += packets
            self._flush()

    def flush(self) -> None:
        """Send more of what was left."""
        with self._lock:
            self._flush()

    @property
    def unsent(self) -> bool:
        """Whether something is left to send."""
        return bool(self._unsent)

    # What follows is what paho asks of a socket.

    def send(self, data: bytes) -> int:
        self.write(data)
        return len(data)

    def recv(self, size: int) -> bytes:
        if not self._for_paho:
            if self._missing or not self._parts:
                with self._lock:
                    data = self._stream.recv(BLOCK_BYTES)
                if not data:
                    return b""
                self._parts.append(data)
                self._missing -= len(data)
            if self._missing <= 0:
                self._look()
            if not self._for_paho:
                raise BlockingIOError
        data, self._for_paho = self._for_paho[:size], self._for_paho[size:]
        return data

    def pending(self) -> int:
        if self._for_paho or (self._parts and self._missing <= 0):
            return 1
        return int(self._stream.pending()) if isinstance(self._stream, ssl.SSLSocket) else 0

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def setblocking(self, flag: bool) -> None:
        self._stream.setblocking(flag)

    def close(self) -> None:
        self._stream.close()

    def _flush(self) -> None:
        try:
            while self._unsent:
                sent = self._stream.send(self._unsent)
                del self._unsent[:sent]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError:
            self._unsent.clear()  # the connection is lost, as reading will tell

    def _look(self) -> None:
        """Take whole packets off what has come, up to the first that is paho's."""
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        published: list[Publish] = []
        acknowledged: list[Puback] = []
        start, size = 0, len(data)
        self._missing = 1
        while True:
            body, end = _extent(data, start)
            if end > size:
                self._missing = end - size
                break
            kind, qos = data[start] & 0xF0, data[start] >> 1 & 3
            if kind == _PUBLISH and qos < 2:
                published.append(_read_publish(data, start, body, end, self._five))
            elif kind == _PUBACK and end - body >= 2:
                reason = data[body + 2] if end - body > 2 else 0
                acknowledged.append(Puback(_SHORT.unpack_from(data, body)[0], reason))
            else:
                self._for_paho, start, self._missing = data[start:end], end, 0
                break
            start = end
        self._parts = [data[start:]] if start < size else []
        if published or acknowledged:
            self._taken(published, acknowledged)


def encode_publish(
    topic: bytes, payload: bytes, packet: int, *, retain: bool, duplicate: bool, five: bool
) -> bytes:
    """A PUBLISH with QoS 1."""
    flags = 0x02 | (_RETAIN if retain else 0) | (_DUPLICATE if duplicate else 0)
    head = _SHORT.pack(len(topic)) + topic + _SHORT.pack(packet) + (b"\0" if five else b"")
    length, encoded = len(head) + len(payload), bytearray((_PUBLISH | flags,))
    while length > 127:
        encoded.append(length & 127 | 128)
        length >>= 7
    encoded.append(length)
    return b"".join((encoded, head, payload))


def encode_pubacks(packets: list[int]) -> bytes:
    """PUBACKs of success."""
    return b"".join(b"\x40\x02" + _SHORT.pack(packet) for packet in packets)


def _extent(data: bytes, start: int) -> tuple[int, int]:
    """Where a packet's body begins and ends; an end beyond the data where more must come to tell."""
    length, at = 0, start + 1
    for shift in (0, 7, 14, 21):
        if at >= len(data):
            return at, at + 1
        byte = data[at]
        at += 1
        length |= (byte & 127) << shift
        if byte < 128:
            return at, at + length
    raise OSError("a malformed MQTT packet")


def _read_publish(data: bytes, start: int, body: int, end: int, five: bool) -> Publish:
    qos = data[start] >> 1 & 3
    if body + 2 > end:
        raise OSError("a malformed MQTT packet")
    at = body + 2 + _SHORT.unpack_from(data, body)[0]
    topic = data[body + 2 : at]
    packet = 0
    if qos:
        if at + 2 > end:
            raise OSError("a malformed MQTT packet")
        packet = _SHORT.unpack_from(data, at)[0]
        at += 2
    if five:
        _, at = _extent(
            data, at - 1
        )  # the properties' length is written like a packet's; they tell us nothing
    if at > end:
        raise OSError("a malformed MQTT packet")
    return Publish(topic, data[at:end], bool(data[start] & _RETAIN), packet, qos)
