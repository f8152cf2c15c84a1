"""One run as one page: `report.html` (self-contained, no network, no scripts) and a plain table for the terminal.

The verdict comes first. Everything that came from outside (names, recipes, notes) is escaped: jinja2 escapes the page,
`solera.svg` the drawings.
"""

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solera.moe_report import Mixture, mixture_section
from solera.results import (
    Mean,
    TaskResult,
    format_bytes,
    format_count,
    format_interval,
    format_share,
    format_value,
    lower_is_better,
    mean_by_metric,
    metric_label,
    overlap,
)
from solera.svg import Node, Point, dominated, lineage_list, lineage_wide, scatter

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "ModelSummary",
    "Retention",
    "RunSummary",
    "StageSummary",
    "moe_worth",
    "rich_table",
    "text_table",
    "verdict_sentence",
    "write_report",
]


@dataclass(frozen=True)
class StageSummary:
    """One stage of the run; `inputs` are the names of what it read (stages or given checkpoints)."""

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    cached: bool = False
    seconds: float = 0.0
    digest: str = ""
    note: str = ""


@dataclass(frozen=True)
class ModelSummary:
    """One model: `total` and `active` parameters, `bytes` of its weights on disk."""

    name: str
    kind: str = ""
    total: int | None = None
    active: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Retention:
    """How much of a specialist's advantage over the base `model` keeps on `domain`: 1 all of it, 0 nothing."""

    model: str
    domain: str
    share: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """What a report needs to know of a run.

    Attributes:
        title: heading of the page.
        stages: in the order they ran.
        models: rows of the tables, in this order.
        results: model name -> its tasks.
        retention: shares kept, any order.
        verdict: contents of verdict.json, or None without a gate.
        notes: plain sentences worth the reader's time (what was left out, what failed).
        recipe: the recipe's text.
        environment: versions and machine, in order.
        moe, control: names of the mixture and of the dense model taught for the same tokens; both given: they are
            compared.
        retention_of: what `retention` is measured against, in words.
        mixtures: MoEs that have a report of their own.
    """

    title: str = "solera run"
    stages: Sequence[StageSummary] = ()
    models: Sequence[ModelSummary] = ()
    results: Mapping[str, Sequence[TaskResult]] = field(default_factory=dict[str, Sequence[TaskResult]])
    retention: Sequence[Retention] = ()
    verdict: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    recipe: str = ""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    moe: str | None = None
    control: str | None = None
    retention_of: str = "the specialist's gain over the base, per domain"
    mixtures: Sequence[Mixture] = ()


# sentences --------------------------------------------------------------------------------------------------------


def verdict_sentence(verdict: Mapping[str, Any]) -> str:
    """The verdict in one plain sentence with the numbers that decided it."""
    candidate, baseline = str(verdict.get("candidate", "candidate")), str(verdict.get("baseline", "baseline"))
    tasks = [t for t in verdict.get("tasks", []) if t.get("tier", "critical") == "critical"] or list(
        verdict.get("tasks", [])
    )
    outcome = verdict.get("verdict")
    if outcome == "PASS":
        closest = min(tasks, key=_room, default=None)
        example = f"; closest to its limit is {_task_figures(closest)}" if closest else ""
        where = f"all {len(tasks)} tasks" if len(tasks) > 1 else "the one task"
        return f"{candidate} keeps the quality of {baseline} within the margin on {where}{example}."
    decisive = [t for t in tasks if t.get("verdict") == outcome]
    count = f"{len(decisive)} of {len(tasks)} tasks" if len(tasks) > 1 else "the one task"
    figures = "; ".join(_task_figures(t) for t in decisive[:2])
    more = f" (and {len(decisive) - 2} more)" if len(decisive) > 2 else ""
    if outcome == "FAIL":
        start = f"{candidate} is worse than {baseline} by more than the margin on {count}"
    else:
        start = f"The data cannot tell whether {candidate} keeps the quality of {baseline}: open on {count}"
    return f"{start}: {figures}{more}." if figures else f"{start}."


def _figure(task: Mapping[str, Any]) -> tuple[str, float | None]:
    """`ratio` (perplexity) or `difference` (accuracy), and its value."""
    key = "ratio" if "ratio" in task else "difference"
    value = task.get(key)
    return key, None if value is None else float(value)


def _room(task: Mapping[str, Any]) -> float:
    """How far a task's bound is from its margin, in margins; for sorting only."""
    bound, margin = task.get("bound"), task.get("margin")
    if bound is None or not margin:
        return math.inf
    if "ratio" in task:
        return (math.log(margin) - math.log(bound)) / math.log(margin) if bound > 0 and margin > 1 else math.inf
    return (float(margin) + float(bound)) / float(margin)


def _task_figures(task: Mapping[str, Any]) -> str:
    key, value = _figure(task)
    metric = str(task.get("metric", ""))
    pair = ""
    if task.get("candidate") is not None and task.get("baseline") is not None:
        pair = (
            f" {format_value(float(task['candidate']), metric)} against {format_value(float(task['baseline']), metric)}"
        )
    parts = [f"{key} {_signed(key, value)}"] if value is not None else []
    if task.get("bound") is not None:
        parts.append(f"bound {_signed(key, float(task['bound']))}")
    if task.get("margin") is not None:
        parts.append(f"margin {_margin(key, float(task['margin']))}")
    if task.get("verdict") == "INCONCLUSIVE" and task.get("n_needed"):
        parts.append(f"{task.get('n')} items, about {task['n_needed']} needed")
    return f"{task.get('name')}: {metric_label(metric)}{pair} ({', '.join(parts)})"


def _signed(key: str, value: float) -> str:
    return f"{value:.4f}" if key == "ratio" else f"{value:+.4f}"


def _margin(key: str, value: float) -> str:
    return f"{value:g}" if key == "ratio" else f"-{value:g}"


def moe_worth(run: RunSummary) -> list[str]:
    """Whether the mixture earns its bytes against the dense control, in sentences; [] where one of them is missing."""
    sizes = {m.name: m for m in run.models}
    if run.moe is None or run.control is None or not {run.moe, run.control} <= set(run.results):
        return []
    moe, control = run.results[run.moe], {t.name: t for t in run.results[run.control]}
    pairs = [(t, control[t.name]) for t in moe if t.name in control and control[t.name].metric == t.metric]
    if not pairs:
        return []
    better = [(a, b) for a, b in pairs if _better(a, b) and not overlap(a, b)]
    worse = [(a, b) for a, b in pairs if _better(b, a) and not overlap(a, b)]
    sentences: list[str] = []
    a, b = sizes.get(run.moe), sizes.get(run.control)
    if a and b and a.bytes and b.bytes:
        times = f"{a.bytes / b.bytes:.2f} times the {format_bytes(b.bytes)} of {run.control}"
        cost = f"{run.moe} takes {format_bytes(a.bytes)}, {times}"
        if a.active and b.active:
            cost += f", and uses {a.active / b.active:.2f} times its parameters for each token"
        sentences.append(cost + ".")
    means_a = mean_by_metric(t for t, _ in pairs)
    means_b = mean_by_metric(t for _, t in pairs)
    for metric, mean in means_a.items():
        other = means_b[metric]
        over = f" over {mean.tasks} tasks" if mean.tasks > 1 else ""
        sentences.append(
            f"Mean {metric_label(metric)}{over}: {format_value(mean.value, metric)} against "
            f"{format_value(other.value, metric)} ({_change(mean, other)})."
        )
    count = f"{len(better)} of {len(pairs)} tasks" if len(pairs) > 1 else "the one task"
    if better and not worse:
        sentences.append(
            f"It is better on {count} with intervals apart, and worse on none: the extra bytes buy quality."
        )
    elif worse and not better:
        losing = f"{len(worse)} of {len(pairs)} tasks" if len(pairs) > 1 else "the one task"
        sentences.append(
            f"It is worse on {losing} with intervals apart and better on none: the extra bytes are not worth it."
        )
    elif better:
        sentences.append(
            f"It is better on {len(better)} and worse on {len(worse)} of {len(pairs)} tasks, intervals apart: mixed."
        )
    else:
        sentences.append("The intervals overlap on every task: these data show no gain for the extra bytes.")
    return sentences


def _better(a: TaskResult, b: TaskResult) -> bool:
    return a.value < b.value if lower_is_better(a.metric) else a.value > b.value


def _change(mean: Mean, other: Mean) -> str:
    """`3.5% lower, better`; for shares of one in points."""
    if format_value(1.0, mean.metric) == "100.0%":
        points = 100 * (mean.value - other.value)
        if abs(points) < 0.05:
            return "the same"
        return f"{abs(points):.1f} points {'lower, worse' if points < 0 else 'higher, better'}"
    if other.value == 0 or not math.isfinite(mean.value / other.value):
        return "no ratio"
    change = 100 * (mean.value / other.value - 1)
    if abs(change) < 0.05:
        return "the same"
    improved = (change < 0) == lower_is_better(mean.metric)
    return f"{abs(change):.1f}% {'lower' if change < 0 else 'higher'}, {'better' if improved else 'worse'}"


# the page ---------------------------------------------------------------------------------------------------------


def write_report(run: RunSummary, path: Path) -> None:
    """Write the page; an existing file is replaced in one step."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("solera", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=format_bytes, count=format_count)
    columns = _columns(run)
    safe = Markup  # for drawings only: svg.py escapes every name and attribute itself
    page = environment.get_template("report.html.j2").render(
        run=run,
        outcome=_outcome(run.verdict),
        sentence=verdict_sentence(run.verdict) if run.verdict else "",
        reasons=[str(r) for r in (run.verdict or {}).get("reasons", [])],
        gate_rows=_gate_rows(run.verdict),
        columns=columns,
        rows=_rows(run, columns),
        long_names=any(len(model.name) > 20 for model in run.models),
        measurements=_measurements(run),
        heat=_heat(run),
        worth=moe_worth(run),
        judged=bool(run.models or run.stages or not run.mixtures),
        named=bool(run.stages),
        mixtures=[_drawn(mixture_section(mixture), safe) for mixture in run.mixtures],
        plots=[(list(map(safe, drawings)), left_out) for drawings, left_out in _plots(run)],
        lineage=list(map(safe, _lineage(run))),
    )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _drawn(section: dict[str, Any], safe: Callable[[str], Any]) -> dict[str, Any]:
    return section | {key: list(map(safe, section[key])) for key in ("rails", "maps")}


@dataclass(frozen=True)
class _Column:
    """One column of the quality table: a task, or the mean over a metric's tasks (`task` is None)."""

    metric: str
    task: str | None
    heading: str
    span: int = 0  # columns under the metric's common heading, on the first of them
    label: str = ""


def _columns(run: RunSummary) -> list[_Column]:
    """Tasks grouped by metric, each group of two or more closed by its mean."""
    groups: dict[str, dict[str, str]] = {}
    for model in run.models:
        for task in run.results.get(model.name, ()):
            groups.setdefault(task.metric, {}).setdefault(task.name, task.domain)
    columns: list[_Column] = []
    for metric, tasks in groups.items():
        domains = list(tasks.values())
        headings = [(d if domains.count(d) == 1 else name) for name, d in tasks.items()]
        group = [_Column(metric, name, heading) for name, heading in zip(tasks, headings, strict=True)]
        if len(group) > 1:
            group.append(_Column(metric, None, "mean"))
        arrow = "↓" if lower_is_better(metric) else "↑"
        first = group[0]
        group[0] = _Column(metric, first.task, first.heading, len(group), f"{metric_label(metric)} {arrow}")
        columns += group
    return columns


def _rows(run: RunSummary, columns: Sequence[_Column]) -> list[dict[str, Any]]:
    """Rows of the table of models: sizes and one cell a column, the best of a column marked."""
    table: list[list[tuple[float, float | None, float | None] | None]] = []
    for model in run.models:
        tasks = {(t.metric, t.name): t for t in run.results.get(model.name, ())}
        complete = _complete_means(run, model.name)
        cells: list[tuple[float, float | None, float | None] | None] = []
        for column in columns:
            found = tasks.get((column.metric, column.task)) if column.task is not None else complete.get(column.metric)
            cells.append(None if found is None else (found.value, found.low, found.high))
        table.append(cells)
    best: list[float | None] = []
    for i, column in enumerate(columns):
        values = [cell[0] for cell in (cells[i] for cells in table) if cell is not None]
        finite = [v for v in values if math.isfinite(v)]
        best.append(None if len(finite) < 2 else min(finite) if lower_is_better(column.metric) else max(finite))
    kept = dict(_mean_shares(run))
    return [
        {
            "model": model,
            "sparse": model.active is not None and model.active != model.total,
            "kept": format_share(kept[model.name]) if math.isfinite(kept.get(model.name, math.nan)) else None,
            "cells": [
                None
                if cell is None
                else {
                    "value": format_value(cell[0], column.metric),
                    "interval": format_interval(cell[1], cell[2], column.metric),
                    "best": cell[0] == best[i],
                    "mean": column.task is None,
                }
                for i, (cell, column) in enumerate(zip(cells, columns, strict=True))
            ],
        }
        for model, cells in zip(run.models, table, strict=True)
    ]


def _complete_means(run: RunSummary, model: str) -> dict[str, Mean]:
    """Means of a model, only for metrics on whose every task it was measured: other means are not comparable."""
    wanted: dict[str, set[str]] = {}
    for tasks in run.results.values():
        for task in tasks:
            wanted.setdefault(task.metric, set()).add(task.name)
    own = run.results.get(model, ())
    complete = {
        m for m, names in wanted.items() if names <= {t.name for t in own if t.metric == m and math.isfinite(t.value)}
    }
    return {metric: mean for metric, mean in mean_by_metric(own).items() if metric in complete}


def _mean_shares(run: RunSummary) -> list[tuple[str, float]]:
    """Mean share kept over the domains, nan where one of them is not known; models in their order."""
    domains = {row.domain for row in run.retention}
    shares: dict[str, list[float]] = {}
    for row in run.retention:
        shares.setdefault(row.model, []).append(row.share)
    order = [m.name for m in run.models if m.name in shares] + [
        m for m in shares if m not in {x.name for x in run.models}
    ]
    return [(m, sum(shares[m]) / len(domains) if len(shares[m]) == len(domains) else math.nan) for m in order]


def _measurements(run: RunSummary) -> list[tuple[str, ...]]:
    """Every number, unrounded to six digits: model, task, domain, metric, value, low, high, items, further figures."""
    rows: list[tuple[str, ...]] = []
    for model, tasks in run.results.items():
        for t in tasks:
            further = ", ".join(f"{k.replace('_', ' ')} {v:.6g}" for k, v in t.extra.items())
            ends = ["" if v is None else f"{v:.6g}" for v in (t.low, t.high)]
            rows.append((model, t.name, t.domain, metric_label(t.metric), f"{t.value:.6g}", *ends, str(t.n), further))
    return rows


def _outcome(verdict: Mapping[str, Any] | None) -> str:
    found = str((verdict or {}).get("verdict", ""))
    return found if found in ("PASS", "FAIL", "INCONCLUSIVE") else ""


def _gate_rows(verdict: Mapping[str, Any] | None) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for task in (verdict or {}).get("tasks", []):
        key, value = _figure(task)
        metric = str(task.get("metric", ""))
        flips = "" if task.get("lost") is None else f"{task.get('lost')} lost, {task.get('gained')} gained"
        rows.append(
            {
                "name": str(task.get("name", "")),
                "metric": metric_label(metric),
                "candidate": "" if task.get("candidate") is None else format_value(float(task["candidate"]), metric),
                "baseline": "" if task.get("baseline") is None else format_value(float(task["baseline"]), metric),
                "figure": "" if value is None else f"{key} {_signed(key, value)}",
                "bound": "" if task.get("bound") is None else _signed(key, float(task["bound"])),
                "margin": "" if task.get("margin") is None else _margin(key, float(task["margin"])),
                "n": str(task.get("n", "")),
                "needed": "" if task.get("n_needed") is None else str(task["n_needed"]),
                "flips": flips,
                "verdict": str(task.get("verdict", "")),
                "advisory": "yes" if task.get("tier") == "advisory" else "",
                "class": str(task.get("verdict", "")).lower()
                if task.get("verdict") in ("PASS", "FAIL", "INCONCLUSIVE")
                else "",
            }
        )
    return rows


# From orange (lost) through near-white (about all) to blue (more than all): told apart by the colour-blind too.
_HEAT = [
    (0.0, (237, 137, 84)),
    (0.5, (246, 184, 143)),
    (0.85, (252, 232, 218)),
    (1.0, (225, 237, 245)),
    (1.3, (150, 196, 224)),
]


def _heat_colour(share: float) -> str:
    if not math.isfinite(share):
        return "#eeeeee"
    stops = [_HEAT[0], *_HEAT, _HEAT[-1]]
    for (a, low), (b, high) in itertools.pairwise(stops):
        if share <= b:
            t = 0.0 if b == a else max(0.0, (share - a) / (b - a))
            return "#" + "".join(f"{round(x + t * (y - x)):02x}" for x, y in zip(low, high, strict=True))
    return "#" + "".join(f"{x:02x}" for x in _HEAT[-1][1])


def _heat(run: RunSummary) -> dict[str, Any] | None:
    """Domain x model, with a mean column where there are several domains."""
    if not run.retention:
        return None
    domains = list(dict.fromkeys(r.domain for r in run.retention))
    found = {(r.model, r.domain): r for r in run.retention}
    rows: list[dict[str, Any]] = []
    for model, mean in _mean_shares(run):
        cells: list[dict[str, str] | None] = []
        for domain in domains:
            r = found.get((model, domain))
            if r is None:
                cells.append(None)
                continue
            interval = format_interval(r.low, r.high, "accuracy")
            cells.append({"share": format_share(r.share), "interval": interval, "colour": _heat_colour(r.share)})
        rows.append({"model": model, "cells": cells, "mean": format_share(mean) if math.isfinite(mean) else ""})
    return {"domains": domains, "rows": rows, "several": len(domains) > 1}


def _plots(run: RunSummary) -> list[tuple[tuple[str, str], list[str]]]:
    """One drawing (wide and narrow) a metric: mean quality against bytes; names of the models it had to leave out."""
    sizes = {m.name: m for m in run.models}
    by_bytes = all(m.bytes for m in run.models if run.results.get(m.name))
    metrics = list(dict.fromkeys(t.metric for m in run.models for t in run.results.get(m.name, ())))
    plots: list[tuple[tuple[str, str], list[str]]] = []
    for metric in metrics:
        points: list[Point] = []
        left_out: list[str] = []
        tasks = 1
        for name, model in sizes.items():
            size = model.bytes if by_bytes else model.total
            mean = _complete_means(run, name).get(metric)
            if mean is None or not size:
                if any(t.metric == metric for t in run.results.get(name, ())):
                    left_out.append(name)
                continue
            tasks = mean.tasks
            points.append(Point(name, float(size), mean.value, mean.low, mean.high, model.kind))
        if len(points) < 2:
            continue
        lower = lower_is_better(metric)
        points = dominated(points, lower_is_better=lower)
        title = metric_label(metric) if tasks == 1 else f"mean {metric_label(metric)} of {tasks} tasks"

        def draw(
            width: int,
            height: int,
            css_class: str,
            points: list[Point] = points,
            title: str = title,
            metric: str = metric,
        ) -> str:
            return scatter(
                points,
                width=width,
                height=height,
                x_title="bytes on disk" if by_bytes else "parameters",
                y_title=title,
                lower_is_better=lower_is_better(metric),
                format_x=format_bytes if by_bytes else format_count,
                format_y=lambda value: format_value(value, metric),
                css_class=css_class,
            )

        plots.append(((draw(920, 430, "wide"), draw(350, 460, "narrow")), left_out))
    return plots


def _lineage(run: RunSummary) -> list[str]:
    """The graph of stages, wide and narrow; before the stages what they read that no stage made."""
    if not run.stages:
        return []
    names = {stage.name for stage in run.stages}
    given = dict.fromkeys(i for stage in run.stages for i in stage.inputs if i not in names)
    nodes = [Node(name, "given") for name in given]
    for stage in run.stages:
        detail = stage.note or ("cached" if stage.cached else f"{stage.seconds:.0f} s" if stage.seconds >= 1 else "")
        nodes.append(Node(stage.name, stage.kind, stage.inputs, detail))
    return [lineage_wide(nodes, css_class="wide"), lineage_list(nodes, width=340, css_class="narrow")]


# the terminal -----------------------------------------------------------------------------------------------------


def rich_table(run: RunSummary) -> "Table":
    """Models as rows; their size, every task, the means, and the share kept of the specialists."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = _columns(run)
    rows = _rows(run, columns)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("params", justify="right", no_wrap=True)
    sparse = any(m.active is not None and m.active != m.total for m in (row["model"] for row in rows))
    if sparse:
        table.add_column("active", justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(Text(f"{column.heading}\n{metric_label(column.metric)}"), justify="right")
    if any(row["kept"] is not None for row in rows):
        table.add_column("kept", justify="right")
    for row in rows:
        model: ModelSummary = row["model"]
        cells = [Text(model.name), Text(format_count(model.total))]
        if sparse:
            cells.append(Text(format_count(model.active)))
        cells.append(Text(format_bytes(model.bytes)))
        cells += [
            Text("-") if cell is None else Text(cell["value"], style="bold" if cell["best"] else "")
            for cell in row["cells"]
        ]
        if len(table.columns) > len(cells):
            cells.append(Text(row["kept"] or "-"))
        table.add_row(*cells)
    return table


def text_table(run: RunSummary, *, width: int = 140) -> str:
    """`rich_table` as plain text without colour or control characters, the verdict's sentence below it."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(rich_table(run))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    if run.verdict:
        lines += ["", f"{_outcome(run.verdict) or 'no verdict'}: {verdict_sentence(run.verdict)}"]
    return "\n".join(lines).strip("\n") + "\n"
