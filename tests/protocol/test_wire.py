"""The socket under paho: messages and acknowledgements in bulk, everything else untouched and in order."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt.protocol.wire import Puback, Publish, Wire, encode_pubacks, encode_publish

PINGRESP = b"\xd0\x00"
SUBACK = b"\x90\x04\x00\x01\x00\x01"


class Stream:
    """A socket that gives what it is told to, in pieces, and takes only so much at once."""

    def __init__(self, pieces: list[bytes], takes: int = 1 << 30) -> None:
        self.pieces, self.takes, self.sent = pieces, takes, b""

    def recv_into(self, room: memoryview) -> int:
        if not self.pieces:
            raise BlockingIOError
        piece, self.pieces[0] = self.pieces[0][: len(room)], self.pieces[0][len(room) :]
        if not self.pieces[0]:
            del self.pieces[0]
        room[: len(piece)] = piece
        return len(piece)

    def send(self, data: bytes) -> int:
        taken = bytes(data[: self.takes])
        if not taken:
            raise BlockingIOError
        self.takes -= len(taken)
        self.sent += taken
        return len(taken)


def read_all(stream: Stream, five: bool = True, **options: Any) -> list[object]:
    """What came, in order: packets taken out, and paho's bytes joined where nothing came between."""
    seen: list[object] = []
    wire = Wire(
        stream, five, lambda published, acknowledged: seen.extend([*published, *acknowledged]), **options
    )
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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=10), st.booleans())
def test_a_message_that_is_too_large_is_acknowledged_and_skipped(sizes: list[int], five: bool) -> None:
    first, large, last = publish(1, 5, five), publish(2, 1000, five), publish(3, 5, five)
    stream = Stream(list(cut(first[0] + large[0] + SUBACK + last[0], sizes)))
    logging.disable(logging.WARNING)  # each example would log it
    assert read_all(stream, five, maximum=500) == [first[1], SUBACK, last[1]]
    logging.disable(logging.NOTSET)
    assert stream.sent == encode_pubacks([2])


def test_a_message_that_is_too_large_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    read_all(Stream([publish(2, 1000)[0]]), maximum=500)
    assert "open/2: skipped a message of 1014 bytes, at most 500 are taken" in caplog.text


def test_a_message_that_is_too_large_is_never_held() -> None:
    class Endless(Stream):
        """Gives the head of a message of 64 MiB, and then its zeros as they are asked for."""

        left = 64 << 20

        def recv_into(self, room: memoryview) -> int:
            if self.pieces:
                return super().recv_into(room)
            given = min(len(room), self.left)
            self.left -= given
            room[:given] = bytes(given)
            return given

    stream = Endless([b"\x32" + b"\xac\x80\x80\x20" + b"\x00\x06open/a\x00\x05"])
    wire = Wire(stream, False, lambda published, acknowledged: None, maximum=1 << 20)
    tracemalloc.start()
    while stream.left:
        with contextlib.suppress(BlockingIOError):
            wire.recv(1)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert stream.sent == encode_pubacks([5])


def test_only_messages_may_be_too_large() -> None:
    with pytest.raises(OSError, match="too large"):
        read_all(Stream([b"\x90\xff\x7f"]), maximum=500)


def test_what_comes_is_a_sign_of_life() -> None:
    wire = Wire(Stream([publish(1, 1000)[0][:100]]), True, lambda published, acknowledged: None)
    wire.alive_at = 0.0
    with pytest.raises(BlockingIOError):
        wire.recv(1)
    assert wire.alive_at > 0, "though no packet is complete"


def test_room_in_a_full_socket_is_a_sign_of_life_but_sending_into_its_buffer_is_not() -> None:
    stream = Stream([], takes=10)
    wire = Wire(stream, True, lambda published, acknowledged: None)
    wire.alive_at = 0.0
    wire.write(b"0123456789abcdef")
    assert wire.alive_at == 0, "a dead peer's socket would have taken them, too"
    stream.takes = 100
    wire.flush()
    assert wire.alive_at > 0


def test_whoever_waits_for_room_is_woken_when_something_is_left() -> None:
    woken: list[bool] = []
    stream = Stream([], takes=10)
    wire = Wire(stream, True, lambda published, acknowledged: None, wake=lambda: woken.append(True))
    wire.write(b"0123456789")
    assert not woken
    wire.write(b"a")
    assert woken


class Failing(socket.socket):
    """Takes ten bytes, has no buffer once, and would take everything after that."""

    calls = 0

    def send(self, data: Any, flags: int = 0) -> int:
        self.calls += 1
        if self.calls == 2:
            raise OSError(errno.ENOBUFS, "no buffer space")
        return super().send(data[:10] if self.calls == 1 else data)


def test_after_a_failure_within_a_packet_nothing_is_sent_and_the_connection_ends() -> None:
    ours, theirs = socket.socketpair()
    with Failing(fileno=ours.detach()) as failing, theirs:
        wire = Wire(failing, True, lambda published, acknowledged: None)
        wire.write(publish(1, 100)[0])
        wire.write(publish(2, 100)[0])
        assert (theirs.recv(1000), theirs.recv(1000)) == (publish(1, 100)[0][:10], b"")
        assert wire.recv(1) == b"", "the end, so that the session is resumed"


def test_closing_sends_what_is_left_first() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        wire = Wire(ours, True, lambda published, acknowledged: None)
        wire.write(bytes(4_000_000) + b"DISCONNECT")
        assert wire.unsent
        closing = threading.Thread(target=wire.close)
        closing.start()
        got = b""
        while data := theirs.recv(1 << 20):
            got += data
        closing.join()
        assert got.endswith(b"DISCONNECT")


def test_closing_does_not_wait_long_for_a_peer_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmpt.protocol.wire.CLOSE_SECONDS", 0.2)
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        wire = Wire(ours, True, lambda published, acknowledged: None)
        wire.write(bytes(4_000_000))
        start = time.monotonic()
        wire.close()
        assert time.monotonic() - start < 2


def test_nothing_is_sent_after_closing() -> None:
    class Closing(Stream):
        def close(self) -> None:
            pass

    stream = Closing([])
    wire = Wire(stream, True, lambda published, acknowledged: None)
    wire.close()
    wire.write(b"would be in the clear: a closed TLS stream has lost its keys before its descriptor")
    assert (stream.sent, wire.unsent) == (b"", False)


def test_a_lost_connection_shows_when_reading_not_when_writing() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        wire = Wire(ours, True, lambda published, acknowledged: None)
        for _ in range(3):
            wire.write(b"x" * 1000)
        assert not wire.unsent
        assert wire.recv(1) == b"", "the end of the stream"
