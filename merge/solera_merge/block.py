"""What a formula sees: float32 blocks of one tensor, without files, number formats or devices.

A method is a function of the whole tensor that returns a formula of a block. It first gathers the quantities that
concern the whole tensor (a norm, a threshold) in one or more passes over `Tensor.blocks()`; the formula it returns is
pure, and looks at nothing beyond its block, so the blocks may be of any size and come in any order. A method whose
formula needs whole rows, or the whole tensor, says so in the catalogue (`unit`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "BLOCK_ELEMENTS",
    "CHUNK_ELEMENTS",
    "DEVICE_BLOCK_ELEMENTS",
    "Block",
    "Float32",
    "Formula",
    "Tensor",
    "Unit",
    "block_starts",
]

Float32: TypeAlias = npt.NDArray[np.float32]

CHUNK_ELEMENTS = 4096
"""Blocks start at multiples of this, so that sums over chunks do not depend on the size of the blocks."""

Unit: TypeAlias = Literal["elements", "rows", "matrices", "tensor"]
"""How a tensor may be cut into blocks: anywhere (at multiples of `CHUNK_ELEMENTS`), between rows or matrices, or not.

A row is the last axis, a matrix the last two (of fused experts, one expert); of a vector the whole, of a scalar its one
element.
"""

BLOCK_ELEMENTS = 32 * CHUNK_ELEMENTS
"""Elements a block: 0.5 MB of float32 a source, which stays in the second-level cache (64k to 128k measured best)."""

DEVICE_BLOCK_ELEMENTS = 64 * BLOCK_ELEMENTS
"""Elements a block on a device: 8 MB of bfloat16 a source, so that starting a kernel takes little of the time."""


@dataclass(frozen=True)
class Block:
    """The same elements of every source.

    Attributes:
        start: flat index of the first element within the tensor.
        base: [n] float32, or None where the method has no base.
        models: [n] float32 each, in the order of the recipe, the base left out.
    """

    start: int
    base: Float32 | None
    models: tuple[Float32, ...]

    @property
    def deltas(self) -> list[Float32]:
        """The task vectors tau_i = W_i - W_0, [n] each, newly allocated."""
        assert self.base is not None, "a method with base='required' is planned with one"
        return [model - self.base for model in self.models]

    @property
    def vectors(self) -> Sequence[Float32]:
        """What a method with an optional base combines: the deltas where there is a base, else the models, [n] each."""
        return self.models if self.base is None else self.deltas


def block_starts(shape: tuple[int, ...], unit: Unit, step: int) -> list[int]:
    """Flat index of the first element of every block, and behind the last one the number of elements.

    Args:
        shape: of the tensor.
        unit: see `Unit`.
        step: elements a block at most, except that a row, a matrix or a whole tensor is never cut. A multiple of
            CHUNK_ELEMENTS.

    Example:
        >>> block_starts((5, 3000), "rows", 8192)
        [0, 6000, 12000, 15000]
    """
    size = math.prod(shape)
    if unit == "tensor":
        step = max(size, 1)
    elif unit != "elements":
        whole = max(math.prod(shape[-1:] if unit == "rows" else shape[-2:]), 1)
        step = max(step // whole, 1) * whole
    return [*range(0, size, step), size]


Formula: TypeAlias = Callable[[Block], Float32]
"""One block of every source in, one block of the result out; inputs are not changed."""


class Tensor(Protocol):
    """One output tensor with all its sources."""

    @property
    def name(self) -> str:
        """Of the output tensor."""
        ...

    @property
    def size(self) -> int:
        """Number of elements."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of every source and of the result; blocks are flat, in C order."""
        ...

    @property
    def keys(self) -> tuple[int, ...]:
        """One 128-bit random key a model, from (seed, name of the output tensor, reference of the model)."""
        ...

    @property
    def model_ids(self) -> tuple[int, ...]:
        """Which model of the merge each one is; in slices, the first model of one tensor may be another's second."""
        ...

    def blocks(self, unit: Unit = "elements") -> Iterator[Block]:
        """One pass over all elements, in order, in blocks of the given unit."""
        ...
