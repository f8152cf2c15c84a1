"""Measured results as cards and reports need them: one row a task, means over the domains of one metric, plain numbers.

Read from the `results.json` that an evaluation writes; nothing here measures.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from solera_core.errors import DataError

__all__ = [
    "Mean",
    "ModelResults",
    "TaskResult",
    "format_bytes",
    "format_count",
    "format_interval",
    "format_share",
    "format_value",
    "lower_is_better",
    "mean_by_metric",
    "metric_label",
    "overlap",
    "read_results",
]

TaskKind = Literal["text", "choice", "generate"]

_SHARES = {"accuracy", "acc", "acc_norm", "exact_match", "f1"}  # 0..1, shown as percent
_LOGARITHMIC = {"perplexity", "ppl", "token_perplexity", "word_perplexity", "byte_perplexity"}  # averaged as logarithms
_LOWER = _LOGARITHMIC | {"nll", "loss", "bits_per_byte", "bpb", "bits_per_token", "nll_per_token", "nll_per_byte"}
_LABELS = {
    "accuracy": "accuracy",
    "acc": "accuracy",
    "acc_norm": "accuracy (length-normalised)",
    "exact_match": "exact match",
    "perplexity": "perplexity",
    "ppl": "perplexity",
    "bits_per_byte": "bits per byte",
    "bpb": "bits per byte",
    "nll": "nats per token",
    "nll_per_token": "nats per token",
}


@dataclass(frozen=True)
class TaskResult:
    """One model on one task.

    Attributes:
        name: the task.
        domain: what it stands for (`code`, `prose`, ...).
        kind: `text`, `choice` or `generate`.
        metric: `perplexity`, `bits_per_byte`, `accuracy`, `exact_match`, ...
        value: the figure, with its interval `low`..`high` where one was computed.
        n: number of items.
        extra: further figures of the same task (`bits_per_byte`, `nll`, ...).
    """

    name: str
    domain: str
    kind: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    extra: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class ModelResults:
    """One `results.json`: the model, its size, its tasks."""

    ref: str
    digest: str
    total: int | None
    active: int | None
    bytes: int | None
    suite: str
    tasks: tuple[TaskResult, ...]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Mean:
    """The mean of one metric over several tasks, with an interval that treats the tasks as independent."""

    metric: str
    value: float
    low: float | None
    high: float | None
    tasks: int


def read_results(path: Path) -> ModelResults:
    """Read `results.json` (`path` is the file or the directory that holds it).

    Raises:
        DataError: the file is missing, no JSON, or not in the format an evaluation writes.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise DataError(f"{file}: no such file; give the directory that `solera eval` wrote for this model") from e
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise DataError(f"{file}: not a readable results file: {e}") from e
    try:
        model = data["model"]
        parameters = model.get("parameters") or {}
        suite = data.get("suite") or {}
        return ModelResults(
            ref=str(model["ref"]),
            digest=str(model.get("digest", "")),
            total=parameters.get("total"),
            active=parameters.get("active"),
            bytes=parameters.get("bytes"),
            suite=str(suite.get("name", "")),
            tasks=tuple(_task(row) for row in data["tasks"]),
            settings=dict(data.get("settings") or {}),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise DataError(
            f"{file}: not the results of an evaluation ({type(e).__name__}: {e}); run `solera eval` again"
        ) from e


def _task(row: Mapping[str, Any]) -> TaskResult:
    return TaskResult(
        name=str(row["name"]),
        domain=str(row.get("domain") or row["name"]),
        kind=str(row["kind"]),
        metric=str(row["metric"]),
        value=float(row["value"]),
        low=None if row.get("low") is None else float(row["low"]),
        high=None if row.get("high") is None else float(row["high"]),
        n=int(row.get("n") or 0),
        extra={str(k): float(v) for k, v in (row.get("extra") or {}).items() if _is_number(v)},
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def lower_is_better(metric: str) -> bool:
    """Whether a smaller figure of this metric is the better one."""
    return metric in _LOWER


def metric_label(metric: str) -> str:
    """The metric in words."""
    return _LABELS.get(metric, metric.replace("_", " "))


def mean_by_metric(tasks: Iterable[TaskResult]) -> dict[str, Mean]:
    """Mean per metric over tasks, in order of first appearance.

    Perplexities are averaged as logarithms (a geometric mean), everything else arithmetically. The half-widths of the
    intervals, below and above apart, are combined as for independent tasks: sqrt(sum of squares) / count.
    """
    groups: dict[str, list[TaskResult]] = {}
    for task in tasks:
        if math.isfinite(task.value):
            groups.setdefault(task.metric, []).append(task)
    return {metric: _mean(metric, rows) for metric, rows in groups.items()}


def _mean(metric: str, rows: Sequence[TaskResult]) -> Mean:
    logarithmic = metric in _LOGARITHMIC and all(v > 0 for r in rows for v in (r.value, r.low, r.high) if v is not None)
    scale = math.log if logarithmic else float
    unscale = math.exp if logarithmic else float
    count = len(rows)
    centre = sum(scale(row.value) for row in rows) / count
    below = [scale(row.value) - scale(row.low) for row in rows if row.low is not None]
    above = [scale(row.high) - scale(row.value) for row in rows if row.high is not None]
    if len(below) < count or len(above) < count:
        return Mean(metric, unscale(centre), None, None, count)
    low, high = centre - math.hypot(*below) / count, centre + math.hypot(*above) / count
    return Mean(metric, unscale(centre), unscale(low), unscale(high), count)


def overlap(a: TaskResult, b: TaskResult) -> bool:
    """Whether two intervals share a point; without intervals they count as overlapping only when equal."""
    a_low, a_high = (a.value if a.low is None else a.low), (a.value if a.high is None else a.high)
    b_low, b_high = (b.value if b.low is None else b.low), (b.value if b.high is None else b.high)
    return a_low <= b_high and b_low <= a_high


def format_value(value: float, metric: str = "") -> str:
    """`71.5%` for shares of one, else four significant digits: `4.892`, `0.9731`, `128.4`."""
    if not math.isfinite(value):
        return "not finite"
    if metric in _SHARES:
        return f"{100 * value:.1f}%"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 6 or magnitude < -4:
        return f"{value:.3e}"
    return f"{value:.{max(0, 3 - magnitude)}f}"


def format_interval(low: float | None, high: float | None, metric: str = "") -> str:
    """`4.81–4.97`, or nothing where no interval was computed."""
    if low is None or high is None:
        return ""
    dash = " to " if low < 0 else "–"
    return f"{format_value(low, metric)}{dash}{format_value(high, metric)}"


def format_share(share: float) -> str:
    """A share of one as percent with one digit."""
    return f"{100 * share:.1f}%" if math.isfinite(share) else "not finite"


def format_count(count: float | None) -> str:
    """`260k`, `1.24M`, `7.62B`; nothing for None."""
    return "" if count is None else _scaled(count, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")), "")


def format_bytes(count: float | None) -> str:
    """`4.96 MB`, decimal units; nothing for None."""
    return "" if count is None else _scaled(count, ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB")), " B")


def _scaled(count: float, units: Sequence[tuple[float, str]], smallest: str) -> str:
    for size, unit in units:
        if abs(count) >= 0.9995 * size:  # 999 600 is 1M, not 1000k
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}{smallest}"
