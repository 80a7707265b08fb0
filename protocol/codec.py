"""States and updates as safetensors bytes; every bound is checked before anything is parsed.

A payload is one safetensors file whose metadata has a single key, ``fedmpt``, with a versioned JSON header
(one key, because safetensors does not keep the order of several). An update carries the *difference* to its
base state in one of three encodings: ``float32``; ``float16`` and ``int8`` with one float64 scale per tensor,
difference = stored value × scale. float16's scale is a power of two that uses its full range, so that small
differences do not sink into its subnormal numbers.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import write_atomically
from fedmpt.protocol.manifest import TensorSpec, canonical_json
from fedmpt.protocol.messages import ENCODINGS, VERSION, MessageError, parse_object, read_record
from fedmpt.protocol.text import quoted
from fedmpt.protocol.topics import MAXIMUM_ROUND, TopicError, check_name

State = dict[str, NDArray[np.float32]]

MAXIMUM_HEADER_BYTES = 64 << 10
MAXIMUM_METRICS = 32
MAXIMUM_METRIC = 1e12  # a metric's magnitude, so that sums over clients and photos stay finite
SMALLEST = 2.0**-100  # tensors below it count as zero in the scaled encodings, whose arithmetic is float32
_METRIC_NAME = re.compile(r"[ -~]{1,64}")
_STORED = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "int8": ("I8", "i1")}


class CodecError(FedmptError):
    """A payload or file is refused; ``check`` names the check that failed, the text the limit."""

    def __init__(self, check: str, text: str) -> None:
        super().__init__(text)
        self.check = check


@dataclass(frozen=True, eq=False)
class Update:
    """One client's work in one round: its ``difference`` (float32) to the state with the digest ``base``.

    ``samples`` is the number of training photos behind it; ``metrics`` were measured on the received global
    state with ``validation_samples`` held-out photos.
    """

    federation: str
    round: int
    client: str
    base: str
    samples: int
    validation_samples: int
    metrics: Mapping[str, float]
    difference: State


@dataclass(frozen=True)
class UpdateHeader:
    """The JSON header of an update's payload."""

    federation: str
    round: int
    client: str
    base: str
    samples: int
    validation_samples: int
    metrics: Mapping[str, float]
    encoding: str
    scales: Mapping[str, float]
    version: int = VERSION


@dataclass(frozen=True)
class StateHeader:
    """The JSON header of a state's payload; ``provenance`` tells people where the state came from."""

    provenance: Mapping[str, str]
    version: int = VERSION


def state_digest(state: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over the tensors in name order: name, shape and little-endian float32 content."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = _stored_array(state[name], "<f4")
        digest.update(canonical_json([name, list(tensor.shape)]) + b"\n")
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def encode_state(state: Mapping[str, NDArray[Any]], provenance: Mapping[str, str] | None = None) -> bytes:
    """A state as safetensors bytes; the same state and provenance give the same bytes.

    Raises:
        CodecError: a value is not finite.
    """
    for name, tensor in state.items():
        _require_finite(name, tensor)
    return _save(state, "float32", _text(StateHeader(dict(provenance or {}))))


def decode_state(data: bytes, specs: Mapping[str, TensorSpec], where: str = "state") -> State:
    """Read a state that holds exactly the tensors of ``specs``, finite; ``where`` starts the text of errors.

    Raises:
        CodecError: larger than such a state can be, malformed, or another name, shape or dtype.
    """
    _read_header(StateHeader, data, state_limit(specs), where)
    return _read_tensors(data, specs, "float32", {}, where)


def encode_update(update: Update, encoding: str) -> bytes:
    """An update as safetensors bytes, with its difference in ``float32``, ``float16`` or ``int8``.

    Raises:
        CodecError: a value of the difference is not finite, or a metric's name or magnitude is out of bounds.
    """
    stored: dict[str, NDArray[Any]] = {}
    scales: dict[str, float] = {}
    for name, tensor in update.difference.items():
        _require_finite(name, tensor)
        exact = np.asarray(tensor, dtype=np.float64)
        if encoding != "float32":
            exact, scales[name] = _scaled(exact, encoding)
        stored[name] = exact
    header = UpdateHeader(
        update.federation,
        update.round,
        update.client,
        update.base,
        update.samples,
        update.validation_samples,
        dict(update.metrics),
        encoding,
        scales,
    )
    check_update_header(header, header.scales.keys(), "update")
    return _save(stored, encoding, _text(header))


def decode_update(
    data: bytes, specs: Mapping[str, TensorSpec], limit: int, where: str = "update"
) -> tuple[Update, str]:
    """Read an update with exactly the tensors of ``specs`` (the round's trainable ones): (update, encoding).

    Raises:
        CodecError: more than ``limit`` bytes, malformed, or a name, shape, dtype, scale or value is refused.
    """
    header = _read_header(UpdateHeader, data, limit, where)
    check_update_header(header, specs.keys(), where)
    difference = _read_tensors(data, specs, header.encoding, header.scales, where)
    update = Update(
        header.federation,
        header.round,
        header.client,
        header.base,
        header.samples,
        header.validation_samples,
        header.metrics,
        difference,
    )
    return update, header.encoding


def update_container(specs: Mapping[str, TensorSpec], encoding: str) -> tuple[bytes, bytes, int]:
    """How ``encode_update`` lays out an update with these tensors.

    The container's text before and after its header (a quoted JSON string), without padding, and the bytes of
    the tensors that follow.
    """
    zeros = {name: np.zeros(_shape(spec)) for name, spec in specs.items()}
    payload = _save(zeros, encoding, "header")
    start = 8 + int.from_bytes(payload[:8], "little")
    before, after = payload[8:start].rstrip(b" ").split(b'"header"', 1)
    return before, after, len(payload) - start


def save_state(
    path: Path, state: Mapping[str, NDArray[Any]], provenance: Mapping[str, str] | None = None
) -> None:
    """Write a state as a safetensors file, whole or not at all."""
    write_atomically(path, encode_state(state, provenance))


def load_state(path: Path, specs: Mapping[str, TensorSpec]) -> State:
    """Read a state file that holds exactly the tensors of ``specs``.

    Raises:
        CodecError: missing, unreadable, or not such a state.
    """
    return decode_state(_read_file(path, state_limit(specs)), specs, str(path))


def load_provenance(path: Path) -> Mapping[str, str]:
    """What the writer of a state file noted beside it: federation, rounds, method, …; raises CodecError."""
    beginning = _read_file(path, 8 + MAXIMUM_HEADER_BYTES)
    header: StateHeader = _parse_header(StateHeader, beginning, str(path))
    return header.provenance


def state_limit(specs: Mapping[str, TensorSpec]) -> int:
    """The most bytes that a payload with these tensors can have in any encoding."""
    return 8 + MAXIMUM_HEADER_BYTES + sum(4 * math.prod(_shape(spec)) for spec in specs.values())


def _scaled(exact: NDArray[np.float64], encoding: str) -> tuple[NDArray[np.float64], float]:
    """A tensor as the encoding stores it, and the scale that brings it back."""
    largest = float(np.max(np.abs(exact), initial=0.0))
    if largest < SMALLEST:
        return np.zeros_like(exact), 1.0
    if encoding == "int8":
        scale = largest / 127
        return np.rint(exact / scale), scale
    scale = math.ldexp(1.0, math.frexp(largest)[1] - 15)
    return exact / scale, scale


def _save(tensors: Mapping[str, NDArray[Any]], encoding: str, header: str) -> bytes:
    _, dtype = _STORED[encoding]
    # safetensors 0.8 writes garbage for arrays that are not C-contiguous: always hand it a fresh copy.
    arrays = {name: _stored_array(tensors[name], dtype) for name in sorted(tensors)}
    return safetensors.numpy.save(arrays, {"fedmpt": header})


def _text(header: UpdateHeader | StateHeader) -> str:
    return canonical_json(vars(header)).decode()


def _stored_array(tensor: NDArray[Any], dtype: str) -> NDArray[Any]:
    return np.array(tensor, dtype=dtype, order="C", copy=True, ndmin=0)


def _read_file(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except FileNotFoundError:
        raise CodecError("file", f"{path}: not found; give a state file such as final.safetensors") from None
    except OSError as error:
        raise CodecError("file", f"{path}: cannot be read ({error.strerror})") from error


def _read_header(kind: type[Any], data: bytes, limit: int, where: str) -> Any:
    if len(data) > limit:
        raise CodecError("size", f"{where}: {len(data)} bytes, but at most {limit} are accepted")
    return _parse_header(kind, data, where)


def _parse_header(kind: type[Any], data: bytes, where: str) -> Any:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, MAXIMUM_HEADER_BYTES):
        raise CodecError(
            "format",
            f"{where}: no safetensors payload, or its header is cut off or over {MAXIMUM_HEADER_BYTES} bytes",
        )
    try:
        container = parse_object(data[8 : 8 + size], where, MAXIMUM_HEADER_BYTES)
        metadata = container.get("__metadata__")
        text = metadata.get("fedmpt") if isinstance(metadata, dict) else None
        if not isinstance(text, str):
            raise CodecError("format", f"{where}: safetensors without this project's header")
        return read_record(kind, text, where, MAXIMUM_HEADER_BYTES)
    except MessageError as error:
        raise CodecError("format", str(error)) from None


def check_update_header(header: UpdateHeader, names: Collection[str], where: str) -> None:
    try:
        check_name("federation", header.federation)
        check_name("client", header.client)
    except TopicError as error:
        raise CodecError("format", f"{where}: {error}") from None
    if header.encoding not in ENCODINGS:
        raise CodecError("encoding", f"{where}: encoding is none of {', '.join(ENCODINGS)}")
    if not 0 <= header.round <= MAXIMUM_ROUND:
        raise CodecError("round", f"{where}: round is not between 0 and {MAXIMUM_ROUND}")
    if header.samples < 0 or header.validation_samples < 0:
        raise CodecError("samples", f"{where}: a number of samples is negative")
    if len(header.metrics) > MAXIMUM_METRICS:
        raise CodecError(
            "metrics", f"{where}: {len(header.metrics)} metrics, but at most {MAXIMUM_METRICS} are accepted"
        )
    for name, value in header.metrics.items():
        if not _METRIC_NAME.fullmatch(name):
            raise CodecError(
                "metrics", f"{where}: metric name {quoted(name)} is not 1 to 64 printable ASCII characters"
            )
        if not abs(value) <= MAXIMUM_METRIC:
            raise CodecError(
                "metrics",
                f"{where}: metric {quoted(name)} is {value:.6g}, but its magnitude may be at most {MAXIMUM_METRIC:g}",
            )
    if set(header.scales) != (set() if header.encoding == "float32" else set(names)):
        raise CodecError("scale", f"{where}: the scales are not those of the tensors")
    if not all(0 < value < math.inf for value in header.scales.values()):
        raise CodecError("scale", f"{where}: a scale is not positive and finite")


def _read_tensors(
    data: bytes, specs: Mapping[str, TensorSpec], encoding: str, scales: Mapping[str, float], where: str
) -> State:
    try:
        entries = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise CodecError("format", f"{where}: damaged safetensors payload ({quoted(str(error))})") from None
    if entries.keys() != specs.keys():
        missing, unknown = sorted(specs.keys() - entries), sorted(entries.keys() - specs)
        raise CodecError(
            "names",
            f"{where}: tensors missing: {_listed(missing)}; unknown: {_listed(map(quoted, unknown))}; "
            f"exactly {_listed(sorted(specs))} are accepted",
        )
    tensors: State = {}
    # Infinities and overflows are looked for, and refused, by value.
    with np.errstate(over="ignore", invalid="ignore"):
        for name in sorted(specs):
            tensors[name] = _read_tensor(name, entries[name], specs[name], encoding, scales, where)
    return tensors


def _read_tensor(
    name: str, entry: Any, spec: TensorSpec, encoding: str, scales: Mapping[str, float], where: str
) -> NDArray[np.float32]:
    (kind, dtype), shape = _STORED[encoding], _shape(spec)
    if entry["dtype"] != kind:
        raise CodecError("dtype", f"{where}: {name} is {entry['dtype']}, but {kind} is accepted")
    if tuple(entry["shape"]) != shape:
        raise CodecError(
            "shape", f"{where}: {name} is {str(entry['shape'])[:80]}, but {list(shape)} is accepted"
        )
    stored = np.frombuffer(entry["data"], dtype=dtype).reshape(shape)
    tensor = stored.astype(np.float32)
    if encoding != "float32":
        tensor *= np.float32(scales[name])
    _require_finite(name, tensor, f"{where}: ")
    return tensor


def _require_finite(name: str, tensor: NDArray[Any], where: str = "") -> None:
    # In float64 the sum of finite float32 numbers is finite, and any other value makes it infinite or NaN.
    with np.errstate(invalid="ignore"):
        total = np.asarray(tensor).sum(dtype=np.float64)
    if not math.isfinite(total):
        raise CodecError("finite", f"{where}{name} has values that are not finite")


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(int(size) for size in spec.shape)


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(listed[:8]) or "none"
    return shown + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
