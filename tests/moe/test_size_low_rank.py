"""Specialists as LoRA adapters with a router over requests: ranks by loss, peft's own reading, the route."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, DataError
from solera_core.output import verify
from solera_core.strict import parse
from solera_merge.moe.size.config import ExtractExpertsConfig
from solera_merge.moe.size.low_rank import choose_rank, extract_experts, extract_skeleton, plan_extract_experts
from solera_merge.route import RoutedModels


def settings(base: Path, specialists: dict[str, Path], text: dict[str, Path], **more: Any) -> dict[str, Any]:
    return {
        "base_model": str(base),
        "specialists": [{"name": name, "model": str(path)} for name, path in specialists.items()],
        "data": {name: {"path": str(path), "limit": 16} for name, path in text.items()},
        "ranks": [1, 4],
        "tokens_per_domain": 600,
        "sequence_tokens": 64,
        "method": "centroid",
        **more,
    }


@pytest.fixture(scope="module")
def raw(siblings: dict[str, Path], specialists: dict[str, Path], domain_text: dict[str, Path]) -> dict[str, Any]:
    return settings(siblings["base"], specialists, domain_text)


@pytest.fixture(scope="module")
def out(raw: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    return extract_experts(parse(ExtractExpertsConfig, raw, where="test"), folder / "out", Context())


def test_it_is_whole_and_says_what_it_is(out: Path, specialists: dict[str, Path]) -> None:
    record = json.loads((out / "solera.json").read_text())
    assert verify(out) == []
    assert "no MoE checkpoint" in record["checks"]["what"]
    assert {path.name for path in out.iterdir()} == {
        *specialists,
        "route.json",
        "route.safetensors",
        "base-dir",
        "solera.json",
    }
    rows = record["checks"]["sizes"]
    assert [row["what"] for row in rows] == ["base", "rank 1", "rank 4", "chosen", "specialists"]
    assert all(set(row["held_out_nll"]) == set(specialists) for row in rows)
    sizes = [row["bytes_beside_the_base"] for row in rows]
    assert sizes[0] == 0 < sizes[1] < sizes[2] < sizes[4]


def test_the_specialists_of_rank_1_get_rank_1(out: Path, specialists: dict[str, Path]) -> None:
    """They differ from the base in one neuron, so rank 1 holds all of each change, and their loss to five digits."""
    record = json.loads((out / "solera.json").read_text())["checks"]
    assert record["ranks"] == dict.fromkeys(specialists, 1)
    base, chosen, full = (record["sizes"][i]["held_out_nll"] for i in (0, 3, 4))
    for name in specialists:
        assert chosen[name] == pytest.approx(full[name], rel=1e-4)
        assert chosen[name] < base[name]
        assert json.loads((out / name / "adapter_config.json").read_text())["r"] == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft itself
def test_peft_reads_every_adapter(
    out: Path, siblings: dict[str, Path], specialists: dict[str, Path], logits: Callable[..., Any]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    ids = torch.randint(0, 304, (1, 60), generator=torch.Generator().manual_seed(0))
    for name, path in specialists.items():
        base = loader.from_pretrained(siblings["base"], dtype=torch.float32)
        model: Any = PeftModel.from_pretrained(base, out / name)
        with torch.inference_mode():
            found = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(found, logits(path), rtol=0, atol=1e-4)


def test_the_directory_is_a_route(
    out: Path, domain_text: dict[str, Path], tmp_path: Path, siblings: dict[str, Path]
) -> None:
    """Also when it has been moved: the adapters come with it, and the base is found where it was."""
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    moved.symlink_to(out, target_is_directory=True)
    for place in (out, moved):
        models = RoutedModels.open(place)
        for name, file in domain_text.items():
            texts = [json.loads(line)["text"] for line in file.read_text().splitlines()[:3]]
            assert models.route(texts) == [name] * 3
    (score,) = models.nll(["12 34 56 78"], specialist="digits")
    assert np.isfinite(score.nll)


def test_a_rank_is_chosen_by_loss() -> None:
    """Low ranks can be worse than none; a higher one is not better for being higher."""
    assert choose_rank({4: 3.1, 8: 2.0, 16: 2.5}, tolerance=0.0) == 8
    assert choose_rank({4: 2.005, 8: 2.0, 16: 2.5}, tolerance=0.005) == 4
    assert choose_rank({4: 2.02, 8: 2.0, 16: 1.999}, tolerance=0.005) == 8


def test_what_low_ranks_lose_is_said(
    siblings: dict[str, Path], domain_text: dict[str, Path], specialists: dict[str, Path], tmp_path: Path
) -> None:
    """A specialist whose gain lies in the norm, which no adapter of matrices holds."""
    name, path = next(iter(specialists.items()))
    models = dict(specialists)
    models[name] = tmp_path / "norms"
    models[name].mkdir()
    for file in siblings["base"].iterdir():
        (models[name] / file.name).write_bytes(file.read_bytes())
    tensors, tuned = load_file(siblings["base"] / "model.safetensors"), load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 0.5
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] = tensors[key] + 0.01 * tuned["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, models[name] / "model.safetensors", metadata={"format": "pt"})
    raw = settings(siblings["base"], models, domain_text, ranks=[2])
    out = extract_experts(parse(ExtractExpertsConfig, raw, where="test"), tmp_path / "out", Context())
    record = json.loads((out / "solera.json").read_text())["checks"]
    assert any(w.startswith(f"{name}: ") and "modules_to_save: auto" in w for w in record["warnings"])


def test_planning(raw: dict[str, Any], tmp_path: Path, specialists: dict[str, Path]) -> None:
    config = parse(ExtractExpertsConfig, raw, where="test")
    plan = plan_extract_experts(config, Context())
    assert [row["specialist"] for row in plan.rows] == list(specialists)
    extract_skeleton(config, tmp_path / "skeleton", Context())
    assert (tmp_path / "skeleton" / "route.json").is_file()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranks": []}, ConfigError, "ranks"),
        ({"data": {}}, ConfigError, "data"),
        ({"data": {"letters": "x.jsonl"}}, ConfigError, "no text for digits, signs"),
        ({"specialists": [{"name": "a/b", "model": "x"}]}, ConfigError, "specialists"),
        ({"base_model": "nowhere"}, CheckpointError, "nowhere"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str, raw: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        plan_extract_experts(parse(ExtractExpertsConfig, raw | change, where="test"), Context())


def test_bad_models_and_texts(
    raw: dict[str, Any], siblings: dict[str, Path], tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    base = raw["specialists"] + [{"name": "same", "model": str(siblings["base"])}]
    data = raw["data"] | {"same": raw["data"]["letters"]}
    with pytest.raises(ConfigError, match="is the base itself"):
        parse(ExtractExpertsConfig, raw | {"specialists": base, "data": data}, where="test")
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": "one"}, {"text": "two"}])
    config = parse(ExtractExpertsConfig, raw | {"data": raw["data"] | {"signs": str(few)}}, where="test")
    with pytest.raises(DataError, match="signs: 1 documents to fit on and 1 held out are too little"):
        extract_experts(config, tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()
