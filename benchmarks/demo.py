"""What ``fedmpt demo`` needs and what it achieves: time, memory of all its processes, figures before and after.

``python benchmarks/demo.py``: the whole demo (encoding, broker, aggregator, four clients, evaluation, export, tagging,
report), once for each seed; a seed draws other planted pairs, other pictures and another order of the batches.

Memory is summed over the demo's process and all that it started and read five times a second; its peak. PSS counts
file-backed pages too, each divided by the processes that share it; RssAnon counts anonymous pages alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from record import Row, append_record, print_rows

FEDMPT = ["-c", "import sys; from fedmpt.cli import main; sys.exit(main())"]
SAMPLE_SECONDS = 0.2
SPURIOUS = "spurious activation rate"


@dataclass(frozen=True)
class Run:
    """One demo: seconds of wall clock, peaks in bytes, processes at most at once, figures as it printed them."""

    seed: int
    seconds: float
    pss: int
    anonymous: int
    processes: int
    figures: dict[str, dict[str, float | None]]


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    runs = [run_demo(seed) for seed in arguments.seeds]
    rows = all_rows(runs)
    print_rows("The demo", rows)
    by_seed = {"by seed": [describe(run) for run in runs]}
    print("\n".join(by_seed["by seed"]))
    if not arguments.no_record:
        append_record("demo", rows, notes=json.dumps(by_seed, ensure_ascii=False))


def run_demo(seed: int) -> Run:
    """Run ``fedmpt demo`` in a scratch folder and watch its processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *FEDMPT, "demo", "--json", "--seed", str(seed), "--out", f"{folder}/demo"]
        start = time.monotonic()
        demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        pss = anonymous = processes = 0
        while demo.poll() is None:
            family = memory_of_family(demo.pid)
            processes = max(processes, len(family))
            pss = max(pss, sum(shared for shared, _ in family))
            anonymous = max(anonymous, sum(own for _, own in family))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - start
        output = demo.communicate()[0]
        if demo.returncode:
            raise SystemExit(f"the demo ended with exit code {demo.returncode}; run it by hand to see why")
        return Run(seed, seconds, pss, anonymous, processes, json.loads(output)["figures"])


def memory_of_family(process: int) -> list[tuple[int, int]]:
    """(PSS, RssAnon) in bytes of a process and everything that descends from it."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        for member in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
                sizes = {line.split()[0]: int(line.split()[1]) << 10 for line in lines[1:]}
                family.append((sizes["Pss:"], sizes["Pss_Anon:"]))
    return family


def all_rows(runs: Sequence[Run]) -> list[Row]:
    """Costs first, then every figure before and after, each with one sample a seed."""
    rows = [
        Row("whole demo", "s", [run.seconds for run in runs]),
        Row("all processes: peak PSS", "MB", [run.pss / 1e6 for run in runs]),
        Row("all processes: peak anonymous memory", "MB", [run.anonymous / 1e6 for run in runs]),
        Row("processes at once", "processes", [run.processes for run in runs]),
    ]
    for name, values in runs[0].figures.items():
        for moment in ("before", "after"):
            samples: list[Any] = [run.figures[name][moment] for run in runs]
            if None not in samples:
                of_both = None not in values.values()
                rows.append(Row(f"{name}, {moment}" if of_both else name, unit(name), samples))
    return rows


def unit(name: str) -> str:
    """The unit of a figure of the demo's table."""
    known = {"bytes sent per client and round": "bytes", "seconds per round": "s", SPURIOUS: "share"}
    return known.get(name, "score")


def describe(run: Run) -> str:
    """One run's main figures in words."""
    figures = {name: (values["before"], values["after"]) for name, values in run.figures.items()}
    parts = [
        f"{name} {before:.3f} → {after:.3f}"
        for name, (before, after) in figures.items()
        if before is not None and after is not None and ("decorrelated" in name or name == SPURIOUS)
    ]
    return f"seed {run.seed}: {', '.join(parts)}; {run.seconds:.0f} s, {run.pss / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
