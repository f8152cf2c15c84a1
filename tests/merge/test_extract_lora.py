"""`solera extract-lora`: base + adapter is the fine-tune, as nearly as the report says; peft loads it."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, SoleraError
from solera_core.provenance import verify
from solera_core.strict import parse
from solera_merge.adapters.extract import ExtractConfig, Extraction, extract_lora, plan_extract

MakeModel = Callable[..., Path]


def _extract(base: Path, tuned: Path, out: Path, *, ctx: Context | None = None, **settings: Any) -> Extraction:
    config = parse(ExtractConfig, {"base_model": str(base), "model": str(tuned)} | settings, where="test")
    return extract_lora(config, out, ctx or Context())


def _distance(base: Path, tuned: Path, adapter: Path) -> tuple[float, float]:
    """How far base + adapter is from the fine-tune, relative to its change; the largest difference of an element."""
    missing, change, largest = 0.0, 0.0, 0.0
    ours, goal, start = (open_checkpoint(str(m), Context()) for m in (f"{base}+{adapter}", tuned, base))
    for name in goal.tensors:
        a, b, c = (m.read(name).astype(np.float64) for m in (ours, goal, start))
        missing += float(np.sum((a - b) ** 2))
        change += float(np.sum((b - c) ** 2))
        largest = max(largest, float(np.abs(a - b).max()))
    return (missing / change) ** 0.5, largest


def _logits(model: Any, *, vocabulary: int = 300) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(torch.arange(40)[None] * 7 % vocabulary).logits
        return logits


def _in_peft(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with warnings.catch_warnings():
        # A missing or unexpected key is a warning too, and an error here.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="The following .*_pattern keys")  # it looks at modules only
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # GPT-2 has both kinds of modules
        loaded: Any = PeftModel.from_pretrained(auto.from_pretrained(base), str(adapter))
        return loaded


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"shared_expert_intermediate_size": 40},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 3, "intermediate_size": 32, "max_position_embeddings": 131072},
    "gemma2": {"head_dim": 8, "tie_word_embeddings": True},
}


@pytest.mark.parametrize(
    ("family", "embeddings"),
    [
        ("llama", "save"),
        ("qwen2", "lora"),
        ("gpt2", "lora"),
        ("gemma2", "save"),
        ("gemma2", "lora"),
        ("mixtral", "save"),
        ("qwen2_moe", "save"),
    ],
)
def test_full_rank_is_the_fine_tune(family: str, embeddings: str, make_model: MakeModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    base = make_model(tmp_path / "base", family=family, **FAMILIES[family])
    tuned = make_model(tmp_path / "tuned", base=base, seed=1, noise=0.3)
    found = _extract(base, tuned, tmp_path / "adapter", rank=200, embeddings=embeddings)
    assert found.warnings == ()
    assert found.error < 2e-6
    error, largest = _distance(base, tuned, tmp_path / "adapter")
    assert error < 2e-6
    assert largest < 1e-6
    expected = _logits(auto.from_pretrained(tuned))
    torch.testing.assert_close(_logits(_in_peft(base, tmp_path / "adapter")), expected, rtol=0, atol=2e-5)
    assert verify(tmp_path / "adapter") == []


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_experts_by_energy(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    """One by one on disk or fused and transposed; all experts of a layer get one rank."""
    base = make_model(tmp_path / "base", family=family, **FAMILIES[family])
    tuned = make_model(tmp_path / "tuned", base=base, seed=1, noise=0.3)
    found = _extract(base, tuned, tmp_path / "adapter", energy=0.8)
    error, _ = _distance(base, tuned, tmp_path / "adapter")
    assert found.error == pytest.approx(error, rel=1e-4)
    rows = {row["tensor"]: row for row in found.rows}
    assert rows["model.layers.0.mlp.experts.gate_up_proj"]["energy"] >= 0.8
    assert rows["model.layers.0.mlp.experts.down_proj"]["captured"] == "experts"
    left_out = {row["tensor"].rpartition(".")[2] for row in found.rows if row["captured"] == "left out"}
    # Parameters that are no weight or bias of a module: peft cannot save them.
    assert left_out == ({"gate_up_proj_bias", "down_proj_bias", "sinks"} if family == "gpt_oss" else set())


@pytest.mark.parametrize("measure", [{"rank": 3}, {"energy": 0.7}, {"energy": 0.9, "max_rank": 5}])
def test_the_reported_error_is_the_error(measure: dict[str, Any], siblings: dict[str, Path], tmp_path: Path) -> None:
    base, tuned = siblings["base"], siblings["a"]
    found = _extract(base, tuned, tmp_path / "adapter", **measure)
    error, _ = _distance(base, tuned, tmp_path / "adapter")
    assert found.error == pytest.approx(error, rel=1e-4)
    assert 0.3 < error < 0.9
    a, b, start = (open_checkpoint(str(m), Context()) for m in (f"{base}+{tmp_path / 'adapter'}", tuned, base))
    for row in found.rows:
        change = (b.read(row["tensor"]) - start.read(row["tensor"])).astype(np.float64)
        missing = np.linalg.norm(a.read(row["tensor"]) - b.read(row["tensor"]))
        assert row["error"] == pytest.approx(missing / np.linalg.norm(change), rel=1e-3, abs=1e-6)
        if row["captured"] != "lora":
            continue
        values = np.linalg.svd(change, compute_uv=False) ** 2
        best = 1 - values[: row["rank"]].sum() / values.sum()
        assert row["error"] ** 2 == pytest.approx(best, rel=1e-4)  # no adapter of this rank is nearer
        if "energy" in measure:
            enough = np.flatnonzero(np.cumsum(values) >= measure["energy"] * values.sum())[0] + 1
            assert row["rank"] == min(enough, measure.get("max_rank", 99))


def test_what_is_left_out_is_said(siblings: dict[str, Path], tmp_path: Path) -> None:
    base, tuned = siblings["base"], siblings["a"]
    settings: dict[str, Any] = {"exclude": "mlp", "embeddings": "skip", "modules_to_save": "none"}
    found = _extract(base, tuned, tmp_path / "adapter", rank=32, **settings)
    left_out = {row["tensor"]: row["why"] for row in found.rows if row["captured"] == "left out"}
    assert left_out["model.layers.0.mlp.up_proj.weight"] == "excluded"
    assert left_out["model.embed_tokens.weight"] == "embeddings: skip"
    assert left_out["model.norm.weight"] == "modules_to_save: none"
    assert len(found.warnings) == len(left_out) == 6 + 2 + 5
    assert all(row["error"] == 1 for row in found.rows if row["captured"] == "left out")
    error, _ = _distance(base, tuned, tmp_path / "adapter")
    assert found.error == pytest.approx(error, rel=1e-4)
    only = _extract(base, tuned, tmp_path / "only", rank=4, target_modules=r"layers\.1\.self_attn\.q")
    assert [row["tensor"] for row in only.rows if row["captured"] != "left out"] == [
        "model.layers.1.self_attn.q_proj.weight"
    ]
    assert json.loads((tmp_path / "only" / "adapter_config.json").read_text())["target_modules"] == [
        "model.layers.1.self_attn.q_proj"
    ]


def test_an_extracted_lora_finds_itself_again(siblings: dict[str, Path], tmp_path: Path) -> None:
    """Extract, merge with its base, extract again: the same update; unchanged tensors are not mentioned."""
    from solera_merge.config import MergeConfig
    from solera_merge.run import merge

    base = siblings["base"]
    first = _extract(base, siblings["a"], tmp_path / "first", rank=4, target_modules="q_proj|o_proj")
    models = [{"model": f"{base}+{tmp_path / 'first'}"}]
    merge(parse(MergeConfig, {"merge_method": "passthrough", "models": models}, where="t"), tmp_path / "m", Context())
    again = _extract(base, tmp_path / "m", tmp_path / "again", energy=1.0)
    assert {row["tensor"]: row["rank"] for row in again.rows} == {
        row["tensor"]: 4 for row in first.rows if row["captured"] == "lora"
    }
    error, largest = _distance(base, tmp_path / "m", tmp_path / "again")
    assert error < 1e-5
    assert largest < 1e-7


def test_the_same_bytes_again(siblings: dict[str, Path], tmp_path: Path) -> None:
    for name, threads in (("one", 1), ("two", 2)):
        _extract(siblings["base"], siblings["b"], tmp_path / name, rank=4, ctx=Context(threads=threads))
    for file in ("adapter_model.safetensors", "adapter_config.json", "solera.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_half_precision_counts_its_rounding(make_model: MakeModel, siblings: dict[str, Path], tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", base=siblings["base"], dtype="bfloat16")
    tuned = make_model(tmp_path / "tuned", base=base, seed=1, noise=0.3, dtype="bfloat16")
    found = _extract(base, tuned, tmp_path / "adapter", rank=32)
    assert {t.dtype for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert 1e-3 < found.error < 5e-3
    wide = _extract(base, tuned, tmp_path / "wide", rank=32, dtype="float32")
    assert wide.error < 2e-6


def test_an_enlarged_vocabulary_is_saved(siblings: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    larger = auto.from_pretrained(siblings["a"])
    with torch.random.fork_rng():
        larger.resize_token_embeddings(310)
    larger.save_pretrained(tmp_path / "tuned")
    found = _extract(siblings["base"], tmp_path / "tuned", tmp_path / "adapter", rank=48)
    ours = open_checkpoint(f"{siblings['base']}+{tmp_path / 'adapter'}", Context())
    goal = open_checkpoint(tmp_path / "tuned", Context())
    assert ours.config["vocab_size"] == 310
    for name in goal.tensors:
        np.testing.assert_allclose(ours.read(name), goal.read(name), rtol=0, atol=1e-6)
    assert {row["tensor"] for row in found.rows if row["captured"] == "saved"} >= {"lm_head.weight"}


def _without(model: Path, target: Path, name: str) -> Path:
    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    del tensors[name]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_bad_input(siblings: dict[str, Path], make_model: MakeModel, tmp_path: Path) -> None:
    base, tuned = siblings["base"], siblings["a"]
    wider = make_model(tmp_path / "wider", intermediate_size=64)
    broken = _without(tuned, tmp_path / "broken", "model.norm.weight")
    nan = Path(shutil.copytree(tuned, tmp_path / "nan"))
    tensors = load_file(nan / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, nan / "model.safetensors", metadata={"format": "pt"})
    cases: list[tuple[Path, dict[str, Any], type[SoleraError], str]] = [
        (tuned, {}, ConfigError, "give either a rank or an energy"),
        (tuned, {"rank": 2, "energy": 0.5}, ConfigError, "give either a rank or an energy"),
        (tuned, {"rank": 2, "max_rank": 4}, ConfigError, "max_rank bounds the ranks found by energy"),
        (tuned, {"energy": 1.5}, ConfigError, "energy"),
        (tuned, {"rank": 2, "exclude": "("}, ConfigError, r"'\(' is no regular expression"),
        (tuned, {"rank": 2, "target_modules": "nothing"}, CheckpointError, "loosen target_modules or exclude"),
        (base, {"rank": 2}, CheckpointError, "no tensor differs"),
        (wider, {"rank": 2}, CheckpointError, r"'model.layers.0.mlp.down_proj.weight' is \(32, 48\) in .*\(32, 64\)"),
        (broken, {"rank": 2}, CheckpointError, "has 'model.norm.weight', which .*broken has not"),
        (nan, {"rank": 2}, CheckpointError, "'model.norm.weight' .* holds values that are NaN or infinite"),
    ]
    for model, settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            _extract(base, model, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()


def test_the_plan_reads_no_weight(siblings: dict[str, Path], tmp_path: Path) -> None:
    config = ExtractConfig(base_model=str(siblings["base"]), model=str(siblings["a"]), rank=4)
    plan = plan_extract(config, Context())
    rows = {row["tensor"]: row for row in plan.rows}
    assert rows["model.layers.0.mlp.up_proj.weight"]["if changed"] == "lora"
    assert rows["model.norm.weight"]["if changed"] == "saved"
    extract_lora(config, tmp_path / "out", Context())
    written = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert plan.writes[0]["bytes"] < written < plan.writes[0]["bytes"] + 6000  # the header
