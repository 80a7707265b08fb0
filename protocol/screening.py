"""A quick look at an update's payload: most need not be decoded to see that they are sound.

Whoever takes in thousands of updates a second and decodes them later, one by one, only has to know that decoding
will succeed. That can be told without making a tensor where the payload is written as this project's own encoder
does it: one pattern matches the container's text with the header in it, and the largest stored magnitude bounds
both finiteness and norm. What all updates of a round have in common is part of the pattern. Anything else is left to
``decode_update``, which also words every refusal.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpt.protocol.codec import MAXIMUM_HEADER_BYTES, MAXIMUM_METRICS, update_container
from fedmpt.protocol.manifest import TensorSpec, canonical_json
from fedmpt.protocol.messages import ENCODINGS, VERSION, Limits
from fedmpt.protocol.topics import NAME

# Unsigned words of a stored number, all bits but the sign's, and how the largest of them is read.
_WORDS: Mapping[str, tuple[np.dtype[Any], NDArray[Any], str]] = {
    "float32": (np.dtype("<u4"), np.array(0x7FFFFFFF, "<u4"), "<f4"),
    "float16": (np.dtype("<u2"), np.array(0x7FFF, "<u2"), "<f2"),
}
_LARGEST_INT8 = 128.0
_ROUNDED = 1 + 1e-6  # decoding multiplies by scales in float32, which may round up
_LARGEST_SCALE = float(np.finfo(np.float32).max)
# What JSON in the canonical form writes, each a part of what its reader takes.
_INTEGER = rb"(?:0|[1-9][0-9]{0,14})"
_NUMBER = rb"-?(?:0|[1-9][0-9]{0,19})(?:\.[0-9]{1,30})?(?:[eE][-+]?[0-9]{1,4})?"
_QUOTE = rb'\\"'  # of the header, which is a string in the container's JSON
# At most 12 digits before the point: within MAXIMUM_METRIC.
_METRIC = (
    _QUOTE
    + rb"[ !#-\[\]-~]{1,64}"
    + _QUOTE
    + rb":-?(?:0|[1-9][0-9]{0,11})(?:\.[0-9]{1,30})?(?:[eE]-[0-9]{1,4})?"
)
_METRICS = rb"\{(?:%b(?:,%b){0,%d})?\}" % (_METRIC, _METRIC, MAXIMUM_METRICS - 1)
_number = functools.lru_cache(1024)(float)  # float16's scales are powers of two: there are only so many


class Screen:
    """For updates in one round: with exactly the tensors of ``specs``, within ``limits``, to the state ``base``."""

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        limits: Limits,
        *,
        federation: str,
        round_number: int,
        base: str,
        metrics: bool,
    ) -> None:
        self._limits = limits
        fixed = {
            "base": _escaped(base),
            "federation": _escaped(federation),
            "metrics": _METRICS if metrics else rb"\{\}",
            "round": str(round_number).encode(),
        }
        self._written = [(encoding, *_written(specs, encoding, fixed)) for encoding in ENCODINGS]

    def passes(self, payload: bytes, client: str) -> bool:
        """Whether this is an update of ``client`` that ``decode_update`` takes, and within all limits.

        False where that cannot be told so quickly: decode it.
        """
        if len(payload) > self._limits.update_bytes:
            return False
        start = 8 + int.from_bytes(payload[:8], "little")
        if start > 8 + MAXIMUM_HEADER_BYTES:
            return False
        for encoding, pattern, size in self._written:
            if len(payload) - start == size and (match := pattern.fullmatch(payload, 8, start)):
                return self._fits(match, encoding, payload, start, client)
        return False

    def _fits(self, match: re.Match[bytes], encoding: str, payload: bytes, start: int, client: str) -> bool:
        name, samples, *texts, validation_samples = match.groups()
        scales = list(map(_number, texts)) or [1.0]
        largest = max(scales)
        return (
            name == client.encode()
            and 1 <= int(samples) <= self._limits.samples
            and int(validation_samples) <= self._limits.samples
            # A scale beyond float32 would make infinities of zeros.
            and min(scales) > 0
            and largest <= _LARGEST_SCALE
            and _largest(payload, start, encoding) * largest * _ROUNDED * math.sqrt(len(payload) - start)
            <= self._limits.norm
        )


def _written(
    specs: Mapping[str, TensorSpec], encoding: str, fixed: Mapping[str, bytes]
) -> tuple[re.Pattern[bytes], int]:
    """A pattern of the text of an update as ``encode_update`` writes it, and the bytes of its tensors.

    ``fixed`` are patterns of fields that are the same for all. The groups are client, samples, each scale and
    validation samples.
    """
    before, after, size = update_container(specs, encoding)
    names = [] if encoding == "float32" else sorted(specs)
    scales = b",".join(_escaped(name) + rb":(" + _NUMBER + rb")" for name in names)
    fields = {
        **fixed,
        "client": _QUOTE + rb"(" + NAME.encode() + rb")" + _QUOTE,
        "encoding": _escaped(encoding),
        "samples": rb"(" + _INTEGER + rb")",
        "scales": rb"\{" + scales + rb"\}",
        "validation_samples": rb"(" + _INTEGER + rb")",
        "version": str(VERSION).encode(),
    }
    header = b",".join(_escaped(name) + b":" + fields[name] for name in sorted(fields))
    return re.compile(re.escape(before) + rb'"\{' + header + rb'\}"' + re.escape(after) + b" *"), size


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
