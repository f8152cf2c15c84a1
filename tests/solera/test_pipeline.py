"""The pipeline on a tiny real recipe: every kind of stage, caching, resuming, holding back, failing clean."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import solera
from solera.cli import main
from solera.pipeline import plan_run, run_recipe
from solera.recipe import Recipe, parse_recipe
from solera_core.context import Context
from solera_core.errors import ConfigError, SoleraError
from solera_core.provenance import verify

WORDS = {
    "x": ["aa bb cc", "bb cc aa", "cc aa bb", "aa cc bb"],
    "y": ["dd ee ff", "ee ff dd", "ff dd ee", "dd ff ee"],
}


def rows(domain: str, first: int, count: int) -> list[dict[str, str]]:
    """Distinct documents of one domain's words."""
    words = WORDS[domain]
    return [
        {"text": " ".join(words[(i * k + i // 3) % 4] for k in range(1, 14)) + f" {i}", "domain": domain}
        for i in range(first, first + count)
    ]


def recipe_data(root: Path, *, margin: float = 1.2) -> dict[str, Any]:
    def text(domain: str, split: str) -> str:
        return str(root / f"{domain}-{split}.jsonl")

    train = {
        "tokens": "2k",
        "sequence_tokens": 32,
        "tokens_per_step": 256,
        "lr": 3e-3,
    }
    both = [{"path": text("x", "train")}, {"path": text("y", "train")}]
    teachers = [{"model": "x", "domain": "x"}, {"model": "y", "domain": "y"}]
    return {
        "solera": 1,
        "title": "tiny",
        "stages": {
            "seedling": {
                "init": {
                    "config": {
                        "hidden_size": 32,
                        "intermediate_size": 64,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 4,
                        "num_key_value_heads": 2,
                        "max_position_embeddings": 128,
                        "tie_word_embeddings": True,
                    },
                    "tokenizer": {"vocab_size": 280, "data": both},
                }
            },
            "x": {"tune": {"model": "seedling", "data": {"x": text("x", "train")}, **train}},
            "y": {"tune": {"model": "seedling", "data": {"y": text("y", "train")}, **train}},
            "blend": {
                "merge": {
                    "merge_method": "task_arithmetic",
                    "base_model": "seedling",
                    "models": [{"model": m, "parameters": {"weight": 0.5}} for m in "xy"],
                }
            },
            "moe": {
                "moe": {
                    "base_model": "blend",
                    "experts": [{"name": "x", "model": "x"}, {"name": "y", "model": "y"}],
                    "top_k": 1,
                    "router": {
                        "fit": "ridge",
                        "data": {d: text(d, "train") for d in "xy"},
                        "tokens_per_domain": 300,
                        "sequence_tokens": 32,
                    },
                }
            },
            "healed": {"distill": {"teachers": teachers, "student": {"from": "moe"}, "data": both, **train}},
            "student": {
                "distill": {
                    "teachers": [{"model": "healed"}],
                    "student": {"from": "blend", "layer_drop": {"keep": [0]}},
                    "data": both,
                    **train,
                }
            },
            "verdict": {
                "eval": {
                    "models": ["seedling", "x", "y", "blend", "moe", "healed", "student"],
                    "suites": [
                        {
                            "suite": "tiny",
                            "tasks": [{"name": d, "kind": "text", "domain": d, "data": text(d, "test")} for d in "xy"],
                        }
                    ],
                    "gate": {"candidate": "student", "baseline": "healed", "margin": {"perplexity": margin}},
                }
            },
            "release": {"publish": {"model": "student", "when": "verdict"}},
        },
        "report": {"base": "seedling", "specialists": {"x": "x", "y": "y"}, "moe": "healed", "control": "blend"},
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, write_jsonl: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("texts")
    for domain in "xy":
        write_jsonl(root / f"{domain}-train.jsonl", rows(domain, 0, 60))
        write_jsonl(root / f"{domain}-test.jsonl", rows(domain, 1000, 30))
    return root


@pytest.fixture(scope="module")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe run once; read-only."""
    out = tmp_path_factory.mktemp("run") / "out"
    solera.run(recipe_data(texts), out)
    return out


def loaded(texts: Path, **options: Any) -> Recipe:
    return parse_recipe(recipe_data(texts, **options), base_dir=Path(), where="r")


def test_the_run_is_whole(finished: Path) -> None:
    summary = json.loads((finished / "run.json").read_text())
    assert [s["status"] for s in summary["stages"]] == ["made"] * 9
    assert summary["verdict"] == "PASS"
    for name in ("seedling", "x", "y", "blend", "moe", "healed", "student", "release"):
        assert verify(finished / "stages" / name) == []
    page = (finished / "report.html").read_text()
    assert "PASS" in page
    assert all(name in page for name in ("seedling", "blend", "healed", "student"))


def test_a_second_run_makes_nothing_again(finished: Path, texts: Path, tmp_path: Path) -> None:
    again = tmp_path / "out"
    shutil.copytree(finished, again, copy_function=shutil.copy2)
    outcome = run_recipe(loaded(texts), again, Context())
    assert {s.status for s in outcome.stages} == {"cached"}
    assert {p.status for p in plan_run(loaded(texts), again, Context())} == {"cached"}


def test_side_by_side_gives_the_same_bytes(finished: Path, texts: Path, tmp_path: Path) -> None:
    """A second run from nothing, in worker processes."""
    outcome = run_recipe(loaded(texts), tmp_path / "out", Context(threads=1), jobs=2)
    before = {s["name"]: s["digest"] for s in json.loads((finished / "run.json").read_text())["stages"]}
    models = ("seedling", "x", "y", "blend", "moe", "healed", "student")
    assert {s.name: s.digest for s in outcome.stages if s.name in models} == {n: before[n] for n in models}


def test_a_changed_output_is_made_again_and_nothing_else(finished: Path, texts: Path, tmp_path: Path) -> None:
    again = tmp_path / "out"
    shutil.copytree(finished, again, copy_function=shutil.copy2)
    weights = again / "stages" / "blend" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    outcome = run_recipe(loaded(texts), again, Context())
    assert [s.name for s in outcome.stages if s.status == "made"] == ["blend"]
    assert verify(again / "stages" / "blend") == []


def test_a_changed_setting_makes_what_depends_on_it_again(finished: Path, texts: Path, tmp_path: Path) -> None:
    again = tmp_path / "out"
    shutil.copytree(finished, again, copy_function=shutil.copy2)
    outcome = run_recipe(loaded(texts, margin=1.3), again, Context())
    assert [s.name for s in outcome.stages if s.status == "made"] == ["verdict", "release"]


def test_without_a_pass_nothing_is_released(finished: Path, texts: Path, tmp_path: Path) -> None:
    again = tmp_path / "out"
    shutil.copytree(finished, again, copy_function=shutil.copy2)
    outcome = run_recipe(loaded(texts, margin=1.0000001), again, Context())
    assert outcome.verdict in ("FAIL", "INCONCLUSIVE")
    assert outcome.stages[-1].status == "held back"


def test_a_report_names_what_was_not_measured(
    finished: Path, texts: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    """A domain with answers only, one without any item: the run and the release end well, with a note for each."""
    sums = write_jsonl(tmp_path / "sums.jsonl", [{"prompt": f"dd ee {i}", "answer": "ff"} for i in range(20)])
    data = recipe_data(texts)
    evaluation = data["stages"]["verdict"]["eval"]
    evaluation["suites"][0]["tasks"][1] = {
        "name": "y",
        "kind": "generate",
        "domain": "y",
        "data": str(sums),
        "max_new_tokens": 2,
    }
    data["report"]["specialists"]["z"] = "y"
    del evaluation["gate"], data["stages"]["release"]["publish"]["when"]
    again = tmp_path / "out"
    shutil.copytree(finished, again, copy_function=shutil.copy2)
    outcome = solera.run(data, again)
    assert outcome.stages[-1].status == "made"
    for page in (again / "report.html", again / "stages" / "release" / "report.html"):
        text = page.read_text()
        assert "y: has no text task" in text
        assert "z: no share kept is given, for no task of seedling has this domain." in text


def test_a_failing_stage_leaves_the_earlier_ones_whole(texts: Path, tmp_path: Path) -> None:
    data = recipe_data(texts)
    data["stages"]["y"]["tune"]["lr"] = 1e30  # diverges: nothing tells before it runs
    del data["stages"]["release"], data["stages"]["verdict"]
    del data["report"]
    out = tmp_path / "out"
    with pytest.raises(SoleraError, match=r"stage 'y' \(tune\): "):
        run_recipe(parse_recipe(data, base_dir=Path(), where="r"), out, Context())
    for name in ("seedling", "x"):
        assert verify(out / "stages" / name) == []
    assert not (out / "stages" / "y").exists()
    assert not list((out / "stages").glob(".*"))


def test_test_text_among_the_training_text_is_refused(
    texts: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    data = recipe_data(texts)
    leaked = write_jsonl(tmp_path / "leaked.jsonl", rows("x", 0, 3))
    data["stages"]["verdict"]["eval"]["suites"][0]["tasks"][0]["data"] = str(leaked)
    with pytest.raises(ConfigError, match="trained on as they stand"):
        run_recipe(parse_recipe(data, base_dir=Path(), where="r"), tmp_path / "out", Context())


def test_an_error_in_a_worker_is_the_stages_own(texts: Path, tmp_path: Path) -> None:
    data = recipe_data(texts)
    data["stages"] = {name: data["stages"][name] for name in ("seedling", "x", "y")}
    data["stages"]["y"]["tune"]["lr"] = 1e30  # diverges: found while it runs, in the worker
    del data["report"]
    with pytest.raises(SoleraError, match=r"stage 'y' \(tune\): "):
        run_recipe(parse_recipe(data, base_dir=Path(), where="r"), tmp_path / "out", Context(), jobs=2)
    assert verify(tmp_path / "out" / "stages" / "x") == []  # ran beside it
    assert not (tmp_path / "out" / "stages" / "y").exists()


def test_rebuild_of_a_stage_of_a_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("blend", "x", "moe"):
        assert main(["verify", "--rebuild", str(finished / "stages" / name), "-q"]) == 0, capsys.readouterr().err


def test_rebuild_of_a_release_proves_the_model(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Card, report and results are evidence: named, hashed, not made again. A changed model is still found."""
    out = tmp_path / "out"
    shutil.copytree(finished, out, copy_function=shutil.copy2)
    release = out / "stages" / "release"
    assert main(["verify", "--rebuild", str(release), "-q", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"README.md", "report.html", "recipe.yml", "results.json", "verdict.json"} <= set(shown["evidence"])
    assert main(["verify", "--rebuild", str(release), "-q"]) == 0
    assert "README.md" in capsys.readouterr().out
    record = json.loads((release / "solera.json").read_text())
    tokenizer = json.loads((release / "tokenizer_config.json").read_text()) | {"model_max_length": 7}
    (release / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    changed = hashlib.sha256((release / "tokenizer_config.json").read_bytes()).hexdigest()
    record["files"]["tokenizer_config.json"] = changed
    record["checks"]["parameters"] = 1
    (release / "solera.json").write_text(json.dumps(record))
    assert main(["verify", str(release), "-q"]) == 0  # its own digests do not tell
    assert main(["verify", "--rebuild", str(release), "-q"]) == 3
    error = capsys.readouterr().err
    assert "tokenizer_config.json differs from what the recipe makes now" in error
    assert "solera.json: checks differs from what the recipe makes now" in error


def test_run_from_the_command_line(
    texts: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.yml"
    file.write_text(json.dumps(recipe_data(texts)))
    assert main(["run", str(file), "--out", str(tmp_path / "new"), "--dry-run", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert stages[0]["status"] == "run"
    assert stages[0]["plan"]["stage"] == "init"
    assert stages[1]["status"] == "run (inputs not made yet)"
    assert not (tmp_path / "new").exists()
    shutil.copytree(finished, tmp_path / "old", copy_function=shutil.copy2)
    assert main(["run", str(file), "--out", str(tmp_path / "old"), "-q", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "PASS"
    assert {r["domain"] for r in result["retention"]} == {"x", "y"}
    assert main(["run", str(file), "--out", str(tmp_path / "old"), "-q"]) == 0
    assert "student" in capsys.readouterr().out


def test_everything_a_recipe_names_is_looked_up_before_anything_runs(
    texts: Path, siblings: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models, texts and suites of late stages, all at once, by a run and by its plan; nothing is written."""
    data = recipe_data(texts)
    stages = data["stages"]
    (tmp_path / "models").mkdir()
    shutil.copytree(siblings["a"], tmp_path / "models" / "code")
    (tmp_path / "empty").mkdir()
    stages["blend"]["merge"]["models"] += [
        {"model": m, "parameters": {"weight": 1}} for m in ("heeled", "models/cod", "empty", "x+lora", "r.yml")
    ]
    stages["healed"]["distill"]["data"] = [str(texts / "none.jsonl")]
    stages["student"]["distill"]["eval_data"] = str(tmp_path / "r.yml")
    stages["verdict"]["eval"]["suites"] += [
        "none.yml",
        {"suite": "s", "tasks": [{"name": "t", "kind": "choice", "data": "c.jsonl"}]},
    ]
    file = tmp_path / "r.yml"
    file.write_text(json.dumps(data))
    errors = []
    for more in ([], ["--dry-run"]):
        assert main(["run", str(file), "--out", str(tmp_path / "out"), "-q", *more]) == 3
        errors.append(capsys.readouterr().err)
    for part in (
        "stage 'blend' (merge): model 'heeled': is no stage",
        "(did you mean 'healed'?)",
        f"model 'models/cod': no directory {tmp_path / 'models' / 'cod'} (did you mean 'code'?)",
        f"{tmp_path / 'empty'}: not a checkpoint",
        "model 'lora': is no stage",
        f"model 'r.yml': {file} is a file",
        f"stage 'healed' (distill): {texts / 'none.jsonl'}: no such file",
        f"stage 'student' (distill): {file}: unknown kind of file",
        f"stage 'verdict' (eval): {tmp_path / 'none.yml'}: no such file",
        f"{tmp_path / 'c.jsonl'}: no such file",
    ):
        assert part in errors[0], part
    assert errors[0] == errors[1]
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_write_into_a_model(
    texts: Path, siblings: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = recipe_data(texts)
    shutil.copytree(siblings["a"], tmp_path / "base")
    data["stages"]["x"]["tune"]["model"] = "base"
    (tmp_path / "r.yml").write_text(json.dumps(data))
    before = sorted((tmp_path / "base").iterdir())
    assert main(["run", str(tmp_path / "r.yml"), "--out", str(tmp_path / "base"), "-q"]) == 3
    assert "lies in the directory of the input" in capsys.readouterr().err
    assert sorted((tmp_path / "base").iterdir()) == before


def test_the_plan_of_a_whole_recipe_before_anything_is_made(
    finished: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage has its plan, and the sizes planned from nothing are those of what the run then wrote."""
    file = tmp_path / "r.yml"
    file.write_text(json.dumps(recipe_data(texts)))
    out = tmp_path / "out"
    assert main(["run", str(file), "--out", str(out), "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert not out.exists()
    plans = {stage["name"]: stage["plan"] for stage in shown["stages"]}
    for name in ("seedling", "x", "y", "blend", "moe", "healed", "student"):
        weights = sum(w["bytes"] for w in plans[name]["writes"] if w["what"].startswith(("weights", "model")))
        stored = json.loads((finished / "stages" / name / "solera.json").read_text())["checks"]["bytes"]
        assert weights == pytest.approx(stored, abs=6000), name  # headers are not counted everywhere
    assert plans["x"]["parameters"]["lr"] == 3e-3
    assert plans["x"]["parameters"]["schedule"] == "cosine"  # a default
    assert plans["release"]["parameters"]["when"] == "verdict"
    reads = {row["what"]: row for row in plans["verdict"]["reads"]}
    assert reads["student"]["path"] == str(out / "stages" / "student")
    assert reads["task x"]["bytes"] == (texts / "x-test.jsonl").stat().st_size
    assert {row["bytes"] for row in plans["healed"]["reads"] if row["kind"] == "data"} == {
        (texts / f"{d}-train.jsonl").stat().st_size for d in "xy"
    }
    assert "solera-plan-" not in json.dumps(shown)
    total = shown["total"]
    assert total["disk_bytes"] == sum(plan["disk_bytes"] for plan in plans.values())
    assert total["memory_bytes"] == max(plan["memory_bytes"] for plan in plans.values())
    assert main(["run", str(file), "--out", str(out), "--dry-run"]) == 0
    assert "all that will run: memory at most" in capsys.readouterr().out


def test_what_a_late_stage_would_refuse_is_refused_before_the_first_runs(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found from the headers that the earlier stages will write: all of it at once, by a run and by its plan."""
    data = recipe_data(texts)
    start = {"from": "blend", "layer_drop": {"layers": 3}}
    data["stages"]["deep"] = {"distill": data["stages"]["healed"]["distill"] | {"student": start}}
    data["stages"]["moe"]["moe"]["router"]["tokens_per_domain"] = 3
    (tmp_path / "r.yml").write_text(json.dumps(data))
    for more in ([], ["--dry-run"]):
        assert main(["run", str(tmp_path / "r.yml"), "--out", str(tmp_path / "out"), "-q", *more]) == 3
        error = capsys.readouterr().err
        assert "stage 'deep' (distill): layer_drop.layers: 3 of blend, which has only 2 layers" in error
        assert "stage 'moe' (moe): router.tokens_per_domain: 3 is too little" in error
        assert not (tmp_path / "out").exists()
