"""Target mixtral: Llama and Mistral specialists as a MixtralForCausalLM.

Exact, because Mixtral is Mistral with the feed-forward network replaced: its router renormalises the top-k weights, so
equal experts give back the dense model. Names on disk are the ones that transformers writes and every engine knows
(`block_sparse_moe.experts.e.w1`, not the fused ones of transformers' memory): w1 = gate, w2 = down, w3 = up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from solera_core.errors import CheckpointError
from solera_merge.moe.dense import FFN, dense_shapes

__all__ = ["ROUTER", "ROUTER_INPUT", "Piece", "moe_config", "pieces", "router_module"]

ROUTER: Final = "model.layers.{layer}.block_sparse_moe.gate.weight"
"""The router of a layer on disk, (E, D)."""

ROUTER_INPUT: Final = "model.layers.{layer}.post_attention_layernorm"
"""The dense module whose output the router of a layer will read."""

_EXPERT: Final[dict[str, str]] = dict(zip(FFN, ("w1", "w3", "w2"), strict=True))

# Fields of the dense config that mean the same in Mixtral's.
_CARRIED: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "sliding_window",
)


@dataclass(frozen=True)
class Piece:
    """One tensor of the MoE and where it comes from.

    Attributes:
        name: in the MoE.
        shape: in the MoE; an expert's may be wider than its source, and is padded with zeros.
        source: name in the dense model; None for a router, which no model has.
        expert: index of the expert that gives it; None: the trunk.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None
    expert: int | None


def moe_config(fields: Mapping[str, Any], *, experts: int, top_k: int, width: int, dtype: str) -> dict[str, Any]:
    """Mixtral's config.json for a trunk with these (resolved) fields; `width` is that of the widest expert.

    The rotary embedding is written in transformers 5's spelling and, the same values, in the older one: engines that
    only know `rope_theta` would otherwise take Mixtral's default of 1 000 000.

    Raises:
        CheckpointError: a field has no home.
    """
    if homeless := sorted(set(fields) - {*_CARRIED, "rope_parameters", "intermediate_size"}):
        raise CheckpointError(f"{', '.join(homeless)}: no home in Mixtral")
    rope = dict(fields["rope_parameters"])
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": dtype,
        **{field: fields[field] for field in _CARRIED},
        "intermediate_size": width,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        **({"rope_scaling": scaling} if rope["rope_type"] != "default" else {}),
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }


def pieces(fields: Mapping[str, Any], *, experts: int, width: int) -> list[Piece]:
    """The name map: every tensor of the MoE, in the order of the network, with its source."""
    found: list[Piece] = []
    for name, shape in dense_shapes({**fields, "intermediate_size": width}).items():
        prefix, _, suffix = name.rpartition(".mlp.")
        slot = _EXPERT.get(f"mlp.{suffix}") if prefix else None
        if slot is None:
            found.append(Piece(name, shape, name, None))
            continue
        found += [Piece(f"{prefix}.block_sparse_moe.experts.{e}.{slot}.weight", shape, name, e) for e in range(experts)]
        if slot == "w2":  # the last of the three: the layer is complete but for its router
            layer = int(prefix.rpartition(".")[2])
            found.append(Piece(ROUTER.format(layer=layer), (experts, fields["hidden_size"]), None, None))
    return found


def router_module(model: Any, layer: int) -> Any:
    """The router of a loaded MixtralForCausalLM: forward(states (N, D)) -> (logits, weights (N, k), indices (N, k))."""
    return model.get_submodule(f"model.layers.{layer}.mlp.gate")
