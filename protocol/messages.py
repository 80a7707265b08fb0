"""The JSON messages of protocol v1 as frozen dataclasses.

Every message carries ``version``. Readers ignore fields that they do not know and refuse versions that they
do not know; a message is bounded in size before it is parsed, every number in it is finite, and all its text can be
written again as UTF-8.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.manifest import BundleError, TensorSpec, Training, from_plain
from fedmpt.protocol.topics import MAXIMUM_ROUND, check_name

VERSION = 1
PHASES = ("calibrate", "train", "finished")
RECEIPTS = ("accepted", "duplicate", "stale", "rejected")
ENCODINGS = ("float32", "float16", "int8")
_NO_RECEIPT = f"status is none of {', '.join(RECEIPTS)}"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RUN = re.compile(r"([0-9a-f]{16})?")

AnyMessage = TypeVar("AnyMessage")


class MessageError(FedmptError):
    """A message is too large, not JSON, of an unknown version, or a field is missing or out of range."""


@dataclass(frozen=True)
class Limits:
    """What the aggregator accepts: payload bytes, samples per client, L2 norm of a difference."""

    update_bytes: int
    samples: int
    norm: float


@dataclass(frozen=True)
class Manifest:
    """What the federation trains. ``bundle`` is the bundle's digest; ``state`` the trained tensors.

    ``encoding`` is how updates are to be sent; ``strategy`` tells people how they are combined; ``metrics``
    says whether clients are asked for their validation metrics. ``run`` is drawn when the federation begins anew, so
    that nothing that the broker remembers of an earlier run can be taken for this one's; before there were runs it is
    empty.
    """

    federation: str
    method: str
    labels: tuple[str, ...]
    conditions: tuple[str, ...]
    bundle: str
    state: Mapping[str, TensorSpec]
    training: Training
    strategy: str
    encoding: str
    metrics: bool
    limits: Limits
    run: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        check_name("federation", self.federation)
        _require(_DIGEST.fullmatch(self.bundle), "bundle is no SHA-256")
        _require(self.encoding in ENCODINGS, f"encoding is none of {', '.join(ENCODINGS)}")
        _require(_RUN.fullmatch(self.run), "run is not of 16 hexadecimal digits")


@dataclass(frozen=True)
class Round:
    """The round that is open: who is to train which tensors, from which state, until when.

    ``phase`` is ``calibrate`` (round 0), ``train``, or ``finished``: then ``state/{round}`` is the result and
    nobody trains. ``state`` is the digest of the base state; ``deadline`` is in Unix seconds, None for none.
    ``edition`` grows with every change, so that a reader can leave out what comes after its successor. ``run`` is the
    manifest's: a round of another run neither begins nor ends anything.
    """

    federation: str
    round: int
    phase: str
    trainable: tuple[str, ...]
    state: str
    deadline: float | None
    clients: tuple[str, ...]
    edition: int
    run: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        check_name("federation", self.federation)
        _require(self.edition >= 0, "edition is negative")
        _require(0 <= self.round <= MAXIMUM_ROUND, f"round is not between 0 and {MAXIMUM_ROUND}")
        _require(self.phase in PHASES, f"phase is none of {', '.join(PHASES)}")
        _require(_DIGEST.fullmatch(self.state), "state is no SHA-256")
        _require(_RUN.fullmatch(self.run), "run is not of 16 hexadecimal digits")


@dataclass(frozen=True)
class Receipt:
    """The aggregator's answer to an update: ``check`` names the failed check, ``reason`` its limit.

    A second one comes when a round closes and an accepted update was scaled down for its length. ``update`` is the
    SHA-256 of the payload that it answers.
    """

    federation: str
    client: str
    round: int
    update: str
    status: str
    check: str
    reason: str
    version: int = VERSION

    def __post_init__(self) -> None:
        check_name("client", self.client)
        _require(0 <= self.round <= 10 * MAXIMUM_ROUND, "round is out of range")
        _require(self.status in RECEIPTS, _NO_RECEIPT)


@dataclass(frozen=True)
class Presence:
    """A client is there, or gone; ``samples`` is its number of training photos.

    ``left``: it was stopped, so that no round waits for it any more. Without that (its last will) it may be back in
    a moment, and has its place.

    It is for the aggregator and the operator: no other client may read it (see the ACL of ``fedmpt certs``).
    """

    federation: str
    client: str
    online: bool
    bundle: str
    samples: int
    capabilities: Mapping[str, str]
    left: bool = False
    version: int = VERSION

    def __post_init__(self) -> None:
        check_name("client", self.client)
        _require(self.samples >= 0, "samples is negative")
        _require(not (self.online and self.left), "it is online and has left")


@dataclass(frozen=True)
class Status:
    """The aggregator's own word on where it stands; ``online: false`` is its last will.

    ``time`` is when it was said and ``deadline`` when the round closes, both in Unix seconds; ``waiting``
    tells people what and whom it waits for; ``metrics`` are the last closed round's.
    """

    federation: str
    online: bool
    round: int
    rounds: int
    phase: str
    present: int
    chosen: int
    received: int
    refused: int
    muted: int
    deadline: float | None
    waiting: str
    metrics: Mapping[str, float]
    time: float
    version: int = VERSION


# Bounds in bytes, checked before parsing. A round names up to 10,000 chosen clients.
MAXIMUM_BYTES: Mapping[type, int] = {
    Manifest: 4 << 20,
    Round: 1 << 20,
    Receipt: 16 << 10,
    Presence: 16 << 10,
    Status: 64 << 10,
}


def to_json(message: Any) -> bytes:
    """One message as canonical UTF-8 JSON."""
    return _ENCODER.encode(message).encode()


def receipt_to_json(receipt: Receipt) -> bytes:
    """The same as ``to_json``, several times as fast: an aggregator writes thousands a second."""
    text = json.encoder.encode_basestring
    return (
        f'{{"check":{text(receipt.check)},"client":{text(receipt.client)},'
        f'"federation":{text(receipt.federation)},"reason":{text(receipt.reason)},"round":{receipt.round},'
        f'"status":{text(receipt.status)},"update":{text(receipt.update)},"version":{receipt.version}}}'
    ).encode()


def from_json(kind: type[AnyMessage], data: bytes, where: str) -> AnyMessage:
    """Read one message; ``where`` (its topic) starts the text of an error.

    Raises:
        MessageError: too large, not JSON, of an unknown version, or a field is missing or out of range.
    """
    return read_record(kind, data, where, MAXIMUM_BYTES[kind])


def read_record(kind: type[AnyMessage], data: bytes | str, where: str, maximum_bytes: int) -> AnyMessage:
    """Read a versioned JSON object into the frozen dataclass ``kind``; raises MessageError."""
    value = parse_object(data, where, maximum_bytes)
    version = value.get("version")
    if version != VERSION or isinstance(version, bool):
        raise MessageError(
            f"{where}: version {str(version)[:20]!r}, but this program knows version {VERSION}; "
            "run the same release on all sites"
        )
    try:
        return from_plain(kind, value, where)
    except (BundleError, OverflowError) as error:
        raise MessageError(str(error)) from None
    except FedmptError as error:
        raise MessageError(f"{where}: {error}") from None


def parse_object(data: bytes | str, where: str, maximum_bytes: int) -> dict[str, Any]:
    """Parse a JSON object whose numbers are finite and whose text is Unicode; raises MessageError."""
    if len(data) > maximum_bytes:
        raise MessageError(f"{where}: {len(data)} bytes, but at most {maximum_bytes} are read")
    try:
        text = data if isinstance(data, str) else data.decode()
        value = _DECODER.decode(text)
        # Half a surrogate pair, which no UTF-8 can hold, comes from an escape, or from a caller's own string.
        if "\\u" in text or not text.isascii():
            _ENCODER.encode(value).encode()
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{where}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise MessageError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
# Canonical, like the manifest's: one byte string for one message. Nested records are turned into their fields.
_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=vars
)


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise MessageError(problem)
