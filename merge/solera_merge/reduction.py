"""Sums over a whole tensor whose last bit does not depend on blocks or threads."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from solera_merge.block import CHUNK_ELEMENTS, Float32, Tensor

__all__ = ["LANES", "add_parts", "gram", "norms_and_dot", "root_sums"]

LANES = 32
"""Partial sums of a chunk."""

_PARTS = 1024  # sums of chunks that are held before they are added up: 32 KB


def norms_and_dot(tensor: Tensor) -> tuple[float, float, float]:
    """(|base|, |model|, <base, model>) of the base and the one model, in one pass, fp64; see `gram`."""

    def pairs() -> Iterable[Sequence[Float32]]:
        for block in tensor.blocks():
            assert block.base is not None
            yield block.base, block.models[0]

    products = _products(pairs(), 2)
    return math.sqrt(products[0][0]), math.sqrt(products[1][1]), products[0][1]


def gram(tensor: Tensor) -> list[list[float]]:
    """<x_i, x_j> of the N models, or of their deltas where the method has a base, in one pass, fp64 [N][N].

    Products of float32 are exact in float64. They are summed in chunks of fixed length at fixed places, and the sums
    of the chunks are added exactly (math.fsum), so the result has one value whatever the block size. BLAS is avoided:
    it splits a dot product by the number of threads.
    """
    return _products((block.vectors for block in tensor.blocks()), len(tensor.keys))


def _products(blocks: Iterable[Sequence[Float32]], count: int) -> list[list[float]]:
    parts: list[list[list[float]]] = [[[] for _ in range(i + 1)] for i in range(count)]
    for block in blocks:
        for i, row in enumerate(parts):
            for j, part in enumerate(row):
                add_parts(part, _chunk_sums(np.multiply(block[i], block[j], dtype=np.float64)))
    return [[math.fsum(parts[max(i, j)][min(i, j)]) for j in range(count)] for i in range(count)]


def add_parts(parts: list[float], more: Iterable[float]) -> None:
    """Append to the numbers whose exact sum is wanted; many of them are replaced by a few with the same exact sum.

    So what is held does not grow with the tensor, and the last bit is as if all were held: math.fsum rounds the exact
    sum; what it has rounded off is again a sum, and so on until nothing is left.

    Example:
        >>> parts = [1e16]
        >>> add_parts(parts, [1.0] * 2000)
        >>> len(parts), math.fsum(parts)
        (1, 1.0000000000002e+16)
    """
    parts += more
    if len(parts) > _PARTS:
        exact: list[float] = []
        while (rest := math.fsum([*parts, *(-x for x in exact)])) != 0:
            exact.append(rest)
        parts[:] = exact


def root_sums(
    squares_base: Iterable[float], squares_model: Iterable[float], products: Iterable[float]
) -> tuple[float, float, float]:
    """(|base|, |model|, <base, model>) from the sums of the chunks, added exactly: their order does not matter."""
    return math.sqrt(math.fsum(squares_base)), math.sqrt(math.fsum(squares_model)), math.fsum(products)


def _chunk_sums(values: npt.NDArray[np.float64]) -> list[float]:
    """The sums of chunks of 4096: element j goes to lane j mod 32, then the lanes are added in order.

    Lanes are what a compiled kernel can keep in registers (`kernels/norms.py` does the same, bit for bit).
    """
    whole = values.size // CHUNK_ELEMENTS * CHUNK_ELEMENTS
    chunks = values[:whole].reshape(-1, CHUNK_ELEMENTS // LANES, LANES)
    sums: list[float] = _add_lanes(np.add.reduce(chunks, axis=1)).tolist()
    if whole < values.size:  # only the end of the tensor is not a whole chunk
        end = np.zeros(-(-(values.size - whole) // LANES) * LANES)
        end[: values.size - whole] = values[whole:]
        sums.append(float(_add_lanes(np.add.reduce(end.reshape(1, -1, LANES), axis=1))[0]))
    return sums


def _add_lanes(lanes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total = lanes[:, 0].copy()
    for j in range(1, LANES):
        total += lanes[:, j]
    return total
