"""Text in: jsonl, plain text, parquet or a hub dataset, as documents with a domain and an identity.

A row is one of
    {"text": ...}                          all of it is learned and scored
    {"prompt": ..., "completion": ...}     only the completion is
    {"messages": [{"role", "content"}]}    the chat template is applied; only assistant turns are
and may carry `domain` (and anything else, which is ignored). A document's id is a hash of its content, so order,
file name and sharding never matter for pairing, caching or leak checks.
"""

import hashlib
import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from solera_core.errors import ConfigError, DataError
from solera_core.strict import Strict

__all__ = [
    "DataSource",
    "Document",
    "Encoded",
    "Messages",
    "Text",
    "check_source",
    "data_path",
    "domains_of",
    "encode",
    "path_bytes",
    "read_documents",
    "read_jsonl",
]


class DataSource(Strict):
    """One source of text. A bare string in a recipe means `{path: ...}`.

    Attributes:
        path: a `.jsonl`, `.json` (list of rows), `.txt`, `.md` or `.parquet` file, or a directory of such files,
            relative to the recipe; or `hub:org/name` for a hub dataset (needs the `datasets` extra).
        domain: overrides the rows' own `domain`.
        split: of a hub dataset.
        chunk_chars: plain text files are cut into documents of about this many characters, at line ends.
        skip: leave out this many documents at the start.
        limit: use at most this many documents after `skip`.
        column: the column that holds the text, where it is not `text`.
        weight: how often this source is seen relative to its size (training only).
    """

    path: str
    domain: str | None = None
    split: str = "train"
    chunk_chars: int = Field(default=2000, ge=1)
    skip: int = Field(default=0, ge=0)
    limit: int | None = Field(default=None, ge=1)
    column: str = "text"
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _bare_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class Text:
    """Prompt (context only) and completion (learned and scored); plain text has an empty prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Messages:
    """A chat, to be rendered by the tokenizer's own template."""

    turns: tuple[tuple[str, str], ...]  # (role, content)


@dataclass(frozen=True)
class Document:
    """One piece of text with its domain and content hash; `where` is `file:line`, for messages."""

    id: str
    domain: str | None
    content: Text | Messages
    where: str = field(default="", compare=False)

    @property
    def n_bytes(self) -> int:
        """UTF-8 length of what is scored; the denominator of bits per byte. A chat counts its assistant turns."""
        if isinstance(self.content, Text):
            return len(self.content.completion.encode())
        return sum(len(text.encode()) for role, text in self.content.turns if role == "assistant")


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document; `targets[t]` says whether ids[t] is to be learned (predicted from ids[:t])."""

    ids: tuple[int, ...]
    targets: tuple[bool, ...]


def data_path(source: DataSource, base_dir: Path) -> Path | None:
    """The file or directory of a source on this machine; None for a hub dataset."""
    return None if source.path.startswith("hub:") else base_dir / Path(source.path).expanduser()


def path_bytes(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    files = [p for p in path.iterdir() if p.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def read_documents(
    sources: DataSource | Sequence[DataSource], *, base_dir: Path, require_domain: bool = False
) -> list[Document]:
    """Read all documents of the sources, in order; exact duplicates are kept.

    Raises:
        DataError: naming file and line: missing file, malformed row, empty text, no documents, or (with
            `require_domain`) a document without a domain.
    """
    documents: list[Document] = []
    for source in [sources] if isinstance(sources, DataSource) else sources:
        found: list[Document] = []
        with closing(_rows(source, base_dir)) as rows:  # an error would keep the file open while it is handled
            for where, row in rows:
                found.append(_document(row, source, where))
                if source.limit is not None and len(found) >= source.skip + source.limit:
                    break
        found = found[source.skip :]
        if not found:
            raise DataError(f"{source.path}: no documents{f' after skipping {source.skip}' if source.skip else ''}")
        if require_domain and (bare := next((d for d in found if d.domain is None), None)):
            raise DataError(f"{bare.where}: has no domain; add `domain:` to the source or a `domain` column")
        documents += found
    return documents


def domains_of(documents: Iterable[Document]) -> list[str]:
    """The domains present, in order of first appearance."""
    return list(dict.fromkeys(d.domain for d in documents if d.domain is not None))


def encode(document: Document, tokenizer: Any, *, add_eos: bool) -> Encoded:
    """Token ids of a document as the model should see them.

    Plain text and prompt+completion: the tokenizer's own leading special tokens (BOS where it adds one), prompt,
    completion, and EOS when `add_eos` and the tokenizer has one. Prompt and completion are tokenized apart so that the
    boundary never moves with the completion. Chats: the chat template; assistant turns (with their end marker) are
    targets, and so is a token that begins before such a turn and ends in it.

    Raises:
        DataError: a chat, and no chat template, one that rewrites earlier turns, or a tokenizer without offsets.
    """
    eos = tokenizer.eos_token_id
    if isinstance(document.content, Text):
        prompt, completion = document.content.prompt, document.content.completion
        head = list(tokenizer(prompt).input_ids) if prompt else _leading_special(tokenizer)
        if eos is not None and head and head[-1] == eos and eos != tokenizer.bos_token_id:
            head.pop()  # tokenizers that append EOS: it belongs after the completion
        tail = list(tokenizer(completion, add_special_tokens=False).input_ids)
        learned = tail + ([eos] if add_eos and eos is not None else [])
        return Encoded(tuple(head + learned), (False,) * len(head) + (True,) * len(learned))
    where = document.where or f"document {document.id}"
    name = f" of {tokenizer.name_or_path}" if getattr(tokenizer, "name_or_path", None) else ""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: is a chat, but the tokenizer{name} has no chat template; add a chat_template.jinja to the "
            "model, or use `prompt` and `completion` rows"
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"{where}: is a chat, but the tokenizer{name} ({type(tokenizer).__name__}) cannot say which "
            "characters a token covers; use one with a tokenizer.json, or `prompt` and `completion` rows"
        )
    turns = [{"role": role, "content": content} for role, content in document.content.turns]
    text, spans = "", list[tuple[int, int]]()
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, turns[:i], generation_prompt=True)
        after = _render(tokenizer, turns[: i + 1], generation_prompt=False)
        if not after.startswith(before) or not before.startswith(text):
            raise DataError(
                f"{where}: the chat template of the tokenizer{name} rewrites earlier turns, so what belongs to the "
                "assistant cannot be told; use `prompt` and `completion` rows instead"
            )
        spans.append((len(before), len(after)))
        text = after
    # Characters, not tokens, tell the turns apart: a token may reach over the boundary (" four" after "ASSISTANT: ").
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)  # the template writes BOS itself
    targets = tuple(any(a < end and b > start for start, end in spans) for a, b in encoded.offset_mapping)
    return Encoded(tuple(encoded.input_ids), targets)


def _render(tokenizer: Any, turns: list[dict[str, str]], *, generation_prompt: bool) -> str:
    if not turns:
        return ""
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))


def _leading_special(tokenizer: Any) -> list[int]:
    with_special = list(tokenizer("a").input_ids)
    return with_special[:1] if with_special and with_special[0] == tokenizer.bos_token_id else []


def _document(row: Mapping[str, Any], source: DataSource, where: str) -> Document:
    domain = source.domain if source.domain is not None else row.get("domain")
    if domain is not None and not isinstance(domain, str):
        raise DataError(f"{where}: `domain` must be a string, found {domain!r}")
    content: Text | Messages
    if "messages" in row:
        content = _messages(row["messages"], where)
    elif "completion" in row:
        content = Text(_string(row, "prompt", where, empty=True), _string(row, "completion", where))
    elif source.column in row:
        content = Text("", _string(row, source.column, where))
    else:
        raise DataError(
            f"{where}: needs `{source.column}`, or `prompt` and `completion`, or `messages`; "
            f"found {', '.join(row) or 'nothing'}"
        )
    canonical = json.dumps(
        content.turns if isinstance(content, Messages) else [content.prompt, content.completion], ensure_ascii=True
    )
    return Document(hashlib.sha256(canonical.encode()).hexdigest()[:16], domain, content, where)


def _string(row: Mapping[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = row.get(key, "" if empty else None)
    if not isinstance(value, str):
        raise DataError(f"{where}: `{key}` must be a string, found {value!r}")
    if not empty and not value.strip():
        raise DataError(f"{where}: `{key}` is empty")
    return value


def _messages(value: Any, where: str) -> Messages:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: `messages` must be a non-empty list of {{role, content}}")
    turns: list[tuple[str, str]] = []
    for turn in value:
        if (
            not isinstance(turn, Mapping)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise DataError(f"{where}: every message needs a string `role` and `content`, found {turn!r}")
        turns.append((turn["role"], turn["content"]))
    if not any(role == "assistant" for role, _ in turns):
        raise DataError(f"{where}: no assistant turn, so there is nothing to learn or score")
    return Messages(tuple(turns))


def _rows(source: DataSource, base_dir: Path) -> Generator[tuple[str, Mapping[str, Any]], None, None]:
    path = data_path(source, base_dir)
    if path is None:
        yield from _hub_rows(source)
        return
    for file in _files(path):
        yield from _READERS[file.suffix](file, source)


def check_source(source: DataSource, *, base_dir: Path) -> None:
    """Refuse a source whose files are not there or of no known kind; reads none, and asks no hub.

    Raises:
        DataError: naming the path.
    """
    path = data_path(source, base_dir)
    if path is not None:
        _files(path)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _READERS)
        if not files:
            raise DataError(f"{path}: no {', '.join(_READERS)} files in this directory")
        return files
    if not path.exists():
        raise DataError(f"{path}: no such file (data paths are relative to the recipe)")
    if path.suffix not in _READERS:
        raise DataError(f"{path}: unknown kind of file; expected {', '.join(_READERS)}")
    return [path]


def _jsonl(file: Path, source: DataSource) -> Iterator[tuple[str, Mapping[str, Any]]]:
    del source
    return read_jsonl(file)


def read_jsonl(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(`file:line`, row) of every row of a jsonl file; empty lines are skipped.

    Raises:
        DataError: the file is missing or unreadable, or a line is no JSON object.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as e:
                    raise DataError(f"{where}: not valid JSON: {e}") from e
                if not isinstance(row, Mapping):
                    raise DataError(f"{where}: expected an object, found {type(row).__name__}")
                if "\\u" in line:
                    _refuse_lone_surrogates(row, where)
                yield where, row
    except FileNotFoundError as e:
        raise DataError(f"{file}: no such file") from e
    except OSError as e:
        raise DataError(f"{file}: cannot be read as text: {e}") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: not UTF-8: {e}") from e


def _refuse_lone_surrogates(row: Any, where: str) -> None:
    """JSON can write half of a surrogate pair; no tokenizer takes it, and no UTF-8 file can hold it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        half = e.object[e.start]
        raise DataError(
            f"{where}: holds half of a surrogate pair ({half!r}), which is no character; the text was cut or damaged "
            "when it was written: replace it (U+FFFD) or leave the row out"
        ) from e


def _json(file: Path, source: DataSource) -> Iterator[tuple[str, Mapping[str, Any]]]:
    del source
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise DataError(f"{file}: not valid JSON: {e}") from e
    except OSError as e:
        raise DataError(f"{file}: cannot be read as text: {e}") from e
    if not isinstance(rows, list):
        raise DataError(f"{file}: expected a list of rows, found {type(rows).__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{file}[{number}]: expected an object, found {type(row).__name__}")
        _refuse_lone_surrogates(row, f"{file}[{number}]")
        yield f"{file}[{number}]", row


def _plain(file: Path, source: DataSource) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: not UTF-8: {e}") from e
    except OSError as e:
        raise DataError(f"{file}: cannot be read as text: {e}") from e
    chunk: list[str] = []
    size, first = 0, 1
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        chunk.append(line)
        size += len(line)
        if size >= source.chunk_chars:
            if "".join(chunk).strip():
                yield f"{file}:{first}", {source.column: "".join(chunk)}
            chunk, size, first = [], 0, number + 1
    if "".join(chunk).strip():
        yield f"{file}:{first}", {source.column: "".join(chunk)}


def _parquet(file: Path, source: DataSource) -> Iterator[tuple[str, Mapping[str, Any]]]:
    del source
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise ConfigError(f"{file}: reading parquet needs the `data` extra: pip install 'solera[data]'") from e
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                yield f"{file}[{number}]", {k: v for k, v in row.items() if v is not None}
                number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataError(f"{file}: cannot be read as parquet (row {number}): {e}") from e


def _hub_rows(source: DataSource) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as e:
        raise ConfigError(f"{source.path}: hub datasets need the `data` extra: pip install 'solera[data]'") from e
    name = source.path.removeprefix("hub:")
    try:
        rows = datasets.load_dataset(name, split=source.split, streaming=True)
        for number, row in enumerate(rows):
            yield f"{source.path}[{number}]", row
    except (OSError, ValueError) as e:
        raise DataError(f"{source.path}: cannot be loaded (split {source.split!r}): {e}") from e


_READERS = {".jsonl": _jsonl, ".json": _json, ".txt": _plain, ".md": _plain, ".parquet": _parquet}
