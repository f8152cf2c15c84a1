import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, DataError, TargetError
from solera_core.strict import parse
from solera_eval.config import EvalConfig, GatePolicy
from solera_eval.gate import gate
from solera_eval.records import read_results
from solera_eval.retention import churn
from solera_eval.run import evaluate, plan_evaluate

Tasks = list[dict[str, Any]]


def config(tasks: Tasks, **settings: Any) -> EvalConfig:
    return parse(EvalConfig, {"suites": [{"suite": "demo", "tasks": tasks}], **settings}, where="eval")


@pytest.fixture(scope="module")
def evaluated(trained: Path, suite_tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluate(config(suite_tasks, model=str(trained)), tmp_path_factory.mktemp("eval") / "out", Context())


def test_one_model_gives_results_items_and_a_record_of_the_run(evaluated: Path, trained: Path) -> None:
    assert sorted(p.name for p in evaluated.iterdir()) == ["items.jsonl", "results.json", "run.json"]
    results = read_results(evaluated)
    assert [(t.name, t.kind, t.metric, t.n) for t in results.tasks] == [
        ("facts", "text", "perplexity", 40),
        ("answers", "generate", "exact_match", 48),
        ("choices", "choice", "accuracy", 48),
    ]
    facts, answers, choices = results.tasks
    assert 1 < facts.value < 20
    assert facts.low is not None
    assert facts.high is not None
    assert facts.low < facts.value < facts.high
    assert facts.extra["chance"] == 304
    assert facts.extra["window_tokens"] == 128
    assert facts.extra["bytes"] == sum(r.bytes for r in results.items_of("facts").values())
    assert facts.extra["bits_per_byte"] > 0
    assert answers.value > 0.9
    assert choices.value > 0.9
    assert choices.extra["chance"] == 0.25
    assert results.model["digest"].startswith("blake3:")
    assert results.model["parameters"]["total"] == results.model["parameters"]["active"] > 0
    assert results.settings["tokenizer"]["text_prefix"] == "bos"
    run = json.loads((evaluated / "run.json").read_text())
    assert run["models"]["model"]["directory"] == "."
    assert run["verdict"] is None


def test_the_same_run_gives_the_same_bytes(evaluated: Path, trained: Path, suite_tasks: Tasks, tmp_path: Path) -> None:
    again = evaluate(config(suite_tasks, model=str(trained)), tmp_path / "out", Context())
    for name in ("items.jsonl", "results.json", "run.json"):
        assert (again / name).read_bytes() == (evaluated / name).read_bytes()


def test_results_do_not_depend_on_the_batch(evaluated: Path, trained: Path, suite_tasks: Tasks, tmp_path: Path) -> None:
    small = evaluate(config(suite_tasks, model=str(trained), batch_tokens=150), tmp_path / "out", Context())
    ours, theirs = read_results(evaluated), read_results(small)
    for a, b in zip(ours.items, theirs.items, strict=True):
        assert (a.task, a.item) == (b.task, b.item)
        assert a.score == pytest.approx(b.score, abs=1e-5)
    assert ours.suite["digest"] == theirs.suite["digest"]
    assert churn(ours, theirs, task="answers").changed == 0


@pytest.fixture(scope="module")
def judged(
    trained: Path, suite_tasks: Tasks, make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model, its twin, and a copy with noise on every weight."""
    root = tmp_path_factory.mktemp("judged")
    shutil.copytree(trained, root / "twin")
    make_model(root / "damaged", base=trained, seed=3, noise=0.7)
    models = {"model": str(trained), "twin": "twin", "damaged": "damaged"}
    gate_policy = {"candidate": "damaged", "baseline": "model"}
    return evaluate(config(suite_tasks, models=models, gate=gate_policy), root / "out", Context(base_dir=root))


def test_several_models_and_a_gate(judged: Path) -> None:
    assert sorted(p.name for p in judged.iterdir()) == ["damaged", "model", "run.json", "twin", "verdict.json"]
    assert json.loads((judged / "run.json").read_text())["verdict"] == "FAIL"
    for name in ("model", "twin", "damaged"):
        assert read_results(judged / name).model["name"] == name


def test_a_damaged_model_fails_every_task(judged: Path) -> None:
    verdict = json.loads((judged / "verdict.json").read_text())
    assert (verdict["verdict"], verdict["candidate"], verdict["baseline"]) == ("FAIL", "damaged", "model")
    assert [task["verdict"] for task in verdict["tasks"]] == ["FAIL", "FAIL", "FAIL"]
    assert verdict["tasks"][0]["ratio"] > 1.05
    assert verdict["tasks"][1]["lost"] > verdict["tasks"][1]["gained"]
    assert verdict["policy"]["confidence"] == 0.95


def test_the_gate_on_directories_says_what_the_gate_in_the_run_said(judged: Path) -> None:
    policy = parse(GatePolicy, {"candidate": "damaged", "baseline": "model"}, where="p")
    assert gate(judged / "model", judged / "damaged", policy).to_json() == json.loads(
        (judged / "verdict.json").read_text()
    )


def test_a_model_against_itself(judged: Path) -> None:
    wide = parse(GatePolicy, {"margin": {"accuracy": 0.1, "perplexity": 1.02}}, where="p")
    verdict = gate(judged / "model", judged / "twin", wide)
    assert verdict.verdict == "PASS"
    assert verdict.tasks[0].effect == verdict.tasks[0].bound == 1.0
    assert [(t.lost, t.gained) for t in verdict.tasks[1:]] == [(0, 0), (0, 0)]
    assert "candidate and baseline are the same model" in verdict.reasons
    narrow = gate(judged / "model", judged / "twin", parse(GatePolicy, {"margin": 0.02}, where="p"))
    assert narrow.verdict == "INCONCLUSIVE"  # 48 answers cannot exclude a drop of two points
    assert [t.n_needed for t in narrow.tasks] == [None, 133, 133]


def test_an_untrained_model_proves_nothing(siblings: dict[str, Path], suite_tasks: Tasks, tmp_path: Path) -> None:
    models = {"base": str(siblings["base"]), "a": str(siblings["base"])}
    written = evaluate(
        config(suite_tasks, models=models, gate={"candidate": "a", "baseline": "base", "margin": 0.2}),
        tmp_path / "out",
        Context(),
    )
    verdict = json.loads((written / "verdict.json").read_text())
    assert verdict["verdict"] == "INCONCLUSIVE"
    assert any("uniform guess over the vocabulary" in reason for reason in verdict["reasons"])
    assert any("beat chance (25.0%)" in reason for reason in verdict["reasons"])


def test_normalisation_changes_which_choice_wins(
    trained: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    # the right choice is a long text of which a third must be guessed; the wrong one is a single wrong word
    sentences = "".join(f"\nthe {size} {noun}" for size in ("old", "new", "dry", "tiny") for noun in ("hat", "bird"))
    rows = [{"prompt": "the big cask is", "choices": [" blue", f" red{sentences}"], "answer": 1}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    found = {}
    for mode in ("none", "bytes", "tokens"):
        task = {"name": "x", "kind": "choice", "data": "x.jsonl", "normalise": mode}
        out = evaluate(config([task], model=str(trained)), tmp_path / mode, Context(base_dir=tmp_path))
        found[mode] = read_results(out).tasks[0].value
    assert found == {"none": 0.0, "bytes": 1.0, "tokens": 1.0}


def test_answers_are_stripped_listed_and_extracted(
    trained: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    rows = [
        {"prompt": "the big cask is", "answer": ["green", " red "]},
        {"prompt": "the old hat is", "answer": "lue"},
        {"prompt": "the tiny bird is", "answer": "nothing"},
    ]
    write_jsonl(tmp_path / "x.jsonl", rows)
    task = {"name": "x", "kind": "generate", "data": "x.jsonl", "max_new_tokens": 6}
    plain = evaluate(config([task], model=str(trained)), tmp_path / "plain", Context(base_dir=tmp_path))
    assert [r.correct for r in read_results(plain).items] == [1, 0, 0]
    cut = evaluate(
        config([{**task, "extract": "l(ue)|re"}], model=str(trained)), tmp_path / "cut", Context(base_dir=tmp_path)
    )
    details = [r.detail for r in read_results(cut).items]
    assert [d["output"] for d in details] == [" red", " blue", " green"]
    assert [d["extracted"] for d in details] == [None, "ue", None]


def test_the_plan_reads_no_weights_and_warns(trained: Path, suite_tasks: Tasks, tmp_path: Path) -> None:
    limited = [{**task, "limit": 5} for task in suite_tasks]
    models = {"a": str(trained), "b": str(trained)}
    plan = plan_evaluate(config(limited, models=models, gate={"candidate": "a", "baseline": "b"}), Context())
    assert plan.stage == "eval"
    assert [row["items"] for row in plan.rows] == [5, 5, 5]
    assert [w["what"] for w in plan.writes] == [
        "a/results.json",
        "a/items.jsonl",
        "b/results.json",
        "b/items.jsonl",
        "run.json",
        "verdict.json",
    ]
    assert len(plan.warnings) == 3
    assert "minimum_items: 20" in plan.warnings[0]
    assert plan.disk_bytes > 0
    json.dumps(plan.to_json(), allow_nan=False)


# refusals: each before any output


def refused(tmp_path: Path, wanted: EvalConfig, error: type[Exception], said: str, **ctx: Any) -> None:
    with pytest.raises(error, match=said):
        evaluate(wanted, tmp_path / "out", Context(base_dir=tmp_path, **ctx))
    assert not list(tmp_path.glob("*out*"))


def test_a_model_without_a_tokenizer_is_refused(trained: Path, suite_tasks: Tasks, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    refused(tmp_path, config(suite_tasks, models=[str(trained), "bare"]), CheckpointError, "bare: has no tokenizer")


def test_a_model_with_an_adapter_is_measured_as_peft_merges_it(
    trained: Path, suite_tasks: Tasks, tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on its own deprecations
        torch.manual_seed(0)
        settings = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(trained), settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.4)
        model.save_pretrained(str(tmp_path / "lora"))
        shutil.copytree(trained, tmp_path / "merged")
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
    wanted = config(suite_tasks, models={"plain": str(trained), "adapted": f"{trained}+lora", "merged": "merged"})
    ctx = Context(base_dir=tmp_path)
    plan = plan_evaluate(wanted, ctx)
    out = evaluate(wanted, tmp_path / "out", ctx)
    plain, adapted, merged = (read_results(out / name) for name in ("plain", "adapted", "merged"))
    for here, there, base in zip(adapted.items, merged.items, plain.items, strict=True):
        assert here.item == there.item == base.item
        if "nll" in here.detail:
            assert here.nll == pytest.approx(there.nll, rel=1e-4)
            assert here.nll != pytest.approx(base.nll, rel=1e-3)
    assert adapted.model["ref"] == f"{trained}+lora"
    assert adapted.model["digest"] != plain.model["digest"]
    assert sorted(p.name for p in (out / "adapted").iterdir()) == ["items.jsonl", "results.json"]
    weights = sum(p.stat().st_size for p in trained.glob("*.safetensors"))
    assert plan.disk_bytes > 0.9 * weights
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_an_adapter_that_is_none_is_refused(trained: Path, suite_tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    refused(tmp_path, config(suite_tasks, models={"m": f"{trained}+lora"}), CheckpointError, "peft_type None")


def test_a_missing_model_or_suite_is_refused(trained: Path, suite_tasks: Tasks, tmp_path: Path) -> None:
    refused(tmp_path, config(suite_tasks, model="nowhere"), CheckpointError, "nowhere")
    wanted = parse(EvalConfig, {"model": str(trained), "suites": ["absent.yml"]}, where="e")
    refused(tmp_path, wanted, ConfigError, "absent.yml: no such file")


def test_a_policy_that_does_not_fit_is_refused_before_scoring(
    trained: Path, suite_tasks: Tasks, tmp_path: Path
) -> None:
    models = {"a": str(trained), "b": str(trained)}
    roles = {"candidate": "a", "baseline": "b"}
    for exception, said in (({"fact": {}}, "did you mean 'facts'"), ({"facts": {"margin": 0.5}}, "a ratio above 1")):
        wanted = config(suite_tasks, models=models, gate={**roles, "tasks": exception})
        refused(tmp_path, wanted, ConfigError, said)


def test_a_broken_model_is_named_with_task_and_item(trained: Path, suite_tasks: Tasks, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(trained, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    refused(
        tmp_path,
        config(suite_tasks, model="broken"),
        CheckpointError,
        "model 'broken', task 'facts': .* is nan",
    )


def test_an_item_that_does_not_fit_is_named_with_its_task(
    trained: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": "the hat is blue " * 80, "answer": "x"}])
    task = {"name": "x", "kind": "generate", "data": "x.jsonl"}
    refused(tmp_path, config([task], model=str(trained)), DataError, "task 'x': prompt .* context of 128")


def test_an_existing_target_is_kept_unless_overwritten(
    evaluated: Path, trained: Path, suite_tasks: Tasks, tmp_path: Path
) -> None:
    shutil.copytree(evaluated, tmp_path / "out")
    before = (tmp_path / "out" / "results.json").read_bytes()
    limited = config([{**suite_tasks[2], "limit": 8}], model=str(trained))
    with pytest.raises(TargetError, match="--overwrite"):
        evaluate(limited, tmp_path / "out", Context())
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    evaluate(limited, tmp_path / "out", Context(overwrite=True))
    assert read_results(tmp_path / "out").tasks[0].n == 8
