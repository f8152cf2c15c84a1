"""What the formats share: the stored tensors and what of them is accounted for, and what a format finds in them."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import ITEM_BYTES, to_float32
from solera_core.errors import CheckpointError
from solera_core.headers import TensorInfo

__all__ = ["Bytes", "Float32", "Scheme", "Stored", "Weight", "by_rows", "setting"]

Float32: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Read: TypeAlias = Callable[[int, int], Float32]

_NEAR_BYTES: Final = 1 << 13
_CHUNK_BYTES: Final = 1 << 20
_SCRATCH_BYTES: Final = 12

_ACTIVATIONS: Final = re.compile(
    r"(^|\.)((\w+_)?(input|output|activation)_(scale|zero_point|global_scale|scale_ub)|[qkv]_scale|prob_scale)$"
)
"""Tensors about activations and the key-value cache, which an unquantised model does not need."""


@dataclass(frozen=True)
class Weight:
    """A weight as its format reads it.

    Attributes:
        name: in the dequantised model.
        shape: of the weight.
        parts: the stored tensors it is made of; the one that holds the codes comes first.
        read: elements [start, stop) in C order as float32, a new array. Thread-safe.
        strip: elements that are decoded at a time, however few are asked for.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    read: Read
    strip: int = 0

    @property
    def scratch(self) -> tuple[int, int]:
        """As `Checkpoint.scratch`: codes, scales and their product, for whole rows or a strip of them.

        Measured with every format: 10.3 bytes an element at most.
        """
        return _SCRATCH_BYTES, _SCRATCH_BYTES * max(2 * self.shape[-1], self.strip)


@dataclass(frozen=True)
class Scheme:
    """What a format makes of a checkpoint.

    Attributes:
        label: for a person: format, bits, groups.
        weights: the quantised ones.
        dropped: stored tensors that are about activations only.
    """

    label: str
    weights: Sequence[Weight]
    dropped: Sequence[str] = ()


@dataclass
class Stored:
    """The tensors of a quantised checkpoint as they are stored.

    Attributes:
        checkpoint: the model.
        problems: what is wrong with it, a line each; a format goes on after each, so that all are said at once.
        seen: tensors that a format has looked at, whatever it found.
    """

    checkpoint: Checkpoint
    problems: list[str] = field(default_factory=list[str])
    seen: set[str] = field(default_factory=set[str])

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By name."""
        return self.checkpoint.tensors

    def problem(self, name: str, what: str) -> None:
        """Note what is wrong with a stored tensor."""
        info = self.tensors[name]
        self.seen.add(name)
        self.problems.append(f"{info.file}: tensor {name!r} {info.dtype} {info.shape}: {what}")

    def broken(self, name: str, what: str) -> CheckpointError:
        """The error for a value, found while reading, that makes no sense."""
        return CheckpointError(f"{self.tensors[name].file}: tensor {name!r}: {what}; the model is damaged")

    def values(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Elements [start, stop) as float32, whatever floating-point format they are stored in."""
        return to_float32(self.checkpoint.read_raw(name, start, stop), self.tensors[name].dtype)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """The bytes of elements [start, stop)."""
        return self.checkpoint.read_raw(name, start, stop)

    def columns(
        self, name: str, first: int, last: int, *, begin: int = 0, count: int | None = None, width: int | None = None
    ) -> Bytes:
        """Of rows [begin, begin + count) of `width` elements, those of [first, last): [count, bytes].

        A row is the last axis by default; all other axes count as one. (Long rows lie far apart: each is read by
        itself. Short ones are read whole, many at once, which takes less time than to skip what is not wanted.)
        """
        info = self.tensors[name]
        width, item = width or info.shape[-1], ITEM_BYTES[info.dtype]
        count = info.size // width if count is None else count
        out = np.empty((count, (last - first) * item), np.uint8)
        file = self.checkpoint.reader(name)
        if file is None:
            for i in range(count):
                at = (begin + i) * width
                out[i] = self.raw(name, at + first, at + last)
            return out
        with file:
            step = max(1, _CHUNK_BYTES // (width * item)) if width * item <= _NEAR_BYTES else 1
            rows = np.empty((step, width * item), np.uint8)
            for i in range(0, count, step):
                n = min(step, count - i)
                at = info.begin + (begin + i) * width * item
                if n == 1:
                    file.read_into(at + first * item, out[i])
                else:
                    file.read_into(at, rows[:n].reshape(-1))
                    out[i : i + n] = rows[:n, first * item : last * item]
        return out

    def float_columns(self, name: str, first: int, last: int) -> Float32:
        """As `columns`, the numbers: [count, last - first]."""
        raw = self.columns(name, first, last)
        return to_float32(raw.reshape(-1), self.tensors[name].dtype).reshape(len(raw), last - first)

    def expect(self, name: str, *, dtypes: Collection[str] = (), shape: tuple[int, ...] | None = None) -> bool:
        """Note a problem unless a tensor is stored in one of these formats, and in this shape."""
        info = self.tensors[name]
        if dtypes and info.dtype not in dtypes:
            self.problem(name, f"expected {' or '.join(dtypes)}")
        elif shape is not None and info.shape != shape:
            self.problem(name, f"expected the shape {shape}")
        else:
            return True
        return False

    def matrix(self, name: str) -> tuple[int, int]:
        """Its two axes.

        Raises:
            CheckpointError: it has another number of them.
        """
        info = self.tensors[name]
        if len(info.shape) != 2:
            raise self.refuse(f"{info.file}: tensor {name!r} {info.shape} is no matrix, as this quantisation has them")
        return info.shape[0], info.shape[1]

    def companions(self, module: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, str] | None:
        """The stored names of `<module><end>` by end; None, and a problem each, where a required one is absent."""
        found = {end: module + end for end in (*required, *optional) if module + end in self.tensors}
        self.seen.update(found.values())
        there = next(iter(found.values()), None)
        absent = [end for end in required if end not in found]
        if absent and there is not None:
            self.problem(there, f"has no {' and no '.join(repr(module + end) for end in absent)} beside it")
        return None if absent else found

    def activations(self) -> list[str]:
        """Names of the tensors that are about activations."""
        return [name for name in self.tensors if _ACTIVATIONS.search(name)]

    def refuse(self, what: str) -> CheckpointError:
        """The error for a setting of this model that no format here covers."""
        return CheckpointError(
            f"{self.checkpoint.path / 'config.json'}: {what}; use the original checkpoint, or dequantise it with the "
            "library that made it"
        )


def by_rows(columns: int, rows: Callable[[int, int], Float32]) -> Read:
    """A reader of elements out of one of rows: `rows(first, last)` gives [last - first, columns]."""

    def read(start: int, stop: int) -> Float32:
        if start == stop:
            return np.empty(0, np.float32)
        first, last = start // columns, -(-stop // columns)
        block = rows(first, last).reshape(-1)
        return block[start - first * columns : stop - first * columns]

    return read


def setting(stored: Stored, settings: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A number or word of the quantisation's settings.

    Raises:
        CheckpointError: it is missing (and has no default), or of another kind.
    """
    value = settings.get(key, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise stored.refuse(f"quantization_config.{key} must be of type {kind.__name__}, found {value!r}")
    return value
