"""What every drawing is made of: SVG elements as text, escaped; text, whose width is estimated; the colours."""

import html
from collections.abc import Sequence

__all__ = ["GREY", "INK", "LINE", "MUTED", "drawing", "element", "label", "shorten", "text_width"]

INK, MUTED, LINE, GREY = "#1d2327", "#5b6670", "#d5dade", "#9aa4ad"


def shorten(text: str, length: int) -> str:
    """At most `length` characters, the middle left out."""
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def text_width(text: str, size: float) -> float:
    """An estimate in pixels."""
    wide = sum(1.9 if ord(c) > 0x2E80 else 1.3 if c in "MWmw@%" else 1.0 for c in text)
    return 0.57 * size * wide


def element(name: str, content: str = "", **attributes: str | float) -> str:
    """One element; `content` is already markup, attribute values are escaped here."""
    written = ""
    for key, value in attributes.items():
        text = f"{value:.1f}" if isinstance(value, float) else html.escape(str(value))
        written += f' {key.rstrip("_").replace("_", "-")}="{text}"'
    return f"<{name}{written}>{content}</{name}>"


def label(
    x: float,
    y: float,
    text: str,
    *,
    size: float = 12,
    anchor: str = "start",
    fill: str = INK,
    bold: bool = False,
    halo: bool = False,
) -> str:
    """One line of text; `halo` puts white around it where the page's style says so."""
    extra = ({"font_weight": "600"} if bold else {}) | ({"class_": "halo"} if halo else {})
    return element("text", html.escape(text), x=x, y=y, font_size=size, text_anchor=anchor, fill=fill, **extra)


def drawing(width: float, height: float, title: str, parts: Sequence[str], *, css_class: str) -> str:
    """An inline svg element that shrinks with the page, but not beyond reading."""
    return element(
        "svg",
        element("title", html.escape(title)) + "".join(parts),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        style=f"width:100%;max-width:{width:.0f}px;min-width:{min(width, max(320, 0.72 * width)):.0f}px",
        role="img",
        class_=css_class,
    )
