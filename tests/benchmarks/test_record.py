"""record.py: interleaved timing, medians with spread, one JSON line for each run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import record
from record import Row


def test_cases_take_turns_and_the_warm_up_is_not_kept() -> None:
    order: list[str] = []
    ticks = itertools.count()
    cases = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = record.interleave(
        cases,
        repeats=2,
        warmup=1,
        clock=lambda: float(next(ticks)),
        before=lambda name: order.append(name * 2),
    )
    assert order == ["aa", "a", "bb", "b"] * 3
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_the_spread_is_half_the_distance_of_the_quartiles() -> None:
    row = Row("case", "s", [1.0, 2.0, 3.0, 4.0, 100.0])
    assert (row.median, row.spread) == (3.0, 1.0)
    assert Row("case", "s", [1.0]).spread == 0.0


@pytest.mark.parametrize(("unit", "ratio"), [("s", 0.5), ("bytes", 0.5), ("photos/s", 2.0), ("score", 2.0)])
def test_a_ratio_is_of_medians_and_above_1_for_the_better(unit: str, ratio: float) -> None:
    # The median of the paired ratios would be 2.5 or 0.4.
    row = Row("case", unit, [2.0, 5.0, 4.0]).compared_with(Row("other", unit, [1.0, 2.0, 8.0]))
    assert (row.against, row.ratio) == ("other", ratio)


def test_the_floor_is_the_best_of_all_libraries_and_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = record._engines(4, 5, 6, 2)
    assert list(engines) == ["numpy", "onnxruntime", record.STREAMS, "torch"]
    expected, *others, streams = (
        engines[name]() for name in ("numpy", "onnxruntime", "torch", record.STREAMS)
    )
    assert len(streams) == 2
    for product in (*others, *streams):
        np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)
    seconds = {"numpy": [4.0, 2.0], "torch": [0.5, 1.0], record.STREAMS: [1.5], "copy": [1.0]}
    monkeypatch.setattr(record, "interleave", lambda *cases, **options: seconds)
    for cores, rate in ((1, 1 / 0.5), (4, 4 / 1.5)):  # one product on each of four cores at once is more
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        floor = record.machine_floor([(10, 10, 10), (20, 10, 10)])
        assert floor["matmul_flops"] == 2 * 2000 * rate
        assert floor["copy_bytes"] == 2 * (64 << 20)


def test_floors_move_with_a_machine_that_is_faster_after_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Row("time", "s", [4.0], floor=3.0),
        Row("rate", "photos/s", [4.0], floor=3.0),
        Row("none", "s", [4.0]),
    ]
    now = {"matmul_flops": 8.0, "copy_bytes": 1.0}
    monkeypatch.setattr(record, "machine_floor", lambda products: now)
    moved, best = record.floor_again(rows, {"matmul_flops": 4.0, "copy_bytes": 2.0}, [])
    assert [row.floor for row in moved] == [1.5, 6.0, None]
    assert best == {"matmul_flops": 8.0, "copy_bytes": 2.0}
    assert (
        record.floor_again(rows, {"matmul_flops": 16.0, "copy_bytes": 2.0}, [])[0] == rows
    )  # slower: as before


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


@pytest.mark.parametrize(("unit", "floor"), [("s", 1.0), ("photos/s", 4.0)])
def test_a_floor_is_shown_as_the_share_that_was_reached(
    unit: str, floor: float, capsys: pytest.CaptureFixture[str]
) -> None:
    record.print_rows("Title", [Row("case", unit, [2.0], {"labels": 20}, floor=floor)])
    printed = capsys.readouterr().out
    assert "labels 20" in printed
    assert "50%" in printed


@pytest.mark.parametrize(("unit", "floor"), [("s", 3.0), ("photos/s", 1.0)])
def test_a_figure_that_is_better_than_its_floor_is_told(
    unit: str,
    floor: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.append_record(
        "codec", [Row("case", unit, [2.0], floor=floor), Row("other", unit, [2.0], floor=2.0)]
    )
    assert capsys.readouterr().err == "case {}: better than its floor; measure again\n"
