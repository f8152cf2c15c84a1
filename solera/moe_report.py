"""The report of a mixture of experts, out of what its solera.json holds: a section of a page, a table for a terminal.

`checks.report` is measured at every build from text (`solera_merge.moe.report`); `checks.train`, `heal`, `control` and
`worth` where something was trained.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solera.moe_drawings import Losses, loss_rails, share_maps
from solera.results import format_bytes, format_count, format_share

__all__ = ["Mixture", "mixture_section", "page_beside", "read_mixture", "reading", "summary_rows", "worth"]

_MISSING = {
    "base": "The base was not measured",
    "specialists": "The specialists were not measured",
    "average": "The average merge was not measured",
    "model_router": "A router over the whole specialists was not measured",
}


@dataclass(frozen=True)
class Mixture:
    """A MoE with a report: its name, and the `checks` of its solera.json."""

    name: str
    checks: Mapping[str, Any]

    @property
    def report(self) -> Mapping[str, Any]:
        """What was measured when it was built."""
        found: Mapping[str, Any] = self.checks["report"]
        return found


def read_mixture(directory: Path, name: str) -> Mixture | None:
    """The MoE in a directory; None where it has no report (it was built without text)."""
    checks = json.loads((directory / "solera.json").read_text(encoding="utf-8")).get("checks", {})
    return Mixture(name, checks) if "report" in checks else None


def page_beside(out: Path) -> Path:
    """Where the page of a MoE goes that is built by itself: beside it, for the directory holds the model alone."""
    return out.with_name(f"{out.name}-report.html")


# sentences -----------------------------------------------------------------------------------------------------------


def reading(mixture: Mixture) -> list[str]:
    """What the figures say, in plain sentences."""
    report = mixture.report
    nll, size = report["nll"], report["size"]
    trained = "heal" in mixture.checks or "train" in mixture.checks
    what = "As it was built, before any training, the mixture" if trained else "The mixture"
    own = _own(report)
    against: list[str] = []
    if nll["base"] is not None:
        against.append(f"the base at {nll['base']['mean']:.3f}")
    if nll["average"] is not None:
        against.append(f"the average merge at {nll['average']['mean']:.3f}")
    if own is not None:
        against.append(f"the specialists, each on its own domain, at {own['mean']:.3f}")
    rest = f"; {_listed(against)}" if against else ""
    said = [f"{what} stands at {nll['moe']['mean']:.3f} nats a token on held-out text{rest}."]
    recovered, router, trunk = (report[key] for key in ("recovered", "router_loss", "trunk_loss"))
    if recovered is not None and recovered["mean"] is not None:
        said.append(f"It keeps {_share(recovered['mean'])} of what the specialists gained over the base.")
    if trunk is not None:
        said.append(_blame(router["mean"], trunk["mean"]))
    if (against_average := report["against"].get("average")) is not None:
        said.append(_compared(against_average["mean"], size))
    if nll["model_router"] is not None:
        behind = report["against"]["model_router"]["mean"]
        worse = "worse" if behind["value"] > 0 else "better"
        said.append(
            f"A router over the whole specialists, which must all be kept, stands at "
            f"{nll['model_router']['mean']:.3f}; the mixture is {_amount(behind)} {worse}."
        )
    return said


def worth(mixture: Mixture) -> str:
    """Whether it is worth its bytes, as far as that was measured."""
    checks = mixture.checks
    if "worth" in checks:
        sentence = str(checks["worth"])
        return (
            f"{sentence[:1].upper()}{sentence[1:]}. These figures are of one seed, without intervals, over all of the "
            "held-out text, each document by itself: compare them with each other, not with the rest."
        )
    return (
        "No dense control was taught beside it (heal), so nothing here says whether a model of the base's size "
        "could not do the same."
    )


def _blame(router: Mapping[str, Any], trunk: Mapping[str, Any]) -> str:
    lost = router["value"] + trunk["value"]
    if lost <= 0.005:
        return "Nothing is missing to the specialists."
    parts = f"{_amount(router)} are the router's and {_amount(trunk)} the trunk's"
    if router["value"] > 2 * trunk["value"]:
        advice = "a better router would win most of it (more text, another fit, training it)"
    elif trunk["value"] > 2 * router["value"]:
        advice = "no router could win most of it: another trunk, or healing, could"
    else:
        advice = "a better router could win the first part, another trunk or healing the second"
    return f"Of the {lost:.3f} nats that are missing to the specialists, {parts}: {advice}."


def _compared(average: Mapping[str, Any], size: Mapping[str, Any]) -> str:
    better = "better" if average["value"] < 0 else "worse"
    times = size["bytes"] / size["dense_bytes"]
    work = size["active"] / size["dense_parameters"]
    return (
        f"It is {_amount(average)} {better} than the average merge, at {times:.2f} times its bytes "
        f"({format_bytes(size['bytes'])}) and {work:.2f} times its parameters for each token."
    )


def _amount(figure: Mapping[str, Any]) -> str:
    """`0.524 (0.480 to 0.568)`, of a difference without its sign."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if low is None:
        return f"{abs(value):.3f}"
    ends = (low, high) if value >= 0 else (-high, -low)
    return f"{abs(value):.3f} ({ends[0]:.3f} to {ends[1]:.3f})"


def _share(figure: Mapping[str, Any]) -> str:
    ends = "" if figure["low"] is None else f" ({format_share(figure['low'])} to {format_share(figure['high'])})"
    return f"{format_share(figure['value'])}{ends}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _own(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Every specialist on its own domain; None where one is missing."""
    specialists = report["nll"]["specialists"]
    if any(name not in specialists for name in report["routes"]):
        return None
    domains = {name: specialists[name]["domains"][name] for name in report["routes"]}
    return {"domains": domains, "mean": sum(domains.values()) / len(domains)}


# tables --------------------------------------------------------------------------------------------------------------


def _models(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    """(name, its losses, class of the row), from the base to the specialists' best; the MoE as it was built."""
    nll = report["nll"]
    rows = [("base", nll["base"], "")] if nll["base"] is not None else []
    rows += [(f"specialist {name}", row, "") for name, row in nll["specialists"].items()]
    for key, name in (("average", "average merge"), ("model_router", "router over whole specialists")):
        if nll[key] is not None:
            rows.append((name, nll[key], ""))
    rows += [("this MoE", nll["moe"], "best"), ("oracle-routed MoE", nll["oracle"], "")]
    if (own := _own(report)) is not None:
        rows.append(("each specialist on its own", own, ""))
    return rows


def summary_rows(mixture: Mixture) -> list[dict[str, Any]]:
    """The table for a terminal: nats a token by domain, then what is kept and where the rest goes."""
    report = mixture.report
    domains = list(report["routes"])
    rows: list[dict[str, Any]] = []

    def add(name: str, found: Mapping[str, Any], show: Callable[[Any], str]) -> None:
        cells = {domain: show(found["domains"][domain]) for domain in domains}
        rows.append({"nats a token": name, **cells, "(mean)": show(found["mean"])})

    trained = _training(mixture.checks)
    for name, found, _ in _models(report):
        built = name == "this MoE" and trained
        add(f"{name}, as built" if built else name, found, lambda value: f"{value:.3f}")
    for key, name in (("recovered", "kept"), ("router_loss", "router loss"), ("trunk_loss", "trunk loss")):
        if report[key] is not None:
            add(name, report[key], _share_of if key == "recovered" else _value_of)
    for name, found in trained:
        add(name, found, lambda value: f"{value:.3f}")
    return rows


def _share_of(figure: Mapping[str, Any] | None) -> str:
    return "-" if figure is None else format_share(figure["value"])


def _value_of(figure: Mapping[str, Any] | None) -> str:
    return "-" if figure is None else f"{figure['value']:.3f}"


def _training(checks: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, losses) before and after every step of training, and those of the control."""
    rows: list[tuple[str, dict[str, Any]]] = []

    def add(name: str, found: Mapping[str, Any], when: str) -> None:
        rows.append((name, {"domains": found[f"nll_{when}"], "mean": found[f"mean_{when}"]}))

    steps = [(checks[key], name) for key, name in (("train", "router trained"), ("heal", "healed")) if key in checks]
    if steps:
        add("before training", steps[0][0], "before")
    for found, name in steps:
        add(name, found, "after")
    if "control" in checks:
        add("dense control, untaught", checks["control"], "before")
        add("dense control, taught", checks["control"], "after")
    if "specialists" in checks:
        rows.append(
            (
                "each specialist on its own",
                {"domains": checks["specialists"]["nll"], "mean": checks["specialists"]["mean"]},
            )
        )
    return rows


def mixture_section(mixture: Mixture) -> dict[str, Any]:
    """All that the page's template shows; the two drawings, wide and narrow, are SVG."""
    report, checks = mixture.report, mixture.checks
    domains = list(report["routes"])
    losses = _rails(report)
    shares = {domain: route["share"] for domain, route in report["routes"].items()}
    experts = report["experts"]
    return {
        "name": mixture.name,
        "worth": worth(mixture),
        "reading": reading(mixture),
        "domains": domains,
        "rows": [_row(name, found, domains, css) for name, found, css in _models(report)],
        "losses": _loss_rows(report),
        "intervals": any(found["mean"]["low"] is not None for found in _intervals(report)),
        "rails": [loss_rails(losses, width=940, css_class="wide"), loss_rails(losses, width=350, css_class="narrow")],
        "maps": [
            share_maps(shares, experts, width=940, css_class="wide"),
            share_maps(shares, experts, width=350, css_class="narrow"),
        ],
        "routing": _routing_rows(report),
        "layers": _layer_rows(report),
        "sizes": [
            (
                "parameters",
                format_count(report["size"]["parameters"]),
                format_count(report["size"]["dense_parameters"]),
            ),
            (
                "parameters for each token",
                format_count(report["size"]["active"]),
                format_count(report["size"]["dense_parameters"]),
            ),
            ("bytes on disk", format_bytes(report["size"]["bytes"]), format_bytes(report["size"]["dense_bytes"])),
        ],
        "engines": [(engine, *str(said).partition(": ")[::2]) for engine, said in checks.get("engines", {}).items()],
        "training": [_row(name, found, domains, "") for name, found in _training(checks)],
        "warnings": [*report["warnings"], *checks.get("warnings", [])],
        "missing": [f"{_MISSING.get(key, key)}: {why}." for key, why in report["missing"].items()],
    }


def _row(name: str, found: Mapping[str, Any], domains: Sequence[str], css: str) -> dict[str, Any]:
    own = name.removeprefix("specialist ") if name.startswith("specialist ") else None
    cells = [(f"{found['domains'][domain]:.3f}", domain == own) for domain in domains]
    return {"name": name, "cells": cells, "mean": f"{found['mean']:.3f}", "css": css}


def _intervals(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [report[key] for key in ("router_loss", "trunk_loss") if report[key] is not None]


def _loss_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is kept and lost, a row a domain, the mean last."""
    rows: list[dict[str, Any]] = []
    for domain in [*report["routes"], None]:
        cells: list[tuple[str, str] | None] = []
        for key in ("recovered", "router_loss", "trunk_loss"):
            found = report[key]
            of = None if found is None else found["mean"] if domain is None else found["domains"][domain]
            cells.append(None if of is None else _cell(of, share=key == "recovered"))
        text = "" if domain is None else f"{report['tokens'][domain]} in {report['documents'][domain]}"
        rows.append({"name": domain or "mean", "cells": cells, "text": text})
    return rows


def _cell(figure: Mapping[str, Any], *, share: bool) -> tuple[str, str]:
    def show(value: float) -> str:
        return format_share(value) if share else f"{value:.3f}"

    ends = "" if figure["low"] is None else f"{show(figure['low'])} to {show(figure['high'])}"
    return show(figure["value"]), ends


def _routing_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Means over the layers, a row a domain."""
    most = math.log(len(report["experts"]))
    return [
        (
            domain,
            format_share(_mean(route["accuracy"])),
            f"{_mean(route['entropy']):.2f} of {most:.2f}",
            format_share(_mean(route["switch_rate"])),
            format_share(_mean(route["top_k_mass"])),
        )
        for domain, route in report["routes"].items()
    ]


def _layer_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    load = report["load"]
    dead: dict[int, list[str]] = {}
    for layer, name in load["dead"]:
        dead.setdefault(layer, []).append(name)
    return [
        (
            str(layer),
            *(format_share(route["accuracy"][layer]) for route in report["routes"].values()),
            f"{load['max_over_mean'][layer]:.2f}",
            f"{load['cv'][layer]:.2f}",
            ", ".join(dead.get(layer, [])),
        )
        for layer in range(len(load["cv"]))
    ]


def _rails(report: Mapping[str, Any]) -> list[Losses]:
    nll, own = report["nll"], _own(report)
    rows: list[Losses] = []
    names: list[str | None] = [*report["routes"]]
    for domain in [*names, None] if len(names) > 1 else names:

        def of(found: Mapping[str, Any] | None, domain: str | None = domain) -> float | None:
            return None if found is None else found["mean"] if domain is None else found["domains"][domain]

        moe, oracle = of(nll["moe"]), of(nll["oracle"])
        assert moe is not None  # always measured
        assert oracle is not None
        rows.append(
            Losses(domain or "mean", of(nll["base"]), moe, oracle, of(own), of(nll["average"]), of(nll["model_router"]))
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
