"""The name map and the config against what transformers itself writes and reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_merge.moe.dense import read_dense
from solera_merge.moe.targets.mixtral import TARGET
from solera_merge.moe.targets.target import Sizes

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama head_dim": {"head_dim": 16},
    "llama tied": {"tie_word_embeddings": True},
    "llama llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "llama yarn rope": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral window": {"family": "mistral", "sliding_window": 16},
    "mistral no window": {"family": "mistral", "sliding_window": None},
}


@pytest.fixture(params=FAMILIES.values(), ids=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path: Path, make_model: Callable[..., Path]) -> dict[str, Path]:
    """A base and two siblings of one family."""
    base = make_model(tmp_path / "base", **request.param)
    return {"base": base} | {n: make_model(tmp_path / n, base=base, seed=i + 1, noise=0.3) for i, n in enumerate("ab")}


def tensors_of(directory: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                part = opened.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def test_keys_shapes_and_config_are_those_that_save_pretrained_writes(
    pair: dict[str, Path], tmp_path: Path, build: Callable[..., Path]
) -> None:
    import torch
    from transformers import AutoConfig, MixtralForCausalLM

    out = build(tmp_path / "moe", pair["base"], {"a": pair["a"], "b": pair["b"]})
    config: Any = AutoConfig.from_pretrained(out)
    with torch.device("cpu"):
        MixtralForCausalLM(config).save_pretrained(tmp_path / "golden")
    assert tensors_of(out) == tensors_of(tmp_path / "golden")

    written = json.loads((out / "config.json").read_text())
    golden = json.loads((tmp_path / "golden" / "config.json").read_text())
    source = AutoConfig.from_pretrained(pair["base"])
    # Every field that MixtralConfig has is written out: none is left to a default of a later version.
    assert golden.keys() - {"transformers_version"} <= written.keys()
    assert written.keys() - golden.keys() <= {"rope_theta", "rope_scaling"}
    for field in golden.keys() & set(source.to_dict()) - {"architectures", "model_type", "transformers_version"}:
        assert golden[field] == source.to_dict()[field], field
    assert config.num_local_experts == 2
    assert config.num_experts_per_tok == 2


def test_identical_experts_give_the_dense_logits(
    pair: dict[str, Path], tmp_path: Path, build: Callable[..., Path], logits: Callable[..., Any], make_model: Any
) -> None:
    # Through the public way in. Equal models are refused, so the second expert differs in its trunk alone.
    import shutil

    from safetensors.numpy import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(pair["base"], other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    out = build(tmp_path / "moe", pair["base"], {"untuned": pair["base"], "other": other})
    expected = logits(pair["base"])
    assert (logits(out) - expected).abs().max() <= 1e-5
    assert (logits(pair["a"]) - expected).abs().max() > 1e-2  # a sibling is far away: the test can fail
    checks = json.loads((out / "solera.json").read_text())["checks"]
    assert any("same feed-forward networks" in warning for warning in checks["warnings"])


def test_every_build_records_its_identity_check(
    pair: dict[str, Path], tmp_path: Path, build: Callable[..., Path]
) -> None:
    out = build(tmp_path / "moe", pair["base"], {"a": pair["a"], "b": pair["b"]})
    identity = json.loads((out / "solera.json").read_text())["checks"]["identity"]
    assert identity["layers"] == [0, 1]
    assert identity["tolerance"] == 1e-5
    assert 0 <= identity["identical_experts"] <= 1e-5
    assert all(0 <= value <= 1e-5 for value in (*identity["specialists"].values(), identity["on_trunk"]))
    window = json.loads((out / "config.json").read_text())["sliding_window"]
    assert identity["window_exercised"] is (None if window is None else True)
    assert all(distance > 0.02 for distance in identity["trunk_distance"].values())


def test_name_map_by_hand(siblings: dict[str, Path]) -> None:
    from solera_core.checkpoint import open_checkpoint

    fields = dict(read_dense("trunk", open_checkpoint(siblings["base"], Context())).fields, num_hidden_layers=1)
    found = {(p.name, p.shape, p.source, p.expert) for p in TARGET.pieces(fields, experts=2, width=64)}
    layer = "model.layers.0."
    moe = layer + "block_sparse_moe."
    assert found == {
        ("model.embed_tokens.weight", (304, 32), "model.embed_tokens.weight", None),
        ("model.norm.weight", (32,), "model.norm.weight", None),
        ("lm_head.weight", (304, 32), "lm_head.weight", None),
        *((layer + n, (32,), layer + n, None) for n in ("input_layernorm.weight", "post_attention_layernorm.weight")),
        *((layer + f"self_attn.{p}_proj.weight", (32, 32), layer + f"self_attn.{p}_proj.weight", None) for p in "qo"),
        *((layer + f"self_attn.{p}_proj.weight", (16, 32), layer + f"self_attn.{p}_proj.weight", None) for p in "kv"),
        *((moe + f"experts.{e}.w1.weight", (64, 32), layer + "mlp.gate_proj.weight", e) for e in (0, 1)),
        *((moe + f"experts.{e}.w3.weight", (64, 32), layer + "mlp.up_proj.weight", e) for e in (0, 1)),
        *((moe + f"experts.{e}.w2.weight", (32, 64), layer + "mlp.down_proj.weight", e) for e in (0, 1)),
        (moe + "gate.weight", (2, 32), None, None),
    }


def test_a_field_without_a_home_is_an_error(siblings: dict[str, Path]) -> None:
    from solera_core.checkpoint import open_checkpoint

    fields = {**read_dense("trunk", open_checkpoint(siblings["base"], Context())).fields, "logit_scale": 2.0}
    with pytest.raises(CheckpointError, match="logit_scale: no home in Mixtral"):
        TARGET.config(fields, Sizes(2, 1, 48), dtype="float32")
