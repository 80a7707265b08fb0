"""``fedmpt demo``: a whole federation on this machine."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

DESCRIPTION = """\
Run a whole federation on this machine: an embedded MQTT broker on loopback, an aggregator and four clients, each a
process of its own with its own skewed share of pictures. Then measure the result on held-out pictures, export
tagger.onnx, tag a folder with it and write report.html. Needs neither network nor PyTorch; takes less than a
minute on two cores. Everything it starts is ended again, also on Ctrl-C."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    parser.description = DESCRIPTION
    parser.epilog = "Examples:\n  fedmpt demo\n  fedmpt demo --short --out runs/quick\n  fedmpt demo --seed 1"
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (runs/demo)")
    parser.add_argument("--short", action="store_true", help="two rounds only, to see that it works here")
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="draw another federation: other pictures, pairs and order (none)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo, print the table before and after, and write the report."""
    from fedmpt.edge_client.onnx_session import import_onnxruntime
    from fedmpt.simulation.demo import run_demo
    from fedmpt.simulation.demo_report import summary_rows, write_demo_report

    if arguments.seed is not None and arguments.seed < 0:
        arguments.usage_error("--seed must not be negative")
    import_onnxruntime()
    out = arguments.out.resolve()
    start = time.monotonic()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
                if not console.is_terminal:
                    console.print(f"{stage} …")
            progress.update(tasks[stage], completed=done)

        result = run_demo(out, short=arguments.short, seed=arguments.seed, report=report)
        path = write_demo_report(result)
    seconds = time.monotonic() - start
    rows = summary_rows(result)
    if arguments.json:
        figures = {name: {"before": before, "after": after} for name, before, after in rows}
        print(json.dumps({"figures": figures, "seconds": seconds, "report": str(path)}, indent=1))
        return 0
    table = Table(title="four sites, held-out pictures")
    for header in ("", "before (zero-shot CLIP)", "after"):
        table.add_column(header, justify="left" if not header else "right")
    for name, before, after in rows:
        table.add_row(name, _cell(before), _cell(after))
    Console().print(table)
    print(f"report: {path}\ntagger: {out / 'tagger.onnx'}\n{seconds:.0f} seconds in all")
    return 0


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"
