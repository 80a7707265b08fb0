"""What survives: kills, restarts, and attempts to use a store for something else."""

from __future__ import annotations

import hashlib
import json
import os
import signal
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
        "from hashlib import sha256; store = Store(Path(sys.argv[1])); "
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
        name for name in "abc" if name < "abc"[number] or in_payload and name > "abc"[number]
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
    with pytest.raises(StoreError, match="the store cannot be read or written"):
        Store(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a small file system")
    try:
        store = Store(tmp_path)
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
