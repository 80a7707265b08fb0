"""check.py compares each case's two newest records of one machine, and says what it could not compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import check
import pytest

DEVICE = {"processor": "x86", "cores": 2}


def a_record(
    median: float,
    spread: float = 0.1,
    unit: str = "s",
    device: dict[str, Any] = DEVICE,
    labels: int = 20,
    benchmark: str = "local_step",
) -> dict[str, Any]:
    row = {"name": "step", "unit": unit, "parameters": {"labels": labels}, "median": median, "spread": spread}
    return {"benchmark": benchmark, "device": device, "rows": [row]}


def slower(older: dict[str, Any], newer: dict[str, Any]) -> list[str]:
    return check.compare(newer, [older]).slower


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, *records: dict[str, Any]) -> None:
    monkeypatch.setattr(check, "RESULTS", folder)
    for name in {record["benchmark"] for record in records}:
        lines = [json.dumps(record) + "\n" for record in records if record["benchmark"] == name]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def test_more_time_than_both_spreads_is_slower() -> None:
    assert slower(a_record(1.0), a_record(1.3)) == ["local_step: step (labels 20): 1 → 1.3 s"]


@pytest.mark.parametrize("median", [0.5, 1.0, 1.15])
def test_less_time_or_a_difference_within_the_spreads_is_not(median: float) -> None:
    assert slower(a_record(1.0), a_record(median)) == []


def test_less_than_three_per_cent_is_not_slower_even_without_spread() -> None:
    assert slower(a_record(1000, spread=0), a_record(1029, spread=0)) == []
    assert slower(a_record(1000, spread=0), a_record(1031, spread=0)) != []


@pytest.mark.parametrize(
    ("unit", "small", "large"), [("s", 7e-5, 2e-4), ("MB", 0.9, 1.1), ("µs", 4.0, 6.0), ("bytes", 0.0, 1.0)]
)
def test_less_than_a_clock_or_a_process_scatters_is_not_slower(unit: str, small: float, large: float) -> None:
    before = large / 10
    assert slower(a_record(before, spread=0, unit=unit), a_record(before + small, spread=0, unit=unit)) == []
    assert slower(a_record(before, spread=0, unit=unit), a_record(before + large, spread=0, unit=unit)) != []


def test_what_a_gpu_times_is_held_to_microseconds() -> None:
    before, after = (a_record(median, spread=0, benchmark="kernels") for median in (5e-5, 9e-5))
    assert slower(before, after) != []


@pytest.mark.parametrize("unit", ["photos/s", "updates/s", "GFLOP/s", "score"])
def test_a_lower_rate_is_slower_and_a_higher_one_is_not(unit: str) -> None:
    assert slower(a_record(10, unit=unit), a_record(5, unit=unit)) != []
    assert slower(a_record(10, unit=unit), a_record(20, unit=unit)) == []


def test_time_per_photo_is_no_rate() -> None:
    assert slower(a_record(1.0, unit="CPU s/photo"), a_record(2.0, unit="CPU s/photo")) != []


def test_the_newest_record_before_of_the_same_machine_is_compared() -> None:
    arm = {"processor": "arm", "cores": 6}
    first, elsewhere, last = a_record(1), a_record(9, device=arm), a_record(3)
    assert check.compare(last, [a_record(5), first, elsewhere]).slower == [
        "local_step: step (labels 20): 1 → 3 s"
    ]


def test_a_case_is_found_behind_a_record_of_other_sizes() -> None:
    assert check.compare(a_record(9), [a_record(1), a_record(1, labels=80)]).slower != []


@pytest.mark.parametrize(
    ("earlier", "reason"),
    [
        ([], "there is one record only"),
        ([a_record(1, device={"processor": "arm"})], "all earlier records are of other machines"),
        ([a_record(1, labels=80)], "no earlier record of this machine has these cases at these sizes"),
    ],
)
def test_what_cannot_be_compared_is_said_with_the_reason(earlier: list[dict[str, Any]], reason: str) -> None:
    outcome = check.compare(a_record(2), earlier)
    assert (outcome.compared, outcome.slower) == (0, [])
    assert outcome.left_out == [f"local_step: {reason}: step (labels 20)"]


def test_exit_code_1_says_that_something_got_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, monkeypatch, a_record(1.0), a_record(1.5))
    assert check.main(["local_step"]) == 1
    assert "1 → 1.5 s" in capsys.readouterr().out
    write(tmp_path, monkeypatch, a_record(1.5), a_record(1.0))
    assert check.main([]) == 0
    assert "1 cases compared, 0 got slower" in capsys.readouterr().out


def test_a_benchmark_that_was_run_in_parts_is_compared_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, monkeypatch, a_record(1), a_record(1, labels=80), a_record(2), a_record(2, labels=80))
    assert check.main([]) == 1
    assert "2 cases compared, 2 got slower" in capsys.readouterr().out


def test_a_benchmark_without_records_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "RESULTS", tmp_path)
    assert check.main(["kernels"]) == 0
    assert "kernels: no records" in capsys.readouterr().out
