"""RAM: a change that one model alone makes is kept whole, changes that several make are averaged.

`ram`, `ramplus_tl` and `ramplus` differ in one factor: by how much the changes of a single model are scaled up.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.methods.signature import Finite, NonNegative
from solera_merge.selection import Each, one_after_another
from solera_merge.signs import total

__all__ = ["count_model", "ram", "ramplus", "ramplus_tl", "scales"]

Counts: TypeAlias = Sequence[tuple[int, int]]  # a model: elements that it changes with others, and alone


def ram(tensor: Tensor, /, *, epsilon: NonNegative = 1e-5) -> Formula:
    """W = W_0 + sum_i m_i tau_i / c, m_i = [|tau_i| > epsilon], c = sum_i m_i (0 where nothing changes).

    Reinforced Agent Merging, arXiv 2601.13572. Reinforcement learning changes few elements, and different
    ones in each model; there a plain average would divide by N what only one model has learnt.

    The same as mergekit's `ram`, which does not have the paper's lambda either (there it is 1).

    Args:
        tensor: base and models; only the number of models is used.
        epsilon: a change of at most this much is none. An absolute size: weights that are small need a smaller one.

    Returns:
        The formula of a block: base [n], N models [n] -> [n].
    """
    return _selective(epsilon, [1.0] * len(tensor.keys))


def ramplus_tl(tensor: Tensor, /, *, r: Finite = 0.1, alpha: NonNegative = 0.2, epsilon: NonNegative = 1e-5) -> Formula:
    """As ram, with lambda_i tau_i where model i alone changes an element: lambda_i = 1 + r min(rho_i, alpha).

    rho_i = (elements that model i changes with others) / (elements that it alone changes), within this tensor, as
    mergekit does ("tensor-local"). The paper counts over the whole model: that is `ramplus`.

    Args:
        tensor: base and models; read once more for the counts.
        r: how much the overlap scales up.
        alpha: the largest overlap that counts.
        epsilon: a change of at most this much is none.

    Returns:
        The formula of a block: base [n], N models [n] -> [n].
    """
    return _selective(epsilon, scales(_count_tensor(tensor, epsilon), r, alpha))


def ramplus(
    _tensor: Tensor, counts: Counts, /, *, r: Finite = 0.1, alpha: NonNegative = 0.2, epsilon: NonNegative = 1e-5
) -> Formula:
    """As ram, with lambda_i tau_i where model i alone changes an element: lambda_i = 1 + r min(rho_i, alpha).

    RAM+, arXiv 2601.13572: rho_i = (elements that model i changes with others) / (elements that it alone
    changes), over the whole model. In merges of slices the counts of a model are those of the layers that it gives.

    The paper's clip of rho_i to [0, alpha] is written as min, because a ratio of counts is not negative. Where a model
    changes nothing alone its lambda applies to nothing, and is 1 + r alpha (if it shares changes at all). The authors'
    script has alpha = 1 and calls 1 + r the rescale factor; mergekit has this method per tensor only (`ramplus_tl`).

    Args:
        counts: what `count_model` found: for every model of this tensor (shared, alone).
        r: how much the overlap scales up.
        alpha: the largest overlap that counts.
        epsilon: a change of at most this much is none.

    Returns:
        The formula of a block: base [n], N models [n] -> [n].
    """
    return _selective(epsilon, scales(counts, r, alpha))


def count_model(
    tensors: Sequence[Tensor], parameters: Sequence[Mapping[str, Any]], each: Each = one_after_another
) -> list[Counts]:
    """For every tensor the (shared, alone) counts of its models, over all tensors of the merge.

    Args:
        tensors: all that `ramplus` merges.
        parameters: of each; only `epsilon` is used.
        each: how to go over the tensors.
    """
    found: list[Counts] = [()] * len(tensors)

    def count(i: int) -> None:
        found[i] = _count_tensor(tensors[i], parameters[i]["epsilon"])

    each(count, range(len(tensors)))
    sums: dict[int, tuple[int, int]] = {}
    for tensor, counts in zip(tensors, found, strict=True):
        for model, (shared, alone) in zip(tensor.model_ids, counts, strict=True):
            before = sums.get(model, (0, 0))
            sums[model] = (before[0] + shared, before[1] + alone)
    return [[sums[model] for model in tensor.model_ids] for tensor in tensors]


def _count_tensor(tensor: Tensor, epsilon: float) -> Counts:
    shared, alone = [0] * len(tensor.keys), [0] * len(tensor.keys)
    for block in tensor.blocks():
        changed, number = _changes(block.deltas, epsilon)
        for i, mask in enumerate(changed):
            shared[i] += int(np.count_nonzero(mask & (number > 1)))
            alone[i] += int(np.count_nonzero(mask & (number == 1)))
    return list(zip(shared, alone, strict=True))


def _changes(deltas: Sequence[Float32], epsilon: float) -> tuple[list[npt.NDArray[np.bool_]], Float32]:
    """(which elements each model changes [n], how many models change an element [n])."""
    changed = [np.abs(delta) > np.float32(epsilon) for delta in deltas]
    return changed, total([mask.astype(np.float32) for mask in changed])


def scales(counts: Counts, r: float, alpha: float) -> list[float]:
    """What the changes of a single model are multiplied by: 1 + r min(shared / alone, alpha), a model."""
    ratios = [shared / alone if alone else math.inf if shared else 0.0 for shared, alone in counts]
    return [1 + r * min(ratio, alpha) for ratio in ratios]


def _selective(epsilon: float, scales: Sequence[float]) -> Formula:
    """W_0 + the average of the changes that several models make, or scale_i times the change of the only one."""

    def formula(block: Block) -> Float32:
        deltas = block.deltas
        changed, number = _changes(deltas, epsilon)
        divisor = np.maximum(number, np.float32(1))
        terms: list[Float32] = []
        for delta, mask, scale in zip(deltas, changed, scales, strict=True):
            term = delta * mask
            if scale != 1:
                term *= np.where(number == 1, np.float32(scale), np.float32(1))
            term /= divisor
            terms.append(term)
        out = total(terms)
        assert block.base is not None
        out += block.base
        return out

    return formula
