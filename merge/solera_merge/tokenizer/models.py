"""The tokenizers of the models of a merge, and whether they can be put together at all."""

from collections.abc import Mapping
from dataclasses import dataclass

from solera_core.architecture import vocab_size
from solera_core.checkpoint import Checkpoint
from solera_core.sidecars import tokenizer_files
from solera_merge.config import MergeConfig
from solera_merge.models import Models
from solera_merge.problems import Problems
from solera_merge.tokenizer.read import ModelTokenizer, read_tokenizer
from solera_merge.tokenizer.tensors import table_rows
from solera_merge.vocabulary import check_tokenizer

__all__ = ["Tokenizers", "donor_of", "has_tokenizer", "read_tokenizers"]


@dataclass(frozen=True)
class Tokenizers:
    """Of all models of a merge.

    Attributes:
        models: as opened.
        own: each model's tokenizer.
        rows: each model's embedding rows.
        donor: number of the model whose tokenizer the output's is made from. It may be none of the merge
            (`Models.tokenizer`): then it has as many rows as its config says, or its tokens need.
    """

    models: Models
    own: Mapping[int, ModelTokenizer]
    rows: Mapping[int, int]
    donor: int

    def row(self, model: int, token: str) -> int | None:
        """The row of a token; None where the model has none for it."""
        found = self.own[model].vocabulary.get(token)
        return found if found is not None and found < self.rows[model] else None


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether any file of a model holds a vocabulary."""
    return bool(tokenizer_files(file.name for file in checkpoint.sidecars))


def donor_of(config: MergeConfig, models: Models, problems: Problems) -> int | None:
    """Number of the model whose tokenizer the output's is, or is made from: by default the config's owner.

    None, and a problem noted, where it could not be opened, has no tokenizer while others have, or one that cannot be
    read; or where none has one, and the recipe asks for it.
    """
    wanted, known = config.wanted_tokenizer, len(problems.found)
    donor = models.owner
    if models.tokenizer is not None:
        donor = len(models.checkpoints)
    elif wanted is not None and wanted.source not in ("base", "union"):
        if wanted.source not in models.index:
            return None  # noted when the models were opened
        donor = models.index[wanted.source]
    checkpoint = models.at(donor)
    with problems.collected():
        check_tokenizer(checkpoint)
    owners = [c.ref for c in (*models.checkpoints, checkpoint) if has_tokenizer(c)]
    if owners and not has_tokenizer(checkpoint):
        problems.config(
            f"tokenizer_source: {checkpoint.ref!r} ({checkpoint.path}), whose tokenizer the output would get, has none"
            f"; set `tokenizer_source: {owners[0]}`"
            + (f" (or one of {', '.join(owners[1:])})" if owners[1:] else "")
            + ", or copy the tokenizer files into that directory"
        )
    elif not owners and (wanted is not None or config.chat_template is not None):
        asked = "tokenizer" if wanted is not None else "chat_template"
        problems.config(f"{asked}: none of the models has a tokenizer; remove it from the recipe")
    return donor if len(problems.found) == known else None


def read_tokenizers(models: Models, donor: int, warnings: list[str]) -> Tokenizers:
    """The tokenizers of all models. Adds to the warnings.

    Raises:
        CheckpointError: one cannot be read; a model has none, and its rows do not tell that it is the donor's; tokens
            are spelt in bytes here and in letters there.
    """
    problems, known = Problems(), dict[str, ModelTokenizer]()
    found: dict[int, ModelTokenizer | None] = {}
    checkpoints = [*models.checkpoints, *([] if models.tokenizer is None else [models.tokenizer])]
    for i, checkpoint in enumerate(checkpoints):
        with problems.collected():
            found[i] = read_tokenizer(checkpoint, known)
    problems.raise_any()
    first = found[donor]
    assert first is not None, "`donor_of` finds a model with a tokenizer"
    rows = {i: table_rows(checkpoint) for i, checkpoint in enumerate(models.checkpoints)}
    if models.tokenizer is not None:
        rows[donor] = max(vocab_size(models.tokenizer.config) or 0, max(first.vocabulary.values(), default=-1) + 1)
    for i, checkpoint in enumerate(checkpoints):
        if found[i] is None and rows[i] == rows[donor]:
            warnings.append(f"{checkpoint.path}: has no tokenizer; taken to have that of {models.ref(donor)!r}")
        elif found[i] is None:
            problems.checkpoint(
                f"{checkpoint.path}: has no tokenizer, and {rows[i]} embedding rows where {models.ref(donor)!r} has "
                f"{rows[donor]}: its tokens are unknown; copy its tokenizer files into that directory"
            )
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
