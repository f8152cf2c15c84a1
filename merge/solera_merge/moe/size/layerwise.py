"""A model of any size on text, layer by layer (`moe/layers.py`): its losses, and what its layers do meanwhile.

In memory is one layer in float32, with embedding and head for the first and the last; on the disk one layer as stored
and one float32 state a token.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from solera_core.architecture import num_layers, vocab_size
from solera_core.checkpoint import Checkpoint
from solera_core.errors import CheckpointError
from solera_core.progress import Progress
from solera_core.views import view
from solera_merge.moe.calibration import Sequences
from solera_merge.moe.layers import Chunk, Layers, States, chunks_of, embed, through
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
        CheckpointError: a state or a likelihood is not finite.
    """
    import torch

    layers = _layers(checkpoint, scratch / "layer")
    chunks = chunks_of([*watched, *scored])
    sums = np.zeros(len(watched) + len(scored))
    total = sum(chunk.ids.numel() for chunk in chunks)
    scratch.mkdir()
    try:
        with (
            States(scratch / "states", layers.width) as states,
            torch.inference_mode(),
            progress.task(what, total * len(layers), "tokens") as task,
        ):

            def run(chunk: Chunk, layer: int, model: "PreTrainedModel") -> None:
                head = layer == len(layers) - 1 and chunk.text >= len(watched)
                x_ND = torch.from_numpy(states.read(chunk.start, chunk.ids.numel()))
                x_BTD = x_ND.reshape(*chunk.ids.shape, layers.width)
                # The logits of one sequence at a time are enough to hold.
                step = 1 if head else len(x_BTD)
                for i in range(0, len(x_BTD), step):
                    y_BTD, logits_BTV = through(model, x_BTD[i : i + step], head=head)
                    if logits_BTV is not None:
                        sums[chunk.text] += _nll(chunk.ids[i], chunk.targets[i], logits_BTV[0])
                    elif bool(torch.isfinite(y_BTD).all()):
                        states.write(chunk.start, y_BTD)
                    else:
                        raise CheckpointError(
                            f"{checkpoint.ref}: layer {layer} gives states that are NaN or infinite; it is damaged"
                        )
                task.advance(chunk.ids.numel())

            first_scored = sum(chunk.text < len(watched) for chunk in chunks)
            for layer in range(len(layers)):
                model = layers.load(layer)
                if layer == 0:  # before anybody watches: the embeddings come out of a forward pass
                    for chunk in chunks:
                        states.write(chunk.start, embed(model, chunk.ids))
                with watch(layer, model) if watch is not None else nullcontext():
                    for chunk in chunks[:first_scored]:
                        run(chunk, layer, model)
                for chunk in chunks[first_scored:]:
                    run(chunk, layer, model)
                del model
    finally:
        for leftover in scratch.iterdir():
            leftover.unlink()
        scratch.rmdir()
    nll = [float(value) / text.scored for value, text in zip(sums[len(watched) :], scored, strict=True)]
    if not np.isfinite(nll).all():
        raise CheckpointError(f"{checkpoint.ref}: gives a likelihood that is NaN or infinite; it is damaged")
    return nll


def _layers(checkpoint: Checkpoint, scratch: Path) -> Layers:
    """Every layer as a model of its own, also of models whose layers are not all alike."""
    from transformers import AutoConfig

    resolved: Any = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)

    def write(directory: Path, part: Part) -> None:
        (layer,) = part.layers
        prefix = f"model.layers.{layer}."
        tensors = {n: n for n in checkpoint.tensors if not n.startswith("model.layers.") or n.startswith(prefix)}
        config = checkpoint.config
        if (types := getattr(resolved, "layer_types", None)) is not None:
            config["layer_types"] = list(types)  # config.json may leave them to be worked out from the layer's number
        if hasattr(resolved, "mlp_only_layers"):
            sparse = any(".experts." in name for name in tensors)
            config |= {"mlp_only_layers": [] if sparse else [0], "decoder_sparse_step": 1}
        write_part(directory, view(checkpoint, tensors, what={"layer": layer}, config=config), part)

    return Layers(
        write,
        scratch,
        layers=num_layers(checkpoint.config) or 0,
        vocabulary=vocab_size(checkpoint.config) or 0,
        width=checkpoint.tensors[_EMBEDDING].shape[1],
        nbytes=4 * sum(info.size for info in checkpoint.tensors.values()),
    )


def _nll(ids_T: "torch.Tensor", targets_T: "torch.Tensor", logits_TV: "torch.Tensor") -> float:
    """Of one sequence, summed over what is scored; its first token has no context."""
    import torch

    if len(ids_T) < 2:
        return 0.0
    nll_T = torch.nn.functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none")
    return float(nll_T.double()[targets_T[1:]].sum())
