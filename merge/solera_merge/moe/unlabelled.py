"""Labels for text of unknown domains: how well each specialist has predicted it so far.

E experts, D model width, B batch, T tokens, N all tokens
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_merge.moe.calibration import Sequences
from solera_merge.moe.dense import Dense
from solera_merge.moe.layers import Chunk, chunks_of, dense_layers, run_layers
from solera_merge.moe.states import Taught

if TYPE_CHECKING:
    import torch

__all__ = ["SHARPNESS", "label_by_specialists", "running_labels", "token_nll"]

SHARPNESS = 4.0
"""Of the labels: a specialist whose running mean is 1 nat a token better than another's gets e^4 times its share."""


def running_labels(nll_ET: np.ndarray) -> np.ndarray:
    """Labels (T, E) of one sequence from every specialist's loss on its tokens, (E, T); the first token's is ignored.

        y_t = softmax_e(-SHARPNESS * mean of nll_e over the tokens 1 .. t)

    The mean runs from the beginning of the sequence, so a token's label says what its specialists have shown up to it:
    labels from the token's own loss alone are too noisy (research: 0.42 nats where these give 0.29). Nothing predicts
    the first token; it gets the label of the second.
    """
    experts, tokens = nll_ET.shape
    if tokens < 2:
        return np.full((tokens, experts), 1 / experts)
    means_ET = np.cumsum(nll_ET[:, 1:], axis=1, dtype=np.float64) / np.arange(1, tokens)
    logits_TE = -SHARPNESS * np.concatenate([means_ET[:, :1], means_ET], axis=1).T
    shares_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    return np.asarray(shares_TE / shares_TE.sum(axis=1, keepdims=True))


def token_nll(model: Dense, text: Sequences, *, where: str, scratch: Path, ctx: Context) -> np.ndarray:
    """Loss of a dense model on every token of a text, (N,), nats; 0 for the first token of a sequence.

    Raises:
        CheckpointError: it is NaN or infinite, naming the document.
    """
    import torch

    chunks = chunks_of([text])
    nll_N = np.zeros(text.tokens)

    def score(way: int, chunk: Chunk, logits_BTV: "torch.Tensor") -> None:
        del way
        loss_BT = torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].float().transpose(1, 2), chunk.ids[:, 1:], reduction="none"
        )
        found_BT = np.zeros(chunk.ids.shape)
        found_BT[:, 1:] = loss_BT.double().numpy()
        nll_N[chunk.start : chunk.start + chunk.ids.numel()] = found_BT.reshape(-1)

    layers = dense_layers(model, model, scratch / "layer", threads=ctx.threads)
    with ctx.progress.task(f"{model.name} reads the unlabelled text", len(layers), "layers") as task:
        run_layers(
            layers,
            chunks,
            [lambda *_: nullcontext()],
            score,
            scratch=scratch,
            task=task,
        )
    if not np.isfinite(nll_N).all():
        documents = text.documents_of(int(np.argmin(np.isfinite(nll_N))))
        raise CheckpointError(f"{where}: {model.name} gives text of {documents} a loss that is NaN or infinite")
    return nll_N


def label_by_specialists(
    specialists: Sequence[Dense], text: Sequences, *, where: str, scratch: Path, ctx: Context
) -> list[Taught]:
    """The text, every sequence under the specialist that predicts it best, with labels by their running means."""
    nll_EN = np.stack([token_nll(model, text, where=where, scratch=scratch, ctx=ctx) for model in specialists])
    under: list[list[int]] = [[] for _ in specialists]
    labels: list[np.ndarray] = []
    start = 0
    for number, ids in enumerate(text.ids):
        nll_ET = nll_EN[:, start : start + len(ids)]
        labels.append(running_labels(nll_ET))
        under[int(nll_ET.sum(axis=1).argmin())].append(number)
        start += len(ids)
    starts = np.cumsum([0, *map(len, text.ids)])
    found: list[Taught] = []
    for e, numbers in enumerate(under):
        if numbers:
            begins = np.cumsum([0, *(len(text.ids[i]) for i in numbers)])
            part = Sequences(
                tuple(text.ids[i] for i in numbers),
                tuple(text.targets[i] for i in numbers),
                tuple((int(b), text.documents_of(int(starts[i]))) for b, i in zip(begins, numbers, strict=False)),
            )
            found.append(Taught(e, where, part, np.concatenate([labels[i] for i in numbers])))
    return found
