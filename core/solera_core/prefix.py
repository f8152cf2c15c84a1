"""Where a text begins, in tokens: the BOS policy, in one place and recorded with every result.

A prompt is tokenized as the tokenizer itself does it, so a BOS stands before it exactly where the model was trained
with one. A text without a prompt needs some token to predict its first token from: BOS, or EOS for tokenizers without
one (GPT-2 and its kin separate documents with it), as lm-evaluation-harness does. Tokenizers with neither leave the
first token unscored.
"""

from typing import Any

__all__ = ["describe_prefix", "prefix_id", "prompt_ids"]


def prefix_id(tokenizer: Any) -> int | None:
    """The token a text without a prompt starts from."""
    bos: int | None = tokenizer.bos_token_id
    eos: int | None = tokenizer.eos_token_id
    return eos if bos is None else bos


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a prompt with the tokenizer's own leading special tokens, and without an EOS it appends."""
    ids = list(tokenizer(text).input_ids)
    eos = tokenizer.eos_token_id
    if (
        eos is not None
        and eos != tokenizer.bos_token_id
        and ids
        and ids[-1] == eos
        and not text.endswith(tokenizer.eos_token)
    ):
        ids.pop()
    return ids


def describe_prefix(tokenizer: Any) -> dict[str, Any]:
    """The policy as it applies to this tokenizer, for the record."""
    identity = prefix_id(tokenizer)
    source = "bos" if tokenizer.bos_token_id is not None else "eos" if identity is not None else "none"
    return {
        "text_prefix": source,
        "text_prefix_id": identity,
        "prompt_has_bos": tokenizer.bos_token_id is not None
        and prompt_ids(tokenizer, "a")[:1] == [tokenizer.bos_token_id],
    }
