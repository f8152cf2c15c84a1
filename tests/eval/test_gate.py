import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_core.errors import ConfigError, DataError
from solera_core.strict import parse
from solera_eval.config import GatePolicy
from solera_eval.gate import Verdict, compare, gate
from solera_eval.records import Results, read_results

MakeResults = Callable[..., Results]


def policy(**settings: Any) -> GatePolicy:
    return parse(GatePolicy, settings, where="policy")


def answers(n: int, right: int) -> list[int]:
    return [1] * right + [0] * (n - right)


def texts(n: int, factor: float = 1.0, spread: float = 0.0, seed: int = 0) -> list[tuple[float, int]]:
    draw = random.Random(seed)
    sizes = random.Random(1)
    return [
        (tokens * (2.0 + math.log(factor) + spread * draw.gauss(0, 1)), tokens)
        for tokens in (sizes.randrange(50, 150) for _ in range(n))
    ]


def judge(make: MakeResults, before: list[Any], after: list[Any], **settings: Any) -> Verdict:
    return compare(make("before", {"t": before}), make("after", {"t": after}), policy(**settings))


# 0/1 metrics


@pytest.mark.parametrize(
    ("lost", "gained", "n", "outcome"),
    [
        (0, 0, 1000, "PASS"),
        (10, 10, 1000, "PASS"),
        (0, 50, 1000, "PASS"),
        (20, 5, 1000, "INCONCLUSIVE"),
        (60, 10, 1000, "FAIL"),
        (0, 0, 100, "INCONCLUSIVE"),  # nothing changed, yet 100 items allow a drop of 2.6 points
    ],
)
def test_accuracy_is_judged_by_the_margin(
    make_results: MakeResults, lost: int, gained: int, n: int, outcome: str
) -> None:
    right = int(0.8 * n)
    after = answers(n, right)
    after[:lost] = [0] * lost
    after[right : right + gained] = [1] * gained
    (task,) = judge(make_results, answers(n, right), after, margin=0.02).tasks
    assert (task.verdict, task.lost, task.gained, task.n) == (outcome, lost, gained, n)
    assert task.effect == pytest.approx((gained - lost) / n)
    assert task.bound == task.low
    if outcome == "INCONCLUSIVE":
        assert task.n_needed is not None
        assert task.n_needed > n
        assert str(task.n_needed) in task.reasons[0]
    else:
        assert (task.n_needed, task.reasons) == (None, ())


def test_generated_answers_use_their_own_margin(make_results: MakeResults) -> None:
    before = make_results("before", {"t": answers(400, 300)}, kind="generate")
    after = make_results("after", {"t": answers(400, 290)}, kind="generate")
    assert compare(before, after, policy(margin={"accuracy": 0.05})).verdict == "PASS"
    strict = compare(before, after, policy(margin={"accuracy": 0.05, "exact_match": 0.01}))
    assert (strict.verdict, strict.tasks[0].metric, strict.tasks[0].margin) == ("FAIL", "exact_match", 0.01)


# perplexity


@pytest.mark.parametrize(
    ("factor", "spread", "outcome"),
    [(1.0, 0.0, "PASS"), (1.02, 0.02, "PASS"), (0.5, 0.1, "PASS"), (1.2, 0.05, "FAIL"), (1.04, 0.2, "INCONCLUSIVE")],
)
def test_perplexity_is_judged_by_the_ratio(
    make_results: MakeResults, factor: float, spread: float, outcome: str
) -> None:
    verdict = judge(make_results, texts(60), texts(60, factor, spread), margin={"perplexity": 1.05})
    (task,) = verdict.tasks
    assert task.verdict == verdict.verdict == outcome
    assert task.effect == pytest.approx(factor, rel=0.08)
    assert task.baseline == pytest.approx(math.exp(2))
    assert task.candidate == pytest.approx(task.baseline * task.effect)
    assert task.bound == task.high
    assert (task.n_needed is not None and task.n_needed > 60) == (outcome == "INCONCLUSIVE")
    assert "ratio" in task.to_json()
    assert "difference" not in task.to_json()


def test_another_tokenizer_is_compared_over_the_same_text(make_results: MakeResults) -> None:
    before = make_results("before", {"t": texts(60)})
    after = make_results("after", {"t": texts(60)})
    rows = [json.loads(line) for line in (Path(after.where) / "items.jsonl").read_text().splitlines()]
    for row in rows:
        row["tokens"] *= 2  # half as much per token, the same for the text
    (Path(after.where) / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdict = gate(Path(before.where), Path(after.where), policy())
    assert verdict.tasks[0].effect == 1.0
    assert any("tokens differ" in reason for reason in verdict.reasons)


# the whole


def test_the_gate_is_the_intersection_of_its_critical_tasks(make_results: MakeResults) -> None:
    good, bad, unsure = answers(2000, 1600), answers(2000, 1400), answers(2000, 1570)
    before = make_results("before", {"a": good, "b": good, "c": good})
    mixed = make_results("mixed", {"a": good, "b": bad, "c": unsure})
    assert [t.verdict for t in compare(before, mixed, policy()).tasks] == ["PASS", "FAIL", "INCONCLUSIVE"]
    assert compare(before, mixed, policy()).verdict == "FAIL"
    without_b = policy(tasks={"b": {"tier": "advisory"}})
    assert compare(before, mixed, without_b).verdict == "INCONCLUSIVE"
    assert compare(before, mixed, without_b).exit_code == 2
    only_a = policy(tasks={"b": {"tier": "advisory"}, "c": {"tier": "advisory"}})
    assert (compare(before, mixed, only_a).verdict, compare(before, mixed, only_a).exit_code) == ("PASS", 0)
    with pytest.raises(ConfigError, match="every task is advisory"):
        compare(before, mixed, policy(tasks={name: {"tier": "advisory"} for name in "abc"}))


def test_exceptions_name_known_tasks_and_fit_their_metric(make_results: MakeResults) -> None:
    before = make_results("before", {"acc": answers(2000, 1600), "ppl": texts(60)})
    with pytest.raises(ConfigError, match=r"'ac' is no task here \(did you mean 'acc'\?\)"):
        compare(before, before, policy(tasks={"ac": {}}))
    with pytest.raises(ConfigError, match=r"gate.tasks.ppl.margin: 0.5 .* a ratio above 1"):
        compare(before, before, policy(tasks={"ppl": {"margin": 0.5}}))
    with pytest.raises(ConfigError, match=r"gate.tasks.acc.margin: 1.05 .* an absolute drop"):
        compare(before, before, policy(tasks={"acc": {"margin": 1.05}}))
    verdict = compare(before, before, policy(tasks={"ppl": {"margin": 1.5}, "acc": {"margin": 0.1}}))
    assert [t.margin for t in verdict.tasks] == [0.1, 1.5]


def test_few_items_are_inconclusive_whatever_they_show(make_results: MakeResults) -> None:
    for after in (texts(15), texts(15, 3.0)):
        (task,) = judge(make_results, texts(15), after).tasks
        assert (task.verdict, task.n_needed) == ("INCONCLUSIVE", 20)
        assert "fewer than minimum_items: 20" in task.reasons[-1]
    (task,) = judge(make_results, texts(15), texts(15), minimum_items=10).tasks
    assert task.verdict == "PASS"


def test_a_single_document_has_no_bound(make_results: MakeResults) -> None:
    (task,) = judge(make_results, texts(1), texts(1, 9.0), minimum_items=2).tasks
    assert (task.verdict, task.bound, task.low, task.high, task.n_needed) == ("INCONCLUSIVE", None, None, None, 2)
    assert json.loads(json.dumps(task.to_json(), allow_nan=False))["bound"] is None


# guards


def test_a_baseline_at_chance_certifies_nothing(make_results: MakeResults) -> None:
    guessing = answers(4000, 2000)  # two choices each
    verdict = judge(make_results, guessing, guessing)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "not shown to beat chance (50.0%)" in verdict.reasons[0]
    assert verdict.tasks[0].n_needed is None
    barely = judge(make_results, answers(1000, 540), answers(1000, 540)).tasks[0]
    assert barely.verdict == "INCONCLUSIVE"
    assert barely.n_needed is not None
    assert barely.n_needed > 1000
    fallen = judge(make_results, guessing, answers(4000, 1000))
    assert fallen.verdict == "FAIL"  # worse is worse, whatever the baseline


def test_a_baseline_that_answers_nothing_certifies_nothing(make_results: MakeResults) -> None:
    before = make_results("before", {"t": answers(1000, 5)}, kind="generate")
    assert compare(before, before, policy()).verdict == "INCONCLUSIVE"
    better = make_results("before", {"t": answers(1000, 100)}, kind="generate")
    assert compare(better, better, policy()).verdict == "PASS"


def test_an_untrained_baseline_certifies_nothing(make_results: MakeResults) -> None:
    before = make_results("before", {"t": texts(60)}, vocabulary=7)  # exp(2) = 7.4
    verdict = compare(before, before, policy())
    assert verdict.verdict == "INCONCLUSIVE"
    assert "uniform guess over the vocabulary (7)" in verdict.reasons[0]
    unknown = make_results("before", {"t": texts(60)}, vocabulary=None)
    assert "chance level is unknown" in compare(unknown, unknown, policy()).reasons[0]


def test_the_same_model_is_named(make_results: MakeResults) -> None:
    before = make_results("before", {"t": texts(60)})
    assert "candidate and baseline are the same model" in compare(before, before, policy()).reasons


# failing closed


def test_unmatched_items_are_named(make_results: MakeResults) -> None:
    before = make_results("before", {"t": answers(3, 2)}, ids=["a", "b", "c"])
    after = make_results("after", {"t": answers(3, 2)}, ids=["a", "b", "x"])
    with pytest.raises(DataError, match=r"'t': items without a partner .*only in the baseline: c; .*candidate: x"):
        compare(before, after, policy())


def test_a_missing_task_is_named_either_way(make_results: MakeResults) -> None:
    both = make_results("both", {"t": answers(3, 2), "u": answers(3, 2)})
    one = make_results("one", {"t": answers(3, 2)})
    with pytest.raises(DataError, match="candidate has no results for u"):
        compare(both, one, policy())
    with pytest.raises(DataError, match="baseline has no results for u"):
        compare(one, both, policy())


def test_different_suites_texts_and_kinds_are_refused(make_results: MakeResults) -> None:
    before = make_results("before", {"t": texts(30)})
    with pytest.raises(DataError, match="different suites"):
        compare(before, make_results("after", {"t": texts(30)}, digest="sha256:other"), policy())
    with pytest.raises(DataError, match="did not score the same text"):
        compare(before, make_results("after", {"t": [(nll, n + 1) for nll, n in texts(30)]}), policy())
    with pytest.raises(DataError, match="of kind text for the baseline"):
        compare(before, make_results("after", {"t": answers(30, 20)}), policy())


def test_results_without_a_suite_digest_are_judged_and_said_so(make_results: MakeResults) -> None:
    before = make_results("before", {"t": texts(60)})
    foreign = make_results("after", {"t": texts(60)}, digest=None)
    verdict = compare(before, foreign, policy())
    assert verdict.verdict == "PASS"
    assert any("the candidate's results name no suite digest" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("results.json", lambda d: {**d, "schema": 9}, "schema 9"),
        ("results.json", lambda d: {k: v for k, v in d.items() if k != "suite"}, "`suite` is missing"),
        ("results.json", lambda d: {**d, "tasks": [{**d["tasks"][0], "value": None}]}, "value missing"),
        ("results.json", lambda d: {**d, "tasks": [{**d["tasks"][0], "kind": "vibes"}]}, "kind 'vibes'"),
        ("results.json", lambda d: {**d, "tasks": d["tasks"] * 2}, "occurs twice"),
        ("results.json", lambda d: {**d, "tasks": [{**d["tasks"][0], "n": 4}]}, "n = 4"),
        ("items.jsonl", lambda d: {**d, "nll": None}, r"items\.jsonl:1: `nll` must be a finite number"),
        ("items.jsonl", lambda d: {**d, "nll": float("nan")}, "must be a finite number, found nan"),
        ("items.jsonl", lambda d: {**d, "tokens": 0}, "must be positive"),
        ("items.jsonl", lambda d: {**d, "task": "u"}, "needs `item` and a `task`"),
        ("items.jsonl", lambda d: {**d, "item": "i1"}, "occurs twice"),
    ],
)
def test_damaged_results_are_refused(
    make_results: MakeResults, file: str, change: Callable[[dict[str, Any]], dict[str, Any]], said: str
) -> None:
    directory = Path(make_results("before", {"t": texts(30)}).where)
    path = directory / file
    if file == "results.json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        first, *rest = path.read_text().splitlines(keepends=True)
        path.write_text(json.dumps(change(json.loads(first))) + "\n" + "".join(rest))
    with pytest.raises(DataError, match=said):
        gate(directory, directory, policy())


def test_a_wrong_answer_record_is_refused(make_results: MakeResults) -> None:
    directory = Path(make_results("before", {"t": answers(3, 1)}).where)
    text = (directory / "items.jsonl").read_text()
    (directory / "items.jsonl").write_text(text.replace('"correct": 1', '"correct": 0.5'))
    with pytest.raises(DataError, match=r"`correct` must be 0 or 1, found 0\.5"):
        read_results(directory)


def test_a_directory_without_results_is_refused(tmp_path: Path, make_results: MakeResults) -> None:
    whole = Path(make_results("before", {"t": texts(30)}).where)
    with pytest.raises(DataError, match="is not a result directory"):
        gate(whole, tmp_path / "nowhere", policy())
    (whole / "items.jsonl").unlink()
    with pytest.raises(DataError, match=r"items\.jsonl: no such file"):
        gate(whole, whole, policy())


def test_results_survive_the_disk(make_results: MakeResults) -> None:
    made = make_results("before", {"t": texts(30), "u": answers(30, 20)})
    read = read_results(Path(made.where))
    assert (read.tasks, read.items, read.suite) == (made.tasks, made.items, made.suite)
