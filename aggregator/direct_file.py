"""Appending to a file past the system's cache (O_DIRECT): what is read back once, much later, need not fill it.

Written the usual way, each byte is copied into pages that the system must find first, which on a busy or virtual
machine costs several times the copy, and is most of what appending costs. Here the bytes are gathered in memory that
is used again and again, and go from there to the disk. A file system that has no O_DIRECT is written the usual way.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

BLOCK = 4096  # what offsets, sizes and addresses must be multiples of
GATHERED_BYTES = 2 << 20


class DirectFile:
    """Appends to ``path`` from the offset ``end`` on.

    The file's last block is written whole, filled up with zeros, until ``close`` cuts them off. What came before in
    that block is written again with the same bytes, so that it stays durable. Raises OSError.
    """

    def __init__(self, path: Path, end: int) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDWR | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, os.O_RDWR)
        self._gathered = mmap.mmap(-1, GATHERED_BYTES)  # begins at a page
        self._offset = end // BLOCK * BLOCK  # in the file, of what is gathered
        self._size = end - self._offset
        with path.open("rb") as file:
            file.seek(self._offset)
            self._gathered[: self._size] = file.read(self._size)

    def append(self, pieces: Iterable[bytes]) -> None:
        """Append all, durably."""
        for piece in pieces:
            while len(piece) >= GATHERED_BYTES - self._size:
                room = GATHERED_BYTES - self._size
                self._gathered[self._size :], piece = piece[:room], piece[room:]
                self._size = GATHERED_BYTES
                self._flush()
            self._gathered[self._size : self._size + len(piece)] = piece
            self._size += len(piece)
        self._flush()
        os.fdatasync(self._descriptor)

    def restart(self) -> None:
        """Empty the file."""
        os.ftruncate(self._descriptor, 0)
        self._offset = self._size = 0

    def close(self) -> None:
        """Cut off what fills the last block, and close."""
        os.ftruncate(self._descriptor, self._offset + self._size)
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        os.close(self._descriptor)

    def _flush(self) -> None:
        """Write what is gathered, and keep of it what the last block must be written with again."""
        padded = -(-self._size // BLOCK) * BLOCK
        self._gathered[self._size : padded] = bytes(padded - self._size)
        with memoryview(self._gathered) as whole, whole[:padded] as view:
            written = 0
            while written < padded:
                with view[written:] as rest:
                    written += os.pwrite(self._descriptor, rest, self._offset + written)
        full = self._size // BLOCK * BLOCK
        self._gathered[: self._size - full] = self._gathered[full : self._size]
        self._offset += full
        self._size -= full
