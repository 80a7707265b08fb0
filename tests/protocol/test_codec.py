"""States and updates as bytes: exact round trips, honest quantisation, and refusals that name the check."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmpt.protocol import codec
from fedmpt.protocol.codec import CodecError, Update
from fedmpt.protocol.manifest import TensorSpec

SPECS = {"class_context": TensorSpec("float32", (3, 4)), "scale": TensorSpec("float32", ())}
LIMIT = 10_000


def a_state() -> codec.State:
    return {
        "class_context": np.arange(12, dtype=np.float32).reshape(3, 4),
        "scale": np.asarray(4.5, np.float32),
    }


def an_update(difference: codec.State | None = None, **changes: object) -> Update:
    fields = {
        "federation": "birds",
        "round": 3,
        "client": "site-a",
        "base": "ab" * 32,
        "samples": 100,
        "validation_samples": 11,
        "metrics": {"mAP": 0.5},
        "difference": difference or a_state(),
    }
    return Update(**(fields | changes))


def tampered(payload: bytes, **changes: object) -> bytes:
    """The payload with fields of its header replaced, as a hostile client would."""
    header = json.loads(safetensors_metadata(payload)["fedmpt"]) | changes
    return safetensors.numpy.save(safetensors.numpy.load(payload), {"fedmpt": json.dumps(header)})


def safetensors_metadata(payload: bytes) -> dict[str, str]:
    size = int.from_bytes(payload[:8], "little")
    return json.loads(payload[8 : 8 + size])["__metadata__"]


def refused(payload: bytes, limit: int = LIMIT, specs: dict[str, TensorSpec] = SPECS) -> CodecError:
    with pytest.raises(CodecError) as caught:
        codec.decode_update(payload, specs, limit)
    return caught.value


def test_a_state_survives_the_round_trip_bit_for_bit() -> None:
    state = codec.decode_state(codec.encode_state(a_state()), SPECS)
    assert codec.state_digest(state) == codec.state_digest(a_state())
    assert state["scale"].shape == ()


def test_the_digest_is_that_of_the_documented_bytes() -> None:
    import hashlib

    text = b'["class_context",[3,4]]\n' + np.arange(12, dtype="<f4").tobytes()
    text += b'["scale",[]]\n' + np.float32(4.5).tobytes()
    assert codec.state_digest(a_state()) == hashlib.sha256(text).hexdigest()


def test_the_digest_does_not_depend_on_the_order_of_names() -> None:
    assert codec.state_digest(dict(reversed(a_state().items()))) == codec.state_digest(a_state())


def test_encoding_is_a_function_of_the_state() -> None:
    reversed_state = dict(reversed(a_state().items()))
    provenance = {"rounds": "3", "federation": "birds", "method": "coop"}
    assert codec.encode_state(reversed_state, provenance) == codec.encode_state(
        a_state(), dict(reversed(provenance.items()))
    )


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array.T.copy().T,
        lambda array: np.asfortranarray(array),
        lambda array: np.repeat(array, 2, axis=1)[:, ::2],
        lambda array: array[::-1][::-1],
        lambda array: array.astype(">f4"),
    ],
    ids=["transposed", "fortran", "strided", "negative strides", "big-endian"],
)
def test_arrays_that_safetensors_would_corrupt_are_written_right(view) -> None:
    state = a_state() | {"class_context": view(a_state()["class_context"])}
    assert codec.state_digest(codec.decode_state(codec.encode_state(state), SPECS)) == codec.state_digest(
        a_state()
    )


def test_a_saved_state_keeps_its_provenance(tmp_path: Path) -> None:
    path = tmp_path / "final.safetensors"
    codec.save_state(path, a_state(), {"federation": "birds"})
    assert codec.state_digest(codec.load_state(path, SPECS)) == codec.state_digest(a_state())
    assert codec.load_provenance(path) == {"federation": "birds"}


def test_a_missing_state_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match=r"gone.safetensors: not found"):
        codec.load_state(tmp_path / "gone.safetensors", SPECS)


def test_a_state_that_is_not_finite_is_not_written() -> None:
    with pytest.raises(CodecError, match="scale has values that are not finite"):
        codec.encode_state(a_state() | {"scale": np.asarray(np.nan, np.float32)})


def test_a_larger_file_than_such_a_state_is_refused_before_parsing() -> None:
    with pytest.raises(CodecError, match="bytes, but at most") as caught:
        codec.decode_state(b"x" * (codec.state_limit(SPECS) + 1), SPECS)
    assert caught.value.check == "size"


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
def test_an_update_keeps_all_that_is_not_the_difference(encoding: str) -> None:
    update, used = codec.decode_update(codec.encode_update(an_update(), encoding), SPECS, LIMIT)
    assert used == encoding
    assert {**vars(update), "difference": None} == {**vars(an_update()), "difference": None}


def test_float32_updates_are_exact() -> None:
    update, _ = codec.decode_update(codec.encode_update(an_update(), "float32"), SPECS, LIMIT)
    assert codec.state_digest(update.difference) == codec.state_digest(a_state())


differences = hnp.arrays(np.float32, (3, 4), elements=st.floats(-(2.0**99), 2.0**99, width=32))


@given(differences)
def test_float16_loses_at_most_half_a_unit_of_its_precision(array: np.ndarray) -> None:
    update, _ = codec.decode_update(
        codec.encode_update(an_update(a_state() | {"class_context": array}), "float16"), SPECS, LIMIT
    )
    error = np.abs(update.difference["class_context"].astype(np.float64) - array)
    # Relative 2⁻¹¹, down to 2⁻²⁹ of the largest value, where float16's subnormal numbers begin.
    bound = np.maximum(np.abs(array.astype(np.float64)) * 2**-11, np.abs(array).max() * 2.0**-38)
    bound = np.maximum(bound, codec.SMALLEST)
    assert (error <= bound * (1 + 1e-6)).all()


@given(differences)
def test_int8_loses_at_most_half_a_step(array: np.ndarray) -> None:
    update, _ = codec.decode_update(
        codec.encode_update(an_update(a_state() | {"class_context": array}), "int8"), SPECS, LIMIT
    )
    error = np.abs(update.difference["class_context"].astype(np.float64) - array)
    bound = max(np.abs(array.astype(np.float64)).max() / 254, codec.SMALLEST)
    assert (error <= bound * (1 + 1e-6)).all()


def test_tiny_differences_do_not_vanish_in_float16() -> None:
    tiny = {name: (tensor * np.float32(1e-9)).astype(np.float32) for name, tensor in a_state().items()}
    update, _ = codec.decode_update(codec.encode_update(an_update(tiny), "float16"), SPECS, LIMIT)
    np.testing.assert_allclose(update.difference["class_context"], tiny["class_context"], rtol=2**-11)


def test_an_update_of_some_tensors_is_refused_where_all_are_trained() -> None:
    payload = codec.encode_update(an_update({"scale": a_state()["scale"]}), "float32")
    error = refused(payload)
    assert error.check == "names"
    assert "missing: class_context" in str(error)


def test_an_update_of_all_tensors_is_refused_where_some_are_trained() -> None:
    error = refused(codec.encode_update(an_update(), "float32"), specs={"scale": SPECS["scale"]})
    assert error.check == "names"
    assert "unknown: 'class_context'" in str(error)


def test_size_is_checked_before_anything_else() -> None:
    error = refused(b"\xff" * 101, limit=100)
    assert error.check == "size"
    assert "101 bytes, but at most 100" in str(error)


def test_another_shape_is_refused() -> None:
    error = refused(
        codec.encode_update(an_update(a_state() | {"scale": np.zeros((1,), np.float32)}), "float32")
    )
    assert error.check == "shape"
    assert "scale is [1], but [] is accepted" in str(error)


def test_another_dtype_than_the_announced_encoding_is_refused() -> None:
    error = refused(
        tampered(codec.encode_update(an_update(), "float32"), encoding="int8", scales=dict.fromkeys(SPECS, 1))
    )
    assert error.check == "dtype"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    payload = codec.encode_update(an_update(), "float32")
    bad = payload[:-4] + np.float32(value).tobytes()
    assert refused(bad).check == "finite"


def test_a_scale_that_overflows_is_refused() -> None:
    scales = dict.fromkeys(SPECS, 1e300)
    assert refused(tampered(codec.encode_update(an_update(), "int8"), scales=scales)).check == "finite"


@pytest.mark.parametrize(
    "scales", [{"scale": 1.0}, dict.fromkeys(SPECS, 0), dict.fromkeys(SPECS, -1), {}], ids=str
)
def test_scales_that_do_not_fit_are_refused(scales: dict[str, float]) -> None:
    assert refused(tampered(codec.encode_update(an_update(), "int8"), scales=scales)).check == "scale"


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"version": 2}, "format"),
        ({"version": True}, "format"),
        ({"client": "../x"}, "format"),
        ({"samples": "many"}, "format"),
        ({"samples": -1}, "samples"),
        ({"round": -1}, "round"),
        ({"encoding": "float64"}, "encoding"),
        ({"metrics": {str(n): 0.0 for n in range(33)}}, "metrics"),
        ({"metrics": {"mAP": 10**400}}, "format"),
        ({"metrics": {"mAP": 1e308}}, "metrics"),
        ({"metrics": {"mAP": -1.0001e12}}, "metrics"),
        ({"metrics": {"": 0.5}}, "metrics"),
        ({"metrics": {"m" * 65: 0.5}}, "metrics"),
        ({"metrics": {"\x1b[2J": 0.5}}, "metrics"),
        ({"metrics": {"\ud800": 0.5}}, "format"),
        ({"base": "\ud800"}, "format"),
    ],
    ids=str,
)
def test_a_header_out_of_range_is_refused(changes: dict[str, object], check: str) -> None:
    assert refused(tampered(codec.encode_update(an_update(), "float32"), **changes)).check == check


def test_metrics_at_their_bounds_are_taken() -> None:
    metrics = {"m" * 64: codec.MAXIMUM_METRIC, "a metric": -codec.MAXIMUM_METRIC}
    payload = codec.encode_update(an_update(metrics=metrics), "float32")
    assert codec.decode_update(payload, SPECS, LIMIT)[0].metrics == metrics


def test_a_strangers_text_in_a_refusal_is_quoted_and_cut() -> None:
    names = {f"{number}\n\x1b]0;owned\x07" + "x" * 500: np.zeros(1, np.float32) for number in range(20)}
    text = str(refused(codec.encode_update(an_update(names), "float32"), limit=1 << 20))
    assert r"unknown: '0\n\x1b]0;owned\x07xxx" in text
    assert text.isprintable()
    assert len(text) < 900


def test_a_shape_of_thousands_of_dimensions_is_cut_in_the_refusal() -> None:
    payload = codec.encode_update(an_update(), "float32")
    size = int.from_bytes(payload[:8], "little")
    header = payload[8 : 8 + size].replace(b'"shape":[]', b'"shape":[' + b"1," * 9999 + b"1]")
    error = refused(len(header).to_bytes(8, "little") + header + payload[8 + size :], limit=1 << 20)
    assert error.check == "shape"
    assert len(str(error)) < 200


def test_unknown_header_fields_are_ignored() -> None:
    payload = tampered(codec.encode_update(an_update(), "float32"), weather="fine")
    assert codec.decode_update(payload, SPECS, LIMIT)[0].client == "site-a"


def test_every_truncation_is_refused() -> None:
    payload = codec.encode_update(an_update(), "float16")
    for size in range(len(payload)):
        assert refused(payload[:size]).check in ("format", "names")


@given(st.binary(max_size=300))
def test_any_bytes_give_a_codec_error(data: bytes) -> None:
    refused(data)


@given(st.data())
def test_any_damage_gives_a_codec_error_or_a_finite_update(data: st.DataObject) -> None:
    payload = bytearray(codec.encode_update(an_update(), "float16"))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        update, _ = codec.decode_update(bytes(payload), SPECS, LIMIT)
    except CodecError:
        return
    assert all(np.isfinite(tensor).all() for tensor in update.difference.values())
