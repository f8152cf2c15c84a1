"""The report of a MoE as a page, as a table and in sentences: every figure on it, whatever is missing."""

import copy
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from solera.moe_drawings import Losses, loss_rails, share_maps
from solera.moe_report import Mixture, mixture_section, page_beside, read_mixture, reading, summary_rows, worth
from solera.report import RunSummary, StageSummary, write_report

NAMES = ["code", "maths & <b>"]


def figure(value: float, spread: float | None = None) -> dict[str, Any]:
    ends = {"low": None, "high": None} if spread is None else {"low": value - spread, "high": value + spread}
    return {"value": value, **ends}


def by_domain(*values: float) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "domains": dict(zip(NAMES, values, strict=True))}


def figures(*values: float, spread: float | None = 0.05) -> dict[str, Any]:
    domains = {name: figure(value, spread) for name, value in zip(NAMES, values, strict=True)}
    return {"mean": figure(sum(values) / len(values), spread), "domains": domains}


@pytest.fixture
def checks() -> dict[str, Any]:
    """Of a MoE: base 4, specialists 2, oracle 2.3, MoE 2.5 and 2.9, two layers."""
    route = {"accuracy": [0.75, 1.0], "entropy": [0.3, 0.1], "switch_rate": [0.2, 0.1], "top_k_mass": [0.9, 0.99]}
    return {
        "engines": {"transformers": "exact", "vllm": "approximate: it never renormalises"},
        "warnings": ["expert 'code' is < the others"],
        "report": {
            "documents": dict.fromkeys(NAMES, 12),
            "tokens": dict.fromkeys(NAMES, 3456),
            "nll": {
                "base": by_domain(4.0, 4.0),
                "specialists": {NAMES[0]: by_domain(2.0, 5.0), NAMES[1]: by_domain(6.0, 2.0)},
                "average": by_domain(3.1, 3.3),
                "model_router": by_domain(2.0, 2.02),
                "oracle": by_domain(2.3, 2.3),
                "moe": by_domain(2.5, 2.9),
            },
            "recovered": figures(0.75, 0.55),
            "router_loss": figures(0.2, 0.6),
            "trunk_loss": figures(0.3, 0.3),
            "against": {"average": figures(-0.6, -0.4), "model_router": figures(0.5, 0.88)},
            "model_router": {"method": "centroid", "accuracy": 0.99, "documents_fit": 100},
            "experts": NAMES,
            "routes": {
                NAMES[0]: {"share": [[0.7, 0.3], [0.9, 0.1]], **route},
                NAMES[1]: {"share": [[0.25, 0.75], [0.0, 1.0]], **route},
            },
            "load": {"max_over_mean": [1.2, 1.5], "cv": [0.1, 0.2], "dead": [[1, "code"]]},
            "size": {
                "parameters": 591_000,
                "active": 426_000,
                "bytes": 2_360_000,
                "dense_parameters": 260_000,
                "dense_bytes": 1_040_000,
            },
            "missing": {},
            "warnings": ["experts that hardly a token visits: 'code' in 1 of 2 layers"],
        },
    }


class Page(HTMLParser):
    """Tags balanced, text collected."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: RunSummary, path: Path) -> tuple[str, Page]:
    write_report(run, path)
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def test_the_page_holds_every_figure_and_nothing_unescaped(checks: dict[str, Any], tmp_path: Path) -> None:
    source, page = page_of(RunSummary(title="a moe", mixtures=[Mixture("moe", checks)]), tmp_path / "page.html")
    assert "<b>" not in source
    assert "script" not in page.tags
    assert "No verdict" not in page.text  # nothing was there to judge
    for text in (
        *("4.000", "3.100", "2.020", "2.300", "2.900"),  # losses
        *("75.0%", "70.0% to 80.0%", "0.600", "0.250 to 0.350"),  # kept, lost, intervals
        *("87.5%", "0.20 of 0.69", "15.0%", "94.5%"),  # routing, means over the layers
        *("1.20", "0.10", "591k", "426k", "2.36 MB", "1.04 MB", "3456 in 12"),
        *("approximate", "it never renormalises", "expert 'code' is < the others", "hardly a token visits"),
    ):
        assert text in page.text, text
    drawings = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    assert len(drawings) == 4  # each wide and narrow
    for drawn in drawings:
        svg = ET.fromstring(drawn)
        assert svg.get("role") == "img"
        title = svg.find("title")
        assert title is not None
        assert all(name in (title.text or "") for name in NAMES)


def test_a_run_shows_it_among_the_rest(checks: dict[str, Any], tmp_path: Path) -> None:
    stages = [StageSummary("blend", "moe", ("base",))]
    run = RunSummary(title="a run", stages=stages, mixtures=[Mixture("blend", checks)])
    _, page = page_of(run, tmp_path / "page.html")
    assert "The mixture of experts: blend" in page.text
    assert "No verdict" in page.text
    _, without = page_of(RunSummary(title="a run", stages=stages), tmp_path / "without.html")
    assert "mixture of experts" not in without.text


def test_sentences(checks: dict[str, Any]) -> None:
    said = " ".join(reading(Mixture("moe", checks)))
    assert "The mixture stands at 2.700 nats a token on held-out text; the base at 4.000" in said
    assert "the average merge at 3.200 and the specialists, each on its own domain, at 2.000." in said
    assert "It keeps 65.0% (60.0% to 70.0%) of what the specialists gained" in said
    assert "Of the 0.700 nats that are missing to the specialists, 0.400 (0.350 to 0.450) are the router's" in said
    assert "0.500 (0.450 to 0.550) better than the average merge, at 2.27 times its bytes (2.36 MB) and 1.64" in said
    assert "stands at 2.010; the mixture is 0.690 (0.640 to 0.740) worse" in said
    assert "No dense control" in worth(Mixture("moe", checks))


@pytest.mark.parametrize(
    ("router", "trunk", "expected"),
    [
        (0.9, 0.1, "a better router would win most of it"),
        (0.1, 0.9, "no router could win most of it"),
        (0.5, 0.4, "a better router could win the first part"),
        (0.001, 0.001, "Nothing is missing"),
        (-0.3, 0.1, "Nothing is missing"),
    ],
)
def test_what_is_to_blame(checks: dict[str, Any], router: float, trunk: float, expected: str) -> None:
    checks["report"] |= {"router_loss": figures(router, router), "trunk_loss": figures(trunk, trunk)}
    assert expected in " ".join(reading(Mixture("moe", checks)))


def test_without_yardsticks_and_intervals(checks: dict[str, Any], tmp_path: Path) -> None:
    """A MoE that was extended: its base and the specialists behind its first experts are not at hand."""
    report = checks["report"]
    report["nll"] |= {
        "base": None,
        "average": None,
        "model_router": None,
        "specialists": {NAMES[1]: by_domain(6.0, 2.0)},
    }
    report |= {"recovered": None, "trunk_loss": None, "against": {}, "model_router": None}
    report["router_loss"] = figures(0.2, 0.6, spread=None)
    report["missing"] = {"specialists": "code: only its networks are here", "average": "code: is not here"}
    mixture = Mixture("moe", checks)
    _, page = page_of(RunSummary(title="t", mixtures=[mixture]), tmp_path / "page.html")
    assert "too few held-out documents for intervals" in page.text
    assert "The specialists were not measured: code: only its networks are here." in page.text
    assert "The mixture stands at 2.700 nats a token on held-out text." in page.text
    assert "won over the base" not in page.text
    assert [row["nats a token"] for row in summary_rows(mixture)] == [
        f"specialist {NAMES[1]}",
        "this MoE",
        "oracle-routed MoE",
        "router loss",
    ]


def test_training_and_the_control_are_shown(checks: dict[str, Any], tmp_path: Path) -> None:
    def step(before: float, after: float) -> dict[str, Any]:
        return {
            "nll_before": dict.fromkeys(NAMES, before),
            "mean_before": before,
            "nll_after": dict.fromkeys(NAMES, after),
            "mean_after": after,
        }

    checks |= {
        "train": step(2.71, 2.62),
        "heal": step(2.62, 2.22),
        "control": step(3.21, 2.14),
        "specialists": {"nll": dict.fromkeys(NAMES, 2.03), "mean": 2.03},
        "worth": "the MoE is not worth its bytes: take the control",
    }
    mixture = Mixture("moe", checks)
    section = mixture_section(mixture)
    assert [(row["name"], row["mean"]) for row in section["training"]] == [
        ("before training", "2.710"),
        ("router trained", "2.620"),
        ("healed", "2.220"),
        ("dense control, untaught", "3.210"),
        ("dense control, taught", "2.140"),
        ("each specialist on its own", "2.030"),
    ]
    _, page = page_of(RunSummary(title="t", mixtures=[mixture]), tmp_path / "page.html")
    assert "As it was built, before any training, the mixture stands at" in page.text
    assert "The MoE is not worth its bytes: take the control. These figures are of one seed" in page.text
    assert "not to be compared with the tables below" in page.text
    assert {"this MoE, as built", "healed", "dense control, taught"} <= {
        row["nats a token"] for row in summary_rows(mixture)
    }


def numbers(svg: ET.Element) -> list[tuple[float, float, str]]:
    return [(float(t.get("x", "")), float(t.get("y", "")), t.text or "") for t in svg.iter("text")]


def test_parts_of_a_line_lie_where_the_losses_are() -> None:
    row = Losses("code", base=6.0, moe=3.0, oracle=2.5, specialist=2.0, average=3.5, model_router=None)
    svg = ET.fromstring(loss_rails([row], width=940))
    spans = {
        str(title.text).split(":")[0]: (float(rect.get("x", "")), float(rect.get("width", "")))
        for rect in svg.iter("rect")
        if (title := rect.find("title")) is not None
    }
    won, lost, trunk = (spans[name] for name in ("won over the base", "router loss", "trunk loss"))
    assert trunk[0] + trunk[1] == pytest.approx(lost[0], abs=0.2)
    assert lost[0] + lost[1] == pytest.approx(won[0], abs=0.2)
    assert won[1] == pytest.approx(6 * lost[1], rel=0.01)
    assert not [text for *_, text in numbers(svg) if text == "router over whole models"]


def test_a_loss_that_is_a_gain_is_thin() -> None:
    row = Losses("code", base=6.0, moe=2.0, oracle=2.5, specialist=1.5, average=None, model_router=None)
    svg = ET.fromstring(loss_rails([row], width=350))
    heights = {
        str(title.text): float(rect.get("height", ""))
        for rect in svg.iter("rect")
        if (title := rect.find("title")) is not None
    }
    assert heights == {"won over the base: 4.000": 16, "router loss: -0.500": 5, "trunk loss: 1.000": 16}


@pytest.mark.parametrize("width", [350, 940])
@pytest.mark.parametrize(("experts", "layers"), [(2, 5), (8, 32), (16, 80)])
def test_maps_stay_inside_their_frame(width: int, experts: int, layers: int) -> None:
    names = [f"a-long-name-of-expert-{e}" if e % 2 else f"e{e}" for e in range(experts)]
    shares = {name: [[1 / experts] * experts for _ in range(layers)] for name in names}
    svg = ET.fromstring(share_maps(shares, names, width=width))
    right, bottom = (float(v) for v in svg.get("viewBox", "").split()[2:])
    assert right <= width + 1
    cells = [rect for rect in svg.iter("rect") if rect.find("title") is not None]
    assert len(cells) == experts * experts * layers
    for rect in svg.iter("rect"):
        assert float(rect.get("x", "")) + float(rect.get("width", "")) <= right
        assert float(rect.get("y", "")) + float(rect.get("height", "")) <= bottom


def test_a_directory_with_and_without_a_report(checks: dict[str, Any], tmp_path: Path) -> None:
    for name, found in (("with", checks), ("without", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "solera.json").write_text(json.dumps({"checks": found}))
    mixture = read_mixture(tmp_path / "with", "moe")
    assert mixture == Mixture("moe", copy.deepcopy(checks))
    assert read_mixture(tmp_path / "without", "moe") is None
    assert page_beside(tmp_path / "with") == tmp_path / "with-report.html"
