import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_core.errors import ConfigError, DataError
from solera_core.strict import parse
from solera_eval.config import SuiteConfig
from solera_eval.suite import Suite, load_suite, load_suites

WriteJsonl = Callable[[Path, list[dict[str, Any]]], Path]
CHOICE = {"prompt": "q", "choices": [" a", " b"], "answer": 1}
GENERATE = {"prompt": "1+1=", "answer": "2"}


def load(base: Path, *tasks: dict[str, Any]) -> Suite:
    return load_suite(parse(SuiteConfig, {"suite": "s", "tasks": list(tasks)}, where="s"), base_dir=base)


def choice(**more: Any) -> dict[str, Any]:
    return {"name": "c", "kind": "choice", "data": "c.jsonl", **more}


def generate(**more: Any) -> dict[str, Any]:
    return {"name": "g", "kind": "generate", "data": "g.jsonl", **more}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "answer": 0}, "`choices`"),
        ({**CHOICE, "choices": ["only"]}, "at least two"),
        ({**CHOICE, "choices": "ab"}, "`choices`"),
        ({**CHOICE, "choices": ["a", ""]}, "non-empty"),
        ({**CHOICE, "choices": ["a", "a"]}, "same text twice"),
        ({**CHOICE, "answer": 2}, "from 0 to 1"),
        ({**CHOICE, "answer": -1}, "from 0 to 1"),
        ({**CHOICE, "answer": " a"}, "`answer`"),
        ({**CHOICE, "answer": True}, "`answer`"),
        ({**CHOICE, "prompt": 3}, "`prompt`"),
        ({**CHOICE, "id": ""}, "`id`"),
        ([1, 2], "expected an object"),
    ],
)
def test_a_wrong_choice_row_is_refused_with_its_line(
    tmp_path: Path, write_jsonl: WriteJsonl, row: Any, said: str
) -> None:
    write_jsonl(tmp_path / "c.jsonl", [CHOICE, row])
    with pytest.raises(DataError, match=r"c\.jsonl:2: ") as caught:
        load(tmp_path, choice())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "1+1="}, "`answer`"),
        ({**GENERATE, "answer": 2}, "`answer`"),
        ({**GENERATE, "answer": []}, "`answer`"),
        ({**GENERATE, "answer": " "}, "`answer`"),
        ({**GENERATE, "prompt": ""}, "`prompt`"),
    ],
)
def test_a_wrong_generate_row_is_refused_with_its_line(
    tmp_path: Path, write_jsonl: WriteJsonl, row: dict[str, Any], said: str
) -> None:
    write_jsonl(tmp_path / "g.jsonl", [GENERATE, row])
    with pytest.raises(DataError, match=r"g\.jsonl:2: ") as caught:
        load(tmp_path, generate())
    assert said in str(caught.value)


def test_missing_empty_and_foreign_files_are_refused(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    with pytest.raises(DataError, match=r"c\.jsonl: no such file"):
        load(tmp_path, choice())
    write_jsonl(tmp_path / "c.jsonl", [])
    with pytest.raises(DataError, match="'c': no items"):
        load(tmp_path, choice())
    with pytest.raises(DataError, match=r"expected a \.jsonl"):
        load(tmp_path, choice(data="c.csv"))
    (tmp_path / "c.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"c\.jsonl:1: not valid JSON"):
        load(tmp_path, choice())
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path, {"name": "t", "kind": "text", "data": "t.jsonl"})


def test_items_keep_their_order_limit_and_identity(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    write_jsonl(tmp_path / "g.jsonl", [{**GENERATE, "id": "x"}, GENERATE, GENERATE, {**GENERATE, "answer": ["3", "2"]}])
    ids = [item.id for item in load(tmp_path, generate()).tasks[0].items]
    assert ids[0] == "x"
    assert ids[2] == f"{ids[1]}#2"  # equal content, told apart by its number
    assert len(set(ids)) == 4
    assert [item.id for item in load(tmp_path, generate(limit=2)).tasks[0].items] == ids[:2]


def test_two_items_under_one_id_are_refused(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    write_jsonl(tmp_path / "g.jsonl", [{**GENERATE, "id": 7}, {**GENERATE, "id": 7, "answer": "3"}])
    with pytest.raises(DataError, match="two different items have the id '7'"):
        load(tmp_path, generate())


def test_the_digest_follows_content_and_settings_not_places(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    write_jsonl(tmp_path / "g.jsonl", [GENERATE])
    write_jsonl(tmp_path / "other" / "h.jsonl", [GENERATE])
    write_jsonl(tmp_path / "g2.jsonl", [{**GENERATE, "answer": "3", "id": "same"}])
    first = load(tmp_path, generate())
    assert load(tmp_path / "other", generate(data="h.jsonl")).digest == first.digest
    assert load(tmp_path, generate(max_new_tokens=5)).digest != first.digest
    assert load(tmp_path, generate(data="g2.jsonl")).digest != first.digest
    assert load(tmp_path, generate(name="h")).digest != first.digest


def test_suite_files_resolve_beside_themselves_and_join(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    write_jsonl(tmp_path / "suites" / "g.jsonl", [GENERATE])
    write_jsonl(tmp_path / "c.jsonl", [CHOICE])
    (tmp_path / "suites" / "one.yml").write_text(json.dumps({"suite": "one", "tasks": [generate()]}), encoding="utf-8")
    inline = parse(SuiteConfig, {"suite": "two", "tasks": [choice()]}, where="s")
    suite = load_suites(["suites/one.yml", inline], base_dir=tmp_path)
    assert suite.name == "one+two"
    assert [task.name for task in suite.tasks] == ["g", "c"]
    with pytest.raises(ConfigError, match="given by two suites: g"):
        load_suites(["suites/one.yml", "suites/one.yml"], base_dir=tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        load_suites(["absent.yml"], base_dir=tmp_path)


def test_domains_come_from_the_task_or_the_row(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    write_jsonl(tmp_path / "t.jsonl", [{"text": "one", "domain": "x"}, {"text": "two"}])
    task = load(tmp_path, {"name": "t", "kind": "text", "data": "t.jsonl"}).tasks[0]
    assert [task.domain(item) for item in task.items] == ["x", None]
    task = load(tmp_path, {"name": "t", "kind": "text", "data": "t.jsonl", "domain": "y"}).tasks[0]
    assert [task.domain(item) for item in task.items] == ["y", "y"]
