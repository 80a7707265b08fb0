"""Run every benchmark that this machine can, one after the other, then write ``docs/results.md`` anew.

``python benchmarks/run.py`` takes long; ``python benchmarks/run.py codec tagging`` runs those. What is left out is said
with the reason. Exit code 1 if one failed; the others still run. Then ``python benchmarks/check.py`` says what got
slower.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from record import RESULTS
from rich.console import Console
from rich.table import Table
from suite import SUITE, Benchmark, absent, missing

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the summary; 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [benchmark.name for benchmark in SUITE]
    parser.add_argument("names", nargs="*", metavar="benchmark", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--list", action="store_true", help="only say what would run and what would not")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(names)):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(names)}")
    chosen = [benchmark for benchmark in SUITE if benchmark.name in (options.names or names)]
    outcomes = [(benchmark, perform(benchmark, dry=options.list)) for benchmark in chosen]
    print_summary(outcomes)
    if not options.list:
        subprocess.run([sys.executable, HERE / "results_page.py"], check=True)
    return int(any(outcome.startswith("FAILED") for _, outcome in outcomes))


def perform(benchmark: Benchmark, *, dry: bool = False, folder: Path = HERE) -> str:
    """Run one benchmark in a process of its own; what became of it, in words.

    It failed, too, if it ended well but left no new record.
    """
    if lacks := missing(benchmark):
        return f"left out: no {', no '.join(lacks)}"
    without = "".join(f", without {package}" for package in absent(benchmark.optional))
    if dry:
        return f"would run{without}"
    print(f"== {benchmark.name}", flush=True)
    before, start = records(benchmark), time.monotonic()
    code = subprocess.run([sys.executable, folder / f"{benchmark.name}.py"]).returncode
    seconds = f"{time.monotonic() - start:.0f} s"
    if code:
        return f"FAILED with exit code {code} after {seconds}"
    if records(benchmark) == before:
        return f"FAILED: it ended after {seconds} without a record"
    return f"recorded in {seconds}{without}"


def records(benchmark: Benchmark) -> int:
    """How many records there are."""
    path = RESULTS / f"{benchmark.name}.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def print_summary(outcomes: Sequence[tuple[Benchmark, str]]) -> None:
    """One line for each benchmark."""
    table = Table("benchmark", "outcome", title="Benchmarks")
    for benchmark, outcome in outcomes:
        table.add_row(benchmark.name, outcome)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
