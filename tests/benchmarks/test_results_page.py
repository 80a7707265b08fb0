"""docs/results.md says what the records say, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import record
import results_page
from plots import charts, draw

STALE = "stale: run python benchmarks/results_page.py"


def a_record(**changes: Any) -> dict[str, Any]:
    rows = [
        {
            "name": "plain",
            "unit": "s",
            "samples": [0.4, 0.5, 0.6],
            "median": 0.5,
            "spread": 0.05,
            "parameters": {"labels": labels, "batch": 32},
            "against": "",
            "ratio": None,
            "floor": 0.1,
        }
        for labels in (20, 80, 365)
    ]
    return {
        "benchmark": "codec",
        "command": "python benchmarks/codec.py",
        "time": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789ab",
        "versions": {"python": "3.11.0"},
        "device": {"processor": "x86", "cores": 2, "memory_gib": 8.0},
        "floor": {"matmul_flops": 5e10},
        "notes": "",
        "rows": rows,
    } | changes


def test_the_page_is_what_the_records_give() -> None:
    records = results_page.newest_records(record.RESULTS)
    expected = results_page.render(records, results_page.DOCS)
    assert (results_page.DOCS / "results.md").read_text() == expected, STALE


def test_the_plots_are_those_of_the_records() -> None:
    shown = {
        chart.name: chart.digest
        for chart in results_page.all_charts(results_page.newest_records(record.RESULTS))
    }
    files = {path.stem: path.read_text() for path in (results_page.DOCS / "results" / "plots").glob("*.svg")}
    assert files.keys() == shown.keys(), STALE
    assert [name for name, digest in shown.items() if digest not in files[name]] == [], STALE


def test_only_the_newest_record_counts(tmp_path: Path) -> None:
    lines = [json.dumps(a_record(commit=commit)) for commit in ("older", "newer")]
    (tmp_path / "codec.jsonl").write_text("\n".join(lines) + "\n")
    assert [known["commit"] for known in results_page.newest_records(tmp_path)["codec"]] == ["newer"]


def test_sizes_that_were_measured_on_their_own_are_shown_together(tmp_path: Path) -> None:
    few, many = a_record(), a_record(commit="another")
    many["rows"] = [row | {"parameters": {"labels": 1000, "batch": 32}} for row in many["rows"][:1]]
    (tmp_path / "codec.jsonl").write_text(json.dumps(few) + "\n" + json.dumps(many) + "\n")
    records = results_page.newest_records(tmp_path)
    page = results_page.render(records, tmp_path)
    assert "0123456789ab" in page
    assert "another" in page
    codec = next(benchmark for benchmark in results_page.SUITE if benchmark.name == "codec")
    (chart,) = results_page.charts_of(dataclasses.replace(codec, grows=("labels",)), records["codec"])
    assert len(chart.curves[0].points) == 4


def test_of_an_older_record_only_the_sizes_not_measured_since_are_shown(tmp_path: Path) -> None:
    oldest, newer = a_record(commit="oldest"), a_record(commit="newer")
    oldest["rows"] = [row | {"parameters": {"labels": 1000}} for row in oldest["rows"]]  # no batch yet
    newest = a_record(commit="newest")
    newest["rows"] = [row | {"name": "renamed"} for row in newest["rows"][:1]]  # of 20 labels
    (tmp_path / "codec.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (oldest, newer, newest)))
    shown = results_page.newest_records(tmp_path)["codec"]
    assert [
        (part["commit"], row["name"], row["parameters"]["labels"]) for part in shown for row in part["rows"]
    ] == [
        ("newer", "plain", 80),
        ("newer", "plain", 365),
        ("newest", "renamed", 20),
    ]


def test_what_has_no_record_is_said_to_be_unmeasured(tmp_path: Path) -> None:
    page = results_page.render({"codec": [a_record()]}, tmp_path)
    assert page.count("Not measured yet.") == len(
        results_page.SUITE
    )  # all but the codec, and the experiments


def test_a_section_names_command_commit_machine_and_versions() -> None:
    text = results_page.how(a_record())
    for word in (
        "`python benchmarks/codec.py`",
        "`0123456789ab`",
        "2026-01-02",
        "x86",
        "python 3.11.0",
        "50.0 GFLOP/s",
    ):
        assert word in text


def test_a_table_shows_median_spread_runs_and_floor() -> None:
    shared, table = results_page.table(a_record()["rows"])
    assert shared == "In all rows: batch 32."
    assert "| plain | labels 80 | 0.5000 ± 0.050 | s | 3 |  | 20% |" in table


@pytest.mark.parametrize(
    ("unit", "others", "shown"),
    [
        ("s", [1.0, 1.2, 1.4], "**2.50** (2.00 to 2.89) × pickle"),
        ("photos/s", [0.1, 0.2, 0.3], "**2.50** (1.80 to 3.67) × pickle"),
        ("s", [0.4, 0.6, 1.2], "2.50 (0.909 to 2.00) × pickle"),
    ],
)
def test_a_ratio_stands_with_its_quartiles_and_is_bold_where_they_are_on_one_side_of_1(
    unit: str, others: list[float], shown: str
) -> None:
    row = a_record()["rows"][0] | {"ratio": 2.5, "against": "pickle", "unit": unit}
    other = row | {"name": "pickle", "samples": others, "ratio": None}
    assert f"| {shown} |" in results_page.table([row, other])[-1]


def test_a_ratio_of_single_runs_has_no_quartiles() -> None:
    row = a_record()["rows"][0] | {"ratio": 2.5, "against": "pickle", "samples": [0.5]}
    other = row | {"name": "pickle", "ratio": None}
    assert "| **2.50** × pickle |" in results_page.table([row, other])[-1]


def test_a_single_run_has_no_spread() -> None:
    row = a_record()["rows"][0] | {"samples": [0.5], "spread": 0.0}
    assert "±" not in results_page.table([row])[-1].splitlines()[-1]


@pytest.mark.parametrize(("unit", "share"), [("s", "20%"), ("photos/s", "500%")])
def test_the_floor_of_a_rate_is_its_highest_value(unit: str, share: str) -> None:
    assert results_page.reached({"unit": unit, "median": 0.5, "floor": 0.1}) == share


def test_experiments_are_linked_by_their_titles(tmp_path: Path) -> None:
    (tmp_path / "results" / "noise").mkdir(parents=True)
    (tmp_path / "results" / "noise" / "report.md").write_text("# How much noise?\n\nMuch.\n")
    (tmp_path / "results" / "method.json").write_text("{}")
    _, links = results_page.experiments(tmp_path)
    assert links == "- [How much noise?](results/noise/report.md)\n- [method](results/method.json)"


def test_a_size_that_grows_is_drawn_with_its_spread() -> None:
    (chart,) = charts(a_record(), ("labels", "batch"))
    assert (chart.x, chart.unit) == ("labels", "s")
    assert chart.curves[0].points == ((20.0, 0.5, 0.05), (80.0, 0.5, 0.05), (365.0, 0.5, 0.05))


def test_other_parameters_tell_curves_apart() -> None:
    rows = a_record()["rows"]
    more = [row | {"parameters": row["parameters"] | {"batch": 8}} for row in rows]
    (chart,) = charts(a_record(rows=rows + more), ("labels",))
    assert [curve.label for curve in chart.curves] == ["plain, batch 32", "plain, batch 8"]


def test_two_sizes_are_no_plot() -> None:
    assert charts(a_record(rows=a_record()["rows"][:2]), ("labels",)) == []


def test_a_plot_repeats_to_the_byte_and_carries_its_digest() -> None:
    (chart,) = charts(a_record(), ("labels",))
    drawn = draw(chart)
    assert drawn == draw(chart)
    assert chart.digest in drawn


def test_a_long_table_is_folded_away_behind_its_plots() -> None:
    parts = results_page.section(results_page.SUITE[0], [a_record(rows=a_record()["rows"] * 10)])
    assert [part for part in parts if part.startswith("<details>")] == [
        "<details><summary>All 30 rows</summary>"
    ]
    assert parts[0].startswith("![s over labels](results/plots/")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", []),
        ("A remark.", ["A remark."]),
        ('{"gpu": "H100", "verdicts": ["a", "b"]}', ["- gpu: H100\n- a\n- b"]),
    ],
)
def test_remarks_of_a_record_are_shown(text: str, shown: list[str]) -> None:
    assert results_page.notes(text) == shown


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00012346, "0.0001235"), (0.5, "0.5000"), (12.3456, "12.35"), (51357, "51,357")],
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert results_page.number(value, 4) == text
