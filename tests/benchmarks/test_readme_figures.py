"""The figures of README.md's table are those that docs/results.md shows of the newest records, rounded further."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from record import RESULTS, higher_is_better, newest_of
from results_page import number

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
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


def reported(experiment: str, *settings: tuple[str, str]) -> list[float]:
    """mAP and spurious activation of each (method, pooling) in the federation at strength 0.9, from a report."""
    report = (ROOT / "docs" / "results" / experiment / "report.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines()]
    header = next(line for line in lines if line[:2] == ["variant", "strength"])
    places = [header.index(f"decorrelated.{name}") for name in ("mAP", "spurious activation")]
    pooled = header.index("pooling") if "pooling" in header else None
    values = []
    for method, pooling in settings:
        line = next(
            line
            for line in lines
            if line[:2] == ["federation", "0.9"]
            and line[header.index("method")] == method
            and (pooled is None or line[pooled] == pooling)
        )
        values += [float(line[place].split()[0]) for place in places]
    return values


def expected() -> list[tuple[str, list[float]]]:
    """Of every row of the table, the script or experiment that it names and the figures in their order."""
    spurious = "spurious activation rate"
    vit = {"encoding": "float16"}, {"encoding": "int8"}
    prompts = ("fedmpt-prompts", "transport"), ("fedmpt-prompts", "max")
    return [
        ("demo", medians("demo", *(f"mAP, decorrelated, {moment}" for moment in ("before", "after")))),
        ("demo", medians("demo", *(f"{spurious}, {moment}" for moment in ("before", "after")))),
        ("demo", medians("demo", "whole demo", "all processes: peak PSS")),
        ("controls", reported("controls", ("zero-shot", "–"))),
        (
            "controls",
            reported("controls", ("zero-shot-ensemble", "–"), ("zero-shot-ensemble-patches", "max")),
        ),
        ("controls", reported("controls", ("coop", "–"))),
        ("controls", reported("controls", ("coop-patches", "max"))),
        ("controls", reported("controls", *prompts)),
        ("controls", reported("controls", ("fedmpt-full", "transport"))),
        (
            "spurious-correlation",
            reported("spurious-correlation", ("dualcoop", ""), ("positivecoop", "")),
        ),
        (
            "aggregation",
            ratios("aggregation", "durable acceptance, with receipts", clients=10_000),
        ),
        (
            "local_step",
            [
                *(value for labels in (20, 80) for value in ratios("local_step", "onnx", labels=labels)[:1]),
                *(ratio_to("local_step", "onnx", "caching alone", labels=labels)[0] for labels in (20, 80)),
            ],
        ),
        (
            "local_step",
            [ratio_to("local_step", "onnx", "eager", labels=labels)[0] for labels in (20, 80, 365, 1000)],
        ),
        (
            "feature_caching",
            [
                value
                for size in ("640x480", "4032x3024")
                for value in ratios("feature_caching", "fedmpt cache", size=size)
            ],
        ),
        ("tagging", ratios("tagging", "fedmpt tag")),
        ("footprint", medians("footprint", "site-packages with [cpu]")),
        (
            "footprint",
            [
                *medians("footprint", "ViT-B/16: peak RssAnon", encoding="float16"),
                *(
                    value
                    for one in vit
                    for value in medians("footprint", "ViT-B/16: update payload", scale=1e-3, **one)
                ),
            ],
        ),
    ]


def rows(readme: str) -> Iterator[tuple[str, list[str]]]:
    """Of every row in the table of what was measured: what its command runs, and the figures in its second cell."""
    section = readme.partition("\n## Measured\n")[2].partition("\n## ")[0]
    source = ""
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 3 or cells[2] == "by" or set(cells[2]) == {"-"}:
            continue
        if cells[2] != "the same":
            named = re.match(r"`(?:python benchmarks/|fedmpt simulate )([\w-]+)", cells[2])
            source = named[1] if named else ""
        yield source, FIGURE.findall(cells[1])


def equals(figure: str, value: float) -> bool:
    """To the digits of the figure."""
    decimals = len(figure.partition(".")[2])
    return abs(float(figure.replace(",", "")) - value) <= 0.5 * 10.0**-decimals * (1 + 1e-9)


def test_every_figure_is_that_of_the_newest_record_in_its_place() -> None:
    found = list(rows(README))
    known = expected()
    assert [source for source, _ in found] == [source for source, _ in known], "a row was added or moved"
    wrong = [
        f"row {number}, {source}: {figures} for {values}"
        for number, ((source, figures), (_, values)) in enumerate(zip(found, known, strict=True), start=1)
        if len(figures) != len(values) or not all(map(equals, figures, values))
    ]
    assert wrong == []


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
    assert list(rows(table)) == [("demo", numbers), ("x", ["7"])]


@pytest.mark.parametrize(("figure", "value", "same"), [("0.99", 0.9942, True), ("0.99", 0.9951, False)])
def test_a_figure_equals_what_rounds_to_it(figure: str, value: float, same: bool) -> None:
    assert equals(figure, value) == same
