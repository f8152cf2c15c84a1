"""A tiny teaching world: text in two domains, a context, small settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_core.context import Context

MATH = [f"{a} + {b} = {a + b}; {b} * {a} = {a * b}" for a in range(2, 14) for b in range(3, 7)]
CODE = [f"def f{i}(a, b):\n    return a + {i} * b\n" for i in range(40)]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory, write_jsonl: Callable[..., Path]) -> Path:
    """A folder with math.jsonl, code.jsonl, both with domains, and held.jsonl, which shares no document with them."""
    root = tmp_path_factory.mktemp("texts")
    write_jsonl(root / "math.jsonl", [{"text": t, "domain": "math"} for t in MATH[8:]])
    write_jsonl(root / "code.jsonl", [{"text": t, "domain": "code"} for t in CODE[8:]])
    held = [("math", t) for t in MATH[:8]] + [("code", t) for t in CODE[:8]]
    write_jsonl(root / "held.jsonl", [{"text": t, "domain": d} for d, t in held])
    return root


@pytest.fixture
def ctx(texts: Path, siblings: dict[str, Path]) -> Context:
    """Stage names `base`, `a`, `b`, `c`; data relative to `texts`; one thread."""
    return Context(seed=1, base_dir=texts, models=siblings, threads=1)


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """Settings of a run that takes about a second."""
    return {"tokens": 1600, "sequence_tokens": 32, "tokens_per_step": 200, "lr": 3e-3}
