"""Documents: every format, every mistake with file and line, and token ids with the right targets."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_core.causal_lm import load_tokenizer
from solera_core.data import DataSource, Document, Messages, Text, domains_of, encode, read_documents
from solera_core.errors import DataError

WriteJsonl = Callable[[Path, list[dict[str, Any]]], Path]

ROWS: list[dict[str, Any]] = [
    {"text": "one two", "domain": "a"},
    {"prompt": "2+2=", "completion": "4", "ignored": 1},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "höi"}], "domain": "b"},
]


def read(path: Path, **options: Any) -> list[Document]:
    return read_documents(DataSource(path=path.name, **options), base_dir=path.parent)


def test_the_three_kinds_of_rows(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    a, b, c = read(write_jsonl(tmp_path / "d.jsonl", ROWS))
    assert (a.content, a.domain, a.n_bytes) == (Text("", "one two"), "a", 7)
    assert (b.content, b.domain, b.n_bytes) == (Text("2+2=", "4"), None, 1)
    assert (c.content, c.n_bytes) == (Messages((("user", "hi"), ("assistant", "höi"))), 4)
    assert domains_of([c, a, b, a]) == ["b", "a"]
    assert len({a.id, b.id, c.id}) == 3


def test_the_id_is_of_the_content(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    first = read(write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "domain": "p"}]))[0]
    again = read(write_jsonl(tmp_path / "b.jsonl", [{"text": "y"}, {"note": 1, "text": "x"}]))
    assert first.id == again[1].id != again[0].id
    assert read(write_jsonl(tmp_path / "c.jsonl", [{"prompt": "x", "completion": "x"}]))[0].id != first.id


def test_formats_agree(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = read(write_jsonl(tmp_path / "d.jsonl", ROWS))
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    assert read(tmp_path / "d.json") == expected
    columns = dict.fromkeys(["text", "prompt", "completion", "messages", "domain"])
    pq.write_table(pa.Table.from_pylist([columns | row for row in ROWS]), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == expected


def test_plain_text_is_cut_at_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(10)))
    documents = read(tmp_path / "a.txt", chunk_chars=20, domain="prose")
    texts = [d.content.completion for d in documents if isinstance(d.content, Text)]
    assert "".join(texts) == (tmp_path / "a.txt").read_text()
    assert texts[0] == "line 0\nline 1\nline 2\n"
    assert {d.domain for d in documents} == {"prose"}


def test_directories_are_read_in_order(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    write_jsonl(tmp_path / "data" / "b.jsonl", [{"text": "second"}])
    (tmp_path / "data" / "a.txt").write_text("first")
    (tmp_path / "data" / "notes.pdf").write_text("not read")
    assert [d.content for d in read(tmp_path / "data")] == [Text("", "first"), Text("", "second")]


def test_skip_limit_column_and_domain(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [{"question": str(i), "domain": "x"} for i in range(9)])
    found = read(file, column="question", skip=2, limit=3, domain="y")
    assert [d.content for d in found] == [Text("", "2"), Text("", "3"), Text("", "4")]
    assert {d.domain for d in found} == {"y"}
    with pytest.raises(DataError, match="no documents after skipping 9"):
        read(file, column="question", skip=9)


WRONG: list[tuple[str, str]] = [
    ('{"text": "a"}\n{"text": \n', r"d\.jsonl:2: not valid JSON"),
    ("[1]\n", r"d\.jsonl:1: expected an object, found list"),
    ('{"txt": "a"}\n', r"d\.jsonl:1: needs `text`, or .*; found txt"),
    ('{"text": 3}\n', r"d\.jsonl:1: `text` must be a string, found 3"),
    ('{"text": "  "}\n', r"d\.jsonl:1: `text` is empty"),
    ('\n\n{"prompt": "a", "completion": ""}\n', r"d\.jsonl:3: `completion` is empty"),
    ('{"text": "a", "domain": 3}\n', r"d\.jsonl:1: `domain` must be a string"),
    ('{"messages": []}\n', r"d\.jsonl:1: `messages` must be a non-empty list"),
    ('{"messages": [{"role": "user"}]}\n', r"d\.jsonl:1: every message needs a string `role` and `content`"),
    ('{"messages": [{"role": "user", "content": "a"}]}\n', r"d\.jsonl:1: no assistant turn"),
    ('{"text": "\\ud800 abc"}\n', r"d\.jsonl:1: holds half of a surrogate pair \('\\ud800'\)"),
    ('{"messages": [{"role": "assistant", "content": "\\uDfff"}]}\n', r"d\.jsonl:1: holds half of a surrogate pair"),
    ('{"text": ' + "[" * 100_000, r"d\.jsonl:1: not valid JSON"),
    ("", r"d\.jsonl: no documents"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_mistakes_are_named_with_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "d.jsonl")


def test_mistakes_of_files(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pdf").write_text("x")
    (tmp_path / "x.txt").write_bytes(b"\xff")
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\xff"}')
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "half.json").write_text('[{"text": "a"}, {"text": "\\ud800"}]')
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    for name, message in [
        ("none.txt", "no such file"),
        ("empty", "no .jsonl, .json, .txt, .md, .parquet files"),
        ("x.pdf", "unknown kind of file"),
        ("x.txt", "not UTF-8"),
        ("x.jsonl", "not UTF-8"),
        ("x.json", "expected a list of rows"),
        ("x.parquet", "cannot be read as parquet"),
    ]:
        with pytest.raises(DataError, match=rf"{name}: {message}"):
            read(tmp_path / name)
    with pytest.raises(DataError, match=r"half\.json\[1\]: holds half of a surrogate pair"):
        read(tmp_path / "half.json")
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"text": "a", "domain": "x"}, {"text": "b"}])
    with pytest.raises(DataError, match="has no domain; add `domain:`"):
        read_documents(DataSource(path="bare.jsonl"), base_dir=bare.parent, require_domain=True)


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read(tmp_path / "d.jsonl")[0].content == Text("", "\U0001f600")


def test_a_bare_string_is_a_path() -> None:
    assert DataSource.model_validate("a.txt") == DataSource(path="a.txt")


# Token ids


def document(content: Text | Messages) -> Document:
    return Document("id", None, content)


def test_plain_text_is_all_target(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    found = encode(document(Text("", "one two")), tokenizer, add_eos=True)
    plain = tokenizer("one two", add_special_tokens=False).input_ids
    assert found.ids == (0, *plain, 1)
    assert found.targets == (False, *[True] * (len(plain) + 1))
    assert encode(document(Text("", "one two")), tokenizer, add_eos=False).ids == (0, *plain)


def test_only_the_completion_is_target(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    found = encode(document(Text("2+2=", "4")), tokenizer, add_eos=True)
    prompt = tuple(tokenizer("2+2=").input_ids)
    assert found.ids[: len(prompt)] == prompt
    assert found.targets == (False,) * len(prompt) + (True, True)


TEMPLATE = "<s>{% for m in messages %}[{{ m.role }}]@{{ m.content }}</s>{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]@{% endif %}"
)


@pytest.mark.parametrize("separator", ["\n", " "])
def test_only_assistant_turns_are_targets(separator: str, tokenizer_dir: Path) -> None:
    """With a space at the end of the generation prompt, a token such as " two" reaches over the boundary."""
    tokenizer: Any = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = TEMPLATE.replace("@", separator)
    turns = (("user", "hi"), ("assistant", "one"), ("user", "more"), ("assistant", "two"))
    found = encode(document(Messages(turns)), tokenizer, add_eos=True)
    whole = "<s>[user]@hi</s>[assistant]@one</s>[user]@more</s>[assistant]@two</s>".replace("@", separator)
    assert found.ids == tuple(tokenizer(whole, add_special_tokens=False).input_ids)
    learned = [i for i, t in zip(found.ids, found.targets, strict=True) if t]
    assert tokenizer.decode(learned).replace(" ", "") == "one</s>two</s>"


def test_the_system_turn_and_the_last_question_are_no_targets(tokenizer_dir: Path) -> None:
    tokenizer: Any = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = TEMPLATE.replace("@", "\n")
    turns = (("system", "be kind"), ("user", "hi"), ("assistant", "one"), ("user", "left without an answer"))
    found = encode(document(Messages(turns)), tokenizer, add_eos=True)
    assert tokenizer.decode(found.ids).endswith("[assistant]\none</s>")
    assert found.targets[-1]


def test_chats_need_a_template_that_keeps_earlier_turns(tokenizer_dir: Path) -> None:
    tokenizer: Any = load_tokenizer(tokenizer_dir)
    chat = document(Messages((("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))))
    with pytest.raises(DataError, match=r"document id: is a chat, but the tokenizer of .* has no chat template"):
        encode(chat, tokenizer, add_eos=True)
    placed = dataclasses.replace(chat, where="chats.jsonl:7")
    with pytest.raises(DataError, match=rf"^chats\.jsonl:7: is a chat, but the tokenizer of {tokenizer_dir} has no"):
        encode(placed, tokenizer, add_eos=True)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode(chat, tokenizer, add_eos=True)


def test_a_document_knows_its_line(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}, {"text": "b"}])
    assert [d.where for d in read(file)] == [f"{file}:1", f"{file}:2"]
    assert read(file)[0] == dataclasses.replace(read(file)[0], where="elsewhere")  # a place is no part of the content
