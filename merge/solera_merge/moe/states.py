"""Router inputs under teacher forcing: what each layer's router will read, summed over a domain's text.

Text of domain e runs through the trunk with the feed-forward networks of expert e, so a layer sees what it will see
in the finished MoE when the layers below routed rightly. That was slightly better than the states of the base alone,
and it needs one dense model in memory, never the MoE.

    E experts, D model width, L layers, B batch, T tokens
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from solera_core.errors import CheckpointError
from solera_core.progress import Progress
from solera_merge.moe.calibration import Sequences
from solera_merge.moe.dense import Dense, is_ffn
from solera_merge.moe.targets.target import ROUTER_INPUT

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["RouterStatistics", "batches", "put_ffn", "router_inputs", "router_statistics"]

_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class RouterStatistics:
    """What the ridge fit of one layer needs of the calibration text; sums, so they add up over texts and experts.

    Attributes:
        gram: (D, D), X'X over the states of all domains, float64.
        sums: (E, D), sum of the states of every domain, float64.
        counts: (E,), tokens of every domain.
    """

    gram: np.ndarray
    sums: np.ndarray
    counts: np.ndarray


def router_statistics(
    model: "PreTrainedModel",
    experts: Sequence[Dense],
    text: Sequence[Sequences],
    *,
    progress: Progress,
) -> list[RouterStatistics]:
    """Run every domain's text through the trunk with its expert's feed-forward networks, and sum what routers read.

    Args:
        model: the trunk, dense and float32; its feed-forward networks are replaced.
        experts: in order.
        text: of each expert's domain.
        progress: where to report.

    Returns:
        One entry a layer.

    Raises:
        CheckpointError: a state is NaN or infinite, naming layer and domain.
    """
    import torch

    layers, width = experts[0].layers, int(experts[0].fields["hidden_size"])
    grams = [torch.zeros(width, width, dtype=torch.float64) for _ in range(layers)]
    sums = [torch.zeros(len(experts), width, dtype=torch.float64) for _ in range(layers)]
    counts = np.zeros(len(experts), dtype=np.int64)
    total = sum(sequences.tokens for sequences in text)
    with torch.inference_mode(), progress.task("reading router inputs", total, "tokens") as task:
        for e, (expert, sequences) in enumerate(zip(experts, text, strict=True)):
            put_ffn(model, expert)
            counts[e] = sequences.tokens
            for ids_BT, _ in batches(sequences):
                with router_inputs(model, layers) as states:
                    model.base_model(input_ids=ids_BT, use_cache=False)
                for layer, x_BTD in states.items():
                    x_ND = x_BTD.reshape(-1, width).double()
                    if not bool(torch.isfinite(x_ND).all()):
                        raise CheckpointError(
                            f"{expert.name}: its text gives states that are NaN or infinite at layer {layer}; "
                            "the model or its number format is damaged"
                        )
                    grams[layer] += x_ND.T @ x_ND
                    sums[layer][e] += x_ND.sum(dim=0)
                task.advance(ids_BT.numel())
    return [
        RouterStatistics(gram.numpy(), per_domain.numpy(), counts) for gram, per_domain in zip(grams, sums, strict=True)
    ]


def batches(sequences: Sequences) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """Batches of equally long sequences, in order: ids (B, T) and, bool, which of them are scored (B, T)."""
    import torch

    size = max(_BATCH_TOKENS // len(sequences.ids[0]), 1)
    for start in range(0, len(sequences.ids), size):
        ids, targets = sequences.ids[start : start + size], sequences.targets[start : start + size]
        # Only the very last sequence may be shorter; it goes alone.
        cut = len(ids) - 1 if len(ids[-1]) < len(ids[0]) else len(ids)
        for part in (slice(0, cut), slice(cut, len(ids))):
            if ids[part]:
                yield torch.tensor(ids[part]), torch.tensor(targets[part])


def put_ffn(model: "PreTrainedModel", expert: Dense) -> None:
    """Replace the feed-forward networks of a dense model by an expert's, at the expert's own width."""
    import torch

    for name in filter(is_ffn, expert.stored.tensors):
        module = model.get_submodule(name.rpartition(".")[0])
        setattr(module, name.rpartition(".")[2], torch.nn.Parameter(torch.from_numpy(expert.stored.read(name))))


@contextmanager
def router_inputs(model: "PreTrainedModel", layers: int) -> Iterator[Mapping[int, Any]]:
    """What the routers would read, by layer, of the forward passes inside."""
    states: dict[int, Any] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            del module
            states[layer] = inputs[0]

        return hook

    handles = [
        model.get_submodule(ROUTER_INPUT.format(layer=layer)).register_forward_pre_hook(keep(layer))
        for layer in range(layers)
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
