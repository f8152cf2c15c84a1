from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_core.data import DataSource, Document, read_documents
from solera_core.strict import parse
from solera_eval.config import SuiteConfig
from solera_eval.leaks import find_leaks, leaks_between
from solera_eval.suite import Suite, load_suites

LONG = "the cask gives the spirit its colour and the years give it its name and the cellar gives it time"
OTHER = "a small model learned from three large ones and then it was measured on text that none had seen"


@pytest.fixture
def world(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Callable[..., tuple[list[Document], Suite, Path]]:
    def build(
        training: list[str], text: list[str] | None = None, generate: list[tuple[str, str]] | None = None
    ) -> tuple[list[Document], Suite, Path]:
        write_jsonl(tmp_path / "train.jsonl", [{"text": t} for t in training])
        tasks: list[dict[str, Any]] = []
        if text:
            write_jsonl(tmp_path / "text.jsonl", [{"text": t} for t in text])
            tasks.append({"name": "text", "kind": "text", "data": "text.jsonl"})
        if generate:
            write_jsonl(tmp_path / "sums.jsonl", [{"id": p + a, "prompt": p, "answer": a} for p, a in generate])
            tasks.append({"name": "sums", "kind": "generate", "data": "sums.jsonl"})
        suite = load_suites([parse(SuiteConfig, {"suite": "s", "tasks": tasks}, where="s")], base_dir=tmp_path)
        return read_documents(DataSource(path="train.jsonl"), base_dir=tmp_path), suite, tmp_path

    return build


def test_the_very_document_is_found(world: Any) -> None:
    training, suite, _ = world([OTHER, LONG], text=[LONG])
    (leak,) = find_leaks(training, suite)
    assert (leak.task, leak.kind, leak.share) == ("text", "document", 1.0)
    assert leak.item == leak.training_document == training[1].id


def test_thirteen_words_in_a_row_are_found_through_spacing_and_case(world: Any) -> None:
    words = LONG.split()
    hidden = "Something else.\n" + "  ".join(words[2:15]).upper() + "\nAnd more."
    training, suite, _ = world([hidden], text=[LONG, OTHER])
    (leak,) = find_leaks(training, suite)
    assert (leak.kind, leak.item) == ("ngram", suite.tasks[0].items[0].id)
    assert leak.share == pytest.approx(1 / (len(words) - 12))


def test_twelve_words_are_no_leak(world: Any) -> None:
    training, suite, _ = world([" ".join(LONG.split()[2:14]) + " elsewhere"], text=[LONG])
    assert find_leaks(training, suite) == []


def test_short_items_must_appear_whole(world: Any) -> None:
    training, suite, _ = world(["we know that 12 + 7 = 19\nand 3+4=7"], generate=[("12+7=", "19"), ("12+7=", "20")])
    assert [leak.item for leak in find_leaks(training, suite)] == ["12+7=19"]
    training, suite, _ = world(["112+7=19", "12+7=190", "12+7"], generate=[("12+7=", "19")])
    assert find_leaks(training, suite) == []


def test_items_of_fewer_than_four_words_do_not_match_by_chance(world: Any) -> None:
    training, suite, _ = world(["so it is"], generate=[("it is", " so")])
    assert find_leaks(training, suite) == []


def test_by_reference(world: Any) -> None:
    _, _, root = world([LONG], text=[LONG])
    inline = parse(
        SuiteConfig, {"suite": "s", "tasks": [{"name": "t", "kind": "text", "data": "text.jsonl"}]}, where="s"
    )
    (leak,) = leaks_between([DataSource(path="train.jsonl")], [inline], base_dir=root)
    assert leak.to_json() == {
        "task": "t",
        "item": leak.item,
        "kind": "document",
        "training_document": leak.item,
        "share": 1.0,
    }


def test_short_ngrams_are_refused(world: Any) -> None:
    training, suite, _ = world([LONG], text=[LONG])
    with pytest.raises(ValueError, match="match by chance"):
        find_leaks(training, suite, ngram_words=2)
