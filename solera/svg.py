"""Two drawings as inline SVG text: quality against size, and the lineage as a graph. They survive a greyscale print.

Coordinates are pixels of the drawing's own view box; text widths are estimated, for no font is at hand.
"""

import html
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from solera.drawing import GREY, INK, LINE, MUTED, drawing, element, label, shorten, text_width

__all__ = ["Node", "Point", "dominated", "lineage_list", "lineage_wide", "scatter"]

_ACCENT = "#1f5f8b"
_KIND_COLOURS = {
    "given": "#8a939b",
    "init": "#8a939b",
    "tune": "#2f7d4f",
    "merge": "#1f5f8b",
    "extract-lora": "#1f5f8b",
    "moe": "#7a3e9d",
    "moe-prune": "#7a3e9d",
    "moe-merge-experts": "#7a3e9d",
    "moe-extract-lora": "#a8437a",
    "route": "#a8437a",
    "distill": "#b4531a",
    "eval": "#4d5963",
    "publish": "#4d5963",
}


@dataclass(frozen=True)
class Point:
    """A model in the plane: `x` its size, `y` its quality with whiskers `low`..`high`."""

    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    kind: str = ""
    dominated: bool = False


@dataclass(frozen=True)
class Node:
    """A stage in the lineage; `inputs` are names of other nodes."""

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "_Box") -> float:
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(across, 0.0) * max(down, 0.0)

    def outside(self, frame: "_Box") -> float:
        return (
            max(frame.left - self.left, 0.0)
            + max(self.right - frame.right, 0.0)
            + max(frame.top - self.top, 0.0)
            + max(self.bottom - frame.bottom, 0.0)
        )


# quality against size ---------------------------------------------------------------------------------------------


def dominated(points: Sequence[Point], *, lower_is_better: bool) -> list[Point]:
    """The points with `dominated` set where another is no larger and no worse, and better in one of the two."""

    def beats(a: Point, b: Point) -> bool:
        no_worse = a.y <= b.y if lower_is_better else a.y >= b.y
        return a.x <= b.x and no_worse and (a.x < b.x or a.y != b.y)

    return [replace(p, dominated=any(beats(other, p) for other in points)) for p in points]


def scatter(
    points: Sequence[Point],
    *,
    width: int,
    height: int,
    x_title: str,
    y_title: str,
    lower_is_better: bool,
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
    css_class: str = "",
) -> str:
    """Points with whiskers and labels; better is up, smaller is left; dominated points are grey.

    Args:
        points: with `dominated` already set (see the function of that name).
        width: of the drawing.
        height: of the drawing.
        x_title: of the horizontal axis.
        y_title: of the vertical axis.
        lower_is_better: turns the vertical axis over.
        format_x: tick and tooltip texts of sizes.
        format_y: the same of qualities.
        css_class: class of the svg element.
    """
    frame = _Box(58, 34, width - 14, height - 46)
    across = _Scale.over([p.x for p in points], frame.left + 26, frame.right - 26)
    heights = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    down = _Scale.over(
        heights,
        *((frame.top + 16, frame.bottom - 16) if lower_is_better else (frame.bottom - 16, frame.top + 16)),
        share=not lower_is_better,
    )
    parts = [label(4, 16, f"{y_title} (up is better)", fill=MUTED)]
    for value in down.ticks(5):
        y = down.at(value)
        parts.append(element("line", x1=frame.left, x2=frame.right, y1=y, y2=y, stroke=LINE))
        parts.append(label(frame.left - 6, y + 4, _tick_text(format_y(value)), size=11, anchor="end", fill=MUTED))
    tick_right = -math.inf
    for value in across.ticks(max(3, width // 130)):
        x, text = across.at(value), _tick_text(format_x(value))
        if x - text_width(text, 11) / 2 < tick_right + 8:
            continue
        tick_right = x + text_width(text, 11) / 2
        parts.append(element("line", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 5, stroke=GREY))
        parts.append(label(x, frame.bottom + 18, text, size=11, anchor="middle", fill=MUTED))
    parts.append(element("line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, stroke=GREY))
    parts.append(label(frame.right, height - 6, f"{x_title} (left is smaller)", anchor="end", fill=MUTED))

    places = {p.name: (across.at(p.x), down.at(p.y)) for p in points}
    obstacles = [_Box(x - 6, y - 6, x + 6, y + 6) for x, y in places.values()]
    front = sorted((p for p in points if not p.dominated), key=lambda p: p.x)
    if len(front) > 1:
        for p, following in itertools.pairwise(front):
            (x, y), (next_x, next_y) = places[p.name], places[following.name]
            obstacles += [_Box(x, y - 1, next_x, y + 1), _Box(next_x - 1, min(y, next_y), next_x + 1, max(y, next_y))]
        steps = f"M{across.at(front[0].x):.1f},{down.at(front[0].y):.1f}" + "".join(
            f"H{across.at(p.x):.1f}V{down.at(p.y):.1f}" for p in front[1:]
        )
        parts.append(
            element(
                "path", d=steps, fill="none", stroke=_ACCENT, stroke_width="1.5", stroke_dasharray="4 4", opacity="0.6"
            )
        )
    for p in sorted(points, key=lambda p: not p.dominated):  # the front is drawn last, on top
        x, y = places[p.name]
        colour = GREY if p.dominated else _ACCENT
        if p.low is not None and p.high is not None:
            ends = sorted((down.at(p.low), down.at(p.high)))
            parts += [element("line", x1=x, x2=x, y1=ends[0], y2=ends[1], stroke=colour, stroke_width="1.5")]
            parts += [
                element("line", x1=x - 4, x2=x + 4, y1=end, y2=end, stroke=colour, stroke_width="1.5") for end in ends
            ]
            obstacles.append(_Box(x - 3, ends[0], x + 3, ends[1]))
        interval = "" if p.low is None or p.high is None else f" ({format_y(p.low)} to {format_y(p.high)})"
        tip = element("title", html.escape(f"{p.name}: {format_y(p.y)}{interval} at {format_x(p.x)}"))
        parts.append(
            element(
                "circle",
                tip,
                cx=x,
                cy=y,
                r="5",
                fill="#ffffff" if p.dominated else colour,
                stroke=colour,
                stroke_width="2",
            )
        )
    parts += _place_labels(points, places, obstacles, frame, limit=30 if width > 600 else 20)
    return drawing(width, height, f"{y_title} against {x_title}", parts, css_class=css_class)


def _tick_text(text: str) -> str:
    """`7.000` -> `7`, `0.250` -> `0.25`, `30.0%` -> `30%`."""
    return re.sub(r"(\.\d*?)0+(?=\D*$)", r"\1", text).replace(".%", "%").rstrip(".").replace(". ", " ")


_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))


def _place_labels(
    points: Sequence[Point],
    places: Mapping[str, tuple[float, float]],
    obstacles: Sequence[_Box],
    frame: _Box,
    limit: int,
) -> list[str]:
    """Every name beside its point: the nearest of many places that covers no point, whisker or other name."""
    size, parts = 12.0, list[str]()
    taken = list(obstacles)
    room = _Box(frame.left, frame.top - 12, frame.right + 10, frame.bottom)
    for p in sorted(points, key=lambda p: p.dominated):
        x, y = places[p.name]
        text = shorten(p.name, limit)
        width = text_width(text, size) * (1.0 if p.dominated else 1.08)  # bold is wider
        best: tuple[float, _Box] | None = None
        for reach in (12, 18, 28, 40, 54, 70, 90, 112, 138, 168, 200):
            for dx, dy in _DIRECTIONS:
                middle_x = x + dx * (reach + width / 2) * (0.75 if dy else 1.0)
                middle_y = y + dy * (reach + 4)
                box = _Box(middle_x - width / 2, middle_y - 8, middle_x + width / 2, middle_y + 8)
                cost = (
                    4 * sum(box.overlap(other) for other in taken) + 400 * box.outside(room) + reach + (4 if dy else 0)
                )
                if best is None or cost < best[0]:
                    best = (cost, box)
        assert best is not None
        box = best[1]
        taken.append(box)
        end_x = min(max(x, box.left), box.right)
        end_y = min(max(y, box.top + 3), box.bottom - 3)
        if math.hypot(end_x - x, end_y - y) > 18:
            parts.append(element("line", x1=x, y1=y, x2=end_x, y2=end_y, stroke=GREY, stroke_width="0.8"))
        fill = MUTED if p.dominated else INK
        middle = (box.left + box.right) / 2
        parts.append(
            label(
                middle,
                (box.top + box.bottom) / 2 + 4,
                text,
                size=size,
                anchor="middle",
                fill=fill,
                bold=not p.dominated,
                halo=True,
            )
        )
    return parts


@dataclass(frozen=True)
class _Scale:
    """Data to pixels; logarithmic where the data span more than a factor of four and are no shares of a whole."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, share: bool = False) -> "_Scale":
        low, high = min(values), max(values)
        logarithmic = not share and low > 0 and high / low > 4
        if low == high:
            spread = abs(low) * 0.1 or 1.0
            low, high = low - spread, high + spread
        return cls(low, high, start, end, logarithmic)

    def at(self, value: float) -> float:
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in (range(1, 10), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
                if len(found) <= wanted:
                    break
            if len(found) >= 2:
                return found
            return [self.low, self.high]
        raw = (self.high - self.low) / wanted
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


# lineage ----------------------------------------------------------------------------------------------------------

_NODE_HEIGHT = 42.0


def lineage_wide(nodes: Sequence[Node], *, css_class: str = "") -> str:
    """The graph in layers from left to right: every stage right of all it reads, long edges led around the boxes."""
    layers = _layers(nodes)
    depth = {name: i for i, layer in enumerate(layers) for name in layer}
    known = {node.name: node for node in nodes}
    # An edge over more than one layer passes through a stand-in in each layer it crosses, so no box lies on it;
    # all edges from one source share their stand-ins, so they run as one line until they part.
    chains: list[list[str]] = []
    for node in nodes:
        for source in node.inputs:
            crossed = range(depth[source] + 1, depth[node.name])
            chain = [source, *(f"\0{source}\0{layer}" for layer in crossed), node.name]
            for layer, stand_in in zip(crossed, chain[1:-1], strict=True):
                if stand_in not in layers[layer]:
                    layers[layer].append(stand_in)
            chains.append(chain)
    edges = list(dict.fromkeys(step for chain in chains for step in itertools.pairwise(chain)))
    _order(layers, edges)
    middles = _heights(layers, edges, known)
    widths = [max((_node_width(known[n]) for n in layer if n in known), default=0.0) for layer in layers]
    lefts = [10.0]
    for width in widths:
        lefts.append(lefts[-1] + width + 64)
    total_width = lefts[-1] - 64 + 10
    top = min(m - _NODE_HEIGHT / 2 for n, m in middles.items())
    bottom = max(m + _NODE_HEIGHT / 2 for n, m in middles.items())
    layer_of = {name: i for i, layer in enumerate(layers) for name in layer}
    parts = [_edge(chain, known, layer_of, lefts, widths, middles, top) for chain in chains]
    for name, node in known.items():
        parts.append(_node(node, lefts[layer_of[name]], middles[name] - top + 8 - _NODE_HEIGHT / 2, _node_width(node)))
    return drawing(total_width, bottom - top + 16, "lineage of the stages", parts, css_class=css_class)


def lineage_list(nodes: Sequence[Node], *, width: int, css_class: str = "") -> str:
    """The graph for narrow pages: one stage a row in order, arcs on the left from what it reads."""
    ordered = [name for layer in _layers(nodes) for name in layer]
    row = {name: i for i, name in enumerate(ordered)}
    known = {node.name: node for node in nodes}
    gutter, step = 96.0, _NODE_HEIGHT + 16
    parts: list[str] = []
    longest = max((row[n.name] - row[s] for n in nodes for s in n.inputs), default=1)
    for node in nodes:
        for source in node.inputs:
            start = 8 + row[source] * step + _NODE_HEIGHT / 2 + 5
            end = 8 + row[node.name] * step + _NODE_HEIGHT / 2 - 5
            reach = gutter - 12 - (gutter - 26) * (row[node.name] - row[source]) / longest
            bend = gutter - (gutter - reach) * 4 / 3
            parts.append(
                element(
                    "path",
                    d=f"M{gutter},{start:.1f}C{bend:.1f},{start:.1f} {bend:.1f},{end:.1f} {gutter - 5},{end:.1f}",
                    fill="none",
                    stroke=GREY,
                    stroke_width="1.2",
                )
            )
            parts.append(_arrow_head(gutter, end))
    parts += [_node(known[name], gutter, 8 + row[name] * step, width - gutter - 8, name_length=28) for name in ordered]
    return drawing(width, 16 + len(ordered) * step - 16, "lineage of the stages", parts, css_class=css_class)


def _node_width(node: Node) -> float:
    return max(text_width(shorten(node.name, 26), 13), text_width(shorten(_second_line(node), 34), 11)) + 26


def _second_line(node: Node) -> str:
    return f"{node.kind}, {node.detail}" if node.detail else node.kind


def _node(node: Node, left: float, top: float, width: float, *, name_length: int = 26) -> str:
    colour = _KIND_COLOURS.get(node.kind, MUTED)
    tip = element("title", html.escape(f"{node.name}: {_second_line(node)}"))
    return element(
        "g",
        tip
        + element("rect", x=left, y=top, width=width, height=_NODE_HEIGHT, rx="4", fill="#ffffff", stroke=LINE)
        + element("rect", x=left, y=top, width="5", height=_NODE_HEIGHT, rx="2", fill=colour)
        + label(left + 14, top + 18, shorten(node.name, name_length), size=13, bold=True)
        + label(left + 14, top + 33, shorten(_second_line(node), 34), size=11, fill=MUTED),
    )


def _edge(
    chain: Sequence[str],
    known: Mapping[str, Node],
    layer_of: Mapping[str, int],
    lefts: Sequence[float],
    widths: Sequence[float],
    middles: Mapping[str, float],
    top: float,
) -> str:
    source = chain[0]
    x = lefts[layer_of[source]] + _node_width(known[source])
    y = middles[source] - top + 8
    path = f"M{x:.1f},{y:.1f}"
    for name in chain[1:]:
        last = name == chain[-1]
        next_x, next_y = lefts[layer_of[name]] - (5 if last else 0), middles[name] - top + 8
        edge_of_layer = lefts[layer_of[name] - 1] + widths[layer_of[name] - 1]
        if x < edge_of_layer:  # a box narrower than its column: go straight to the column's end first
            path += f"H{edge_of_layer:.1f}"
            x = edge_of_layer
        half = (x + next_x) / 2
        path += f"C{half:.1f},{y:.1f} {half:.1f},{next_y:.1f} {next_x:.1f},{next_y:.1f}"
        x, y = next_x, next_y
    line = element("path", d=path, fill="none", stroke=GREY, stroke_width="1.2")
    return line + _arrow_head(x + 5, y)


def _arrow_head(x: float, y: float) -> str:
    return element("path", d=f"M{x:.1f},{y:.1f}l-7,-3.5v7z", fill=GREY)


def _layers(nodes: Sequence[Node]) -> list[list[str]]:
    """Names by longest distance from a source. Inputs that no node bears, and circles, are the caller's mistake."""
    known = {node.name: node for node in nodes}
    depth: dict[str, int] = {}

    def visit(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((visit(source) for source in known[name].inputs), default=-1)
        return depth[name]

    for node in nodes:
        visit(node.name)
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for node in nodes:
        layers[depth[node.name]].append(node.name)
    return layers


def _order(layers: list[list[str]], edges: Sequence[tuple[str, str]]) -> None:
    """Fewer crossings: sort each layer by the mean place of its neighbours, forward and backward, a few times."""
    before: dict[str, list[str]] = {}
    after: dict[str, list[str]] = {}
    for a, b in edges:
        before.setdefault(b, []).append(a)
        after.setdefault(a, []).append(b)
    for sweep in range(6):
        neighbours = before if sweep % 2 == 0 else after
        ordered = layers if sweep % 2 == 0 else layers[::-1]
        place = {name: i / max(len(layer) - 1, 1) for layer in layers for i, name in enumerate(layer)}
        for layer in ordered:

            def centre(
                name: str, neighbours: Mapping[str, list[str]] = neighbours, place: dict[str, float] = place
            ) -> float:
                near = neighbours.get(name, [])
                return sum(place[n] for n in near) / len(near) if near else place[name]

            layer.sort(key=centre)
            place.update({name: i / max(len(layer) - 1, 1) for i, name in enumerate(layer)})


def _heights(
    layers: Sequence[Sequence[str]], edges: Sequence[tuple[str, str]], known: Mapping[str, Node]
) -> dict[str, float]:
    """Vertical middle of every item: near its neighbours, in the layer's order, never overlapping."""
    neighbours: dict[str, list[str]] = {}
    for a, b in edges:
        neighbours.setdefault(a, []).append(b)
        neighbours.setdefault(b, []).append(a)

    def gap(upper: str, lower: str) -> float:
        half = [_NODE_HEIGHT / 2 if n in known else 5.0 for n in (upper, lower)]
        return half[0] + half[1] + 14

    middles: dict[str, float] = {}
    for layer in layers:
        at = 0.0
        for i, name in enumerate(layer):
            at += gap(layer[i - 1], name) if i else 0.0
            middles[name] = at
        for name in layer:
            middles[name] -= at / 2
    for _ in range(12):
        for layer in layers:
            wanted = [
                sum(middles[n] for n in neighbours[name]) / len(neighbours[name])
                if neighbours.get(name)
                else middles[name]
                for name in layer
            ]
            placed: list[float] = []
            for i, (name, want) in enumerate(zip(layer, wanted, strict=True)):
                placed.append(max(want, placed[-1] + gap(layer[i - 1], name)) if placed else want)
            shift = sum(w - p for w, p in zip(wanted, placed, strict=True)) / len(layer)
            middles.update({name: p + shift for name, p in zip(layer, placed, strict=True)})
    return middles
