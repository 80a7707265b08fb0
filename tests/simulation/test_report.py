"""Reports open offline, show what they were given, and let no text become markup."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from fedmpt.simulation import report


class References(HTMLParser):
    """Collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def parsed(html: str) -> References:
    parser = References()
    parser.feed(html)
    return parser


def chart(points: list[tuple[float, float]]) -> ElementTree.Element:
    html = report.line_chart({"a": points}, title="t", x_label="round", y_label="mAP")
    return ElementTree.fromstring(html.removeprefix("<div>").removesuffix("</div>"))


def test_a_page_fetches_and_runs_nothing(tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    blocks = [
        report.image(picture, "black"),
        report.drawing("<svg xmlns='http://www.w3.org/2000/svg'/>", "empty"),
        report.line_chart({"a": [(0, 1), (1, 2)]}, title="t", x_label="x", y_label="y"),
        report.table(["a"], [[1.0]]),
    ]
    report.write_page(tmp_path / "report.html", "Title", blocks)
    found = parsed((tmp_path / "report.html").read_text())
    assert len(found.sources) == 2
    assert all(source.startswith("data:image/") for source in found.sources)
    assert not found.tags & {"script", "link", "iframe", "object"}


def test_text_never_becomes_markup() -> None:
    hostile = "<script>alert(1)</script>"
    html = report.page(
        hostile,
        [
            report.heading(hostile),
            report.paragraph(hostile),
            report.table([hostile], [[hostile]]),
            report.figure("", hostile),
            report.line_chart({hostile: [(0, 0)], "b": []}, title=hostile, x_label=hostile, y_label=hostile),
            report.image(Image.new("RGB", (1, 1)), '"><script>'),
        ],
    )
    assert "script" not in parsed(html).tags


def test_a_table_writes_three_decimals_whole_thousands_apart_and_missing_values_as_a_dash() -> None:
    html = report.table(["label", "AP"], [["cat", 0.12345], ["dog", math.nan], ["bird", None], ["", 19118]])
    assert "<td>19,118</td>" in html
    assert "<td>0.123</td>" in html
    assert html.count("<td>–</td>") == 2


def test_a_long_caption_wraps_where_a_width_is_given() -> None:
    assert 'style="width:150px"' in report.figure("", "a caption of many words", width=150)
    assert "style" not in report.figure("", "a caption of many words")


def test_higher_values_are_drawn_higher_and_later_ones_further_right() -> None:
    circles = chart([(1, 0.2), (2, 0.5), (3, 0.4)]).findall(".//circle")
    x = [float(circle.get("cx", "")) for circle in circles]
    y = [float(circle.get("cy", "")) for circle in circles]
    assert x == sorted(x)
    assert y[1] < y[2] < y[0]


def test_a_point_that_is_not_finite_is_left_out() -> None:
    assert len(chart([(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]).findall(".//circle")) == 2


def test_axes_are_labelled_with_round_numbers() -> None:
    texts = [element.text for element in chart([(0, 0.13), (10, 0.87)]).findall("text")]
    assert {"0.2", "0.4", "0.6", "0.8", "0", "2", "10"} <= set(texts)


def test_charts_of_nothing_and_of_one_point_are_drawn() -> None:
    assert chart([]).findall(".//circle") == []
    assert len(chart([(5, 5)]).findall(".//circle")) == 1
