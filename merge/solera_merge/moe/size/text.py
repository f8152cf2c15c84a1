"""The text of every domain as tokens: a part to decide on, a part to report on."""

from collections.abc import Sequence
from dataclasses import dataclass

from solera_core.causal_lm import load_tokenizer
from solera_core.checkpoint import Checkpoint
from solera_core.context import Context
from solera_core.errors import ConfigError, DataError
from solera_merge.moe.calibration import Domain, Sequences, read_domains, tokenize
from solera_merge.moe.size.config import TextConfig

__all__ = ["DomainText", "encode_text", "read_text"]

_SOUND_TOKENS = 1000
"""Held-out tokens below which a domain's likelihood says little; a warning says so."""


@dataclass(frozen=True)
class DomainText:
    """Tokens by domain.

    Attributes:
        names: of the domains.
        seen: what decisions are made from.
        held_out: what the report is about.
        warnings: of domains that are small.
    """

    names: tuple[str, ...]
    seen: tuple[Sequences, ...]
    held_out: tuple[Sequences, ...]
    warnings: tuple[str, ...]


def read_text(config: TextConfig, ctx: Context) -> tuple[list[Domain], list[str]]:
    """Documents and warnings. Raises DataError for a domain that cannot be split or repeats another."""
    return read_domains(config.data, base_dir=ctx.base_dir, holdout=config.holdout, seed=ctx.seed, key="data")


def encode_text(domains: Sequence[Domain], model: Checkpoint, config: TextConfig) -> DomainText:
    """Tokenize with the model's own tokenizer, and refuse what is too little.

    Raises:
        DataError: a domain without tokens to look at, or without one to score.
        CheckpointError: the model has no tokenizer.
    """
    tokenizer = load_tokenizer(model.path)
    tokenizer.model_max_length = 1 << 30  # long documents are cut into sequences here; its warning would mislead
    positions, vocabulary = (model.config.get(key) for key in ("max_position_embeddings", "vocab_size"))
    length = min(config.sequence_tokens, positions or config.sequence_tokens)
    held_out_tokens = max(round(config.tokens_per_domain * config.holdout / (1 - config.holdout)), 2)
    seen: list[Sequences] = []
    held_out: list[Sequences] = []
    warnings: list[str] = []
    for domain in domains:
        where = f"data.{domain.name}"
        try:
            first, second = (
                tokenize(documents, tokenizer, limit=limit, sequence_tokens=length, where=where)
                for documents, limit in (
                    (domain.fit, config.tokens_per_domain),
                    (domain.held_out, held_out_tokens),
                )
            )
        except ConfigError as e:
            raise DataError(str(e)) from e
        if second.scored == 0:
            raise DataError(f"{where}: the held-out text has no token to score; add documents")
        if vocabulary is not None and max(max(ids) for part in (first, second) for ids in part.ids) >= vocabulary:
            raise DataError(f"{where}: the tokenizer gives ids that the model's {vocabulary} embeddings do not have")
        if first.tokens < config.tokens_per_domain:
            warnings.append(f"{where}: {first.tokens} tokens, {config.tokens_per_domain} were asked for")
        if second.scored < _SOUND_TOKENS:
            warnings.append(f"{where}: only {second.scored} held-out tokens are scored, so its figures are rough")
        seen.append(first)
        held_out.append(second)
    return DomainText(tuple(d.name for d in domains), tuple(seen), tuple(held_out), tuple(warnings))
