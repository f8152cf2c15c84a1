"""`solera route` from the command line, and as a stage of a recipe that is evaluated, cached and made again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import solera
from solera.cli import main
from solera.rebuild import rebuild
from solera_core.context import Context
from solera_core.provenance import verify
from solera_merge.route import RoutedModels

WORDS = {"x": "cask spirit colour years name", "y": "def add return class init self"}


@pytest.fixture
def home(tmp_path: Path, siblings: dict[str, Path]) -> Path:
    """base, a, b, two files of text, and route.yml."""
    for name in ("base", "a", "b"):
        shutil.copytree(siblings[name], tmp_path / name)
    for name, words in WORDS.items():
        rows = [{"text": f"{words} {i} {words}"} for i in range(16)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "route.yml").write_text(yaml.safe_dump(settings()))
    return tmp_path


def settings(**changes: Any) -> dict[str, Any]:
    given = {
        "base_model": "./base",
        "specialists": [{"name": "a", "model": "./a"}, {"name": "b", "model": "./b"}],
        "data": {"x": "x.jsonl", "y": "y.jsonl"},
        "method": "kmeans",
        "clusters": 2,
    }
    return {key: value for key, value in (given | changes).items() if value is not None}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_plans_fits_and_is_measured(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "route", home / "route.yml", home / "out", "--dry-run", "--json", "-q")
    assert (code, err) == (0, "")
    assert [row["what"] for row in json.loads(out)["reads"]] == [
        "specialist a",
        "specialist b",
        "base",
        "data.x",
        "data.y",
    ]
    assert not (home / "out").exists()
    code, out, err = run(capsys, "route", home / "route.yml", home / "out", "--json", "-q")
    assert (code, err) == (0, "")
    assert json.loads(out)["checks"]["method"] == "kmeans"
    assert verify(home / "out") == []
    (home / "suite.yml").write_text("{suite: s, tasks: [{name: t, kind: text, data: x.jsonl, limit: 4}]}")
    code, out, err = run(
        capsys, "eval", home / "out", "--suite", home / "suite.yml", "--out", home / "r", "--json", "-q"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["tasks"][0]["n"] == 4
    code, _, err = run(capsys, "inspect", home / "out")
    assert code == 3
    assert "is a route over whole models" in err


def test_the_command_says_what_is_wrong(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "route.yml").write_text(yaml.safe_dump(settings(method="centroid", clusters=None)))
    code, _, err = run(capsys, "route", home / "route.yml", home / "out")
    assert code == 3
    assert "data.x: no such specialist" in err
    assert "no text for a, b" in err


def test_a_route_is_a_stage_of_a_recipe(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {
        "solera": 1,
        "stages": {
            "c": {"merge": {"merge_method": "linear", "models": [
                {"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}]}},
            "door": {"route": settings(specialists=[{"name": "a", "model": "a"}, {"name": "c", "model": "c"}])},
            "seen": {"eval": {"models": ["door", "a"], "suites": [
                {"suite": "s", "tasks": [{"name": "t", "kind": "text", "data": "test.jsonl"}]}]}},
        },
    }  # fmt: skip
    (home / "test.jsonl").write_text('{"text": "cask spirit cask"}\n{"text": "return self add"}\n')
    (home / "recipe.yml").write_text(yaml.safe_dump(recipe))
    first = solera.run(home / "recipe.yml", home / "run")
    assert [(s.name, s.status) for s in first.stages] == [("c", "made"), ("door", "made"), ("seen", "made")]
    assert first.stages[1].inputs == ("c",)
    again = solera.run(home / "recipe.yml", home / "run")
    assert {s.status for s in again.stages} == {"cached"}
    assert json.loads((home / "run" / "stages" / "seen" / "door" / "results.json").read_text())["tasks"][0]["n"] == 2
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    door = home / "run" / "stages" / "door"
    assert RoutedModels.open(door).names == ("a", "c")
    assert rebuild(door, Context()).problems == ()


def test_the_facade_takes_a_mapping(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    out = solera.route(settings(method="cascade", base_model=None, clusters=None), "out/route")
    assert set(RoutedModels.open(out).route(["cask spirit", "def add"])) <= {"a", "b"}
