"""Weighted mean direction of several models on the sphere, at their weighted mean norm."""

import math
from collections.abc import Sequence

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.combination import combine, inner
from solera_merge.methods.signature import Finite, PerModel
from solera_merge.reduction import gram

__all__ = ["coefficients", "multislerp"]

_CANCELLED = 1e-6  # a shorter sum of unit vectors has no direction that float32 could give


def multislerp(
    tensor: Tensor,
    /,
    *,
    weight: PerModel[Finite],
    normalize_weights: bool = True,
    eps: Finite = 1e-8,
) -> Formula:
    """W = (sum_i w_i |x_i|) m / |m|, m = sum_i w_i x_i / |x_i|.

    goddard.blog/posts/multislerp-wow-what-a-cool-idea, as in mergekit. x_i = W_i, or with a base x_i = W_i - W_0, and
    W_0 is added to the result. The tensor is one vector; norms and dot products in fp64.

    mergekit goes on from m / |m|: it projects the unit vectors u_i on the tangent space there, takes their weighted
    sum and walks along it. That sum is sum_i w_i u_i - <sum_i w_i u_i, m/|m|> m/|m| = m - |m| m/|m| = 0, so the walk
    is of length 0 for any weights, but for rounding; it is left out here. (`karcher` takes the mean on the sphere.)

    Where the directions cancel (|m| <= 1e-6 sum_i |w_i|): the weighted sum sum_i w_i x_i. So does mergekit with two
    models; with more it stops. A zero vector has no direction, and counts in the mean norm only. mergekit adds `eps`
    to every norm, which pulls m away from short vectors, and returns a single model as it is whatever its weight.

    Args:
        tensor: models, perhaps a base; read once more for the inner products.
        weight: w_i.
        normalize_weights: divide the weights by their sum first.
        eps: a vector of at most this norm is a zero vector; |m| is held to it as well where it is above 1e-6.

    Returns:
        The formula of a block: N models [n], perhaps a base [n] -> [n].
    """
    divisor = math.fsum(weight) if normalize_weights else 1.0
    factors = coefficients(gram(tensor), [w / divisor for w in weight], eps)

    def formula(block: Block) -> Float32:
        return combine(block, factors)

    return formula


def coefficients(products: Sequence[Sequence[float]], weight: Sequence[float], eps: float) -> list[float]:
    """Of the models in the result, from their inner products: N numbers."""
    norms = [math.sqrt(products[i][i]) for i in range(len(weight))]
    mean = [w / norm if norm > eps else 0.0 for w, norm in zip(weight, norms, strict=True)]
    length = math.sqrt(max(inner(products, mean, mean), 0.0))
    if length <= max(eps, _CANCELLED) * math.fsum(map(abs, weight)):
        return list(weight)
    scale = math.fsum(w * norm for w, norm in zip(weight, norms, strict=True)) / length
    return [scale * m for m in mean]
