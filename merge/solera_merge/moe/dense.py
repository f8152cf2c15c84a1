"""What a dense Llama or Mistral checkpoint is: every config field resolved or refused, every tensor accounted for.

A field that config.json leaves out has the family's default, and the families disagree (Mixtral's rope theta is
1 000 000, Llama's 10 000), so nothing is ever left to a default of the target.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import FLOATS
from solera_core.errors import CheckpointError

__all__ = ["DEFAULTS", "FFN", "Dense", "dense_shapes", "read_dense"]

FFN: Final = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
"""What an expert gives; everything else is the trunk."""

_COMMON: Final[dict[str, Any]] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "llama": _COMMON
    | {
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "mistral": _COMMON
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
"""As transformers' LlamaConfig and MistralConfig have them; a test compares."""

_ROPE_THETA: Final = 10_000.0
_ROPE_TYPES: Final = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

_ROPE_FIELDS: Final = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")

# Fields that say nothing about the function a Llama computes: bookkeeping, and what earlier versions of
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

_BIAS_HINT: Final = (
    "Mixtral has no biases, so they would be lost; merge these models with `solera merge` instead, "
    "or fine-tune from a base without biases"
)


@dataclass(frozen=True)
class Dense:
    """A dense checkpoint that can give a trunk or experts.

    Attributes:
        name: how messages call it (`trunk`, or `expert 'math'`).
        checkpoint: the opened files.
        family: `llama` or `mistral`.
        fields: every config field that matters, resolved; `rope_parameters` holds all of the rotary embedding.
    """

    name: str
    checkpoint: Checkpoint
    family: str
    fields: Mapping[str, Any]

    @property
    def tied(self) -> bool:
        """The head is the embedding."""
        return bool(self.fields["tie_word_embeddings"])

    @property
    def width(self) -> int:
        """Width of the feed-forward network."""
        return int(self.fields["intermediate_size"])

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.fields["num_hidden_layers"])

    @property
    def config_file(self) -> Path:
        """Where messages point to."""
        return self.checkpoint.path / "config.json"


def read_dense(name: str, checkpoint: Checkpoint) -> Dense:
    """Resolve the config of a checkpoint and check its tensors against it, from headers alone.

    Raises:
        CheckpointError: naming the field or tensor that has no home, is missing or has another shape.
    """
    config = checkpoint.config
    where = f"{name}: {checkpoint.path / 'config.json'}"
    family = config.get("model_type")
    if family not in DEFAULTS:
        raise CheckpointError(
            f"{where}: model_type {family!r} cannot become a Mixtral exactly (known: {', '.join(DEFAULTS)}); "
            "merge these models with `solera merge` instead"
        )
    architectures = config.get("architectures")
    expected = f"{family.capitalize()}ForCausalLM"
    if architectures and architectures != [expected]:
        raise CheckpointError(f"{where}: architectures is {architectures!r}, expected [{expected!r}]: a causal LM")
    dense = Dense(name, checkpoint, family, _resolve(config, family, where))
    _check_tensors(dense)
    return dense


def dense_shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a dense model with these fields, and its shape, in the order of the network."""
    d, vocabulary, width = fields["hidden_size"], fields["vocab_size"], fields["intermediate_size"]
    queries = fields["num_attention_heads"] * fields["head_dim"]
    keys = fields["num_key_value_heads"] * fields["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d)}
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (queries, d),
        "self_attn.k_proj.weight": (keys, d),
        "self_attn.v_proj.weight": (keys, d),
        "self_attn.o_proj.weight": (d, queries),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (width, d),
        "mlp.up_proj.weight": (width, d),
        "mlp.down_proj.weight": (d, width),
    }
    for i in range(fields["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (d,)
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, d)
    return shapes


def _resolve(config: Mapping[str, Any], family: str, where: str) -> dict[str, Any]:
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{where}: quantization_config: the weights are quantised; use the unquantised model")
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            raise CheckpointError(f"{where}: {field} is true: {_BIAS_HINT}")
    layer_types = config.get("layer_types")
    if layer_types and set(layer_types) != {_layer_type(config, family)}:
        raise CheckpointError(
            f"{where}: layer_types mixes kinds of attention ({', '.join(sorted(set(layer_types)))}); "
            "Mixtral has one kind in all layers"
        )
    if family == "llama" and config.get("sliding_window") is not None:
        raise CheckpointError(
            f"{where}: sliding_window is {config['sliding_window']}, which Llama ignores and Mixtral would apply; "
            "remove the field, or set model_type to 'mistral' if the window is meant"
        )
    defaults = DEFAULTS[family]
    known = {*defaults, *_ROPE_FIELDS, *_BOOKKEEPING, "partial_rotary_factor", "layer_types", "sliding_window"}
    known |= {"quantization_config", "attention_bias", "mlp_bias"}
    if unknown := sorted(set(config) - known):
        raise CheckpointError(
            f"{where}: {', '.join(unknown)}: no home in Mixtral, and what {'they do' if unknown[1:] else 'it does'} "
            "would be lost; if that is nothing, remove it from config.json"
        )
    fields = {field: config.get(field, default) for field, default in defaults.items()}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    fields.setdefault("sliding_window", None)
    fields["rope_parameters"] = _rope(config, fields["max_position_embeddings"], where)
    return fields


def _layer_type(config: Mapping[str, Any], family: str) -> str:
    window = config.get("sliding_window", DEFAULTS[family].get("sliding_window"))
    return "full_attention" if family == "llama" or window is None else "sliding_attention"


def _rope(config: Mapping[str, Any], max_positions: int, where: str) -> dict[str, Any]:
    """All of the rotary embedding in transformers 5's one mapping, out of any spelling of it."""
    given = [dict(config[key]) for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    for spelling in given:
        if nested := [key for key, value in spelling.items() if isinstance(value, Mapping)]:
            raise CheckpointError(
                f"{where}: rope_parameters differ by layer ({', '.join(nested)}); Mixtral has one rotary embedding"
            )
        legacy = spelling.pop("type", None)
        spelling["rope_type"] = spelling.get("rope_type") or legacy or "default"
    rope: dict[str, Any] = {}
    theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    original = config.get("original_max_position_embeddings")
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
        raise CheckpointError(f"{where}: partial_rotary_factor is not 1; Mixtral rotates whole heads")
    if rope["rope_type"] not in _ROPE_TYPES:
        raise CheckpointError(f"{where}: rope_type {rope['rope_type']!r} is not one of {', '.join(_ROPE_TYPES)}")
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        rope.setdefault("original_max_position_embeddings", max_positions)
    return dict(sorted(rope.items()))


def _check_tensors(dense: Dense) -> None:
    where = f"{dense.name}: {dense.checkpoint.path}"
    stored = dense.checkpoint.tensors
    expected = dense_shapes(dense.fields)
    for name, shape in expected.items():
        if name not in stored:
            raise CheckpointError(f"{where}: tensor {name} is missing (config.json promises it with shape {shape})")
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {stored[name].shape}, but config.json makes it {shape}"
            )
        if stored[name].dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: tensor {name} is stored as {stored[name].dtype}; dequantise the model first "
                f"(to one of {', '.join(FLOATS)})"
            )
    extra = [name for name in stored if name not in expected and not _derived(name, tied=dense.tied)]
    if extra:
        more = f" and {len(extra) - 1} more" if extra[1:] else ""
        hint = (
            _BIAS_HINT if extra[0].endswith(".bias") else "it would be lost; is this a plain causal LM of its family?"
        )
        raise CheckpointError(f"{where}: tensor {extra[0]}{more} has no home in Mixtral: {hint}")


def _derived(name: str, *, tied: bool) -> bool:
    """A stored tensor that holds nothing of its own: computed from the config, or (checked when written) the head."""
    return name.endswith(".self_attn.rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
