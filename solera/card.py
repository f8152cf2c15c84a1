"""The model card: front matter for the hub, and a page that says where the model came from and what was measured."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from solera.licences import LicenceReport
from solera.lineage import Ancestor, hub_parents
from solera.report import verdict_sentence
from solera.results import (
    ModelResults,
    TaskResult,
    format_bytes,
    format_count,
    format_interval,
    format_value,
    lower_is_better,
    metric_label,
)
from solera_core.version import __version__

__all__ = ["MARK", "CardFacts", "base_model_relation", "render_card"]

MARK: Final = "<!-- written by solera -->"  # a card that bears this may be replaced by the next one
_TAGS: Final = {
    "merge": ["merge"],
    "moe": ["moe", "merge"],
    "moe-prune": ["moe", "pruned"],
    "moe-merge-experts": ["moe", "merge"],
    "distill": ["distilled"],
    "tune": ["fine-tuned"],
}
_KIND_WORDS: Final = {
    "merge": "a merge",
    "moe": "a mixture of experts built from dense models",
    "moe-prune": "a mixture of experts from which experts were left out",
    "moe-merge-experts": "a mixture of experts some of which were averaged",
    "distill": "a distilled model",
    "tune": "a fine-tune",
    "init": "a model trained from scratch",
    "given": "given",
}


@dataclass(frozen=True)
class CardFacts:
    """Everything a card says.

    Attributes:
        title: heading; also the name under which results are listed.
        summary: the user's own sentences.
        repo: `name/model`, or None for a directory that is not uploaded.
        kind: of the stage that made the model.
        lineage: where it came from.
        licence: as settled.
        record: its solera.json.
        config: its config.json.
        results: name -> measured results; `model` among them is this one.
        model: the key of this model in `results`.
        verdict: contents of verdict.json.
        recipe: text of the run's recipe, when the model came out of a run.
        has_report: whether report.html stands beside the card.
    """

    title: str
    summary: str
    repo: str | None
    kind: str
    lineage: Ancestor
    licence: LicenceReport
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    results: Mapping[str, ModelResults] = field(default_factory=dict[str, ModelResults])
    model: str | None = None
    verdict: Mapping[str, Any] | None = None
    recipe: str | None = None
    has_report: bool = False


def base_model_relation(kind: str, parents: Sequence[str]) -> str | None:
    """`merge` or `finetune`, None without a parent on the hub.

    Merges and mixtures are `merge`; a tuned or distilled model is a `finetune` of what its weights started from, unless
    that was itself blended from several models on the hub: then `merge`, for the hub knows one base of a fine-tune.
    """
    if not parents:
        return None
    return "merge" if kind in ("merge", "moe") or len(parents) > 1 else "finetune"


def render_card(facts: CardFacts) -> str:
    """The text of README.md."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("solera", "templates"),
        autoescape=False,  # noqa: S701  (Markdown: names pass through `text` or a fence instead)
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(text=_text, fence=_fence)
    body = environment.get_template("card.md.j2").render(
        facts=facts,
        mark=MARK,
        kind_words=_KIND_WORDS.get(facts.kind, facts.kind),
        source=facts.repo or "path/to/this/directory",
        size=_size(facts),
        built_with_llama=any((p.id or "").startswith("llama") for p in facts.licence.parents),
        lineage=list(_lineage_lines(facts.lineage)),
        table=_table(facts),
        verdict_sentence=verdict_sentence(facts.verdict) if facts.verdict else "",
        recipe=facts.recipe or yaml.safe_dump(facts.record.get("recipe") or {}, sort_keys=False, allow_unicode=True),
        command="solera run recipe.yml"
        if facts.recipe is not None
        else f"solera {facts.kind} recipe.yml out"
        if facts.kind in _TAGS
        else "",
        seed=facts.record.get("seed"),
        version=facts.record.get("solera", __version__),
        digest=facts.record.get("digest", ""),
    )
    return f"---\n{_front_matter(facts)}\n---\n\n{body}"


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    parents = hub_parents(facts.lineage)
    relation = base_model_relation(facts.kind, parents)
    data = ModelCardData(
        license=facts.licence.id,
        license_name=facts.licence.name if facts.licence.id == "other" else None,
        license_link=facts.licence.link if facts.licence.id == "other" else None,
        base_model=parents or None,
        library_name="transformers",
        pipeline_tag=_pipeline_tag(facts.config),
        tags=["solera", *_TAGS.get(facts.kind, [])],
        datasets=_hub_data(facts.lineage) or None,
    )
    if relation:
        data["base_model_relation"] = relation  # the hub knows it, ModelCardData has no field for it
    own = facts.results.get(facts.model or "")
    rows = [_eval_result(EvalResult, task, own) for task in own.tasks if math.isfinite(task.value)] if own else []
    if rows:
        data.model_name, data.eval_results = facts.title, rows
    return data.to_yaml()


def _eval_result(make: Any, task: TaskResult, model: ModelResults) -> Any:
    interval = {"n": task.n} | (
        {} if task.low is None or task.high is None else {"low": _rounded(task.low), "high": _rounded(task.high)}
    )
    return make(
        task_type="text-generation",
        task_name=task.domain,
        dataset_type=re.sub(r"[^A-Za-z0-9_.-]+", "-", task.name).strip("-") or "task",
        dataset_name=f"{task.name} ({model.suite})" if model.suite else task.name,
        metric_type=task.metric,
        metric_name=metric_label(task.metric),
        metric_value=_rounded(task.value),
        metric_args=interval,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _pipeline_tag(config: Mapping[str, Any]) -> str | None:
    architectures = [str(a) for a in config.get("architectures") or []]
    if any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        return "text-generation"
    return (
        "image-text-to-text"
        if any(a.endswith("ForConditionalGeneration") for a in architectures) and "vision_config" in config
        else None
    )


def _hub_data(ancestor: Ancestor) -> list[str]:
    """Hub ids of the data sets that went in, anywhere in the lineage made here."""
    found = [name.removeprefix("hub:") for name in ancestor.data if name.startswith("hub:")]
    for parent in ancestor.parents:
        found += _hub_data(parent)
    return list(dict.fromkeys(found))


def _size(facts: CardFacts) -> str:
    """`2.9M parameters, 1.7M of them active for each token, 11.6 MB`, as far as known."""
    own = facts.results.get(facts.model or "")
    checks = facts.record.get("checks") or {}
    total = (own and own.total) or checks.get("parameters")
    active = own.active if own else None
    stored = (own and own.bytes) or checks.get("bytes")
    parts = [f"{format_count(total)} parameters"] if total else []
    if active and total and active != total:
        parts.append(f"{format_count(active)} of them active for each token")
    if stored:
        parts.append(format_bytes(stored))
    return ", ".join(parts)


def _lineage_lines(ancestor: Ancestor, depth: int = 0, seen: set[str] | None = None) -> list[tuple[int, str]]:
    """(indentation, text) of a nested list; what was listed before is not unfolded again."""
    seen = set() if seen is None else seen
    key = ancestor.digest or ancestor.hub_id or ancestor.name
    again = key in seen and bool(ancestor.parents)
    seen.add(key)
    words = [f"**{_text(ancestor.hub_id or ancestor.name)}**"]
    if ancestor.revision:
        words.append(f"at `{ancestor.revision[:12]}`")
    what = [] if ancestor.kind == "given" else [ancestor.kind]
    if ancestor.role:
        what.append({"start": "the student's start", "teacher": "teacher"}.get(ancestor.role, ancestor.role))
    if ancestor.data and ancestor.kind != "given":
        what.append("text: " + ", ".join(_text(d) for d in ancestor.data))
    if again:
        what.append("as above")
    line = " ".join(words) + (f" ({'; '.join(what)})" if what else "")
    lines = [(depth, line)]
    if not again:
        for parent in ancestor.parents:
            lines += _lineage_lines(parent, depth + 1, seen)
    return lines


@dataclass(frozen=True)
class _Table:
    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _table(facts: CardFacts) -> _Table | None:
    """Tasks by models, this one first; the longer of the two runs down the page."""
    if not facts.results:
        return None
    order = sorted(facts.results, key=lambda name: name != facts.model)
    tasks: dict[str, TaskResult] = {}
    for name in order:
        for task in facts.results[name].tasks:
            tasks.setdefault(task.name, task)
    models = [_text(facts.title if name == facts.model else name) for name in order]
    sizes = [
        f"{format_count(facts.results[n].total)}, {format_bytes(facts.results[n].bytes)}".strip(", ") for n in order
    ]
    labels = [f"{_text(metric_label(t.metric))} {'↓' if lower_is_better(t.metric) else '↑'}" for t in tasks.values()]
    counts = [str(t.n) for t in tasks.values()]
    if len(order) > len(tasks):
        heads = [f"{_text(t.name)}<br>{label}, {t.n} items" for t, label in zip(tasks.values(), labels, strict=True)]
        by_model = [[_measured(facts, name, task) for task in tasks] for name in order]
        rows = [(m, s, *cells) for m, s, cells in zip(models, sizes, by_model, strict=True)]
        return _Table(("model", "size", *heads), tuple(rows))
    by_task = [[_measured(facts, name, task) for name in order] for task in tasks]
    rows = [(_text(t), *row, *c) for t, *row, c in zip(tasks, labels, counts, by_task, strict=True)]
    return _Table(("task", "metric", "items", *models), (*rows, ("size", "", "", *sizes)))


def _measured(facts: CardFacts, model: str, task: str) -> str:
    """One cell: the value, bold for this model, and its interval."""
    found = next((t for t in facts.results[model].tasks if t.name == task), None)
    if found is None:
        return ""
    interval = format_interval(found.low, found.high, found.metric)
    value = format_value(found.value, found.metric)
    value = f"**{value}**" if model == facts.model else value
    return f"{value}<br>{interval}" if interval else value


def _text(value: object) -> str:
    """Plain text inside Markdown, table cells included: one line, nothing in it read as markup."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", line)


def _fence(text: str, language: str = "") -> str:
    """A code block whose fence no line of the text can close."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    marks = "`" * (longest + 1)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint, {} when there is none to read."""
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
