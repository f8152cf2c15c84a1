"""A real pretrained model on real data: the 260K-parameter Llama, BLiMP and public-domain text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_core.context import Context
from solera_core.strict import parse
from solera_eval.config import EvalConfig
from solera_eval.records import Results, read_results
from solera_eval.run import evaluate

PAIRS = 150
# upstream's own sample of this model at temperature 0 (karpathy/llama2.c, doc/stories260K.md)
STORY = ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."


@pytest.fixture(scope="module")
def measured(
    shared_data: Path, make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Results], dict[str, Any]]:
    root = tmp_path_factory.mktemp("real")
    tasks: list[dict[str, Any]] = [
        {
            "name": "plays",
            "kind": "text",
            "data": {"path": str(shared_data / "text/tinyshakespeare.txt"), "chunk_chars": 500, "limit": 25},
        },
        {
            "name": "story",
            "kind": "generate",
            "data": "story.jsonl",
            "max_new_tokens": 60,
            "stop": ["\n"],
            "extract": r"(.*? ball\.)",
        },
    ]
    (root / "story.jsonl").write_text(json.dumps({"prompt": "Once upon a time", "answer": STORY}), encoding="utf-8")
    for paradigm in ("irregular_past_participle_verbs", "determiner_noun_agreement_1"):
        lines = (shared_data / "tasks/blimp" / f"{paradigm}.jsonl").read_text(encoding="utf-8").splitlines()[:PAIRS]
        rows = [json.loads(line) for line in lines]
        pairs = [{"choices": [row["sentence_bad"], row["sentence_good"]], "answer": 1} for row in rows]
        (root / f"{paradigm}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs), encoding="utf-8")
        tasks.append({"name": paradigm, "kind": "choice", "data": f"{paradigm}.jsonl", "domain": "grammar"})
    stories = shared_data / "weights/stories260K-hf"
    make_model(root / "damaged", base=stories, seed=1, noise=0.5)
    wanted = {
        "models": {"stories": str(stories), "damaged": "damaged"},
        "suites": [{"suite": "real", "tasks": tasks}],
        "gate": {"candidate": "damaged", "baseline": "stories", "tasks": {"story": {"tier": "advisory"}}},
    }
    out = evaluate(parse(EvalConfig, wanted, where="e"), root / "out", Context(base_dir=root))
    verdict = json.loads((out / "verdict.json").read_text(encoding="utf-8"))
    return {name: read_results(out / name) for name in ("stories", "damaged")}, verdict


def test_blimp_accuracy_is_the_known_one(measured: tuple[dict[str, Results], dict[str, Any]]) -> None:
    results = measured[0]["stories"]
    values = {task.name: task.value for task in results.tasks if task.kind == "choice"}
    # over all 1,000 pairs: 90.6 % and 68.0 % (71.5 % over eight paradigms); 150 pairs have a standard error of 3 points
    assert values["irregular_past_participle_verbs"] == pytest.approx(0.906, abs=0.07)
    assert values["determiner_noun_agreement_1"] == pytest.approx(0.68, abs=0.11)


def test_the_story_is_the_published_one(measured: tuple[dict[str, Results], dict[str, Any]]) -> None:
    (record,) = measured[0]["stories"].items_of("story").values()
    assert record.detail["extracted"] == STORY
    assert record.correct == 1


def test_perplexity_of_unseen_prose_is_between_certainty_and_chance(
    measured: tuple[dict[str, Results], dict[str, Any]],
) -> None:
    plays = measured[0]["stories"].task("plays")
    assert plays is not None
    assert plays.extra["chance"] == 512
    assert 80 < plays.value < 140
    assert plays.n == 25


def test_a_damaged_copy_fails(measured: tuple[dict[str, Results], dict[str, Any]]) -> None:
    verdict = measured[1]
    assert verdict["verdict"] == "FAIL"
    outcomes = {task["name"]: task["verdict"] for task in verdict["tasks"]}
    assert outcomes["plays"] == "FAIL"
    assert outcomes["irregular_past_participle_verbs"] == "FAIL"
