"""Loss on text that is not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from solera_distill.batches import Corpus, micro_batches
from solera_distill.losses import negative_log_likelihood
from solera_distill.objective import half, hidden_states, output_matrix

__all__ = ["HeldOut", "measure"]


@dataclass(frozen=True)
class HeldOut:
    """Held-out text; a piece's route is the index of its domain in `domains`."""

    corpus: Corpus
    domains: Sequence[str]


def measure(model: Any, text: HeldOut, *, limit: int, bfloat16: bool, device: torch.device) -> dict[str, Any]:
    """Mean negative log-likelihood (nats a token) over all learned tokens, and for each domain where there are several.

    Returns:
        `{"nll": ..., "tokens": ..., "domains": {domain: nll}}`.
    """
    sums = [0.0] * len(text.domains)
    counts = [0] * len(text.domains)
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in micro_batches(text.corpus.pieces, limit):
            with half(device, bfloat16):
                hidden = hidden_states(model, torch.from_numpy(batch.inputs).to(device))
                chosen = hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(batch.positions).to(device)]
                nll = negative_log_likelihood(chosen, output_matrix(model), torch.from_numpy(batch.targets).to(device))
            sums[batch.route] += float(nll.double().sum())
            counts[batch.route] += len(batch.targets)
    model.train(training)
    result: dict[str, Any] = {"nll": sum(sums) / sum(counts), "tokens": sum(counts)}
    if len(text.domains) > 1:
        result["domains"] = {d: s / c for d, s, c in zip(text.domains, sums, counts, strict=True) if c}
    return result
