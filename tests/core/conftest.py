"""Fixtures of the core tests: safetensors files written byte by byte, so that they can be wrong in every way."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from solera_core.context import Context

Build = Callable[..., Path]


def _raw_safetensors(
    file: Path, entries: Mapping[str, Mapping[str, Any]] | str, data: bytes = b"", *, header_bytes: int | None = None
) -> Path:
    """A safetensors file with exactly this header (a mapping, or JSON text) and data."""
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    length = len(text) if header_bytes is None else header_bytes
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(length.to_bytes(8, "little") + text + data)
    return file


@pytest.fixture
def raw_safetensors() -> Build:
    """`raw_safetensors(file, entries, data, header_bytes=None)`: a file with exactly this header and data."""
    return _raw_safetensors


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    """A context whose relative paths start in the test's own folder."""
    return Context(base_dir=tmp_path)


@pytest.fixture
def llama(tmp_path: Path, siblings: dict[str, Path]) -> Path:
    """A writable copy of a tiny Llama, in one file."""
    return Path(shutil.copytree(siblings["a"], tmp_path / "llama"))


@pytest.fixture(scope="session")
def sharded_source(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """A tiny Llama in several shards (read-only)."""
    return make_model(tmp_path_factory.mktemp("sharded") / "model", shards=3)


@pytest.fixture
def sharded(tmp_path: Path, sharded_source: Path) -> Path:
    """A writable copy of a tiny Llama in several shards."""
    return Path(shutil.copytree(sharded_source, tmp_path / "sharded"))
