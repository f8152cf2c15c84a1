"""Updates of several adapters as the methods see models: products of factors, made a few rows at a time.

Every product is a matrix product of whole tiles that begin at fixed rows, whatever range is asked for: a BLAS rounds
differently for other heights, and a second pass must meet the same bits as the first.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from solera_merge.adapters.low_rank import Factors
from solera_merge.block import BLOCK_ELEMENTS, Block, Unit, block_starts
from solera_merge.methods.catalogue import Method

__all__ = ["Arrays", "Products", "merged"]

Float32: TypeAlias = npt.NDArray[np.float32]


class Products:
    """`solera_merge.block.Tensor` over updates left @ right; the base is zero, and so is the update of who has none.

    Args:
        name: of the tensor.
        shape: of the update.
        updates: one a model; None: the model does not change this tensor.
        keys: one a model.
    """

    def __init__(
        self, name: str, shape: tuple[int, int], updates: Sequence[Factors | None], keys: tuple[int, ...]
    ) -> None:
        self.name = name
        self.shape: tuple[int, ...] = shape
        self.size = shape[0] * shape[1]
        self.keys = keys
        self.model_ids = tuple(range(len(updates)))
        self._updates = updates
        self._height = max(BLOCK_ELEMENTS // shape[1], 1)

    def blocks(self, unit: Unit = "elements") -> Iterator[Block]:
        """One pass."""
        tiles: dict[int, tuple[int, Float32]] = {}
        for start, stop in pairwise(block_starts(self.shape, unit, BLOCK_ELEMENTS)):
            models = tuple(self._read(i, start, stop, tiles) for i in self.model_ids)
            yield Block(start, np.zeros(stop - start, np.float32), models)

    def _read(self, model: int, start: int, stop: int, tiles: dict[int, tuple[int, Float32]]) -> Float32:
        """Elements [start, stop) of one update; `tiles` holds the last tile of each."""
        out = np.zeros(stop - start, np.float32)
        update = self._updates[model]
        if update is None:
            return out
        tile_size = self._height * self.shape[1]
        for number in range(start // tile_size, -(-stop // tile_size)):
            if model not in tiles or tiles[model][0] != number:
                left = update.left[number * self._height : (number + 1) * self._height]
                tiles[model] = (number, (left @ update.right).reshape(-1))
            tile, at = tiles[model][1], number * tile_size
            first, last = max(start, at), min(stop, at + tile.size)
            out[first - start : last - start] = tile[first - at : last - at]
        return out


class Arrays:
    """`solera_merge.block.Tensor` over matrices in memory, with a base of zeros."""

    def __init__(self, name: str, models: Sequence[Float32], keys: tuple[int, ...]) -> None:
        self.name = name
        self.shape: tuple[int, ...] = models[0].shape
        self.size = models[0].size
        self.keys = keys
        self.model_ids = tuple(range(len(models)))
        self._models = [np.ascontiguousarray(model).reshape(-1) for model in models]

    def blocks(self, unit: Unit = "elements") -> Iterator[Block]:
        """One pass."""
        for start, stop in pairwise(block_starts(self.shape, unit, BLOCK_ELEMENTS)):
            yield Block(start, np.zeros(stop - start, np.float32), tuple(m[start:stop] for m in self._models))


def merged(method: Method, tensor: Products | Arrays, parameters: Mapping[str, Any]) -> Float32:
    """What a method makes of the updates, [rows, columns]: the only matrix of that size that is held."""
    finding = [None] if method.survey is not None else []
    formula = method.function(tensor, *finding, **method.keywords(parameters))
    out = np.empty(tensor.size, np.float32)
    for block in tensor.blocks(method.unit_of(tensor.name, tensor.shape)):
        out[block.start : block.start + block.models[0].size] = formula(block)
    return out.reshape(tensor.shape)
