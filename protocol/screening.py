"""A quick look at an update's payload: most need not be decoded to see that they are sound.

Whoever takes in thousands of updates a second and decodes them later, one by one, only has to know that decoding
will succeed. That can be told without making a tensor where the payload is laid out as this project's own
encoder does it: the container's text is compared, the header is read, and the largest stored magnitude bounds
both finiteness and norm. Anything else is left to ``decode_update``, which also words every refusal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np

from fedmpt.protocol.codec import (
    MAXIMUM_HEADER_BYTES,
    CodecError,
    UpdateHeader,
    check_update_header,
    update_container,
)
from fedmpt.protocol.manifest import TensorSpec
from fedmpt.protocol.messages import ENCODINGS, MessageError, read_record

# Unsigned words of a stored number, all bits but the sign's, and the first that is infinite. An int8 is at most 128.
_WORDS = {"float32": ("<u4", 0x7FFFFFFF, "<f4"), "float16": ("<u2", 0x7FFF, "<f2")}
_LARGEST_INT8 = 128.0
_LARGEST_SCALE = float(np.finfo(np.float32).max)


class Screen:
    """For updates with exactly the tensors of ``specs``, of at most ``limit`` bytes and the L2 norm ``norm``."""

    def __init__(self, specs: Mapping[str, TensorSpec], limit: int, norm: float) -> None:
        self._names = specs.keys()
        self._limit = limit
        self._norm = norm
        self._containers = [(encoding, *update_container(specs, encoding)) for encoding in ENCODINGS]

    def header(self, payload: bytes) -> UpdateHeader | None:
        """The header of an update that ``decode_update`` takes and whose norm is small enough.

        None where that cannot be told so quickly: decode it.
        """
        if len(payload) > self._limit:
            return None
        start = 8 + int.from_bytes(payload[:8], "little")
        if start > min(len(payload), 8 + MAXIMUM_HEADER_BYTES):
            return None
        text = payload[8:start].rstrip(b" ")
        for encoding, before, after, size in self._containers:
            if len(payload) - start == size and text.startswith(before) and text.endswith(after):
                return self._sound(self._read(text[len(before) : -len(after)]), encoding, payload, start)
        return None

    def _sound(
        self, header: UpdateHeader | None, encoding: str, payload: bytes, start: int
    ) -> UpdateHeader | None:
        if header is None or header.encoding != encoding:
            return None
        scale = max(header.scales.values(), default=1.0)
        bound = _largest(payload, start, encoding) * scale * math.sqrt(len(payload) - start)
        # A scale beyond float32 would make infinities of zeros.
        return header if scale <= _LARGEST_SCALE and bound <= self._norm else None

    def _read(self, quoted: bytes) -> UpdateHeader | None:
        try:
            text = json.loads(quoted.decode())
            # Half a surrogate pair, which only safetensors refuses, is not ASCII.
            if not isinstance(text, str) or not text.isascii():
                return None
            header = read_record(UpdateHeader, text, "update", MAXIMUM_HEADER_BYTES)
            check_update_header(header, self._names, "update")
        except (ValueError, RecursionError, MessageError, CodecError):
            return None
        return header


def _largest(payload: bytes, start: int, encoding: str) -> float:
    """At least the largest magnitude that is stored; infinity or NaN if one is."""
    if encoding == "int8":
        return _LARGEST_INT8
    words, mask, stored = _WORDS[encoding]
    magnitudes = np.frombuffer(payload, words, offset=start) & np.array(mask, words)
    return float(magnitudes.max(initial=0).view(stored))
