"""Arcee Fusion: take the model's value where the change is important, the base's elsewhere."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.selection import order_statistics

__all__ = ["arcee_fusion", "held_divergences", "threshold_of"]


def arcee_fusion(tensor: Tensor, /) -> Formula:
    """W = W_1 where s >= median(s) + 1.5 (Q3(s) - Q1(s)), else W_0; s = |W_1 - W_0| KL(softmax W_1 || softmax W_0).

    Arcee Fusion as mergekit has it (arcee.ai; there is no paper). The softmax and the divergence run over each row
    (last axis) in fp64; the three quartiles are those of all elements of the tensor, exact: the elements of rank
    (n-1) // 4, (n-1) // 2 and 3 (n-1) // 4 in ascending order, found without sorting (`solera_merge.selection`).
    If at most a quarter of the elements are important at all (s > 0), the threshold is 0 and W = W_1.

    mergekit estimates the quartiles from a random million of the elements when there are more, so that two runs
    differ, and computes in the checkpoints' number format: with a relative change of 0.3 % the divergence is about
    1e-9, below the rounding errors even of float32 softmaxes. It also adds 1e-8 to every probability.

    Args:
        tensor: base and model; read three times more. 4 bytes a row are held.

    Returns:
        The formula of a block of whole rows: base [n], model [n] -> [n].
    """
    width = max(tensor.shape[-1] if tensor.shape else 1, 1)
    divergence = np.zeros(tensor.size // width, np.float32)
    for block in tensor.blocks("rows"):
        divergence[_rows(block, width)] = _divergence(block, width)

    def importance(block: Block) -> Float32:
        return np.abs(block.deltas[0]) * np.repeat(divergence[_rows(block, width)], width)

    def passes() -> Iterator[Float32]:
        return (importance(block) for block in tensor.blocks("rows"))

    threshold = threshold_of(passes, tensor.size)

    def formula(block: Block) -> Float32:
        assert block.base is not None
        return np.where(importance(block) >= threshold, block.models[0], block.base)

    return formula


def held_divergences(shape: tuple[int, ...], _parameters: Mapping[str, Any]) -> int:
    """Bytes: one float32 a row."""
    return 4 * math.prod(shape[:-1])


def threshold_of(passes: Callable[[], Iterator[Float32]], size: int) -> np.float32:
    """Median + 1.5 times the distance of the quartiles of what every pass yields, `size` numbers of at least 0."""
    last = max(size - 1, 0)
    low, median, high = order_statistics(passes, [last // 4, last // 2, 3 * last // 4])
    return np.float32(median + 1.5 * (high - low))


def _rows(block: Block, width: int) -> slice:
    return slice(block.start // width, block.start // width + block.models[0].size // width)


def _divergence(block: Block, width: int) -> Float32:
    """KL(softmax W_1 || softmax W_0) of every row, [rows]."""
    from solera_merge.kernels.fusion import row_divergences

    assert block.base is not None
    out = np.empty(block.base.size // width, np.float32)
    row_divergences(np.ascontiguousarray(block.models[0]), np.ascontiguousarray(block.base), width, out)
    return out
