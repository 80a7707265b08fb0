"""Write ``docs/results.md`` and its plots from the newest records of each benchmark.

``python benchmarks/results_page.py``. The page says nothing that is not in a record; the same records give
the same page. A benchmark may be run in parts: of older records the sizes are shown that no newer one measured.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plots import Chart, charts, draw
from record import RESULTS, higher_is_better, newest_of, share_of_floor
from suite import SUITE, Benchmark

from fedmpt.protocol.files import write_atomically

DOCS = Path(__file__).resolve().parents[1] / "docs"
Records = Sequence[Mapping[str, Any]]
FOLDED = 24  # longer tables are folded away, behind their plots
INTRODUCTION = """# Measured results

Written by `python benchmarks/results_page.py` from the newest record of each benchmark in `benchmarks/results/`;
do not edit it. A test fails when it is stale.

How to read the tables: cases that are compared were measured in turn (A B A B …) in one run. Figures are
*median ± spread* of so many runs, the spread being half the distance between the quartiles. A *ratio* above 1 is better
than the alternative named beside it: for times, bytes and memory the alternative's median over the case's, for
rates the reverse. In brackets is the same from the one's lower and the other's upper quartile and
the reverse; the ratio is bold where both are on one side of 1. Ratios of different libraries hold for one kind of
processor: between two machines that both call themselves AMD EPYC they differed by up to a factor of two. *Floor
reached* is the share of the best that the machine could do, from the operations and bytes that the work cannot do
without and from what the machine reached for matrix products of such shapes (the best of NumPy, ONNX Runtime and
PyTorch) and for copies; it is empty where no floor was worked out. `+changes` behind a commit: there were changes that
had not been committed. Other work on a machine makes its figures scatter: mind the spread.
"""


def main() -> None:
    """Write the page and the plots; remove plots that are no longer shown."""
    records = newest_records(RESULTS)
    plots = DOCS / "results" / "plots"
    drawn = {f"{chart.name}.svg": draw(chart) for chart in all_charts(records)}
    for path in plots.glob("*.svg"):
        if path.name not in drawn:
            path.unlink()
    for name, svg in drawn.items():
        write_atomically(plots / name, svg)
    write_atomically(DOCS / "results.md", render(records, DOCS))
    print(f"{DOCS / 'results.md'}: {len(records)} of {len(SUITE)} benchmarks, {len(drawn)} plots")


def newest_records(folder: Path) -> dict[str, Records]:
    """What is shown of every benchmark of the suite that was measured."""
    found = {item.name: newest_of(folder / f"{item.name}.jsonl") for item in SUITE}
    return {name: records for name, records in found.items() if records}


def all_charts(records: Mapping[str, Records]) -> list[Chart]:
    """Every plot of the page."""
    known = [benchmark for benchmark in SUITE if benchmark.name in records]
    return [chart for benchmark in known for chart in charts_of(benchmark, records[benchmark.name])]


def charts_of(benchmark: Benchmark, records: Records) -> list[Chart]:
    """A benchmark's plots, over the sizes of all its records."""
    rows = [row for record in records for row in record["rows"]]
    return charts({**records[-1], "rows": rows}, benchmark.grows)


def render(records: Mapping[str, Records], docs: Path) -> str:
    """The page; ``docs`` is the folder whose ``results/`` holds the experiments that are linked."""
    sections = [INTRODUCTION.strip(), *experiments(docs)]
    for benchmark in SUITE:
        sections += [f"## {benchmark.title}", benchmark.compares]
        known = records.get(benchmark.name)
        sections += section(benchmark, known) if known else ["Not measured yet."]
    return "\n\n".join(sections) + "\n"


def experiments(docs: Path) -> list[str]:
    """Links to what was measured of the method itself: reports of experiments, and JSON files."""
    links = [
        f"- [{path.read_text().splitlines()[0].removeprefix('# ')}]({path.relative_to(docs).as_posix()})"
        for path in sorted((docs / "results").glob("*/report.md"))
    ]
    links += [
        f"- [{path.stem}]({path.relative_to(docs).as_posix()})"
        for path in sorted((docs / "results").glob("*.json"))
    ]
    return ["## What the method achieves", "\n".join(links) or "Not measured yet."]


def section(benchmark: Benchmark, records: Records) -> list[str]:
    """The plots, and of each record how it was measured, table and notes."""
    drawn = charts_of(benchmark, records)
    plots = [f"![{chart.title}](results/plots/{chart.name}.svg)" for chart in drawn]
    return plots + [text for record in records for text in part(record)]


def part(record: Mapping[str, Any]) -> list[str]:
    """How one record was measured, its table and notes."""
    rows = table(record["rows"])
    if len(record["rows"]) > FOLDED:
        rows = [f"<details><summary>All {len(record['rows'])} rows</summary>", *rows, "</details>"]
    return [how(record), *rows, *notes(record["notes"])]


def notes(text: str) -> list[str]:
    """A benchmark's remarks: plain text, or a JSON object with a remark, or a list of them, for each key."""
    if not text.startswith("{"):
        return [text] if text else []
    lines = []
    for key, value in json.loads(text).items():
        lines += [f"- {line}" for line in value] if isinstance(value, list) else [f"- {key}: {value}"]
    return ["\n".join(lines)]


def how(record: Mapping[str, Any]) -> str:
    """Command, commit, machine and versions."""
    device, floor = record["device"], record["floor"]
    machine = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in device.items())
    lines = [
        f"`{record['command']}`, commit `{record['commit']}`, {record['time'][:10]}",
        f"machine: {machine}",
    ]
    if floor:
        lines.append(
            "the machine in that run: " + ", ".join(_floor(key, value) for key, value in floor.items())
        )
    lines.append(", ".join(f"{name} {version}" for name, version in record["versions"].items()))
    return "\n".join(f"- {line}" for line in lines)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line with the parameters that all rows share, and the table of the rows."""
    shared = {
        key: value
        for key, value in rows[0]["parameters"].items()
        if all(row["parameters"].get(key) == value for row in rows)
    }
    header = ["case", "sizes", "median ± spread", "", "runs", "ratio", "floor reached"]
    lines = [header, ["---", "---", "---:", "---", "---:", "---", "---:"]]
    for row in rows:
        own = {key: value for key, value in row["parameters"].items() if key not in shared}
        ratio = "" if row["ratio"] is None else ratio_of(row, rows)
        spread = f" ± {number(row['spread'], 2)}" if len(row["samples"]) > 1 else ""
        figure = number(row["median"], 4) + spread
        runs = str(len(row["samples"]))
        lines.append([row["name"], parameters(own), figure, row["unit"], runs, ratio, reached(row)])
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return [f"In all rows: {parameters(shared)}.", text] if shared else [text]


def ratio_of(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """``**2.50** (2.41 to 2.55) × plain``: of the medians, and of the one's lower and the other's upper quartile."""
    middle, against = number(row["ratio"], 3), row["against"]
    other = next(candidate for candidate in rows if is_alternative(candidate, row))
    if min(len(row["samples"]), len(other["samples"])) < 2:
        return f"**{middle}** × {against}"
    over, under = (row, other) if higher_is_better(row["unit"]) else (other, row)
    (least, _, most), (low, _, high) = (
        statistics.quantiles(each["samples"], n=4, method="inclusive") for each in (over, under)
    )
    low, high = least / high, most / low
    if low <= 1 <= high:
        return f"{middle} ({number(low, 3)} to {number(high, 3)}) × {against}"
    return f"**{middle}** ({number(low, 3)} to {number(high, 3)}) × {against}"


def is_alternative(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a row is what another is compared with, at the same sizes."""
    return (other["name"], other["unit"], other["parameters"]) == (
        row["against"],
        row["unit"],
        row["parameters"],
    )


def reached(row: Mapping[str, Any]) -> str:
    """The share of the floor, if one was worked out."""
    if row["floor"] is None:
        return ""
    return f"{share_of_floor(row['unit'], row['median'], row['floor']):.0%}"


def parameters(values: Mapping[str, Any]) -> str:
    """``labels 20, batch 32``."""
    return ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in values.items()
    )


def number(value: float, digits: int) -> str:
    """So many significant digits, more only before the decimal point; never a power of ten from 0.0001 on upwards."""
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}"


def _floor(key: str, value: float) -> str:
    units = {"matmul_flops": "matmul {:.1f} GFLOP/s", "copy_bytes": "copy {:.1f} GB/s"}
    return units[key].format(value / 1e9) if key in units else f"{key.replace('_', ' ')} {value:g}"


if __name__ == "__main__":
    main()
