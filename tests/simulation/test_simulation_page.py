"""The table of controls in docs/simulation.md is that of the experiment's report."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
# The page's rows in their order, by the report's method and pooling.
ROWS = (
    ("zero-shot", "–"),
    ("zero-shot-patches", "max"),
    ("zero-shot-patches", "transport"),
    ("zero-shot-ensemble", "–"),
    ("zero-shot-ensemble-patches", "max"),
    ("zero-shot-ensemble-patches", "transport"),
    ("coop", "–"),
    ("coop-patches", "max"),
    ("coop-patches", "transport"),
    ("fedmpt-prompts", "max"),
    ("fedmpt-prompts", "transport"),
    ("fedmpt-full", "transport"),
)
FIGURES = ("decorrelated.mAP", "decorrelated.spurious activation", "decorrelated.unplanted activation")
LOOKS_AT = {"–": "class token", "max": "best patch", "transport": "transport"}


def table(text: str, *begin: str) -> list[list[str]]:
    """Header and rows of the first Markdown table whose header begins so."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    start = next(number for number, cells in enumerate(lines) if cells[: len(begin)] == list(begin))
    end = next(number for number, cells in enumerate(lines[start:], start) if cells == [""])
    return [lines[start], *lines[start + 2 : end]]


def test_the_controls_are_those_of_the_report() -> None:
    header, *rows = table((DOCS / "results" / "controls" / "report.md").read_text(), "variant", "strength")
    found = {
        (row[header.index("method")], row[header.index("pooling")]): [
            row[header.index(name)].split(" ")[0] for name in FIGURES
        ]
        for row in rows
        if row[0] == "federation"
    }
    _, *shown = table((DOCS / "simulation.md").read_text(), "", "looks at")
    assert [[row[1], *row[3:]] for row in shown] == [[LOOKS_AT[key[1]], *found[key]] for key in ROWS]
