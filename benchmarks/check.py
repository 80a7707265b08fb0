"""Compare each case's two newest records of one machine and name what got slower by more than chance.

``python benchmarks/check.py local_step`` (or no name: all). A case is compared with the newest earlier record of the
same benchmark, machine, name and sizes; what cannot be compared is told with the reason. A difference counts that
exceeds both spreads together, three per cent, and what a clock or a process scatters anyway (0.1 ms, 1 MB, …).
Exit code 1 if anything got slower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from record import RESULTS, higher_is_better, newest_of

RELATIVE = 0.03
ABSOLUTE = {"s": 1e-4, "CPU ms to write": 0.01, "CPU ms to read": 0.01, "µs": 5.0, "MB": 1.0, "MiB": 1.0}
TIMED_BY_GPU = {"kernels": 2e-6}  # whose clock is finer than that of a process
Record = dict[str, Any]


@dataclass
class Outcome:
    """How many cases were compared, what got slower, and what could not be compared, why."""

    compared: int = 0
    slower: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def compare(newest: Record, earlier: Sequence[Record]) -> Outcome:
    """Every case of a record with the newest of the earlier ones (oldest first) that has it."""
    outcome = Outcome()
    same_machine = [record for record in earlier if record["device"] == newest["device"]]
    known = {_key(row): row for record in same_machine for row in record["rows"]}
    new = []
    for row in newest["rows"]:
        old = known.get(_key(row))
        if old is None:
            new.append(_name(row))
            continue
        outcome.compared += 1
        if is_slower(newest["benchmark"], old, row):
            change = f"{old['median']:.4g} → {row['median']:.4g} {row['unit']}"
            outcome.slower.append(f"{newest['benchmark']}: {_name(row)}: {change}")
    if new:
        reason = "no earlier record of this machine has these cases at these sizes"
        if not same_machine:
            reason = "all earlier records are of other machines" if earlier else "there is one record only"
        outcome.left_out.append(f"{newest['benchmark']}: {reason}: {'; '.join(new)}")
    return outcome


def is_slower(benchmark: str, old: Record, new: Record) -> bool:
    """Whether the medians differ for the worse by more than spreads and least differences."""
    worse = new["median"] - old["median"]
    if higher_is_better(new["unit"]):
        worse = -worse
    least = ABSOLUTE.get(new["unit"], 0.0)
    if new["unit"] == "s":
        least = TIMED_BY_GPU.get(benchmark, least)
    return bool(worse > max(new["spread"] + old["spread"], RELATIVE * old["median"], least))


def main(names: Sequence[str]) -> int:
    """Print what got slower and what could not be compared; 1 if anything got slower."""
    total = Outcome()
    for path in [RESULTS / f"{name}.jsonl" for name in names] or sorted(RESULTS.glob("*.jsonl")):
        if not path.exists():
            total.left_out.append(f"{path.stem}: no records")
            continue
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for newest in newest_of(path):
            outcome = compare(newest, records[: newest["line"]])
            total.compared += outcome.compared
            total.slower += outcome.slower
            total.left_out += outcome.left_out
    if total.left_out:
        print("\n  ".join(["not compared:", *total.left_out]))
    print(f"{total.compared} cases compared, {len(total.slower)} got slower")
    print("\n".join(total.slower), end="\n" if total.slower else "")
    return 1 if total.slower else 0


def _key(row: Record) -> str:
    return json.dumps([row["name"], row["parameters"], row["unit"]], sort_keys=True)


def _name(row: Record) -> str:
    sizes = ", ".join(f"{key} {value}" for key, value in row["parameters"].items())
    return row["name"] + (f" ({sizes})" if sizes else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="benchmarks; all where none is named")
    sys.exit(main(parser.parse_args().names))
