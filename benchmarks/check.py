"""Compare the two newest records of a benchmark on one machine and name what got slower by more than its spread.

Differences below one per cent never count: what hardly scatters, such as counted instructions, would always differ.
``python benchmarks/check.py local_step`` (or no name: all). Exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# Units where more is better; every other unit counts time, bytes or memory.
RATES = ("/s", "per second", "FLOP/s", "score")
LEAST = 0.01  # a difference worth naming, as a share of the older median


def newest_pair(records: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The newest record and the one before it on the same machine, or None."""
    newest = records[-1]
    for older in reversed(records[:-1]):
        if older["device"] == newest["device"]:
            return older, newest
    return None


def slower(older: dict[str, Any], newer: dict[str, Any]) -> list[str]:
    """One line for each case whose medians differ for the worse by more than both spreads together."""
    before = {_key(row): row for row in older["rows"]}
    lines = []
    for row in newer["rows"]:
        old = before.get(_key(row))
        if old is None:
            continue
        worse = row["median"] - old["median"]
        if any(rate in row["unit"] for rate in RATES):
            worse = -worse
        if worse > max(row["spread"] + old["spread"], LEAST * old["median"]):
            change = f"{old['median']:.4g} → {row['median']:.4g} {row['unit']}"
            lines.append(f"{newer['benchmark']}: {row['name']} {row['parameters']}: {change}")
    return lines


def main(names: list[str]) -> int:
    """Print what got slower; 1 if anything did."""
    found = []
    for path in [RESULTS / f"{name}.jsonl" for name in names] or sorted(RESULTS.glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        pair = newest_pair(records) if records else None
        if pair is None:
            print(f"{path.stem}: no two records of one machine")
            continue
        found += slower(*pair)
    print("\n".join(found) or "nothing got slower")
    return 1 if found else 0


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["name"], row["parameters"], row["unit"]], sort_keys=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="benchmarks; all where none is named")
    sys.exit(main(parser.parse_args().names))
