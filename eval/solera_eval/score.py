"""Log-likelihoods of texts and of choices, under one causal model. Imports torch: load it late.

B rows, T tokens, V vocabulary, D model. Numerics: logits of the positions asked for are taken to float32, log-softmax
in float32, sums in float64. Rows are sorted by length and packed into batches by tokens, padded on the right; nothing
after a position can change it, so no attention mask is needed, and results do not depend on the batch beyond the
rounding of a different matrix shape (fp32: about 1e-5 nats a token; bf16: up to half a nat).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from solera_core.data import encode
from solera_core.errors import CheckpointError, DataError
from solera_eval.suite import ChoiceItem, TextItem
from solera_eval.tokens import prefix_id, prompt_ids

__all__ = [
    "ChoiceScore",
    "Query",
    "TextScore",
    "context_tokens",
    "log_likelihoods",
    "score_choices",
    "score_text",
    "windows",
]

Advance = Callable[[float], object]  # told how much more is done
_LOGITS_CHUNK = 1 << 22  # float32 logits at a time: 16 MiB


@dataclass(frozen=True)
class TextScore:
    """NLL of one document in nats (a sum), over how many tokens and UTF-8 bytes."""

    nll: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class ChoiceScore:
    """Summed log-likelihood and number of scored tokens of each choice of one item."""

    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Query:
    """What is fed, and which next tokens are scored: log p(targets[i] | inputs[: at[i] + 1])."""

    inputs: tuple[int, ...]
    at: tuple[int, ...]
    targets: tuple[int, ...]


def score_text(
    model: Any,
    tokenizer: Any,
    items: Sequence[TextItem],
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
    tokens = [0] * len(items)
    for i, item in enumerate(items):
        encoded = encode(item.document, tokenizer, add_eos=False)
        ids, targets = encoded.ids, encoded.targets
        if targets and targets[0] and prefix is not None:
            ids, targets = (prefix, *ids), (False, *targets)
        for query in _text_queries(ids, targets, window):
            queries.append(query)
            owners.append(i)
            tokens[i] += len(query.at)
        if not tokens[i]:
            raise DataError(f"document {item.id}: no token to score; leave it out")
    nll = [0.0] * len(items)
    values = log_likelihoods(model, queries, batch_tokens=batch_tokens, advance=_in_items(advance, items, queries))
    for owner, value in zip(owners, values, strict=True):
        nll[owner] -= value
    for item, value in zip(items, nll, strict=True):
        _require_finite(value, f"document {item.id}")
    return [TextScore(n, t, item.document.n_bytes) for n, t, item in zip(nll, tokens, items, strict=True)]


def score_choices(
    model: Any,
    tokenizer: Any,
    items: Sequence[ChoiceItem],
    *,
    batch_tokens: int,
    advance: Advance = lambda _: None,
) -> list[ChoiceScore]:
    """Log-likelihood of every choice after its prompt, in the order given.

    Prompt and choice are tokenized together. Where a token straddles the boundary (for any choice), all choices are
    scored from the last token they share with the prompt, so that the same text is compared.

    Raises:
        DataError: an item longer than the model's context, or a choice without a token of its own.
        CheckpointError: the model gives a log-probability that is not finite.
    """
    context = context_tokens(model)
    queries: list[Query] = []
    for item in items:
        for choice, query in zip(item.choices, _choice_queries(tokenizer, item), strict=True):
            if not query.at:
                raise DataError(f"item {item.id}: choice {choice!r} has no token of its own to score")
            if context is not None and len(query.inputs) > context:
                raise DataError(
                    f"item {item.id}: {len(query.inputs)} tokens do not fit the model's context of {context}; "
                    "shorten its prompt or leave it out"
                )
            queries.append(query)
    advance = _in_items(advance, items, queries)
    values = iter(log_likelihoods(model, queries, batch_tokens=batch_tokens, advance=advance))
    lengths = iter(len(query.at) for query in queries)
    scores: list[ChoiceScore] = []
    for item in items:
        found = tuple(next(values) for _ in item.choices)
        for value in found:
            _require_finite(value, f"item {item.id}")
        scores.append(ChoiceScore(found, tuple(next(lengths) for _ in item.choices)))
    return scores


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


def _choice_queries(tokenizer: Any, item: ChoiceItem) -> Iterator[Query]:
    prefix = prefix_id(tokenizer)
    start = [] if prefix is None else [prefix]
    if item.prompt:
        head = prompt_ids(tokenizer, item.prompt)
        wholes = [prompt_ids(tokenizer, item.prompt + choice) for choice in item.choices]
    else:
        head = start
        wholes = [start + list(tokenizer(choice, add_special_tokens=False).input_ids) for choice in item.choices]
    shared = min(_common(head, whole) for whole in wholes)
    if shared == 0 and item.prompt:
        shared, wholes = len(start), [start + whole for whole in wholes]
    first = max(shared, 1)
    for whole in wholes:
        positions = range(first, len(whole))
        yield Query(tuple(whole[:-1]), tuple(p - 1 for p in positions), tuple(whole[first:]))


def _in_items(advance: Advance, items: Sequence[object], queries: Sequence[Query]) -> Advance:
    """Turn queries done into items done."""
    share = len(items) / max(len(queries), 1)
    return lambda done: advance(done * share)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _require_finite(value: float, where: str) -> None:
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
