"""Messages: bounded, versioned, finite, and errors that name message and field."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt.protocol.messages import (
    MAXIMUM_BYTES,
    MessageError,
    Presence,
    Receipt,
    from_json,
    parse_object,
    receipt_to_json,
    to_json,
)

PRESENCE = Presence("birds", "site-a", True, "ab" * 32, 120, {"engine": "onnx"})


def changed(**changes: object) -> bytes:
    return json.dumps(json.loads(to_json(PRESENCE)) | changes).encode()


def read(data: bytes) -> Presence:
    return from_json(Presence, data, "presence/site-a")


def test_a_message_survives_the_round_trip() -> None:
    assert read(to_json(PRESENCE)) == PRESENCE


def test_unknown_fields_are_ignored() -> None:
    assert read(changed(weather="fine")) == PRESENCE


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_unknown_versions_are_refused(version: object) -> None:
    with pytest.raises(MessageError, match=r"presence/site-a: version .*, but this program knows version 1"):
        read(changed(version=version))


def test_a_missing_field_is_named() -> None:
    value = json.loads(to_json(PRESENCE))
    del value["samples"]
    with pytest.raises(MessageError, match="presence/site-a: missing samples"):
        read(json.dumps(value).encode())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"online": "yes"}, "online: expected bool, got str"),
        ({"samples": 1.5}, "samples: expected int, got float"),
        ({"samples": True}, "samples: expected int, got bool"),
        ({"samples": -1}, "samples is negative"),
        ({"client": "a/b"}, "client name"),
        ({"capabilities": {"engine": 1}}, r"capabilities\['engine'\]: expected str"),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_named(changes: dict[str, object], text: str) -> None:
    with pytest.raises(MessageError, match=text):
        read(changed(**changes))


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"null", b"\xff\xfe", b"[" * 10_000, b'{"version": NaN}'])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError, match="presence/site-a: "):
        read(data)


def test_numbers_that_overflow_are_refused() -> None:
    with pytest.raises(MessageError, match="no finite number"):
        read(b'{"version": 1, "time": 1e999}')


@pytest.mark.parametrize(
    "changes",
    [{"bundle": "\ud800"}, {"capabilities": {"\udfff": "x"}}, {"weather": ["\ud83d"]}],
    ids=["a field", "a key", "an unknown field"],
)
def test_half_a_surrogate_pair_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(
        MessageError, match=r"presence/site-a: cannot be read as JSON .*surrogates not allowed"
    ):
        read(changed(**changes))


def test_half_a_surrogate_pair_in_text_is_refused() -> None:
    with pytest.raises(MessageError, match="surrogates not allowed"):
        parse_object('{"a": "\ud800"}', "text", 100)


def test_a_whole_surrogate_pair_is_one_character() -> None:
    assert (
        read(changed(capabilities={"mood": "\N{GRINNING FACE}"})).capabilities["mood"] == "\N{GRINNING FACE}"
    )


def test_a_strangers_text_in_an_error_is_quoted_and_cut() -> None:
    with pytest.raises(MessageError) as caught:
        read(changed(capabilities={"\x1b]0;owned\x07\nround closed" + "x" * 9000: 1}))
    assert str(caught.value).isprintable()
    assert r"capabilities['\x1b]0;owned\x07\nround closedxxx" in str(caught.value)
    assert len(str(caught.value)) < 150


def test_size_is_checked_before_parsing() -> None:
    limit = MAXIMUM_BYTES[Presence]
    with pytest.raises(MessageError, match=f"{limit + 1} bytes, but at most {limit} are read"):
        read(b" " * (limit + 1))


def test_a_receipt_has_a_known_status() -> None:
    with pytest.raises(MessageError, match="status is none of accepted, duplicate, stale, rejected"):
        Receipt("birds", "site-a", 3, "", "maybe", "", "")


@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_error(data: bytes) -> None:
    with pytest.raises(MessageError):
        read(data)


any_text = st.text(st.characters(), max_size=10)  # half surrogate pairs too
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(json.loads(to_json(PRESENCE)))), json_values, min_size=1))
def test_any_field_values_give_a_message_or_a_message_error(changes: dict[str, object]) -> None:
    with contextlib.suppress(MessageError):
        message = read(changed(**changes))
        assert read(to_json(message)) == message


@given(st.text(), st.text(), st.text(), st.integers(0, 10_000_000))
def test_a_receipt_is_written_the_same_in_the_fast_way(
    update: str, check: str, reason: str, number: int
) -> None:
    receipt = Receipt("birds", "site-a", number, update, "rejected", check, reason)
    assert receipt_to_json(receipt) == to_json(receipt)
