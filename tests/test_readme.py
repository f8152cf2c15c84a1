"""What the README shows is executed: the recipe parses, commands exist, the Python runs, links lead somewhere."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from solera.cli import main
from solera.recipe import parse_recipe
from solera_core.provenance import verify

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_recipe_is_valid() -> None:
    (text,) = snippets("yaml")
    recipe = parse_recipe(yaml.safe_load(text), base_dir=Path(), where="README")
    assert [s.name for s in recipe.stages] == ["code", "prose", "blend", "moe", "healed", "verdict"]


def test_the_python_runs(siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, sibling in (("code", "a"), ("prose", "b")):
        shutil.copytree(siblings[sibling], tmp_path / "runs" / "demo" / "stages" / name)
    monkeypatch.chdir(tmp_path)
    (code,) = snippets("python")
    exec(compile(code, "README.md", "exec"), {})
    assert verify(tmp_path / "runs" / "halves") == []


def test_every_command_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"`solera ([a-z-]+)", README))
    assert {"merge", "moe", "tune", "distill", "eval", "gate", "publish", "run"} <= named
    for command in named:
        assert main([command, "--help"]) == 0, command
    capsys.readouterr()


def test_every_link_leads_somewhere() -> None:
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    broken = [
        f"{page.relative_to(REPOSITORY)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)


def test_make_targets_named_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for text in (README, (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        for target in re.findall(r"`?make ([a-z-]+)`?", text):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_hooks_before_a_commit_run_what_make_check_runs() -> None:
    done = subprocess.run(
        ["make", "-n", "check", "-o", ".venv/.solera-ready"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    commands = [line for line in done.stdout.splitlines() if line.startswith(".venv/bin/")]
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert len(commands) >= 5
    assert [hook["entry"] for hook in hooks] == commands
    assert not any(hook.get("pass_filenames", True) for hook in hooks)
