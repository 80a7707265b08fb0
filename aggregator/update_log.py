"""The updates of the open round: one append-only file, a record an update, one write and one fsync a commit.

An update is a blob that is written once, read once and dropped with its round. Appending it costs a fraction of
what a database takes to keep it in pages (written to its log, then copied into its file). A record is its
head, the client's name, the CRC-32 of both, and the payload:

``magic``, ``round``, payload bytes, name bytes, SHA-256 of the payload.

On opening, zeros after the last record only fill its block, a record that the file's end cuts off was never
committed, and records of an earlier round belong to one that has closed: all are dropped. Where a payload is damaged,
its record is left out and reading goes on behind it. Where a head is damaged, nobody knows where the next record
begins: all from there on is moved to ``updates.log.damaged``, for people. Clients whose updates are lost so send them
again when the round is announced.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fedmpt.aggregator.direct_file import BLOCK, DirectFile
from fedmpt.protocol.files import sync_path

logger = logging.getLogger(__name__)

_MAGIC = b"FMU1"
_HEAD = struct.Struct("<4sIIB32s")
_CHECK = struct.Struct("<I")


class _Head(NamedTuple):
    """A record's head, and where in the file its payload begins and ends."""

    round: int
    client: str
    sha256: bytes
    payload: int
    end: int


class UpdateLog:
    """The log at ``path``, continued from what ``round_number`` has in it; ``path`` None keeps it in memory.

    Raises OSError wherever the file cannot be read or written.
    """

    def __init__(self, path: Path | None, round_number: int) -> None:
        self._round = round_number
        self._places: dict[str, tuple[int, int]] = {}  # client → (offset, bytes) of the payload
        self._waiting: list[bytes] = []
        self._end = 0
        self._failure: OSError | None = None
        self._disk: DirectFile | None = None
        if path is None:
            self._file: BinaryIO = io.BytesIO()
            return
        if not path.exists():
            path.touch()
            sync_path(path.parent)
        self._file = path.open("r+b", buffering=0)  # what is read back is read once
        self._recover(path)
        self._disk = DirectFile(path, self._end)

    def add(self, client: str, payload: bytes, sha256: bytes) -> None:
        """Take an update with the digest of its payload; durable after ``commit``."""
        name = client.encode()
        head = _HEAD.pack(_MAGIC, self._round, len(payload), len(name), sha256) + name
        head += _CHECK.pack(zlib.crc32(head))
        self._waiting += (head, payload)
        self._places[client] = (self._end + len(head), len(payload))
        self._end += len(head) + len(payload)

    def commit(self) -> None:
        """Make all updates that were added durable.

        Once that has failed nobody knows what the disk has, and it fails ever after: open it anew.
        """
        if self._failure:
            raise self._failure
        if not self._waiting:
            return
        try:
            if self._disk:
                self._disk.append(self._waiting)
            else:
                self._file.seek(0, os.SEEK_END)
                self._file.writelines(self._waiting)
        except OSError as error:
            self._failure = error
            raise
        self._waiting.clear()

    def drop(self, client: str) -> None:
        """Leave out a client's update; its record stays in the file until the round ends."""
        del self._places[client]

    def clients(self) -> set[str]:
        """Whose updates it has."""
        return set(self._places)

    def updates(self) -> Iterator[tuple[str, bytes]]:
        """(client, payload) of what is committed, in client-name order, one at a time."""
        for client in sorted(self._places):
            offset, size = self._places[client]
            yield client, self._read(offset, size)

    def start_round(self, round_number: int) -> None:
        """Drop everything: from now on, records are those of ``round_number``."""
        if self._disk:
            self._disk.restart()
        else:
            self._file.truncate(0)
        self._round, self._end = round_number, 0
        self._places.clear()
        self._waiting.clear()

    def close(self) -> None:
        """Close the file; what is not committed is lost."""
        self._file.close()
        if self._disk and self._failure:
            self._disk.abandon()
        elif self._disk:
            self._disk.close()

    def _recover(self, path: Path) -> None:
        """Read what the file has; see the module's text for what becomes of damage."""
        size = os.fstat(self._file.fileno()).st_size
        keep = False
        while self._end < size:
            try:
                head = self._head_at(self._end)
            except ValueError:
                keep = True
                break
            if head is None or head.end > size or head.round < self._round:
                break  # its writing was interrupted, or its round has closed
            if head.round > self._round:
                keep = True  # the database is older than the log
                break
            if hashlib.sha256(self._read(head.payload, head.end - head.payload)).digest() == head.sha256:
                self._places[head.client] = (head.payload, head.end - head.payload)
            else:
                logger.error(
                    "a stored update is damaged and left out; its client sends it again",
                    extra={"file": str(path), "client": head.client, "bytes": head.end - head.payload},
                )
            self._end = head.end
        if keep and not self._is_padding(size):
            kept = path.with_name(f"{path.name}.damaged")
            self._copy_rest(kept)
            logger.error(
                "stored updates are damaged and cut off; their clients send them again",
                extra={"file": str(path), "bytes": size - self._end, "kept": str(kept)},
            )
        elif size > self._end:
            logger.info(
                "what follows the last update is cut off",
                extra={"file": str(path), "bytes": size - self._end},
            )
        self._file.truncate(self._end)

    def _head_at(self, start: int) -> _Head | None:
        """The head that begins at ``start``; None where the file ends in it. Raises ValueError if it is damaged."""
        head = self._read(start, _HEAD.size)
        if len(head) < _HEAD.size:
            return None
        magic, number, length, name_length, sha256 = _HEAD.unpack(head)
        rest = self._read(start + _HEAD.size, name_length + _CHECK.size)
        name, check = rest[:name_length], rest[name_length:]
        if len(check) < _CHECK.size:
            return None
        if magic != _MAGIC or _CHECK.unpack(check)[0] != zlib.crc32(head + name):
            raise ValueError("damaged head")
        payload = start + _HEAD.size + len(rest)
        return _Head(number, name.decode(), sha256, payload, payload + length)

    def _is_padding(self, size: int) -> bool:
        """Whether nothing but the filling of the last block is left."""
        return size - self._end < BLOCK and not any(self._read(self._end, size - self._end))

    def _copy_rest(self, target: Path) -> None:
        """Append everything from the end of the sound records to ``target``, durably."""
        self._file.seek(self._end)
        with target.open("ab") as file:
            shutil.copyfileobj(self._file, file)
        sync_path(target)

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        parts = []
        while size > 0 and (part := self._file.read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
