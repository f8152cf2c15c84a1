"""Target qwen2_moe: Qwen2 specialists as a Qwen2MoeForCausalLM.

The format always has a shared expert that works on every token, under a sigmoid of its own gate. The gate is zero here,
so the factor is one half for every token, and its output matrix is written twice as large. Without `shared` in the
recipe it is 32 wide and all zeros, so it adds nothing.
Its biases of q, k, v are always written, zeros for models without: vLLM takes them for granted. Windows of some layers
only are kept. llama.cpp never renormalises the top-k weights here, so with it fewer than all experts a token give a
feed-forward network that is too small by the mass of the others.
"""

from collections.abc import Mapping
from typing import Any, Final

from solera_merge.moe.targets.engines import Doubts, only_silu, own_head_size
from solera_merge.moe.targets.target import SLOTS, SharedHome, Sizes, Slot, Target

__all__ = ["TARGET"]

_SHARED_WIDTH: Final = 32
"""Not 0, which llama.cpp takes for "not given"; 32 is the least that quantised formats can store rows of."""


def _settings(fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    layers, window = fields["num_hidden_layers"], fields["sliding_window"]
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        "intermediate_size": sizes.width,
        "moe_intermediate_size": sizes.width,
        "shared_expert_intermediate_size": sizes.shared or _SHARED_WIDTH,
        "num_experts": sizes.experts,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": layers,
        "layer_types": fields["layer_types"] or [kind] * layers,
    }


def _engines(fields: Mapping[str, Any], sizes: Sizes) -> Doubts:
    found: Doubts = {}
    if sizes.top_k < sizes.experts:
        found["llama.cpp"] = (
            "approximate",
            "it never renormalises the top-k weights: exact with top_k equal to the number of experts, else too small "
            "by the mass of the experts not chosen",
        )
    if fields["tie_word_embeddings"]:
        found["llama.cpp"] = ("unsupported", "it wants an output head of its own, and this one is the embedding")
    if fields["sliding_window"] is not None:
        found["vllm"] = ("approximate", "windows by layer: not known to be applied")
        found.setdefault("llama.cpp", ("approximate", "it applies no sliding window"))
    return found | own_head_size(fields) | only_silu(fields)


def _zeros(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    d = fields["hidden_size"]
    queries, keys = (fields[name] * fields["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    biases = {"q": queries, "k": keys, "v": keys} if fields["attention_bias"] == "none" else {}
    return {
        **{f"self_attn.{p}_proj.bias": (rows,) for p, rows in biases.items()},
        "mlp.shared_expert.gate_proj.weight": (_SHARED_WIDTH, d),
        "mlp.shared_expert.up_proj.weight": (_SHARED_WIDTH, d),
        "mlp.shared_expert.down_proj.weight": (d, _SHARED_WIDTH),
        "mlp.shared_expert_gate.weight": (1, d),
    }


TARGET: Final = Target(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    homes={"attention_bias": ("none", "qkv"), "sliding_window": (), "layer_types": ()},
    router="model.layers.{layer}.mlp.gate.weight",
    router_path="model.layers.{layer}.mlp.gate",
    slots=SLOTS,
    settings=_settings,
    engines=_engines,
    zeros=_zeros,
    shared=SharedHome(
        (
            Slot("mlp.shared_expert.gate_proj.weight"),
            Slot("mlp.shared_expert.up_proj.weight"),
            Slot("mlp.shared_expert.down_proj.weight"),
        ),
        factor=2.0,
    ),
)
