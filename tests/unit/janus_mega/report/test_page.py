"""Pages are whole: escaped, without addresses, with the numbers that were given."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from janus_mega.report.charts import Series, line_chart, round_step
from janus_mega.report.page import EMPTY, Cell, Page, note, show_number, table
from janus_mega.report.pictures import answered, as_rgb, image, png_bytes, sheet
from janus_mega.report.tables import heat_table, seconds_table


def test_text_is_escaped_and_the_page_asks_nobody(tmp_path):
    page = Page("A & B", "<script>")
    page.add("Part", note("1 < 2"), table(("x",), [("<b>",), (Cell(0.25, "met"),)]))
    page.add("Picture", image(np.zeros((4, 4, 3), np.uint8), 2, "black"))
    page.write(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "A &amp; B" in html and "&lt;script&gt;" in html and "1 &lt; 2" in html and "<b>" not in html
    assert not re.search(r"(src|href)\s*=\s*\"(?!data:)", html)
    assert "<script" not in html


@pytest.mark.parametrize(
    ("value", "shown"), [(0.97, "0.97"), (1.23e-6, "1.2e-06"), (True, "yes"), (12, "12"), (0.0, "0"), ("x", "x")]
)
def test_numbers_are_shown_short(value, shown):
    assert show_number(value) == shown


def test_a_chart_is_svg_with_one_line_a_series():
    points = [(float(x), 5.0 / (x + 1)) for x in range(50)]
    chart = line_chart("loss", [Series("a", points), Series("b", points[:1]), Series("none", [(1, float("nan"))])])
    svg = ElementTree.fromstring(chart.html)
    assert len(svg.findall("{*}polyline")) == 2
    assert len(svg.findall("{*}circle")) == 1
    names = [element.text for element in svg.findall("{*}text")]
    assert "a" in names and "none" not in names


def test_a_chart_without_points_is_nothing_and_a_flat_one_stands():
    assert line_chart("x", [Series("a", [])]) is EMPTY
    ElementTree.fromstring(line_chart("flat", [Series("a", [(0, 0.0), (1, 0.0)])]).html)


def test_round_steps():
    assert [round_step(rough) for rough in (0.7, 1.0, 1.3, 4.2, 70.0)] == [1, 1, 2, 5, 100]


def test_sheets_hold_every_picture_in_order():
    stack = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    canvas = sheet(stack, columns=2, gap=1)
    assert canvas.shape == (14, 9, 3)
    assert canvas[0, 0, 0] == 0 and canvas[0, 5, 0] == 1 and canvas[5, 0, 0] == 2 and canvas[10, 0, 0] == 4
    assert canvas[13, 8, 0] == 255
    colour = np.zeros((1, 3, 4, 4), np.uint8)
    colour[0, 2] = 9
    assert as_rgb(colour)[0, 0, 0].tolist() == [0, 0, 9]
    assert png_bytes(canvas).startswith(b"\x89PNG")


def test_wrong_answers_stand_out():
    pictures = np.zeros((2, 4, 4), np.uint8)
    assert "wrong" in answered(pictures, "three", is_right=False).html
    assert "wrong" not in answered(pictures, "three", is_right=True).html


def test_heat_table_keeps_counts_and_leaves_zeros_blank():
    html = heat_table(np.array([[3, 0], [1, 2]]), ["a", "b"], ["a", "b"], "who").html
    assert re.findall(r">(\d*)</td>", html) == ["3", "", "1", "2"]


def test_seconds_are_summed():
    assert "3.5" in seconds_table({"one": 1.5, "two": 2.0}).html
