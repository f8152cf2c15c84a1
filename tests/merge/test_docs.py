"""docs/merge.md says what is so."""

import re
from pathlib import Path

import pytest
import yaml

from solera_core.quantised.catalogue import FORMATS
from solera_core.strict import parse
from solera_merge.config import MergeConfig
from solera_merge.methods.catalogue import METHODS
from solera_merge.methods.signature import REQUIRED

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "merge.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("text", RECIPES)
def test_every_recipe_is_valid(text: str) -> None:
    for document in yaml.safe_load_all(text):
        content = {key: value for key, value in document.items() if key != "name"}
        assert parse(MergeConfig, content, where="docs/merge.md")


def test_the_table_of_quantisations_is_the_catalogue() -> None:
    table = TEXT.split("## Quantised models")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`([^`]+)`", "".join(rows))) == sorted([*FORMATS, "quant_method"])


@pytest.mark.parametrize("name", METHODS)
def test_the_table_of_methods_is_the_catalogue(name: str) -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}` | ") and line.count(" | ") >= 3)
    listed = re.sub(r"\\\|", "", row).split("|")[3]
    for parameter in METHODS[name].parameters.values():
        if parameter.name == "int8_mask":
            continue  # named below the table
        shown = f"**{parameter.name}" if parameter.per_model else parameter.name
        assert shown in listed
        if parameter.default is REQUIRED:
            assert f"{shown}!" in listed
        else:
            default = str(parameter.default).lower() if parameter.kind in (bool, str) else f"{parameter.default:g}"
            assert re.search(rf"{parameter.name}\**\s*= {default}", listed)
    assert METHODS[name].reference in row or name == "passthrough"
