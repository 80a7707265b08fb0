"""The socket under paho: messages and acknowledgements in bulk, everything else untouched and in order."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt.protocol.outbox import Outbox
from fedmpt.protocol.wire import Puback, Publish, Wire, encode_pubacks, encode_publish

PINGRESP = b"\xd0\x00"
SUBACK = b"\x90\x04\x00\x01\x00\x01"


class Stream:
    """A socket that gives what it is told to, in pieces, and takes only so much at once."""

    def __init__(self, pieces: list[bytes], takes: int = 1 << 30) -> None:
        self.pieces, self.takes, self.sent = pieces, takes, b""

    def recv(self, size: int) -> bytes:
        if not self.pieces:
            raise BlockingIOError
        piece, self.pieces[0] = self.pieces[0][:size], self.pieces[0][size:]
        if not self.pieces[0]:
            del self.pieces[0]
        return piece

    def send(self, data: bytes) -> int:
        taken = bytes(data[: self.takes])
        if not taken:
            raise BlockingIOError
        self.takes -= len(taken)
        self.sent += taken
        return len(taken)


def read_all(stream: Stream, five: bool = True) -> list[object]:
    """What came, in order: packets taken out, and paho's bytes joined where nothing came between."""
    seen: list[object] = []
    wire = Wire(stream, five, lambda published, acknowledged: seen.extend([*published, *acknowledged]))
    while stream.pieces or wire.pending():
        try:
            data = wire.recv(3)
        except BlockingIOError:
            continue
        if seen and isinstance(seen[-1], bytes):
            seen[-1] += data
        else:
            seen.append(data)
    return seen


def publish(number: int, size: int, five: bool = True, retain: bool = False) -> tuple[bytes, Publish]:
    topic, payload = f"open/{number}".encode(), bytes([number % 256]) * size
    packet = encode_publish(topic, payload, number, retain=retain, duplicate=False, five=five)
    return packet, Publish(topic, payload, retain, number, 1)


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    for size in sizes:
        if data:
            yield data[:size]
            data = data[size:]
    if data:
        yield data


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 500), max_size=30), st.booleans())
def test_however_the_stream_is_cut_the_same_packets_come_in_order(sizes: list[int], five: bool) -> None:
    packets = [publish(1, 5, five), publish(2, 130, five, retain=True), publish(3, 0, five)]
    stream = packets[0][0] + SUBACK + packets[1][0] + encode_pubacks([9]) + PINGRESP + packets[2][0]
    seen = read_all(Stream(list(cut(stream, sizes))), five)
    assert [item for item in seen if isinstance(item, (Publish, bytes))] == [
        packets[0][1], SUBACK, packets[1][1], PINGRESP, packets[2][1],
    ]  # fmt: skip
    assert [item for item in seen if isinstance(item, Puback)] == [Puback(9, 0)]


def test_a_message_larger_than_a_block_is_put_together() -> None:
    packet, wanted = publish(7, 3_000_000)
    assert read_all(Stream([packet])) == [wanted]


def test_quality_of_service_0_and_properties_are_read() -> None:
    plain = b"\x30\x09\x00\x06open/ax"
    with_properties = b"\x32\x11\x00\x06open/a\x00\x05\x05\x02\x00\x00\x00\x10x"
    assert read_all(Stream([plain]), five=False) == [Publish(b"open/a", b"x", False, 0, 0)]
    assert read_all(Stream([with_properties])) == [Publish(b"open/a", b"x", False, 5, 1)]


def test_a_refusal_carries_its_reason() -> None:
    assert read_all(Stream([b"\x40\x04\x00\x07\x87\x00"])) == [Puback(7, 0x87)]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_rubbish_ends_the_connection_or_is_left_to_paho(data: bytes) -> None:
    with contextlib.suppress(OSError):
        read_all(Stream([data]))


def test_what_the_socket_does_not_take_is_sent_later() -> None:
    stream = Stream([], takes=10)
    wire = Wire(stream, True, lambda published, acknowledged: None)
    wire.write(b"0123456789abcdef")
    assert (stream.sent, wire.unsent) == (b"0123456789", True)
    stream.takes = 100
    assert wire.send(b"ghi") == 3
    assert (stream.sent, wire.unsent) == (b"0123456789abcdefghi", False)


def test_a_lost_connection_shows_when_reading_not_when_writing() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        wire = Wire(ours, True, lambda published, acknowledged: None)
        for _ in range(3):
            wire.write(b"x" * 1000)
        assert not wire.unsent
        assert wire.recv(1) == b"", "the end of the stream"


def numbers(packets: bytes) -> list[int]:
    """The packet number of each PUBLISH."""
    return [item.packet for item in read_all(Stream([packets])) if isinstance(item, Publish)]


def test_the_outbox_keeps_to_the_window_and_to_its_order() -> None:
    outbox = Outbox()
    assert outbox.add("open/0", b"x", False, None) == b"", "nothing is sent without a connection"
    first = outbox.connected(2, five=True)
    assert numbers(first) == [1]
    assert numbers(outbox.add("open/1", b"x", False, None)) == [2]
    assert outbox.add("open/2", b"x", False, None) == b""
    _, more = outbox.acknowledged(1)
    assert numbers(more) == [3]
    assert len(outbox) == 2


def test_after_a_reconnection_what_was_not_acknowledged_comes_again_first() -> None:
    outbox = Outbox()
    outbox.connected(3, five=True)
    for number in range(5):
        outbox.add(f"open/{number}", b"x", False, None)
    outbox.acknowledged(2)
    outbox.disconnected()
    assert outbox.acknowledged(99) == (None, b"")
    again = outbox.connected(3, five=True)
    assert numbers(again) == [1, 3, 4]
    assert again[0] & 0x08, "marked as repeated"
    assert len(outbox) == 4


def test_a_smaller_window_after_a_reconnection_is_kept_to() -> None:
    outbox = Outbox()
    outbox.connected(4, five=True)
    for number in range(4):
        outbox.add(f"open/{number}", b"x", False, None)
    outbox.disconnected()
    assert len(numbers(outbox.connected(1, five=True))) == 1
    topics = []
    for packet in (1, 5, 6, 7):
        _, more = outbox.acknowledged(packet)
        topics += numbers(more) if more else []
    assert topics == [5, 6, 7]
    assert len(outbox) == 0


def test_packet_numbers_wrap_around_past_those_in_use() -> None:
    outbox = Outbox()
    outbox.connected(3, five=True)
    outbox.add("open/kept", b"x", False, None)
    for _ in range(65534):
        outbox.add("open/x", b"", False, None)
        outbox.acknowledged(outbox._last)
    assert numbers(outbox.add("open/x", b"", False, None)) == [2]
