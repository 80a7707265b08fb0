"""A quick look at an update's payload: most need not be decoded to see that they are sound.

Whoever takes in thousands of updates a second and decodes them later, one by one, only has to know that decoding
will succeed. That can be told without making a tensor where the payload is written as this project's own encoder
does it: one pattern matches the container's text with the header in it, the largest stored magnitude bounds
finiteness and norm, and the norm itself comes of the stored numbers and their scales. What all updates of a round have
in common is part of the pattern. Anything else is left to
``decode_update``, which also words every refusal.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

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
_STORED: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
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


class _Written(NamedTuple):
    """How an encoding is written: its text, whose groups are client, samples, each scale and validation samples.

    ``size`` is the bytes of all tensors; of each, ``tensors`` has the first and last number and which scale is its own.
    """

    encoding: str
    text: re.Pattern[bytes]
    size: int
    tensors: list[tuple[int, int, int]]


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
        self._written = [_written(specs, encoding, fixed) for encoding in ENCODINGS]

    def norm(self, payload: bytes, client: str) -> float | None:
        """The L2 norm of an update of ``client`` that ``decode_update`` takes, and that is within all limits.

        None where that cannot be told so quickly: decode it.
        """
        if len(payload) > self._limits.update_bytes:
            return None
        start = 8 + int.from_bytes(payload[:8], "little")
        if start > 8 + MAXIMUM_HEADER_BYTES:
            return None
        for written in self._written:
            if len(payload) - start == written.size and (match := written.text.fullmatch(payload, 8, start)):
                return self._norm(match, written, payload, start, client)
        return None

    def _norm(
        self, match: re.Match[bytes], written: _Written, payload: bytes, start: int, client: str
    ) -> float | None:
        name, samples, *texts, validation_samples = match.groups()
        scales = list(map(_number, texts))
        largest = max(scales, default=1.0)
        fits = (
            name == client.encode()
            and 1 <= int(samples) <= self._limits.samples
            and int(validation_samples) <= self._limits.samples
            # A scale beyond float32 would make infinities of zeros.
            and min(scales, default=1.0) > 0
            and largest <= _LARGEST_SCALE
            and _largest(payload, start, written.encoding)
            * largest
            * _ROUNDED
            * math.sqrt(len(payload) - start)
            <= self._limits.norm
        )
        if not fits:
            return None
        stored = np.frombuffer(payload, _STORED[written.encoding], offset=start).astype(np.float64)
        square = 0.0
        for begin, end, scale in written.tensors:
            part = stored[begin:end]
            # Not a product of NumPy's: above 10,000 numbers it wakes BLAS's threads, for each of thousands of updates.
            square += (scales[scale] if scales else 1.0) ** 2 * float(np.einsum("i,i", part, part))
        return math.sqrt(square)


def _written(specs: Mapping[str, TensorSpec], encoding: str, fixed: Mapping[str, bytes]) -> _Written:
    """How ``encode_update`` writes an update; ``fixed`` are patterns of fields that are the same for all."""
    before, after, size = update_container(specs, encoding)
    layout = json.loads(before + b'""' + after)
    width = _STORED[encoding].itemsize
    extents = {name: [offset // width for offset in layout[name]["data_offsets"]] for name in specs}
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
    return _Written(
        encoding,
        re.compile(re.escape(before) + rb'"\{' + header + rb'\}"' + re.escape(after) + b" *"),
        size,
        [(*extents[name], index) for index, name in enumerate(sorted(specs))],
    )


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
