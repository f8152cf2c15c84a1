"""The stages end to end on tiny real checkpoints: what they write, twice the same, and after a kill."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from solera_core.context import Context
from solera_core.output import verify
from solera_core.strict import parse
from solera_distill.config import DistillConfig, TuneConfig
from solera_distill.run import distill, plan_distill, plan_tune, tune

DISTILL: dict[str, Any] = {
    "teachers": [{"model": "a", "domain": "math"}, {"model": "b", "domain": "code"}],
    "data": ["math.jsonl", "code.jsonl"],
}


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def log(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "training.jsonl").read_text().splitlines()]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def mean_kl(teacher: Path, student: Path, texts: list[str]) -> float:
    """KL(teacher || student) a token, by transformers' own logits."""
    from solera_core.causal_lm import load_model, load_tokenizer

    tokenizer: Any = load_tokenizer(student)
    p_model, q_model = load_model(teacher), load_model(student)
    total, count = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text).input_ids[:32]])
            log_p, log_q = (m(input_ids=ids).logits.log_softmax(-1) for m in (p_model, q_model))
            total += float((log_p.exp() * (log_p - log_q)).sum())
            count += ids.shape[1]
    return total / count


@pytest.fixture(scope="session")
def tuned(
    tmp_path_factory: pytest.TempPathFactory, texts: Path, siblings: dict[str, Path], small: dict[str, Any]
) -> Path:
    """`base` fine-tuned on mathematics, with a held-out curve."""
    out = tmp_path_factory.mktemp("tuned") / "math"
    config = {"model": "base", "data": "math.jsonl", "eval_data": "held.jsonl", "save_every": 800, **small}
    tune(parse(TuneConfig, config, where="r"), out, Context(seed=1, base_dir=texts, models=siblings, threads=1))
    return out


def test_tune_learns_and_says_so(tuned: Path, siblings: dict[str, Path]) -> None:
    record = json.loads((tuned / "solera.json").read_text())
    checks = record["checks"]
    assert record["kind"] == "tune"
    assert record["recipe"]["tokens"] == 1600
    assert [r["name"] for r in record["inputs"]] == ["model", "data", "eval_data"]
    assert checks["heldout_nll_after_by_domain"]["math"] < checks["heldout_nll_before_by_domain"]["math"] - 0.5
    assert checks["data"]["documents"] == 40
    rows = log(tuned)
    assert next(r["tokens"] for r in rows if "heldout" in r) == 0
    assert len([r for r in rows if "heldout" in r]) == 3  # before, at 800, after
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["lr"] == pytest.approx(3e-4)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert verify(tuned) == []
    assert files(tuned).keys() == files(siblings["base"]).keys() | {"solera.json", "training.jsonl"}
    assert weights(tuned).keys() == weights(siblings["base"]).keys()


def test_the_heldout_figure_is_transformers_own(tuned: Path, texts: Path) -> None:
    from solera_core.causal_lm import load_model, load_tokenizer

    model, tokenizer = load_model(tuned), load_tokenizer(tuned)
    total, count = 0.0, 0
    for line in (texts / "held.jsonl").read_text().splitlines():
        ids = [*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id]
        assert len(ids) <= 33, "the check below knows nothing of cutting"
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    after = json.loads((tuned / "solera.json").read_text())["checks"]["heldout_nll_after"]
    assert total / count == pytest.approx(after, rel=1e-5)


def test_same_recipe_same_bytes(tuned: Path, tmp_path: Path, ctx: Context, small: dict[str, Any]) -> None:
    config = {"model": "base", "data": "math.jsonl", "eval_data": "held.jsonl", "save_every": 800, **small}
    tune(parse(TuneConfig, config, where="r"), tmp_path / "again", ctx)
    assert files(tmp_path / "again") == files(tuned)
    tune(parse(TuneConfig, config, where="r"), tmp_path / "seed", dataclasses.replace(ctx, seed=2))
    assert weights(tmp_path / "seed")["lm_head.weight"].ne(weights(tuned)["lm_head.weight"]).any()


PROGRAM = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from solera_core.context import Context
from solera_core.strict import parse
from solera_distill.config import DistillConfig
from solera_distill.run import distill
import json

class Killer:
    done = 0
    @contextmanager
    def task(self, title, total, unit=""):
        yield self
    def advance(self, amount=1.0, note=""):
        self.done += amount
        if self.done >= 1100:
            os.kill(os.getpid(), signal.SIGKILL)
    def note(self, message):
        pass

recipe, out, base_dir, models = map(json.loads, sys.argv[1:])
models = {name: Path(path) for name, path in models.items()}
ctx = Context(seed=1, base_dir=Path(base_dir), models=models, threads=1, progress=Killer())
distill(parse(DistillConfig, recipe, where="r"), Path(out), ctx)
"""


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(
    tmp_path: Path, ctx: Context, siblings: dict[str, Path], small: dict[str, Any], make_model: Callable[..., Path]
) -> None:
    """Killed with SIGKILL after 1100 of 1600 tokens; the newest state is that of 800."""
    deep = make_model(tmp_path / "deep", num_hidden_layers=4)
    models = {**siblings, "deep": deep}
    recipe = {
        **DISTILL,
        "student": {"from": "deep", "layer_drop": {"layers": 3}},
        "eval_data": "held.jsonl",
        "save_every": 400,
        **small,
    }
    out = tmp_path / "student"
    arguments = [recipe, str(out), str(ctx.base_dir), {n: str(p) for n, p in models.items()}]
    killed = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(json.dumps, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    staging = tmp_path / ".student.solera-staging"
    assert len(list((staging / ".work" / "states").iterdir())) == 1
    (staging / ".save-xyz").mkdir()  # what a kill during the last steps would leave
    (staging / ".save-xyz" / "model.safetensors").write_bytes(b"torn")
    (staging / "model.safetensors").write_bytes(b"torn")
    notes: list[str] = []

    class Listening:
        task = ctx.progress.task

        def note(self, message: str) -> None:
            notes.append(message)

    here = dataclasses.replace(ctx, models=models)
    config = parse(DistillConfig, recipe, where="r")
    distill(config, out, dataclasses.replace(here, progress=Listening()))
    assert any(note.startswith("resumed at 8") for note in notes), notes
    distill(config, tmp_path / "undisturbed", here)
    assert files(out) == files(tmp_path / "undisturbed")
    assert not staging.exists()


def test_a_student_of_specialists_comes_near_each_on_its_own_text(
    tmp_path: Path, ctx: Context, siblings: dict[str, Path], texts: Path, tuned: Path, small: dict[str, Any]
) -> None:
    tune(parse(TuneConfig, {"model": "base", "data": "code.jsonl", **small}, where="r"), tmp_path / "code", ctx)
    here = dataclasses.replace(ctx, models={**siblings, "math": tuned, "code": tmp_path / "code"})
    recipe = {
        "teachers": [{"model": "math", "domain": "math"}, {"model": "code"}],
        "data": {"math": "math.jsonl", "code": "code.jsonl"},
        "student": {"from": "c"},
        **small,
        "tokens": 4000,
    }
    before = files(tuned)
    distill(parse(DistillConfig, recipe, where="r"), tmp_path / "student", here)
    assert files(tuned) == before
    held = [json.loads(line) for line in (texts / "held.jsonl").read_text().splitlines()]
    for teacher, other, domain in [(tuned, tmp_path / "code", "math"), (tmp_path / "code", tuned, "code")]:
        lines = [row["text"] for row in held if row["domain"] == domain]
        near = mean_kl(teacher, tmp_path / "student", lines)
        assert near < 0.6 * mean_kl(teacher, siblings["c"], lines)
        assert near < 0.6 * mean_kl(teacher, other, lines)
    record = json.loads((tmp_path / "student" / "solera.json").read_text())
    assert [r["name"] for r in record["inputs"]] == ["student", "teacher math", "teacher", "data", "data"]


def test_healing_a_mixture_of_experts(
    tmp_path: Path, ctx: Context, siblings: dict[str, Path], make_model: Callable[..., Path], small: dict[str, Any]
) -> None:
    """The specialists teach the trunk and router; experts stay to the bit, and canonical names are on disk."""
    moe = make_model(tmp_path / "moe", family="mixtral", num_local_experts=2, num_experts_per_tok=2, dtype="bfloat16")
    recipe = {**DISTILL, "student": {"from": "moe"}, "parts": ["router", "attention", "norms", "embeddings"], **small}
    recipe["lr_parts"] = {"embeddings": 0.1}
    distill(
        parse(DistillConfig, recipe, where="r"),
        tmp_path / "healed",
        dataclasses.replace(ctx, models={**siblings, "moe": moe}),
    )
    before, after = weights(moe), weights(tmp_path / "healed")
    assert before.keys() == after.keys()
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in after
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name]) == ("experts" in name), name


def test_a_student_may_be_its_own_teacher(
    tmp_path: Path, ctx: Context, small: dict[str, Any], siblings: dict[str, Path]
) -> None:
    recipe = {"teachers": [{"model": "base"}], "student": {"from": "base"}, "data": "math.jsonl", **small}
    distill(parse(DistillConfig, recipe, where="r"), tmp_path / "out", ctx)
    assert [row["loss"] for row in log(tmp_path / "out")] == [0.0] * len(log(tmp_path / "out"))
    before, after = weights(siblings["base"]), weights(tmp_path / "out")
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_without_divergence_the_teachers_are_not_needed(tmp_path: Path, ctx: Context, small: dict[str, Any]) -> None:
    """The control: same text, same tokens, no teacher. It equals `tune` on the same text, to the byte."""
    data = ["math.jsonl", "code.jsonl"]
    recipe = {
        "teachers": [{"model": "a"}],
        "student": {"from": "base"},
        "objective": {"kl": 0, "ce": 1},
        "data": data,
        **small,
    }
    distill(parse(DistillConfig, recipe, where="r"), tmp_path / "control", ctx)
    tune(parse(TuneConfig, {"model": "base", "data": data, **small}, where="r"), tmp_path / "tuned", ctx)
    a, b = weights(tmp_path / "control"), weights(tmp_path / "tuned")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_padded_vocabularies_need_no_flag(
    tmp_path: Path, ctx: Context, siblings: dict[str, Path], make_model: Callable[..., Path], small: dict[str, Any]
) -> None:
    wide = make_model(tmp_path / "wide", vocab_size=320)
    here = dataclasses.replace(ctx, models={**siblings, "wide": wide})
    for teacher, student in [("wide", "base"), ("base", "wide")]:
        recipe = {"teachers": [{"model": teacher}], "student": {"from": student}, "data": "math.jsonl", **small}
        out = tmp_path / f"{student}-from-{teacher}"
        distill(parse(DistillConfig, recipe, where="r"), out, here)
        rows = log(out)
        assert 0 <= rows[-1]["loss"] < rows[0]["loss"]


def test_bfloat16_products_learn_too(tmp_path: Path, ctx: Context, tuned: Path, small: dict[str, Any]) -> None:
    config = {"model": "base", "data": "math.jsonl", "precision": "bfloat16", "dtype": "bfloat16", **small}
    tune(parse(TuneConfig, config, where="r"), tmp_path / "rough", ctx)
    exact = [r["loss"] for r in log(tuned) if "loss" in r]
    rough = [r["loss"] for r in log(tmp_path / "rough")]
    assert rough == pytest.approx(exact, rel=0.02)
    assert rough != exact
    assert weights(tmp_path / "rough")["model.norm.weight"].dtype == torch.bfloat16


def test_an_adapter_is_folded_in_first(
    tmp_path: Path, ctx: Context, siblings: dict[str, Path], small: dict[str, Any]
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "lora").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    low_rank = {
        f"{module}.lora_A.weight": torch.full((2, 32), 0.1),
        f"{module}.lora_B.weight": torch.full((32, 2), 0.1),
    }
    save_file(low_rank, tmp_path / "lora" / "adapter_model.safetensors")
    recipe = {"model": f"{siblings['base']}+{tmp_path / 'lora'}", "data": "math.jsonl", "parts": ["norms"], **small}
    tune(parse(TuneConfig, recipe, where="r"), tmp_path / "out", ctx)
    before, after = weights(siblings["base"]), weights(tmp_path / "out")
    for name in before:
        if name == "model.layers.0.self_attn.q_proj.weight":
            torch.testing.assert_close(after[name], before[name] + 0.02)
        else:
            assert torch.equal(before[name], after[name]) == ("norm" not in name), name


def test_plans_say_what_will_happen_without_reading_weights(ctx: Context, small: dict[str, Any]) -> None:
    plan = plan_tune(parse(TuneConfig, {"model": "base", "data": "math.jsonl", **small}, where="r"), ctx)
    assert (plan.stage, plan.parameters["steps"], plan.parameters["dtype"]) == ("tune", 8, "float32")
    assert any("eval_data" in w for w in plan.warnings)
    recipe = {**DISTILL, "student": {"from": "base", "layer_drop": {"keep": [0]}}, **small}
    plan = plan_distill(parse(DistillConfig, recipe, where="r"), ctx)
    assert [r["what"] for r in plan.reads] == ["base", "a", "b", "math.jsonl", "code.jsonl"]
    assert plan.parameters["layers"] == [0]
    assert plan.memory_bytes > 0
    assert json.dumps(plan.to_json())


def test_overwrite_replaces_whole(tuned: Path, tmp_path: Path, ctx: Context, small: dict[str, Any]) -> None:
    shutil.copytree(tuned, tmp_path / "out")
    config = parse(TuneConfig, {"model": "base", "data": "code.jsonl", **small}, where="r")
    tune(config, tmp_path / "out", dataclasses.replace(ctx, overwrite=True))
    assert verify(tmp_path / "out") == []
    assert not [row for row in log(tmp_path / "out") if "heldout" in row]


def test_the_size_of_a_hub_dataset_is_not_known_beforehand(
    ctx: Context, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not 0 bytes: nothing is fetched for a plan."""
    from solera.console import print_plan

    config = parse(TuneConfig, {"model": "base", **small, "data": "hub:org/name"}, where="r")
    plan = plan_tune(config, ctx)
    (row,) = (row for row in plan.reads if row["kind"] == "data")
    assert (row["bytes"], row["note"]) == (None, "not fetched yet")
    print_plan(plan)
    shown = next(
        line for line in capsys.readouterr().out.splitlines() if "hub:org/name" in line and "not fetched" in line
    )
    assert "unknown" in shown
