"""A quick look at an update's payload: most need not be decoded to see that they are sound.

Whoever takes in thousands of updates a second and decodes them later, one by one, only has to know that decoding
will succeed. That can be told without making a tensor where the payload is written as this project's own encoder
does it: one pattern matches the container's text with the header in it, and the largest stored magnitude bounds
both finiteness and norm. Anything else is left to ``decode_update``, which also words every refusal.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmpt.protocol.codec import MAXIMUM_HEADER_BYTES, MAXIMUM_METRIC, MAXIMUM_METRICS, update_container
from fedmpt.protocol.manifest import TensorSpec, canonical_json
from fedmpt.protocol.messages import ENCODINGS, VERSION
from fedmpt.protocol.topics import MAXIMUM_ROUND, NAME

# Unsigned words of a stored number, all bits but the sign's, and how the largest of them is read.
_WORDS: Mapping[str, tuple[np.dtype[Any], NDArray[Any], str]] = {
    "float32": (np.dtype("<u4"), np.array(0x7FFFFFFF, "<u4"), "<f4"),
    "float16": (np.dtype("<u2"), np.array(0x7FFF, "<u2"), "<f2"),
}
_LARGEST_INT8 = 128.0
_LARGEST_SCALE = float(np.finfo(np.float32).max)
# What JSON in the canonical form writes, each a part of what its reader takes.
_DIGEST, _INTEGER = rb"[0-9a-f]{64}", rb"(?:0|[1-9][0-9]{0,14})"
_NUMBER = rb"-?(?:0|[1-9][0-9]{0,19})(?:\.[0-9]{1,30})?(?:[eE][-+]?[0-9]{1,4})?"
_QUOTE = rb'\\"'  # of the header, which is a string in the container's JSON
_METRIC = (_QUOTE, rb"[ !#-\[\]-~]{1,64}", _QUOTE + b":", _NUMBER)
_number = functools.lru_cache(1024)(float)  # float16's scales are powers of two: there are only so many
_READ_METRIC = re.compile(b"%b(%b)%b(%b)" % _METRIC)


class Seen(NamedTuple):
    """What the header of a sound update says, but for how its tensors are encoded."""

    base: str
    client: str
    federation: str
    metrics: Mapping[str, float]
    round: int
    samples: int
    validation_samples: int


class Screen:
    """For updates with exactly the tensors of ``specs``, of at most ``limit`` bytes and the L2 norm ``norm``."""

    def __init__(self, specs: Mapping[str, TensorSpec], limit: int, norm: float) -> None:
        self._limit = limit
        self._norm = norm
        self._written = [(encoding, *_written(specs, encoding)) for encoding in ENCODINGS]

    def look(self, payload: bytes) -> Seen | None:
        """What an update says that ``decode_update`` takes and whose norm is small enough.

        None where that cannot be told so quickly: decode it.
        """
        if len(payload) > self._limit:
            return None
        start = 8 + int.from_bytes(payload[:8], "little")
        if start > min(len(payload), 8 + MAXIMUM_HEADER_BYTES):
            return None
        for encoding, pattern, size in self._written:
            if len(payload) - start == size and (match := pattern.fullmatch(payload, 8, start)):
                return self._read(match, encoding, payload, start)
        return None

    def _read(self, match: re.Match[bytes], encoding: str, payload: bytes, start: int) -> Seen | None:
        base, client, federation, metrics, number, samples, *texts, validation_samples = match.groups()
        scales = list(map(_number, texts)) or [1.0]
        bound = _largest(payload, start, encoding) * max(scales) * math.sqrt(len(payload) - start)
        # A scale beyond float32 would make infinities of zeros.
        if not (bound <= self._norm and min(scales) > 0 and max(scales) <= _LARGEST_SCALE):
            return None
        seen = Seen(
            base.decode(),
            client.decode(),
            federation.decode(),
            {name.decode(): float(value) for name, value in _READ_METRIC.findall(metrics)},
            int(number),
            int(samples),
            int(validation_samples),
        )
        return seen if _bounded(seen) else None


def _bounded(seen: Seen) -> bool:
    """Whether the pattern's numbers are within their bounds."""
    return (
        seen.round <= MAXIMUM_ROUND
        and len(seen.metrics) <= MAXIMUM_METRICS
        and all(abs(value) <= MAXIMUM_METRIC for value in seen.metrics.values())
    )


def _written(specs: Mapping[str, TensorSpec], encoding: str) -> tuple[re.Pattern[bytes], int]:
    """A pattern of the text of an update as ``encode_update`` writes it, and the bytes of its tensors.

    Its groups are what the header's fields hold, in their order, but for encoding and version; each scale is one.
    """
    before, after, size = update_container(specs, encoding)
    names = [] if encoding == "float32" else sorted(specs)
    scales = b",".join(_escaped(name) + rb":(" + _NUMBER + rb")" for name in names)
    metric = b"".join(_METRIC)
    fields = {
        "base": _string(_DIGEST),
        "client": _string(NAME.encode()),
        "encoding": _escaped(encoding),
        "federation": _string(NAME.encode()),
        "metrics": rb"\{((?:" + metric + rb"(?:," + metric + rb")*)?)\}",
        "round": rb"(" + _INTEGER + rb")",
        "samples": rb"(" + _INTEGER + rb")",
        "scales": rb"\{" + scales + rb"\}",
        "validation_samples": rb"(" + _INTEGER + rb")",
        "version": str(VERSION).encode(),
    }
    header = b",".join(_escaped(name) + b":" + pattern for name, pattern in fields.items())
    return re.compile(re.escape(before) + rb'"\{' + header + rb'\}"' + re.escape(after) + b" *"), size


def _string(pattern: bytes) -> bytes:
    return _QUOTE + rb"(" + pattern + rb")" + _QUOTE


def _escaped(text: str) -> bytes:
    """A pattern of a JSON string within the header."""
    return re.escape(canonical_json(canonical_json(text).decode())[1:-1])


def _largest(payload: bytes, start: int, encoding: str) -> float:
    """At least the largest magnitude that is stored; infinity or NaN if one is."""
    if encoding == "int8":
        return _LARGEST_INT8
    words, mask, stored = _WORDS[encoding]
    magnitudes = np.frombuffer(payload, words, offset=start) & mask
    return float(np.maximum.reduce(magnitudes, initial=0).view(stored))
