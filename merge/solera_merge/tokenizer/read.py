"""A model's tokenizer: tokenizer.json as the tokenizers library reads it, with the tokens that its config adds."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from blake3 import blake3

from solera_core.checkpoint import Checkpoint
from solera_core.errors import CheckpointError
from solera_core.sidecars import tokenizer_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SPECIAL_TOKENS", "ModelTokenizer", "read_json", "read_tokenizer"]

SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys of tokenizer_config.json that name one token each."""

_SETTINGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")
_DAMAGED: Final = "it was damaged: download or copy it again"


@dataclass(frozen=True)
class ModelTokenizer:
    """What a tokenizer.json says.

    Attributes:
        file: tokenizer.json.
        content: its content, the tokens that tokenizer_config.json adds included.
        vocabulary: id of every token.
        added: settings (special, normalized, ...) of the tokens that are looked for before a text is split.
        digest: of what it was read from.
    """

    file: Path
    content: Mapping[str, Any]
    vocabulary: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    digest: str

    @property
    def byte_level(self) -> bool:
        """Whether tokens are spelt in the alphabet of bytes (GPT-2), where `é` is a byte and no letter."""
        parts = (self.content.get("pre_tokenizer"), self.content.get("decoder"))
        return any(kind == "ByteLevel" for part in parts for kind in _types(part))

    @property
    def pieces(self) -> set[str]:
        """The tokens that texts are split into, added ones left out."""
        return self.vocabulary.keys() - self.added.keys()

    def load(self) -> "Tokenizer":
        """Ready to split texts."""
        return load(self.content)


def load(content: Mapping[str, Any]) -> "Tokenizer":
    """The tokenizer of a content of tokenizer.json, which is known to be right; texts are never cut or padded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer(checkpoint: Checkpoint, known: dict[str, ModelTokenizer]) -> ModelTokenizer | None:
    """The tokenizer of a model; None where it has none at all.

    Args:
        checkpoint: the model.
        known: those that were read so far, by digest; equal files are read once.

    Raises:
        CheckpointError: it cannot be read, or there is none that the tokenizers library reads (tokenizer.json).
    """
    files = {file.name: file for file in checkpoint.sidecars}
    if "tokenizer.json" not in files:
        if found := tokenizer_files(files):
            raise CheckpointError(
                f"{checkpoint.path}: its tokenizer ({', '.join(sorted(found))}) has no tokenizer.json, so its tokens "
                "cannot be matched with others; write one: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        return None
    sources = [files[name] for name in ("tokenizer.json", "tokenizer_config.json") if name in files]
    digest = blake3(b"\0".join(_bytes(file) for file in sources)).hexdigest()
    if digest not in known:
        known[digest] = _read(files, digest)
    return known[digest]


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        CheckpointError: it doesn't.
    """
    try:
        content = json.loads(_bytes(file))
    except ValueError as e:
        raise CheckpointError(f"{file}: cannot be read as JSON: {e}; {_DAMAGED}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected an object, found {type(content).__name__}; {_DAMAGED}")
    return content


def _read(files: Mapping[str, Path], digest: str) -> ModelTokenizer:
    from tokenizers import Tokenizer

    file = files["tokenizer.json"]
    try:
        tokenizer = Tokenizer.from_str(_bytes(file).decode())
    except Exception as e:  # tokenizers raises bare Exception for what it does not take
        raise CheckpointError(f"{file}: cannot be read: {e}; {_DAMAGED}") from e
    if "tokenizer_config.json" in files:
        _add_configured(tokenizer, read_json(files["tokenizer_config.json"]))
    content = json.loads(tokenizer.to_str())
    added = {a["content"]: {k: a[k] for k in _SETTINGS} for a in content["added_tokens"]}
    return ModelTokenizer(file, content, tokenizer.get_vocab(with_added_tokens=True), added, digest)


def _add_configured(tokenizer: "Tokenizer", config: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json knows: transformers adds them behind the others when it loads."""
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    decoder = config.get("added_tokens_decoder")
    listed = sorted(decoder.items(), key=lambda item: int(item[0])) if isinstance(decoder, dict) else []
    for entry in [*(entry for _, entry in listed), *_named(config)]:
        token = entry if isinstance(entry, str) else entry.get("content")
        if not isinstance(token, str) or token in vocabulary:
            continue
        settings = {} if isinstance(entry, str) else {k: bool(entry[k]) for k in _SETTINGS[:4] if k in entry}
        special = isinstance(entry, str) or bool(entry.get("special", True))
        tokenizer.add_tokens([AddedToken(token, special=special, **{"normalized": not special, **settings})])
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)


def _named(config: Mapping[str, Any]) -> list[Any]:
    """Entries of tokenizer_config.json that are special tokens: a string, or a mapping with `content`."""
    found = [config.get(key) for key in SPECIAL_TOKENS]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or ()
        found += list(more.values() if isinstance(more, Mapping) else more)
    return [entry for entry in found if isinstance(entry, (str, dict))]


def _types(part: Any) -> Iterator[str]:
    """The types of a component of tokenizer.json and of all within it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for value in part.values():
            yield from _types(value)
    elif isinstance(part, list):
        for value in part:
            yield from _types(value)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e
