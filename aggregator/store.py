"""The aggregator's memory: a SQLite file (WAL) and a log of updates that a kill at any moment leaves consistent.

Updates are gathered as they come and become durable together at ``commit`` (one fsync for many: group commit);
only then may they be acknowledged. Closing a round is one transaction. ``history.jsonl`` beside the database
repeats the closed rounds for people and reports, one JSON object a line:

``round``, ``phase``, ``opened`` and ``closed`` (Unix seconds), ``seconds``, ``chosen`` and ``received`` (numbers
of clients), ``refused`` and ``refusals`` (in all, and by client: the 100 with the most), ``bytes`` (payload bytes by
client), ``metrics`` (of the round's *base* state, means weighted by validation photos), ``base`` and ``state``
(digests before and after), ``samples``, ``validation_samples``, ``norms`` (``median`` and ``largest`` of the updates,
and the ``limit`` to which longer ones were scaled down, absent if there was none) and ``scaled`` (by client: the norm
that was scaled down, of the 100 longest); with differential privacy ``epsilon`` in place of these four.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from fedmpt.aggregator.rounds import RoundState
from fedmpt.aggregator.update_log import UpdateLog
from fedmpt.protocol.errors import FedmptError
from fedmpt.protocol.files import sync_path, write_atomically
from fedmpt.protocol.manifest import BundleError, canonical_json, from_plain

logger = logging.getLogger(__name__)

VERSION = 1
DATABASE, UPDATES, HISTORY = "federation.sqlite", "updates.log", "history.jsonl"
# SQLite does not notice a flipped bit in a value, so each fact has its SHA-256 beside it.
_TABLES = f"""
BEGIN;
PRAGMA user_version = {VERSION};
CREATE TABLE fact (name TEXT PRIMARY KEY, value BLOB NOT NULL, sha256 BLOB NOT NULL);
CREATE TABLE history (round INTEGER PRIMARY KEY, line BLOB NOT NULL);
COMMIT;
"""


class StoreError(FedmptError):
    """The store cannot be opened or written, is damaged, or belongs to another federation."""


class Store:
    """One federation's durable state. ``folder`` None keeps it in memory, for simulation. A context manager."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._lock: int | None = None
        with contextlib.ExitStack() as undo, self._errors():
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = _lock_folder(folder)
                undo.callback(os.close, self._lock)
                _require_database(folder)
            self._database = sqlite3.connect(
                ":memory:" if folder is None else folder / DATABASE,
                isolation_level=None,
                check_same_thread=False,
            )
            undo.callback(self._database.close)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            (sound,) = self._database.execute("PRAGMA quick_check(1)").fetchone()
            if sound != "ok":
                raise self._damaged(" ".join(sound.split()))
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            (tables,) = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not tables:
                self._database.executescript(_TABLES)
            elif version != VERSION:
                raise StoreError(
                    f"{folder}: a store of version {version}, but this program writes version {VERSION}; finish it "
                    "with the release that began it, or give another --store"
                )
            opened = self._round()
            lines = self._lines()
            if folder is not None:
                self._check_files(folder, opened, len(lines))
            self._updates = UpdateLog(
                None if folder is None else folder / UPDATES, opened.number if opened else 0
            )
            if folder is not None:
                write_atomically(folder / HISTORY, b"".join(line + b"\n" for line in lines))
            undo.pop_all()

    def bind(self, identity: Mapping[str, Any]) -> None:
        """Remember what this store is for; later calls must say the same.

        Raises:
            StoreError: it was begun for another federation, bundle or set-up; the text names the difference.
        """
        known = self._fact("identity")
        if known is None:
            self._put("identity", canonical_json(identity))
            return
        before = json.loads(known)
        wanted = json.loads(canonical_json(identity))
        for name in sorted(before.keys() | wanted.keys()):
            if before.get(name) != wanted.get(name):
                raise StoreError(
                    f"{self.folder}: this store was begun with {name} {before.get(name)}, not {wanted.get(name)}; "
                    "start with the same options, or give another --store"
                )

    def run(self) -> str:
        """What tells this store's federation from others of its name: 16 hexadecimal digits, drawn once."""
        known = self._fact("run")
        if known is None:
            known = secrets.token_hex(8).encode()
            self._put("run", known)
        return known.decode()

    def load(self) -> tuple[RoundState, bytes, dict[str, NDArray[np.float64]]] | None:
        """The round, the payload of its base state and the strategy's memory; None in a new store."""
        state, payload, memory = self._round(), self._fact("state"), self._fact("memory")
        if state is None or payload is None or memory is None:
            return None
        return state, payload, safetensors.numpy.load(memory)

    def save_round(self, state: RoundState) -> None:
        """Make a newly opened or renewed round durable."""
        self._put("round", canonical_json(vars(state)))

    def close_round(
        self,
        state: RoundState,
        payload: bytes,
        memory: Mapping[str, NDArray[np.float64]],
        history: Mapping[str, Any] | None,
    ) -> None:
        """In one transaction: the next round, its base state, the strategy's memory, and what was ``history``.

        The updates of the closed round are dropped. ``history`` is None for the very first state.
        """
        arrays = {name: np.array(tensor, dtype="<f8", order="C") for name, tensor in memory.items()}
        line = canonical_json(history) if history else b""
        with self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            self._put("round", canonical_json(vars(state)))
            self._put("state", payload)
            self._put("memory", safetensors.numpy.save(arrays))
            if history:
                self._database.execute("INSERT INTO history VALUES (?, ?)", (history["round"], line))
            self._database.execute("COMMIT")
            # A kill before this leaves records of the closed round, which the next start cuts off.
            self._updates.start_round(state.number)
            if history and self.folder is not None:
                with (self.folder / HISTORY).open("ab") as file:
                    file.write(line + b"\n")
                sync_path(self.folder / HISTORY)

    def add_update(self, client: str, payload: bytes, sha256: bytes) -> None:
        """Take an update of the open round; durable, and only then to be acknowledged, after ``commit``.

        ``sha256`` is its payload's digest, with which a restart tells a whole record from a damaged one.
        """
        self._updates.add(client, payload, sha256)

    def commit(self) -> None:
        """Make the updates that were added durable."""
        with self._errors():
            self._updates.commit()

    def drop_update(self, client: str) -> None:
        """Leave out a client's update of the open round; a restart finds it again."""
        self._updates.drop(client)

    def clients(self) -> set[str]:
        """Who has an update in the open round."""
        return self._updates.clients()

    def updates(self) -> Iterator[tuple[str, bytes]]:
        """The open round's updates, (client, payload) in client-name order, one at a time."""
        self.commit()
        with self._errors():
            yield from self._updates.updates()

    def history(self) -> list[dict[str, Any]]:
        """The closed rounds, oldest first."""
        return [json.loads(line) for line in self._lines()]

    def close(self) -> None:
        """Commit and close."""
        try:
            self.commit()
        finally:
            self._updates.close()
            self._database.close()
            if self._lock is not None:
                os.close(self._lock)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_files(self, folder: Path, opened: RoundState | None, rounds: int) -> None:
        """Refuse a database that knows less than the file beside it: it was put back from an old copy."""
        history = folder / HISTORY
        written = history.read_bytes().count(b"\n") if history.exists() else 0
        if written > rounds:
            raise StoreError(
                f"{history}: has {written} closed rounds, but {DATABASE} beside it knows only {rounds}; put the "
                "right database back, or give another --store to begin anew"
            )
        if opened is not None and not (folder / UPDATES).exists():
            logger.error(
                "the stored updates are missing; clients send them again",
                extra={"file": str(folder / UPDATES)},
            )

    def _round(self) -> RoundState | None:
        value = self._fact("round")
        try:
            return None if value is None else from_plain(RoundState, json.loads(value), "round")
        except BundleError as error:
            raise self._damaged(error) from error

    def _lines(self) -> list[bytes]:
        """The closed rounds, oldest first, as the lines of ``history.jsonl``."""
        with self._errors():
            rows = self._database.execute("SELECT line FROM history ORDER BY round").fetchall()
        try:
            for (line,) in rows:
                json.loads(line)
        except ValueError as error:
            raise self._damaged(f"history: {error}") from error
        return [bytes(line) for (line,) in rows]

    def _fact(self, name: str) -> bytes | None:
        with self._errors():
            row = self._database.execute("SELECT value, sha256 FROM fact WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        value, digest = row
        if hashlib.sha256(value).digest() != digest:
            raise self._damaged(f"its {name} differs from its digest")
        return bytes(value)

    def _put(self, name: str, value: bytes) -> None:
        with self._errors():
            row = (name, value, hashlib.sha256(value).digest())
            self._database.execute("INSERT OR REPLACE INTO fact VALUES (?, ?, ?)", row)

    def _damaged(self, problem: object) -> StoreError:
        path = "the store in memory" if self.folder is None else self.folder / DATABASE
        return StoreError(
            f"{path}: the database is damaged ({problem}); put the whole folder back from a copy, or give another "
            "--store to begin anew"
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise StoreError(
                f"{self.folder}: the store cannot be read or written ({error}); check free disk space and "
                "permissions, then start again: nothing that was acknowledged is lost"
            ) from error
        except sqlite3.Error as error:  # malformed, no database at all, or not what we wrote
            raise self._damaged(error) from error


def _require_database(folder: Path) -> None:
    """Refuse to begin anew beside what an earlier database was about."""
    if not _has_content(folder / DATABASE) and any(
        _has_content(folder / name) for name in (HISTORY, UPDATES)
    ):
        raise StoreError(
            f"{folder / DATABASE}: missing or empty, but {HISTORY} or {UPDATES} beside it is not; put the database "
            "back, or give another --store to begin anew"
        )


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _lock_folder(folder: Path) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreError(
            f"{folder}: another aggregator is using this store; stop it, or give another --store"
        ) from None
    return descriptor
