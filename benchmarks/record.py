"""Shared by all benchmarks: interleaved timing, the machine's own floor, one JSON record for each run.

A benchmark measures *cases* in turn (A B A B …), so that a slow moment of the machine hits all of them, and
appends one record with every sample to ``results/<benchmark>.jsonl``.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
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
    "flwr",
)
Products = Sequence[tuple[int, int, int]]
STREAMS = "onnxruntime, a stream a core"


@dataclass(frozen=True)
class Row:
    """One case: its name, its sizes, the unit of its samples (one number for each repetition).

    ``ratio`` compares it with the case named ``against``, see :meth:`compared_with`. ``floor`` is the least that
    this machine could need, in the same unit; of a rate, the most that it could reach.
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

    def compared_with(self, other: Row) -> Row:
        """This case with its ratio to another: of the medians, and above 1 where this case is the better one."""
        better = self.median / other.median
        return replace(self, against=other.name, ratio=better if higher_is_better(self.unit) else 1 / better)


def higher_is_better(unit: str) -> bool:
    """Of rates and scores; every other unit counts time, bytes or memory."""
    return unit.endswith("/s") or unit == "score"


def share_of_floor(unit: str, median: float, floor: float) -> float:
    """How much of the best was reached: least time over time, or rate over highest rate."""
    return median / floor if higher_is_better(unit) else floor / median


def interleave(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each case in each repetition, the cases taken in turn; ``warmup`` repetitions are not kept.

    With ``clock=time.process_time``, processor time, which other work on the machine disturbs less. ``before`` is
    called with each case's name ahead of its clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repetition in range(warmup + repeats):
        for name, case in cases.items():
            before(name)
            start = clock()
            case()
            elapsed = clock() - start
            if repetition >= warmup:
                seconds[name].append(elapsed)
    return seconds


def repeated(case: Callable[[], object], calls: int) -> Callable[[], None]:
    """The same case so often that neither the clock's resolution nor a first call after a rest matters."""

    def run() -> None:
        for _ in range(calls):
            case()

    return run


def machine_floor(products: Products = ((1024, 1024, 1024),)) -> dict[str, float]:
    """What this machine reaches: float32 products in FLOP/s, copies in bytes/s (read plus written).

    ``products`` are (rows, inner, columns) of what was measured. The rate is that of the best of NumPy, ONNX Runtime
    (all cores at one product, or one product on each) and PyTorch, as far as they are installed, at the shape that
    suits it best, in its fastest repetition: no single one of them bounds what the others reach.
    """
    threads = len(os.sched_getaffinity(0))
    flops = 0.0
    for shape in products:
        for name, seconds in interleave(_engines(*shape, threads), repeats=9, warmup=2).items():
            at_once = threads if name == STREAMS else 1
            flops = max(flops, 2 * at_once * math.prod(shape) / min(seconds))
    return {"matmul_flops": flops, "copy_bytes": copy_floor(), "threads": float(threads)}


def copy_floor() -> float:
    """Bytes/s that this machine copies (read plus written), in the fastest repetition."""
    block = np.ones(64 << 20, np.uint8)
    target = np.empty_like(block)
    copies = interleave({"copy": lambda: np.copyto(target, block)}, repeats=7)["copy"]
    return 2 * block.nbytes / min(copies)


def floor_again(
    rows: Sequence[Row], floor: Mapping[str, float], products: Products
) -> tuple[list[Row], dict[str, float]]:
    """Measure the machine once more, after the cases; where it is faster now, move the rows' floors with it.

    Other work may have slowed it down when it was measured before them. All the rows' floors are of operations.
    """
    best = {name: max(value, floor[name]) for name, value in machine_floor(products).items()}
    faster = best["matmul_flops"] / floor["matmul_flops"]
    moved = [
        row
        if row.floor is None
        else replace(row, floor=row.floor * faster if higher_is_better(row.unit) else row.floor / faster)
        for row in rows
    ]
    return moved, best


def _engines(rows: int, inner: int, columns: int, threads: int) -> dict[str, Callable[[], object]]:
    """One matrix product in every library that is installed, and one on each core in ONNX Runtime."""
    random = np.random.default_rng(0)
    left, right = (random.standard_normal(shape, np.float32) for shape in ((rows, inner), (inner, columns)))
    found: dict[str, Callable[[], object]] = {"numpy": lambda: left @ right}
    with contextlib.suppress(ImportError):
        run = _onnx_product(left, right, threads)
        run_single = _onnx_product(left, right, 1)
        pool = ThreadPoolExecutor(threads)
        found["onnxruntime"] = run
        found[STREAMS] = lambda: list(pool.map(lambda _: run_single(), range(threads)))
    with contextlib.suppress(ImportError):
        import torch

        tensors = torch.from_numpy(left), torch.from_numpy(right)
        found["torch"] = lambda: tensors[0] @ tensors[1]
    return found


def _onnx_product(left: np.ndarray, right: np.ndarray, threads: int) -> Callable[[], Any]:
    """``left`` times the constant ``right``, as ONNX Runtime multiplies with weights."""
    import onnx
    import onnxruntime

    node = onnx.helper.make_node("MatMul", ["left", "right"], ["product"])
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("left", left.shape), ("product", (len(left), right.shape[1])))
    ]
    constant = onnx.numpy_helper.from_array(right, "right")
    graph = onnx.helper.make_graph([node], "product", ends[:1], ends[1:], [constant])
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"left": left})[0]


def append_record(
    benchmark: str, rows: Sequence[Row], *, notes: str = "", floor: Mapping[str, float] | None = None
) -> Path:
    """Append one run to ``results/<benchmark>.jsonl``; return the file's path.

    A figure that is better than its floor is told: the machine was busier when the floor was measured.
    """
    for row in rows:
        if row.floor is not None and share_of_floor(row.unit, row.median, row.floor) > 1:
            print(f"{row.name} {row.parameters}: better than its floor; measure again", file=sys.stderr)
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


def newest_of(path: Path) -> list[dict[str, Any]]:
    """Of one benchmark's file the last record and, oldest first, what earlier ones have of sizes not measured since.

    So a benchmark may be run in parts. Sizes count, not cases, and only those that the last record has numbers for:
    what is gone from a benchmark does not come back. Each has its ``line`` in the file, from 0.
    """
    shown: list[dict[str, Any]] = []
    measured: set[str] = set()
    kinds: set[frozenset[str]] = set()
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in reversed(list(enumerate(lines))):
        record = json.loads(line)
        sizes = [json.dumps(row["parameters"], sort_keys=True) for row in record["rows"]]
        kinds = kinds or {frozenset(row["parameters"]) for row in record["rows"]}
        rows = [
            row
            for row, size in zip(record["rows"], sizes, strict=True)
            if size not in measured and frozenset(row["parameters"]) in kinds
        ]
        if rows:
            shown.insert(0, {**record, "rows": rows, "line": number})
        measured.update(sizes)
    return shown


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
            "" if row.floor is None else f"{share_of_floor(row.unit, row.median, row.floor):.0%}",
        )
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)


def device() -> dict[str, Any]:
    """The machine in words: processor, cores that may be used, memory in GiB.

    A virtual machine's processor may have a name that several kinds share ("AMD EPYC"): family, model and stepping
    are added where Linux tells them.
    """
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = [line.partition(":") for line in information.read_text().splitlines()]
        known = {key.strip(): value.strip() for key, _, value in reversed(lines)}  # of the first processor
        name = known.get("model name", name)
        numbers = [f"{key} {known[key]}" for key in ("cpu family", "model", "stepping") if key in known]
        name += f" ({', '.join(numbers)})" if numbers else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"processor": name, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit, and whether anything else was changed than what recording itself writes."""
    here = Path(__file__).parent
    written = [
        ":(top,exclude)benchmarks/results",
        ":(top,exclude)docs/results",
        ":(top,exclude)docs/results.md",
    ]
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", ":(top)", *written],
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
