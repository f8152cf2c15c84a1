"""TIES: trim small changes, elect a sign, average the models that agree with it."""

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.methods.signature import Finite, Fraction, PerModel
from solera_merge.selection import largest_deltas
from solera_merge.signs import disjoint_merge

__all__ = ["ties"]


def ties(
    tensor: Tensor,
    /,
    *,
    weight: PerModel[Finite],
    density: PerModel[Fraction] = (1.0,),
    normalize: bool = True,
    lambda_: Finite = 1.0,
    int8_mask: bool = False,
) -> Formula:
    """W = W_0 + lambda sum_i [sign(w_i tau_i) = s] w_i tau_i / sum_i [sign(w_i tau_i) = s] |w_i|.

    TIES-merging, arXiv 2306.01708, section 3.2:
    1. tau_i = W_i - W_0, of which only the `density` largest by magnitude are kept (exact; ties by flat index);
    2. s = sign(sum_i w_i tau_i), a sum of 0 counts as plus;
    3. the weighted mean of those that have the elected sign.

    The paper trims over the whole model; as in mergekit the trim here is per tensor. mergekit divides by sum w_i, not
    sum |w_i|: the same for positive weights, but with mixed signs the divisor can almost vanish (weights 1 and -0.99
    and deltas of 0.01 give a merged delta of 1.99 there, 0.01 here).

    Args:
        tensor: base and models; read up to three times where a density is below 1.
        weight: w_i.
        density: share of the task vector that is kept.
        normalize: divide by the weights of the agreeing models; without it a plain sum.
        lambda_: scale of the merged task vector.
        int8_mask: accepted because mergekit recipes carry it; no mask is stored here, so it changes nothing.

    Returns:
        The formula of a block: base [n], N models [n] -> [n].
    """
    del int8_mask
    cuts = largest_deltas(tensor, density)

    def formula(block: Block) -> Float32:
        kept = [delta * cut.keeps(delta, block.start) for delta, cut in zip(block.deltas, cuts, strict=True)]
        out = disjoint_merge(kept, weight, normalize=normalize, scale=lambda_)
        assert block.base is not None
        out += block.base
        return out

    return formula
