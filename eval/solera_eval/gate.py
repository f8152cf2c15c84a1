"""The verdict: is the candidate not worse than the baseline by more than the margin, with confidence?

Per task, on the items both models answered:

    0/1 metrics   difference = candidate - baseline.  PASS: Tango's lower bound > -margin.  FAIL: upper bound < -margin.
    perplexity    ratio = candidate / baseline.       PASS: upper bound < margin.           FAIL: lower bound > margin.
    otherwise     INCONCLUSIVE, with the number of items that would settle it with 80 % power.

The gate passes when every critical task passes (an intersection-union test: no correction for the number of tasks is
needed), fails when one fails, and is inconclusive in between. It fails closed: items without a partner, a missing
score or different suites are errors, too few items or a baseline that knows nothing are INCONCLUSIVE.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from solera_core.errors import ConfigError, DataError
from solera_core.strict import did_you_mean
from solera_eval.config import GatePolicy, Metric, TaskPolicy
from solera_eval.records import ItemRecord, Results, TaskResult, read_results
from solera_eval.stats import (
    documents_needed,
    items_needed_above,
    paired_items_needed,
    perplexity,
    ratio_of_sums,
    tango_lower,
    tango_upper,
    wilson_lower,
)

__all__ = ["Outcome", "TaskVerdict", "Verdict", "check_policy", "compare", "gate"]

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
EXIT_CODES: Mapping[Outcome, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2}
_SHOWN = 5  # ids named in an error


@dataclass(frozen=True)
class TaskVerdict:
    """One task's evidence and what it shows.

    Attributes:
        effect: candidate - baseline for 0/1 metrics, candidate / baseline for perplexity.
        bound: the end of the one-sided interval that must be inside the margin for a PASS.
        low: the lower, and `high` the upper one-sided bound of the effect, both at the policy's confidence.
        margin: as the metric states it (0.02, or 1.05).
        n_needed: items for a decision with 80 % power, when INCONCLUSIVE and more items can help.
        lost: items only the baseline got right, and `gained` only the candidate (0/1 metrics).
    """

    name: str
    metric: Metric
    tier: Literal["critical", "advisory"]
    n: int
    baseline: float
    candidate: float
    effect: float
    low: float | None
    high: float | None
    bound: float | None
    margin: float
    verdict: Outcome
    n_needed: int | None = None
    lost: int | None = None
    gained: int | None = None
    reasons: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As in verdict.json: the effect is called what it is, `ratio` or `difference`."""
        return {
            "name": self.name,
            "metric": self.metric,
            "tier": self.tier,
            "n": self.n,
            "baseline": self.baseline,
            "candidate": self.candidate,
            "ratio" if self.metric == "perplexity" else "difference": self.effect,
            "low": self.low,
            "high": self.high,
            "bound": self.bound,
            "margin": self.margin,
            "verdict": self.verdict,
            "n_needed": self.n_needed,
            "lost": self.lost,
            "gained": self.gained,
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True)
class Verdict:
    """The gate's answer."""

    verdict: Outcome
    candidate: str
    baseline: str
    policy: GatePolicy
    tasks: tuple[TaskVerdict, ...]
    reasons: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 PASS, 1 FAIL, 2 INCONCLUSIVE."""
        return EXIT_CODES[self.verdict]

    def to_json(self) -> dict[str, Any]:
        """As in verdict.json."""
        return {
            "verdict": self.verdict,
            "candidate": self.candidate,
            "baseline": self.baseline,
            "policy": self.policy.model_dump(mode="json"),
            "tasks": [task.to_json() for task in self.tasks],
            "reasons": list(self.reasons),
        }


def gate(baseline_dir: Path, candidate_dir: Path, policy: GatePolicy) -> Verdict:
    """Judge two result directories.

    Raises:
        DataError: results that cannot be read, tasks or items without a partner, or different suites.
        ConfigError: a policy that names unknown tasks, a margin that makes no sense for its task, or no critical task.
    """
    return compare(read_results(baseline_dir), read_results(candidate_dir), policy)


def compare(baseline: Results, candidate: Results, policy: GatePolicy) -> Verdict:
    """Judge two results in memory; see `gate`."""
    check_policy(policy, {task.name: task.metric for task in baseline.tasks})
    _check_partners(baseline, candidate)
    tasks = tuple(_judge(task, baseline, candidate, policy) for task in baseline.tasks)
    critical = [task for task in tasks if task.tier == "critical"]
    verdict: Outcome = "PASS"
    for outcome in ("INCONCLUSIVE", "FAIL"):
        if any(task.verdict == outcome for task in critical):
            verdict = outcome
    reasons = [f"{task.name}: {reason}" for task in tasks for reason in task.reasons]
    digests = [results.model.get("digest") for results in (baseline, candidate)]
    if digests[0] is not None and digests[0] == digests[1]:
        reasons.append("candidate and baseline are the same model")
    for side, results in (("baseline", baseline), ("candidate", candidate)):
        if results.suite.get("digest") is None:
            reasons.append(f"the {side}'s results name no suite digest; that the settings agree was not checked")
    return Verdict(
        verdict,
        policy.candidate or str(candidate.model.get("name") or candidate.where),
        policy.baseline or str(baseline.model.get("name") or baseline.where),
        policy,
        tasks,
        tuple(reasons),
    )


def check_policy(policy: GatePolicy, metrics: Mapping[str, Metric]) -> None:
    """Refuse a policy that does not fit the tasks (name -> metric), before anything is scored.

    Raises:
        ConfigError: an unknown task, a margin in the wrong unit, or no critical task.
    """
    for name in policy.tasks:
        if name not in metrics:
            raise ConfigError(f"gate.tasks: {name!r} is no task here{did_you_mean(name, metrics)}")
    for name, metric in metrics.items():
        margin = _margin(policy, name, metric)
        if (metric == "perplexity") != (margin > 1):
            unit = "a ratio above 1" if metric == "perplexity" else "an absolute drop between 0 and 1"
            raise ConfigError(f"gate.tasks.{name}.margin: {margin} is no margin for {metric}; give {unit}")
    if all(policy.tasks.get(name, TaskPolicy()).tier == "advisory" for name in metrics):
        raise ConfigError("gate.tasks: every task is advisory, so nothing could fail; make at least one critical")


def _check_partners(baseline: Results, candidate: Results) -> None:
    sides = {"baseline": baseline, "candidate": candidate}
    for side, other in (("baseline", "candidate"), ("candidate", "baseline")):
        missing = [t.name for t in sides[side].tasks if sides[other].task(t.name) is None]
        if missing:
            raise DataError(
                f"{sides[other].where or other}: the {other} has no results for {', '.join(missing)}, which the {side} "
                "has; evaluate both on the same suite"
            )
    for task in baseline.tasks:
        partner = candidate.task(task.name)
        if partner is None or partner.kind != task.kind:
            raise DataError(f"task {task.name!r} is of kind {task.kind} for the baseline, but not for the candidate")
        ours, theirs = baseline.items_of(task.name), candidate.items_of(task.name)
        only = {"baseline": [i for i in ours if i not in theirs], "candidate": [i for i in theirs if i not in ours]}
        if any(only.values()):
            named = "; ".join(
                f"{len(ids)} only in the {side}: {', '.join(ids[:_SHOWN])}{', ...' if len(ids) > _SHOWN else ''}"
                for side, ids in only.items()
                if ids
            )
            raise DataError(f"task {task.name!r}: items without a partner ({named}); evaluate both on the same suite")
        for item, record in ours.items():
            if task.kind == "text" and record.bytes != theirs[item].bytes:
                raise DataError(
                    f"task {task.name!r}, item {item!r}: {record.bytes} bytes for the baseline, {theirs[item].bytes} "
                    "for the candidate; they did not score the same text"
                )
    digests = [results.suite.get("digest") for results in (baseline, candidate)]
    if None not in digests and digests[0] != digests[1]:
        raise DataError(
            f"{baseline.where or 'baseline'} and {candidate.where or 'candidate'} were made with different suites "
            f"({str(digests[0])[:20]}... and {str(digests[1])[:20]}...): settings or texts differ; "
            "evaluate both on the same one"
        )


def _margin(policy: GatePolicy, name: str, metric: Metric) -> float:
    own = policy.tasks.get(name, TaskPolicy()).margin
    return policy.margin.of(metric) if own is None else own


def _judge(result: TaskResult, baseline: Results, candidate: Results, policy: GatePolicy) -> TaskVerdict:
    ours, theirs = baseline.items_of(result.name), candidate.items_of(result.name)
    pairs = [(record, theirs[item]) for item, record in ours.items()]
    margin = _margin(policy, result.name, result.metric)
    tier = policy.tasks.get(result.name, TaskPolicy()).tier
    if result.kind != "text":
        return _judge_binary(result, pairs, margin, tier, policy)
    verdict = _judge_text(result, pairs, margin, tier, policy)
    partner = candidate.task(result.name)
    spans = [found.extra.get("window_tokens") for found in (result, partner) if found is not None]
    if len(set(spans)) > 1:  # a longer context sees more of each text
        reason = f"scored in windows of {spans[0]} (baseline) and {spans[1]} (candidate) tokens: the contexts differ"
        return replace(verdict, reasons=(*verdict.reasons, reason))
    return verdict


def _judge_binary(
    result: TaskResult,
    pairs: Sequence[tuple[ItemRecord, ItemRecord]],
    margin: float,
    tier: Literal["critical", "advisory"],
    policy: GatePolicy,
) -> TaskVerdict:
    n = len(pairs)
    right_before, right_after = sum(b.correct for b, _ in pairs), sum(c.correct for _, c in pairs)
    lost = sum(b.correct > c.correct for b, c in pairs)
    gained = sum(c.correct > b.correct for b, c in pairs)
    low, high = tango_lower(lost, gained, n, policy.confidence), tango_upper(lost, gained, n, policy.confidence)
    outcome: Outcome = "PASS" if low > -margin else "FAIL" if high < -margin else "INCONCLUSIVE"
    needed: int | None = None
    reasons: list[str] = []
    if outcome == "INCONCLUSIVE":
        needed = paired_items_needed(lost, gained, n, margin=margin, confidence=policy.confidence)
        reasons.append(
            f"a drop of {-low:.2%} cannot be excluded (margin {margin:.2%}, {n} items); {_settled_by(needed, 'items')}"
        )
    outcome, needed = _enough(outcome, n, policy, needed, reasons)
    chance = _chance(result, pairs)
    if chance is None:
        reasons.append("the chance level is unknown; whether the baseline beats it was not checked")
    elif outcome != "FAIL" and (shown := wilson_lower(right_before, n, policy.confidence)) <= chance + margin:
        # assay sensitivity: a model that guesses would pass, so passing says nothing
        if outcome == "PASS":
            needed = items_needed_above(right_before / n, chance + margin, confidence=policy.confidence)
        outcome = "INCONCLUSIVE"
        reasons.append(
            f"the baseline is not shown to beat chance ({chance:.1%}) by more than the margin: {right_before} of {n} "
            f"right, at least {shown:.1%} with confidence; a model that guesses would not fail here"
        )
    return TaskVerdict(
        name=result.name,
        metric=result.metric,
        tier=tier,
        n=n,
        baseline=right_before / n,
        candidate=right_after / n,
        effect=(right_after - right_before) / n,
        low=low,
        high=high,
        bound=low,
        margin=margin,
        verdict=outcome,
        n_needed=needed,
        lost=lost,
        gained=gained,
        reasons=tuple(reasons),
    )


def _judge_text(
    result: TaskResult,
    pairs: Sequence[tuple[ItemRecord, ItemRecord]],
    margin: float,
    tier: Literal["critical", "advisory"],
    policy: GatePolicy,
) -> TaskVerdict:
    n = len(pairs)
    tokens = [b.tokens for b, _ in pairs]
    before = ratio_of_sums([b.nll for b, _ in pairs], tokens)
    after = ratio_of_sums([c.nll for _, c in pairs], tokens)
    log_ratio = ratio_of_sums([c.nll - b.nll for b, c in pairs], tokens)
    low, high = perplexity(log_ratio.lower(policy.confidence)), perplexity(log_ratio.upper(policy.confidence))
    outcome: Outcome = "PASS" if high < margin else "FAIL" if low > margin else "INCONCLUSIVE"
    needed: int | None = None
    reasons: list[str] = []
    if outcome == "INCONCLUSIVE":
        needed = documents_needed(log_ratio, margin=margin, confidence=policy.confidence)
        needed = None if needed is None else max(needed, n + 1)
        reasons.append(
            f"a perplexity ratio of {high:.4f} cannot be excluded (margin {margin:.4f}, {n} documents); "
            f"{_settled_by(needed, 'documents')}"
        )
    outcome, needed = _enough(outcome, n, policy, needed, reasons)
    if any(b.tokens != c.tokens for b, c in pairs):
        reasons.append("the models' tokens differ; both perplexities are over the baseline's tokens, for the same text")
    chance = result.extra.get("chance")
    if chance is None:
        reasons.append("the chance level is unknown; whether the baseline beats it was not checked")
    elif outcome != "FAIL" and before.upper(policy.confidence) + math.log(margin) >= math.log(chance):
        outcome = "INCONCLUSIVE"
        reasons.append(
            f"the baseline (perplexity {perplexity(before.value):.1f}) is not shown to beat a uniform guess over the "
            f"vocabulary ({chance}) by more than the margin; an untrained model would not fail here"
        )
    return TaskVerdict(
        name=result.name,
        metric=result.metric,
        tier=tier,
        n=n,
        baseline=perplexity(before.value),
        candidate=perplexity(after.value),
        effect=perplexity(log_ratio.value),
        low=low if n > 1 else None,
        high=high if n > 1 else None,
        bound=high if n > 1 else None,
        margin=margin,
        verdict=outcome,
        n_needed=needed,
        reasons=tuple(reasons),
    )


def _enough(
    outcome: Outcome, n: int, policy: GatePolicy, needed: int | None, reasons: list[str]
) -> tuple[Outcome, int | None]:
    if n >= policy.minimum_items:
        return outcome, needed
    reasons.append(f"{n} items are fewer than minimum_items: {policy.minimum_items}")
    return "INCONCLUSIVE", max(policy.minimum_items, needed or 0)


def _settled_by(needed: int | None, unit: str) -> str:
    if needed is None:
        return "what was seen is too near the margin, or too little, for any number to be named"
    return f"about {needed} {unit} would settle it with 80 % power if what was seen is true"


def _chance(result: TaskResult, pairs: Sequence[tuple[ItemRecord, ItemRecord]]) -> float | None:
    """Expected share of right answers of a model that guesses: the mean of 1 / choices; 0 for generated answers."""
    if result.kind == "generate":
        return 0.0
    counts = [len(b.detail["logliks"]) for b, _ in pairs if b.detail.get("logliks")]
    if len(counts) == len(pairs):
        return math.fsum(1 / count for count in counts) / len(counts)
    given = result.extra.get("chance")
    return None if given is None else float(given)
