"""Spherical linear interpolation between two models, or between their task vectors, without a threshold."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.combination import combine
from solera_merge.methods.signature import Finite, PerModel
from solera_merge.reduction import gram

__all__ = ["coefficients", "held_along_first", "nuslerp"]

Float64 = npt.NDArray[np.float64]

# sin(theta)^2 below which two vectors are taken for parallel or opposite. For parallel ones the two branches agree to
# 1e-12; for opposite ones the coefficients would be above 1e6, and float32 could no longer give a direction.
_COLINEAR = 1e-12


def nuslerp(
    tensor: Tensor,
    /,
    *,
    weight: PerModel[Finite],
    nuslerp_row_wise: bool = False,
    nuslerp_flatten: bool = True,
) -> Formula:
    """W = sin((1-t) theta) / sin(theta) x_1 + sin(t theta) / sin(theta) x_2, t = w_2 / (w_1 + w_2).

    Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; the variant is mergekit's. x_i = W_i, or with a
    base x_i = W_i - W_0, and W_0 is added to the result. cos(theta) = <x_1, x_2> / (|x_1| |x_2|), all in fp64. Unlike
    `slerp` nearly parallel vectors stay on the arc; W = (1-t) x_1 + t x_2 where sin(theta) <= 1e-6 or a vector is zero.

    What is one vector: the whole tensor (`nuslerp_flatten`); else every row, that is all elements along the last axis;
    or with `nuslerp_row_wise` all elements along the first axis. (The names are mergekit's; what it calls row-wise are
    the columns of a matrix as it is stored, [out, in].) Of a vector or a scalar it is always the whole.

    mergekit takes angles in the checkpoints' number format (for bf16 in steps of 5 degrees near 0), takes a zero vector
    for one at 90 degrees and shrinks vectors shorter than 1e-7; and t is 0.5 there for weights that sum to 0, which
    the plan refuses here.

    Args:
        tensor: two models, perhaps a base; read once more for the norms, except for rows. Along the first axis
            80 bytes are held for every element of size / shape[0].
        weight: w_i; a weight of 0 gives the other model, values of opposite sign extrapolate.
        nuslerp_row_wise: vectors along the first axis; without effect if nuslerp_flatten.
        nuslerp_flatten: the whole tensor is one vector.

    Returns:
        The formula of a block of whole rows: two models [n], perhaps a base [n] -> [n].
    """
    t = weight[1] / (weight[0] + weight[1])
    if nuslerp_flatten or len(tensor.shape) < 2:
        return _whole(tensor, t)
    return _along_first(tensor, t) if nuslerp_row_wise else _along_last(tensor.shape[-1], t)


def held_along_first(shape: tuple[int, ...], parameters: Mapping[str, Any]) -> int:
    """Bytes: sums, and what the coefficients are computed with (measured: 75 a vector)."""
    if parameters["nuslerp_flatten"] or not parameters["nuslerp_row_wise"] or len(shape) < 2:
        return 0
    return 80 * math.prod(shape[1:])


def _whole(tensor: Tensor, t: float) -> Formula:
    factors = coefficients(gram(tensor), t)
    return lambda block: combine(block, factors)


def coefficients(products: Sequence[Sequence[float]], t: float) -> list[float]:
    """Of the two models in the result, from their inner products [2][2]."""
    (aa, ab), (_, bb) = products
    return [float(c) for c in _coefficients(t, np.asarray(aa), np.asarray(bb), np.asarray(ab))]


def _along_last(width: int, t: float) -> Formula:
    def formula(block: Block) -> Float32:
        a, b = (x.astype(np.float64).reshape(-1, width) for x in block.vectors)
        found = _coefficients(t, np.sum(a * a, axis=1), np.sum(b * b, axis=1), np.sum(a * b, axis=1))
        return combine(block, [np.repeat(c, width) for c in found])

    return formula


def _along_first(tensor: Tensor, t: float) -> Formula:
    columns = tensor.size // max(tensor.shape[0], 1)
    aa, bb, ab = np.zeros((3, columns))
    for block in tensor.blocks():
        a, b = (x.astype(np.float64) for x in block.vectors)
        done = 0
        while done < a.size:  # one row after the other, in order, so that the sums do not depend on the blocks
            first = (block.start + done) % columns
            stop = min(done + columns - first, a.size)
            into = slice(first, first + stop - done)
            x, y = a[done:stop], b[done:stop]
            aa[into] += x * x
            bb[into] += y * y
            ab[into] += x * y
            done = stop
    found = _coefficients(t, aa, bb, ab)

    def formula(block: Block) -> Float32:
        column = (block.start + np.arange(block.models[0].size)) % columns
        return combine(block, [c[column] for c in found])

    return formula


def _coefficients(t: float, aa: Float64, bb: Float64, ab: Float64) -> tuple[Float32, Float32]:
    """Of x_1 and x_2, [k] each, from k squared norms and k inner products."""
    product = np.sqrt(aa) * np.sqrt(bb)
    cosine = np.clip(ab / np.where(product > 0, product, 1.0), -1.0, 1.0)
    straight = (product == 0) | (1.0 - cosine * cosine <= _COLINEAR)
    theta = np.arccos(np.where(straight, 0.0, cosine))
    first = np.where(straight, 1.0 - t, np.sin((1.0 - t) * theta) / np.sin(theta))
    second = np.where(straight, t, np.sin(t * theta) / np.sin(theta))
    return first.astype(np.float32), second.astype(np.float32)
