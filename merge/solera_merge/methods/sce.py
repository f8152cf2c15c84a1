"""SCE: select the elements about which the models differ most, weigh the models by what they changed, erase minorities.

"Select, calculate, erase" of FuseChat.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.methods.signature import Fraction
from solera_merge.reduction import sums_of_squares
from solera_merge.selection import KEEP_ALL, Ranked, cuts
from solera_merge.signs import elect_sign, sum_of_agreeing
from solera_merge.task_vectors import Sparsify, on_base

__all__ = ["count_selected", "sce", "shares"]


def sce(tensor: Tensor, /, *, select_topk: Fraction = 1.0, int8_mask: bool = False) -> Formula:
    """W = W_0 + sum_i [sign(tau_i) = s] w_i tau_i / sum_i [sign(tau_i) = s] w_i, w_i = |tau_i|^2 / sum_j |tau_j|^2.

    FuseChat, arXiv 2408.07990, the section on merging ("SCE"):
    1. select: of the elements of a tensor whose variance over the models tau_1 .. tau_N is not 0, the `select_topk`
       share with the largest variance is kept (exact; ties by flat index; at least one), all others become 0. With 1
       all are kept, those that the models agree about too;
    2. calculate: w_i from the squares of what was kept, over the whole tensor, in fp64;
    3. erase: s = sign(sum_i tau_i), a sum of 0 counts as plus; the weighted mean of those that have the elected sign.

    mergekit replaces w_i by 1/N where the mean squares of all tau_i sum to less than 1e-6. Differences of 5e-4, as
    fine-tuning makes, are below that already, so that its result usually has no coefficients; here only tau = 0 has
    none. It also keeps the divisor above 1e-6, which shrinks the change of a model with a share below that; and it
    drops all changes of a tensor with fewer than 1 / select_topk elements.

    Args:
        tensor: base and models; read up to four times.
        select_topk: share of the elements that is kept.
        int8_mask: accepted because mergekit recipes carry it; no mask is stored here, so it changes nothing.

    Returns:
        The formula of a block: base [n], N models [n] -> [n].
    """
    del int8_mask
    select = _select(tensor, select_topk)
    squares = sums_of_squares(tensor, select)
    weight = shares(squares)

    def combine(deltas: Sequence[Float32]) -> Float32:
        plus = elect_sign(deltas)
        weighted = [delta * np.float32(w) for delta, w in zip(deltas, weight, strict=True)]
        return sum_of_agreeing(weighted, weight, plus, normalize=True)

    return on_base(select, combine)


def shares(squares: Sequence[float]) -> list[float]:
    """The weights w_i of the models."""
    whole = sum(squares) or 1.0  # nothing changed: all terms are 0, whatever the weights
    return [s / whole for s in squares]


def count_selected(share: float, differing: int) -> int:
    """How many of the elements about which the models differ are kept."""
    return max(1, int(share * differing)) if share > 0 and differing > 0 else 0


def _select(tensor: Tensor, share: float) -> Sparsify:
    """The task vectors, of which only the elements of largest variance are left."""
    whole = Ranked((0,), partial(count_selected, share))
    cut = KEEP_ALL if share >= 1 else cuts([tensor], [whole], lambda block, _: _spread(block.deltas))[0][0]

    def select(block: Block) -> list[Float32]:
        deltas = block.deltas
        if cut is KEEP_ALL:
            return deltas
        mask = cut.keeps(_spread(deltas), block.start)
        return [delta * mask for delta in deltas]

    return select


def _spread(deltas: Sequence[Float32]) -> Float32:
    """N times the variance over the N models, [n] float32; computed in fp64: 0 just where all are equal."""
    wide = [delta.astype(np.float64) for delta in deltas]
    mean = sum(wide) / len(wide)
    squares = [(delta - mean) ** 2 for delta in wide]
    return np.asarray(sum(squares), np.float32)
