"""The demo's text: three domains made from what every Python installation carries.

    code        sources of standard-library modules, cut at top-level definitions
    prose       the language reference in `pydoc_data.topics`
    arithmetic  generated sums with checkable answers

Each domain is split into `train`, `dev` (to steer by) and `test` (looked at once) by whole modules, whole topics and
whole problems, so that no test text, and no text of a test module, is ever trained on.
"""

import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["DOMAINS", "write_demo_data"]

DOMAINS = ("code", "prose", "arithmetic")
_SPLITS = ("train", "dev", "test")
_CHARS = {"train": 900_000, "dev": 40_000, "test": 60_000}
_N_SUMS = {"train": 8_800, "dev": 400, "test": 800}
_PIECE_CHARS = 400
_SHORTEST_CHARS = 120
_RUN_WORDS = 13  # as solera_eval.leaks looks for them
_SEED = 20261123  # of the generated problems


def write_demo_data(directory: Path) -> None:
    """Write `{code,prose,arithmetic}-{train,dev,test}.jsonl` and `sums-{dev,test}.jsonl`, always the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    for domain, pieces in (("code", _unleaked(_code())), ("prose", _unleaked(_prose()))):
        for split in _SPLITS:
            rows = [{"text": text, "domain": domain} for text in pieces[split]]
            _write(directory / f"{domain}-{split}.jsonl", rows)
    problems = _sums()
    for split in _SPLITS:
        _write(directory / f"arithmetic-{split}.jsonl", _arithmetic_rows(problems[split]))
    for split in ("dev", "test"):
        rows = [{"prompt": question, "answer": answer} for question, answer in problems[split]]
        _write(directory / f"sums-{split}.jsonl", rows)


def _arithmetic_rows(problems: list[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """One problem a row; the questions are random digits, so only the answers are learned and scored."""
    for question, answer in problems:
        yield {"prompt": question, "completion": f"{answer}\n", "domain": "arithmetic"}


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _unleaked(pieces: dict[str, list[str]]) -> dict[str, list[str]]:
    """Without held-out pieces that repeat 13 words in a row of training text: licences, topics quoting others."""
    trained: set[tuple[str, ...]] = set()
    for piece in pieces["train"]:
        trained.update(_runs(piece))
    return {
        split: texts if split == "train" else [t for t in texts if trained.isdisjoint(_runs(t))]
        for split, texts in pieces.items()
    }


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return zip(*(words[i:] for i in range(_RUN_WORDS)), strict=False)


def _split_of(name: str) -> str:
    """Where a module or topic belongs, by the hash of its name: stable, and blind to its content."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20
    return "dev" if bucket < 2 else "test" if bucket < 5 else "train"


def _code() -> dict[str, list[str]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = [p for p in sorted(library.glob("*.py")) if p.stem != "antigravity"]
    modules += sorted(
        p for package in ("asyncio", "email", "json", "logging", "unittest") for p in (library / package).glob("*.py")
    )
    texts = {str(p.relative_to(library)): p.read_text(encoding="utf-8", errors="ignore") for p in modules}
    return _cut(texts)


def _prose() -> dict[str, list[str]]:
    from pydoc_data import topics

    return _cut(dict(sorted(topics.topics.items())))


def _cut(texts: dict[str, str]) -> dict[str, list[str]]:
    """Pieces of about _PIECE_CHARS, cut at line ends, from the texts of each split up to its share of characters."""
    pieces: dict[str, list[str]] = {split: [] for split in _SPLITS}
    used: dict[str, int] = dict.fromkeys(_SPLITS, 0)
    seen: set[str] = set()
    for name in sorted(texts, key=lambda n: hashlib.sha256(n.encode()).hexdigest()):
        split = _split_of(name)
        for piece in _pieces(texts[name]):
            if used[split] < _CHARS[split] and piece not in seen:
                pieces[split].append(piece)
                seen.add(piece)
                used[split] += len(piece)
    return pieces


def _pieces(text: str) -> Iterator[str]:
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= _PIECE_CHARS:
            yield piece
            piece = ""
    if len(piece.strip()) >= _SHORTEST_CHARS:
        yield piece


def _sums() -> dict[str, list[tuple[str, str]]]:
    """Distinct problems, e.g. `47+85=` with `132`; the three splits share none."""
    problems = [(f"{a}+{b}=", str(a + b)) for a in range(100) for b in range(100)]
    random.Random(_SEED).shuffle(problems)  # noqa: S311  (an arrangement, not a secret)
    n_test, n_dev = _N_SUMS["test"], _N_SUMS["dev"]
    return {
        "test": problems[:n_test],
        "dev": problems[n_test : n_test + n_dev],
        "train": problems[n_test + n_dev :][: _N_SUMS["train"]],
    }
