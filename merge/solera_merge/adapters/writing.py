"""Writing a peft adapter: adapter_config.json, adapter_model.safetensors and solera.json, into a staging directory.

Ranks may be known only when the last factor has been computed, and the header stands first. So factors wait in a file
beside, already in the adapter's number format; no more than one module's are in memory.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Self

import numpy as np
import numpy.typing as npt

from solera_core.dtypes import from_float32, nonfinite
from solera_core.errors import CheckpointError
from solera_core.lora import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from solera_core.writer import CheckpointWriter, TensorSpec
from solera_merge.adapters.low_rank import Factors

__all__ = ["AdapterOutput", "target_names"]

_ONE_FILE: Final = 1 << 62
_SPOOL: Final = ".factors"
_BLOCK: Final = 1 << 20  # elements copied at a time


@dataclass
class AdapterOutput:
    """What will be an adapter, in a staging directory; a context manager. `finish` writes it.

    Attributes:
        directory: the staging directory.
        dtype: safetensors name of the number format of all its tensors.
        ranks: of every module with a low-rank update.
        parameters: ranks of updates of parameters that peft targets by themselves: fused experts, in the order in
            which their module has them, and the weights of modules in `as_parameters`.
        as_parameters: modules whose weight is targeted as a parameter. (peft takes `gate_proj` and the like of a model
            with fused experts for the experts'.)
    """

    directory: Path
    dtype: str
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    parameters: dict[str, int] = field(default_factory=dict[str, int])
    as_parameters: frozenset[str] = frozenset()
    _places: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict[str, tuple[tuple[int, ...], int]])
    _file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._file = (self.directory / _SPOOL).open("w+b")
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._file is not None
        self._file.close()
        (self.directory / _SPOOL).unlink(missing_ok=True)

    def add(self, module: str, factors: Factors, *, embedding: bool = False) -> None:
        """Add the update B @ A of a module: left is B [out, rank], right is A [rank, in].

        Of an embedding, left is [vocabulary, rank] and right [rank, width]; peft stores both transposed.
        """
        if module in self.as_parameters:
            self.parameters[f"{module}.weight"] = factors.rank
        else:
            self.ranks[module] = factors.rank
        if embedding:
            self.put(f"{module}.lora_embedding_A", factors.left.T)
            self.put(f"{module}.lora_embedding_B", factors.right.T)
        else:
            self.put(f"{module}.lora_A.weight", factors.right)
            self.put(f"{module}.lora_B.weight", factors.left)

    def add_experts(self, parameter: str, experts: Sequence[Factors]) -> None:
        """Add the updates of all experts of a fused parameter, all of one rank."""
        self.parameters[parameter] = experts[0].rank
        left = np.stack([factors.left for factors in experts], axis=-1)  # out, rank, experts
        self.put(f"{parameter}.lora_A.weight", np.concatenate([factors.right for factors in experts]))
        self.put(f"{parameter}.lora_B.weight", left.reshape(len(left), -1))

    def _wrapped(self, name: str) -> str:
        """The name in the file: of several parameters of one module, peft wraps the last one outermost."""
        parameter = name.rpartition(".lora_")[0]
        if parameter not in self.parameters:
            return name
        module = parameter.rpartition(".")[0]
        siblings = [other for other in self.parameters if other.rpartition(".")[0] == module]
        depth = len(siblings) - 1 - siblings.index(parameter)
        return module + ".base_layer" * depth + name.removeprefix(parameter)

    def put(self, name: str, values: npt.NDArray[np.float32]) -> None:
        """Add a tensor, by its name in the model (peft's prefix is added here). Raises as `put_blocks`."""
        self.put_blocks(name, values.shape, [np.ascontiguousarray(values).reshape(-1)])

    def put_blocks(self, name: str, shape: tuple[int, ...], blocks: Iterable[npt.NDArray[np.float32]]) -> None:
        """Add a tensor whose elements come one block after the other, in C order.

        Raises:
            CheckpointError: a value is NaN, infinite or too large for the number format.
        """
        assert self._file is not None
        self._places[name] = (shape, self._file.seek(0, 2))
        for block in blocks:
            raw = from_float32(block, self.dtype)
            if bad := nonfinite(raw, self.dtype):
                raise CheckpointError(
                    f"{name}: {bad} values of the adapter are NaN, infinite or too large for {self.dtype}; choose a "
                    "wider dtype, or look for a damaged input"
                )
            self._file.write(raw.data)

    def finish(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Write weights and settings; the digest of every tensor. `settings` are beyond r, alpha and their patterns."""
        assert self._file is not None
        places = {PREFIX + self._wrapped(name): place for name, place in self._places.items()}
        specs = [TensorSpec(name, self.dtype, places[name][0]) for name in sorted(places)]
        with CheckpointWriter(self.directory, specs, shard_bytes=_ONE_FILE) as writer:
            for spec in specs:
                self._file.seek(places[spec.name][1])
                for at in range(0, spec.size, _BLOCK):
                    count = min(_BLOCK, spec.size - at)
                    raw = self._file.read(count * spec.nbytes // spec.size)
                    writer.write_raw(spec.name, at, np.frombuffer(raw, np.uint8), checked=True)
            digests = writer.finish()
        (self.directory / "model.safetensors").rename(self.directory / WEIGHTS_FILE)
        targets = {"target_parameters": list(self.parameters) or None}
        content = {**_DEFAULTS, **_ranks(self.ranks | self.parameters), **targets, **settings}
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (self.directory / CONFIG_FILE).write_text(text, encoding="utf-8")
        return digests


_DEFAULTS: Final[Mapping[str, Any]] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "revision": None,
    "target_modules": [],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}


def _ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """r, alpha and their patterns: alpha is the rank, so that the scaling is 1 in every module."""
    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], rank), default=1)
    patterns = {f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != usual}
    return {"r": usual, "lora_alpha": usual, "rank_pattern": patterns, "alpha_pattern": patterns}


def target_names(chosen: Iterable[str], others: Sequence[str]) -> list[str]:
    """`target_modules` for exactly the `chosen` modules: last names where no other module ends in one, else in full."""
    taken = {name.rpartition(".")[2] for name in others}
    last = {name: name.rpartition(".")[2] for name in chosen}
    return sorted({name if end in taken else end for name, end in last.items()})
