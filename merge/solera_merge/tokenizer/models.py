"""The tokenizers of the models of a merge, and whether they can be put together at all."""

from collections.abc import Mapping
from dataclasses import dataclass

from solera_core.errors import ConfigError, InputError
from solera_core.strict import did_you_mean
from solera_merge.models import Models
from solera_merge.problems import Problems
from solera_merge.tokenizer.read import ModelTokenizer, read_tokenizer
from solera_merge.tokenizer.tensors import table_rows, vocabulary_tensors

__all__ = ["Tokenizers", "donor_of", "read_tokenizers"]


@dataclass(frozen=True)
class Tokenizers:
    """Of all models of a merge.

    Attributes:
        models: as opened.
        own: each model's tokenizer.
        rows: each model's embedding rows.
        donor: number of the model whose tokenizer the output's is made from.
    """

    models: Models
    own: Mapping[int, ModelTokenizer]
    rows: Mapping[int, int]
    donor: int

    def row(self, model: int, token: str) -> int | None:
        """The row of a token; None where the model has none for it."""
        found = self.own[model].vocabulary.get(token)
        return found if found is not None and found < self.rows[model] else None


def donor_of(source: str | None, models: Models, where: str) -> int:
    """Number of the model whose tokenizer a `source` means: of `union` and `base`, and where none is given, the owner.

    `where` is the key of the recipe that holds it.

    Raises:
        ConfigError: it is none of the models.
    """
    if source in (None, "base", "union"):
        return models.owner
    assert source is not None
    if source not in models.index:
        hint = did_you_mean(source, ["union", "base", *models.index])
        raise ConfigError(f"{where}: {source!r} is none of the models of this merge{hint}")
    return models.index[source]


def read_tokenizers(models: Models, donor: int, warnings: list[str]) -> Tokenizers | None:
    """The tokenizers of all models; None where the donor has none. Adds to the warnings.

    Raises:
        CheckpointError: one cannot be read; a model has none, and its rows do not tell that it is the donor's; tokens
            are spelt in bytes here and in letters there; a table has rows for some of the tokens only.
    """
    problems, known = Problems(), dict[str, ModelTokenizer]()
    found: dict[int, ModelTokenizer | None] = {}
    for i, checkpoint in enumerate(models.checkpoints):
        try:
            found[i] = read_tokenizer(checkpoint, known)
        except InputError as e:
            problems.add(e)
    problems.raise_any()
    if (first := found[donor]) is None:
        return None
    rows = {i: table_rows(checkpoint) for i, checkpoint in enumerate(models.checkpoints)}
    for i, checkpoint in enumerate(models.checkpoints):
        if found[i] is None and rows[i] == rows[donor]:
            warnings.append(f"{checkpoint.path}: has no tokenizer; taken to have that of {models.ref(donor)!r}")
        elif found[i] is None:
            problems.checkpoint(
                f"{checkpoint.path}: has no tokenizer, and {rows[i]} embedding rows where {models.ref(donor)!r} has "
                f"{rows[donor]}: its tokens are unknown; copy its tokenizer files into that directory"
            )
        for name, info in checkpoint.tensors.items():
            if "embed_tokens_per_layer" in name and info.shape[:1] != (rows[i],):
                problems.checkpoint(
                    f"{info.file}: {name!r} {info.shape} has a row for some of the tokens only, so it cannot be moved "
                    "to another vocabulary; leave the tokenizer out (all models must have the same tokens then)"
                )
            elif name in vocabulary_tensors(checkpoint) and info.shape[0] != rows[i]:
                problems.checkpoint(f"{info.file}: {name!r} is {info.shape}, but the embedding has {rows[i]} rows")
    own = {i: first if tokenizer is None else tokenizer for i, tokenizer in found.items()}
    for tokenizer in own.values():
        if tokenizer.byte_level != first.byte_level:
            byte, other = (tokenizer, first) if tokenizer.byte_level else (first, tokenizer)
            problems.checkpoint(
                f"{byte.file} and {other.file}: the first spells tokens in bytes (as GPT-2 does), the second in "
                "letters (as SentencePiece does): equal spellings mean different texts, so rows of different words "
                "would be mixed. Give the models one tokenizer before they are merged"
            )
    problems.raise_any()
    return Tokenizers(models, own, rows, donor)
