"""A dense checkpoint that can give a trunk or experts: its config resolved, every tensor accounted for.

Families differ in how they store the same network: `checkpoint` shows every one of them under the names of a Llama.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import FLOATS
from solera_core.errors import CheckpointError
from solera_merge.moe.canonical import canonical, stored_shapes
from solera_merge.moe.families import ARCHITECTURES, DEFAULTS, no_family, resolve

__all__ = ["FFN", "Dense", "dense_shapes", "is_ffn", "read_dense"]

FFN: Final = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
"""What an expert gives; everything else is the trunk."""


@dataclass(frozen=True)
class Dense:
    """A dense checkpoint that can give a trunk or experts.

    Attributes:
        name: how messages call it (`trunk`, or `expert 'math'`).
        stored: the model as it stands in its files (with its adapter, where it has one).
        checkpoint: the same under the names of a Llama: fused matrices split, folded norms as plain ones.
        family: its model_type.
        fields: every config field that matters, resolved; `rope_parameters` holds all of the rotary embedding.
        split: where some of its neurons go into a shared expert: the same model with only the neurons that stay, and
            with only those; together, in this order, they are the neurons of this one.
    """

    name: str
    stored: Checkpoint
    checkpoint: Checkpoint
    family: str
    fields: Mapping[str, Any]
    split: "tuple[Dense, Dense] | None" = None

    @property
    def routed(self) -> "Dense":
        """What of it becomes an expert."""
        return self.split[0] if self.split else self

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
        raise no_family(family, where)
    architectures = config.get("architectures")
    expected = ARCHITECTURES[family]
    if architectures and architectures != [expected]:
        raise CheckpointError(f"{where}: architectures is {architectures!r}, expected [{expected!r}]: a causal LM")
    fields = resolve(config, family, where)
    _check_tensors(name, checkpoint, stored_shapes(family, dense_shapes(fields)), tied=fields["tie_word_embeddings"])
    return Dense(name, checkpoint, canonical(checkpoint, family, dense_shapes(fields)), family, fields)


def is_ffn(name: str) -> bool:
    """Whether a tensor of a dense model, under any family's name, belongs to a feed-forward network."""
    return ".mlp." in name


def dense_shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a dense model with these fields, under a Llama's names, and its shape, in network order."""
    d, vocabulary, width = fields["hidden_size"], fields["vocab_size"], fields["intermediate_size"]
    queries = fields["num_attention_heads"] * fields["head_dim"]
    keys = fields["num_key_value_heads"] * fields["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d)}
    layer: dict[str, tuple[int, ...]] = {}
    if fields["norms"] == "before":
        layer["input_layernorm.weight"] = (d,)
    biased = {"none": "", "qkv": "qkv", "qkvo": "qkvo"}[fields["attention_bias"]]
    for p, shape in (("q", (queries, d)), ("k", (keys, d)), ("v", (keys, d)), ("o", (d, queries))):
        layer[f"self_attn.{p}_proj.weight"] = shape
        if p in biased:
            layer[f"self_attn.{p}_proj.bias"] = shape[:1]
    if fields["qk_norm"] != "none":
        head = fields["head_dim"] if fields["qk_norm"] == "head" else None
        layer |= {"self_attn.q_norm.weight": (head or queries,), "self_attn.k_norm.weight": (head or keys,)}
    layer["post_attention_layernorm.weight"] = (d,)
    for name, shape in zip(FFN, ((width, d), (width, d), (d, width)), strict=True):
        layer[name] = shape
        if fields["mlp_bias"]:
            layer[name.replace("weight", "bias")] = shape[:1]
    if fields["norms"] == "after":
        layer["post_feedforward_layernorm.weight"] = (d,)
    for i in range(fields["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (d,)
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, d)
    return shapes


def _check_tensors(name: str, checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    where = f"{name}: {checkpoint.path}"
    stored = checkpoint.tensors
    for tensor, shape in expected.items():
        if tensor not in stored:
            raise CheckpointError(f"{where}: tensor {tensor} is missing (config.json promises it with shape {shape})")
        if stored[tensor].shape != shape:
            raise CheckpointError(
                f"{where}: tensor {tensor} has shape {stored[tensor].shape}, but config.json makes it {shape}"
            )
        if stored[tensor].dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: tensor {tensor} is stored as {stored[tensor].dtype}; dequantise the model first "
                f"(to one of {', '.join(FLOATS)})"
            )
    extra = [tensor for tensor in stored if tensor not in expected and not _derived(tensor, tied=tied)]
    if extra:
        more = f" and {len(extra) - 1} more" if extra[1:] else ""
        raise CheckpointError(
            f"{where}: tensor {extra[0]}{more} is none of those that config.json promises, so it has no home and would "
            "be lost; is this a plain causal LM of its family, and does config.json say all of it (attention_bias)?"
        )


def _derived(name: str, *, tied: bool) -> bool:
    """A stored tensor that holds nothing of its own: computed from the config, or (checked when opened) the head."""
    return name.endswith(".self_attn.rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
