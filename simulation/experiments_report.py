"""What remains of an experiment: a CSV with one row per run, tables, plots, a page in Markdown and HTML.

Tables, plots and pages are made of the experiment's file and the CSV alone, so that text can be mended without
another run: ``python -m fedmpt.simulation.experiments_report docs/results/ablation``.
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmpt.protocol.files import write_atomically
from fedmpt.simulation import report
from fedmpt.simulation.experiments import (
    Comparison,
    Experiment,
    ExperimentError,
    Plot,
    Run,
    load_experiment,
    shown_value,
    value_of,
)

CLIENTS = "clients.svg"

Metrics = Mapping[str, float]
Rows = Sequence[tuple[Run, Metrics]]

# One colour for each method in every plot; what is compared otherwise takes the palette in order.
METHOD_COLOURS = {
    "zero-shot": "#555555",
    "zero-shot-patches": "#555555",
    "zero-shot-ensemble": "#8c6d31",
    "zero-shot-ensemble-patches": "#8c6d31",
    "coop": "#0072b2",
    "coop-patches": "#56b4e9",
    "dualcoop": "#d55e00",
    "positivecoop": "#009e73",
    "fedmpt-prompts": "#cc79a7",
    "fedmpt-full": "#e69f00",
}
EXPLANATIONS = {
    "spurious activation": (
        "Spurious activation is a rate of false positives: on photos that show the first label of a planted pair and "
        "not the second, how often the second is predicted, at thresholds of equal recall on validation photos. It "
        "counts all of them, whatever caused them; what a model learned from the pairs is the difference to the "
        "same seed at strength 0."
    ),
    "unplanted activation": "Unplanted activation is the same rate over all other ordered pairs of labels.",
}


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds with the half-width of its 95 % interval (Student's t; NaN for a single seed)."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        digits = ",.0f" if abs(self.mean) >= 100 else ".3f"  # beyond, it counts something
        return f"{self.mean:{digits}}" + (
            f" ± {self.half_width:{digits}}" if math.isfinite(self.half_width) else ""
        )

    @property
    def p_value(self) -> float:
        """Of a t test against a mean of 0; NaN for a single seed or equal values."""
        from scipy.stats import t

        if not self.half_width > 0:
            return math.nan
        degrees = self.count - 1
        return float(2 * t.sf(abs(self.mean) / self.half_width * t.ppf(0.975, degrees), degrees))


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


def paired(
    comparison: Comparison, rows: Rows, fields: Sequence[str], metric: str
) -> dict[tuple[Any, ...], Estimate]:
    """Estimate a metric's difference to the partner's of the same seed, for each combination of the fields."""
    partners = {comparison.partner_key(run): metrics for run, metrics in rows if comparison.singles_out(run)}
    groups: dict[tuple[Any, ...], list[float]] = {}
    for run, metrics in rows:
        partner = partners.get(comparison.partner_key(run))
        if partner is not None and not comparison.singles_out(run):
            difference = metrics.get(metric, math.nan) - partner.get(metric, math.nan)
            groups.setdefault(tuple(value_of(run, field) for field in fields), []).append(difference)
    return {key: estimate(values) for key, values in groups.items()}


def results_csv(experiment: Experiment, rows: Rows) -> str:
    """One row per run: the settings in which runs differ, the seed, then every metric; floats with nine digits."""
    names = sorted({name for _, metrics in rows for name in metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*experiment.differing, "seed", *names])
    for run, metrics in rows:
        values = [value_of(run, field) for field in experiment.differing]
        numbers = [f"{metrics[name]:.9g}" if name in metrics else "" for name in names]
        writer.writerow([*values, run.settings.seed, *numbers])
    return text.getvalue()


def read_results(experiment: Experiment, text: str) -> Rows:
    """The runs and metrics of a ``results.csv``.

    Raises:
        ExperimentError: its rows are not the experiment's runs.
    """
    settings = [*experiment.differing, "seed"]
    records = list(csv.DictReader(io.StringIO(text)))
    expected = [
        [*(str(value_of(run, field)) for field in experiment.differing), str(run.settings.seed)]
        for run in experiment.runs
    ]
    if [[record.get(field) for field in settings] for record in records] != expected:
        raise ExperimentError(
            f"{experiment.name}: results.csv does not hold the runs of the experiment's file"
        )
    return [
        (run, {key: float(value) for key, value in record.items() if key not in settings and value})
        for run, record in zip(experiment.runs, records, strict=True)
    ]


def shown_metrics(experiment: Experiment) -> list[str]:
    """The metrics that the plots ask for, in order: the table's columns."""
    return list(dict.fromkeys(metric for plot in experiment.plots for metric in plot.y))


def summary_rows(experiment: Experiment, rows: Rows) -> list[list[str]]:
    """The table's rows: the varying settings, then each shown metric as mean ± half-width."""
    columns = [summarise(rows, experiment.varying, metric) for metric in shown_metrics(experiment)]
    return _cells(experiment, columns, str)


def difference_rows(experiment: Experiment, comparison: Comparison, rows: Rows) -> list[list[str]]:
    """The rows of a comparison's table: the varying settings, then each difference with interval and p."""
    columns = [paired(comparison, rows, experiment.varying, metric) for metric in comparison.y]
    return _cells(experiment, columns, _signed)


def _signed(difference: Estimate) -> str:
    mean = f"{round(difference.mean, 4) + 0.0:+.4f}"  # no negative zero
    if not difference.half_width > 0:
        return mean
    p = f"p {difference.p_value:.3f}" if difference.p_value >= 0.0005 else "p < 0.001"
    return f"{mean} ± {difference.half_width:.4f} ({p})"


def _cells(
    experiment: Experiment,
    columns: Sequence[Mapping[tuple[Any, ...], Estimate]],
    write: Callable[[Estimate], str],
) -> list[list[str]]:
    return [
        [
            *map(shown_value, experiment.varying, key),
            *(write(column[key]) for column in columns),
        ]
        for key in (columns[0] if columns else ())
    ]


def draw_plot(plot: Plot, rows: Rows) -> str:
    """One panel for each metric, as an SVG document: lines over a numeric ``x``, else one row for each value."""
    colours = _colours(plot, rows)
    rows = [row for row in rows if plot.only in (None, row[0].variant)]
    xs = list(dict.fromkeys(value_of(run, plot.x) for run, _ in rows))
    numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x in xs)
    names = list(dict.fromkeys(_series(plot, run) for run, _ in rows))
    figure, axes = _figure(len(plot.y), 3.4 if numeric else 1.3 + 0.3 * len(xs), shared=not numeric)
    for axis, metric in zip(axes, plot.y, strict=True):
        estimates = {
            (x, ", ".join(map(shown_value, plot.by, values))): value
            for (x, *values), value in summarise(rows, [plot.x, *plot.by], metric).items()
        }
        for index, name in enumerate(names):
            points = [(x, estimates[x, name]) for x in xs if (x, name) in estimates]
            shift = (index - (len(names) - 1) / 2) * 0.6 / len(names)
            places = [x if numeric else xs.index(x) + shift for x, _ in points]
            means = [value.mean for _, value in points]
            widths = [np.nan_to_num(value.half_width) for _, value in points]
            style = {"label": name, "marker": "o", "markersize": 4, "capsize": 3, "color": colours[name]}
            if numeric:
                axis.errorbar(places, means, yerr=widths, **style)
            else:
                axis.errorbar(means, places, xerr=widths, linestyle="none", **style)
                axis.locator_params(axis="x", nbins=5)
        if numeric:
            axis.set_xlabel(plot.x)
            if len(xs) > 2 and min(xs) > 0 and max(xs) / min(xs) > 10:
                axis.set_xscale("log")
        axis.set_title(metric, fontsize="medium")
        axis.grid(alpha=0.3)
    if not numeric:
        # Names, which may be long, stand once, left of all panels.
        axes[0].set_yticks(range(len(xs)), [shown_value(plot.x, x) for x in xs])
        axes[0].set_ylim(len(xs) - 0.5, -0.5)
    if len(names) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, title=", ".join(plot.by), fontsize="small", loc="outside lower center", ncols=6
        )
    return _svg(figure)


def _series(plot: Plot, run: Run) -> str:
    return ", ".join(shown_value(field, value_of(run, field)) for field in plot.by)


def _colours(plot: Plot, rows: Rows) -> dict[str, str]:
    """A colour for each series of all the experiment's runs, so that plots of one page agree."""
    names = dict.fromkeys(_series(plot, run) for run, _ in rows)
    return {
        name: METHOD_COLOURS.get(name, report.COLOURS[index % len(report.COLOURS)])
        for index, name in enumerate(names)
    }


def draw_clients(partitions: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Label distribution per client as heat maps, one for each named partition: prevalences ``[K, C]``."""
    figure, axes = _figure(len(partitions), 3.4)
    for axis, (name, prevalence) in zip(axes, partitions.items(), strict=True):
        drawn = axis.imshow(np.asarray(prevalence), aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axis.set_title(name)
        axis.set_ylabel("client")
        axis.set_xlabel("label")
        axis.locator_params(integer=True)
    figure.colorbar(drawn, ax=axes[-1], label="fraction of the client's photos")
    return _svg(figure)


def write_experiment(
    experiment: Experiment, outcomes: Sequence[tuple[Run, Mapping[str, Any]]], folder: Path
) -> None:
    """Write ``results.csv``, then the report of it.

    Where the experiment varies how photos are dealt, the clients' label distributions are drawn too.

    Args:
        experiment: what was asked.
        outcomes: every run with its outcome (see :func:`fedmpt.simulation.experiments_run.perform`).
        folder: where to; made if missing.
    """
    rows = [(run, outcome["metrics"]) for run, outcome in outcomes]
    write_atomically(folder / "results.csv", results_csv(experiment, rows))
    if {"partition", "alpha", "clusters"} & set(experiment.differing):
        write_atomically(folder / CLIENTS, draw_clients(_partitions(outcomes)))
    write_report(experiment, folder)


def write_report(experiment: Experiment, folder: Path) -> None:
    """Write the plots as SVG, ``report.md`` and ``report.html`` from the folder's ``results.csv``.

    Raises:
        ExperimentError: its rows are not the experiment's runs.
    """
    rows = read_results(experiment, (folder / "results.csv").read_text(encoding="utf-8"))
    drawings = {}
    for index, plot in enumerate(experiment.plots, 1):
        drawings[f"plot-{index}.svg"] = draw_plot(plot, rows)
        write_atomically(folder / f"plot-{index}.svg", drawings[f"plot-{index}.svg"])
    if (folder / CLIENTS).is_file():
        drawings[CLIENTS] = (folder / CLIENTS).read_text(encoding="utf-8")
    write_atomically(folder / "report.md", report_text(experiment, rows, list(drawings)))
    report.write_page(folder / "report.html", experiment.title, report_blocks(experiment, rows, drawings))


def report_text(experiment: Experiment, rows: Rows, drawings: Iterable[str]) -> str:
    """``report.md``; ``drawings`` are the names of the files that it shows."""
    blocks = [f"# {experiment.title}", *_sentences(experiment, rows)]
    for title, header, cells in _tables(experiment, rows):
        blocks += [f"## {title}", _markdown_table(header, cells)]
    return "\n\n".join([*blocks, *(f"![{Path(name).stem}]({name})" for name in drawings)]) + "\n"


def report_blocks(experiment: Experiment, rows: Rows, drawings: Mapping[str, str]) -> list[str]:
    """The blocks of ``report.html``; ``drawings`` are SVG documents by file name."""
    blocks = [report.paragraph(sentence) for sentence in _sentences(experiment, rows)]
    blocks += [report.figure(report.drawing(svg, Path(name).stem)) for name, svg in drawings.items()]
    for title, header, cells in _tables(experiment, rows):
        blocks += [report.heading(title), report.table(header, cells)]
    return blocks


def _sentences(experiment: Experiment, rows: Rows) -> list[str]:
    minutes = sum(metrics.get("seconds", 0.0) for _, metrics in rows) / 60
    seeds = len({run.settings.seed for run, _ in rows})
    how = f"{len(rows)} runs, {minutes:.0f} minutes on one core; mean ± 95 % interval over {seeds} seeds."
    if implied := [field for field in experiment.differing if field not in experiment.varying]:
        how += f" Settings that follow from those shown are in results.csv: {', '.join(implied)}."
    if experiment.comparisons:
        how += (
            " Differences are paired by seed; p is of a paired t test, not corrected for how many there are."
        )
    shown = [*shown_metrics(experiment), *(metric for item in experiment.comparisons for metric in item.y)]
    explained = [
        text for name, text in EXPLANATIONS.items() if any(metric.endswith(name) for metric in shown)
    ]
    return [experiment.question, how, *explained]


def _tables(experiment: Experiment, rows: Rows) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each table."""
    header = [*experiment.varying, *shown_metrics(experiment)]
    tables = [("Results", header, summary_rows(experiment, rows))]
    for comparison in experiment.comparisons:
        against = ", ".join(
            f"{field} {shown_value(field, value)}" for field, value in comparison.against.items()
        )
        title = f"Difference to the same seed with {against}"
        cells = difference_rows(experiment, comparison, rows)
        tables.append((title, [*experiment.varying, *comparison.y], cells))
    return tables


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


def _figure(panels: int, height: float, *, shared: bool = False) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = max(1, panels)
    figure, axes = plt.subplots(
        1,
        panels,
        figsize=(4 * panels if panels > 1 else 6, height),
        sharey=shared,
        squeeze=False,
        layout="constrained",
    )
    return figure, axes[0]


def _svg(figure: Any) -> str:
    """The same figure gives the same bytes: fixed identifiers, no date."""
    import matplotlib
    import matplotlib.pyplot as plt

    data = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fedmpt", "svg.fonttype": "none"}):
        figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return "\n".join(line.rstrip() for line in data.getvalue().splitlines()) + "\n"


def main() -> None:
    """Write the reports of the folders given anew; a folder is named like its shipped experiment."""
    for folder in map(Path, sys.argv[1:]):
        write_report(load_experiment(folder.name), folder)


if __name__ == "__main__":
    main()
