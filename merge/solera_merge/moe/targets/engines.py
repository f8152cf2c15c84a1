"""What vLLM and llama.cpp do differently from transformers, as far as it is the same for several targets.

From reading their sources (one version each, 2026), not from running them.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from solera_merge.moe.targets.target import Engine

__all__ = ["Doubts", "only_silu", "own_head_size", "window_in_llama_cpp"]

Doubts: TypeAlias = dict[Engine, tuple[Literal["approximate", "unsupported"], str]]
"""Engines that do not compute what transformers does: how far off, and why."""


def only_silu(fields: Mapping[str, Any]) -> Doubts:
    """Both know one activation in their expert kernels."""
    act = fields["hidden_act"]
    if act == "silu":
        return {}
    return {
        "vllm": ("unsupported", f"its experts know silu only, and hidden_act is {act!r}"),
        "llama.cpp": ("unsupported", f"it computes silu whatever the config says, and hidden_act is {act!r}"),
    }


def own_head_size(fields: Mapping[str, Any]) -> Doubts:
    """Models whose heads are not hidden_size / heads wide, in a format whose loaders take that for granted."""
    if fields["head_dim"] * fields["num_attention_heads"] == fields["hidden_size"]:
        return {}
    why = f"it takes head_dim for hidden_size / num_attention_heads, and it is {fields['head_dim']}"
    return {"vllm": ("unsupported", why), "llama.cpp": ("unsupported", why)}


def window_in_llama_cpp(fields: Mapping[str, Any]) -> Doubts:
    """llama.cpp applies no sliding window here: the same up to that many tokens."""
    window = fields["sliding_window"]
    if window is None:
        return {}
    return {"llama.cpp": ("approximate", f"it applies no sliding window: exact up to {window} tokens of context")}
