"""Target flex_olmo: OLMo-2 specialists as a FlexOlmoForCausalLM.

Norms stand behind attention and feed-forward network, queries and keys are normalised over all heads, as in OLMo-2. So
the router reads the residual stream itself, no norm before it. `norm_topk_prob` is on.
"""

from collections.abc import Mapping
from typing import Any, Final

from solera_merge.moe.targets.engines import Doubts, only_silu
from solera_merge.moe.targets.target import SLOTS, Sizes, Target

__all__ = ["TARGET"]


def _settings(fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    return {
        "attention_bias": fields["attention_bias"] == "qkvo",
        "intermediate_size": sizes.width,
        "num_experts": sizes.experts,
        "norm_topk_prob": True,
    }


def _engines(fields: Mapping[str, Any], sizes: Sizes) -> Doubts:
    found: Doubts = only_silu(fields)
    if sizes.top_k < sizes.experts:
        why = "it never renormalises the top-k weights: exact with top_k equal to the number of experts"
        found.setdefault("vllm", ("approximate", why))
    found["llama.cpp"] = ("unsupported", "it does not know flex_olmo")
    return found


TARGET: Final = Target(
    name="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    homes={"attention_bias": ("none", "qkvo"), "qk_norm": ("width",), "norms": ("after",)},
    router="model.layers.{layer}.mlp.gate.weight",
    router_path="model.layers.{layer}.mlp.gate",
    slots=SLOTS,
    settings=_settings,
    engines=_engines,
)
