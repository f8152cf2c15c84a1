"""The same figures as lm-evaluation-harness on the same model, computed by its own model class and tasks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_core.causal_lm import load_model, load_tokenizer
from solera_core.context import Context
from solera_core.strict import parse
from solera_eval.config import EvalConfig
from solera_eval.records import Results, read_results
from solera_eval.run import evaluate

pytest.importorskip("lm_eval", reason="the harness is an optional extra")
pytestmark = [
    pytest.mark.slow,
    # lm_eval, datasets and their imports warn about their own affairs
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def both(trained: Path, eval_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, dict[str, Any]]:
    """(ours, theirs) on two choice tasks and one text task whose documents are longer than the context."""
    root = tmp_path_factory.mktemp("parity")
    pairs = [json.loads(line) for line in (eval_data / "pairs.jsonl").read_text().splitlines()]
    bare = [{"choices": [p["prompt"] + c for c in p["choices"]], "answer": p["answer"]} for p in pairs]
    texts = [json.loads(line)["text"] for line in (eval_data / "text.jsonl").read_text().splitlines()]
    long = [{"text": "".join(texts[i : i + 8])} for i in range(0, len(texts), 8)]
    for name, rows in (("pairs", pairs), ("bare", bare), ("long", long)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = [
        {"name": "pairs", "kind": "choice", "data": "pairs.jsonl"},
        {"name": "bare", "kind": "choice", "data": "bare.jsonl"},
        {"name": "long", "kind": "text", "data": "long.jsonl"},
    ]
    wanted = {"model": str(trained), "suites": [{"suite": "parity", "tasks": tasks}]}
    ours = read_results(evaluate(parse(EvalConfig, wanted, where="e"), root / "out", Context(base_dir=root)))
    return ours, _harness(trained, {"pairs": pairs, "bare": bare, "long": long})


def _harness(model: Path, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    import datasets
    import lm_eval
    from lm_eval.models import huggingface
    from lm_eval.tasks import TaskManager

    model_class: Any = huggingface.HFLM  # both are typed for their own command line only
    simple_evaluate: Any = lm_eval.simple_evaluate

    def given(name: str) -> Callable[..., Any]:
        return lambda **_: {"test": datasets.Dataset.from_list(rows[name])}

    def choice(name: str) -> dict[str, Any]:
        return {
            "task": name,
            "custom_dataset": given(name),
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": lambda doc: doc.get("prompt") or "",
            "doc_to_choice": lambda doc: doc["choices"],
            "doc_to_target": lambda doc: doc["answer"],
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }

    rolling = {
        "task": "long",
        "custom_dataset": given("long"),
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": lambda doc: doc["text"],
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    }

    def run(tasks: list[Any], **options: Any) -> dict[str, Any]:
        harness = model_class(
            pretrained=load_model(model), tokenizer=load_tokenizer(model), batch_size=16, device="cpu", **options
        )
        manager = TaskManager(include_defaults=False)
        found = simple_evaluate(model=harness, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True)
        assert found is not None
        return dict(found)

    # logits_cache: in 0.4.13 it mixes up two requests of the same tokens that are cut at different places
    # ("the cask is" + " red" and "" + "the cask is red"): the longer one's first tokens answer for the shorter one
    choices = run([choice("pairs"), choice("bare")], logits_cache=False)
    # add_bos_token: rolling text gets a BOS from the harness and, by default, a second one from this tokenizer
    text = run([rolling], add_bos_token=False)
    return {key: {**choices[key], **text[key]} for key in ("results", "samples")}


@pytest.mark.parametrize("task", ["pairs", "bare"])
def test_choice_log_likelihoods_equal_the_harness(both: tuple[Results, dict[str, Any]], task: str) -> None:
    ours, theirs = both
    found = [record.detail["logliks"] for record in ours.items_of(task).values()]
    samples = sorted(theirs["samples"][task], key=lambda sample: sample["doc_id"])
    expected = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    assert len(found) == len(expected) == 48
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    result = ours.task(task)
    assert result is not None
    assert result.value == pytest.approx(theirs["results"][task]["acc,none"])


def test_rolling_text_equals_the_harness(both: tuple[Results, dict[str, Any]]) -> None:
    ours, theirs = both
    result = ours.task("long")
    assert result is not None
    assert max(record.tokens for record in ours.items_of("long").values()) > 2 * 128  # several windows each
    assert result.extra["bits_per_byte"] == pytest.approx(theirs["results"]["long"]["bits_per_byte,none"], rel=1e-5)
