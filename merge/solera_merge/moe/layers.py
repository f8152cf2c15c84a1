"""Running a model that lies on disk one layer at a time, its states in files between the layers.

A model of one layer is written out and loaded by transformers for every layer (`Part`), so embeddings, masks, rotary
embedding and the head are transformers' own in every family; hooks feed it the states of the layer below. In memory are
one layer, the embedding and the head, and one batch of states, whatever the number of layers.

    B batch, T tokens, D model width, V vocabulary
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from solera_core.causal_lm import load_model
from solera_core.progress import Task
from solera_merge.moe.calibration import Sequences
from solera_merge.moe.dense import Dense
from solera_merge.moe.targets.target import Target
from solera_merge.moe.write import Part, write_dense, write_part

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from solera_core.checkpoint import Checkpoint

__all__ = [
    "Chunk",
    "Layers",
    "States",
    "chunks_of",
    "dense_layers",
    "embed",
    "layer_bytes",
    "moe_layers",
    "run_layers",
    "through",
]

_KEEP_BYTES: Final = 1 << 25
"""Layers of a model that is smaller than this stay in memory once they are loaded."""

_INNER_VOCABULARY: Final = 256
"""Rows of embedding and head that a layer between the first and the last is loaded with; they are not used."""

_BATCH_TOKENS: Final = 1024


@dataclass(frozen=True)
class Chunk:
    """A batch of equally long sequences of one text.

    Attributes:
        text: index of the text it is of.
        ids: token ids (B, T).
        targets: which of them are scored, bool (B, T).
        start: place of its first token among all tokens of all texts.
    """

    text: int
    ids: "torch.Tensor"
    targets: "torch.Tensor"
    start: int


def chunks_of(texts: Sequence[Sequences]) -> list[Chunk]:
    """All texts in batches, in order: every token once."""
    import torch

    found: list[Chunk] = []
    start = 0
    for text, sequences in enumerate(texts):
        first = 0
        while first < len(sequences.ids):
            length = len(sequences.ids[first])
            last = first
            most = first + max(_BATCH_TOKENS // length, 1)
            while last < min(most, len(sequences.ids)) and len(sequences.ids[last]) == length:
                last += 1
            ids, targets = sequences.ids[first:last], sequences.targets[first:last]
            found.append(Chunk(text, torch.tensor(ids), torch.tensor(targets), start))
            start += found[-1].ids.numel()
            first = last
    return found


class States:
    """States of all tokens, (N, D) float32, in a file that is removed at the end.

    Plain reads and writes, not a memory map: what the system caches of it is the system's to drop.
    """

    def __init__(self, path: Path, width: int) -> None:
        self._file = path.open("x+b", buffering=0)
        self._path = path
        self._width = width

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._path.unlink()

    def write(self, start: int, states: "torch.Tensor") -> None:
        """Put states (..., D) from token `start` on."""
        self._file.seek(start * self._width * 4)
        left = np.ascontiguousarray(states.numpy(), dtype=np.float32).reshape(-1).view(np.uint8)
        while left.size:
            left = left[self._file.write(left.data) or 0 :]

    def read(self, start: int, tokens: int) -> np.ndarray:
        """States (tokens, D) from token `start` on, a new array."""
        states = np.empty((tokens, self._width), dtype=np.float32)
        left = states.reshape(-1).view(np.uint8)
        self._file.seek(start * self._width * 4)
        while left.size:
            got = self._file.readinto(left.data)
            if not got:
                raise EOFError(f"{self._path}: ends before token {start + tokens}")
            left = left[got:]
        return states


class Layers:
    """The layers of a model, each loaded as a model of its own when it is asked for."""

    def __init__(
        self,
        write: Callable[[Path, Part], None],
        scratch: Path,
        *,
        layers: int,
        vocabulary: int,
        width: int,
        nbytes: int,
    ) -> None:
        """`write` writes a part of the model into a directory; `nbytes`: of the whole model in float32."""
        self._write = write
        self._scratch = scratch
        self.width = width
        self._layers = layers
        self._vocabulary = vocabulary
        self._keep = nbytes <= _KEEP_BYTES
        self._kept: dict[int, PreTrainedModel] = {}

    def __len__(self) -> int:
        return self._layers

    def load(self, layer: int) -> "PreTrainedModel":
        """The model whose only layer is this one; the first and the last have the whole vocabulary."""
        if layer in self._kept:
            return self._kept[layer]
        whole = layer in (0, self._layers - 1)
        vocabulary = self._vocabulary if whole else min(self._vocabulary, _INNER_VOCABULARY)
        self._scratch.mkdir()
        try:
            self._write(self._scratch, Part([layer], vocabulary))
            model = load_model(self._scratch)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if self._keep:
            self._kept[layer] = model
        return model


def dense_layers(trunk: Dense, ffn: Dense, scratch: Path, *, threads: int | None) -> Layers:
    """The layers of a dense model: a trunk with the feed-forward networks of `ffn`."""

    def write(directory: Path, part: Part) -> None:
        write_dense(directory, trunk, ffn, like=trunk, dtype=None, part=part, threads=threads)

    return Layers(
        write,
        scratch,
        layers=trunk.layers,
        vocabulary=int(trunk.fields["vocab_size"]),
        width=int(trunk.fields["hidden_size"]),
        nbytes=4 * sum(info.size for info in trunk.stored.tensors.values()),
    )


def moe_layers(built: "Checkpoint", scratch: Path) -> Layers:
    """The layers of a MoE as it lies on disk."""
    return Layers(
        lambda directory, part: write_part(directory, built, part),
        scratch,
        layers=int(built.config["num_hidden_layers"]),
        vocabulary=int(built.config["vocab_size"]),
        width=int(built.config["hidden_size"]),
        nbytes=4 * sum(info.size for info in built.tensors.values()),
    )


def layer_bytes(target: Target, trunk: Dense, *, experts: int, width: int, shared: int = 0) -> int:
    """Bytes in float32 of the largest part that `moe_layers` loads: one layer, embedding and head."""
    part = Part([0], int(trunk.fields["vocab_size"]))
    pieces = target.pieces(part.fields(trunk.fields), experts=experts, width=width, shared=shared)
    return 4 * sum(math.prod(piece.block) for piece in pieces)


def embed(model: "PreTrainedModel", ids_BT: "torch.Tensor") -> "torch.Tensor":
    """What enters the first layer (B, T, D): embeddings as the family scales them. `model` has that layer."""
    seen: list[Any] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = _layer(model).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.base_model(input_ids=ids_BT, use_cache=False)
    finally:
        handle.remove()
    states_BTD: torch.Tensor = seen[0]
    return states_BTD


def through(
    model: "PreTrainedModel", states_BTD: "torch.Tensor", *, head: bool = False
) -> tuple["torch.Tensor", "torch.Tensor | None"]:
    """States through the one layer of a model: what leaves it (B, T, D) and, with `head`, the logits (B, T, V)."""
    seen: list[Any] = []

    def feed(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # In the place of what the model made of `inputs_embeds` (some families scale it).
        del module
        return ((states_BTD, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states_BTD})

    def keep(module: Any, args: Any, output: Any) -> None:
        del module, args
        seen.append(output[0] if isinstance(output, tuple) else output)

    layer = _layer(model)
    handles = [layer.register_forward_pre_hook(feed, with_kwargs=True), layer.register_forward_hook(keep)]
    try:
        if head:
            logits = model(inputs_embeds=states_BTD, use_cache=False).logits
        else:
            model.base_model(inputs_embeds=states_BTD, use_cache=False)
            logits = None
    finally:
        for handle in handles:
            handle.remove()
    return seen[0], logits


Way = Callable[["PreTrainedModel", int, int], AbstractContextManager[Any]]
"""How text runs through a layer: a context for (model of one layer, index of the layer, index of the text)."""


def run_layers(
    layers: Layers,
    chunks: Sequence[Chunk],
    ways: Sequence[Way],
    on_logits: Callable[[int, Chunk, "torch.Tensor"], None],
    *,
    scratch: Path,
    task: Task,
) -> None:
    """Run text through a model in several ways at once, layer by layer.

    Args:
        layers: of the model.
        chunks: the text.
        ways: what is set up around the forward pass of a layer.
        on_logits: gets the index of the way, the chunk and its logits (B, T, V).
        scratch: a directory for the states: width * 4 bytes a token and a way.
        task: advanced by one a layer.
    """
    import torch

    last, width = len(layers) - 1, layers.width
    with torch.inference_mode(), _states(scratch, width, len(ways)) as files:
        for layer in range(len(layers)):
            model = layers.load(layer)
            for chunk in chunks:
                # The embeddings are the same for all ways.
                entry_BTD = embed(model, chunk.ids) if layer == 0 else None
                for way, (around, states) in enumerate(zip(ways, files, strict=True)):
                    if entry_BTD is None:
                        flat_ND = torch.from_numpy(states.read(chunk.start, chunk.ids.numel()))
                        states_BTD = flat_ND.reshape(*chunk.ids.shape, width)
                    else:
                        states_BTD = entry_BTD
                    with around(model, layer, chunk.text):
                        out_BTD, logits_BTV = through(model, states_BTD, head=layer == last)
                    if logits_BTV is None:
                        states.write(chunk.start, out_BTD)
                    else:
                        on_logits(way, chunk, logits_BTV)
            del model
            task.advance(1)


@contextmanager
def _states(scratch: Path, width: int, count: int) -> Iterator[list[States]]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield [stack.enter_context(States(scratch / f"states-{i}", width)) for i in range(count)]


def _layer(model: "PreTrainedModel") -> Any:
    return model.get_submodule("model.layers.0")
