"""Loss on text that is not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.data import DataSource
from solera_core.fold import loadable
from solera_distill.batches import Corpus, micro_batches
from solera_distill.losses import negative_log_likelihood
from solera_distill.objective import half, hidden_states, output_matrix

__all__ = ["HeldOut", "measure", "nll_of"]


@dataclass(frozen=True)
class HeldOut:
    """Held-out text; a piece's route is the index of its domain in `domains`."""

    corpus: Corpus
    domains: Sequence[str]


def nll_of(reference: str, sources: Sequence[DataSource], sequence_tokens: int, ctx: Context) -> float:
    """The mean loss of a model on text, in nats a token, as a training measures it on its `eval_data`."""
    from solera_core.causal_lm import load_model, load_tokenizer
    from solera_distill.text import Groups, heldout_corpus, read_groups

    checkpoint = open_checkpoint(reference, ctx)
    tokenizer: Any = load_tokenizer(checkpoint.path, trust_remote_code=ctx.trust_remote_code)
    tokenizer.model_max_length = 1 << 40
    text = heldout_corpus(read_groups(sources, ctx.base_dir), Groups([], []), tokenizer, sequence_tokens)
    with loadable(checkpoint) as directory:
        model = load_model(directory, trust_remote_code=ctx.trust_remote_code)
        row = measure(model, text, limit=4096, bfloat16=False, device=torch.device("cpu"))
    return float(row["nll"])


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
