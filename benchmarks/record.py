"""Shared by all benchmarks: interleaved timing, the machine's own floor, one JSON record for each run.

A benchmark measures *cases* in turn (A B A B …), so that a slow moment of the machine hits all of them, and
appends one record with every sample to ``results/<benchmark>.jsonl``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "numpy",
    "onnx",
    "onnxruntime",
    "torch",
    "transformers",
    "triton",
    "paho-mqtt",
    "safetensors",
    "pillow",
)


@dataclass(frozen=True)
class Row:
    """One case: its name, its sizes, the unit of its samples (one number for each repetition).

    ``ratio`` compares it with the case named ``against``: that one's median over this one's, for times, so
    that above 1 is faster. ``floor`` is the least that this machine could need, in the same unit.
    """

    name: str
    unit: str
    samples: Sequence[float]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    against: str = ""
    ratio: float | None = None
    floor: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles; 0 for fewer than two samples."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2


def interleave(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each case in each repetition, the cases taken in turn; ``warmup`` repetitions are not kept.

    With ``clock=time.process_time``, processor time, which other work on the machine disturbs less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repetition in range(warmup + repeats):
        for name, case in cases.items():
            start = clock()
            case()
            elapsed = clock() - start
            if repetition >= warmup:
                seconds[name].append(elapsed)
    return seconds


def machine_floor(threads: int | None = None) -> dict[str, float]:
    """What this machine reaches: float32 matmul in FLOP/s and copy in bytes/s (read plus written)."""
    size = 1024
    a = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    block = np.ones(64 << 20, np.uint8)
    target = np.empty_like(block)
    seconds = interleave({"matmul": lambda: a @ a, "copy": lambda: np.copyto(target, block)}, repeats=7)
    return {
        "matmul_flops": 2 * size**3 / min(seconds["matmul"]),
        "copy_bytes": 2 * block.nbytes / min(seconds["copy"]),
        "threads": float(threads or len(os.sched_getaffinity(0))),
    }


def append_record(
    benchmark: str, rows: Sequence[Row], *, notes: str = "", floor: Mapping[str, float] | None = None
) -> Path:
    """Append one run to ``results/<benchmark>.jsonl``; return the file's path."""
    record = {
        "benchmark": benchmark,
        "command": "python " + " ".join(_relative(word) for word in sys.argv),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": _versions(),
        "device": device(),
        "floor": dict(floor or {}),
        "notes": notes,
        "rows": [{**asdict(row), "median": row.median, "spread": row.spread} for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(record, sort_keys=True) + "\n")
    return path


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """One table on standard output."""
    table = Table(title=title)
    for header in ("case", "sizes", "median", "± spread", "unit", "ratio", "against", "floor reached"):
        table.add_column(
            header, justify="left" if header in ("case", "sizes", "against", "unit") else "right"
        )
    for row in rows:
        table.add_row(
            row.name,
            ", ".join(f"{key} {value}" for key, value in row.parameters.items()),
            f"{row.median:.4g}",
            f"{row.spread:.2g}",
            row.unit,
            "" if row.ratio is None else f"{row.ratio:.2f}",
            row.against,
            "" if row.floor is None else f"{row.floor / row.median:.0%}",
        )
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)


def device() -> dict[str, Any]:
    """The machine in words: processor, cores that may be used, memory in GiB."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in information.read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"processor": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def _relative(word: str) -> str:
    path = Path(word)
    root = Path(__file__).resolve().parents[1]
    return str(path.resolve().relative_to(root)) if path.resolve().is_relative_to(root) else word
