"""Log-likelihoods of the choices of multiple-choice items, under one causal model. Imports torch: load it late."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from solera_core.errors import DataError
from solera_core.likelihood import Advance, Query, context_tokens, in_items, log_likelihoods, require_finite
from solera_core.prefix import prefix_id, prompt_ids
from solera_eval.suite import ChoiceItem

__all__ = ["ChoiceScore", "score_choices"]


@dataclass(frozen=True)
class ChoiceScore:
    """Summed log-likelihood and number of scored tokens of each choice of one item."""

    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]


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
    advance = in_items(advance, items, queries)
    values = iter(log_likelihoods(model, queries, batch_tokens=batch_tokens, advance=advance))
    lengths = iter(len(query.at) for query in queries)
    scores: list[ChoiceScore] = []
    for item in items:
        found = tuple(next(values) for _ in item.choices)
        for value in found:
            require_finite(value, f"item {item.id}")
        scores.append(ChoiceScore(found, tuple(next(lengths) for _ in item.choices)))
    return scores


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


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
