"""Which other files an ONNX file reads, found without opening it: a small reader of the protobuf wire format.

ONNX Runtime up to 1.23.2 reads a tensor's external data wherever its location points: absolute paths, ``../``, links.
A graph from somebody else could so read any file of this machine, and training would send what it read to the
aggregator. So every graph passes :func:`check_external_data` before a session opens it.

Where parsers could read a file differently, it is refused rather than understood: numbers beyond the 32 bits that a
parser may keep of a field's key or of an enumeration, fields that are written twice and would be joined, groups.

Sources: the message definitions of ``onnx.proto`` (field numbers, ``TensorProto.DataType``) and the protocol buffers
encoding specification. Only what can hold a tensor is entered; weights are skipped, not read.
"""

from __future__ import annotations

import mmap
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.text import quoted

MAXIMUM_DEPTH = 100  # of messages within messages, as in protobuf's own parsers
MAXIMUM_FIELDS = 1_000_000  # of a file, in all messages that are entered; the demo's train step has 13,000
MAXIMUM_RANK, MAXIMUM_ENTRIES, MAXIMUM_NAME = 64, 16, 4096
SHOWN = 400  # characters of a location: the path that was asked for is what people must see
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; groups (3, 4) are in no ONNX file
# message → number of a field that is a message → which message; nothing else leads to a tensor
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
}
_REPEATED = {("graph", 1), ("graph", 5), ("graph", 15), ("node", 5), ("attribute", 10), ("attribute", 11)}
_REPEATED |= {("attribute", 23), ("model", 20), ("model", 25), ("function", 7), ("function", 11)}
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 13, 14  # fields of a tensor
# Bits of a value by data type; strings have no size.
_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8,
}  # fmt: skip


class OnnxFileError(FedmptError):
    """A file is no ONNX graph, or a tensor of it would be read from where none may be."""


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose values are in another file: ``entries`` say where, as (key, value) in the file's order."""

    name: str
    data_type: int
    shape: tuple[int, ...]
    entries: tuple[tuple[str, str], ...]


def check_external_data(path: Path, files: Collection[str] = ()) -> None:
    """Accept external data only in ``files``: names of regular files beside the graph, no links, within their size.

    Raises:
        OnnxFileError: the file is no ONNX graph, or a tensor's data lie elsewhere; the text names tensor and location.
    """
    for tensor in external_tensors(path):
        problem = _problem(path.parent, tensor, files)
        if problem:
            raise OnnxFileError(f"{path}: tensor {quoted(tensor.name)} {problem}")


def external_tensors(path: Path) -> Iterator[ExternalTensor]:
    """All tensors of an ONNX file, also those of attributes, subgraphs and functions, that are kept in other files.

    Raises:
        OnnxFileError: the file cannot be read, or is no protobuf message.
    """
    try:
        if not path.is_file():
            raise OnnxFileError(f"{path}: no such file")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from _tensors(data)
    except (ValueError, IndexError) as error:  # also what mmap says of an empty file
        raise OnnxFileError(
            f"{path}: ONNX Runtime cannot open it (no ONNX graph: {error}); copy the file again, or make it anew"
        ) from error
    except OSError as error:
        raise OnnxFileError(f"{path}: cannot be read ({error.strerror})") from error


def _problem(folder: Path, tensor: ExternalTensor, files: Collection[str]) -> str:
    """Why a tensor may not be read; empty if it may."""
    where = dict(tensor.entries)
    location = where.get("location", "")
    if len(where) < len(tensor.entries):
        return "names the place of its data twice; do not use this file"
    if location not in files or Path(location).name != location:
        allowed = f"only {', '.join(sorted(files))} may be read" if files else "no other file may be read"
        return f"wants its data from the file {quoted(location, SHOWN)}, but {allowed}; do not use this file"
    try:
        status = (folder / location).lstat()
    except OSError as error:
        return f"wants its data from {quoted(location, SHOWN)}, which cannot be read ({error.strerror}); copy it again"
    if not stat.S_ISREG(status.st_mode):
        return (
            f"wants its data from {quoted(location, SHOWN)}, which is a link or no regular file; put the file itself "
            "there (cp -rL copies a folder with links as files)"
        )
    numbers = [where.get("offset", "0"), where.get("length", "0")]
    if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in numbers):
        return f"has offset {quoted(numbers[0])} and length {quoted(numbers[1])}, which are no sizes"
    offset, length = map(int, numbers)
    bits = _BITS.get(tensor.data_type, 0)
    for size in tensor.shape:
        bits *= size
        if not 0 <= bits < 1 << 64:
            break
    if not (tensor.data_type in _BITS and 0 <= bits < 1 << 64):
        return f"has external data of type {tensor.data_type} and a shape that have no size"
    end = offset + max(length, -(-bits // 8))
    if end > status.st_size:
        return f"ends at byte {end} of {quoted(location, SHOWN)}, which has {status.st_size}; copy the files again"
    return ""


def _tensors(data: mmap.mmap) -> Iterator[ExternalTensor]:
    waiting = [("model", 0, len(data), 0)]
    budget = iter(range(MAXIMUM_FIELDS))
    while waiting:
        kind, start, end, depth = waiting.pop()
        if depth > MAXIMUM_DEPTH:
            raise ValueError("nested too deeply")
        if kind == "tensor":
            if (tensor := _tensor(data, budget, start, end)) is not None:
                yield tensor
            continue
        within, seen = MESSAGES[kind], set()
        for number, wire, first, last in _fields(data, budget, start, end):
            if wire == _BYTES and number in within:
                if number in seen and (kind, number) not in _REPEATED:
                    raise ValueError(f"byte {first}: a field that is written twice")
                seen.add(number)
                waiting.append((within[number], first, last, depth + 1))


def _tensor(data: mmap.mmap, budget: Iterator[int], start: int, end: int) -> ExternalTensor | None:
    """The tensor if anything in it says that its data are external, else None."""
    name, data_type, external = "", 0, False
    shape: list[int] = []
    entries: list[tuple[str, str]] = []
    for number, wire, first, last in _fields(data, budget, start, end):
        if (number, wire) == (_NAME, _BYTES):
            name = data[first : min(last, first + MAXIMUM_NAME)].decode("utf-8", "replace")
        elif (number, wire) == (_DATA_TYPE, _VARINT):
            data_type = _varint(data, first, last)[0]
        elif (number, wire) == (_DIMS, _VARINT):
            shape.append(_signed(_varint(data, first, last)[0]))
        elif (number, wire) == (_DIMS, _BYTES):
            while first < last and len(shape) <= MAXIMUM_RANK:
                size, first = _varint(data, first, last)
                shape.append(_signed(size))
        elif (number, wire) == (_EXTERNAL_DATA, _BYTES):
            entries.append(_entry(data, budget, first, last))
        elif (number, wire) == (_DATA_LOCATION, _VARINT):
            external = external or _varint(data, first, last)[0] != 0
        if len(shape) > MAXIMUM_RANK or len(entries) > MAXIMUM_ENTRIES:
            raise ValueError(f"byte {first}: more dimensions or entries than a tensor has")
    return ExternalTensor(name, data_type, tuple(shape), tuple(entries)) if external or entries else None


def _entry(data: mmap.mmap, budget: Iterator[int], start: int, end: int) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto."""
    texts: dict[int, str] = {}
    for number, wire, first, last in _fields(data, budget, start, end):
        if number in texts or last - first > MAXIMUM_NAME:
            raise ValueError(f"byte {first}: a field that is written twice or too long")
        if wire == _BYTES:
            texts[number] = data[first:last].decode("utf-8", "replace")
    return texts.get(1, ""), texts.get(2, "")


def _fields(
    data: mmap.mmap, budget: Iterator[int], start: int, end: int
) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type and extent in bytes (of the content, without its length) of each field of a message.

    ``budget`` has an item for each field of the whole file that may be read.
    """
    while start < end:
        if next(budget, None) is None:
            raise ValueError(f"more than {MAXIMUM_FIELDS} fields")
        key, start = _varint(data, start, end)
        if key > 0xFFFFFFFF:
            raise ValueError(f"byte {start}: a key of more than 32 bits")
        number, wire = key >> 3, key & 7
        if wire == _BYTES:
            length, start = _varint(data, start, end)
        elif wire == _VARINT:
            length = _varint(data, start, end)[1] - start
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"byte {start}: wire type {wire}")
        if not number or length > end - start:
            raise ValueError(f"byte {start}: a field that cannot be")
        yield number, wire, start, start + length
        start += length


def _varint(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """A number of at most 64 bits, seven a byte, and where it ends."""
    value = 0
    for index, shift in zip(range(start, min(end, start + 10)), range(0, 70, 7), strict=False):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, index + 1
    raise ValueError(f"byte {start}: a number without end")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
