"""The feature cache on disk: ``index.sqlite`` and one file of float16 tokens.

``tokens-<generation>.f16`` holds row after row, ``[M, D]`` little-endian each; the index says which photo (by
the SHA-256 of its content) each row belongs to, with a checksum. Rows are written first and entered in the index
after, so that a kill at any moment leaves only bytes that no entry points to. What readers see, the *view*,
changes in one transaction at the end of a build; rows of photos that went are dropped by writing a new
generation, never in place, so that a reader that has the old one mapped is not disturbed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import sync_path

APPLICATION_ID = 0x46504D43  # "FPMC", in the SQLite header
VERSION = 1
INDEX = "index.sqlite"
SCHEMA = (
    "CREATE TABLE meta (json TEXT NOT NULL)",
    # slot: position in the token file; path and labels (int8 [C]): NULL where the row is not in the view.
    # A path is bytes, for file names need not be Unicode.
    "CREATE TABLE rows (slot INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, crc INTEGER NOT NULL,"
    " path BLOB, labels BLOB)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
)


class CacheError(FedmptError):
    """A feature cache is missing, half-written, damaged, or made for another encoder or other labels."""


@dataclass(frozen=True)
class Meta:
    """What a cache was made for; ``photos`` is the size of the view, None before the first complete build."""

    encoder: str
    labels: tuple[str, ...]
    tokens: int
    width: int
    generation: int
    photos: int | None

    @property
    def row_bytes(self) -> int:
        """Bytes of one photo's tokens."""
        return self.tokens * self.width * 2


@dataclass(frozen=True)
class Row:
    """One entry of the index."""

    slot: int
    hash: str
    crc: int
    path: str | None
    labels: bytes | None


@dataclass(frozen=True)
class Entry:
    """What the view says of a photo."""

    path: str
    labels: npt.NDArray[np.int8]


def tokens_path(folder: Path, meta: Meta) -> Path:
    """The token file of the current generation."""
    return folder / f"tokens-{meta.generation}.f16"


def read_index(folder: Path) -> tuple[Meta, list[Row]]:
    """All of the index, rows in slot order, in one consistent reading.

    Raises:
        CacheError: missing, not a cache's index, of another version, or damaged.
    """
    if not (folder / INDEX).is_file():
        raise CacheError(f"{folder}: no feature cache here; make it with `fedmpt cache`")
    with _connect(folder) as connection:
        connection.execute("BEGIN")
        meta, rows = _read(connection, folder)
        connection.execute("COMMIT")
    return meta, rows


def map_tokens(folder: Path, meta: Meta, count: int) -> npt.NDArray[np.float16]:
    """The first ``count`` rows of the token file, memory-mapped read-only: float16 ``[count, M, D]``.

    Raises:
        CacheError: the file is missing or shorter than that.
    """
    path = tokens_path(folder, meta)
    shape = (count, meta.tokens, meta.width)
    if count == 0:
        return np.empty(shape, np.float16)
    try:
        return np.memmap(path, "<f2", "r", shape=shape)
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{path}: not the {count} rows of the index ({error}); run `fedmpt cache` again"
        ) from None


def damaged_slots(folder: Path, meta: Meta, rows: Sequence[Row]) -> list[int]:
    """Slots whose bytes are not those that were written, by their checksums (read on all cores)."""
    path = tokens_path(folder, meta)
    available = path.stat().st_size // meta.row_bytes if path.is_file() else 0
    present = [row for row in rows if row.slot < available]
    damaged = [row.slot for row in rows if row.slot >= available]
    if present:
        tokens = map_tokens(folder, meta, available)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            sums = pool.map(lambda row: zlib.crc32(tokens[row.slot]), present)
            damaged += [row.slot for row, crc in zip(present, sums, strict=True) if crc != row.crc]
    return damaged


class Store:
    """A cache that is being built; made by :func:`open_store`."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, meta: Meta, rows: Sequence[Row]) -> None:
        self._folder = folder
        self._connection = connection
        self._meta = meta
        self._rows = {row.hash: row for row in rows}
        self._next = max((row.slot for row in rows), default=-1) + 1
        self._pending: list[Row] = []
        self._file = tokens_path(folder, meta).open("r+b" if tokens_path(folder, meta).exists() else "x+b")

    def __contains__(self, content_hash: object) -> bool:
        return content_hash in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of one photo's tokens on disk."""
        return self._meta.row_bytes

    def append(self, content_hash: str, tokens: npt.NDArray[np.float16]) -> None:
        """Write a photo's tokens ``[M, D]``; they are safe from the next :meth:`checkpoint` on."""
        data = np.ascontiguousarray(tokens, "<f2").tobytes()
        self._file.seek(self._next * self._meta.row_bytes)
        self._file.write(data)
        self._rows[content_hash] = Row(self._next, content_hash, zlib.crc32(data), None, None)
        self._pending.append(self._rows[content_hash])
        self._next += 1

    def checkpoint(self) -> None:
        """Make all appended rows durable: first the tokens, then the index."""
        if self._pending:
            self._file.flush()
            os.fsync(self._file.fileno())
            with self._connection:
                self._insert(self._pending)
            self._pending = []

    def publish(self, view: Mapping[str, Entry], labels: tuple[str, ...]) -> int:
        """Make ``view`` what readers see and drop all other rows, at last; return how many were dropped."""
        self.checkpoint()
        self._file.truncate(self._next * self._meta.row_bytes)  # what a killed build left behind
        live = sorted((self._rows[content_hash] for content_hash in view), key=lambda row: row.slot)
        meta = replace(self._meta, labels=labels, photos=len(live))
        if [row.slot for row in live] != list(range(self._next)):
            meta = replace(meta, generation=meta.generation + 1)
            live = self._copy(live, tokens_path(self._folder, meta))
        live = [
            replace(row, path=view[row.hash].path, labels=view[row.hash].labels.astype(np.int8).tobytes())
            for row in live
        ]
        with self._connection:
            self._connection.execute("DELETE FROM rows")
            self._insert(live)
            self._connection.execute("UPDATE meta SET json = ?", (json.dumps(asdict(meta)),))
        for old in self._folder.glob("tokens-*.f16"):
            if old != tokens_path(self._folder, meta):
                old.unlink()
        return len(self._rows) - len(live)

    def close(self) -> None:
        """Release the token file."""
        self._file.close()

    def _insert(self, rows: Sequence[Row]) -> None:
        values = [
            (row.slot, row.hash, row.crc, None if row.path is None else os.fsencode(row.path), row.labels)
            for row in rows
        ]
        self._connection.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", values)

    def _copy(self, rows: Sequence[Row], target: Path) -> list[Row]:
        with target.open("wb") as file:
            for row in rows:
                self._file.seek(row.slot * self._meta.row_bytes)
                file.write(self._file.read(self._meta.row_bytes))
            file.flush()
            os.fsync(file.fileno())
        sync_path(self._folder)
        return [replace(row, slot=slot) for slot, row in enumerate(rows)]


@contextlib.contextmanager
def open_store(folder: Path, meta: Meta) -> Iterator[Store]:
    """Open or begin a cache for building, alone; damaged rows are forgotten, so that they are made again.

    ``meta`` says what is to be built; only its encoder, tokens and width must agree with what is there.

    Raises:
        CacheError: another encoder's cache, another build is running, no space or no permission.
    """
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CacheError(
                    f"{folder}: another `fedmpt cache` is writing it; wait for that one"
                ) from None
            with _connect(folder, create=meta) as connection:
                found, rows = _read(connection, folder)
                if (found.encoder, found.tokens, found.width) != (meta.encoder, meta.tokens, meta.width):
                    raise CacheError(other_encoder(folder))
                damaged = set(damaged_slots(folder, found, rows))
                with connection:
                    connection.executemany("DELETE FROM rows WHERE slot = ?", [(slot,) for slot in damaged])
                store = Store(folder, connection, found, [row for row in rows if row.slot not in damaged])
                with contextlib.closing(store):
                    yield store


def other_encoder(folder: Path) -> str:
    """The refusal of a cache of another image encoder."""
    return (
        f"{folder}: made with another image encoder than this bundle's; use the bundle that it was made with, "
        "or make a new one with `fedmpt cache --out` and another folder"
    )


@contextlib.contextmanager
def _connect(folder: Path, create: Meta | None = None) -> Iterator[sqlite3.Connection]:
    path = folder / INDEX
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as connection:
            if create is not None and not connection.execute("SELECT * FROM sqlite_master").fetchall():
                with connection:
                    connection.execute("BEGIN")
                    for statement in SCHEMA:
                        connection.execute(statement)
                    connection.execute("INSERT INTO meta VALUES (?)", (json.dumps(asdict(create)),))
            yield connection
    except sqlite3.Error as error:
        full = "disk is full" in str(error)
        remedy = "free some space" if full else "delete the folder"
        raise CacheError(f"{path}: {error}; {remedy} and run `fedmpt cache` again") from None


def _read(connection: sqlite3.Connection, folder: Path) -> tuple[Meta, list[Row]]:
    path = folder / INDEX
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise CacheError(f"{path}: not the index of a feature cache; give another folder")
    if version != VERSION:
        raise CacheError(
            f"{path}: version {version}, not {VERSION}; make the cache with this version of fedmpt"
        )
    try:
        (text,) = connection.execute("SELECT json FROM meta").fetchone()
        value = json.loads(text)
        meta = Meta(**{**value, "labels": tuple(value["labels"])})
    except (TypeError, ValueError, KeyError) as error:
        raise CacheError(
            f"{path}: damaged ({error}); delete the folder and run `fedmpt cache` again"
        ) from None
    rows = [
        Row(slot, content_hash, crc, None if path is None else os.fsdecode(path), labels)
        for slot, content_hash, crc, path, labels in connection.execute(
            "SELECT slot, hash, crc, path, labels FROM rows ORDER BY slot"
        )
    ]
    return meta, rows


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"{folder}: the disk is full; free some space and run `fedmpt cache` again, it goes on from here"
            ) from error
        raise CacheError(f"{folder}: {error.strerror} ({error.filename})") from error
