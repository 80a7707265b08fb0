"""What is published until the broker has it: order, window, repetition and size."""

from __future__ import annotations

import struct

from fedmpt.protocol.outbox import Outbox


def numbers(packets: bytes) -> list[int]:
    """The packet number of each PUBLISH, all shorter than 128 bytes."""
    found, at = [], 0
    while at < len(packets):
        topic = struct.unpack_from("!H", packets, at + 2)[0]
        found += struct.unpack_from("!H", packets, at + 4 + topic)
        at += 2 + packets[at + 1]
    return found


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


def test_the_outbox_knows_how_many_bytes_it_keeps() -> None:
    outbox = Outbox()
    outbox.connected(1, five=True)
    outbox.add("open/0", b"x" * 10, False, None)
    outbox.add("open/1", b"x" * 20, False, None)
    assert outbox.payload_bytes == 30, "on its way, and waiting"
    outbox.acknowledged(1)
    outbox.acknowledged(1)
    assert outbox.payload_bytes == 20


def test_the_outbox_knows_its_largest_publication_under_way() -> None:
    outbox = Outbox()
    assert outbox.largest() == ("", 0)
    outbox.connected(2, five=True)
    for number in range(3):
        outbox.add(f"open/{number}", b"x" * number, False, None)
    assert outbox.largest() == ("open/1", 1), "the third has not been sent"
