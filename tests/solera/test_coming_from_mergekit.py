"""docs/coming-from-mergekit.md knows every command, flag and key of the installed mergekit, and names nothing of ours
that is not there."""

import ast
import importlib
import re
import warnings
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from solera.cli import app
from solera.recipe import parse_recipe
from solera_core.strict import parse
from solera_merge.config import MergeConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from-mergekit.md"
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")]
COMMANDS = {e.name: e.module for e in entry_points(group="console_scripts") if e.value.startswith("mergekit.")}
FLAG = re.compile(r"(?<![\w`-])`?(--?[a-zA-Z][\w-]*)")


def mergekits(module: str) -> Any:
    """A module of mergekit; what it and its dependencies warn about is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def flags_of(command: str) -> list[tuple[str, ...]]:
    """The positive forms of every option, as click or (where a dependency is missing) the source tells."""
    module = COMMANDS[command]
    try:
        main = mergekits(module).main
    except ModuleNotFoundError:
        return _flags_in_source(module)
    return [tuple(p.opts) for p in main.params if p.param_type_name == "option" and p.name != "help"]


def _flags_in_source(module: str) -> list[tuple[str, ...]]:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    found: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "click.option":
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found.append(tuple(text.split("/")[0] for text in texts if text.startswith("-")))
    return found


def shared() -> set[str]:
    """Flags in the table that holds for all commands."""
    table = TEXT.split("## Flags of every mergekit command")[1].split("\n## ")[0]
    return set(FLAG.findall("\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| "))))


def own(command: str) -> set[str]:
    """Flags in the command's own table."""
    parts = TEXT.split(f"\n### {command}\n")
    if len(parts) == 1:
        return set()
    table = re.split(r"\n##", parts[1])[0]
    return set(FLAG.findall("\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| "))))


def surface() -> dict[str, set[str]]:
    command: Any = typer.main.get_command(app)
    return {name: {o for p in sub.params for o in getattr(p, "opts", ())} for name, sub in command.commands.items()}


def test_there_are_commands() -> None:
    assert {"mergekit-yaml", "mergekit-multi", "mergekit-moe", "bakllama"} <= set(COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_a_row(command: str) -> None:
    assert [row for row in ROWS if re.match(rf"`{command}\b", row[0])], command


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_flag_of_mergekit_is_on_the_page(command: str) -> None:
    flags = flags_of(command)
    assert flags
    known = shared() | own(command)
    assert [forms for forms in flags if not set(forms) <= known] == []


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_flag_on_the_page_is_one_of_mergekit(command: str) -> None:
    assert own(command) - {form for forms in flags_of(command) for form in forms} - {"-nc"} == set()


def test_the_shared_flags_are_those_of_mergekit_yaml() -> None:
    assert shared() == {form for forms in flags_of("mergekit-yaml") for form in forms}


def test_every_flag_and_command_of_ours_exists() -> None:
    commands = surface()
    ours = set().union(*commands.values())
    named = re.findall(r"`solera (\w[\w-]*)", TEXT) + re.findall(r"^    solera (\w[\w-]*)", TEXT, re.MULTILINE)
    assert set(named) <= set(commands)
    prose = "\n".join(line for line in TEXT.splitlines() if not line.startswith("| "))
    cells = "\n".join(cell for row in ROWS for cell in row[1:2])
    found = set(FLAG.findall(cells)) | set(FLAG.findall(prose))
    theirs = {form for command in COMMANDS for forms in flags_of(command) for form in forms}
    assert found - ours - theirs == set()
    assert set(FLAG.findall(cells)) <= ours | {"--write-yaml", "--print-yaml"}
    for call, options in re.findall(r"`solera (\w[\w-]*)([^`]*)`", TEXT):
        assert set(FLAG.findall(options)) <= commands[call], call


def test_every_key_of_mergekits_config_is_on_the_page() -> None:
    config, moe = mergekits("mergekit.config"), mergekits("mergekit.moe.config")
    table = TEXT.split("## Key by key")[1].split("\n## ")[0]
    keys = {
        *config.MergeConfiguration.model_fields,
        *config.OutputSliceDefinition.model_fields,
        *config.InputSliceDefinition.model_fields,
    }
    assert {key for key in keys - {"sources", "model"} if f"`{key}" not in table} == set()
    table = TEXT.split("## Mixtures of experts")[1].split("\n## ")[0]
    assert {key for key in {*moe.MoEMergeConfig.model_fields, *moe.Expert.model_fields} if key not in table} == set()


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))
def test_every_config_is_valid(text: str) -> None:
    content = yaml.safe_load(text)
    if "stages" in content:
        assert parse_recipe(content, base_dir=Path(), where="page")
    else:
        assert parse(MergeConfig, content, where="page")
