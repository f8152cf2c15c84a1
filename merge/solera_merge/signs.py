"""Sign election: where task vectors disagree, the heavier side wins (TIES, arXiv 2306.01708, 3.2)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from solera_merge.block import Float32

__all__ = ["disjoint_merge", "elect_sign", "total"]


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


def disjoint_merge(deltas: Sequence[Float32], weight: Sequence[float], *, normalize: bool, scale: float) -> Float32:
    """Lambda times sum_i [agrees] w_i tau_i, divided by sum_i [agrees] |w_i| if normalized (0 where none agrees), [n].

    A model agrees where its weighted delta is not 0 and has the elected sign (TIES, section 3.2, steps 2 and 3).
    """
    weighted = [delta * np.float32(w) for delta, w in zip(deltas, weight, strict=True)]
    plus = elect_sign(weighted)
    agrees = [(term != 0) & ((term > 0) == plus) for term in weighted]
    out = total([term * mask for term, mask in zip(weighted, agrees, strict=True)])
    if normalize:
        divisor = total([mask * np.float32(abs(w)) for mask, w in zip(agrees, weight, strict=True)])
        divisor[divisor == 0] = 1
        out /= divisor
    if scale != 1:
        out *= np.float32(scale)
    return out
