"""docs/adding-a-method.md shows code that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.DOTALL)


def test_every_block_names_its_file() -> None:
    assert len(SHOWN) == TEXT.count("```python") > 0


@pytest.mark.parametrize(("file", "code"), SHOWN)
def test_the_code_is_there(file: str, code: str) -> None:
    assert code in (ROOT / file).read_text(encoding="utf-8")


def test_every_file_that_is_named_exists() -> None:
    for path in re.findall(r"`((?:merge|tests|docs)/\S+)`", TEXT):
        assert (ROOT / path).is_file(), path
