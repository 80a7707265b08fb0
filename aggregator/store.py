"""The aggregator's memory: a SQLite file (WAL) and a log of updates that a kill at any moment leaves consistent.

Updates are gathered as they come and become durable together at ``commit`` (one fsync for many: group commit);
only then may they be acknowledged. Closing a round is one transaction. ``history.jsonl`` beside the database
repeats the closed rounds for people and reports, one JSON object a line:

``round``, ``phase``, ``opened`` and ``closed`` (Unix seconds), ``seconds``, ``chosen`` and ``received`` (numbers
of clients), ``refused`` and ``refusals`` (in all, and by client: the 100 with the most), ``bytes`` (payload bytes by
client), ``metrics`` (of the round's *base* state, means weighted by validation photos), ``base`` and ``state``
(digests before and after), ``samples`` and ``validation_samples``; with differential privacy ``epsilon`` in
place of these two.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
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
from fedmpt.protocol.manifest import canonical_json

_TABLES = """
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS history (round INTEGER PRIMARY KEY, line BLOB NOT NULL);
"""


class StoreError(FedmptError):
    """The store cannot be opened or written, or belongs to another federation."""


class Store:
    """One federation's durable state. ``folder`` None keeps it in memory, for simulation. A context manager."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._lock: int | None = None
        with self._errors():
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = _lock_folder(folder)
            self._database = sqlite3.connect(
                ":memory:" if folder is None else folder / "federation.sqlite",
                isolation_level=None,
                check_same_thread=False,
            )
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(_TABLES)
            opened = self._fact("round")
            number = json.loads(opened)["number"] if opened else 0
            self._updates = UpdateLog(None if folder is None else folder / "updates.log", number)
        if folder is not None:
            lines = [
                bytes(row[0]) for row in self._database.execute("SELECT line FROM history ORDER BY round")
            ]
            with self._errors():
                write_atomically(folder / "history.jsonl", b"".join(line + b"\n" for line in lines))

    def bind(self, identity: Mapping[str, Any]) -> None:
        """Remember what this store is for; later calls must say the same.

        Raises:
            StoreError: it was begun for another federation, bundle or set-up; the text names the difference.
        """
        known = self._fact("identity")
        if known is None:
            self._execute("INSERT INTO fact VALUES ('identity', ?)", (canonical_json(identity),))
            return
        before = json.loads(known)
        wanted = json.loads(canonical_json(identity))
        for name in sorted(before.keys() | wanted.keys()):
            if before.get(name) != wanted.get(name):
                raise StoreError(
                    f"{self.folder}: this store was begun with {name} {before.get(name)}, not {wanted.get(name)}; "
                    "start with the same options, or give another --store"
                )

    def load(self) -> tuple[RoundState, bytes, dict[str, NDArray[np.float64]]] | None:
        """The round, the payload of its base state and the strategy's memory; None in a new store."""
        state, payload, memory = self._fact("round"), self._fact("state"), self._fact("memory")
        if state is None or payload is None or memory is None:
            return None
        fields = json.loads(state)
        fields["chosen"] = tuple(fields["chosen"])
        return RoundState(**fields), payload, safetensors.numpy.load(memory)

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
                with (self.folder / "history.jsonl").open("ab") as file:
                    file.write(line + b"\n")
                sync_path(self.folder / "history.jsonl")

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
        rows = self._database.execute("SELECT line FROM history ORDER BY round")
        return [json.loads(row[0]) for row in rows]

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

    def _fact(self, name: str) -> bytes | None:
        with self._errors():
            row = self._database.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def _put(self, name: str, value: bytes) -> None:
        self._execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, value))

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> None:
        with self._errors():
            self._database.execute(statement, values)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"{self.folder}: the store cannot be read or written ({error}); check free disk space and "
                "permissions, then start again: nothing that was acknowledged is lost"
            ) from error


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
