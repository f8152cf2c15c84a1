"""Router inputs under teacher forcing: what each layer's router will read, layer by layer, and summed over the text.

Text of domain e runs through the trunk with the feed-forward networks of expert e, so a layer sees what it will see
in the finished MoE when the layers below routed rightly. That was slightly better than the states of the base alone,
and it needs one layer of a dense model in memory, never the MoE.

    E experts, D model width, L layers, B batch, T tokens, N all tokens
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solera_core.errors import CheckpointError
from solera_core.progress import Progress
from solera_merge.moe.calibration import Sequences
from solera_merge.moe.dense import Dense, is_ffn
from solera_merge.moe.layers import Chunk, Layers, States, chunks_of, dense_layers, embed, through
from solera_merge.moe.targets.target import ROUTER_INPUT

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["LayerInputs", "RouterStatistics", "Taught", "batches", "put_ffn", "router_inputs", "taught_states"]


@dataclass(frozen=True)
class RouterStatistics:
    """What the closed forms need of the text, for one layer; sums, so they add up over texts and experts.

    Attributes:
        gram: (D, D), X'X over the states of all tokens, float64.
        sums: (E, D), sum of the states of every expert's tokens, float64.
        counts: (E,), tokens of every expert, float64 (whole numbers unless labels are soft).
    """

    gram: np.ndarray
    sums: np.ndarray
    counts: np.ndarray

    def __add__(self, other: "RouterStatistics") -> "RouterStatistics":
        return RouterStatistics(self.gram + other.gram, self.sums + other.sums, self.counts + other.counts)


@dataclass(frozen=True)
class Taught:
    """Text that is run under one expert, with what the router shall learn from it.

    Attributes:
        expert: index of the expert whose feed-forward networks it runs through.
        where: what messages call the text.
        text: as token sequences.
        labels: (N, E), for every token how much of it belongs to each expert; None: all of it to `expert`.
    """

    expert: int
    where: str
    text: Sequences
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class LayerInputs:
    """What the router of one layer reads of all the text.

    Attributes:
        statistics: its sums.
        layer: which one.
        texts: the text, in order.
    """

    layer: int
    statistics: RouterStatistics
    texts: Sequence[Taught]
    _kept: States | None

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """States (n, D) float32 and labels (n, E) float64, in order, some thousand tokens at a time."""
        assert self._kept is not None, "states were not kept"
        experts = len(self.statistics.counts)
        start = 0
        for taught in self.texts:
            tokens = taught.text.tokens
            for at in range(0, tokens, _BLOCK_TOKENS):
                until = min(at + _BLOCK_TOKENS, tokens)
                yield self._kept.read(start + at, until - at), _labels(taught, experts, at, until)
            start += tokens


_BLOCK_TOKENS = 4096


def taught_states(
    trunk: Dense,
    experts: Sequence[Dense],
    texts: Sequence[Taught],
    *,
    scratch: Path,
    keep: bool,
    threads: int | None,
    progress: Progress,
    layers: Layers | None = None,
) -> Iterator[LayerInputs]:
    """Run every text through the trunk with its expert's feed-forward networks, one layer after the other.

    Args:
        trunk: the dense model that the MoE's trunk is.
        experts: in order.
        texts: each with its expert.
        scratch: a directory for states: two files of D * 4 bytes a token at most.
        keep: the router inputs of a layer can be read again, until the next layer is asked for.
        threads: tensors copied at once.
        progress: where to report.
        layers: of the trunk, where they are at hand.

    Yields:
        One entry a layer, from the first.

    Raises:
        CheckpointError: a state is NaN or infinite, naming layer, domain and document.
    """
    import torch

    count, width = trunk.layers, int(trunk.fields["hidden_size"])
    layers = layers or dense_layers(trunk, trunk, scratch / "layer", threads=threads)
    chunks = chunks_of([taught.text for taught in texts])
    total = count * sum(chunk.ids.numel() for chunk in chunks)
    with ExitStack() as stack:
        states = stack.enter_context(States(scratch / "states", width))
        kept = stack.enter_context(States(scratch / "router-inputs", width)) if keep else None
        task = stack.enter_context(progress.task("reading router inputs", total, "tokens"))
        for layer in range(count):
            gram_DD = torch.zeros(width, width, dtype=torch.float64)
            sums_ED = torch.zeros(len(experts), width, dtype=torch.float64)
            counts_E = torch.zeros(len(experts), dtype=torch.float64)
            model = layers.load(layer)
            under = -1
            with torch.inference_mode():
                for chunk in chunks:
                    taught = texts[chunk.text]
                    if layer == 0:
                        states_BTD = embed(model, chunk.ids)
                    else:
                        flat_ND = torch.from_numpy(states.read(chunk.start, chunk.ids.numel()))
                        states_BTD = flat_ND.reshape(*chunk.ids.shape, width)
                    if taught.expert != under:
                        put_ffn(model, experts[taught.expert], layer=layer)
                        under = taught.expert
                    with router_inputs(model, 1) as seen:
                        out_BTD, _ = through(model, states_BTD)
                    states.write(chunk.start, out_BTD)
                    rows_ND = seen[0].reshape(-1, width)
                    if kept is not None:
                        kept.write(chunk.start, rows_ND)
                    x_ND = rows_ND.double()
                    if not bool(torch.isfinite(x_ND).all()):
                        raise _not_finite(x_ND, chunk, texts, layer)
                    gram_DD += x_ND.T @ x_ND
                    if taught.labels is None:
                        sums_ED[taught.expert] += x_ND.sum(dim=0)
                        counts_E[taught.expert] += len(x_ND)
                    else:
                        at = chunk.start - _first(texts, chunk.text)
                        labels_NE = torch.from_numpy(_labels(taught, len(experts), at, at + len(x_ND)))
                        sums_ED += labels_NE.T @ x_ND
                        counts_E += labels_NE.sum(dim=0)
                    task.advance(chunk.ids.numel())
            del model
            found = RouterStatistics(gram_DD.numpy(), sums_ED.numpy(), counts_E.numpy())
            yield LayerInputs(layer, found, texts, kept)


def _first(texts: Sequence[Taught], text: int) -> int:
    return sum(taught.text.tokens for taught in texts[:text])


def _labels(taught: Taught, experts: int, start: int, stop: int) -> np.ndarray:
    if taught.labels is not None:
        part: np.ndarray = taught.labels[start:stop]
        return part
    labels_NE = np.zeros((stop - start, experts))
    labels_NE[:, taught.expert] = 1
    return labels_NE


def _not_finite(x_ND: "torch.Tensor", chunk: Chunk, texts: Sequence[Taught], layer: int) -> CheckpointError:
    import torch

    row = int((~torch.isfinite(x_ND)).any(dim=1).nonzero()[0])
    taught = texts[chunk.text]
    documents = taught.text.documents_of(chunk.start - _first(texts, chunk.text) + row)
    return CheckpointError(
        f"{taught.where}: text of {documents} gives states that are NaN or infinite at layer {layer}, under that "
        "expert's feed-forward networks; the model or its number format is damaged, or the text is none it can read"
    )


def batches(sequences: Sequences) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """Batches of equally long sequences, in order: ids (B, T) and, bool, which of them are scored (B, T)."""
    return ((chunk.ids, chunk.targets) for chunk in chunks_of([sequences]))


def put_ffn(model: "PreTrainedModel", expert: Dense, *, layer: int | None = None) -> None:
    """Replace the feed-forward networks of a dense model by an expert's, at the expert's own width.

    With `layer` the model has only that one.
    """
    import torch

    only = "" if layer is None else f"model.layers.{layer}."
    for name in expert.stored.tensors:
        if is_ffn(name) and name.startswith(only):
            place = name.replace(only, "model.layers.0.") if only else name
            module = model.get_submodule(place.rpartition(".")[0])
            weight = torch.nn.Parameter(torch.from_numpy(expert.stored.read(name)))
            setattr(module, place.rpartition(".")[2], weight)


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
