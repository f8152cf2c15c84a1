"""A heat map of figures by layer and kind of tensor, as SVG: one panel a model, on one colour scale.

Layers run from top to bottom, kinds from left to right; what lies outside the layers has cells of its own below. The
colours go from light to dark, so they survive colour blindness and a greyscale print; where there is room the number
stands in the cell, and everywhere in its tooltip.
"""

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from solera.drawing import INK, LINE, MUTED, element, label, shorten, text_width
from solera_core.places import Place

__all__ = ["Panel", "heat_map", "heat_map_page", "ramp_colour"]

_RAMP = ("#f4f7ec", "#cfe6d3", "#93cac9", "#4fa3c0", "#2c74a8", "#234c88", "#1b2a5c")
_FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
_LOGARITHMIC = 30.0  # largest over smallest value from which on the colours follow the logarithm
_STEEP = 0.64  # sine of the angle (40 degrees) at which column labels rise

# The order of the columns: attention, feed-forward, norms, the rest by name.
_ORDER = (
    r"(^|[._])(q|query|q_a|q_b|qkv|in_proj|query_key_value|c_attn)(_|$|\.)",
    r"(^|[._])(k|key|kv|kv_a|kv_b)(_|$|\.)",
    r"(^|[._])(v|value)(_|$|\.)",
    r"(attn|attention).*(^|[._])(o|out|output|dense|c_proj)(_|$|\.)",
    r"attn|attention",
    r"gate|router",
    r"(^|[._])(up|fc1|c_fc|w3|wi)",
    r"(^|[._])(down|fc2|w2|wo)",
    r"mlp|feed_forward|experts",
)


@dataclass(frozen=True)
class Panel:
    """One grid.

    Attributes:
        title: over it; may be empty.
        values: by place; None or absent: there is nothing to show.
    """

    title: str
    values: Mapping[Place, float | None]
    layers: list[tuple[str, list[int], list[str]]] = field(init=False)
    outside: list[str] = field(init=False)

    def __post_init__(self) -> None:
        found: dict[str, tuple[set[int], dict[str, None]]] = {}
        outside: list[str] = []
        for place in self.values:
            if place.layer is None:
                outside.append(place.kind)
            else:
                numbers, kinds = found.setdefault(place.stack, (set(), {}))
                numbers.add(place.layer)
                kinds[place.kind] = None
        stacks = [(stack, sorted(numbers), sorted(kinds, key=_rank)) for stack, (numbers, kinds) in found.items()]
        object.__setattr__(self, "layers", stacks)
        object.__setattr__(self, "outside", outside)


def heat_map(
    panels: Sequence[Panel],
    *,
    title: str,
    subtitle: str,
    measure: str,
    format_value: Callable[[float], str],
    width: int = 1180,
    css_class: str = "",
) -> str:
    """The drawing as one svg element, at most `width` pixels wide.

    Args:
        panels: one below the other.
        title: what is compared.
        subtitle: how to read it.
        measure: name of the figure, beside the colour scale.
        format_value: the text of a value in cells, tooltips and the scale.
        width: room there is.
        css_class: class of the svg element.
    """
    values = [v for panel in panels for v in panel.values.values() if v is not None]
    scale = _Scale.over(values)
    sheet = _Sheet(width, scale, format_value)
    for line in _wrapped(title, 18, width - 32):
        sheet.text(16, line, size=18, bold=True, advance=24)
    for line in _wrapped(subtitle, 12.5, width - 32):
        sheet.text(16, line, size=12.5, fill=MUTED, advance=18)
    sheet.legend(measure)
    for panel in panels:
        sheet.panel(panel)
    return sheet.drawing(title, css_class)


def heat_map_page(wide: str, narrow: str, *, title: str) -> str:
    """A page that shows the one or the other drawing as its window allows."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>body{{margin:0;background:#fff;padding:8px 0}}"
        "svg{display:block;margin:0 auto}.narrow{display:none}"
        "@media(max-width:760px){.wide{display:none}.narrow{display:block}}</style>"
        f"<body>{wide}{narrow}</body></html>\n"
    )


@dataclass(frozen=True)
class _Scale:
    """Values to places on the ramp, 0 to 1."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, values: Sequence[float]) -> "_Scale":
        if not values:
            return cls(0.0, 1.0, False)
        low, high = min(values), max(values)
        positive = [v for v in values if v > 0]
        if low >= 0 and positive and high / min(positive) >= _LOGARITHMIC:
            return cls(max(min(positive), high / 1e4), high, True)
        low = min(low, 0.0)
        return cls(low, high if high > low else low + 1.0, False)

    def at(self, value: float) -> float:
        if self.logarithmic:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def value(self, share: float) -> float:
        if self.logarithmic:
            return self.low * math.pow(self.high / self.low, share)
        return self.low + share * (self.high - self.low)


def ramp_colour(share: float) -> tuple[str, str]:
    """(fill, text on it) of a share, 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    left = min(int(place), len(_RAMP) - 2)
    part = place - left
    ends = [[int(_RAMP[left + i][at : at + 2], 16) for at in (1, 3, 5)] for i in (0, 1)]
    mixed = [round(a + part * (b - a)) for a, b in zip(*ends, strict=True)]
    light = 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2]
    return "#{:02x}{:02x}{:02x}".format(*mixed), INK if light > 140 else "#ffffff"


class _Sheet:
    """A drawing that grows downwards."""

    def __init__(self, width: int, scale: _Scale, format_value: Callable[[float], str]) -> None:
        self.width, self.scale, self.format_value = width, scale, format_value
        self.parts: list[str] = []
        self.y = 14.0
        self.right = 0.0

    def text(self, x: float, text: str, *, advance: float, size: float, fill: str = INK, bold: bool = False) -> None:
        self.parts.append(label(x, self.y + size, text, size=size, fill=fill, bold=bold))
        self.right = max(self.right, x + text_width(text, size))
        self.y += advance

    def legend(self, measure: str) -> None:
        """The measure's name, and its colours with their values."""
        self.y += 10
        self.text(16, measure, size=12, bold=True, advance=20)
        bar, height = min(260.0, self.width - 120.0), 12.0
        steps = 52
        for i in range(steps):
            fill, _ = ramp_colour((i + 0.5) / steps)
            x = 16 + bar * i / steps
            self.parts.append(element("rect", x=x, y=self.y, width=bar / steps + 0.6, height=height, fill=fill))
        self.parts.append(element("rect", x=16.0, y=self.y, width=bar, height=height, fill="none", stroke=LINE))
        for share in (0.0, 0.5, 1.0):
            anchor = "start" if share == 0 else "end" if share == 1 else "middle"
            text = self.format_value(self.scale.value(share))
            self.parts.append(label(16 + bar * share, self.y + 26, text, size=11, anchor=anchor, fill=MUTED))
        if self.scale.logarithmic:
            note = "logarithmic"
            self.parts.append(label(16 + bar + 10, self.y + 10, note, size=11, fill=MUTED))
            self.right = max(self.right, 26 + bar + text_width(note, 11))
        self.right = max(self.right, 16 + bar)
        self.y += 38

    def panel(self, panel: Panel) -> None:
        self.y += 8
        if panel.title:
            self.text(16, shorten(panel.title, max(int(self.width / 8.5), 20)), size=14, bold=True, advance=22)
        for stack, numbers, kinds in panel.layers:
            self._stack(panel, stack, numbers, kinds)
        if panel.outside:
            self._outside(panel)

    def _stack(self, panel: Panel, stack: str, numbers: Sequence[int], kinds: Sequence[str]) -> None:
        names = _short(kinds)
        left = 48.0 if self.width > 600 else 34.0
        overhang = 0.77 * text_width(names[-1], 11.5) if names else 0.0
        room = self.width - left - 16 - min(overhang, self.width / 6)
        cell = min(max(room / max(len(kinds), 1), 12.0), 76.0)
        height = 22.0 if len(numbers) <= 48 else 15.0
        known = [v for place, v in panel.values.items() if place.stack == stack and v is not None]
        longest = max((self.format_value(v) for v in known), key=len, default="")
        sizes = [size for size in (11.0, 10.0, 9.0) if text_width(longest, size) <= cell - 2 and size <= height - 6]
        size = sizes[0] if sizes else None  # all numbers, or none
        self.text(16, f"{stack} (a row a layer)", size=12, fill=MUTED, advance=20)
        self.y += _STEEP * max(text_width(name, 11.5) for name in names) + 8
        for i, full in enumerate(names):
            x = left + cell * (i + 0.5)
            name = shorten(full, max(int((self.width - 6 - x) / (0.77 * text_width("n", 11.5))), 4))
            self.parts.append(
                element(
                    "text",
                    html.escape(name),
                    x=x,
                    y=self.y - 6,
                    font_size="11.5",
                    fill=INK,
                    transform=f"rotate(-40 {x:.1f} {self.y - 6:.1f})",
                )
            )
            self.right = max(self.right, x + 0.77 * text_width(name, 11.5))
        for number in numbers:
            self.parts.append(label(left - 8, self.y + height / 2 + 4, str(number), size=11, anchor="end", fill=MUTED))
            for i, kind in enumerate(kinds):
                place = Place(stack, number, kind)
                self._cell(left + cell * i, cell, height, size, panel.values.get(place), f"{stack}.{number}.{kind}")
            self.y += height
        self.right = max(self.right, left + cell * len(kinds))
        self.y += 18

    def _outside(self, panel: Panel) -> None:
        self.text(16, "outside the layers", size=12, fill=MUTED, advance=22)
        x, height = 48.0, 22.0
        for kind in panel.outside:
            name = shorten(kind, 40)
            width = 60.0
            taken = width + 8 + text_width(name, 11.5)
            if x > 48 and x + taken > self.width - 16:
                x = 48.0
                self.y += height + 6
            self._cell(x, width, height, 11.0, panel.values.get(Place("", None, kind)), kind)
            self.parts.append(label(x + width + 8, self.y + 15, name, size=11.5))
            self.right = max(self.right, x + taken)
            x += taken + 22
        self.y += height + 18

    def _cell(self, x: float, width: float, height: float, size: float | None, value: float | None, name: str) -> None:
        if value is None:
            tip = element("title", html.escape(f"{name}: none"))
            self.parts.append(
                element("rect", tip, x=x + 0.5, y=self.y + 0.5, width=width - 1, height=height - 1, fill="#f1f2f3")
            )
            return
        text = self.format_value(value)
        fill, ink = ramp_colour(self.scale.at(value))
        tip = element("title", html.escape(f"{name}: {text}"))
        self.parts.append(
            element("rect", tip, x=x + 0.5, y=self.y + 0.5, width=width - 1, height=height - 1, fill=fill)
        )
        if size is not None:
            number = label(x + width / 2, self.y + height / 2 + 4, text, size=size, anchor="middle", fill=ink)
            self.parts.append(number.replace("<text", '<text pointer-events="none"', 1))

    def drawing(self, title: str, css_class: str) -> str:
        width, height = min(max(self.right + 20, 320.0), float(self.width)), self.y + 6
        background = element("rect", x="0", y="0", width=width, height=height, fill="#ffffff")
        return element(
            "svg",
            element("title", html.escape(title)) + background + "".join(self.parts),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {width:.0f} {height:.0f}",
            width=f"{width:.0f}",
            height=f"{height:.0f}",
            font_family=_FONT,
            role="img",
            class_=css_class,
        )


def _rank(kind: str) -> tuple[int, int, str]:
    norm = "norm" in kind or kind.startswith("ln_")
    order = (r"input|ln_1|^pre_att", *_ORDER) if norm else _ORDER
    place = next((i for i, pattern in enumerate(order) if re.search(pattern, kind)), len(order))
    return (int(norm), place, kind)


def _short(kinds: Sequence[str]) -> list[str]:
    """Column labels: `q_proj` for `self_attn.q_proj` where no other kind ends like that."""
    found: list[str] = []
    for kind in kinds:
        parts = kind.split(".")
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        alone = next(t for t in tails if t == kind or sum(k == t or k.endswith(f".{t}") for k in kinds) == 1)
        found.append(shorten(alone, 28))
    return found


def _wrapped(text: str, size: float, room: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= room:
            lines[-1] = longer
        else:
            lines.append(shorten(word, max(int(room / (0.6 * size)), 8)))
    return lines
