"""What survives: kills, restarts, and attempts to use a store for something else."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmpt.aggregator.rounds import RoundState
from fedmpt.aggregator.store import Store, StoreError

WAITING = RoundState(1, "train", None, None, ())
OPEN = RoundState(1, "train", 10.0, 70.0, ("a", "b"))


def add(store: Store, client: str, payload: bytes) -> None:
    store.add_update(client, payload, hashlib.sha256(payload).digest())


def test_a_new_store_holds_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "new") as store:
        assert store.load() is None
        assert store.clients() == set()
        assert store.history() == []


def test_all_comes_back_after_a_restart(tmp_path: Path) -> None:
    memory = {"first.scale": np.asarray(0.125), "second.a": np.ones((2, 2))}
    with Store(tmp_path) as store:
        store.close_round(WAITING, b"state", memory, {"round": 0, "received": 2})
        store.save_round(OPEN)
        add(store, "b", b"of b")
        add(store, "a", b"of a")
    with Store(tmp_path) as store:
        loaded = store.load()
        assert loaded is not None
        assert loaded[:2] == (OPEN, b"state")
        assert {name: value.tolist() for name, value in loaded[2].items()} == {
            "first.scale": 0.125,
            "second.a": [[1.0, 1.0], [1.0, 1.0]],
        }
        assert list(store.updates()) == [("a", b"of a"), ("b", b"of b")]
        assert store.history() == [{"round": 0, "received": 2}]


def test_closing_a_round_drops_its_updates(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_round(WAITING, b"state", {}, None)
        add(store, "a", b"of a")
        store.close_round(RoundState(2, "train", None, None, ()), b"next", {}, {"round": 1})
        assert store.clients() == set()


def test_history_is_repeated_as_json_lines(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_round(WAITING, b"state", {}, {"round": 0})
        store.close_round(WAITING, b"state", {}, {"round": 1})
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1]


def test_history_lost_in_a_kill_is_written_again(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_round(WAITING, b"state", {}, {"round": 0})
    (tmp_path / "history.jsonl").write_text('{"rou')
    Store(tmp_path).close()
    assert json.loads((tmp_path / "history.jsonl").read_text())["round"] == 0


def test_what_was_committed_survives_sigkill_and_what_was_not_does_not(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from fedmpt.aggregator.store import Store; "
        "from fedmpt.aggregator.rounds import RoundState; "
        "from hashlib import sha256; store = Store(Path(sys.argv[1])); "
        "store.close_round(RoundState(1, 'train', None, None, ()), b'state', {}, None); "
        "add = lambda name: store.add_update(name, name.encode(), sha256(name.encode()).digest()); "
        "add('a'); add('b'); store.commit(); add('c'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    with Store(tmp_path) as store:
        assert store.clients() == {"a", "b"}


def filled(folder: Path) -> Path:
    """A store's log with the updates of a, b and c."""
    with Store(folder) as store:
        store.close_round(WAITING, b"state", {}, None)
        for name in "abc":
            add(store, name, name.encode() * 100)
    return folder / "updates.log"


@pytest.mark.parametrize("kept", range(0, 450, 7))
def test_a_record_that_was_cut_off_is_dropped_and_the_others_stay(tmp_path: Path, kept: int) -> None:
    log = filled(tmp_path)
    size = log.stat().st_size
    os.truncate(log, kept)
    with Store(tmp_path) as store:
        whole = "abc"[: kept // (size // 3)]
        assert [client for client, _ in store.updates()] == list(whole)
        add(store, "d", b"of d")
    with Store(tmp_path) as store:
        assert dict(store.updates()) == {name: name.encode() * 100 for name in whole} | {"d": b"of d"}


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_record_never_counts(tmp_path: Path, place: int, flip: int) -> None:
    log = filled(tmp_path)
    data = bytearray(log.read_bytes())
    place %= len(data)
    data[place] ^= flip
    log.write_bytes(data)
    with Store(tmp_path) as store:
        found = dict(store.updates())
    number, offset = divmod(place, len(data) // 3)
    in_payload = offset >= len(data) // 3 - 100
    assert list(found) == [
        name for name in "abc" if name < "abc"[number] or (in_payload and name > "abc"[number])
    ]
    assert all(payload == name.encode() * 100 for name, payload in found.items())


def damaged(log: Path, place: int) -> None:
    data = bytearray(log.read_bytes())
    data[place] ^= 1
    log.write_bytes(data)


def test_a_damaged_payload_costs_its_own_update_alone_and_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = filled(tmp_path)
    damaged(log, log.stat().st_size // 3 - 50)
    with Store(tmp_path) as store:
        assert store.clients() == {"b", "c"}
        add(store, "a", b"again")
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "damaged and left out" in record.message
    assert (record.file, record.client, record.bytes) == (str(log), "a", 100)
    with Store(tmp_path) as store:
        assert dict(store.updates()) == {"a": b"again", "b": b"b" * 100, "c": b"c" * 100}


def test_what_lies_behind_a_damaged_head_is_kept_for_people_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = filled(tmp_path)
    before, third = log.read_bytes(), log.stat().st_size // 3
    damaged(log, third + 2)
    with Store(tmp_path) as store:
        assert store.clients() == {"a"}
        add(store, "b", b"again")
    kept = tmp_path / "updates.log.damaged"
    assert kept.read_bytes()[3:] == before[third + 3 :]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert (record.file, record.bytes, record.kept) == (str(log), 2 * third, str(kept))
    caplog.clear()
    with Store(tmp_path) as store:
        assert store.clients() == {"a", "b"}
    assert not caplog.records


def test_a_second_damage_does_not_overwrite_what_was_kept_of_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        damaged(filled(tmp_path), 0)
        Store(tmp_path).close()
    assert (tmp_path / "updates.log.damaged").read_bytes().count(b"c" * 100) == 2


def test_an_interrupted_write_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = filled(tmp_path)
    third = log.stat().st_size // 3
    for kept in (2 * third + 60, third + 45, third + 10):
        os.truncate(log, kept)
        Store(tmp_path).close()
    assert [record.levelname for record in caplog.records] == []
    assert not (tmp_path / "updates.log.damaged").exists()


def killed(folder: Path) -> Path:
    """The log of a, b and c as a kill after their commit leaves it."""
    with Store(folder) as store:
        store.close_round(WAITING, b"state", {}, None)
        for name in "abc":
            add(store, name, name.encode() * 100)
        store.commit()
        log = (folder / "updates.log").read_bytes()
    (folder / "updates.log").write_bytes(log)
    return folder / "updates.log"


def test_what_fills_the_last_block_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = killed(tmp_path)
    assert log.read_bytes().endswith(bytes(1000))
    with Store(tmp_path) as store:
        assert store.clients() == {"a", "b", "c"}
        add(store, "d", b"of d")
    with Store(tmp_path) as store:
        assert store.clients() == {"a", "b", "c", "d"}
    assert [record.levelname for record in caplog.records] == []
    assert not (tmp_path / "updates.log.damaged").exists()


def test_zeros_that_are_more_than_fills_a_block_are_kept_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = killed(tmp_path)
    log.write_bytes(log.read_bytes() + bytes(4096))
    with Store(tmp_path) as store:
        assert store.clients() == {"a", "b", "c"}
    assert "damaged and cut off" in caplog.text
    assert (tmp_path / "updates.log.damaged").exists()


def test_once_the_disk_has_failed_nothing_more_is_called_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with Store(tmp_path) as store:
        store.close_round(WAITING, b"state", {}, None)
        add(store, "a", b"of a")
        store.commit()
    store = Store(tmp_path)
    add(store, "b", b"of b")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(StoreError, match="Input/output error"):
            store.commit()
    with pytest.raises(StoreError, match="Input/output error"):
        store.commit()  # a disk that works again may have lost what it did not take
    with pytest.raises(StoreError, match="nothing that was acknowledged is lost"):
        store.close()
    with Store(tmp_path) as store:
        assert "a" in store.clients()


def test_updates_of_a_later_round_than_the_databases_are_kept_for_people(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_round(WAITING, b"state", {}, None)
        older = (tmp_path / "federation.sqlite").read_bytes()
        wal = (tmp_path / "federation.sqlite-wal").read_bytes()
        store.close_round(RoundState(2, "train", None, None, ()), b"next", {}, None)
        add(store, "a", b"of round 2")
    (tmp_path / "federation.sqlite").write_bytes(older)
    (tmp_path / "federation.sqlite-wal").write_bytes(wal)
    with Store(tmp_path) as store:
        assert store.clients() == set()
    assert (tmp_path / "updates.log.damaged").read_bytes().endswith(b"of round 2")


def test_a_kill_between_closing_a_round_and_dropping_its_updates_counts_none_twice(tmp_path: Path) -> None:
    before = filled(tmp_path).read_bytes()
    with Store(tmp_path) as store:
        store.close_round(RoundState(2, "train", None, None, ()), b"next", {}, {"round": 1})
    (tmp_path / "updates.log").write_bytes(before)
    with Store(tmp_path) as store:
        assert store.clients() == set()
        add(store, "a", b"of round 2")
    with Store(tmp_path) as store:
        assert list(store.updates()) == [("a", b"of round 2")]


def test_a_second_aggregator_is_kept_out(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(StoreError, match="another aggregator is using this store"):
        Store(tmp_path)


def test_another_set_up_is_refused_with_the_difference(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.bind({"federation": "birds", "strategy": "uniform"})
    with Store(tmp_path) as store:
        store.bind({"federation": "birds", "strategy": "uniform"})
        with pytest.raises(StoreError, match="begun with strategy uniform, not median"):
            store.bind({"federation": "birds", "strategy": "median"})


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "federation.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(
        StoreError, match=r"federation\.sqlite: the database is damaged .*put the whole folder back"
    ):
        Store(tmp_path)


def begun(folder: Path) -> Path:
    """A store with one closed round and an update in the next; its database."""
    with Store(folder) as store:
        store.bind({"federation": "birds"})
        store.close_round(WAITING, b"state" * 100, {"first.scale": np.ones(4)}, {"round": 0})
        store.save_round(OPEN)
        add(store, "a", b"of a")
    return folder / "federation.sqlite"


def alter(database: Path, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute(statement, values)
        connection.commit()


@pytest.mark.parametrize("name", ["round", "state", "memory", "identity"])
def test_one_flipped_bit_in_the_database_is_noticed(tmp_path: Path, name: str) -> None:
    database = begun(tmp_path)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        (value,) = connection.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
    flipped = value[:-2] + bytes([value[-2] ^ 0x10]) + value[-1:]
    alter(database, "UPDATE fact SET value = ? WHERE name = ?", flipped, name)
    with pytest.raises(StoreError, match=rf"federation\.sqlite: .*\(its {name} differs from its digest\)"):
        reopen(tmp_path)


def reopen(folder: Path) -> None:
    """All that an aggregator reads when it starts."""
    with Store(folder) as store:
        store.bind({"federation": "birds"})
        store.load()


def test_a_round_with_other_fields_is_named(tmp_path: Path) -> None:
    database = begun(tmp_path)
    value = b'{"number":0,"new":1,"chosen":[]}'
    digest = hashlib.sha256(value).digest()
    alter(database, "UPDATE fact SET value = ?, sha256 = ? WHERE name = 'round'", value, digest)
    with pytest.raises(StoreError, match=r"federation\.sqlite: .* damaged \(round: missing phase, opened"):
        Store(tmp_path)


def test_damaged_history_is_named_and_its_copy_for_people_stays(tmp_path: Path) -> None:
    database = begun(tmp_path)
    alter(database, "UPDATE history SET line = ?", b'{"rou')
    with pytest.raises(StoreError, match=r"federation\.sqlite: .* damaged \(history: "):
        Store(tmp_path)
    assert (tmp_path / "history.jsonl").read_text() == '{"round":0}\n'


def test_a_database_that_was_cut_off_is_named(tmp_path: Path) -> None:
    database = begun(tmp_path)
    os.truncate(database, database.stat().st_size // 2)
    with pytest.raises(StoreError, match=r"federation\.sqlite: the database is damaged") as caught:
        Store(tmp_path)
    assert "free disk space" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_beside_a_deleted_database_nothing_is_overwritten(tmp_path: Path) -> None:
    database = begun(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("history.jsonl", "updates.log")}
    database.unlink()
    for kept in before:
        with pytest.raises(
            StoreError, match=r"federation\.sqlite: missing .*; put the database back, or give another"
        ):
            Store(tmp_path)
        assert (tmp_path / kept).read_bytes() == before[kept]
        assert not database.exists()
        (tmp_path / kept).unlink()
    with Store(tmp_path) as store:
        assert store.load() is None, "an empty folder begins anew"


def test_a_database_older_than_the_history_is_refused(tmp_path: Path) -> None:
    database = begun(tmp_path)
    older = database.read_bytes()
    with Store(tmp_path) as store:
        store.close_round(RoundState(2, "train", None, None, ()), b"next", {}, {"round": 1})
    database.write_bytes(older)
    with pytest.raises(StoreError, match=r"history\.jsonl: has 2 closed rounds, but .* knows only 1"):
        Store(tmp_path)


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    alter(begun(tmp_path), "PRAGMA user_version = 7")
    with pytest.raises(StoreError, match="a store of version 7, but this program writes version 1"):
        Store(tmp_path)


def test_missing_updates_of_an_open_round_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun(tmp_path)
    (tmp_path / "updates.log").unlink()
    with Store(tmp_path) as store:
        assert store.clients() == set()
    assert "the stored updates are missing; clients send them again" in caplog.messages


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a small file system")
    try:
        store = Store(tmp_path)
        store.close_round(WAITING, b"state", {}, None)
        add(store, "a", b"x" * 1000)
        store.commit()
        with pytest.raises(StoreError, match="check free disk space"):
            fill(store)
        with pytest.raises(StoreError, match="check free disk space"):
            store.close()
        with Store(tmp_path) as store:
            assert "a" in store.clients(), "what was committed is still there"
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(store: Store) -> None:
    for number in range(100):
        add(store, f"site-{number}", b"x" * 50_000)
        store.commit()


def test_a_store_in_memory_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Store(None) as store:
        add(store, "a", b"1")
        store.close_round(WAITING, b"state", {}, {"round": 0})
    assert list(tmp_path.iterdir()) == []
