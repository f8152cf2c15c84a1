"""Running a model of any size one layer after the other: text goes through a layer, waits on the disk, then the next.

Every layer becomes a model of one layer, written to a scratch folder and loaded by transformers, so that masks, rotary
embeddings and routers are transformers' own. In memory is one layer in float32 (and embedding and head, for the first
and the last); on the disk one layer as stored and one float32 state a token.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from solera_core.architecture import num_layers, vocab_size
from solera_core.causal_lm import load_model
from solera_core.checkpoint import Checkpoint
from solera_core.errors import CheckpointError
from solera_core.progress import Progress
from solera_core.views import view
from solera_merge.moe.calibration import Sequences
from solera_merge.moe.states import batches
from solera_merge.moe.write import Part, write_part

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["Watch", "layer_by_layer"]

Watch: TypeAlias = Callable[[int, Any], AbstractContextManager[None]]
"""Called with a layer's number and its model before the text to watch goes through it, and left behind that."""

_EMBEDDING: Final = "model.embed_tokens.weight"


def layer_by_layer(
    checkpoint: Checkpoint,
    *,
    scored: Sequence[Sequences],
    scratch: Path,
    progress: Progress,
    watched: Sequence[Sequences] = (),
    watch: Watch | None = None,
    what: str = "running the model",
) -> list[float]:
    """Mean negative log-likelihood of every scored text, in nats a token; sums in float64.

    Args:
        checkpoint: a decoder under the names of a Llama (`model.layers.N.`); may be a view.
        scored: token sequences, one entry a domain.
        scratch: a folder that does not exist; made and removed.
        progress: where to report.
        watched: text that is run for `watch` alone.
        watch: see `Watch`.
        what: for the progress.

    Raises:
        CheckpointError: a state is not finite, naming the layer.
    """
    import torch

    layers, width = num_layers(checkpoint.config) or 0, checkpoint.tensors[_EMBEDDING].shape[1]
    runs = [*((text, True) for text in watched), *((text, False) for text in scored)]
    total = sum(text.tokens for text, _ in runs)
    scratch.mkdir()
    try:
        states = np.memmap(scratch / "states", np.float32, "w+", shape=(total, width))
        _embed(checkpoint, [text for text, _ in runs], states)
        nll = [0.0] * len(scored)
        with torch.inference_mode(), progress.task(what, total * layers, "tokens") as task:
            for layer in range(layers):
                last = layer == layers - 1
                model = _load(checkpoint, layer, scratch / "layer", whole_vocabulary=last)
                if not last:
                    _without_norm(model)
                at = 0
                # What is watched comes first.
                with watch(layer, model) if watch is not None else nullcontext():
                    for text, _ in filter(lambda run: run[1], runs):
                        for ids_BT, x_BTD in _states(text, states, at):
                            y_BTD = _base(model, x_BTD)
                            _put(states, at, y_BTD, layer)
                            at += ids_BT.numel()
                            task.advance(ids_BT.numel())
                for domain, text in enumerate(scored):
                    sums = 0.0
                    for (ids_BT, targets_BT), (_, x_BTD) in zip(batches(text), _states(text, states, at), strict=True):
                        if last:
                            sums += sum(_nll(model, *row) for row in zip(ids_BT, targets_BT, x_BTD, strict=True))
                        else:
                            _put(states, at, _base(model, x_BTD), layer)
                        at += ids_BT.numel()
                        task.advance(ids_BT.numel())
                    nll[domain] = sums / text.scored
                del model
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for value in nll:
        if not np.isfinite(value):
            raise CheckpointError(f"{checkpoint.ref}: gives a likelihood that is NaN or infinite; it is damaged")
    return nll


def _embed(checkpoint: Checkpoint, texts: Sequence[Sequences], states: "np.ndarray[Any, Any]") -> None:
    embedding = checkpoint.read(_EMBEDDING)
    at = 0
    for text in texts:
        for ids in text.ids:
            states[at : at + len(ids)] = embedding[list(ids)]
            at += len(ids)


def _load(checkpoint: Checkpoint, layer: int, folder: Path, *, whole_vocabulary: bool) -> "PreTrainedModel":
    """A model of this layer alone, in float32; with one row of vocabulary where no logits are asked for."""
    from transformers import AutoConfig

    prefix = f"model.layers.{layer}."
    tensors = {n: n for n in checkpoint.tensors if not n.startswith("model.layers.") or n.startswith(prefix)}
    config = checkpoint.config
    resolved: Any = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    if (types := getattr(resolved, "layer_types", None)) is not None:
        config["layer_types"] = list(types)
    if hasattr(resolved, "mlp_only_layers"):
        sparse = any(".experts." in name for name in tensors)
        config |= {"mlp_only_layers": [] if sparse else [0], "decoder_sparse_step": 1}
    if layer > 0 and hasattr(resolved, "embedding_multiplier"):
        config["embedding_multiplier"] = 1.0
    vocabulary = (vocab_size(config) or 0) if whole_vocabulary else 1
    folder.mkdir()
    write_part(folder, view(checkpoint, tensors, what={"layer": layer}, config=config), Part([layer], vocabulary))
    model = load_model(folder)
    shutil.rmtree(folder)
    return model


def _without_norm(model: "PreTrainedModel") -> None:
    """The layer's own output instead of the normalised one."""
    import torch

    base: Any = model.base_model
    base.norm = torch.nn.Identity()


def _states(text: Sequences, states: "np.ndarray[Any, Any]", at: int) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """Ids (B, T) and states (B, T, D) of every batch, read when it is due."""
    import torch

    for ids_BT, _ in batches(text):
        x_ND = torch.from_numpy(np.array(states[at : at + ids_BT.numel()]))
        yield ids_BT, x_ND.reshape(*ids_BT.shape, -1)
        at += ids_BT.numel()


def _base(model: "PreTrainedModel", x_BTD: "torch.Tensor") -> "torch.Tensor":
    found: torch.Tensor = model.base_model(inputs_embeds=x_BTD, use_cache=False).last_hidden_state
    return found


def _put(states: "np.ndarray[Any, Any]", at: int, y_BTD: "torch.Tensor", layer: int) -> None:
    values = y_BTD.reshape(-1, y_BTD.shape[-1]).numpy()
    if not np.isfinite(values).all():
        raise CheckpointError(f"layer {layer} gives states that are NaN or infinite; the model is damaged")
    states[at : at + len(values)] = values


def _nll(model: "PreTrainedModel", ids_T: "torch.Tensor", targets_T: "torch.Tensor", x_TD: "torch.Tensor") -> float:
    """Of one sequence, summed: so there are the logits of one sequence only."""
    import torch

    if len(ids_T) < 2:
        return 0.0
    logits_TV = model(inputs_embeds=x_TD[None], use_cache=False).logits[0, :-1].float()
    nll_T = torch.nn.functional.cross_entropy(logits_TV, ids_T[1:], reduction="none")
    return float(nll_T.double()[targets_T[1:]].sum())
