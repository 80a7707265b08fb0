"""Every record that docs/results.md shows names a commit that led here, beats no floor and has true ratios."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import record
import results_page

ROOT = Path(__file__).resolve().parents[2]


def shown() -> list[dict[str, Any]]:
    """Every record of the page."""
    return [found for records in results_page.newest_records(record.RESULTS).values() for found in records]


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_every_record_shown_was_made_on_a_commit_that_led_here() -> None:
    try:
        shallow = git("rev-parse", "--is-shallow-repository")
    except OSError:
        pytest.skip("git is not installed")
    if shallow.returncode:
        pytest.skip("this is not a git checkout")
    if shallow.stdout.strip() == "true":
        pytest.skip("this is a shallow clone: older commits are not there")
    wrong = [
        f"{found['benchmark']}: {found['commit']}"
        for found in shown()
        if git("merge-base", "--is-ancestor", found["commit"], "HEAD").returncode
    ]
    assert wrong == [], "not commits, not ancestors of HEAD, or with changes that were not committed"


def test_no_figure_is_better_than_its_floor() -> None:
    shares = {
        f"{found['benchmark']}: {row['name']} {row['parameters']}": record.share_of_floor(
            row["unit"], row["median"], row["floor"]
        )
        for found in shown()
        for row in found["rows"]
        if row["floor"] is not None
    }
    assert {name: share for name, share in shares.items() if share > 1} == {}


def test_every_ratio_is_that_of_the_medians() -> None:
    wrong = []
    for found in shown():
        for row in found["rows"]:
            if row["ratio"] is None:
                continue
            other = next(other for other in found["rows"] if results_page.is_alternative(other, row))
            ratio = other["median"] / row["median"]
            if record.higher_is_better(row["unit"]):
                ratio = 1 / ratio
            if abs(ratio / row["ratio"] - 1) > 1e-6:
                wrong.append(f"{found['benchmark']}: {row['name']} {row['parameters']}")
    assert wrong == []
