"""Sums over a whole tensor whose last bit does not depend on blocks or threads."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from solera_merge.block import CHUNK_ELEMENTS, Block, Float32, Tensor

__all__ = ["norms_and_dot", "sums_of_squares"]


def norms_and_dot(tensor: Tensor) -> tuple[float, float, float]:
    """(|base|, |model|, <base, model>) of the base and the one model, in one pass, fp64.

    Products of float32 are exact in float64. They are summed in chunks of fixed length at fixed places, and the sums
    of the chunks are added exactly (math.fsum), so the result has one value whatever the block size. BLAS is avoided:
    it splits a dot product by the number of threads.
    """
    squares_base: list[float] = []
    squares_model: list[float] = []
    products: list[float] = []
    for block in tensor.blocks():
        assert block.base is not None
        a, b = block.base.astype(np.float64), block.models[0].astype(np.float64)
        squares_base += _chunk_sums(a * a)
        squares_model += _chunk_sums(b * b)
        products += _chunk_sums(a * b)
    return math.sqrt(math.fsum(squares_base)), math.sqrt(math.fsum(squares_model)), math.fsum(products)


def sums_of_squares(tensor: Tensor, vectors: Callable[[Block], Sequence[Float32]]) -> list[float]:
    """Sum x^2 over the whole tensor for every x that `vectors` makes of a block, in one pass, fp64; as above.

    Args:
        tensor: read once.
        vectors: block -> equally many vectors [n] for every block.
    """
    sums: list[list[float]] = []
    for block in tensor.blocks():
        found = vectors(block)
        sums = sums or [[] for _ in found]
        for partial_sums, x in zip(sums, found, strict=True):
            wide = x.astype(np.float64)
            partial_sums += _chunk_sums(wide * wide)
    return [math.fsum(partial_sums) for partial_sums in sums]


def _chunk_sums(values: npt.NDArray[np.float64]) -> list[float]:
    whole = values.size // CHUNK_ELEMENTS * CHUNK_ELEMENTS
    sums: list[float] = np.add.reduce(values[:whole].reshape(-1, CHUNK_ELEMENTS), axis=1).tolist()
    if whole < values.size:  # only the end of the tensor is not a whole chunk
        sums.append(float(np.add.reduce(values[whole:])))
    return sums
