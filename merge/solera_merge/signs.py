"""Combining task vectors: a weighted sum, or that of the models that agree with an elected sign.

Sign election: where task vectors disagree, the heavier side wins (TIES, arXiv 2306.01708, 3.2).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from solera_merge.block import Float32

__all__ = ["disjoint_merge", "elect_sign", "sum_of_agreeing", "total", "weighted_sum"]


def total(terms: Sequence[Float32]) -> Float32:
    """sum_i terms_i in the given order, [n] float32; the terms are not changed."""
    out = terms[0].copy()
    for term in terms[1:]:
        out += term
    return out


def elect_sign(weighted: Sequence[Float32]) -> npt.NDArray[np.bool_]:
    """True where the elected sign is plus: sum_i w_i tau_i >= 0, [n] bool.

    A sum of exactly 0 elects plus, as mergekit does. (The authors' code takes the sign that is in the majority over
    the whole tensor there, which would need another pass for a case that hardly occurs in float32.)
    """
    return total(weighted) >= 0


def sum_of_agreeing(
    weighted: Sequence[Float32], weight: Sequence[float], plus: npt.NDArray[np.bool_], *, normalize: bool
) -> Float32:
    """sum_i [agrees] w_i tau_i, divided by sum_i [agrees] |w_i| if normalized (0 where none agrees), [n] float32.

    A model agrees where its weighted delta is not 0 and has the elected sign (TIES, section 3.2, step 3).

    Args:
        weighted: w_i tau_i, [n] each.
        weight: w_i.
        plus: where the elected sign is plus, [n].
        normalize: divide by the weights of those that agree.
    """
    agrees = [(term != 0) & ((term > 0) == plus) for term in weighted]
    out = total([term * mask for term, mask in zip(weighted, agrees, strict=True)])
    if normalize:
        divisor = total([mask * np.float32(abs(w)) for mask, w in zip(agrees, weight, strict=True)])
        divisor[divisor == 0] = 1
        out /= divisor
    return out


def disjoint_merge(deltas: Sequence[Float32], weight: Sequence[float], *, normalize: bool, scale: float) -> Float32:
    """Lambda times the sum of those w_i tau_i that agree with the sign they elect (`sum_of_agreeing`), [n] float32."""
    weighted = _weighted(deltas, weight)
    out = sum_of_agreeing(weighted, weight, elect_sign(weighted), normalize=normalize)
    return _scaled(out, scale)


def weighted_sum(deltas: Sequence[Float32], weight: Sequence[float], *, normalize: bool, scale: float) -> Float32:
    """Lambda times sum_i w_i tau_i, divided by sum_i w_i if normalized, [n] float32.

    Weights that are all 0 (a gradient may begin so) give 0; the plan refuses other weights with a sum of 0.
    """
    out = total(_weighted(deltas, weight))
    divisor = np.float32(sum(weight) or 1.0)
    if normalize and divisor != 1:
        out /= divisor
    return _scaled(out, scale)


def _weighted(deltas: Sequence[Float32], weight: Sequence[float]) -> list[Float32]:
    return [delta * np.float32(w) for delta, w in zip(deltas, weight, strict=True)]


def _scaled(x: Float32, scale: float) -> Float32:
    if scale != 1:
        x *= np.float32(scale)
    return x
