"""Arcee Fusion: take the model's value where the change is important, the base's elsewhere."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.selection import order_statistics

__all__ = ["arcee_fusion"]

Float64 = npt.NDArray[np.float64]


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

    last = max(tensor.size - 1, 0)
    low, median, high = order_statistics(passes, [last // 4, last // 2, 3 * last // 4])
    threshold = np.float32(median + 1.5 * (high - low))

    def formula(block: Block) -> Float32:
        assert block.base is not None
        return np.where(importance(block) >= threshold, block.models[0], block.base)

    return formula


def _rows(block: Block, width: int) -> slice:
    return slice(block.start // width, block.start // width + block.models[0].size // width)


def _divergence(block: Block, width: int) -> Float32:
    """KL(softmax W_1 || softmax W_0) of every row, [rows]; not below 0, which only rounding could make it."""
    assert block.base is not None
    log_p = _log_softmax(block.models[0], width)
    log_q = _log_softmax(block.base, width)
    divergence: Float64 = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
    return np.maximum(divergence, 0.0).astype(np.float32)


def _log_softmax(x: Float32, width: int) -> Float64:
    rows: Float64 = x.astype(np.float64).reshape(-1, width)
    rows -= np.max(rows, axis=1, keepdims=True)
    rows -= np.log(np.sum(np.exp(rows), axis=1, keepdims=True))
    return rows
