"""A MoE as it lies on disk: where each layer's router and experts are, in either layout, from headers alone.

    per expert  mlp.experts.3.gate_proj.weight (F, D), ...up_proj (F, D), ...down_proj (D, F); w1, w3, w2 in Mixtral
    fused       mlp.experts.gate_up_proj (E, 2F, D), gate rows before up rows; ...down_proj (E, D, F); in GraniteMoe
                block_sparse_moe.input_linear.weight and output_linear.weight

E experts, F their width, D model width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from solera_core.architecture import experts_per_token, num_experts
from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import FLOATS
from solera_core.errors import CheckpointError

__all__ = ["COUNT_KEYS", "FAMILIES", "Existing", "Kind", "MoeLayer", "read_existing"]

FAMILIES: Final = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared", "flex_olmo")
"""Types of transformers with one router and experts of two matrices in, one out, in every sparse layer."""

COUNT_KEYS: Final = ("num_local_experts", "num_experts")
"""What config.json calls the number of experts; Qwen3Moe has both names."""

Kind: TypeAlias = Literal["gate", "up", "down", "gate_up"]

_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(.+)")
_ROUTERS: Final = ("gate.weight", "router.layer.weight", "router.weight")
_SINGLE: Final = re.compile(r"experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
_SINGLE_KINDS: Final[Mapping[str, Kind]] = {
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
_FUSED_KINDS: Final[Mapping[str, Kind]] = {
    "experts.gate_up_proj": "gate_up",
    "experts.down_proj": "down",
    "input_linear.weight": "gate_up",
    "output_linear.weight": "down",
}


@dataclass(frozen=True)
class MoeLayer:
    """One sparse layer.

    Attributes:
        index: of the layer in the model.
        router: name of its router, (E, D).
        experts: names by kind: of every expert's tensor, in their order; one name where all lie in one tensor.
    """

    index: int
    router: str
    experts: Mapping[Kind, tuple[str, ...]]

    @property
    def fused(self) -> bool:
        """All experts of a kind are one tensor."""
        return "gate_up" in self.experts


@dataclass(frozen=True)
class Existing:
    """A MoE that was found to be whole.

    Attributes:
        checkpoint: as stored.
        layers: the sparse ones, in order; others are left as they are.
        experts: number a layer.
        top_k: that work on a token.
    """

    checkpoint: Checkpoint
    layers: tuple[MoeLayer, ...]
    experts: int
    top_k: int


def read_existing(checkpoint: Checkpoint) -> Existing:
    """Find routers and experts, and check names, shapes and counts against config.json.

    Raises:
        CheckpointError: a dense model, a type or layout that is not known, layers with different numbers of experts,
            a tensor that is missing or of another shape, or a number format that cannot be computed with.
    """
    where, config = f"{checkpoint.ref}: {checkpoint.path / 'config.json'}", checkpoint.config
    family, experts, top_k = config.get("model_type"), num_experts(config), experts_per_token(config)
    if family not in FAMILIES:
        if experts is None and not any(".experts." in name for name in checkpoint.tensors):
            raise CheckpointError(
                f"{where}: model_type {family!r} is a dense model, which has no experts to leave out; "
                "`solera moe` builds a MoE, and `solera distill` makes a dense model smaller"
            )
        raise CheckpointError(
            f"{where}: model_type {family!r} is not among the MoEs whose layout is known ({', '.join(FAMILIES)})"
        )
    if experts is None or top_k is None:
        raise CheckpointError(
            f"{where}: does not say how many experts there are ({' or '.join(COUNT_KEYS)}), or how many work on a "
            "token (num_experts_per_tok); write it down"
        )
    routers: dict[int, str] = {}
    found: dict[int, dict[Kind, dict[int, str]]] = {}
    for name in checkpoint.tensors:
        if (match := _LAYER.fullmatch(name)) is None:
            continue
        layer, rest = int(match[1]), match[2]
        if rest in _ROUTERS:
            routers[layer] = name
        elif (single := _SINGLE.fullmatch(rest)) is not None:
            found.setdefault(layer, {}).setdefault(_SINGLE_KINDS[single[2]], {})[int(single[1])] = name
        elif rest in _FUSED_KINDS:
            found.setdefault(layer, {}).setdefault(_FUSED_KINDS[rest], {})[-1] = name
        elif rest.startswith(("experts.", "gate.", "router.")):
            raise CheckpointError(f"{checkpoint.ref}: tensor {name}: not a layout of {family} that is known")
    if not found:
        raise CheckpointError(f"{checkpoint.ref}: config.json says {experts} experts, but no tensor is an expert's")
    layers = tuple(
        _layer(checkpoint, layer, routers.get(layer), kinds, experts) for layer, kinds in sorted(found.items())
    )
    return Existing(checkpoint, layers, experts, top_k)


def _layer(
    checkpoint: Checkpoint, layer: int, router: str | None, kinds: Mapping[Kind, Mapping[int, str]], experts: int
) -> MoeLayer:
    where = f"{checkpoint.ref}: layer {layer}"
    if router is None:
        raise CheckpointError(f"{where}: has experts but no router (none of {', '.join(_ROUTERS)})")
    fused = any(-1 in names for names in kinds.values())
    expected: tuple[Kind, ...] = ("gate_up", "down") if fused else ("gate", "up", "down")
    numbers = [-1] if fused else list(range(experts))
    tensors = checkpoint.tensors
    for kind in expected:
        have = sorted(kinds.get(kind, {}))
        if have != numbers and not fused:
            raise CheckpointError(
                f"{where}: has {kind} matrices of {len(have)} experts, config.json says {experts}; the format has one "
                "number of experts for all layers"
            )
        if have != numbers:
            raise CheckpointError(f"{where}: the {kind} matrices of its experts are missing, or in two layouts at once")
    if kinds.keys() != set(expected):
        raise CheckpointError(f"{where}: its experts lie in two layouts at once: {', '.join(sorted(kinds))}")
    names: dict[Kind, tuple[str, ...]] = {kind: tuple(kinds[kind][number] for number in numbers) for kind in expected}
    shape = tensors[router].shape
    if len(shape) != 2 or shape[0] != experts:
        raise CheckpointError(
            f"{where}: router {router} has shape {shape}, but config.json says {experts} experts; the format has one "
            "number of experts for all layers"
        )
    down = tensors[names["down"][0]].shape
    if len(down) != (3 if fused else 2):
        raise CheckpointError(f"{where}: tensor {names['down'][0]} has shape {down}: not a layout that is known")
    width, model = down[-1], shape[1]
    shapes: dict[Kind, tuple[int, ...]] = {
        "gate": (width, model),
        "up": (width, model),
        "down": (model, width),
        "gate_up": (2 * width, model),
    }
    wanted_of = {tensor: shapes[kind] for kind in expected for tensor in names[kind]}
    for tensor, of_one in wanted_of.items():
        wanted = (experts, *of_one) if fused else of_one
        info = tensors[tensor]
        if info.shape != wanted:
            raise CheckpointError(
                f"{where}: tensor {tensor} has shape {info.shape}, expected {wanted}"
                + ("; the format has one number of experts for all layers" if fused else "")
            )
    for tensor in (router, *(tensor for kind in expected for tensor in names[kind])):
        if (dtype := tensors[tensor].dtype) not in FLOATS:
            raise CheckpointError(
                f"{where}: tensor {tensor} is stored as {dtype}; dequantise the model first "
                f"(to one of {', '.join(FLOATS)})"
            )
    return MoeLayer(layer, router, names)
