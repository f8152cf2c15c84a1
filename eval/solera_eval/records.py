"""The evidence on disk: `results.json` (figures with intervals) and `items.jsonl` (every item's score).

    results.json  {"schema": 1, "model": {...}, "suite": {"name", "digest"}, "tasks": [...], "settings": {...}}
    items.jsonl   one object an item: {"task", "item", "domain", "score", ...}
                    text      score = nll / tokens (nats; lower is better), nll, tokens, bytes
                    choice    score = correct, correct 0/1, prediction, logliks
                    generate  score = correct, correct 0/1, output, extracted

Everything a comparison needs is in these two files, so runs made elsewhere can be gated once they are written so.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from solera_core.errors import DataError
from solera_eval.config import Metric
from solera_eval.stats import perplexity, ratio_of_sums, wilson_interval

__all__ = ["ItemRecord", "Kind", "Results", "TaskResult", "read_results", "summarise", "write_results"]

SCHEMA = 1
Kind = Literal["text", "choice", "generate"]
METRIC_OF: Mapping[Kind, Metric] = {"text": "perplexity", "choice": "accuracy", "generate": "exact_match"}


@dataclass(frozen=True)
class ItemRecord:
    """One item's score, and what it was made of."""

    task: str
    item: str
    domain: str | None
    score: float
    detail: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """One line of items.jsonl."""
        return {"task": self.task, "item": self.item, "domain": self.domain, "score": self.score, **self.detail}

    @property
    def correct(self) -> int:
        """0 or 1 (choice and generate)."""
        return int(self.detail["correct"])

    @property
    def nll(self) -> float:
        """Summed negative log-likelihood in nats (text)."""
        return float(self.detail["nll"])

    @property
    def tokens(self) -> int:
        """Scored tokens (text)."""
        return int(self.detail["tokens"])

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of what was scored (text)."""
        return int(self.detail["bytes"])


@dataclass(frozen=True)
class TaskResult:
    """One figure with its two-sided 95 % interval.

    `extra` holds what else is known: `chance` (the figure of a model that knows nothing) always; for text also
    nll_per_token, bits_per_byte, tokens, bytes.
    """

    name: str
    kind: Kind
    domain: str | None
    metric: Metric
    value: float
    low: float | None
    high: float | None
    n: int
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """One model's evidence on one suite."""

    model: Mapping[str, Any]
    suite: Mapping[str, Any]
    tasks: Sequence[TaskResult]
    items: Sequence[ItemRecord]
    settings: Mapping[str, Any]
    where: str = ""

    def task(self, name: str) -> TaskResult | None:
        """The figure of a task."""
        return next((task for task in self.tasks if task.name == name), None)

    def items_of(self, task: str) -> dict[str, ItemRecord]:
        """A task's items by id."""
        return {record.item: record for record in self.items if record.task == task}


def summarise(
    name: str, kind: Kind, domain: str | None, records: Sequence[ItemRecord], extra: Mapping[str, Any]
) -> TaskResult:
    """The figure of a task from its items.

    Text: perplexity exp(sum nll / sum tokens), its interval from the document-clustered error of the log. 0/1 metrics:
    the share of right answers with the Wilson interval.
    """
    n = len(records)
    if kind == "text":
        nll, tokens = [r.nll for r in records], [r.tokens for r in records]
        estimate = ratio_of_sums(nll, tokens)
        low, high = estimate.bounds()
        sizes = {"tokens": sum(tokens), "bytes": sum(r.bytes for r in records)}
        figures = {
            "nll_per_token": estimate.value,
            "bits_per_byte": math.fsum(nll) / math.log(2) / sizes["bytes"],
            **sizes,
        }
        bounds = (perplexity(low), perplexity(high)) if n > 1 else (None, None)
        value = perplexity(estimate.value)
        return TaskResult(name, kind, domain, METRIC_OF[kind], value, bounds[0], bounds[1], n, {**extra, **figures})
    right = sum(r.correct for r in records)
    return TaskResult(name, kind, domain, METRIC_OF[kind], right / n, *wilson_interval(right, n), n, dict(extra))


def write_results(directory: Path, results: Results) -> None:
    """Write both files into an existing directory."""
    document = {
        "schema": SCHEMA,
        "model": results.model,
        "suite": results.suite,
        "tasks": [asdict(task) for task in results.tasks],
        "settings": results.settings,
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    (directory / "results.json").write_text(text + "\n", encoding="utf-8")
    with (directory / "items.jsonl").open("w", encoding="utf-8") as file:
        for record in results.items:
            file.write(json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False) + "\n")


def read_results(directory: Path) -> Results:
    """Read a result directory, wherever it was made.

    Raises:
        DataError: naming the file and what is wrong: absent, not this format, an item without its score, a task
            without items or items without a task, or counts that disagree.
    """
    file = directory / "results.json"
    document = _json_object(_text(file), str(file))
    if document.get("schema") != SCHEMA:
        raise DataError(
            f"{file}: schema {document.get('schema')!r}, expected {SCHEMA}; evaluate again with this version"
        )
    for key, kind in (("model", Mapping), ("suite", Mapping), ("tasks", list)):
        if not isinstance(document.get(key), kind):
            raise DataError(f"{file}: `{key}` is missing or not of the right kind")
    tasks = [_task(entry, f"{file}: tasks[{i}]") for i, entry in enumerate(document["tasks"])]
    kinds: dict[str, Kind] = {task.name: task.kind for task in tasks}
    if len(kinds) < len(tasks):
        raise DataError(f"{file}: a task name occurs twice")
    items_file = directory / "items.jsonl"
    items = list(_items(items_file, kinds))
    for task in tasks:
        found = sum(record.task == task.name for record in items)
        if found == 0 or found != task.n:
            raise DataError(
                f"{directory}: task {task.name!r} says n = {task.n}, but items.jsonl holds {found} of its items"
            )
    return Results(document["model"], document["suite"], tasks, items, document.get("settings", {}), str(directory))


def _task(entry: Any, where: str) -> TaskResult:
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: expected an object")
    missing = [key for key in ("name", "kind", "value", "n") if entry.get(key) is None]
    if missing:
        raise DataError(f"{where}: {', '.join(missing)} missing; a task without its figure cannot be judged")
    if entry["kind"] not in get_args(Kind):
        raise DataError(f"{where}: kind {entry['kind']!r} is none of {', '.join(get_args(Kind))}")
    kind = cast("Kind", entry["kind"])
    return TaskResult(
        name=str(entry["name"]),
        kind=kind,
        domain=entry.get("domain"),
        metric=METRIC_OF[kind],
        value=_number(entry, "value", where),
        low=entry.get("low"),
        high=entry.get("high"),
        n=int(_number(entry, "n", where)),
        extra=entry.get("extra") or {},
    )


def _items(file: Path, kinds: Mapping[str, Kind]) -> Iterator[ItemRecord]:
    seen: set[tuple[str, str]] = set()
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        row = _json_object(line, where)
        task, item = row.pop("task", None), row.pop("item", None)
        if not isinstance(item, str) or task not in kinds:
            raise DataError(f"{where}: needs `item` and a `task` of results.json, found {item!r} and {task!r}")
        if (task, item) in seen:
            raise DataError(f"{where}: item {item!r} of task {task!r} occurs twice")
        seen.add((task, item))
        if kinds[task] == "text":
            _number(row, "nll", where)
            if _number(row, "tokens", where) <= 0 or _number(row, "bytes", where) <= 0:
                raise DataError(f"{where}: `tokens` and `bytes` must be positive")
            default = row["nll"] / row["tokens"]
        else:
            if row.get("correct") not in (0, 1):
                raise DataError(f"{where}: `correct` must be 0 or 1, found {row.get('correct')!r}")
            default = float(row["correct"])
        domain = row.pop("domain", None)
        score = row.pop("score", None)
        yield ItemRecord(task, item, domain, default if score is None else float(score), row)


def _number(row: Mapping[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise DataError(f"{where}: `{key}` must be a finite number, found {value!r}")
    return value


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise DataError(f"{file}: no such file; {file.parent} is not a result directory") from e
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{file}: cannot be read as text: {e}") from e


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(f"{where}: not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {type(value).__name__}")
    return value
