"""The files beside config and weights that make a checkpoint usable: tokenizer, templates, generation, processor."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from solera_core.errors import CheckpointError

__all__ = ["PATTERNS", "TOKENIZER_FILES", "copy_sidecars", "find_sidecars", "tokenizer_files"]

_NAMES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    # processors: transformers 5 writes one file, earlier versions wrote one for each modality
    "processor_config.json",
    "preprocessor_config.json",
    "image_preprocessor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
)
_SUFFIXES: Final = (".tiktoken",)
_TEMPLATE_FOLDERS: Final = ("additional_chat_templates",)

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
)
"""Files that hold a vocabulary: with one of these, or a `.tiktoken`, a checkpoint has a tokenizer."""

PATTERNS: Final = (*_NAMES, *(f"*{s}" for s in _SUFFIXES), *(f"{folder}/*.jinja" for folder in _TEMPLATE_FOLDERS))
"""What a sidecar may be called, as patterns of paths relative to the checkpoint."""


def find_sidecars(directory: Path, *, code: bool = False) -> list[Path]:
    """The sidecar files present in `directory`, sorted; with `code` the Python files too (trusted remote code)."""
    found = [
        p
        for p in directory.iterdir()
        if p.is_file() and (p.name in _NAMES or p.suffix in _SUFFIXES or (code and p.suffix == ".py"))
    ]
    for folder in _TEMPLATE_FOLDERS:
        found += [p for p in (directory / folder).glob("*.jinja") if p.is_file()]
    return sorted(found)


def tokenizer_files(names: Iterable[str]) -> list[str]:
    """Those of the file names that hold a vocabulary; none: there is no tokenizer."""
    return [name for name in names if name in TOKENIZER_FILES or name.endswith(_SUFFIXES)]


def copy_sidecars(sidecars: Iterable[Path], directory: Path) -> None:
    """Copy sidecar files into `directory`, byte for byte (template folders keep their name).

    Raises:
        CheckpointError: one cannot be read.
    """
    for file in sidecars:
        folder = directory / file.parent.name if file.parent.name in _TEMPLATE_FOLDERS else directory
        folder.mkdir(exist_ok=True)
        try:
            content = file.read_bytes()  # not shutil.copyfile: its errors do not tell the input from the output
        except OSError as e:
            raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e
        (folder / file.name).write_bytes(content)
