"""The families of dense models that can become a MoE: what every field of their config.json means, in one language.

A field that config.json leaves out has the family's default, and the families disagree (Mixtral's rope theta is
1 000 000, Llama's 10 000), so nothing is ever left to a default of the target. What a family computes differently from
a plain Llama becomes a feature (`PLAIN` lists them), and a target says which features it has a home for.
"""

from collections.abc import Mapping
from typing import Any, Final

from solera_core.errors import CheckpointError

__all__ = ["ARCHITECTURES", "DEFAULTS", "PLAIN", "WAY_OUT", "no_family", "resolve"]

WAY_OUT: Final = (
    "merge these models with `solera merge`, or keep them whole and send each request to the right one with "
    "`solera route`"
)

_COMMON: Final[dict[str, Any]] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_QWEN: Final[dict[str, Any]] = _COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "llama": _COMMON | {"head_dim": None, "attention_bias": False, "mlp_bias": False},
    "mistral": _COMMON
    | {
        "head_dim": None,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "phi3": _COMMON
    | {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "sliding_window": None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128, "attention_bias": False},
    "olmo2": _COMMON
    | {
        "vocab_size": 50304,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "attention_bias": False,
    },
    "granite": _COMMON
    | {
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    "gemma": _COMMON
    | {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_bidirectional_attention": None,
    },
}
"""As transformers' configuration classes have them; a test compares."""

ARCHITECTURES: Final[dict[str, str]] = {
    family: f"{name}ForCausalLM"
    for family, name in {
        "llama": "Llama",
        "mistral": "Mistral",
        "phi3": "Phi3",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "olmo2": "Olmo2",
        "granite": "Granite",
        "gemma": "Gemma",
    }.items()
}

PLAIN: Final[dict[str, Any]] = {
    "attention_bias": "none",
    "mlp_bias": False,
    "qk_norm": "none",
    "norms": "before",
    "sliding_window": None,
    "layer_types": None,
    "embedding_multiplier": 1.0,
    "attention_multiplier": None,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
"""The features, as a plain Llama has them.

    attention_bias          none, qkv, or qkvo
    mlp_bias                the feed-forward network has biases
    qk_norm                 none, head (over each head's width), or width (over all heads)
    norms                   before attention and feed-forward network, or after
    sliding_window          tokens that attention looks back, where it is bounded
    layer_types             of every layer, where only some have the window
    embedding_multiplier    of the embeddings
    attention_multiplier    of attention scores (None: head_dim ** -0.5)
    residual_multiplier     of what attention and feed-forward network add
    logits_scaling          divisor of the logits
"""

# The field that settles it, for families that people try: no format has a home for what it does.
_NO_HOME: Final[dict[str, tuple[str, str]]] = {
    "gemma2": ("attn_logit_softcapping", "its attention scores are capped, and every layer has four norms"),
    "gemma3_text": ("layer_types", "local and global layers rotate differently, and every layer has four norms"),
    "gemma3": ("text_config", "it is a model of text and images; its layers have four norms and two rotations"),
    "cohere": ("logit_scale", "attention and feed-forward network run side by side, behind a LayerNorm"),
    "cohere2": ("logit_scale", "attention and feed-forward network run side by side, behind a LayerNorm"),
    "phi": ("partial_rotary_factor", "attention and feed-forward network run side by side, and heads rotate in part"),
    "olmo": ("clip_qkv", "its LayerNorms have no weights, where every MoE format has RMSNorm"),
    "glm4": ("partial_rotary_factor", "heads rotate in part"),
    "stablelm": ("partial_rotary_factor", "heads rotate in part, and its norms have biases"),
    "gpt2": ("n_inner", "it has LayerNorm and learned positions"),
    "gpt_neox": ("use_parallel_residual", "it has LayerNorm, and attention and feed-forward network run side by side"),
    "smollm3": ("no_rope_layers", "some layers do not rotate"),
    "olmo3": ("layer_types", "the windows differ by layer"),
}

_ROPE_THETA: Final = 10_000.0
_ROPE_TYPES: Final = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_ROPE_FIELDS: Final = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")
_CARRIED: Final = frozenset(_COMMON) | {"head_dim"}

# Fields that say nothing about the function a model computes: bookkeeping, and what earlier versions of
# transformers kept of generation and classification settings in every config.
_BOOKKEEPING: Final = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "pretraining_tp",
        "unsloth_fixed",
        "unsloth_version",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "pruned_heads",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "add_cross_attention",
        "is_encoder_decoder",
        "is_decoder",
        "tie_encoder_decoder",
        "problem_type",
        "id2label",
        "label2id",
        "finetuning_task",
        "tokenizer_class",
        "prefix",
        "sep_token_id",
        "decoder_start_token_id",
        "task_specific_params",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
    }
)


def no_family(model_type: object, where: str) -> CheckpointError:
    """The error for a family that no target can hold, with the first field that settles it where that is known."""
    known = f"known: {', '.join(DEFAULTS)}"
    if isinstance(model_type, str) and model_type in _NO_HOME:
        field, why = _NO_HOME[model_type]
        return CheckpointError(
            f"{where}: {field} (model_type {model_type!r}) has no home in any MoE format: {why}; {WAY_OUT} ({known})"
        )
    return CheckpointError(
        f"{where}: model_type {model_type!r} is none of the families that can become a MoE exactly ({known}); {WAY_OUT}"
    )


def resolve(config: Mapping[str, Any], family: str, where: str) -> dict[str, Any]:
    """Every field that matters, from config.json and the family's defaults, in the language of `PLAIN`.

    Raises:
        CheckpointError: naming the field that no target has a home for, or that is not known.
    """
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{where}: quantization_config: the weights are quantised; use the unquantised model")
    defaults = DEFAULTS[family]
    if "sliding_window" not in defaults and config.get("sliding_window") is not None:
        raise CheckpointError(
            f"{where}: sliding_window is {config['sliding_window']}, which {ARCHITECTURES[family]} ignores and the MoE "
            "would apply; remove the field, or set model_type to 'mistral' if the window is meant"
        )
    known = {*defaults, *_ROPE_FIELDS, *_BOOKKEEPING, "partial_rotary_factor", "layer_types", "sliding_window"}
    known |= {"head_dim", "quantization_config", "hidden_activation"} | {"use_sliding_window", "max_window_layers"}
    unused = {key for key in ("attention_bias", "mlp_bias") if not config.get(key)}
    if unknown := sorted(set(config) - known - unused):
        raise CheckpointError(
            f"{where}: {', '.join(unknown)}: no home in any MoE format, and what "
            f"{'they do' if unknown[1:] else 'it does'} would be lost; if that is nothing, remove it from config.json"
        )
    given = {field: config.get(field, default) for field, default in defaults.items()}
    for field in ("resid_pdrop", "embd_pdrop", "use_bidirectional_attention"):
        if given.pop(field, None):
            raise CheckpointError(f"{where}: {field} is {config[field]!r}: no home in any MoE format; {WAY_OUT}")
    fields = {field: given[field] for field in defaults if field in _CARRIED}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields["head_dim"] = config.get("head_dim", defaults.get("head_dim"))
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if family == "gemma":
        if fields["hidden_act"] == "gelu":  # what the releases say and do not mean (transformers does the same)
            fields["hidden_act"] = "gelu_pytorch_tanh"
        given["embedding_multiplier"] = fields["hidden_size"] ** 0.5
    if config.get("hidden_activation") not in (None, fields["hidden_act"]):
        raise CheckpointError(
            f"{where}: hidden_activation is {config['hidden_activation']!r}, hidden_act {fields['hidden_act']!r}; "
            "keep the right one"
        )
    fields |= PLAIN | {
        "attention_bias": "qkv" if family == "qwen2" else "qkvo" if given.get("attention_bias") else "none",
        "mlp_bias": bool(given.get("mlp_bias")),
        "qk_norm": {"qwen3": "head", "olmo2": "width"}.get(family, "none"),
        "norms": "after" if family == "olmo2" else "before",
        **_windows(config, given, where),
        **{key: value for key, value in given.items() if key.endswith(("_multiplier", "logits_scaling"))},
    }
    if fields["attention_multiplier"] == fields["head_dim"] ** -0.5:
        fields["attention_multiplier"] = None
    fields["rope_parameters"] = _rope(config, family, fields["max_position_embeddings"], where)
    return fields


def _windows(config: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`sliding_window` and `layer_types`: which layers look back how far."""
    window = given.get("sliding_window") if given.get("use_sliding_window", True) else None
    layers = given["num_hidden_layers"]
    first = given.get("max_window_layers", 0)  # a Qwen's layers before this one have no window
    kinds = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    types = list(config.get("layer_types") or kinds)
    if "max_window_layers" not in given and types != kinds:
        raise CheckpointError(
            f"{where}: layer_types mixes kinds of attention ({', '.join(sorted(set(types)))}), and this family has one "
            f"kind in all layers; {WAY_OUT}"
        )
    if set(types) <= {"full_attention"}:
        return {"sliding_window": None, "layer_types": None}
    if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise CheckpointError(f"{where}: layer_types: {', '.join(unknown)}: no home in any MoE format; {WAY_OUT}")
    return {"sliding_window": window, "layer_types": types if "full_attention" in types else None}


def _rope(config: Mapping[str, Any], family: str, max_positions: int, where: str) -> dict[str, Any]:
    """All of the rotary embedding in transformers 5's one mapping, out of any spelling of it."""
    given = [dict(config[key]) for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    for spelling in given:
        if nested := [key for key, value in spelling.items() if isinstance(value, Mapping)]:
            raise CheckpointError(
                f"{where}: rope_parameters differ by layer ({', '.join(nested)}); MoE formats have one rotary embedding"
            )
        legacy = spelling.pop("type", None)
        spelling["rope_type"] = spelling.get("rope_type") or legacy or "default"
        if family == "phi3" and spelling["rope_type"] in ("su", "yarn"):  # its names for longrope
            spelling["rope_type"] = "longrope"
    rope: dict[str, Any] = {}
    theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    original = config.get("original_max_position_embeddings", 4096 if family == "phi3" else None)
    if family == "phi3" and all(spelling["rope_type"] == "default" for spelling in given):
        original = None  # a field that only longrope reads
    outside = theta | ({"original_max_position_embeddings": original} if original is not None else {})
    for source in (*given, outside):
        for key, value in source.items():
            if rope.setdefault(key, value) != value:
                raise CheckpointError(
                    f"{where}: {key} of the rotary embedding is given twice, as {rope[key]!r} and as {value!r}; "
                    "keep the right one"
                )
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", _ROPE_THETA)
    partial = (rope.pop("partial_rotary_factor", None), config.get("partial_rotary_factor"))
    if any(share not in (None, 1, 1.0) for share in partial):
        raise CheckpointError(
            f"{where}: partial_rotary_factor is not 1, which has no home in any MoE format: they rotate whole heads; "
            f"{WAY_OUT}"
        )
    if rope["rope_type"] not in _ROPE_TYPES:
        raise CheckpointError(f"{where}: rope_type {rope['rope_type']!r} is not one of {', '.join(_ROPE_TYPES)}")
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        rope.setdefault("original_max_position_embeddings", max_positions)
    return dict(sorted(rope.items()))
