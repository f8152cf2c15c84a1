"""The tokenizer of the output: one model's, cut to the rows that exist, and with more tokens behind its own.

The ids of the tokens that are there never change, and texts are split as that tokenizer splits them:

* ordinary tokens of other models (`pieces`) become part of its vocabulary, but of no merge rule, so that they have an
  id and an embedding, and hardly any text is split into them. (mergekit makes them added tokens, which are looked for
  in every text before it is split: an `ing` of another model then cuts every word that has it.)
* added tokens of other models are looked for, as in those models: chat marks and the like. Not so those that are no
  special tokens, of a model that splits texts differently anyway (the runs of spaces of GPT-NeoX): they would only
  change how the others' texts are split.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from solera_core.errors import CheckpointError
from solera_merge.problems import some
from solera_merge.tokenizer.read import ModelTokenizer, load

__all__ = ["PLAIN", "cut", "extended", "union_tokens"]

PLAIN: Final[Mapping[str, Any]] = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}
"""Settings of a token that a recipe adds."""

_NEVER: Final = -1000.0  # log-likelihood below all others: a unigram model takes such a piece where nothing else fits


def union_tokens(
    donor: ModelTokenizer, others: Sequence[ModelTokenizer], rows: Sequence[int]
) -> tuple[list[str], dict[str, Mapping[str, Any]], list[str]]:
    """What a union adds to the donor's tokens: (pieces, added tokens with their settings, warnings).

    In mergekit's order: pieces first, then added tokens; in each the models in order, and each model's by id. Of a
    token that several models add with different settings, the first wins. Tokens without a row are left out.

    Args:
        donor: whose ids stay.
        others: the other models' tokenizers.
        rows: how many embedding rows each of them has.
    """
    pieces: dict[str, None] = {}
    added: dict[str, Mapping[str, Any]] = {}
    warnings: list[str] = []
    for other, limit in zip(others, rows, strict=True):
        splits_alike = other.pieces <= donor.vocabulary.keys()
        for token, i in sorted(other.vocabulary.items(), key=lambda item: item[1]):
            if i >= limit:
                continue
            settings = other.added.get(token)
            if settings is None or not (settings["special"] or splits_alike):
                if token not in donor.vocabulary:
                    pieces[token] = None
            elif (first := donor.added.get(token, added.get(token))) is None:
                added[token] = settings
            elif first != settings:
                warnings.append(f"{other.file}: token {token!r} has other settings than elsewhere; the first are used")
    return [token for token in pieces if token not in added], added, warnings


def cut(donor: ModelTokenizer, rows: int) -> tuple[ModelTokenizer, list[str]]:
    """The tokenizer without the tokens that have no embedding row, and those tokens.

    Raises:
        CheckpointError: it can't do without them.
    """
    beyond = [token for token, i in donor.vocabulary.items() if i >= rows]
    if not beyond:
        return donor, []
    gone = set(beyond)
    content = copy.deepcopy(dict(donor.content))
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in gone}
    else:
        model["vocab"] = model["vocab"][:rows]
    if "merges" in model:
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if not gone & {*pair, "".join(pair)}]
    content["added_tokens"] = [a for a in content["added_tokens"] if a["content"] not in gone]
    kept = {token: i for token, i in donor.vocabulary.items() if token not in gone}
    _require(content, kept, donor, f"its tokens {some(sorted(beyond))} have no embedding row ({rows} rows)")
    added = {token: settings for token, settings in donor.added.items() if token not in gone}
    return ModelTokenizer(donor.file, content, kept, added, f"{donor.digest}:{rows}"), beyond


def extended(donor: ModelTokenizer, pieces: Sequence[str], added: Mapping[str, Mapping[str, Any]]) -> ModelTokenizer:
    """The tokenizer with more tokens, numbered from behind its last id; ids that are there stay.

    Args:
        donor: the tokenizer.
        pieces: ordinary tokens, none of them in it.
        added: added tokens with their settings; one that is an ordinary token of the donor keeps its id.

    Raises:
        CheckpointError: this kind of tokenizer takes no more ordinary tokens.
    """
    if not pieces and not added:
        return donor
    vocabulary = dict(donor.vocabulary)
    behind = max(vocabulary.values(), default=-1) + 1
    for token in (*pieces, *added):
        if token not in vocabulary:
            vocabulary[token] = behind
            behind += 1
    content = copy.deepcopy(dict(donor.content))
    if pieces:
        _insert(content["model"], donor, pieces, vocabulary)
    entries = [{"id": vocabulary[token], "content": token, **settings} for token, settings in added.items()]
    content["added_tokens"] = sorted([*content["added_tokens"], *entries], key=lambda entry: int(entry["id"]))
    _require(content, vocabulary, donor, "more tokens cannot be numbered behind its own")
    return ModelTokenizer(donor.file, content, vocabulary, {**donor.added, **added}, f"{donor.digest}+")


def _insert(model: dict[str, Any], donor: ModelTokenizer, pieces: Iterable[str], ids: Mapping[str, int]) -> None:
    """Pieces become part of the vocabulary, and with them the added tokens, so that ids have no holes."""
    kind = model.get("type")
    if kind == "BPE":
        model["vocab"] = {**model["vocab"], **donor_added(donor), **{token: ids[token] for token in pieces}}
    elif kind == "Unigram":
        listed = {entry[0] for entry in model["vocab"]}
        least = min((entry[1] for entry in model["vocab"]), default=0.0)
        more = {token: i for token, i in donor_added(donor).items() if token not in listed}
        more |= {token: ids[token] for token in pieces}
        model["vocab"] += [[token, least + _NEVER] for token in sorted(more, key=more.__getitem__)]
    else:
        raise CheckpointError(
            f"{donor.file}: a {kind} tokenizer splits texts by its vocabulary alone, so the {len(list(pieces))} "
            "ordinary tokens of other models cannot be added to it; set tokenizer_source to one of the models"
        )


def donor_added(donor: ModelTokenizer) -> dict[str, int]:
    """Ids of the added tokens."""
    return {token: donor.vocabulary[token] for token in donor.added}


def _require(content: Mapping[str, Any], vocabulary: Mapping[str, int], donor: ModelTokenizer, what: str) -> None:
    """Whether the tokenizers library reads the new tokenizer as it is meant."""
    way_out = "set tokenizer_source to another model"
    try:
        found = load(content).get_vocab(with_added_tokens=True)
    except Exception as e:  # tokenizers raises bare Exception
        raise CheckpointError(f"{donor.file}: {what}, and it cannot be read otherwise: {e}; {way_out}") from e
    if found != vocabulary:
        raise CheckpointError(f"{donor.file}: {what}: its ids would change; {way_out}")
