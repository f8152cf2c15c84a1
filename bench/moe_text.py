"""Real text of three domains, in parts that share no document: Python source, arithmetic problems, plays.

    code   sources of the standard library (solera.demo_data)      math   GSM8K, question and answer
    plays  the Shakespeare file of char-rnn

`train` is what specialists, and the mixture that is healed, learn from; `calibration` is what routers are fitted on and
trunks and scales are chosen by; `test` is read by the table alone. `wiki` is a fourth kind that only a base learns.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from solera.demo_data import write_demo_data
from solera_core.data import DataSource, Text, read_documents

__all__ = ["DOMAINS", "PARTS", "prompts", "write_text"]

DOMAINS = ("code", "math", "plays")
PARTS = ("train", "calibration", "test")
_CALIBRATION_CHARS = 130_000
_TEST_CHARS = 30_000
_PROMPT_CHARS = 200


def write_text(shared: Path, directory: Path) -> None:
    """Write `{code,math,plays}-{train,calibration,test}.jsonl` and `wiki-train.jsonl`, always the same bytes.

    Args:
        shared: a folder with text/tinyshakespeare.txt, text/wikitext2-valid.txt and tasks/gsm8k-{train,test}.jsonl.
        directory: where to; nothing is done where the last file of it is there.
    """
    if (directory / "wiki-train.jsonl").exists():
        return
    write_demo_data(directory / "demo")
    code = {part: _rows(directory / "demo" / f"code-{part}.jsonl") for part in ("train", "test")}
    _split(directory, "code", code["train"], code["test"])
    math = {part: _problems(shared / "tasks" / f"gsm8k-{part}.jsonl") for part in ("train", "test")}
    _split(directory, "math", math["train"], math["test"])
    plays = _documents(shared / "text" / "tinyshakespeare.txt")
    _split(directory, "plays", plays[60:], plays[:60])
    _write(directory / "wiki-train.jsonl", _documents(shared / "text" / "wikitext2-valid.txt"))


def prompts(directory: Path, domain: str, *, count: int = 8) -> list[str]:
    """The beginnings of calibration documents, for routers made of prompts: ours and mergekit-moe's get the same."""
    rows = _rows(directory / f"{domain}-calibration.jsonl")
    return [row[:_PROMPT_CHARS] for row in rows[:: max(len(rows) // count, 1)][:count]]


def _split(directory: Path, domain: str, rows: Sequence[str], test: Sequence[str]) -> None:
    """Calibration is every k-th document, so that it is drawn from the whole."""
    stride = max(sum(map(len, rows)) // _CALIBRATION_CHARS, 2)
    _write(directory / f"{domain}-calibration.jsonl", rows[::stride])
    _write(directory / f"{domain}-train.jsonl", (row for i, row in enumerate(rows) if i % stride))
    _write(directory / f"{domain}-test.jsonl", _first(test, _TEST_CHARS))


def _first(rows: Sequence[str], chars: int) -> Iterable[str]:
    taken = 0
    for row in rows:
        if taken >= chars:
            return
        taken += len(row)
        yield row


def _documents(file: Path) -> list[str]:
    source = DataSource(path=str(file), chunk_chars=1000)
    found = (document.content for document in read_documents([source], base_dir=Path()))
    return [content.completion for content in found if isinstance(content, Text)]


def _problems(file: Path) -> list[str]:
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [f"{row['question']}\n{row['answer']}\n" for row in rows]


def _rows(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def _write(file: Path, rows: Iterable[str]) -> None:
    file.write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
