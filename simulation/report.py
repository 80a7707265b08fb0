"""Building blocks of the HTML reports: pages that open offline, with every picture inside them.

A block is a string of HTML; ``page`` joins blocks. All text that comes in is escaped here, so that a label
such as ``<b>`` stays a label.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import ceil, floor, isfinite, log10
from pathlib import Path
from typing import TYPE_CHECKING

from fedmpt.protocol.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

Point = tuple[float, float]

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#8c6d31")

STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } td { white-space: nowrap; }
tbody tr:hover { background: var(--faint); }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; opacity: .8; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } .row > * { margin: 0; }
img, svg { max-width: 100%; height: auto; }
.drawing { background: #fff; }
.wide { overflow-x: auto; }
"""


def page(title: str, blocks: Iterable[str]) -> str:
    """A complete HTML document without scripts and without a reference to anything outside itself."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(blocks) + "\n</body></html>\n"
    )


def write_page(path: Path, title: str, blocks: Iterable[str]) -> None:
    """Write ``page`` to a file, whole or not at all."""
    write_atomically(path, page(title, blocks))


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table, which scrolls where the window is too narrow for it; see :func:`format_cell`."""
    # A long name such as decorrelated.mAP may break after its dot.
    head = "".join(f"<th>{escape(cell).replace('.', '.<wbr>')}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(format_cell(cell))}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def format_cell(cell: object) -> str:
    """How tables write one value: floats with three decimals, whole thousands apart, what is missing as a dash."""
    if cell is None or (isinstance(cell, float) and not isfinite(cell)):
        return "–"
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def figure(content: str, caption: str = "", *, width: int | None = None) -> str:
    """Any block with a caption below it; with a ``width`` in CSS pixels long captions wrap instead of widening it."""
    style = f' style="width:{width}px"' if width else ""
    return f"<figure{style}>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def row(blocks: Iterable[str]) -> str:
    """Blocks beside one another, wrapped where the window is narrow."""
    return f'<div class="row">{"".join(blocks)}</div>'


def image(picture: Image.Image, description: str, *, width: int | None = None, kind: str = "PNG") -> str:
    """A picture inside the page; ``width`` in CSS pixels; ``kind`` PNG, or JPEG for photographs."""
    data = io.BytesIO()
    picture.save(data, format=kind)
    return _embedded(data.getvalue(), f"image/{kind.lower()}", description, width)


def drawing(svg: str, description: str) -> str:
    """An SVG document as a picture; as such it can run no script and load nothing."""
    return _embedded(svg.encode(), "image/svg+xml", description, None)


def line_chart(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: int = 460,
    height: int = 300,
) -> str:
    """Lines with points as inline SVG, without a plotting library; what is not finite is left out."""
    lines = {
        name: [p for p in points if isfinite(p[0]) and isfinite(p[1])] for name, points in series.items()
    }
    points = [point for line in lines.values() for point in line]
    x_ticks = _ticks([x for x, _ in points])
    y_ticks = _ticks([y for _, y in points])
    left, right, top, bottom = 56, 12, 30, 44
    plot_width, plot_height = width - left - right, height - top - bottom

    def place_x(x: float) -> float:
        return left + plot_width * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def place_y(y: float) -> float:
        return top + plot_height * (1 - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    parts = [f'<text x="{left}" y="16" font-weight="600">{escape(title)}</text>']
    for y in y_ticks:
        level = f"{place_y(y):.1f}"
        parts += [
            f'<line x1="{left}" x2="{width - right}" y1="{level}" y2="{level}" stroke="#8884"/>',
            f'<text x="{left - 6}" y="{level}" dy="4" text-anchor="end">{_short(y)}</text>',
        ]
    parts += [
        f'<text x="{place_x(x):.1f}" y="{height - bottom + 16}" text-anchor="middle">{_short(x)}</text>'
        for x in x_ticks
    ]
    middle_x, middle_y = left + plot_width / 2, top + plot_height / 2
    parts += [
        f'<text x="{middle_x:.1f}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(12 {middle_y:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for index, line in enumerate(lines.values()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="2.5" fill="{colour}"/>' for x, y in line
        ]
    chart = (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(title)}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="currentColor">{"".join(parts)}</svg>'
    )
    return f"<div>{chart}{_legend(list(lines))}</div>"


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    return row(
        f'<small><span style="color:{COLOURS[index % len(COLOURS)]}">●</span> {escape(name)}</small>'
        for index, name in enumerate(names)
    )


def _embedded(data: bytes, media_type: str, description: str, width: int | None) -> str:
    size = f' width="{width}"' if width else ""
    style = ' class="drawing"' if media_type == "image/svg+xml" else ""
    content = base64.b64encode(data).decode()
    return f'<img{style}{size} alt="{escape(description)}" src="data:{media_type};base64,{content}">'


def _ticks(values: Sequence[float], wanted: int = 5) -> list[float]:
    """Round numbers that span the values: steps of 1, 2 or 5 times a power of ten."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high == low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / wanted
    power = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _short(value: float) -> str:
    return f"{round(value, 10):g}"
