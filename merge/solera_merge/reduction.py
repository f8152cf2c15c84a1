"""Sums over a whole tensor whose last bit does not depend on blocks or threads."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from solera_merge.block import CHUNK_ELEMENTS, Float32, Tensor

__all__ = ["gram", "norms_and_dot"]


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
                part += _chunk_sums(np.multiply(block[i], block[j], dtype=np.float64))
    return [[math.fsum(parts[max(i, j)][min(i, j)]) for j in range(count)] for i in range(count)]


def _chunk_sums(values: npt.NDArray[np.float64]) -> list[float]:
    whole = values.size // CHUNK_ELEMENTS * CHUNK_ELEMENTS
    sums: list[float] = np.add.reduce(values[:whole].reshape(-1, CHUNK_ELEMENTS), axis=1).tolist()
    if whole < values.size:  # only the end of the tensor is not a whole chunk
        sums.append(float(np.add.reduce(values[whole:])))
    return sums
