"""record.py: interleaved timing, medians with spread, one JSON line for each run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import record
from record import Row


def test_cases_take_turns_and_the_warm_up_is_not_kept() -> None:
    order: list[str] = []
    ticks = itertools.count()
    cases = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = record.interleave(cases, repeats=2, warmup=1, clock=lambda: float(next(ticks)))
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_the_spread_is_half_the_distance_of_the_quartiles() -> None:
    row = Row("case", "s", [1.0, 2.0, 3.0, 4.0, 100.0])
    assert (row.median, row.spread) == (3.0, 1.0)
    assert Row("case", "s", [1.0]).spread == 0.0


def test_a_record_keeps_every_sample_and_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", [str(Path(record.__file__).with_name("codec.py")), "--repeats", "3"])
    for _ in range(2):
        path = record.append_record(
            "codec", [Row("case", "s", [1.0, 2.0], {"labels": 20})], floor={"copy_bytes": 1e9}
        )
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["rows"] == second["rows"]
    assert first["rows"][0]["samples"] == [1.0, 2.0]
    assert first["rows"][0]["median"] == 1.5
    assert first["command"] == "python benchmarks/codec.py --repeats 3"
    assert {"numpy", "python"} <= first["versions"].keys()
    assert first["device"]["cores"] >= 1
    assert first["floor"] == {"copy_bytes": 1e9}


def test_a_floor_is_shown_as_the_share_that_was_reached(capsys: pytest.CaptureFixture[str]) -> None:
    record.print_rows("Title", [Row("case", "s", [2.0], {"labels": 20}, floor=1.0)])
    printed = capsys.readouterr().out
    assert "labels 20" in printed
    assert "50%" in printed
