"""check.py names what got slower by more than its spread, on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import check
import pytest

DEVICE = {"processor": "x86", "cores": 2}


def a_record(
    median: float, spread: float = 0.1, unit: str = "s", device: dict[str, Any] = DEVICE, labels: int = 20
) -> dict[str, Any]:
    row = {"name": "step", "unit": unit, "parameters": {"labels": labels}, "median": median, "spread": spread}
    return {"benchmark": "local_step", "device": device, "rows": [row]}


def test_more_time_than_both_spreads_is_slower() -> None:
    (line,) = check.slower(a_record(1.0), a_record(1.3))
    assert line == "local_step: step {'labels': 20}: 1 → 1.3 s"


@pytest.mark.parametrize("median", [0.5, 1.0, 1.15])
def test_less_time_or_a_difference_within_the_spreads_is_not(median: float) -> None:
    assert check.slower(a_record(1.0), a_record(median)) == []


def test_less_than_one_per_cent_is_not_slower_even_without_spread() -> None:
    assert check.slower(a_record(1000, spread=0), a_record(1009, spread=0)) == []
    assert check.slower(a_record(1000, spread=0), a_record(1011, spread=0)) != []


@pytest.mark.parametrize("unit", ["photos/s", "updates/s", "GFLOP/s"])
def test_a_lower_rate_is_slower_and_a_higher_one_is_not(unit: str) -> None:
    assert check.slower(a_record(10, unit=unit), a_record(5, unit=unit)) != []
    assert check.slower(a_record(10, unit=unit), a_record(20, unit=unit)) == []


def test_time_per_photo_is_no_rate() -> None:
    assert check.slower(a_record(1.0, unit="CPU s/photo"), a_record(2.0, unit="CPU s/photo")) != []


def test_other_sizes_are_not_compared() -> None:
    assert check.slower(a_record(1.0, labels=20), a_record(9.0, labels=80)) == []


def test_the_record_before_on_the_same_machine_is_compared() -> None:
    first, elsewhere, last = a_record(1), a_record(2, device={"processor": "arm", "cores": 6}), a_record(3)
    assert check.newest_pair([first, elsewhere, last]) == (first, last)
    assert check.newest_pair([elsewhere, last]) is None


def test_exit_code_1_says_that_something_got_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "RESULTS", tmp_path)
    lines = [json.dumps(a_record(median)) for median in (1.0, 1.5)]
    (tmp_path / "local_step.jsonl").write_text("\n".join(lines) + "\n")
    assert check.main(["local_step"]) == 1
    assert "1 → 1.5 s" in capsys.readouterr().out
    (tmp_path / "local_step.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    assert check.main([]) == 0
    assert "nothing got slower" in capsys.readouterr().out
