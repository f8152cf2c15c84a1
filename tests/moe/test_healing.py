"""Training and healing in the moe stage: all steps, one output, the control beside it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from solera.rebuild import rebuild
from solera.stages import plan_stage, run_stage
from solera_core.context import Context
from solera_core.errors import ConfigError, TargetError
from solera_core.provenance import read_provenance, verify
from solera_core.strict import parse
from solera_merge.moe.config import MoeConfig

TRAIN = {"tokens": 3000, "lr": 0.01, "tokens_per_step": 500}
HEAL = {"parts": "router+trunk", "tokens": 4000, "lr": 0.002, "tokens_per_step": 500}


@pytest.fixture(scope="module")
def tuned(with_own_attention: Callable[[float], dict[str, Path]]) -> dict[str, Path]:
    return with_own_attention(0.08)


@pytest.fixture(scope="module")
def config(
    moe_config: Callable[..., MoeConfig],
    siblings: dict[str, Path],
    tuned: dict[str, Path],
    domain_text: dict[str, Path],
) -> MoeConfig:
    return moe_config(siblings["base"], tuned, data=domain_text, router={"sequence_tokens": 64}, train=TRAIN, heal=HEAL)


@pytest.fixture(scope="module")
def healed(config: MoeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_stage("moe", config, tmp_path_factory.mktemp("healed") / "moe", Context(threads=1))


def test_all_steps_are_told_in_one_record(healed: Path) -> None:
    record = read_provenance(healed)
    checks = record["checks"]
    assert record["kind"] == "moe"
    assert record["recipe"]["heal"]["tokens"] == 4000
    assert {"identity", "router", "train", "heal", "specialists", "control", "worth"} <= checks.keys()
    steps = [json.loads(line) for line in (healed / "healed.jsonl").read_text().splitlines()]
    divergence = [row["loss"] for row in steps if "loss" in row]
    assert np.mean(divergence[-3:]) < 0.8 * divergence[0]  # it comes nearer to its teachers
    assert checks["train"]["mean_after"] <= checks["train"]["mean_before"]
    assert checks["heal"]["mean_before"] == pytest.approx(checks["train"]["mean_after"], abs=1e-3)
    assert set(checks["control"]["merges"]) >= {"average", "task_arithmetic 0.4"}
    assert (healed / "trained.jsonl").exists()
    assert ("better than" in checks["worth"]) == (checks["heal"]["mean_after"] < checks["control"]["mean_after"])
    assert not verify(healed)
    assert not [p for p in healed.parent.iterdir() if p.name.startswith(".")]


def test_experts_stay_and_the_trunk_moves(healed: Path, tuned: dict[str, Path], siblings: dict[str, Path]) -> None:
    moe, base = load_file(healed / "model.safetensors"), load_file(siblings["base"] / "model.safetensors")
    for e, path in enumerate(tuned.values()):
        np.testing.assert_array_equal(
            moe[f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight"],
            load_file(path / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"],
        )
    q = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(moe[q], base[q])


def test_the_control_is_a_dense_model_of_the_bases_size(healed: Path, siblings: dict[str, Path]) -> None:
    control = healed.with_name("moe-control")
    shapes = {name: t.shape for name, t in load_file(control / "model.safetensors").items()}
    assert shapes == {name: t.shape for name, t in load_file(siblings["base"] / "model.safetensors").items()}
    assert read_provenance(control)["kind"] == "control"
    assert not verify(control)


def test_a_plan_has_all_steps(config: MoeConfig) -> None:
    plan = plan_stage("moe", config, Context())
    assert {row["stage"] for row in plan.rows} >= {"built", "start"}
    assert plan.parameters["healed.tokens"] == 4000
    assert plan.parameters["control.tokens"] == 4000
    assert not any("tmp" in str(row["path"]) and "stages" in str(row["path"]) for row in plan.reads)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(healed: Path, config: MoeConfig, tmp_path: Path) -> None:
    (tmp_path / "moe.yml").write_text(
        yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)
    )
    command = [
        sys.executable,
        "-m",
        "solera",
        "moe",
        str(tmp_path / "moe.yml"),
        str(tmp_path / "again"),
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / ".again.solera-stages"
    while not (work / "keys" / "built.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "again").exists()
    told: list[str] = []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told += done.stderr.splitlines()
    assert any("built (moe): cached" in line for line in told), told
    for name in ("", "-control"):  # under another name: the record does not depend on it, so it can be made again
        ours, theirs = tmp_path / f"again{name}", healed.with_name(f"moe{name}")
        files = [file.relative_to(theirs) for file in theirs.rglob("*") if file.is_file()]
        assert len(files) > 5
        for file in files:
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 1, "train": TRAIN}, "train: with top_k: 1 .* gradient is exactly zero; use top_k: 2"),
        ({"heal": HEAL, "router": {"fit": "random"}}, "heal: trains on the text of every domain; give router.data"),
        ({"heal": {**HEAL, "parts": "experts"}}, "heal.parts: "),
        ({"heal": {**HEAL, "tokens": 0}}, "heal.tokens: 0 is not a positive whole number"),
        ({"train": {**TRAIN, "lr": float("nan")}}, "train.lr: "),
        ({"heal": {"parts": "all"}}, "heal.tokens: field required"),
    ],
)
def test_what_cannot_train_is_refused_at_the_door(settings: dict[str, Any], message: str) -> None:
    raw: dict[str, Any] = {
        "base_model": "base",
        "experts": [{"name": "a", "model": "m"}, {"name": "b", "model": "c"}],
        "router": {"data": {"a": "a.jsonl", "b": "b.jsonl"}},
    }
    with pytest.raises(ConfigError, match=message):
        parse(MoeConfig, raw | settings, where="recipe.yml")


def test_a_failure_leaves_nothing(config: MoeConfig, tmp_path: Path) -> None:
    assert config.heal is not None
    wild = config.model_copy(update={"train": None, "heal": config.heal.model_copy(update={"lr": 1e30})})
    with pytest.raises(ConfigError, match="the training diverged"):
        run_stage("moe", wild, tmp_path / "moe", Context(threads=1))
    assert list(tmp_path.iterdir()) == []


def test_json_of_the_record_is_plain(healed: Path) -> None:
    assert "NaN" not in json.dumps(read_provenance(healed)["checks"])


def test_models_may_be_called_like_our_steps_and_the_record_calls_them_so(
    siblings: dict[str, Path], tuned: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path
) -> None:
    for name, path in (("base", siblings["base"]), ("start", tuned["letters"]), ("healed", tuned["digits"])):
        shutil.copytree(path, tmp_path / name)
    shutil.copytree(tuned["signs"], tmp_path / "control")
    weight = {"parameters": {"weight": 1}}
    recipe = {"merge_method": "linear", "models": [{"model": "letters", **weight}, {"model": "control", **weight}]}
    raw = {
        "base_model": "base",
        "trunk": {"merge": recipe},
        "experts": [{"name": "letters", "model": "start"}, {"name": "digits", "model": "healed"}],
        "router": {
            "data": {name: str(domain_text[name]) for name in ("letters", "digits")},
            "tokens_per_domain": 1500,
            "sequence_tokens": 64,
        },
        "heal": {"tokens": 1000, "tokens_per_step": 500},
    }
    config, ctx = parse(MoeConfig, raw, where="test"), Context(base_dir=tmp_path, threads=1)
    out = run_stage("moe", config, tmp_path / "moe", ctx)
    record = read_provenance(out)
    models = {item["name"]: item["ref"] for item in record["inputs"] if item["digest"].startswith("blake3:")}
    assert models == {"base": "base", "letters": "start", "digits": "healed", "trunk: control": "control"}
    assert str(tmp_path) not in json.dumps(record["checks"]["trunk"])
    assert rebuild(out, ctx).problems == ()


def test_a_model_that_is_read_is_never_overwritten(
    siblings: dict[str, Path], tuned: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path
) -> None:
    for name, path in (("base", siblings["base"]), ("a", tuned["letters"]), ("moe-control", tuned["digits"])):
        shutil.copytree(path, tmp_path / name)
        (tmp_path / name / "solera.json").write_text("{}")  # made by solera, so --overwrite may replace it
    raw = {
        "base_model": "base",
        "experts": [{"name": "letters", "model": "a"}, {"name": "digits", "model": "moe-control"}],
        "router": {
            "data": {name: str(domain_text[name]) for name in ("letters", "digits")},
            "tokens_per_domain": 1500,
            "sequence_tokens": 64,
        },
    }
    ctx = Context(base_dir=tmp_path, threads=1, overwrite=True)
    for settings, out in (({"train": TRAIN}, "base"), ({"train": TRAIN}, "a"), ({"heal": HEAL}, "moe")):
        with pytest.raises(TargetError, match="is the directory of the input"):
            run_stage("moe", parse(MoeConfig, raw | settings, where="test"), tmp_path / out, ctx)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a", "moe-control"}
