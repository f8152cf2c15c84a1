"""Imports only point down: solera (3), solera_distill (2), solera_merge and solera_eval (1, apart), solera_core (0)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FLOORS = {"solera_core": 0, "solera_merge": 1, "solera_eval": 1, "solera_distill": 2, "solera": 3}
ROOTS = {
    "solera_core": REPOSITORY / "core" / "solera_core",
    "solera_merge": REPOSITORY / "merge" / "solera_merge",
    "solera_eval": REPOSITORY / "eval" / "solera_eval",
    "solera_distill": REPOSITORY / "distill" / "solera_distill",
    "solera": REPOSITORY / "solera",
}


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the floor"
            yield node.module or "", node.lineno


def violations(package: str, source: str) -> list[str]:
    found: list[str] = []
    for module, line in imported(ast.parse(source)):
        target = module.split(".")[0]
        if target in FLOORS and target != package and FLOORS[target] >= FLOORS[package]:
            found.append(f"line {line}: {package} (floor {FLOORS[package]}) imports {target} (floor {FLOORS[target]})")
    return found


@pytest.mark.parametrize("package", sorted(ROOTS))
def test_imports_point_down(package: str) -> None:
    files = sorted(ROOTS[package].rglob("*.py"))
    assert files, f"{ROOTS[package]} holds no code"
    bad = [
        f"{f.relative_to(REPOSITORY)} {v}" for f in files for v in violations(package, f.read_text(encoding="utf-8"))
    ]
    assert not bad, "\n".join(bad)


def test_the_check_sees_a_violation() -> None:
    assert violations("solera_core", "def f():\n    from solera_merge.run import merge\n")
    assert violations("solera_eval", "import solera_merge")
    assert not violations("solera_distill", "import solera_eval, solera_core.errors")


def test_no_utils_files() -> None:
    assert not [p for root in ROOTS.values() for p in root.rglob("utils.py")]
