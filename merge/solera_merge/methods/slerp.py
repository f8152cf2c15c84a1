"""Spherical linear interpolation between a base and one model."""

import math

import numpy as np

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.methods.signature import Finite
from solera_merge.reduction import norms_and_dot

__all__ = ["coefficients", "slerp"]

_NEARLY_PARALLEL = 0.9995  # mergekit's threshold; sin(theta) = 0.03 there, and the two branches differ by 2e-4 relative


def slerp(tensor: Tensor, /, *, t: Finite) -> Formula:
    """W = sin((1-t) theta) / sin(theta) W_0 + sin(t theta) / sin(theta) W_1, cos(theta) = <W_0, W_1> / (|W_0| |W_1|).

    Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985. The whole tensor is one vector; norms and the
    dot product are taken in fp64. Vectors that are nearly parallel or opposite (|cos| > 0.9995), or zero, have no
    useful arc between them: W = (1-t) W_0 + t W_1. Fine-tunes of one base nearly always take that branch.

    mergekit divides a zero vector by 1 and so takes the angle for 90 degrees; here a zero vector means linear.

    Args:
        tensor: base and model; read once for the norms.
        t: 0 gives the base, 1 the model; values outside extrapolate.

    Returns:
        The formula of a block: base [n], model [n] -> [n].
    """
    norm_base, norm_model, dot = norms_and_dot(tensor)
    c_base, c_model = (np.float32(c) for c in coefficients(t, norm_base, norm_model, dot))

    def formula(block: Block) -> Float32:
        assert block.base is not None
        out = block.base * c_base
        out += block.models[0] * c_model
        return out

    return formula


def coefficients(t: float, norm_base: float, norm_model: float, dot: float) -> tuple[float, float]:
    """The factors of base and model, from their norms and their dot product."""
    if norm_base == 0 or norm_model == 0:
        return 1 - t, t
    cosine = max(-1.0, min(1.0, dot / norm_base / norm_model))
    if abs(cosine) > _NEARLY_PARALLEL:
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
