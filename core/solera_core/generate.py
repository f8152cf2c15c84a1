"""Greedy continuations of many prompts, batched. Imports torch and transformers: load it late."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from solera_core.errors import DataError
from solera_core.likelihood import context_tokens
from solera_core.prefix import prefix_id, prompt_ids

__all__ = ["cut_at_stop", "generate"]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_tokens: int,
    advance: Callable[[float], object] = lambda _: None,
) -> list[str]:
    """The greedy continuation of every prompt, up to EOS, a stop string (left out) or `max_new_tokens`.

    Prompts are sorted by length, padded on the left and decoded with a KV cache. Only the argmax decides: sampling
    settings, penalties and length rules that come with the checkpoint's generation config do not apply, its EOS ids do.

    Raises:
        DataError: a prompt that leaves no room in the model's context, or that has no token.
    """
    prefix = prefix_id(tokenizer)
    start = [] if prefix is None else [prefix]
    encoded = [prompt_ids(tokenizer, prompt) or start for prompt in prompts]
    context = context_tokens(model)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise DataError(f"prompt {prompt[:60]!r} has no token")
        if context is not None and len(ids) + max_new_tokens > context:
            raise DataError(
                f"prompt {prompt[:60]!r}... has {len(ids)} tokens; with max_new_tokens: {max_new_tokens} it does not "
                f"fit the model's context of {context}; shorten one of them"
            )
    ends = _eos_ids(model, tokenizer)
    outputs = [""] * len(prompts)
    original = model.generation_config
    # replaced, not passed: what a passed config leaves unset is filled from the model's own
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0],
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )
    try:
        with torch.inference_mode():
            for batch in _batches(encoded, max_new_tokens, batch_tokens):
                length = max(len(encoded[i]) for i in batch)
                pad = model.generation_config.pad_token_id
                padding = [length - len(encoded[i]) for i in batch]
                ids_BT = torch.tensor(
                    [[pad] * p + encoded[i] for p, i in zip(padding, batch, strict=True)], device=model.device
                )
                mask_BT = torch.tensor([[0] * p + [1] * (length - p) for p in padding], device=model.device)
                criteria = StoppingCriteriaList([_StopStrings(tokenizer, length, stop)] if stop else [])
                found = model.generate(input_ids=ids_BT, attention_mask=mask_BT, stopping_criteria=criteria)
                for i, new in zip(batch, found[:, length:].tolist(), strict=True):
                    end = next((t for t, token in enumerate(new) if token in ends), len(new))
                    outputs[i] = cut_at_stop(tokenizer.decode(new[:end], skip_special_tokens=True), stop)
                advance(float(len(batch)))
    finally:
        model.generation_config = original
    return outputs


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    r"""The text before the earliest stop string.

    >>> cut_at_stop("4\n5", ["\n"])
    '4'
    """
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


class _StopStrings(StoppingCriteria):
    """Ends a row as soon as its new text holds a stop string.

    transformers' own `stop_strings` builds a table over the vocabulary first (seconds for a large one); decoding the
    few new tokens of a row costs less.
    """

    def __init__(self, tokenizer: Any, prompt_length: int, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.stop = stop
        self.done: list[bool] | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        del scores, kwargs
        new = input_ids[:, self.prompt_length :].tolist()
        before = self.done or [False] * len(new)
        self.done = [
            was or any(s in self.tokenizer.decode(ids, skip_special_tokens=True) for s in self.stop)
            for was, ids in zip(before, new, strict=True)
        ]
        return torch.tensor(self.done, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]  # torch's stubs


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [own] if isinstance(own, int) else list(own or [])
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ends))


def _batches(encoded: Sequence[Sequence[int]], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    length = 0
    for i in sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i)):
        length = length or len(encoded[i]) + max_new_tokens
        if batch and (len(batch) + 1) * length > batch_tokens:
            yield batch
            batch, length = [], len(encoded[i]) + max_new_tokens
        batch.append(i)
    if batch:
        yield batch
