"""Which parameters are what, on real architectures."""

from typing import Any

import pytest

from solera_core.errors import ConfigError
from solera_distill import parts


def build(family: str, **settings: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": None}
    if family == "gpt2":
        shape = {"vocab_size": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.for_model(family, **shape, **settings)
        )


@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 4}),
        ("gemma2", {"head_dim": 4}),
        ("gpt2", {}),
        ("mixtral", {"num_local_experts": 2}),
        ("qwen2_moe", {"num_experts": 2, "moe_intermediate_size": 4, "shared_expert_intermediate_size": 4}),
        ("olmoe", {"num_experts": 2}),
        ("granitemoe", {"num_local_experts": 2}),
    ],
)
def test_every_parameter_has_its_part(family: str, settings: dict[str, Any]) -> None:
    found = parts.part_of_parameters(build(family, **settings))
    expected = {"ffn", "attention", "norms", "embeddings"} | (
        {"router"} if any("experts" in k for k in settings) else set()
    )
    assert set(found.values()) == expected
    for name, part in found.items():
        if "norm" in name or ".ln_" in name:
            assert part == "norms", name
        elif "embed" in name or "lm_head" in name or "wte" in name or "wpe" in name:
            assert part == "embeddings", name
        elif "attn" in name:
            assert part == "attention", name
        elif name.endswith((".gate.weight", ".router.layer.weight", ".router.weight", "shared_expert_gate.weight")):
            assert part == "router", name
        else:
            assert part == "ffn", name


def test_only_the_named_parts_train() -> None:
    model = build("mixtral", num_local_experts=2)
    parts.freeze_all_but(model, ["router", "norms"])
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert training == {n for n, _ in model.named_parameters() if "norm" in n or ".gate." in n}


def test_absent_parts_are_named() -> None:
    with pytest.raises(ConfigError, match=r"no router \(it has: attention, embeddings, ffn, norms\)"):
        parts.freeze_all_but(build("llama"), ["router"])


def test_groups_carry_rate_and_decay() -> None:
    model = build("llama")
    part_of = parts.freeze_all_but(model, "all")
    groups = parts.groups(model, part_of, lr_parts={"embeddings": 0.1}, weight_decay=0.5)
    found = {(g["share"], g["weight_decay"]): len(g["params"]) for g in groups}
    assert found == {(0.1, 0.0): 2, (1.0, 0.5): 14, (1.0, 0.0): 5}  # embeddings and head; 7 matrices a layer; norms
    with pytest.raises(ConfigError, match="lr_parts: this model has no router"):
        parts.groups(model, part_of, lr_parts={"router": 2.0}, weight_decay=0.0)
