"""Log-likelihoods under one causal model: of documents, and of any tokens. Imports torch: load it late.

B rows, T tokens, V vocabulary, D model. Numerics: logits of the positions asked for are taken to float32, log-softmax
in float32, sums in float64. Rows are sorted by length and packed into batches by tokens, padded on the right; nothing
after a position can change it, so no attention mask is needed, and results do not depend on the batch beyond the
rounding of a different matrix shape (fp32: about 1e-5 nats a token; bf16: up to half a nat).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from solera_core.data import Document, encode
from solera_core.errors import CheckpointError, DataError
from solera_core.prefix import prefix_id

__all__ = [
    "Advance",
    "Query",
    "TextScore",
    "context_tokens",
    "in_items",
    "log_likelihoods",
    "require_finite",
    "score_documents",
    "windows",
]

Advance = Callable[[float], object]
"""Told how much more is done."""

_LOGITS_CHUNK = 1 << 22  # float32 logits at a time: 16 MiB


@dataclass(frozen=True)
class TextScore:
    """NLL of one document in nats (a sum), over how many tokens and UTF-8 bytes."""

    nll: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Query:
    """What is fed, and which next tokens are scored: log p(targets[i] | inputs[: at[i] + 1])."""

    inputs: tuple[int, ...]
    at: tuple[int, ...]
    targets: tuple[int, ...]


def score_documents(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    window_tokens: int,
    batch_tokens: int,
    advance: Advance = lambda _: None,
) -> list[TextScore]:
    """NLL of every document, in the order given.

    A document longer than the window is scored in windows of `window_tokens` inputs that do not overlap, save the
    last, which reaches back for a full context: every token is scored exactly once, with at least one token before it
    (lm-evaluation-harness `loglikelihood_rolling`).

    Raises:
        DataError: a document in which nothing is to be scored, or a chat without a template.
        CheckpointError: the model gives a log-probability that is not finite.
    """
    window = min(window_tokens, context_tokens(model) or window_tokens)
    prefix = prefix_id(tokenizer)
    queries: list[Query] = []
    owners: list[int] = []
    tokens = [0] * len(documents)
    for i, document in enumerate(documents):
        encoded = encode(document, tokenizer, add_eos=False)
        ids, targets = encoded.ids, encoded.targets
        if targets and targets[0] and prefix is not None:
            ids, targets = (prefix, *ids), (False, *targets)
        for query in _text_queries(ids, targets, window):
            queries.append(query)
            owners.append(i)
            tokens[i] += len(query.at)
        if not tokens[i]:
            raise DataError(f"document {document.id}: no token to score; leave it out")
    nll = [0.0] * len(documents)
    values = log_likelihoods(model, queries, batch_tokens=batch_tokens, advance=in_items(advance, documents, queries))
    for owner, value in zip(owners, values, strict=True):
        nll[owner] -= value
    for document, value in zip(documents, nll, strict=True):
        require_finite(value, f"document {document.id}")
    return [TextScore(n, t, document.n_bytes) for n, t, document in zip(nll, tokens, documents, strict=True)]


def context_tokens(model: Any) -> int | None:
    """The longest input the model was built for, where its config says so."""
    config = model.config.get_text_config()
    return next((n for key in ("max_position_embeddings", "n_positions") if (n := getattr(config, key, None))), None)


def windows(tokens: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Cut a sequence of `tokens` ids: (begin, first, end), inputs ids[begin : end - 1], scored ids[first : end].

    >>> list(windows(6, 2))
    [(0, 1, 3), (2, 3, 5), (3, 5, 6)]
    """
    first = 1
    while first < tokens:
        end = min(first + window, tokens)
        yield max(end - 1 - window, 0), first, end
        first = end


def _text_queries(ids: Sequence[int], targets: Sequence[bool], window: int) -> Iterator[Query]:
    for begin, first, end in windows(len(ids), window):
        scored = [p for p in range(first, end) if targets[p]]
        if scored:
            stop = scored[-1]  # nothing after the last scored token matters
            yield Query(tuple(ids[begin:stop]), tuple(p - 1 - begin for p in scored), tuple(ids[p] for p in scored))


def in_items(advance: Advance, items: Sequence[object], queries: Sequence[Query]) -> Advance:
    """Turn queries done into items done."""
    share = len(items) / max(len(queries), 1)
    return lambda done: advance(done * share)


def require_finite(value: float, where: str) -> None:
    """Raise CheckpointError for a log-likelihood that is NaN or infinite."""
    if not abs(value) < float("inf"):
        raise CheckpointError(
            f"{where}: the model's log-likelihood is {value}; its weights hold NaN or infinity, or its activations "
            "overflow in this dtype (try float32)"
        )


# the forward passes --------------------------------------------------------------------------------------------------


def log_likelihoods(
    model: Any, queries: Sequence[Query], *, batch_tokens: int, advance: Advance = lambda _: None
) -> list[float]:
    """Summed log-likelihood (nats, float64) of every query; `advance` is told how many are answered.

    A query whose inputs are the beginning of another's is answered by the same forward pass: choices of one token
    share their prompt's.
    """
    answers = [0.0] * len(queries)
    with torch.inference_mode():
        logits_of = _plain_head(model)
        for batch in _batches(_hosts(queries), queries, batch_tokens):
            length = max(len(queries[host].inputs) for host, _ in batch)
            ids_BT = torch.tensor(
                [(*(row := queries[host].inputs), *row[-1:] * (length - len(row))) for host, _ in batch],
                device=model.device,
            )
            if logits_of is None:
                states_BTX = model(input_ids=ids_BT, use_cache=False).logits
            else:
                states_BTX = model.base_model(input_ids=ids_BT, use_cache=False)[0]
            rows, positions, targets, owners = _flat(batch, queries)
            states_NX = states_BTX[rows, positions]
            logprobs = _target_logprobs(states_NX, torch.tensor(targets, device=model.device), logits_of)
            for owner, value in zip(owners, logprobs, strict=True):
                answers[owner] += value
            advance(float(sum(len(guests) for _, guests in batch)))
    return answers


def _target_logprobs(states_NX: torch.Tensor, targets_N: torch.Tensor, head: Any | None) -> list[float]:
    """Log p(target) of every position; logits (V each) exist only for a chunk of positions at a time."""
    width = states_NX.shape[-1] if head is None else head.weight.shape[0]
    chunk = max(_LOGITS_CHUNK // width, 1)
    found: list[float] = []
    for begin in range(0, len(targets_N), chunk):
        states, targets = states_NX[begin : begin + chunk], targets_N[begin : begin + chunk]
        logits_CV = (states if head is None else head(states)).float()
        chosen_C = logits_CV.gather(1, targets[:, None])[:, 0] - logits_CV.logsumexp(1)
        found += chosen_C.tolist()
    return found


def _plain_head(model: Any) -> Any | None:
    """The output projection, if logits are nothing but it applied to the trunk's states; else None.

    Some architectures scale or cap their logits, so it is not assumed but tried, on eight tokens, for exact equality.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or model.base_model is model:
        return None
    ids = torch.arange(min(8, head.weight.shape[0]), device=model.device)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    found = head(model.base_model(input_ids=ids, use_cache=False)[0])
    return head if torch.equal(expected, found) else None


def _hosts(queries: Sequence[Query]) -> list[tuple[int, list[int]]]:
    """(host, guests): each query is a guest of one whose inputs begin with its own; a host is its own first guest."""
    groups: list[tuple[int, list[int]]] = []
    for q in sorted(range(len(queries)), key=lambda q: (queries[q].inputs, -q), reverse=True):
        inputs = queries[q].inputs
        if groups and queries[groups[-1][0]].inputs[: len(inputs)] == inputs:
            groups[-1][1].append(q)
        else:
            groups.append((q, [q]))
    return groups


def _batches(
    groups: list[tuple[int, list[int]]], queries: Sequence[Query], batch_tokens: int
) -> Iterator[list[tuple[int, list[int]]]]:
    """Longest first (a batch too large for the memory fails at once), at most batch_tokens with padding."""
    batch: list[tuple[int, list[int]]] = []
    length = 0
    for group in sorted(groups, key=lambda g: (-len(queries[g[0]].inputs), g[0])):
        length = length or len(queries[group[0]].inputs)
        if batch and (len(batch) + 1) * length > batch_tokens:
            yield batch
            batch, length = [], len(queries[group[0]].inputs)
        batch.append(group)
    if batch:
        yield batch


def _flat(
    batch: list[tuple[int, list[int]]], queries: Sequence[Query]
) -> tuple[list[int], list[int], list[int], list[int]]:
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for row, (_, guests) in enumerate(batch):
        for guest in guests:
            query = queries[guest]
            rows += [row] * len(query.at)
            positions += query.at
            targets += query.targets
            owners += [guest] * len(query.at)
    return rows, positions, targets, owners
