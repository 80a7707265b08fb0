"""The quick look at updates accepts nothing that decoding would refuse."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt.protocol.codec import CodecError, Update, decode_update, encode_update
from fedmpt.protocol.manifest import TensorSpec
from fedmpt.protocol.messages import ENCODINGS, Limits
from fedmpt.protocol.screening import Screen

SHAPES = {"bias": (), "class_context": (2, 3), "scale": ()}
SPECS = {name: TensorSpec("float32", shape) for name, shape in SHAPES.items()}
LIMIT, NORM = 2000, 50.0
SCREEN = Screen(
    SPECS, Limits(LIMIT, 30, NORM), federation="farm", round_number=1, base="0" * 64, metrics=True
)


def passes(payload: bytes) -> bool:
    return SCREEN.norm(payload, "north") is not None


def payload_of(encoding: str, largest: float = 0.5, **changes: object) -> bytes:
    generator = np.random.default_rng(3)
    difference = {
        name: np.asarray(largest * generator.uniform(-1, 1, shape), np.float32)
        for name, shape in SHAPES.items()
    }
    fields: dict[str, object] = {
        "federation": "farm", "round": 1, "client": "north", "base": "0" * 64, "samples": 20,
        "validation_samples": 2, "metrics": {"mAP": 0.5}, "difference": difference,
    }  # fmt: skip
    return encode_update(Update(**(fields | changes)), encoding)


def norm_when_decoded(payload: bytes) -> float:
    """Infinite where it cannot be decoded."""
    try:
        update, _ = decode_update(payload, SPECS, LIMIT)
    except CodecError:
        return math.inf
    return math.sqrt(
        sum(float((value.astype(np.float64) ** 2).sum()) for value in update.difference.values())
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("metrics", [{}, {"mAP": 0.5, "loss": 1e-7, "a b": -3.0}, {"large": 1e11}], ids=str)
def test_what_our_encoder_makes_passes(encoding: str, metrics: dict[str, float]) -> None:
    payload = payload_of(encoding, metrics=metrics)
    assert passes(payload)
    assert norm_when_decoded(payload) <= NORM


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": "fish"},
        {"round": 2},
        {"client": "south"},
        {"base": "1" * 64},
        {"samples": 0},
        {"samples": 31},
        {"validation_samples": 31},
    ],
    ids=str,
)
def test_what_the_round_does_not_want_is_left_to_decoding(changes: dict[str, object]) -> None:
    assert not passes(payload_of("float16", **changes))


def test_metrics_pass_only_where_they_are_collected() -> None:
    quiet = Screen(
        SPECS, Limits(LIMIT, 30, NORM), federation="farm", round_number=1, base="0" * 64, metrics=False
    )
    assert quiet.norm(payload_of("float16", metrics={}), "north") is not None
    assert quiet.norm(payload_of("float16"), "north") is None


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_may_be_beyond_the_norm_is_left_to_decoding(encoding: str) -> None:
    assert not passes(payload_of(encoding, largest=60.0))


@pytest.mark.parametrize("encoding", ["float32", "float16"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_is_left_to_decoding(encoding: str, value: float) -> None:
    payload = payload_of(encoding)
    number = np.asarray(value, {"float32": "<f4", "float16": "<f2"}[encoding]).tobytes()
    assert not passes(payload[: -len(number)] + number)


def test_a_scale_that_makes_infinities_of_zeros_is_left_to_decoding() -> None:
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    payload = payload_of("float16", difference=zeros)
    assert passes(payload)
    larger = payload.replace(b'"bias\\":1.0', b'"bias\\":9e99')
    size = int.from_bytes(payload[:8], "little") + len(larger) - len(payload)
    larger = size.to_bytes(8, "little") + larger[8:]
    assert not passes(larger)
    assert norm_when_decoded(larger) == math.inf


def test_half_a_surrogate_pair_is_left_to_decoding() -> None:
    payload = payload_of("float32", metrics={"AAAAAA": 0.5})
    broken = payload.replace(b"AAAAAA", b"\\ud800")
    assert len(broken) == len(payload)
    assert not passes(broken)
    assert norm_when_decoded(broken) == math.inf


@pytest.mark.parametrize(
    ("name", "value"), [(r"\\ud800", "0.5"), ("AAAAAA", "1e308"), (r"\\u001b", "0.5")], ids=str
)
def test_a_metric_that_cannot_be_summed_or_written_does_not_pass(name: str, value: str) -> None:
    payload = payload_of("float32", metrics={"AAAAAA": 0.5})
    size = int.from_bytes(payload[:8], "little")
    header = payload[8 : 8 + size].replace(b'AAAAAA\\":0.5', f'{name}\\":{value}'.encode())
    assert value.encode() in header
    broken = len(header).to_bytes(8, "little") + header + payload[8 + size :]
    assert not passes(broken)
    assert norm_when_decoded(broken) == math.inf


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(ENCODINGS), st.data())
def test_nothing_passes_that_decoding_refuses(encoding: str, data: st.DataObject) -> None:
    payload = bytearray(payload_of(encoding, data.draw(st.sampled_from([0.5, 20.0]))))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(payload) - 1))
        match data.draw(st.sampled_from(("change", "insert", "delete", "cut"))):
            case "change":
                payload[place] = data.draw(st.integers(0, 255))
            case "insert":
                payload[place:place] = data.draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del payload[place : place + data.draw(st.integers(1, 8))]
            case "cut":
                del payload[max(1, place) :]
        if not payload:
            return
    if passes(bytes(payload)):
        assert norm_when_decoded(bytes(payload)) <= NORM * (1 + 1e-6)


@given(
    st.sampled_from(ENCODINGS),
    st.dictionaries(
        st.sampled_from("abcdef"),
        st.sampled_from([(), (1,), (0,), (3, 0), (7,), (2, 3)]),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**32 - 1),
)
def test_the_norm_is_that_of_the_decoded_difference(
    encoding: str, shapes: dict[str, tuple[int, ...]], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    specs = {name: TensorSpec("float32", shape) for name, shape in shapes.items()}
    difference = {
        name: np.asarray(10 ** generator.uniform(-6, 1) * generator.normal(size=shape), np.float32)
        for name, shape in shapes.items()
    }
    update = Update("farm", 1, "north", "0" * 64, 20, 2, {}, difference)
    payload = encode_update(update, encoding)
    limits = Limits(10_000, 30, 1e6)
    found = Screen(specs, limits, federation="farm", round_number=1, base="0" * 64, metrics=True).norm(
        payload, "north"
    )
    decoded, _ = decode_update(payload, specs, 10_000)
    expected = math.sqrt(
        sum(float((value.astype(np.float64) ** 2).sum()) for value in decoded.difference.values())
    )
    assert found is not None
    assert math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-30)


def test_a_scale_that_decoding_rounds_up_brings_no_norm_past_its_limit() -> None:
    written = payload_of("int8", largest=1.0)
    length = int.from_bytes(written[:8], "little")
    body = b"\x80" * (len(written) - 8 - length)  # all at −128
    for scale in np.random.default_rng(0).uniform(0.1, 1, 50).tolist():
        text = re.sub(
            rb'(\\"(?:bias|class_context|scale)\\":)[-+.0-9e]+', rb"\g<1>%r" % scale, written[8 : 8 + length]
        )
        payload = len(text.rstrip()).to_bytes(8, "little") + text.rstrip() + body
        norm = 128 * scale * math.sqrt(len(body)) * (1 + 1e-15)
        limits = Limits(LIMIT, 30, norm)
        screen = Screen(SPECS, limits, federation="farm", round_number=1, base="0" * 64, metrics=True)
        assert norm_when_decoded(payload) < math.inf
        assert norm_when_decoded(payload) <= norm or screen.norm(payload, "north") is None
