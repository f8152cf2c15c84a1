"""The way from a stage back to its recipe's folder, wherever one stands."""

from pathlib import Path

import pytest

from solera.recipe_dir import read_recipe_dir, write_recipe_dir


def test_there_and_back_from_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, recipes = tmp_path / "runs" / "one", tmp_path / "recipes"
    for directory in (run / "stages" / "blend", recipes, tmp_path / "elsewhere"):
        directory.mkdir(parents=True)
    write_recipe_dir(run, recipes)
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = read_recipe_dir(run / "stages" / "blend")
    assert found is not None
    assert found.resolve() == recipes.resolve()


def test_no_run_no_folder(tmp_path: Path) -> None:
    assert read_recipe_dir(tmp_path / "stages" / "blend") is None
