"""Target mixtral: Llama, Mistral and Phi-3 specialists as a MixtralForCausalLM.

Exact, because Mixtral is Mistral with the feed-forward network replaced: its router renormalises the top-k weights, so
equal experts give back the dense model. Names on disk are the ones that transformers writes and every engine knows
(`block_sparse_moe.experts.e.w1`, not the fused ones of transformers' memory): w1 = gate, w2 = down, w3 = up.
"""

from collections.abc import Mapping
from typing import Any, Final

from solera_merge.moe.targets.engines import Doubts, only_silu, window_in_llama_cpp
from solera_merge.moe.targets.target import Sizes, Slot, Target

__all__ = ["TARGET"]


def _settings(fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    return {
        "head_dim": fields["head_dim"],
        "sliding_window": fields["sliding_window"],
        "intermediate_size": sizes.width,
        "num_local_experts": sizes.experts,
        "router_jitter_noise": 0.0,
    }


def _engines(fields: Mapping[str, Any], _: Sizes) -> Doubts:
    return window_in_llama_cpp(fields) | only_silu(fields)


TARGET: Final = Target(
    name="mixtral",
    architecture="MixtralForCausalLM",
    homes={"sliding_window": ()},
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    router_path="model.layers.{layer}.mlp.gate",
    slots=(
        Slot("block_sparse_moe.experts.{e}.w1.weight"),
        Slot("block_sparse_moe.experts.{e}.w3.weight"),
        Slot("block_sparse_moe.experts.{e}.w2.weight"),
    ),
    settings=_settings,
    engines=_engines,
)
