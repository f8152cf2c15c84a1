"""Sums over a whole tensor whose last bit does not depend on blocks or threads."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from solera_merge.block import CHUNK_ELEMENTS, Block, Float32, Tensor

__all__ = [
    "LANES",
    "add_parts",
    "gram",
    "norms_and_dot",
    "root_sums",
    "sums_of_magnitudes",
    "sums_of_squares",
    "symmetric",
]

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
    pairs = [(i, j) for i in range(count) for j in range(i + 1)]
    parts: list[list[float]] = [[] for _ in pairs]
    for block in blocks:
        for part, (i, j) in zip(parts, pairs, strict=True):
            add_parts(part, _chunk_dots(block[i], block[j]))
    return symmetric([math.fsum(part) for part in parts], count)


def symmetric(lower: Sequence[float], count: int) -> list[list[float]]:
    """The matrix [N][N] of its entries (i, j) with j <= i, in the order (0, 0), (1, 0), (1, 1), (2, 0), ...

    Example:
        >>> symmetric([1.0, 2.0, 3.0], 2)
        [[1.0, 2.0], [2.0, 3.0]]
    """
    rows = [lower[i * (i + 1) // 2 :][: i + 1] for i in range(count)]
    return [[rows[max(i, j)][min(i, j)] for j in range(count)] for i in range(count)]


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


def sums_of_squares(tensor: Tensor, vectors: Callable[[Block], Sequence[Float32]]) -> list[float]:
    """Sum x^2 over the whole tensor for every x that `vectors` makes of a block, in one pass, fp64; as above.

    Args:
        tensor: read once.
        vectors: block -> equally many vectors [n] for every block.
    """
    return _sums(tensor, vectors, lambda x: x)


def sums_of_magnitudes(tensor: Tensor, vectors: Callable[[Block], Sequence[Float32]]) -> list[float]:
    """Sum |x| in the same way."""
    return _sums(tensor, vectors, np.sign)


def _sums(
    tensor: Tensor, vectors: Callable[[Block], Sequence[Float32]], factor: Callable[[Float32], Float32]
) -> list[float]:
    """Sum x factor(x) for every x."""
    sums: list[list[float]] = []
    for block in tensor.blocks():
        found = vectors(block)
        sums = sums or [[] for _ in found]
        for partial_sums, x in zip(sums, found, strict=True):
            add_parts(partial_sums, _chunk_dots(x, factor(x)))
    return [math.fsum(partial_sums) for partial_sums in sums]


def _chunk_dots(a: Float32, b: Float32) -> list[float]:
    """Sum a * b over chunks of 4096 in float64: element j goes to lane j mod 32, then the lanes are added in order."""
    from solera_merge.kernels.norms import dot_chunks

    sums = np.empty(-(-a.size // CHUNK_ELEMENTS))
    dot_chunks(np.ascontiguousarray(a), np.ascontiguousarray(b), CHUNK_ELEMENTS, LANES, sums)
    return sums.tolist()
