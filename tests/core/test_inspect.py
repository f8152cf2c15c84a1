"""Counts and descriptions from headers alone, against what transformers counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from solera_core.causal_lm import load_model
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_core.inspect import describe, parameter_count
from solera_core.output import write_provenance
from solera_core.provenance import InputRecord

EXPERT = 3 * 32 * 48  # three matrices of width 32 and 48

FAMILIES: dict[str, tuple[dict[str, Any], int]] = {  # settings, parameters of routed experts a token does not visit
    "llama": ({}, 0),
    "qwen2": ({"tie_word_embeddings": True}, 0),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 1}, 2 * 3 * EXPERT),
    "qwen3_moe": (
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "head_dim": 8,
            "decoder_sparse_step": 2,
        },
        5 * EXPERT,
    ),
    "qwen2_moe": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 64,
        },
        2 * 2 * EXPERT,
    ),
    "granitemoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 2 * 2 * EXPERT),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters(family: str, tmp_path: Path, make_model: Callable[..., Path], ctx: Context) -> None:
    settings, idle = FAMILIES[family]
    path = make_model(tmp_path / "m", family=family, dtype="bfloat16", **settings)
    count = parameter_count(open_checkpoint(path, ctx))
    assert count.total == load_model(path).num_parameters()
    assert count.total - count.active == idle
    tied = open_checkpoint(path, ctx).config.get("tie_word_embeddings")
    assert count.embedding == 304 * 32 * (1 if tied else 2)
    assert count.bytes == 2 * count.total


def test_fused_experts_count_the_same(tmp_path: Path, make_model: Callable[..., Path], ctx: Context) -> None:
    path = make_model(tmp_path / "m", family="qwen3_moe", **FAMILIES["qwen3_moe"][0])
    before = parameter_count(open_checkpoint(path, ctx))
    model = load_model(path)
    save_file({n: t.clone() for n, t in model.state_dict().items()}, path / "model.safetensors")
    names = open_checkpoint(path, ctx).tensors
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert parameter_count(open_checkpoint(path, ctx)) == before


@pytest.mark.parametrize("value", [None, 0, 5])
def test_experts_without_a_number_of_visits(
    value: int | None, tmp_path: Path, make_model: Callable[..., Path], ctx: Context
) -> None:
    path = make_model(tmp_path / "m", family="mixtral", num_local_experts=4, num_experts_per_tok=2)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": value}))
    with pytest.raises(CheckpointError, match=rf"num_experts_per_tok: {value}"):
        parameter_count(open_checkpoint(path, ctx))


def test_a_description(llama: Path, ctx: Context) -> None:
    (llama / "README.md").write_text("---\nlicense: apache-2.0\ntags: [merge]\n---\n# A model\n")
    inputs = [InputRecord("base", "me/base", "abc", "blake3:00")]
    write_provenance(llama, kind="merge", recipe={}, seed=3, inputs=inputs, tensors=None, checks={})
    found = describe(open_checkpoint("llama", ctx))
    assert json.loads(json.dumps(found)) == found
    assert found["family"] == "llama"
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert (found["layers"], found["hidden_size"], found["vocab_size"], found["context"]) == (2, 32, 304, 128)
    assert found["tied_embeddings"] is False
    assert found["dtypes"] == {"F32": 21}
    assert found["parameters"]["total"] == sum(t.numel() for t in load_file(llama / "model.safetensors").values())
    assert found["tokenizer"]["file"] == "tokenizer.json"
    assert found["tokenizer"]["chat_template"] is False
    assert found["licence"] == "apache-2.0"
    assert found["provenance"] == {
        "kind": "merge",
        "seed": 3,
        "solera": "0.1.0",
        "inputs": [{"name": "base", "ref": "me/base", "revision": "abc"}],
    }


def test_what_is_absent_is_none(llama: Path, ctx: Context) -> None:
    (llama / "tokenizer.json").unlink()
    found = describe(open_checkpoint(llama, ctx))
    assert (found["tokenizer"], found["licence"], found["provenance"], found["experts"]) == (None, None, None, None)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "other (llama3)"),
        ("---\nlicense: other\n---", "other"),
        ("# no header\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: [a\n---\n", None),
        ("---\ntags: []\n---\n", None),
    ],
)
def test_licences(card: str, licence: str | None, llama: Path, ctx: Context) -> None:
    (llama / "README.md").write_text(card)
    assert describe(open_checkpoint(llama, ctx))["licence"] == licence


def test_chat_templates_in_either_place(llama: Path, ctx: Context) -> None:
    (llama / "chat_template.jinja").write_text("x")
    assert describe(open_checkpoint(llama, ctx))["tokenizer"]["chat_template"] is True
    (llama / "chat_template.jinja").unlink()
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    (llama / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "x"}))
    assert describe(open_checkpoint(llama, ctx))["tokenizer"]["chat_template"] is True


def test_the_real_model(shared_data: Path, ctx: Context) -> None:
    found = describe(open_checkpoint(shared_data / "weights" / "stories260K-hf", ctx))
    assert found["family"] == "llama"
    assert found["layers"] == 5
    assert 250_000 < found["parameters"]["total"] < 300_000


def test_multimodal_configs_are_read_where_the_text_is(tmp_path: Path, ctx: Context) -> None:
    tensors = {
        "model.language_model.layers.0.x.weight": torch.zeros(2, 2),
        "model.vision_tower.encoder.layers.5.x.weight": torch.zeros(2, 2),
        "model.language_model.embed_tokens.weight": torch.zeros(7, 2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "llava", "text_config": {"num_hidden_layers": 1, "vocab_size": 7, "hidden_size": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = describe(open_checkpoint(tmp_path, ctx))
    assert (found["layers"], found["vocab_size"], found["hidden_size"]) == (1, 7, 2)
    assert found["parameters"]["embedding"] == 14
