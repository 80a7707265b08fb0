"""What remains of an experiment: a CSV with one row per run, a table, plots, a page in Markdown and HTML."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmpt.protocol.files import write_atomically
from fedmpt.simulation import report
from fedmpt.simulation.experiments import Experiment, Plot, Run, value_of

Metrics = Mapping[str, float]
Rows = Sequence[tuple[Run, Metrics]]


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds with the half-width of its 95 % interval (Student's t; NaN for a single seed)."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.half_width:.3f}" if math.isfinite(self.half_width) else "")


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate a mean from independent runs; values that are not finite are left out."""
    from scipy.stats import t

    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return Estimate(finite[0] if finite else math.nan, math.nan, len(finite))
    deviation = float(np.std(finite, ddof=1))
    factor = float(t.ppf(0.975, len(finite) - 1))
    return Estimate(float(np.mean(finite)), factor * deviation / math.sqrt(len(finite)), len(finite))


def summarise(rows: Rows, fields: Sequence[str], metric: str) -> dict[tuple[Any, ...], Estimate]:
    """Estimate a metric for each combination of the fields' values, over all else (the seeds)."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for run, metrics in rows:
        groups.setdefault(tuple(value_of(run, field) for field in fields), []).append(
            metrics.get(metric, math.nan)
        )
    return {key: estimate(values) for key, values in groups.items()}


def results_csv(experiment: Experiment, rows: Rows) -> str:
    """One row per run: the varying settings, the seed, then every metric; floats with six digits."""
    names = sorted({name for _, metrics in rows for name in metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*experiment.varying, "seed", *names])
    for run, metrics in rows:
        values = [value_of(run, field) for field in experiment.varying]
        numbers = [f"{metrics[name]:.6g}" if name in metrics else "" for name in names]
        writer.writerow([*values, run.settings.seed, *numbers])
    return text.getvalue()


def shown_metrics(experiment: Experiment) -> list[str]:
    """The metrics that the plots ask for, in order: the table's columns."""
    return list(dict.fromkeys(metric for plot in experiment.plots for metric in plot.y))


def summary_rows(experiment: Experiment, rows: Rows) -> list[list[str]]:
    """The table's rows: the varying settings, then each shown metric as mean ± half-width."""
    columns = [summarise(rows, experiment.varying, metric) for metric in shown_metrics(experiment)]
    return (
        [[*map(str, key), *(str(column[key]) for column in columns)] for key in columns[0]] if columns else []
    )


def draw_plot(plot: Plot, rows: Rows) -> str:
    """One panel for each metric, as an SVG document: lines over a numeric ``x``, else points side by side."""
    rows = [row for row in rows if plot.only in (None, row[0].variant)]
    figure, axes = _figure(len(plot.y))
    for axis, metric in zip(axes, plot.y, strict=True):
        estimates = {
            (x, ", ".join(map(str, names))): value
            for (x, *names), value in summarise(rows, [plot.x, *plot.by], metric).items()
        }
        xs = list(dict.fromkeys(x for x, _ in estimates))
        names = list(dict.fromkeys(name for _, name in estimates))
        numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x in xs)
        for index, name in enumerate(names):
            points = [(x, estimates[x, name]) for x in xs if (x, name) in estimates]
            shift = 0.0 if numeric else (index - (len(names) - 1) / 2) * 0.6 / len(names)
            axis.errorbar(
                [x if numeric else xs.index(x) + shift for x, _ in points],
                [value.mean for _, value in points],
                [np.nan_to_num(value.half_width) for _, value in points],
                label=str(name),
                marker="o",
                markersize=4,
                capsize=3,
                linestyle="-" if numeric else "none",
                color=report.COLOURS[index % len(report.COLOURS)],
            )
        if not numeric:
            axis.set_xticks(range(len(xs)), [str(x) for x in xs], rotation=30, ha="right")
        elif len(xs) > 2 and min(xs) > 0 and max(xs) / min(xs) > 10:
            axis.set_xscale("log")
        axis.set_xlabel(plot.x)
        axis.set_title(metric)
        axis.grid(alpha=0.3)
    if len(names) > 1:
        axes[-1].legend(
            title=", ".join(plot.by), fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1.0)
        )
    return _svg(figure)


def draw_clients(partitions: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Label distribution per client as heat maps, one for each named partition: prevalences ``[K, C]``."""
    figure, axes = _figure(len(partitions))
    for axis, (name, prevalence) in zip(axes, partitions.items(), strict=True):
        drawn = axis.imshow(np.asarray(prevalence), aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axis.set_title(name)
        axis.set_ylabel("client")
        axis.set_xlabel("label")
    figure.colorbar(drawn, ax=axes[-1], label="fraction of the client's photos")
    return _svg(figure)


def write_experiment(
    experiment: Experiment, outcomes: Sequence[tuple[Run, Mapping[str, Any]]], folder: Path
) -> None:
    """Write ``results.csv``, the plots as SVG, ``report.md`` and ``report.html``.

    Where the experiment varies how photos are dealt, the clients' label distributions are drawn too.

    Args:
        experiment: what was asked.
        outcomes: every run with its outcome (see :func:`fedmpt.simulation.experiments_run.perform`).
        folder: where to; made if missing.
    """
    rows = [(run, outcome["metrics"]) for run, outcome in outcomes]
    plots = {f"plot-{index}": draw_plot(plot, rows) for index, plot in enumerate(experiment.plots, 1)}
    if {"partition", "alpha", "clusters"} & set(experiment.varying):
        plots["clients"] = draw_clients(_partitions(outcomes))
    header = [*experiment.varying, *shown_metrics(experiment)]
    cells = summary_rows(experiment, rows)
    seconds = sum(metrics.get("seconds", 0.0) for _, metrics in rows)
    seeds = len({run.settings.seed for run, _ in rows})
    how = (
        f"{len(rows)} runs, {seconds / 60:.0f} minutes on one core; mean ± 95 % interval over {seeds} seeds."
    )
    sentences = [experiment.question, how]
    write_atomically(folder / "results.csv", results_csv(experiment, rows))
    for name, svg in plots.items():
        write_atomically(folder / f"{name}.svg", svg)
    lines = [f"# {experiment.title}", *sentences, _markdown_table(header, cells)]
    lines += [f"![{name}]({name}.svg)" for name in plots]
    write_atomically(folder / "report.md", "\n\n".join(lines) + "\n")
    blocks = [report.paragraph(sentence) for sentence in sentences]
    blocks += [report.figure(report.drawing(svg, name)) for name, svg in plots.items()]
    blocks += [report.heading("Results"), report.table(header, cells)]
    report.write_page(folder / "report.html", experiment.title, blocks)


def _partitions(outcomes: Sequence[tuple[Run, Mapping[str, Any]]]) -> dict[str, list[list[float]]]:
    """The first run's prevalences for each way of dealing the photos."""
    found: dict[str, list[list[float]]] = {}
    for run, outcome in outcomes:
        settings = run.settings
        knob = {"dirichlet": f" α = {settings.alpha:g}", "clusters": f" ({settings.clusters})"}
        found.setdefault(settings.partition + knob.get(settings.partition, ""), outcome["prevalence"])
    return found


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figure(panels: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, max(1, panels), figsize=(4.6 * max(1, panels), 3.6), squeeze=False)
    return figure, axes[0]


def _svg(figure: Any) -> str:
    """The same figure gives the same bytes: fixed identifiers, no date."""
    import matplotlib
    import matplotlib.pyplot as plt

    data = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fedmpt", "svg.fonttype": "none"}):
        figure.tight_layout()
        figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return "\n".join(line.rstrip() for line in data.getvalue().splitlines()) + "\n"
