"""Do two checkpoints mean the same by a token id? Answered from the files, without loading a tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solera_core.checkpoint import Checkpoint
from solera_core.errors import CheckpointError

__all__ = ["compare_tokenizers"]


def compare_tokenizers(trunk: Checkpoint, expert: Checkpoint, name: str) -> list[str]:
    """Warnings about an expert's tokenizer files against the trunk's; token ids that differ are an error.

    Raises:
        CheckpointError: naming the first tokens whose ids differ, or a tokenizer file that is not what it should be.
    """
    ours, theirs = _files(trunk), _files(expert)
    if not ours or not theirs:
        lacking = [who for who, files in (("the trunk", ours), (f"expert {name!r}", theirs)) if not files]
        return [f"{' and '.join(lacking)} has no tokenizer files, so equal token ids are assumed, not checked"]
    shared = "tokenizer.json" if {"tokenizer.json"} <= ours.keys() & theirs.keys() else None
    shared = shared or next((f for f in ("vocab.json", "tokenizer.model") if f in ours and f in theirs), None)
    if shared is None:
        return [
            f"expert {name!r} keeps its tokenizer in {', '.join(sorted(theirs))}, "
            f"the trunk in {', '.join(sorted(ours))}; equal token ids are assumed, not checked"
        ]
    if ours[shared].read_bytes() == theirs[shared].read_bytes():
        return _templates(trunk, expert, name)
    if shared == "tokenizer.model":
        raise CheckpointError(f"{theirs[shared]}: differs from the trunk's {ours[shared]}; {_WAY_OUT}")
    a, b = _vocabulary(ours[shared]), _vocabulary(theirs[shared])
    if a != b:
        different = sorted((token for token in a.keys() | b.keys() if a.get(token) != b.get(token)), key=repr)
        shown = ", ".join(f"{token!r} ({a.get(token)} and {b.get(token)})" for token in different[:3])
        raise CheckpointError(
            f"{theirs[shared]}: {len(different)} tokens have other ids than in the trunk's {ours[shared]}: {shown}"
            f"{', ...' if different[3:] else ''}; {_WAY_OUT}"
        )
    return [
        f"expert {name!r}: its {shared} has the trunk's token ids, but is not the same file (merges, normalisation or "
        "special tokens may differ); the trunk's is used",
        *_templates(trunk, expert, name),
    ]


_WAY_OUT = "experts must share the trunk's tokens: take specialists of one base, or give them its tokenizer first"


def _files(checkpoint: Checkpoint) -> dict[str, Path]:
    names = ("tokenizer.json", "vocab.json", "tokenizer.model")
    return {path.name: path for path in checkpoint.sidecars if path.name in names}


def _vocabulary(file: Path) -> dict[str, int]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "vocab.json":
            return dict(content)
        entries: Any = content["model"]["vocab"]
        # Unigram keeps a list of (token, score): the id is the place
        tokens = (
            dict(entries) if isinstance(entries, Mapping) else {entry[0]: place for place, entry in enumerate(entries)}
        )
        return tokens | {added["content"]: added["id"] for added in content.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise CheckpointError(f"{file}: is not a tokenizer file as transformers writes it: {e!r}") from e


def _templates(trunk: Checkpoint, expert: Checkpoint, name: str) -> list[str]:
    if _template(trunk) == _template(expert):
        return []
    return [f"expert {name!r} has another chat template than the trunk; the trunk's is used"]


def _template(checkpoint: Checkpoint) -> object:
    for path in checkpoint.sidecars:
        if path.name == "chat_template.jinja":
            return path.read_text(encoding="utf-8")
    for path in checkpoint.sidecars:
        if path.name == "tokenizer_config.json":
            try:
                return json.loads(path.read_text(encoding="utf-8")).get("chat_template")
            except (ValueError, AttributeError) as e:
                raise CheckpointError(f"{path}: is not a JSON object: {e}") from e
    return None
