"""What pages are made of: charts, tables and colours."""

import re
from xml.etree import ElementTree

import pytest

from nmt.pages.charts import bars, heat_map, interval, profiles
from nmt.pages.document import document
from nmt.pages.style import CHARTS, COLOURS, style_sheet
from nmt.pages.tables import html_table, markdown_table

SERIES = {"load": [0.1, 0.6, 0.3], "importance": [0.5, 0.2, 0.3]}


def drawn(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{chart}</div>")


def test_bars_of_a_member_are_side_by_side_over_its_number() -> None:
    root = drawn(bars(SERIES, "expert", "shares"))
    boxes = [(each.get("class"), float(each.get("x")), float(each.get("width"))) for each in root.iter("rect")]
    assert [kind for kind, _, _ in boxes] == ["load", "importance"] * 3
    numbers = [float(each.get("x")) for each in root.iter("text") if each.get("text-anchor") == "middle"]
    for place, number in enumerate(numbers):
        (_, left, width), (_, right, _) = boxes[2 * place : 2 * place + 2]
        assert left + width <= right
        assert left < number <= right < number + width
    titles = [each.text for each in root.iter("title")]
    assert titles[:2] == ["expert 0: load 10%", "expert 0: importance 50%"]


def test_the_profile_of_a_series_falls() -> None:
    root = drawn(profiles(SERIES, "shares"))
    for line in root.iter("polyline"):
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert points == sorted(points)
        heights = [y for _, y in points]
        assert heights == sorted(heights)  # y counts downwards
        assert len(points) == 3


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ((0.0, 0.0, 0.0, 0.0), (58.0, 58.0, 58.0)),
        ((1.0, -1.0, 2.0, 2.0), (87.0, 29.0, 116.0)),
        ((-2.0, -9.0, 9.0, 2.0), (0.0, 0.0, 116.0)),
    ],
)
def test_an_interval_has_zero_in_its_middle(
    figures: tuple[float, float, float, float], expected: tuple[float, float, float]
) -> None:
    root = drawn(interval(*figures, "gain"))
    (dot,) = root.iter("circle")
    line = next(path for path in root.iter("path") if path.get("class") == "gain")
    low, high = re.findall(r"M([\d.]+) 7H([\d.]+)", line.get("d"))[0]
    assert (float(dot.get("cx")), float(low), float(high)) == expected
    assert root.find("svg").get("aria-label") == f"{figures[0]:+.2f}"


def test_a_chart_of_nothing_is_drawn() -> None:
    for chart in (
        bars({"load": [0.0, 0.0]}, "expert", ""),
        profiles({"load": [0.0]}, ""),
        heat_map("a", "b", [[0]], ""),
    ):
        assert drawn(chart).find("svg") is not None


def test_a_page_is_light_or_dark_as_the_system_is() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", style_sheet(CHARTS), flags=re.DOTALL)
    found = [dict(re.findall(r"--(\w+):([^;]+)", block)) for block in (light, dark)]
    assert found[0].keys() == found[1].keys() >= {"page", "ink", "load"}
    for mode, colours in enumerate(found):
        assert all(value.strip() == COLOURS[name][mode] for name, value in colours.items())


def test_any_text_can_be_a_title() -> None:
    root = ElementTree.fromstring(document("<b> & \0\x1b", "<p>body</p>").removeprefix("<!DOCTYPE html>\n"))
    assert root.findtext(".//title") == "<b> & \ufffd\ufffd"


@pytest.mark.parametrize(
    ("cell", "right"), [("12", True), ("×4.1", True), ("0.5 bits", True), ("12.3%", True), ("-", True), ("news", False)]
)
def test_numbers_are_on_the_right_of_a_column(cell: str, right: bool) -> None:
    root = ElementTree.fromstring(
        html_table(["name", "figure"], [["a", cell], ["b", "other"]]).replace("class=n", "class='n'")
    )
    assert [each.get("class") for each in root.iter("th")] == [None, "n" if right else None]
    assert [each.get("class") for each in root.iter("td")] == [None, "n" if right else None] * 2


def test_a_cell_of_markdown_does_not_end_early() -> None:
    assert list(markdown_table(("a", "b"), [("x|y", r"\|")])) == ["| a | b |", "|---|---|", r"| x\|y | \| |"]
