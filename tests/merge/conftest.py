"""Fixtures of the merge tests: recipes as mappings, blocks in memory, checkpoints made of bare arrays."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.strict import parse
from solera_core.writer import CheckpointWriter, TensorSpec
from solera_merge.block import CHUNK_ELEMENTS, Block, Unit, block_starts
from solera_merge.config import MergeConfig
from solera_merge.methods.catalogue import METHODS, Method
from solera_merge.selection import one_after_another

F32 = npt.NDArray[np.float32]


@dataclass
class InMemory:
    """`solera_merge.block.Tensor` over arrays."""

    models: Sequence[F32]  # shaped
    base: F32 | None = None
    step: int = CHUNK_ELEMENTS
    keys: tuple[int, ...] = field(default=())
    passes: int = 0
    name: str = "weight"
    model_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.shape = self.models[0].shape
        self.size = self.models[0].size
        self.models = [m.reshape(-1) for m in self.models]
        self.base = None if self.base is None else self.base.reshape(-1)
        self.keys = self.keys or tuple(range(1, len(self.models) + 1))
        self.model_ids = self.model_ids or tuple(range(len(self.models)))

    def blocks(self, unit: Unit = "elements") -> Iterator[Block]:
        self.passes += 1
        for start, stop in pairwise(block_starts(self.shape, unit, self.step)):
            cut = slice(start, stop)
            yield Block(start, None if self.base is None else self.base[cut], tuple(m[cut] for m in self.models))


def _by_recipe_name(method: Method, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as the plan resolves them: every one, by its name in a recipe."""
    return {
        p.name: keywords.get(p.keyword, (p.default,) if p.per_model else p.default) for p in method.parameters.values()
    }


@pytest.fixture(scope="session")
def in_memory() -> type[InMemory]:
    return InMemory


@pytest.fixture(scope="session")
def apply() -> Callable[..., F32]:
    """`apply(method, models, base, step=, keys=, name=, **parameters)`: the whole merged tensor, block by block."""

    def run(
        method: str,
        models: Sequence[Any],
        base: Any = None,
        *,
        step: int = CHUNK_ELEMENTS,
        keys: tuple[int, ...] = (),
        name: str = "weight",
        **parameters: Any,
    ) -> F32:
        arrays = [np.asarray(m, np.float32) for m in models]
        tensor = InMemory(arrays, None if base is None else np.asarray(base, np.float32), step, keys, name=name)
        entry = METHODS[method]
        resolved = [_by_recipe_name(entry, parameters)]
        finding = [] if entry.survey is None else list(entry.survey([tensor], resolved, one_after_another))
        formula = entry.function(tensor, *finding, **parameters)
        return np.concatenate([formula(block) for block in tensor.blocks(entry.unit_of(name, tensor.shape))])

    return run


@pytest.fixture(scope="session")
def recipe() -> Callable[..., MergeConfig]:
    """`recipe(merge_method=..., models=..., ...)`, through the strict door; a model may be written as a bare string."""

    def build(**content: Any) -> MergeConfig:
        if "models" in content:
            content["models"] = [{"model": m} if isinstance(m, str) else m for m in content["models"]]
        return parse(MergeConfig, content, where="recipe")

    return build


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, F32]]:
    """All tensors of a checkpoint directory as shaped float32."""

    def read(path: Path) -> dict[str, F32]:
        checkpoint = open_checkpoint(path, Context())
        return {name: checkpoint.read(name) for name in checkpoint.tensors}

    return read


@pytest.fixture(scope="session")
def bare_model() -> Callable[..., Path]:
    """`bare_model(path, {name: array}, dtype="F32", **config)`: a checkpoint that only solera needs to understand."""

    def write(path: Path, tensors: Mapping[str, Any], dtype: str = "F32", **config: Any) -> Path:
        path.mkdir(parents=True)
        arrays = {name: np.asarray(value) for name, value in tensors.items()}
        names = {"i": "I64", "b": "BOOL", "u": "U8"}
        specs = [TensorSpec(name, names.get(a.dtype.kind, dtype), a.shape) for name, a in arrays.items()]
        with CheckpointWriter(path, specs) as writer:
            for name, array in arrays.items():
                if array.dtype.kind == "f":
                    writer.write_flat(name, 0, array.astype(np.float32).reshape(-1))
                else:
                    writer.write_raw(name, 0, np.frombuffer(array.tobytes(), np.uint8))
            writer.finish()
        content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}
        (path / "config.json").write_text(json.dumps(content), encoding="utf-8")
        return path

    return write
