"""Curves of benchmark rows over a size that grows, as SVG. Needs matplotlib."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LONGEST_LEGEND = 8
# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#8c6d31")


@dataclass(frozen=True)
class Curve:
    """Points (x, median, spread), x rising."""

    label: str
    points: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Chart:
    """All curves of one unit over one parameter."""

    name: str
    title: str
    x: str
    unit: str
    curves: tuple[Curve, ...]

    @property
    def digest(self) -> str:
        """Names the data that is drawn, however matplotlib draws it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def charts(record: Mapping[str, Any], grows: Sequence[str]) -> list[Chart]:
    """The charts of one record: for each parameter of ``grows`` and each unit with three sizes or more."""
    found = []
    for x in grows:
        rows = [row for row in record["rows"] if isinstance(row["parameters"].get(x), int | float)]
        for unit in dict.fromkeys(row["unit"] for row in rows):
            curves = _curves([row for row in rows if row["unit"] == unit], x)
            if any(len(curve.points) > 2 for curve in curves):
                slug = "".join(letter if letter.isalnum() else "-" for letter in f"{x}-{unit}")
                name = f"{record['benchmark']}-{slug}"
                found.append(Chart(name, f"{unit} over {x}", x, unit, curves))
    return found


def draw(chart: Chart) -> str:
    """A chart with logarithmic axes as an SVG document that carries the chart's digest."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6))
    axis = figure.add_subplot()
    for index, curve in enumerate(chart.curves):
        x, median, spread = zip(*curve.points, strict=True)
        axis.errorbar(
            x, median, spread, label=curve.label, color=COLOURS[index], marker="o", markersize=4, capsize=3
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sorted({point[0] for curve in chart.curves for point in curve.points}), minor=False)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.set_xlabel(chart.x)
    axis.set_ylabel(chart.unit)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    data = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fedmpt", "svg.fonttype": "none"}):
        metadata = {"Date": None, "Creator": None, "Description": chart.digest}
        figure.savefig(data, format="svg", metadata=metadata, bbox_inches="tight")
    return "\n".join(line.rstrip() for line in data.getvalue().splitlines()) + "\n"


def _curves(rows: Sequence[Mapping[str, Any]], x: str) -> tuple[Curve, ...]:
    """One curve for each case with two sizes or more; a case whose other parameters vary gives several."""
    series: dict[str, dict[float, tuple[float, float, float]]] = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        same = [row for row in rows if row["name"] == name]
        telling = _telling_parameters(same, x)
        for row in same:
            parameters = row["parameters"]
            label = ", ".join([name, *(f"{key} {parameters[key]}" for key in telling if key in parameters)])
            size = float(parameters[x])
            series.setdefault(label, {})[size] = (size, float(row["median"]), float(row["spread"]))
    curves = [
        Curve(label, tuple(sorted(points.values()))) for label, points in series.items() if len(points) > 1
    ]
    return tuple(sorted(curves, key=lambda curve: -len(curve.points))[:LONGEST_LEGEND])


def _telling_parameters(rows: Sequence[Mapping[str, Any]], x: str) -> list[str]:
    """The parameters other than ``x`` in which two rows of the same ``x`` differ."""
    values: dict[tuple[str, Any], set[str]] = {}
    for row in rows:
        for key, value in row["parameters"].items():
            values.setdefault((key, row["parameters"][x]), set()).add(str(value))
    return sorted({key for (key, _), found in values.items() if key != x and len(found) > 1})
