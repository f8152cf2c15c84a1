"""`solera diff` as a person uses it."""

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from solera.cli import main
from solera.diff_report import MEASURES

Siblings = dict[str, Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], siblings: Siblings, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(...)` -> (code, stdout, stderr), standing in the folder of the siblings."""
    monkeypatch.chdir(siblings["base"].parent)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["diff", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_two_models(run: Run) -> None:
    code, out, _ = run("base", "a", "--top", "3", "--rank")
    assert code == 0
    assert "kinds of tensors" in out
    assert "self_attn.q_proj" in out
    assert "effective_rank" in out
    assert "... and 18 more (--top 0" in out
    assert "sign" not in out.replace("--measure", "")


def test_several_models_and_their_base(run: Run) -> None:
    code, out, _ = run("--base", "base", "a", "b", "c", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["base"], found["models"]) == ("base", ["a", "b", "c"])
    assert [(row["a"], row["b"]) for row in found["pairs"]] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert all(0.4 < row["sign_conflict"] < 0.6 for row in found["pairs"])  # independent noise
    assert len(found["tensors"]) == 3 * 21
    assert {row["layer"] for row in found["layers"]} == {"model.layers.0", "model.layers.1", "outside the layers"}
    _, out, _ = run("--base", "base", "a", "b", "--top", "0")
    assert "largest sign_conflict first" in out
    assert "more (--top 0" not in out


@pytest.mark.parametrize("measure", sorted(MEASURES))
@pytest.mark.parametrize("ending", ["svg", "html"])
def test_pictures(run: Run, tmp_path: Path, measure: str, ending: str) -> None:
    file = tmp_path / f"map.{ending}"
    rank = ["--rank"] if measure == "rank" else []
    code, _, err = run("--base", "base", "a", "b", "--picture", file, "--measure", measure, *rank)
    assert code == 0
    assert f"{file}: written" in err
    text = file.read_text(encoding="utf-8")
    assert "model.layers.1.mlp.down_proj: " in text
    assert "a, b as changes of base" in text
    if ending == "svg":
        ET.fromstring(text)


def test_many_pairs_are_one_panel(run: Run, siblings: Siblings, tmp_path: Path) -> None:
    for name in ("d", "e"):
        shutil.copytree(siblings["a"], tmp_path / name)
    models = [*(siblings[n] for n in "abc"), tmp_path / "d", tmp_path / "e"]
    assert run("--base", "base", *models, "--picture", tmp_path / "map.svg")[0] == 0
    assert "mean over 10 pairs" in (tmp_path / "map.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], "1 models and no base; give two"),
        (["a", "b", "c"], "3 models and no base; give two"),
        (["--base", "base", "a", "a"], "'a' is given twice"),
        (["a", "b", "--measure", "cosine"], "is about two models that change one base"),
        (["a", "b", "--measure", "rank"], "needs --rank"),
        (["a", "b", "--measure", "sign"], "'sign' is none (did you mean"),
        (["a", "b", "--picture", "map.png"], "as .svg or .html"),
        (["a", "b", "--picture", "no/such/map.svg"], "there is no folder"),
        (["none", "a", "--base", "nowhere"], "model 'nowhere' not found"),
        (["none", "a", "--base", "nowhere"], "model 'none' not found"),
    ],
)
def test_bad_input(run: Run, arguments: list[str], words: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (3, "")
    assert words in err


def test_models_with_nothing_in_common(run: Run, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"w": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run("base", tmp_path)
    assert code == 3
    assert "have no tensor in common" in err


def test_what_would_be_read(run: Run) -> None:
    code, out, _ = run("--base", "base", "a", "b", "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert [row["what"] for row in plan["reads"]] == ["base", "a", "b"]
    assert plan["parameters"] == {"base": "base", "models": ["a", "b"]}
