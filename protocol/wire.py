"""The socket under paho-mqtt, which takes PUBLISH and PUBACK out of the stream in bulk.

paho handles one packet at a time: several system calls, locks and objects for each, twice what all the rest of
taking in an update costs. So these two, nearly all of the traffic, are read from large blocks and written many at
once here; every other packet (connecting, subscribing, keeping alive) passes through to paho, in order.
Byte layouts: MQTT 5.0, sections 2.1, 3.3 and 3.4; 3.1.1 differs by the properties alone.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

BLOCK_BYTES = 256 << 10
PAHO_SECONDS = 0.05  # for which paho may wait while messages come one after another
LARGEST_PACKET = 268_435_460  # that MQTT can write the length of
CLOSE_SECONDS = 2.0  # for what is left to send when the connection is closed
_LATER = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
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
    """What paho takes for its socket. ``taken`` gets packets in the order of their coming, from paho's thread.

    A message whose packet has more than ``maximum`` bytes is acknowledged and skipped without being held.
    ``wake`` is called when something is left to send, so that paho's thread waits for room.
    """

    def __init__(
        self,
        stream: Any,
        five: bool,
        taken: Taken,
        *,
        maximum: int = LARGEST_PACKET,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.alive_at = time.monotonic()  # when the peer last showed that it is there
        self.failure: OSError | None = None
        self._stream = stream
        self._five = five
        self._taken = taken
        self._maximum = maximum
        self._wake = wake
        self._lock = threading.Lock()  # a TLS stream must not be read and written at once
        self._broken = False  # nothing may be sent any more
        self._unsent = bytearray()
        self._full = False  # the stream took only a part
        self._buffer = bytearray(BLOCK_BYTES)  # used again and again; larger only while a packet is
        self._filled = 0  # bytes received and not yet taken out
        self._wanted = 1  # bytes with which there is something to look at
        self._skipping = 0  # bytes still to come of a message that is too large
        self._for_paho = b""

    def write(self, packets: bytes) -> None:
        """Send what the connection takes now, and the rest as soon as it takes more; from any thread."""
        with self._lock:
            if self._broken:
                return
            self._unsent += packets
            self._flush()
        if self._unsent:
            self._wake()

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
        end = time.monotonic() + PAHO_SECONDS
        while not self._for_paho:
            if self._filled < self._wanted and not self._read():
                return b""
            if self._filled >= self._wanted:
                self._look()
            if not self._for_paho and time.monotonic() >= end:
                raise BlockingIOError
        data, self._for_paho = self._for_paho[:size], self._for_paho[size:]
        return data

    def pending(self) -> int:
        if self._for_paho or self._filled >= self._wanted:
            return 1
        with self._lock:
            return int(self._stream.pending()) if isinstance(self._stream, ssl.SSLSocket) else 0

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def setblocking(self, flag: bool) -> None:
        self._stream.setblocking(flag)

    def close(self) -> None:
        """Close, after what is left is sent if that is soon: a DISCONNECT that is lost publishes the will."""
        end = time.monotonic() + CLOSE_SECONDS
        with self._lock:
            while self._unsent and (left := end - time.monotonic()) > 0:
                select.select([], [self._stream], [], left)
                self._flush()
            self._unsent.clear()
            self._broken = True  # a closed SSLSocket would send in the clear
            self._stream.close()

    def _read(self) -> bool:
        """Receive more; False at the end of the stream."""
        if self._filled == len(self._buffer):
            self._buffer += bytes(len(self._buffer))
        with self._lock, memoryview(self._buffer)[self._filled :] as room:
            try:
                count: int = self._stream.recv_into(room)
            except _LATER:
                raise
            except OSError as error:
                self.failure = error
                raise
        self.alive_at = time.monotonic()
        self._filled += count
        if self._skipping:  # what it is of has been taken out, all before it too
            skipped = min(self._skipping, count)
            self._skipping -= skipped
            self._drop(skipped)
        return count > 0

    def _drop(self, count: int) -> None:
        """Move what comes after so many bytes to the beginning."""
        with memoryview(self._buffer) as view:
            view[: self._filled - count] = view[count : self._filled]
        self._filled -= count
        if self._filled <= BLOCK_BYTES < len(self._buffer):
            self._buffer = self._buffer[:BLOCK_BYTES]

    def _flush(self) -> None:
        try:
            while self._unsent:
                sent = self._stream.send(self._unsent)
                del self._unsent[:sent]
                if self._full:  # there is room again, so the peer has taken something
                    self._full, self.alive_at = False, time.monotonic()
        except _LATER:
            self._full = True
        except OSError:
            # Perhaps in the middle of a packet: whatever followed would be read as its rest. Reading gets what has
            # come already, which may be the reason (a TLS alert), and then the end. SSLSocket's own ``shutdown``
            # would go on in the clear.
            self._broken = True
            self._unsent.clear()
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._stream, socket.SHUT_RDWR)

    def _look(self) -> None:
        """Take whole packets off what has come, up to the first that is paho's."""
        published: list[Publish] = []
        acknowledged: list[Puback] = []
        too_large: list[int] = []
        start, missing, size = 0, 1, self._filled
        with memoryview(self._buffer) as whole, whole[:size] as data:
            while start < size:
                body, end = _extent(data, start)
                if end - start > self._maximum:
                    topic_end, head_end = _head(data, start, body)
                    if head_end > end:
                        raise OSError("a malformed MQTT packet")
                    if head_end > size:
                        missing = head_end - size
                        break
                    logger.warning(
                        "%s: skipped a message of %d bytes, at most %d are taken",
                        bytes(data[body + 2 : topic_end]).decode(errors="replace")[:200],
                        end - start,
                        self._maximum,
                    )
                    if head_end > topic_end:
                        too_large.append(_SHORT.unpack_from(data, topic_end)[0])
                    self._skipping = max(0, end - size)
                    start = min(end, size)
                    continue
                if end > size:
                    missing = end - size
                    break
                kind, qos = data[start] & 0xF0, data[start] >> 1 & 3
                if kind == _PUBLISH and qos < 2:
                    published.append(_read_publish(data, start, body, end, self._five))
                elif kind == _PUBACK and end - body >= 2:
                    reason = data[body + 2] if end - body > 2 else 0
                    acknowledged.append(Puback(_SHORT.unpack_from(data, body)[0], reason))
                else:
                    self._for_paho, start, missing = bytes(data[start:end]), end, 0
                    break
                start = end
        self._drop(start)
        self._wanted = max(1, self._filled + missing)
        if too_large:
            self.write(encode_pubacks(too_large))
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


def _extent(data: memoryview, start: int) -> tuple[int, int]:
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


def _head(data: memoryview, start: int, body: int) -> tuple[int, int]:
    """Where a PUBLISH's topic and packet number end; ends beyond the data where more must come to tell."""
    qos = data[start] >> 1 & 3
    if data[start] & 0xF0 != _PUBLISH or qos > 1:
        raise OSError("an MQTT packet that is too large")
    if body + 2 > len(data):
        return body + 2, body + 2
    topic_end = body + 2 + _SHORT.unpack_from(data, body)[0]
    return topic_end, topic_end + 2 * qos


def _read_publish(data: memoryview, start: int, body: int, end: int, five: bool) -> Publish:
    qos = data[start] >> 1 & 3
    if body + 2 > end:
        raise OSError("a malformed MQTT packet")
    at = body + 2 + _SHORT.unpack_from(data, body)[0]
    topic = bytes(data[body + 2 : at])
    packet = 0
    if qos:
        if at + 2 > end:
            raise OSError("a malformed MQTT packet")
        packet = _SHORT.unpack_from(data, at)[0]
        at += 2
    if five:
        _, at = _extent(data, at - 1)  # the properties' length is written like a packet's; they tell nothing
    if at > end:
        raise OSError("a malformed MQTT packet")
    return Publish(topic, bytes(data[at:end]), bool(data[start] & _RETAIN), packet, qos)
