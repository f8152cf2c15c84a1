"""The heat map: well-formed, everything in its place, colours and numbers that say the same."""

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from solera.drawing import text_width
from solera.heatmap import Panel, heat_map, heat_map_page
from solera_core.places import Place, place_of

SVG = "{http://www.w3.org/2000/svg}"


def drawn(values: dict[str, float | None], **options: Any) -> ET.Element:
    panel = Panel("a", {place_of(name): value for name, value in values.items()})
    settings: dict[str, Any] = {"title": "T", "subtitle": "S", "measure": "M", "format_value": "{:.2f}".format}
    return ET.fromstring(heat_map([panel], **settings | options))


def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def cells(root: ET.Element) -> dict[str, tuple[str, ET.Element]]:
    """(value, cell) by name, as the tooltips say it."""
    found = {}
    for rect in root.iter(f"{SVG}rect"):
        if (tip := rect.find(f"{SVG}title")) is not None:
            name, _, value = (tip.text or "").partition(": ")
            found[name] = (value, rect)
    return found


def light(rect: ET.Element) -> float:
    red, green, blue = (int(rect.attrib["fill"][i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue


MODEL: dict[str, float | None] = {
    "model.embed_tokens.weight": 0.1,
    "model.layers.0.self_attn.q_proj.weight": 0.2,
    "model.layers.0.mlp.up_proj.weight": 0.4,
    "model.layers.0.input_layernorm.weight": 0.3,
    "model.layers.1.self_attn.q_proj.weight": None,
    "model.layers.1.mlp.up_proj.weight": 0.8,
    "model.layers.1.input_layernorm.weight": 0.0,
    "lm_head.weight": 0.5,
}


def test_every_tensor_has_a_cell_with_its_value() -> None:
    root = drawn(MODEL)
    found = cells(root)
    assert {name: value for name, (value, _) in found.items()} == {
        name.removesuffix(".weight"): "none" if value is None else f"{value:.2f}" for name, value in MODEL.items()
    }
    shown = texts(root)
    assert {"q_proj", "up_proj", "input_layernorm", "0", "1", "0.80", "0.20", "lm_head"} <= set(shown)
    order = [found[f"model.layers.0.{kind}"][1] for kind in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")]
    assert [float(cell.attrib["x"]) for cell in order] == sorted(float(cell.attrib["x"]) for cell in order)
    assert len({cell.attrib["y"] for cell in order}) == 1


def test_more_is_darker() -> None:
    known = [(float(value), rect) for value, rect in cells(drawn(MODEL)).values() if value != "none"]
    known.sort(key=lambda pair: pair[0])
    shades = [light(rect) for _, rect in known]
    assert shades == sorted(shades, reverse=True)
    assert shades[0] - shades[-1] > 150


@pytest.mark.parametrize(("smallest", "logarithmic"), [(0.5, False), (0.01, True)])
def test_a_wide_range_is_logarithmic(smallest: float, logarithmic: bool) -> None:
    root = drawn({f"h.{i}.w": v for i, v in enumerate((smallest, 1.0, 1.0))}, format_value="{:.3f}".format)
    assert ("logarithmic" in texts(root)) == logarithmic
    middle = f"{(smallest * 1.0) ** 0.5 if logarithmic else 0.5:.3f}"
    assert middle in texts(root)


@pytest.mark.parametrize("width", [320, 412, 1180])
@pytest.mark.parametrize("layers", [1, 28, 94])
def test_nothing_lies_outside(width: int, layers: int) -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "post_attention_layernorm")
    values: dict[str, float | None] = {
        f"model.layers.{i}.x.{kind}.weight": i + 0.5 for i in range(layers) for kind in kinds
    }
    root = drawn(values | MODEL, width=width)
    right, bottom = map(float, root.attrib["viewBox"].split()[2:])
    assert right <= width
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= right
        assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= bottom
    for text in root.iter(f"{SVG}text"):
        assert 0 < float(text.attrib["y"]) <= bottom
        steep = 0.77 if "transform" in text.attrib else 1.0
        half = {"middle": 0.5, "end": 0.0}.get(text.attrib.get("text-anchor", ""), 1.0)
        length = text_width(text.text or "", float(text.attrib["font-size"])) * steep
        assert 0 < float(text.attrib["x"]) <= right - half * length


def test_numbers_are_in_all_cells_of_a_grid_or_in_none() -> None:
    many: dict[str, float | None] = {f"h.0.kind{i}.w": 0.12 for i in range(60)}
    assert texts(drawn(many)).count("0.12") == 1  # the scale alone
    few: dict[str, float | None] = {f"h.0.kind{i}.w": 0.12 for i in range(5)}
    assert texts(drawn(few)).count("0.12") == 6


def test_labels_are_told_apart_and_escaped() -> None:
    root = drawn({"e.0.self.q.weight": 1.0, "e.0.cross.q.weight": 2.0, "e.0.<&>.weight": 3.0}, title="<a> & b")
    assert {"self.q", "cross.q", "<&>", "<a> & b"} <= set(texts(root))


def test_nothing_to_show_is_a_drawing_all_the_same() -> None:
    assert "none" in {value for value, _ in cells(drawn({"h.0.w": None})).values()}
    assert heat_map([], title="T", subtitle="", measure="M", format_value=str)


def test_panels_share_one_scale() -> None:
    panels = [Panel(name, {Place("h", 0, "w"): value}) for name, value in (("a", 1.0), ("b", 2.0))]
    text = heat_map(panels, title="T", subtitle="S", measure="M", format_value="{:.1f}".format)
    fills = [rect.attrib["fill"] for _, rect in [*cells(ET.fromstring(text)).values()]]
    assert len(set(fills)) == len(fills)
    assert {"a", "b"} <= set(texts(ET.fromstring(text)))


def test_a_page_shows_one_of_two_drawings() -> None:
    page = heat_map_page("<svg class='wide'/>", "<svg class='narrow'/>", title="<t>")
    assert "&lt;t&gt;" in page
    assert len(re.findall("<svg", page)) == 2
    assert "http" not in page
