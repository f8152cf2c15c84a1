"""Target granitemoe: Granite, Llama (also with biases of attention), Qwen2 and Gemma 1 as a GraniteMoeForCausalLM.

All experts of a layer lie in two tensors, (E, 2F, D) with gate before up, and (E, D, F). The four multipliers are
Granite's own; a Llama has 1, 1, 1 and head_dim ** -0.5, a Gemma its sqrt(D) on the embeddings. Softmax over the top k
alone is the same as renormalising. Biases of q, k, v bring one of o with them: zeros where the model has none.
"""

from collections.abc import Mapping
from typing import Any, Final

from solera_merge.moe.targets.engines import Doubts, only_silu, own_head_size
from solera_merge.moe.targets.target import Sizes, Slot, Target

__all__ = ["GRANITE_HOMES", "GRANITE_SLOTS", "TARGET", "granite_engines", "granite_settings", "granite_zeros"]

GRANITE_HOMES: Final[dict[str, tuple[Any, ...]]] = {
    "attention_bias": ("none", "qkv", "qkvo"),
    "embedding_multiplier": (),
    "attention_multiplier": (),
    "residual_multiplier": (),
    "logits_scaling": (),
}
GRANITE_SLOTS: Final = (
    Slot("block_sparse_moe.input_linear.weight", half=0),
    Slot("block_sparse_moe.input_linear.weight", half=1),
    Slot("block_sparse_moe.output_linear.weight"),
)


def granite_settings(fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """What both GraniteMoe formats say in config.json."""
    attention = fields["attention_multiplier"]
    return {
        "intermediate_size": sizes.width,
        "num_local_experts": sizes.experts,
        "attention_bias": fields["attention_bias"] != "none",
        "embedding_multiplier": fields["embedding_multiplier"],
        "attention_multiplier": fields["head_dim"] ** -0.5 if attention is None else attention,
        "residual_multiplier": fields["residual_multiplier"],
        "logits_scaling": fields["logits_scaling"],
    }


def granite_engines(fields: Mapping[str, Any], _: Sizes) -> Doubts:
    """What engines do otherwise: vLLM builds attention without biases, and skips those of the file without a word."""
    found: Doubts = {}
    if fields["attention_bias"] != "none":
        found["vllm"] = ("unsupported", "it drops the biases of attention without a word")
    return found | own_head_size(fields) | only_silu(fields)


def granite_zeros(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The bias of o that comes with those of q, k, v."""
    return {"self_attn.o_proj.bias": (fields["hidden_size"],)} if fields["attention_bias"] == "qkv" else {}


TARGET: Final = Target(
    name="granitemoe",
    architecture="GraniteMoeForCausalLM",
    homes=GRANITE_HOMES,
    router="model.layers.{layer}.block_sparse_moe.router.layer.weight",
    router_path="model.layers.{layer}.block_sparse_moe.router",
    slots=GRANITE_SLOTS,
    settings=granite_settings,
    engines=granite_engines,
    zeros=granite_zeros,
)
