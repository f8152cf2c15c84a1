"""What must not leave the machine: keys, tokens, private key blocks, paths of home directories.

Text files are scanned line by line, weights only in their safetensors header (the metadata there is free text).
The finding names file, line and kind, never the secret.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Leak", "scan_bytes", "scan_file"]

_HEADER_LIMIT: Final = 100_000_000  # safetensors' own limit for a header

_KEYS: Final = (
    ("Hugging Face token", re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}\b")),
    ("AWS access key", re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("AWS secret key", re.compile(r"(?i)aws_?secret_?(?:access_?)?key[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}")),
    ("private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----")),
    ("GitHub token", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})\b")),
    ("API key", re.compile(r"\b(?:sk-[A-Za-z0-9_-]{32,}|AIza[0-9A-Za-z_-]{35}|xox[abprs]-[0-9A-Za-z-]{20,})")),
    ("password in a URL", re.compile(r"\b[a-z][a-z0-9+.-]*://[^/\s:@'\"]{1,64}:[^/\s:@'\"]{3,}@")),
)
_HOMES: Final = (
    (
        "home directory",
        re.compile(r"(?<![\w.])/(?:home|Users)/[A-Za-z0-9._-]+|(?<![\w.])/root/[\w.-]|\b[A-Za-z]:\\+Users\\+\w"),
    ),
)
# Vocabularies are other people's text, cut into pieces: paths in them say nothing about this machine.
_VOCABULARIES: Final = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tekken.json"}


@dataclass(frozen=True)
class Leak:
    """One finding: where, and what kind of thing."""

    file: str
    line: int
    kind: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}"


def scan_file(path: Path, name: str) -> list[Leak]:
    """Findings in one file; `name` is how it is called in the findings."""
    if path.suffix == ".safetensors":
        return scan_bytes(_header(path), name)
    return scan_bytes(path.read_bytes(), name)


def scan_bytes(content: bytes, name: str) -> list[Leak]:
    """Findings in a text given as bytes; what is not UTF-8 is read as far as it is."""
    patterns = _KEYS if Path(name).name in _VOCABULARIES else (*_KEYS, *_HOMES)
    lines = content.decode("utf-8", errors="replace").split("\n")
    return list(_findings(lines, name, patterns))


def _findings(lines: Iterable[str], name: str, patterns: tuple[tuple[str, re.Pattern[str]], ...]) -> Iterable[Leak]:
    for number, line in enumerate(lines, start=1):
        for kind, pattern in patterns:
            if pattern.search(line):
                yield Leak(name, number, kind)


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, _HEADER_LIMIT))
