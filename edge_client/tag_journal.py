"""Which photos are already tagged: an append-only file beside the results, so that a killed run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from fedmpt.protocol.errors import FedmptError

FORMAT = "fedmpt-tag-journal"
VERSION = 1

Signature = tuple[int, int]  # size in bytes, modification time in nanoseconds


class JournalError(FedmptError):
    """A journal cannot be continued with these options or this tagger."""


def signature(path: Path) -> Signature | None:
    """What tells that a photo is unchanged; None where there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


class Journal:
    """Finished photos by path, size and time, each with how long the results were once it was in them.

    A run that was killed left at most some bytes of one unfinished photo in the results: :attr:`offset` says where
    they begin. The first line names the tagger and options; another run's journal is refused.
    """

    def __init__(self, path: Path, identity: dict[str, Any], results: Path | None = None) -> None:
        """Open or begin a journal; entries that ``results`` is too short for (a power cut) are dropped.

        Raises:
            JournalError: it belongs to another tagger or other options, or is no journal.
        """
        self.offset = 0
        self._done: dict[str, Signature] = {}
        self._selected: dict[Path, Signature] = {}
        header = _line({"format": FORMAT, "version": VERSION, **identity})
        content = path.read_bytes() if path.exists() else b""
        end = content.find(b"\n") + 1
        if content[:end] not in (b"", header):
            raise JournalError(
                f"{path}: belongs to a run with another tagger or other options; "
                "continue with those, or remove it and its results to start again"
            )
        kept = self._read(path, content, end, results) if end else 0
        self._file: IO[bytes] = path.open("r+b" if content else "wb")
        self._file.truncate(kept)
        self._file.seek(kept)
        if not kept:
            self._append(header)

    def select(self, photos: Iterable[Path]) -> Iterator[Path]:
        """The photos that are not done, or that changed since; their state is noted before they are read."""
        for path in photos:
            found = signature(path)
            if found is None:  # the decoder says what is wrong with it
                yield path
            elif self._done.get(os.fspath(path)) != found:
                self._selected[path] = found
                yield path

    def record(self, path: Path, offset: int = 0) -> None:
        """Note a selected photo as done, ``offset`` bytes of results having been flushed."""
        found = self._selected.pop(path, None)
        if found is not None:
            self._done[os.fspath(path)] = found
            self._append(_line([os.fspath(path), *found, offset]))

    def close(self) -> None:
        """Close the file; what was recorded is in it already."""
        self._file.close()

    def _append(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def _read(self, path: Path, content: bytes, start: int, results: Path | None) -> int:
        """Take over the whole lines after the header; return where the first unusable one begins."""
        length = results.stat().st_size if results and results.exists() else 0
        while end := content.find(b"\n", start) + 1:
            try:
                name, size, time, offset = json.loads(content[start:end])
                self._done[str(name)] = int(size), int(time)
                offset = int(offset)
            except (ValueError, TypeError) as error:
                raise JournalError(f"{path}: damaged; remove it and its results to start again") from error
            if offset > length:
                del self._done[str(name)]
                return start
            self.offset, start = offset, end
        return start


def _line(value: Any) -> bytes:
    """JSON in ASCII, which also holds file names that are no Unicode."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
