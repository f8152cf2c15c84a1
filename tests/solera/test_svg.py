"""The two drawings: parseable, nothing outside the frame, no name over another, no box on an edge's way."""

import itertools
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest

from solera.drawing import shorten
from solera.results import format_bytes, format_value
from solera.svg import Node, Point, dominated, lineage_list, lineage_wide, scatter

Box = tuple[float, float, float, float]


def drawn(points: Sequence[Point], width: int = 920, *, lower: bool = True) -> ET.Element:
    text = scatter(
        dominated(points, lower_is_better=lower),
        width=width,
        height=430,
        x_title="bytes on disk",
        y_title="perplexity",
        lower_is_better=lower,
        format_x=format_bytes,
        format_y=lambda v: format_value(v, "perplexity"),
    )
    return ET.fromstring(text)


def names(svg: ET.Element) -> dict[str, Box]:
    boxes: dict[str, Box] = {}
    for text in svg.iter("text"):
        if text.get("class") == "halo":
            x, y, half = float(text.get("x", "")), float(text.get("y", "")), 0.29 * 12 * len(text.text or "")
            boxes[text.text or ""] = (x - half, y - 9, x + half, y + 2)
    return boxes


def touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_dominated_by_hand() -> None:
    points = [Point("small", 1, 5, None, None), Point("large", 4, 3, None, None), Point("waste", 4, 6, None, None)]
    assert [p.dominated for p in dominated(points, lower_is_better=True)] == [False, False, True]
    assert [p.dominated for p in dominated(points, lower_is_better=False)] == [False, True, False]
    twins = [Point("a", 1, 5, None, None), Point("b", 1, 5, None, None)]
    assert [p.dominated for p in dominated(twins, lower_is_better=True)] == [False, False]


def test_better_is_up_and_smaller_is_left() -> None:
    svg = drawn([Point("good small", 1e6, 3.0, 2.9, 3.1), Point("bad large", 9e6, 8.0, 7.5, 8.5)])
    circles = {c.find("title").text.split(":")[0]: c for c in svg.iter("circle")}  # type: ignore[union-attr]  # each has one
    good, bad = circles["good small"], circles["bad large"]
    assert float(good.get("cy", "")) < float(bad.get("cy", ""))
    assert float(good.get("cx", "")) < float(bad.get("cx", ""))
    assert bad.get("fill") == "#ffffff"
    assert good.get("fill") != "#ffffff"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_names_of_twelve_models_do_not_overlap(seed: int, spread: float) -> None:
    chance = random.Random(seed)
    points = []
    for i in range(12):
        value = 5 + spread * chance.random()
        points.append(
            Point(f"model-number-{i}", 4e6 * chance.choice((1, 1, 1, 2.9)), value, value * 0.99, value * 1.01)
        )
    found = names(drawn(points))
    assert len(found) == 12
    for (a, box_a), (b, box_b) in itertools.combinations(found.items(), 2):
        assert not touch(box_a, box_b), f"{a} over {b}"
    for name, box in found.items():
        assert box[0] >= 0, name
        assert box[2] <= 925, name
        assert 0 <= box[1] < 430, name


@pytest.mark.parametrize(
    "points",
    [
        [Point("one", 1e6, 5.0, None, None)],
        [Point("a", 1e6, 5.0, None, None), Point("b", 1e6, 5.0, None, None)],
        [Point("a", 1, 1e-9, None, None), Point("b", 1e15, 1e9, 1e8, 1e10)],
        [Point("a", 1e6, 0.0, -0.1, 0.1), Point("b", 2e6, -1.0, None, None)],
    ],
)
def test_odd_values_give_a_drawing(points: list[Point]) -> None:
    for width in (920, 350):
        svg = drawn(points, width)
        assert len(list(svg.iter("circle"))) == len(points)
        assert "nan" not in ET.tostring(svg).decode()


def test_shorten_keeps_both_ends() -> None:
    assert shorten("short", 10) == "short"
    assert shorten("a-very-long-name-v2", 12) == "a-very-…e-v2"
    assert len(shorten("x" * 99, 20)) == 20


STAGES = [
    Node("base", "init"),
    Node("code", "tune", ("base",), "12 s"),
    Node("prose", "tune", ("base",)),
    Node("moe", "moe", ("base", "code", "prose")),
    Node("student", "distill", ("moe", "base")),
    Node("verdict", "eval", ("base", "code", "prose", "moe", "student")),
]


@pytest.mark.parametrize("wide", [True, False])
def test_every_stage_and_every_edge_is_drawn(wide: bool) -> None:
    svg = ET.fromstring(lineage_wide(STAGES) if wide else lineage_list(STAGES, width=340))
    assert {t.text for t in svg.iter("text")} >= {"base", "code", "prose", "moe", "student", "verdict", "tune, 12 s"}
    edges = [p for p in svg.iter("path") if p.get("fill") == "none"]
    assert len(edges) == sum(len(n.inputs) for n in STAGES)
    _, _, width, height = map(float, (svg.get("viewBox") or "").split())
    for box in (r for r in svg.iter("rect") if r.get("fill") == "#ffffff"):
        assert 0 <= float(box.get("x", "")) <= float(box.get("x", "")) + float(box.get("width", "")) <= width
        assert 0 <= float(box.get("y", "")) <= float(box.get("y", "")) + float(box.get("height", "")) <= height


def test_stages_stand_right_of_what_they_read_and_apart() -> None:
    svg = ET.fromstring(lineage_wide(STAGES))
    boxes: dict[str, Box] = {}
    for group in svg.iter("g"):
        rect, text = group.find("rect"), group.find("text")
        assert rect is not None
        assert text is not None
        x, y, w, h = (float(rect.get(k, "")) for k in ("x", "y", "width", "height"))
        boxes[text.text or ""] = (x, y, x + w, y + h)
    for node in STAGES:
        assert all(boxes[source][2] < boxes[node.name][0] for source in node.inputs)
    assert not any(touch(a, b) for a, b in itertools.combinations(boxes.values(), 2))
    for path in (p for p in svg.iter("path") if p.get("fill") == "none"):
        for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path.get("d", "")):
            inside = [n for n, b in boxes.items() if b[0] + 1 < float(x) < b[2] - 1 and b[1] + 1 < float(y) < b[3] - 1]
            assert inside == [], f"an edge bends inside {inside}"


def test_names_are_escaped() -> None:
    hostile = '"><script>alert(1)</script>&'
    for text in (lineage_wide([Node(hostile, hostile)]), lineage_list([Node(hostile, "x")], width=340)):
        assert "<script>" not in text
        ET.fromstring(text)
    assert "<script>" not in ET.tostring(drawn([Point(hostile, 1, 1, None, None)])).decode()
