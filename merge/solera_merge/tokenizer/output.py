"""The tokenizer of the output as the recipe asks for it, and what the recipe says about single tokens."""

from collections.abc import Mapping

from solera_core.strict import did_you_mean
from solera_merge.problems import Problems, some
from solera_merge.tokenizer.build import PLAIN, cut, extended, union_tokens
from solera_merge.tokenizer.config import Fill, TokenConfig, TokenizerConfig
from solera_merge.tokenizer.models import Tokenizers
from solera_merge.tokenizer.read import ModelTokenizer
from solera_merge.tokenizer.rows import RowFill

__all__ = ["fills_of", "output_rows", "output_tokenizer"]


def output_tokenizer(wanted: TokenizerConfig, all_: Tokenizers, warnings: list[str]) -> ModelTokenizer:
    """The donor's tokenizer, with the other models' tokens in a union, and with those that the recipe adds.

    Raises:
        CheckpointError: that tokenizer takes no more tokens.
        ConfigError: a token of the recipe differs from one of the models in upper and lower case only.
    """
    limit = all_.rows[all_.donor]
    output, gone = cut(all_.own[all_.donor], limit)
    if gone:
        warnings.append(
            f"{output.file}: {len(gone)} tokens have no embedding row (the ids from {limit} on) and are left out: "
            f"{some(sorted(gone))}"
        )
    if wanted.source == "union":
        others = [i for i in all_.own if i != all_.donor]
        pieces, added, notes = union_tokens(output, [all_.own[i] for i in others], [all_.rows[i] for i in others])
        warnings += notes
        output = extended(output, pieces, added)
    _check_spelling(wanted.tokens, all_)
    return extended(output, [], {token: PLAIN for token in wanted.tokens if token not in output.vocabulary})


def output_rows(output: ModelTokenizer, wanted: TokenizerConfig, donor_rows: int) -> int:
    """Rows of the output: none of the donor's is dropped, unless the recipe rounds the number of tokens up itself."""
    tokens = max(output.vocabulary.values(), default=-1) + 1
    multiple = wanted.pad_to_multiple_of
    return max(tokens, donor_rows) if multiple is None else -(-tokens // multiple) * multiple


def fills_of(tokens: Mapping[str, TokenConfig], output: ModelTokenizer, all_: Tokenizers) -> dict[int, RowFill]:
    """What the recipe says about tokens, by their id in the output.

    Raises:
        ConfigError: a model, token or row that is not there; no source for a token that some models lack.
    """
    problems, fills, members = Problems(), dict[int, RowFill](), range(len(all_.models.checkpoints))
    for token, settings in tokens.items():
        source, where = settings.source, f"tokenizer.tokens.{token}"
        if source is None:
            if lacking := [all_.models.ref(i) for i in members if all_.row(i, token) is None]:
                problems.config(f"{where}: not in {some(lacking)}: say with `source` what its embedding shall be there")
        elif source.kind == "zero":
            fills[output.vocabulary[token]] = RowFill(None, 0, settings.force)
        elif (row := _row(source, token, all_, where, problems)) is not None:
            fills[output.vocabulary[token]] = RowFill(*row, settings.force)
    problems.raise_any()
    return fills


def _row(source: Fill, token: str, all_: Tokenizers, where: str, problems: Problems) -> tuple[int, int] | None:
    """(model, its row) that a source names."""
    assert source.model is not None
    if source.model not in all_.models.index:
        hint = did_you_mean(source.model, all_.models.index)
        problems.config(f"{where}.source: {source.model!r} is none of the models of this merge{hint}")
        return None
    model = all_.models.index[source.model]
    limit = all_.rows[model]
    if source.token_id is not None:
        if source.token_id < limit:
            return model, source.token_id
        problems.config(
            f"{where}.source: token_id {source.token_id} is not in {source.model!r}, which has {limit} rows"
        )
        return None
    name = token if source.token is None else source.token
    if (row := all_.row(model, name)) is not None:
        return model, row
    if (beyond := all_.own[model].vocabulary.get(name)) is not None:
        problems.config(
            f"{where}.source: {source.model!r} has no row {beyond}, the id of {name!r}, but only {limit} rows"
        )
    else:
        hint = did_you_mean(name, all_.own[model].added)
        problems.config(f"{where}.source: {source.model!r} has no token {name!r}{hint}")
    return None


def _check_spelling(tokens: Mapping[str, TokenConfig], all_: Tokenizers) -> None:
    """A new token that is one of the models' special ones but for upper and lower case is a misspelling."""
    problems = Problems()
    known = {token for own in all_.own.values() for token in own.vocabulary}
    marks = {token.lower(): (token, i) for i, own in all_.own.items() for token in own.added}
    for token in tokens:
        if token not in known and token.lower() in marks:
            mark, model = marks[token.lower()]
            problems.config(
                f"tokenizer.tokens.{token}: no model has it, but {all_.models.ref(model)!r} has {mark!r}, and upper "
                "and lower case are different tokens"
            )
    problems.raise_any()
