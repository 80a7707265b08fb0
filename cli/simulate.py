"""``fedmpt simulate``: experiments with many federations, each in one process."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedmpt.cli.options import require_modules, require_writable

DESCRIPTION = """\
Run an experiment: every combination of methods, settings and seeds of a TOML file is one federation, simulated with
the product's own aggregator and trainer. Writes results.csv, plots, report.md and report.html. Combinations that the
store already has are not run again, so an interrupted experiment goes on where it was."""

EXAMPLES = """\
Examples:
  fedmpt simulate spurious-correlation --workers 2
  fedmpt simulate my-experiment.toml --out runs/mine
  fedmpt simulate voc-2007 --set root=/data/VOC2007 --scheduler tcp://head-node:8786"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the command's options."""
    parser.description = DESCRIPTION
    parser.epilog = EXAMPLES
    parser.add_argument("experiment", help="a TOML file, or the name of a shipped experiment (list: `list`)")
    parser.add_argument("--out", type=Path, help="folder for the results (runs/experiments/NAME)")
    parser.add_argument(
        "--store",
        type=Path,
        default=Path("runs/experiments/store"),
        help="folder for features, bundles and finished runs, shared by experiments (%(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes of one core each (%(default)s)")
    parser.add_argument(
        "--scheduler",
        type=_address,
        metavar="ADDRESS",
        help="a running Dask scheduler, such as tcp://head-node:8786",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one of the experiment's shared settings (may be repeated)",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    """Run an experiment, print its table, write its pages."""
    from fedmpt.simulation.experiments import SHIPPED, load_experiment

    if arguments.workers < 1:
        arguments.usage_error("--workers must be at least 1")
    if arguments.experiment == "list":
        titles = {path.stem: load_experiment(path.stem).title for path in sorted(SHIPPED.glob("*.toml"))}
        if arguments.json:
            print(json.dumps(titles))
            return 0
        for name, title in titles.items():
            print(f"{name:24} {title}")
        return 0
    require_modules("matplotlib", "scipy")
    if not arguments.scheduler:
        require_modules("onnxruntime", "onnxscript", "sklearn", "torch", "transformers")
    from fedmpt.simulation.experiments_grid import run_experiment
    from fedmpt.simulation.experiments_report import shown_metrics, summary_rows, write_experiment

    experiment = load_experiment(arguments.experiment, arguments.set)
    out = arguments.out or Path("runs/experiments") / experiment.name
    for folder in (out, arguments.store):
        require_writable(folder / "results.csv")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        outcomes = run_experiment(
            experiment,
            arguments.store.resolve(),
            workers=arguments.workers,
            scheduler=arguments.scheduler,
            report=report,
        )
    write_experiment(experiment, outcomes, out)
    header = [*experiment.varying, *shown_metrics(experiment)]
    cells = summary_rows(experiment, [(run, outcome["metrics"]) for run, outcome in outcomes])
    if arguments.json:
        summary = [dict(zip(header, line, strict=True)) for line in cells]
        print(json.dumps({"title": experiment.title, "summary": summary, "report": str(out / "report.html")}))
        return 0
    table = Table(title=experiment.title)
    for name in header:
        table.add_column(name)
    for line in cells:
        table.add_row(*line)
    Console().print(table)
    print(f"report: {out / 'report.html'}")
    return 0


def _address(text: str) -> str:
    if not re.fullmatch(r"(\w+://)?[^/\s]+:\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} has no port; write it as tcp://host:8786")
    return text
