"""The figures of README.md's table are those that docs/results.md shows of the newest records, rounded further."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from record import RESULTS, higher_is_better, newest_of
from results_page import number

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
# Numbers that are figures: not 640x480, ViT-B/16, float16, 77-token or "80 labels".
FIGURE = re.compile(r"(?<![\w/.-])\d[\d,]*(?:\.\d+)?(?![\w-])(?! labels\b)")


def cases(benchmark: str, name: str, **sizes: object) -> list[dict[str, Any]]:
    """The rows of that name and those sizes in the newest record that has them."""
    for record in reversed(newest_of(RESULTS / f"{benchmark}.jsonl")):
        found = [
            row
            for row in record["rows"]
            if row["name"] == name and sizes.items() <= row["parameters"].items()
        ]
        if found:
            return found
    raise AssertionError(f"no record of {benchmark} has {name} {sizes}")


def medians(benchmark: str, *names: str, scale: float = 1.0, **sizes: object) -> list[float]:
    return [shown(scale * row["median"], 4) for name in names for row in cases(benchmark, name, **sizes)]


def ratios(benchmark: str, name: str, **sizes: object) -> list[float]:
    return [shown(row["ratio"], 3) for row in cases(benchmark, name, **sizes) if row["ratio"] is not None]


def ratio_to(benchmark: str, name: str, other: str, **sizes: object) -> list[float]:
    """To an alternative that the page does not set beside the case."""
    (row,), (against,) = cases(benchmark, name, **sizes), cases(benchmark, other, **sizes)
    better = row["median"] / against["median"]
    return [shown(better if higher_is_better(row["unit"]) else 1 / better, 3)]


def shown(value: float, digits: int) -> float:
    """As the page shows it."""
    return float(number(value, digits).replace(",", ""))


def quoted() -> dict[str, list[float]]:
    """What the README may quote of each benchmark."""
    spurious = "spurious activation rate"
    costs = "whole demo", "all processes: peak PSS"
    vit = {"encoding": "float16"}, {"encoding": "int8"}
    return {
        "demo": medians(
            "demo",
            *(
                f"{name}, {moment}"
                for name in ("mAP, decorrelated", spurious)
                for moment in ("before", "after")
            ),
            *costs,
        ),
        "local_step": [
            value
            for labels in (20, 80)
            for value in (
                *ratios("local_step", "onnx", labels=labels),
                *ratio_to("local_step", "onnx", "caching alone", labels=labels),
                *medians("local_step", "onnx", "onnx: peak anonymous memory", labels=labels),
            )
        ],
        "aggregation": ratios("aggregation", "durable acceptance, with receipts", clients=10_000),
        "feature_caching": [
            value
            for size in ("640x480", "4032x3024")
            for value in ratios("feature_caching", "fedmpt cache", size=size)
        ],
        "tagging": ratios("tagging", "fedmpt tag"),
        "footprint": [
            *medians("footprint", "site-packages with [cpu]"),
            *medians("footprint", "ViT-B/16: peak RssAnon", encoding="float16"),
            *(
                value
                for one in vit
                for value in medians("footprint", "ViT-B/16: update payload", scale=1e-3, **one)
            ),
        ],
    }


def figures(readme: str) -> Iterator[tuple[str, str]]:
    """(benchmark, number) of every figure in the table whose last column names a benchmark."""
    section = readme.partition("\n## Measured\n")[2].partition("\n## ")[0]
    benchmark = ""
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 3:
            continue
        if cells[2] != "the same":
            named = re.match(r"`python benchmarks/(\w+)\.py", cells[2])
            benchmark = named[1] if named else ""
        if benchmark:
            yield from ((benchmark, figure) for figure in FIGURE.findall(cells[1]))


def equals(figure: str, value: float) -> bool:
    """To the digits of the figure."""
    decimals = len(figure.partition(".")[2])
    return abs(float(figure.replace(",", "")) - value) <= 0.5 * 10.0**-decimals * (1 + 1e-9)


def test_every_figure_is_that_of_the_newest_record() -> None:
    known = quoted()
    found = list(figures(README))
    assert len(found) >= 10, "the table has moved"
    assert {benchmark for benchmark, _ in found} <= known.keys(), "add the benchmark to quoted()"
    wrong = [
        f"{benchmark}: {figure}"
        for benchmark, figure in found
        if not any(equals(figure, value) for value in known[benchmark])
    ]
    assert wrong == [], f"the records say { ({name: known[name] for name, _ in found}) }"


@pytest.mark.parametrize(
    ("cell", "numbers"),
    [
        ("0.679 → 0.892", ["0.679", "0.892"]),
        ("20 s; 645 MB", ["20", "645"]),
        ("0.99 of its rate (640x480), 0.55 (4032x3024)", ["0.99", "0.55"]),
        ("20 labels: 74 times faster, 39 times with 77-token prompts", ["74", "39"]),
        ("25 kB in float16, 1,234 bytes in int8", ["25", "1,234"]),
    ],
)
def test_numbers_that_are_figures_are_told_from_names_and_sizes(cell: str, numbers: list[str]) -> None:
    table = (
        f"\n## Measured\n\n| a | {cell} | `python benchmarks/demo.py` |\n| b | 7 | `fedmpt simulate x` |\n"
    )
    assert list(figures(table)) == [("demo", number) for number in numbers]


@pytest.mark.parametrize(("figure", "value", "same"), [("0.99", 0.9942, True), ("0.99", 0.9951, False)])
def test_a_figure_equals_what_rounds_to_it(figure: str, value: float, same: bool) -> None:
    assert equals(figure, value) == same
