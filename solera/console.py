"""How solera speaks on a terminal: progress and notes on stderr, results on stdout.

On a terminal long work shows a bar with throughput and time left; elsewhere (logs, CI) plain lines, at most one every
few seconds. Colour follows NO_COLOR.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from solera.plan_rows import by_layers
from solera_core.plan import Plan
from solera_core.progress import Progress, Silent, Task

__all__ = [
    "Lines",
    "make_progress",
    "print_models",
    "print_plan",
    "print_rows",
    "print_run_plan",
    "readable_bytes",
    "stdout_console",
]

_PLAIN_EVERY_S = 5.0
_LOG_WIDTH = 140


def readable_bytes(count: float) -> str:
    """`2.2 GB`; decimal units, as disks and hubs count."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def make_progress(*, quiet: bool) -> Progress:
    """Bars on a terminal, plain lines elsewhere, nothing with --quiet."""
    if quiet:
        return Silent()
    return _Bars() if sys.stderr.isatty() else Lines()


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return readable_bytes(value)
    if value >= 1e6:
        return f"{value / 1e6:.2f}M {unit}"
    if value >= 1e4:
        return f"{value / 1e3:.0f}k {unit}"
    return f"{value:g} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


class Lines:
    """Plain lines on stderr, each beginning with `name` where one is given."""

    def __init__(self, name: str = "") -> None:
        self._prefix = f"{name}: " if name else ""

    @contextmanager
    def task(self, title: str, total: float, unit: str = "") -> Iterator[Task]:
        """A line every few seconds."""
        yield _LineTask(self._prefix + title, total, unit)

    def note(self, message: str) -> None:
        """One line."""
        print(self._prefix + message, file=sys.stderr, flush=True)  # noqa: T201  (this file is the terminal)


class _LineTask:
    def __init__(self, title: str, total: float, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = 0.0
        self._started = self._printed = time.monotonic()

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._printed < _PLAIN_EVERY_S:
            return
        self._printed = now
        rate = self._done / max(now - self._started, 1e-9)
        left = max(self._total - self._done, 0) / rate if rate else 0.0
        share = f"{100 * self._done / self._total:.0f} %" if self._total else ""
        parts = [share, f"{_amount(rate, self._unit)}/s", f"{_duration(left)} left", note]
        print(f"{self._title}: {', '.join(p for p in parts if p)}", file=sys.stderr, flush=True)  # noqa: T201


class _Bars:
    """Rich bars on stderr; they vanish when done."""

    @contextmanager
    def task(self, title: str, total: float, unit: str = "") -> Iterator[Task]:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        with bar:
            yield _BarTask(bar, bar.add_task(title, total=total or None, rate="", note=""), unit)

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)  # noqa: T201


class _BarTask:
    def __init__(self, bar: Any, task: Any, unit: str) -> None:
        self._bar, self._task, self._unit = bar, task, unit
        self._done, self._started = 0.0, time.monotonic()

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self._done += amount
        rate = self._done / max(time.monotonic() - self._started, 1e-9)
        self._bar.update(self._task, advance=amount, rate=f"{_amount(rate, self._unit)}/s", note=note)


def stdout_console() -> Any:
    """Where results go. A terminal has its own width; a log or a pipe has room."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=_LOG_WIDTH)


def print_plan(plan: Plan, *, max_rows: int = 40) -> None:
    """The plan as tables on stdout."""
    console = stdout_console()
    console.print(f"[bold]plan: {plan.stage}[/bold] (nothing is read but headers, nothing is written)")
    _table(console, "reads", [_readable(r) for r in plan.reads])
    _table(console, "writes", [_readable(w) for w in plan.writes])
    console.print(f"memory: about {readable_bytes(plan.memory_bytes)}; disk: {readable_bytes(plan.disk_bytes)}")
    _table(console, "parameters", [{"key": k, "value": _flow(v)} for k, v in plan.parameters.items()])
    joined = by_layers(plan.rows) if plan.rows and "tensor" in plan.rows[0] else list(plan.rows)
    constant = _constant(joined)
    if constant:
        console.print("for all rows: " + "; ".join(f"{k} {v}" for k, v in constant.items() if v != ""), markup=False)
    rows = [{k: v for k, v in row.items() if k not in constant} for row in joined[:max_rows]]
    _table(console, "details", rows, whole=("tensor",))
    if len(joined) > max_rows:
        console.print(f"... and {len(joined) - max_rows} more rows (all of them with --json)")
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", markup=True)


def _flow(value: Any) -> Any:
    """Nested settings as one line of YAML."""
    if not isinstance(value, (list, dict)):
        return value
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()


def _constant(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same in all rows of a long table."""
    if len(rows) < 3:
        return {}
    return {k: v for k, v in rows[0].items() if all(row.get(k) == v for row in rows)}


def _known_bytes(count: float | None) -> str:
    return "unknown" if count is None else readable_bytes(count)


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _known_bytes(v) if k in ("bytes", "download_bytes") else v for k, v in row.items()}


def _table(console: Any, title: str, rows: Sequence[Mapping[str, Any]], *, whole: Sequence[str] = ()) -> None:
    """A table; names in the columns `whole` are never cut."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in columns:
        longest = max((len(str(row.get(column, ""))) for row in rows), default=0) if column in whole else None
        table.add_column(column, overflow="fold", min_width=None if longest is None else min(longest, 72))
    for row in rows:
        table.add_row(*(Text("" if row.get(c) is None else str(row.get(c))) for c in columns))
    console.print(table)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table on stdout."""
    _table(stdout_console(), title, [_rounded(r) for r in rows], whole=("name", "kind"))


def print_models(rows: Sequence[Mapping[str, Any]]) -> None:
    """What models are: sizes readable."""
    _table(stdout_console(), "models", [{**_readable(r), "parameters": f"{r['parameters']:,}"} for r in rows])


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}


def print_run_plan(planned: Sequence[Any], total: Mapping[str, int], out: Any) -> None:
    """The stages of a recipe, what each reads, whether it would run, and what all of them need."""
    rows = [{"stage": p.name, "kind": p.kind, "reads": ", ".join(p.inputs) or "-", "status": p.status} for p in planned]
    console = stdout_console()
    _table(console, f"plan: {len(rows)} stages into {out} (nothing is written)", rows)
    for stage in planned:
        console.print(f"[bold]{stage.name}[/bold]: {stage.status}", markup=True)
        print_plan(stage.plan)
    console.print(
        f"[bold]all that will run[/bold]: memory at most about {readable_bytes(total['memory_bytes'])} a stage, "
        f"disk {readable_bytes(total['disk_bytes'])}"
    )
