"""The Karcher mean: the point on the sphere nearest to all models, at their mean norm."""

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.combination import combine, inner
from solera_merge.methods.signature import PerModel
from solera_merge.reduction import gram

__all__ = ["coefficients", "karcher"]

NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=0)]

_CANCELLED = 1e-6  # a shorter sum of unit vectors has no direction; the sine of an angle that counts as 180 degrees


def karcher(
    tensor: Tensor,
    /,
    *,
    weight: PerModel[NotNegative] = (1.0,),
    max_iter: Steps = 10,
    tol: NotNegative = 1e-5,
) -> Formula:
    """W = (sum_i a_i |W_i|) m, m = argmin over |m| = 1 of sum_i a_i angle(m, W_i)^2, a_i = w_i / sum_j w_j.

    Functionality-oriented LLM merging on the Fisher-Rao manifold, arXiv 2603.04972 (its spherical proxy); the tensor
    is one vector. With u_i = W_i / |W_i|, from m = the normalised mean of the u_i, up to `max_iter` times:
    1. theta_i = arccos <m, u_i>, and v = sum_i a_i theta_i / sin(theta_i) (u_i - cos(theta_i) m), the mean of the u_i
       as seen from m; stop where |v| < `tol`;
    2. m <- cos(|v|) m + sin(|v|) v / |v|.

    m is a combination of the models, so all steps are taken on N coefficients, with inner products in fp64: the models
    are read twice whatever `max_iter` is.

    The limits: u_i = m counts with theta / sin(theta) = 1; u_i = -m lies in every direction and is left out of v;
    where the u_i cancel, m begins at the first of them. A zero tensor has no direction and counts in the mean norm
    only. mergekit has no weights, takes angles in the checkpoints' number format, and treats tensors with a norm of
    at most `tol` as zero, so that it erases small ones.

    Args:
        tensor: models; read once more for the inner products.
        weight: w_i; one value for all makes it the plain mean.
        max_iter: steps at most.
        tol: in radians; a shorter step is not taken.

    Returns:
        The formula of a block: N models [n] -> [n].
    """
    factors = coefficients(gram(tensor), weight, max_iter, tol)

    def formula(block: Block) -> Float32:
        return combine(block, factors)

    return formula


def coefficients(
    products: Sequence[Sequence[float]], weight: Sequence[float], max_iter: int, tol: float
) -> list[float]:
    """Of the models in the result: N numbers."""
    count = len(products)
    norms = [math.sqrt(products[i][i]) for i in range(count)]
    divisor = math.fsum(weight)
    share = [w / divisor for w in weight]
    there = [i for i in range(count) if norms[i] > 0 and share[i] > 0]
    if not there:
        return [0.0] * count
    cosines = [[max(-1.0, min(1.0, products[i][j] / norms[i] / norms[j])) for j in there] for i in there]
    present = math.fsum(share[i] for i in there)
    mean = _mean(cosines, [share[i] / present for i in there], max_iter, tol)
    scale = math.fsum(a * norm for a, norm in zip(share, norms, strict=True))
    found = [0.0] * count
    for i, m in zip(there, mean, strict=True):
        found[i] = scale * m / norms[i]
    return found


def _mean(cosines: Sequence[Sequence[float]], share: Sequence[float], max_iter: int, tol: float) -> list[float]:
    """Coefficients of the unit vectors, whose inner products are `cosines`, in their Karcher mean."""
    count = len(share)
    mean = list(share)
    length = _length(cosines, mean)
    mean = [m / length for m in mean] if length > _CANCELLED else [1.0] + [0.0] * (count - 1)
    for _ in range(max_iter):
        towards = [max(-1.0, min(1.0, math.fsum(c * m for c, m in zip(row, mean, strict=True)))) for row in cosines]
        pull = [a * _stretch(c) for a, c in zip(share, towards, strict=True)]
        back = math.fsum(p * c for p, c in zip(pull, towards, strict=True))
        step = [p - back * m for p, m in zip(pull, mean, strict=True)]
        length = _length(cosines, step)
        if length < tol or length == 0:
            break
        mean = [math.cos(length) * m + math.sin(length) * s / length for m, s in zip(mean, step, strict=True)]
        norm = _length(cosines, mean)  # 1 but for rounding
        mean = [m / norm for m in mean]
    return mean


def _length(cosines: Sequence[Sequence[float]], coefficients: Sequence[float]) -> float:
    return math.sqrt(max(inner(cosines, coefficients, coefficients), 0.0))


def _stretch(cosine: float) -> float:
    """Theta / sin(theta); 0 for opposite vectors."""
    theta = math.acos(cosine)
    if theta < _CANCELLED:
        return 1.0
    return theta / math.sin(theta) if math.sin(theta) > _CANCELLED else 0.0
