"""Every module imports by itself, names what it exports, and the way in stays light."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOTS = ["core/solera_core", "merge/solera_merge", "eval/solera_eval", "distill/solera_distill", "solera"]


def modules() -> list[str]:
    names: list[str] = []
    for root in ROOTS:
        base = (REPOSITORY / root).parent
        for file in sorted((REPOSITORY / root).rglob("*.py")):
            if file.name == "__main__.py":
                continue
            parts = file.relative_to(base).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.parametrize("name", modules())
def test_every_module_imports_and_all_is_true(name: str) -> None:
    module = importlib.import_module(name)
    missing = [n for n in getattr(module, "__all__", []) if not hasattr(module, n)]
    assert not missing, f"{name}.__all__ names what is not there: {missing}"
    if not name.endswith("__main__") and not Path(module.__file__ or "").name.startswith("_"):
        assert hasattr(module, "__all__"), f"{name} does not say what it exports"


SURFACE = Path(__file__).with_name("public_names.json")


def test_the_public_names_are_frozen() -> None:
    """A deliberate change: run this test with SOLERA_FREEZE=1, read the diff, and say it in the changelog."""
    names = {name: sorted(getattr(importlib.import_module(name), "__all__", [])) for name in modules()}
    if os.environ.get("SOLERA_FREEZE"):
        SURFACE.write_text(json.dumps(names, indent=1) + "\n")
    assert names == json.loads(SURFACE.read_text())


HEAVY = ("torch", "transformers", "scipy", "mergekit", "accelerate", "datasets", "pandas")


@pytest.mark.parametrize(
    "code",
    [
        "import solera",
        "from solera.cli import main; assert main(['--help']) == 0",
        "from solera.cli import main; assert main(['merge', '--help']) == 0",
        "from solera.recipe import load_recipe; from pathlib import Path; load_recipe(Path('recipes/stories.yml'))",
        "from solera.cli import main; assert main(['schema', 'recipe']) == 0",
    ],
)
def test_the_way_in_imports_nothing_heavy(code: str) -> None:
    probe = f"{code}\nimport sys, json; print('HEAVY', json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", probe], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout.rsplit("HEAVY", 1)[1])
    assert loaded == [], f"`{code}` imports {loaded}"
