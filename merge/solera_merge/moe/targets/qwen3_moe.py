"""Target qwen3_moe: Qwen3 specialists as a Qwen3MoeForCausalLM.

Queries and keys are normalised head by head, as in Qwen3, and `norm_topk_prob` is on, without which the top-k weights
would not add up to 1. The target that engines agree on best.
"""

from collections.abc import Mapping
from typing import Any, Final

from solera_merge.moe.targets.engines import Doubts, only_silu, window_in_llama_cpp
from solera_merge.moe.targets.target import SLOTS, Sizes, Target

__all__ = ["TARGET"]


def _settings(fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    return {
        "head_dim": fields["head_dim"],
        "attention_bias": fields["attention_bias"] == "qkvo",
        "intermediate_size": sizes.width,
        "moe_intermediate_size": sizes.width,
        "num_experts": sizes.experts,  # what engines read,
        "num_local_experts": sizes.experts,  # and what transformers 5 writes
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": fields["sliding_window"] is not None,
        "sliding_window": fields["sliding_window"],
    }


def _engines(fields: Mapping[str, Any], _: Sizes) -> Doubts:
    found = window_in_llama_cpp(fields)
    if fields["attention_bias"] != "none":
        found["llama.cpp"] = ("unsupported", "it has no biases of attention here")
    return found | only_silu(fields)


TARGET: Final = Target(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    homes={"attention_bias": ("none", "qkvo"), "qk_norm": ("head",), "sliding_window": ()},
    router="model.layers.{layer}.mlp.gate.weight",
    router_path="model.layers.{layer}.mlp.gate",
    slots=SLOTS,
    settings=_settings,
    engines=_engines,
)
