"""What a blend or a student keeps of a specialist: the share of its gain, and which answers changed.

    retention = (NLL_base - NLL_model) / (NLL_base - NLL_specialist)      on one domain's documents

    retention = (right_model - right_base) / (right_specialist - right_base)  on its answers, where it has no text task

1 means all that fine-tuning taught is still there, 0 that the model is as good as the base, below 0 worse than it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from solera_core.errors import DataError
from solera_eval.records import ItemRecord, Results
from solera_eval.stats import fieller_interval, ratio_of_sums

__all__ = ["Churn", "Retention", "churn", "retention"]


@dataclass(frozen=True)
class Retention:
    """The share of a specialist's gain that a model keeps on one domain.

    Attributes:
        kept: the share, or None where the specialist has no gain to keep.
        low: lower, and `high` upper end of the two-sided interval (Fieller, documents as clusters).
        gain: the specialist's gain over the base: nats per token, or the share of right answers.
        gain_low: its two-sided interval's lower, and `gain_high` its upper end.
        documents: how many items were compared.
        reason: why there is no share or no interval.
        measured_on: what the share is of: `text`, or `answers` where the domain has no text task.
    """

    domain: str | None
    kept: float | None
    low: float | None
    high: float | None
    gain: float
    gain_low: float | None
    gain_high: float | None
    documents: int
    reason: str | None = None
    measured_on: Literal["text", "answers"] = "text"

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def retention(
    base: Results, specialist: Results, model: Results, *, domain: str | None, confidence: float = 0.95
) -> Retention:
    """Retention on the items of one domain, paired over the three results: on its text, else on its answers.

    A specialist whose gain is not shown to be above 0 gives no share: a ratio to nothing means nothing.

    Raises:
        DataError: no item of the domain, or items that one of the three lacks.
    """
    measured_on: Literal["text", "answers"] = "text" if _items(base, domain, "text") else "answers"
    triples = _triples(base, specialist, model, domain, measured_on)
    gains = [_better(s, b, measured_on) for b, s, _ in triples]
    kept = [_better(m, b, measured_on) for b, _, m in triples]
    gain = ratio_of_sums(gains, [b.tokens if measured_on == "text" else 1 for b, _, _ in triples])
    gain_low, gain_high = gain.bounds(confidence) if len(triples) > 1 else (None, None)
    share, reason = None, None
    interval = fieller_interval(kept, gains, confidence)
    if gain.value <= 0:
        reason = "the specialist is not better than the base on this domain"
    else:
        share = math.fsum(kept) / math.fsum(gains)
        if interval is None or gain_low is None or gain_low <= 0:
            interval = None
            reason = "the specialist's gain is not shown to be above 0, so the share has no interval"
    low, high = interval if share is not None and interval is not None else (None, None)
    return Retention(domain, share, low, high, gain.value, gain_low, gain_high, len(triples), reason, measured_on)


def _better(model: ItemRecord, base: ItemRecord, measured_on: Literal["text", "answers"]) -> float:
    """By how much a model does better than the base on one item: nats, or 1 for an answer that became right."""
    return base.nll - model.nll if measured_on == "text" else float(model.correct - base.correct)


@dataclass(frozen=True)
class Churn:
    """Answers that changed on the items of one task: equal accuracy can hide many of them."""

    task: str
    lost: int
    gained: int
    kept: int
    never: int

    @property
    def changed(self) -> float:
        """Share of items whose correctness changed."""
        return (self.lost + self.gained) / (self.lost + self.gained + self.kept + self.never)

    def to_json(self) -> dict[str, Any]:
        """All fields and the share changed."""
        return {**asdict(self), "changed": self.changed}


def churn(baseline: Results, candidate: Results, *, task: str) -> Churn:
    """Lost and gained answers of a choice or generate task.

    Raises:
        DataError: not a 0/1 task of both, or items without a partner.
    """
    for results in (baseline, candidate):
        found = results.task(task)
        if found is None or found.kind == "text":
            raise DataError(f"{results.where or 'results'}: {task!r} is no choice or generate task there")
    ours, theirs = baseline.items_of(task), candidate.items_of(task)
    if ours.keys() != theirs.keys():
        raise DataError(f"task {task!r}: items without a partner: {', '.join(sorted(ours.keys() ^ theirs.keys())[:5])}")
    pairs = [(record.correct, theirs[item].correct) for item, record in ours.items()]
    return Churn(task, pairs.count((1, 0)), pairs.count((0, 1)), pairs.count((1, 1)), pairs.count((0, 0)))


def _triples(
    base: Results,
    specialist: Results,
    model: Results,
    domain: str | None,
    measured_on: Literal["text", "answers"],
) -> Sequence[tuple[ItemRecord, ItemRecord, ItemRecord]]:
    keyed = [_items(results, domain, measured_on) for results in (base, specialist, model)]
    for results, items in zip((base, specialist, model), keyed, strict=True):
        if not items:
            raise DataError(f"{results.where or 'results'}: no item of domain {domain!r}")
        odd = sorted(f"{task}/{item}" for task, item in items.keys() ^ keyed[0].keys())
        if odd:
            raise DataError(f"{results.where or 'results'}: items without a partner: {', '.join(odd[:5])}")
    return [(record, keyed[1][key], keyed[2][key]) for key, record in keyed[0].items()]


def _items(
    results: Results, domain: str | None, measured_on: Literal["text", "answers"]
) -> dict[tuple[str, str], ItemRecord]:
    tasks = {task.name for task in results.tasks if (task.kind == "text") == (measured_on == "text")}
    return {(r.task, r.item): r for r in results.items if r.task in tasks and r.domain == domain}
