"""Token ids of trunk and experts, compared from the files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_merge.moe.vocabulary import compare_tokenizers


@pytest.fixture
def compare(tmp_path: Path, siblings: dict[str, Path]) -> Callable[..., list[str]]:
    """`compare(edit)`: warnings for a copy of `a`, whose directory `edit` may change, against the base."""

    def run(edit: Callable[[Path], Any]) -> list[str]:
        path = tmp_path / "expert"
        shutil.copytree(siblings["a"], path)
        edit(path)
        trunk, expert = (open_checkpoint(p, Context()) for p in (siblings["base"], path))
        return compare_tokenizers(trunk, expert, "math")

    return run


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_equal_files(compare: Callable[..., list[str]]) -> None:
    assert compare(lambda path: None) == []


def test_the_same_content_written_otherwise(compare: Callable[..., list[str]]) -> None:
    (warning,) = compare(lambda path: edit_json(path / "tokenizer.json", lambda content: None))
    assert "has the trunk's token ids, but is not the same file" in warning


def test_swapped_ids(compare: Callable[..., list[str]]) -> None:
    def swap(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    with pytest.raises(CheckpointError, match=r"2 tokens have other ids.*'a' \(\d+ and \d+\), 'b'.*specialists of one"):
        compare(lambda path: edit_json(path / "tokenizer.json", swap))


def test_an_added_token(compare: Callable[..., list[str]]) -> None:
    def add(content: Any) -> None:
        content["added_tokens"].append({"content": "<call>", "id": 300})

    with pytest.raises(CheckpointError, match=r"1 tokens have other ids.*'<call>' \(None and 300\)"):
        compare(lambda path: edit_json(path / "tokenizer.json", add))


def test_no_tokenizer_files(compare: Callable[..., list[str]]) -> None:
    (warning,) = compare(lambda path: (path / "tokenizer.json").unlink())
    assert "expert 'math' has no tokenizer files, so equal token ids are assumed, not checked" in warning


def test_another_chat_template(compare: Callable[..., list[str]]) -> None:
    (warning,) = compare(lambda path: (path / "chat_template.jinja").write_text("{{ messages }}"))
    assert "has another chat template than the trunk" in warning


def test_a_damaged_file(compare: Callable[..., list[str]]) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json: is not a tokenizer file"):
        compare(lambda path: (path / "tokenizer.json").write_text("{}"))


def test_unigram_lists(tmp_path: Path, siblings: dict[str, Path]) -> None:
    # Unigram keeps its vocabulary as a list: the place is the id
    for name, order in (("one", "abc"), ("two", "acb")):
        shutil.copytree(siblings["base"], tmp_path / name)
        content = {"model": {"type": "Unigram", "vocab": [[token, -1.0] for token in order]}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
    one, two = (open_checkpoint(tmp_path / n, Context()) for n in ("one", "two"))
    with pytest.raises(CheckpointError, match=r"'b' \(1 and 2\), 'c' \(2 and 1\)"):
        compare_tokenizers(one, two, "x")
