"""Two drawings of a MoE's report: where the loss of every domain comes from, and which experts its tokens visit.

The tables beside them hold the same numbers, and every mark has a tooltip.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from solera.drawing import GREY, INK, LINE, MUTED, drawing, element, label, shorten, text_width
from solera.heatmap import ramp_colour

__all__ = ["Losses", "loss_rails", "share_maps"]

_At = Callable[[float], float]  # from nats a token to pixels

_RECOVERED, _ROUTER, _TRUNK = "#9cc9b4", "#7a3e9d", "#d9822b"


@dataclass(frozen=True)
class Losses:
    """Of one domain, in nats a token; None: not measured."""

    name: str
    base: float | None
    moe: float
    oracle: float
    specialist: float | None
    average: float | None
    model_router: float | None


def loss_rails(rows: Sequence[Losses], *, width: int, css_class: str = "") -> str:
    """A line for every domain from the specialist's loss to the base's, cut where the MoE and its oracle stand."""
    known = [v for row in rows for v in (row.base, row.moe, row.oracle, row.specialist, row.average, row.model_router)]
    values = [v for v in known if v is not None]
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    beside = width > 600
    left, right = (16.0 + min(max(text_width(r.name, 13) for r in rows) + 14, 190.0) if beside else 14.0), width - 18.0

    def at(value: float) -> float:
        return left + (value - low) / spread * (right - left)

    parts, y = _legend(rows, width)
    step = 40.0 if beside else 54.0
    for row in rows:
        middle = y + (14.0 if beside else 32.0)
        name = shorten(row.name, 24 if beside else 40)
        parts.append(label(14, middle + 4 if beside else y + 14, name, size=13, bold=True))
        parts += _rail(row, middle, at)
        y += step
    parts += _axis(low, high, y + 2, at)
    text = "; ".join(_said(row) for row in rows)
    title = f"held-out loss by domain, nats a token. {text}"
    return drawing(width, y + 42, title, parts, css_class=css_class)


def _legend(rows: Sequence[Losses], width: int) -> tuple[list[str], float]:
    """What the colours and marks mean; only those that occur."""
    items: list[tuple[str, str]] = []
    names: list[str] = []
    if any(row.base is not None for row in rows):
        items.append(("bar", _RECOVERED))
        names.append("won over the base")
    items.append(("bar", _ROUTER))
    names.append("router loss")
    if any(row.specialist is not None for row in rows):
        items.append(("bar", _TRUNK))
        names.append("trunk loss")
    items.append(("moe", INK))
    names.append("this MoE")
    if any(row.average is not None for row in rows):
        items.append(("average", INK))
        names.append("average merge")
    if any(row.model_router is not None for row in rows):
        items.append(("router", INK))
        names.append("router over whole models")
    parts: list[str] = []
    x, y = 14.0, 8.0
    for (kind, colour), name in zip(items, names, strict=True):
        taken = 22 + text_width(name, 12) + 16
        if x > 14 and x + taken > width:
            x, y = 14.0, y + 20
        if kind == "bar":
            parts.append(element("rect", x=x, y=y, width=14.0, height=12.0, fill=colour))
        else:
            parts.append(_mark(kind, x + 7, y + 6, ""))
        parts.append(label(x + 20, y + 10, name, size=12, fill=MUTED))
        x += taken
    return parts, y + 28


def _rail(row: Losses, y: float, at: _At) -> list[str]:
    """The line of one domain: its parts, then its marks."""
    marks = [("average", row.average, "average merge"), ("router", row.model_router, "router over whole models")]
    shown = [(kind, value, name) for kind, value, name in (*marks, ("moe", row.moe, "this MoE")) if value is not None]
    spans = [(row.oracle, row.moe, _ROUTER, "router loss")]
    if row.base is not None:
        spans.insert(0, (row.moe, row.base, _RECOVERED, "won over the base"))
    if row.specialist is not None:
        spans.append((row.specialist, row.oracle, _TRUNK, "trunk loss"))
    taken = [at(value) for _, value, _ in shown]
    parts = [_span(at(low), at(high), y, fill, high - low, name, taken) for low, high, fill, name in spans]
    return parts + [_mark(kind, at(value), y, f"{name} {value:.3f}") for kind, value, name in shown]


def _span(start: float, end: float, y: float, fill: str, size: float, name: str, marks: Sequence[float]) -> str:
    """One part of a line, with its size where no mark is in the way; a negative one (it is won, not lost) is thin."""
    height = 16.0 if size >= 0 else 5.0
    tip = element("title", html.escape(f"{name}: {size:.3f}"))
    left, width = min(start, end), max(abs(end - start), 0.5)
    bar = element("rect", tip, x=left, y=y - height / 2, width=width, height=height, fill=fill)
    text, middle = f"{size:.2f}", left + width / 2
    half = text_width(text, 11) / 2 + 2
    if size < 0 or 2 * half > width or any(abs(mark - middle) < half + 8 for mark in marks):
        return bar
    ink = "#ffffff" if fill == _ROUTER else INK
    number = label(middle, y + 4, text, size=11, anchor="middle", fill=ink)
    return bar + number.replace("<text", '<text pointer-events="none"', 1)


def _mark(kind: str, x: float, y: float, tip: str) -> str:
    title = element("title", html.escape(tip)) if tip else ""
    if kind == "moe":
        return element("circle", title, cx=x, cy=y, r="6", fill=INK, stroke="#ffffff", stroke_width="1.5")
    shape = {
        "average": f"M{x:.1f},{y - 7:.1f}l6,7l-6,7l-6,-7z",
        "router": f"M{x:.1f},{y + 7:.1f}l-6.5,-12h13z",
    }[kind]
    return element("path", title, d=shape, fill="#ffffff", stroke=INK, stroke_width="1.6")


def _axis(low: float, high: float, y: float, at: _At) -> list[str]:
    parts = [element("line", x1=at(low), y1=y, x2=at(high), y2=y, stroke=LINE)]
    for i in range(5):
        value = low + (high - low) * i / 4
        anchor = "start" if i == 0 else "end" if i == 4 else "middle"
        parts.append(element("line", x1=at(value), y1=y, x2=at(value), y2=y + 4, stroke=GREY))
        parts.append(label(at(value), y + 17, f"{value:.2f}", size=11, anchor=anchor, fill=MUTED))
    parts.append(label(at(low), y + 33, "nats a token on held-out text; left is better", size=11, fill=MUTED))
    return parts


def _said(row: Losses) -> str:
    own = "" if row.specialist is None else f", specialist {row.specialist:.3f}"
    base = "" if row.base is None else f"base {row.base:.3f}, "
    return f"{row.name}: {base}this MoE {row.moe:.3f}, oracle-routed {row.oracle:.3f}{own}"


def share_maps(
    shares: Mapping[str, Sequence[Sequence[float]]], experts: Sequence[str], *, width: int, css_class: str = ""
) -> str:
    """One grid a domain: a row a layer, a column an expert, the darker the more of the weight; the own is framed.

    Args:
        shares: domain -> (L, E).
        experts: names of the columns.
        width: room there is.
        css_class: of the svg element.
    """
    layers = len(next(iter(shares.values())))
    margin = 34.0
    most = 58.0 if len(experts) <= 4 else 40.0
    cell = min((width - 16 - margin - 22) / len(experts), most)
    longest = max(text_width(name, 11) for name in experts)
    slanted = longest > cell - 4
    overhang = 22.0
    if slanted:  # labels rise to the right, the last one beyond its column
        overhang = max(0.77 * min(text_width(experts[-1], 11), 120.0) - cell / 2 + 6, 22.0)
        cell = max(min((width - 16 - margin - overhang) / len(experts), most), 12.0)
    height = 20.0 if layers <= 16 else 13.0 if layers <= 40 else 9.0
    head = 24 + (min(longest, 120.0) * 0.64 + 14 if slanted else 18)
    panel_width = margin + cell * len(experts) + overhang
    panel_height = head + height * layers + 22
    across = max(int((width - 8) // panel_width), 1)
    parts: list[str] = []
    for i, (domain, of) in enumerate(shares.items()):
        x, y = 8 + panel_width * (i % across), 6 + panel_height * (i // across)
        parts += _map(domain, of, experts, x + margin, y, cell, height, head, slanted=slanted)
    rows = -(-len(shares) // across)
    y = 6 + panel_height * rows
    for step in range(40):
        fill, _ = ramp_colour((step + 0.5) / 40)
        parts.append(element("rect", x=14 + step * 4.0, y=y, width=4.6, height=10.0, fill=fill))
    parts.append(label(14, y + 24, "0", size=11, fill=MUTED))
    parts.append(label(174, y + 24, "100 % of the weight", size=11, fill=MUTED, anchor="middle"))
    said = "; ".join(
        f"{domain}: "
        + ", ".join(f"{name} {100 * sum(row[e] for row in of) / layers:.0f} %" for e, name in enumerate(experts))
        for domain, of in shares.items()
    )
    used = min(across, len(shares)) * panel_width + 16
    title = f"share of the experts by domain and layer; mean over the layers: {said}"
    return drawing(max(used, 250.0), y + 32, title, parts, css_class=css_class)


def _map(
    domain: str,
    of: Sequence[Sequence[float]],
    experts: Sequence[str],
    x: float,
    y: float,
    cell: float,
    height: float,
    head: float,
    *,
    slanted: bool,
) -> list[str]:
    parts = [label(x, y + 14, f"text of {shorten(domain, 22)}", size=13, bold=True)]
    top = y + head
    for e, name in enumerate(experts):
        middle = x + cell * (e + 0.5)
        if slanted:
            text = html.escape(shorten(name, 18))
            turn = f"rotate(-40 {middle:.1f} {top - 6:.1f})"
            parts.append(element("text", text, x=middle, y=top - 6, font_size="11", fill=MUTED, transform=turn))
        else:
            parts.append(label(middle, top - 6, name, size=11, anchor="middle", fill=MUTED))
    numbers = height >= 16 and cell >= 26
    every = max(-(-len(of) * 12 // int(height * len(of))), 1)
    for layer, row in enumerate(of):
        at = top + height * layer
        if layer % every == 0:
            parts.append(label(x - 6, at + height / 2 + 4, str(layer), size=10.5, anchor="end", fill=MUTED))
        for e, share in enumerate(row):
            fill, ink = ramp_colour(share)
            tip = element("title", html.escape(f"{domain}, layer {layer}: {share:.1%} to {experts[e]}"))
            left = x + cell * e
            parts.append(element("rect", tip, x=left + 0.5, y=at + 0.5, width=cell - 1, height=height - 1, fill=fill))
            if numbers:
                text = label(left + cell / 2, at + height / 2 + 4, f"{100 * share:.0f}", size=11, anchor="middle")
                parts.append(text.replace("<text", '<text pointer-events="none"', 1).replace(INK, ink))
    if domain in experts:
        left = x + cell * list(experts).index(domain)
        size = height * len(of)
        parts.append(
            element("rect", x=left, y=top, width=cell, height=size, fill="none", stroke=INK, stroke_width="1.6")
        )
    return parts
