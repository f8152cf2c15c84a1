"""The proof that a built MoE is what it should be, run at every build, on the files themselves.

    T1     N copies of the trunk's feed-forward networks under a random router  =  the dense trunk
    T2     the built experts under expert e's own trunk, every token sent to e  =  specialist e
    T3     the built MoE, every token sent to the first expert  =  the trunk with that expert's feed-forward networks

T1 proves the name map, the config (rotary embedding, window, head size, norms) and the renormalisation of the router;
T2 that every expert lies where it should; T3 that the trunk does. Both sides are loaded by transformers in float32 from
weights of the same number format, so only the order of summation differs and 1e-5 of the largest logit is generous; a
wrong map misses it by orders of magnitude. Where the output is bfloat16 or float16, T1 also runs in that format, where
the order of summation does show, and the most probable token must agree.

Where experts share neurons or were made slimmer (`sizes.py`), "expert e" is what the recipe asks for: its own neurons
and the shared ones side by side in one dense network; a copy of the trunk is split as an expert is. So all three also
prove that the shared expert lies where it should and counts as it should. `checks.sizes` says what it costs.

Of a large model a part is checked: some of its layers, evenly spread, and the first rows of embedding and head,
written out like a model of its own.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from solera_core.causal_lm import load_model, save_model
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import VerificationError
from solera_merge.figures import rounded
from solera_merge.moe.inputs import Inputs
from solera_merge.moe.router import random_router
from solera_merge.moe.routing import forced_route
from solera_merge.moe.write import Part, torch_dtype_name, trunk_tensors, write_dense, write_moe, write_part

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["CHECKED_PARAMETERS", "TOLERANCE", "Identity", "check_identity", "checked_parameters", "checked_part"]

TOLERANCE: Final = 1e-5
"""Largest difference of two logits, relative to the largest logit (and at least 1), in float32."""

AGREEMENT: Final = 0.9
"""Least share of positions with the same most probable token, in the number format of the output."""

CHECKED_PARAMETERS: Final = 50_000_000
"""A MoE of at most this many parameters is run whole; of a larger one as many layers as stay below it, at least one."""

_PART_VOCABULARY: Final = 256
_TOKENS: Final = 96
_MOST_TOKENS: Final = 512


@dataclass(frozen=True)
class Identity:
    """What was checked and how far it was off.

    Attributes:
        layers: the layers that were run (of a part, with the first rows of embedding and head).
        of_layers: how many there are.
        tokens: length of the sequence.
        window_exercised: the sequence is longer than the sliding window (None: there is no window).
        tolerance: of the differences, relative to the largest logit.
        identical_experts: T1.
        specialists: T2, by expert.
        on_trunk: T3.
        agreement: T1 in the number format of the output: share of equal most probable tokens (None: float32).
        trunk_distance: how far each expert's own attention, norms, embeddings and head are from the trunk's, in the
            layers run, relative to the trunk's norm. They are not used: the larger, the more of the expert is lost.
        ffn_distance: the same of the feed-forward networks (None: another width).
    """

    layers: Sequence[int]
    of_layers: int
    tokens: int
    window_exercised: bool | None
    tolerance: float
    identical_experts: float
    specialists: dict[str, float]
    on_trunk: float
    agreement: float | None
    trunk_distance: dict[str, float]
    ffn_distance: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """For solera.json."""
        return asdict(self) | {"layers": list(self.layers)}


def checked_part(inputs: Inputs, *, limit: int = CHECKED_PARAMETERS) -> Part | None:
    """The part of the models that the identity check runs; None: the whole."""
    vocabulary = int(inputs.trunk.fields["vocab_size"])
    layers = inputs.trunk.layers
    if _parameters(inputs, Part(range(layers), vocabulary)) <= limit:
        return None
    kept = min(vocabulary, _PART_VOCABULARY)
    one, two = (_parameters(inputs, Part(range(n), kept)) for n in (1, 2))
    count = min(max((limit - one) // (two - one) + 1, 1), layers)
    if count == 1:
        return Part([0], kept)
    return Part([round(i * (layers - 1) / (count - 1)) for i in range(count)], kept)


def checked_parameters(inputs: Inputs) -> int:
    """Parameters of the MoE that the identity check runs."""
    whole = Part(range(inputs.trunk.layers), int(inputs.trunk.fields["vocab_size"]))
    return _parameters(inputs, checked_part(inputs) or whole)


def check_identity(
    directory: Path,
    scratch: Path,
    inputs: Inputs,
    *,
    top_k: int,
    dtype: str | None,
    threads: int | None = None,
    limit: int = CHECKED_PARAMETERS,
) -> Identity:
    """Run T1, T2 and T3 on a built MoE.

    Args:
        directory: the built MoE: config and weights.
        scratch: a directory that does not exist; made, and removed at the end.
        inputs: what it was made of.
        top_k: experts a token.
        dtype: as asked for in the recipe.
        threads: tensors copied at once.
        limit: parameters of the MoE that is run.

    Raises:
        VerificationError: naming the check, the expert, and by how much it failed.
    """
    trunk, names = inputs.trunk, inputs.names
    part = checked_part(inputs, limit=limit)
    layers = list(part.layers if part else range(trunk.layers))
    ids = _ids(trunk.fields, part.vocabulary if part else int(trunk.fields["vocab_size"]))
    options: dict[str, Any] = {"dtype": dtype, "part": part, "threads": threads}
    scratch.mkdir()
    try:
        dense_dir, copies_dir = _new(scratch / "trunk"), _new(scratch / "copies")
        write_dense(dense_dir, trunk, inputs.copied or trunk, like=trunk, **options)
        shape = (len(names), int(trunk.fields["hidden_size"]))
        routers = [
            random_router(inputs.target.router.format(layer=i), shape, std=2 / math.sqrt(shape[1]), seed=0)
            for i in range(len(layers))
        ]
        copied = inputs.copied or trunk
        copies, width = [copied] * len(names), copied.routed.width
        write_moe(copies_dir, inputs.target, trunk, copies, routers, top_k=top_k, width=width, **options)
        dense = load_model(dense_dir)
        identical = _difference(
            _logits(load_model(copies_dir), ids), _logits(dense, ids), f"{len(names)} copies of the trunk as experts"
        )
        stored = torch_dtype_name(trunk, dtype)
        agreement = None if stored == "float32" else _agreement(copies_dir, dense_dir, ids, stored)
        shutil.rmtree(copies_dir)

        if part is not None:
            write_part(_new(scratch / "built"), open_checkpoint(directory, Context()), part)
        checked = directory if part is None else scratch / "built"
        built = load_model(checked)
        _check_keys(built, checked, _new(scratch / "saved"))
        first = inputs.experts[0]
        write_dense(_new(scratch / "first"), trunk, first, like=trunk, **options)
        with forced_route(built, 0):
            on_trunk = _difference(
                _logits(built, ids),
                _logits(load_model(scratch / "first"), ids),
                f"the MoE with every token sent to {names[0]!r}",
            )
        specialists: dict[str, float] = {}
        trunk_distance: dict[str, float] = {}
        ffn_distance: dict[str, float | None] = {}
        for e, (name, expert) in enumerate(zip(names, inputs.experts, strict=True)):
            place = _new(scratch / "expert")
            write_dense(place, expert, expert, like=trunk, **options)
            specialist = load_model(place)
            _put_trunk(built, trunk_tensors(inputs.target, expert, trunk, dtype=dtype, part=part))
            with forced_route(built, e):
                specialists[name] = _difference(
                    _logits(built, ids), _logits(specialist, ids), f"expert {name!r} under its own trunk"
                )
            trunk_distance[name] = _distance(dense, specialist, ffn=False)
            ffn_distance[name] = _distance(dense, specialist, ffn=True) if expert.width == copied.width else None
            shutil.rmtree(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    window = trunk.fields["sliding_window"]
    return Identity(
        layers=layers,
        of_layers=trunk.layers,
        tokens=ids.shape[1],
        window_exercised=None if window is None else ids.shape[1] > window,
        tolerance=TOLERANCE,
        identical_experts=identical,
        specialists=specialists,
        on_trunk=on_trunk,
        agreement=agreement,
        trunk_distance=trunk_distance,
        ffn_distance=ffn_distance,
    )


def _parameters(inputs: Inputs, part: Part) -> int:
    fields = part.fields(inputs.trunk.fields)
    pieces = inputs.target.pieces(fields, experts=len(inputs.experts), width=inputs.width, shared=inputs.shared)
    return sum(math.prod(piece.block) for piece in pieces)


def _ids(fields: Mapping[str, Any], vocabulary: int) -> "torch.Tensor":
    """One sequence of tokens drawn evenly from the vocabulary, longer than the sliding window where it can be."""
    import torch

    length = max(_TOKENS, (fields["sliding_window"] or 0) + 32)
    length = min(length, fields["max_position_embeddings"], _MOST_TOKENS)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=0)).integers(0, vocabulary, size=(1, length)))


def _logits(model: "PreTrainedModel", ids: "torch.Tensor") -> "torch.Tensor":
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _difference(found: "torch.Tensor", expected: "torch.Tensor", what: str) -> float:
    """Largest difference relative to the largest logit; two figures, for the record."""
    largest = max(float(expected.abs().max()), 1.0)
    difference = float((found - expected).abs().max()) / largest
    if not difference <= TOLERANCE:  # NaN fails too
        raise VerificationError(
            f"identity check: {what}: logits differ from the dense model's by {difference:.3g} of the largest logit "
            f"({largest:.3g}), more than {TOLERANCE:g}; nothing was written. The model computes something that its "
            "config does not say or that solera does not carry over: please report it with its config.json"
        )
    return rounded(difference, 2)


def _agreement(copies: Path, dense: Path, ids: "torch.Tensor", dtype: str) -> float:
    moe: Any = load_model(copies, dtype=dtype)
    moe.set_experts_implementation("eager")  # the default's kernel refuses widths that are no multiple of 8
    found = _logits(moe, ids).argmax(-1)
    expected = _logits(load_model(dense, dtype=dtype), ids).argmax(-1)
    share = float((found == expected).double().mean())
    if share < AGREEMENT:
        raise VerificationError(
            f"identity check: in {dtype} only {share:.1%} of the most probable tokens agree with the dense model's, "
            f"less than {AGREEMENT:.0%}; nothing was written"
        )
    return rounded(share, 2)


def _put_trunk(moe: "PreTrainedModel", tensors: Mapping[str, np.ndarray]) -> None:
    """Replace all that is no expert and no router, in memory."""
    import torch

    result = moe.load_state_dict({name: torch.from_numpy(values) for name, values in tensors.items()}, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys


def _check_keys(model: "PreTrainedModel", written: Path, scratch: Path) -> None:
    """Names and shapes on disk are those that transformers itself writes for this class (VerificationError if not)."""
    save_model(model, scratch, like=written, dtype="float32", sidecars_from=written)
    shutil.rmtree(scratch)


def _distance(a: "PreTrainedModel", b: "PreTrainedModel", *, ffn: bool) -> float:
    """|b - a| / |a| over the feed-forward networks or over all else; float32 a tensor, summed in float64."""
    theirs = b.state_dict()
    squares = norm = 0.0
    for name, tensor in a.state_dict().items():
        if (".mlp." in name) == ffn:
            squares += float((theirs[name] - tensor).norm()) ** 2
            norm += float(tensor.norm()) ** 2
    return rounded(math.sqrt(squares / norm), 2) if norm else 0.0


def _new(directory: Path) -> Path:
    directory.mkdir()
    return directory
