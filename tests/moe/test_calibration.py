"""Splitting and cutting calibration text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_core.data import DataSource, read_documents
from solera_core.errors import DataError
from solera_merge.moe.calibration import read_domains, tokenize


def source(path: Path) -> tuple[DataSource, ...]:
    return (DataSource(path=str(path)),)


def rows(texts: list[str]) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts]


def test_split_is_disjoint_complete_and_independent_of_file_order(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    texts = [f"document {i}" for i in range(20)]
    forward = write_jsonl(tmp_path / "a.jsonl", rows(texts))
    backward = write_jsonl(tmp_path / "b.jsonl", rows(texts[::-1]))
    (one,), _ = read_domains({"x": source(forward)}, base_dir=tmp_path, holdout=0.25, seed=0)
    (two,), _ = read_domains({"x": source(backward)}, base_dir=tmp_path, holdout=0.25, seed=0)
    assert one == two
    assert len(one.held_out) == 5
    ids = [document.id for document in (*one.fit, *one.held_out)]
    assert sorted(ids) == sorted(d.id for d in read_documents(source(forward), base_dir=tmp_path))
    (other,), _ = read_domains({"x": source(forward)}, base_dir=tmp_path, holdout=0.25, seed=1)
    assert other.held_out != one.held_out


def test_copies_of_a_document_count_once(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(["one", "two", "one", "one"]))
    (domain,), _ = read_domains({"x": source(path)}, base_dir=tmp_path, holdout=0.5, seed=0)
    assert len(domain.fit) == len(domain.held_out) == 1


def test_a_single_document_cannot_be_split(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(["only one"]))
    with pytest.raises(DataError, match=r"router.data.x \(.*a.jsonl\): only 1 document; at least 2 are needed"):
        read_domains({"x": source(path)}, base_dir=tmp_path, holdout=0.2, seed=0)


def test_the_same_text_for_two_experts(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", rows(["one", "two", "three"]))
    b = write_jsonl(tmp_path / "b.jsonl", rows(["three", "four", "five"]))
    _, warnings = read_domains({"x": source(a), "y": source(b)}, base_dir=tmp_path, holdout=0.2, seed=0)
    assert len(warnings) == 1
    assert "1 of 3 documents are also the text of 'x'" in warnings[0]
    with pytest.raises(DataError, match="all of it is also the text of 'x', so no router can tell them apart"):
        read_domains({"x": source(a), "y": source(a)}, base_dir=tmp_path, holdout=0.2, seed=0)


def test_tokenize_joins_marks_and_cuts(tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"text": "one and two"}) + "\n" + json.dumps({"prompt": "six", "completion": "seven"}) + "\n"
    )
    documents = read_documents(source(path), base_dir=tmp_path)
    found = tokenize(documents, tokenizer, limit=1000, sequence_tokens=5, where="x")
    joined = [t for sequence in found.ids for t in sequence]
    assert tokenizer.decode(joined) == "<s>one and two</s><s>sixseven</s>"
    assert [len(sequence) for sequence in found.ids[:-1]] == [5] * (len(found.ids) - 1)
    assert 1 <= len(found.ids[-1]) <= 5
    # BOS and prompt are context: not scored
    flags = [flag for sequence in found.targets for flag in sequence]
    scored = [token for token, flag in zip(joined, flags, strict=True) if flag]
    assert tokenizer.decode(scored) == "one and two</s>seven</s>"
    assert found.tokens == len(joined)
    assert found.scored == sum(sum(targets[1:]) for targets in found.targets)
    assert tokenize(documents, tokenizer, limit=7, sequence_tokens=5, where="x").tokens == 7
