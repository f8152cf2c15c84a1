"""What a target is: the fields it has a home for, its name map, its router, and what engines make of it.

A target is one file with one `Target`: the name map, and at most two functions (its config.json, the engines'
verdicts). All of them share what is the same everywhere: trunk tensors keep a Llama's names, every layer has one router
(E, D), and in transformers a router's forward gives (logits, weights (N, k), indices (N, k)).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from solera_core.errors import CheckpointError
from solera_merge.moe.dense import FFN, dense_shapes
from solera_merge.moe.families import PLAIN

__all__ = ["ENGINES", "ROUTER_INPUT", "SLOTS", "Engine", "Piece", "SharedHome", "Sizes", "Slot", "Target", "Verdict"]

Engine = Literal["transformers", "vllm", "llama.cpp"]
ENGINES: Final[tuple[Engine, ...]] = ("transformers", "vllm", "llama.cpp")

ROUTER_INPUT: Final = "model.layers.{layer}.mlp"
"""The module of a dense model, of every family, whose input the router of a layer will read."""

_CARRIED: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
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
)
"""Fields that mean the same in every family and every target."""

_PLACED: Final = frozenset({*_CARRIED, *PLAIN, "head_dim", "intermediate_size", "rope_parameters"})


@dataclass(frozen=True)
class Piece:
    """One block of a tensor of the MoE and where it comes from; most tensors are one block.

    Attributes:
        name: of the tensor, in the MoE.
        shape: of the whole tensor.
        source: name in the dense model; None: a router, which no model has, or zeros.
        expert: index of the expert that gives it; None: the trunk, or the shared expert.
        block: shape of the block; an expert's may be wider than its source, and is padded with zeros.
        at: where the block begins in the tensor, in elements.
        zero: zeros, for what the target has and the models have not.
        shared: the shared expert gives it.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None
    expert: int | None
    block: tuple[int, ...]
    at: int = 0
    zero: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Slot:
    """Where a matrix of an expert goes.

    Attributes:
        name: behind `model.layers.N.`; `{e}` is the expert's index, where every expert has a tensor of its own.
        half: of a tensor in which all experts lie one after the other: which half of an expert's rows (None: all).
    """

    name: str
    half: int | None = None


SLOTS: Final = (
    Slot("mlp.experts.{e}.gate_proj.weight"),
    Slot("mlp.experts.{e}.up_proj.weight"),
    Slot("mlp.experts.{e}.down_proj.weight"),
)
"""Where most targets have them: experts beside each other, under a Llama's names."""


@dataclass(frozen=True)
class Sizes:
    """Number of experts, experts a token, the width of each, and that of the shared expert (0: there is none)."""

    experts: int
    top_k: int
    width: int
    shared: int = 0


@dataclass(frozen=True)
class SharedHome:
    """Where a target has an expert that works on every token, and what it makes of it.

    Attributes:
        slots: where its three matrices go, in the order of `FFN`.
        factor: its output is divided by this in the format, so what is written of `down_proj` is multiplied by it.
    """

    slots: tuple[Slot, Slot, Slot]
    factor: float


@dataclass(frozen=True)
class Verdict:
    """What an engine makes of a MoE: of transformers what the build proves, of the others what their sources say."""

    engine: Engine
    verdict: Literal["exact", "approximate", "unsupported"]
    why: str = ""


Config = Callable[[Mapping[str, Any], Sizes], dict[str, Any]]
Engines = Callable[[Mapping[str, Any], Sizes], dict[Engine, tuple[Literal["approximate", "unsupported"], str]]]


@dataclass(frozen=True)
class Target:
    """A format that a MoE can be written in.

    Attributes:
        name: its model_type.
        architecture: its class in transformers.
        homes: values of a feature (see `families.PLAIN`) that it has a home for; of one not listed only the plain
            value; an empty tuple: any value.
        router: name of a layer's router, (E, D), on disk.
        router_path: the module of a loaded model.
        slots: where an expert's three matrices go, in the order of `FFN`.
        settings: what its config.json says beyond what all say.
        engines: engines that do not compute what transformers does, and why.
        zeros: tensors of a layer that it has and the models have not: behind `model.layers.N.`, with their shapes.
        shared: its shared expert, zeros (in `zeros`) where there is none to write; None: it has none.
    """

    name: str
    architecture: str
    homes: Mapping[str, tuple[Any, ...]]
    router: str
    router_path: str
    slots: tuple[Slot, Slot, Slot]
    settings: Config
    engines: Engines
    zeros: Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]] = lambda _: {}
    shared: SharedHome | None = None

    @property
    def title(self) -> str:
        """Its name for people."""
        return self.architecture.removesuffix("ForCausalLM")

    def homeless(self, fields: Mapping[str, Any]) -> str | None:
        """The first feature of a dense model that it has no home for; None: it holds all of it, exactly."""
        for feature, plain in PLAIN.items():
            allowed = self.homes.get(feature, (plain,))
            if allowed and fields[feature] not in allowed:
                return feature
        return None

    def config(self, fields: Mapping[str, Any], sizes: Sizes, *, dtype: str) -> dict[str, Any]:
        """config.json for a trunk with these (resolved) fields.

        The rotary embedding is written in transformers 5's spelling and, the same values, in the older one: engines
        that only know `rope_theta` would otherwise take a default of the target's, 1 000 000 in Mixtral's case.

        Raises:
            CheckpointError: a field has no home.
        """
        if homeless := sorted(set(fields) - _PLACED) or [f for f in [self.homeless(fields)] if f is not None]:
            raise CheckpointError(f"{', '.join(homeless)}: no home in {self.title}")
        rope = dict(fields["rope_parameters"])
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        usual = fields["hidden_size"] // fields["num_attention_heads"]
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "dtype": dtype,
            **{name: fields[name] for name in _CARRIED},
            **({"head_dim": fields["head_dim"]} if fields["head_dim"] != usual else {}),
            "rope_parameters": rope,
            "rope_theta": rope["rope_theta"],
            **({"rope_scaling": scaling} if rope["rope_type"] != "default" else {}),
            "num_experts_per_tok": sizes.top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            **self.settings(fields, sizes),
        }

    def pieces(self, fields: Mapping[str, Any], *, experts: int, width: int, shared: int = 0) -> list[Piece]:
        """The name map: every block of every tensor of the MoE, in the order of the network, with its source.

        `width` is that of every expert, `shared` that of the shared expert (0: there is none).
        """
        slots: dict[str, Slot] = dict(zip(FFN, self.slots, strict=True))
        tensors: dict[str, list[Piece]] = {}
        for name, shape in dense_shapes({**fields, "intermediate_size": width}).items():
            prefix, _, suffix = name.rpartition(".mlp.")
            if not prefix:
                tensors[name] = [Piece(name, shape, name, None, shape)]
                continue
            for piece in _expert_pieces(slots[f"mlp.{suffix}"], prefix, name, shape, experts):
                tensors.setdefault(piece.name, []).append(piece)
            if f"mlp.{suffix}" == FFN[-1]:  # the layer is complete but for its router and what is zero
                router = self.router.format(layer=prefix.rpartition(".")[2])
                shape = (experts, fields["hidden_size"])
                tensors[router] = [Piece(router, shape, None, None, shape)]
                always = self._shared_pieces(prefix, fields["hidden_size"], shared)
                tensors |= always
                for extra, zero in self.zeros(fields).items():
                    if f"{prefix}.{extra}" in always:
                        continue
                    tensors[f"{prefix}.{extra}"] = [Piece(f"{prefix}.{extra}", zero, None, None, zero, zero=True)]
        return [piece for blocks in tensors.values() for piece in sorted(blocks, key=lambda piece: piece.at)]

    def _shared_pieces(self, prefix: str, hidden: int, width: int) -> dict[str, list[Piece]]:
        found: dict[str, list[Piece]] = {}
        if width == 0:
            return found
        assert self.shared is not None, f"{self.name} has no shared expert"
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        for source, slot, (rows, columns) in zip(FFN, self.shared.slots, shapes, strict=True):
            name, half = f"{prefix}.{slot.name}", slot.half or 0
            whole = (rows if slot.half is None else 2 * rows, columns)
            block = (rows, columns)
            piece = Piece(name, whole, f"{prefix}.{source}", None, block, at=half * rows * columns, shared=True)
            found.setdefault(name, []).append(piece)
        return found

    def router_module(self, model: Any, layer: int) -> Any:
        """The router of a loaded model: forward(states (N, D)) -> (logits, weights (N, k), indices (N, k))."""
        return model.get_submodule(self.router_path.format(layer=layer))

    def verdicts(self, fields: Mapping[str, Any], sizes: Sizes) -> list[Verdict]:
        """What every engine makes of the MoE."""
        worse = self.engines(fields, sizes)
        return [Verdict(engine, *worse.get(engine, ("exact", ""))) for engine in ENGINES]


def _expert_pieces(slot: Slot, prefix: str, source: str, shape: tuple[int, ...], experts: int) -> list[Piece]:
    name = f"{prefix}.{slot.name}"
    if "{e}" in name:
        return [Piece(name.format(e=e), shape, source, e, shape) for e in range(experts)]
    halves, half = (1, 0) if slot.half is None else (2, slot.half)
    size = shape[0] * shape[1]
    whole = (experts, halves * shape[0], shape[1])
    return [Piece(name, whole, source, e, shape, at=(e * halves + half) * size) for e in range(experts)]
