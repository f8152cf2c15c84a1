"""What config and tensor names say about a decoder: layers, experts, embeddings, tying. No table of models."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

__all__ = [
    "EMBEDDING",
    "HEAD",
    "experts_per_token",
    "fused_experts",
    "has_tokens_beyond_vocabulary",
    "is_embedding",
    "is_head",
    "layer_of",
    "num_experts",
    "num_layers",
    "text_config",
    "ties_embeddings",
    "ties_with_a_stored_head",
    "vocab_size",
]

EMBEDDING: Final = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|token_embedding|embeddings|shared)\.weight$"
)
"""Names of the input embedding, rows = vocabulary."""

HEAD: Final = re.compile(r"(^|\.)(lm_head|embed_out|proj_out)\.weight$|^output\.weight$")
"""Names of the output head, rows = vocabulary."""

_LAYER: Final = re.compile(r"^(?P<stack>(?:.*?\.)?(?:layers|h|blocks|block))\.(?P<index>\d+)\.")
_OTHER_TOWER: Final = re.compile(r"vision|visual|audio|image|video|speech|encoder|qformer|perceiver")
_LAYER_KEYS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_EXPERT_KEYS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_KEYS: Final = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the config that describes the language model (nested in multimodal ones)."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(inner := config.get(key), Mapping):
            return inner
    return config


def _first(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    inner = text_config(config)
    return next((int(inner[k]) for k in keys if isinstance(inner.get(k), int)), None)


def num_layers(config: Mapping[str, Any]) -> int | None:
    """Number of decoder layers by the config."""
    return _first(config, _LAYER_KEYS)


def num_experts(config: Mapping[str, Any]) -> int | None:
    """Number of routed experts a layer by the config; None for a dense model."""
    return _first(config, _EXPERT_KEYS)


def experts_per_token(config: Mapping[str, Any]) -> int | None:
    """Number of routed experts a token visits by the config; None for a dense model."""
    return _first(config, _TOP_K_KEYS)


def fused_experts(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> int:
    """Number of experts whose tensors of one kind are stored as one, along its first axis; 1: it is one tensor.

    So are those of gpt-oss and Llama 4 (`experts.gate_up_proj` and its bias) and GraniteMoe
    (`block_sparse_moe.input_linear.weight`); with `experts.0.` in the name it is one expert's.
    """
    count = num_experts(config)
    if count is None or count < 2 or len(shape) < 2 or shape[0] != count:
        return 1
    named = re.search(r"\.experts\.(?!\d)", name) is not None
    return count if named or (len(shape) == 3 and shape[1] > 1 and "moe" in name) else 1


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding by the config."""
    return _first(config, ("vocab_size",))


def has_tokens_beyond_vocabulary(config: Mapping[str, Any]) -> bool:
    """Whether the config names a token with an id of vocab_size or more (Mllama's image token): then the embedding has
    more rows than vocab_size says, and the head has not.
    """
    size = vocab_size(config)
    ids = (value for key, value in config.items() if re.search(r"_token_(index|id)$", key))
    return size is not None and any(isinstance(i, int) and i >= size for i in ids)


def layer_of(name: str) -> tuple[str, int] | None:
    """`("model.layers", 3)` for a tensor of the language model's layer 3; None outside layers and in other towers."""
    match = _LAYER.match(name)
    if match is None or _OTHER_TOWER.search(match["stack"]):
        return None
    return match["stack"], int(match["index"])


def is_embedding(name: str) -> bool:
    """Whether this is the language model's input embedding."""
    return EMBEDDING.search(name) is not None and not _OTHER_TOWER.search(name)


def is_head(name: str) -> bool:
    """Whether this is the language model's output head."""
    return HEAD.search(name) is not None and layer_of(name) is None and not _OTHER_TOWER.search(name)


def ties_embeddings(config: Mapping[str, Any]) -> bool | None:
    """The config's tie flag (outer level first, as transformers reads it); None where it does not say."""
    for level in (config, text_config(config)):
        if isinstance(flag := level.get("tie_word_embeddings"), bool):
            return flag
    return None


def ties_with_a_stored_head(config: Mapping[str, Any]) -> bool:
    """Whether transformers ties the embeddings of a checkpoint that stores an output head all the same.

    Where the config does not say, the default of its model type decides (Gemma and GPT-2 tie, Llama does not), and only
    transformers knows it: it is imported for this one rare question. False for a type that it does not know.
    """
    if (flag := ties_embeddings(config)) is not None or not isinstance(config.get("model_type"), str):
        return bool(flag)
    from transformers import AutoConfig

    try:
        return bool(getattr(AutoConfig.for_model(config["model_type"]), "tie_word_embeddings", False))
    except (ValueError, KeyError):
        return False
