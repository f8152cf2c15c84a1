"""Whether a tokenizer can be read, and whether two give the same ids to the same tokens."""

import filecmp
import json
from dataclasses import dataclass
from pathlib import Path

from solera_core.checkpoint import Checkpoint
from solera_core.errors import CheckpointError

__all__ = ["Conflict", "check_tokenizer", "conflicting_ids"]


@dataclass(frozen=True)
class Conflict:
    """How far two vocabularies disagree.

    Attributes:
        files: the two tokenizer.json.
        common: ids that both use.
        count: of those, how many mean different tokens.
        example: (id, token here, token there) of the lowest such id.
    """

    files: tuple[Path, Path]
    common: int
    count: int
    example: tuple[int, str, str]


def conflicting_ids(a: Checkpoint, b: Checkpoint) -> Conflict | None:
    """Compare tokenizer.json of two models; None where one has none, or they are the same, byte for byte.

    Raises:
        CheckpointError: a tokenizer.json that cannot be read.
    """
    files = tuple(next((f for f in c.sidecars if f.name == "tokenizer.json"), None) for c in (a, b))
    if files[0] is None or files[1] is None:
        return None
    try:
        same = filecmp.cmp(files[0], files[1], shallow=False)
    except OSError as e:
        raise CheckpointError(f"{files[0]} and {files[1]}: cannot be read: {e.strerror}") from e
    if same:
        return None
    mine, theirs = _tokens(files[0]), _tokens(files[1])
    common = mine.keys() & theirs.keys()
    different = sorted(i for i in common if mine[i] != theirs[i])
    example = (different[0], mine[different[0]], theirs[different[0]]) if different else (0, "", "")
    return Conflict((files[0], files[1]), len(common), len(different), example)


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Refuse files around the tokenizer that are no JSON, or that the tokenizers library does not take.

    Raises:
        CheckpointError: naming the file.
    """
    from tokenizers import Tokenizer

    for file in checkpoint.sidecars:
        if file.suffix != ".json":
            continue
        try:
            json.loads(file.read_text(encoding="utf-8"))
            if file.name == "tokenizer.json":
                Tokenizer.from_file(str(file))
        except Exception as e:  # tokenizers raises bare Exception for what it does not take
            raise CheckpointError(f"{file}: cannot be read: {e}; {_DAMAGED}") from e


_DAMAGED = "it was damaged: download or copy it again"


def _tokens(file: Path) -> dict[int, str]:
    """Token by id."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            tokens = {int(i): str(token) for token, i in vocabulary.items()}
        else:  # unigram: a list of [token, score]
            tokens = {i: str(entry[0]) for i, entry in enumerate(vocabulary)}
        tokens |= {int(added["id"]): str(added["content"]) for added in content.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise CheckpointError(
            f"{file}: is not a tokenizer as the tokenizers library writes it: {e!r}; {_DAMAGED}"
        ) from e
    return tokens
