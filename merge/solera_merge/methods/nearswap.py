"""Take the other model's value where it is near the base's, and go only a step towards it elsewhere."""

from typing import Annotated

import numpy as np
from pydantic import Field

from solera_merge.block import Block, Float32, Formula, Tensor

__all__ = ["nearswap"]

NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


def nearswap(_tensor: Tensor, /, *, t: NotNegative) -> Formula:
    """W = W_1 where |W_1 - W_0| <= t, else W_0 + t sign(W_1 - W_0).

    huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001, there as W = (1-a) W_0 + a W_1 with a = min(1, t / |W_1 -
    W_0|), which is the same: no element moves by more than t.

    mergekit bounds |W_1 - W_0| from below by 1e-6, so that a t below that takes less than the whole of a difference
    that is smaller still. A negative t, which always gave the base, is refused here.

    Args:
        t: how far an element may move; 0 gives the base.

    Returns:
        The formula of a block: base [n], model [n] -> [n].
    """
    step = np.float32(t)

    def formula(block: Block) -> Float32:
        assert block.base is not None
        model = block.models[0]
        delta = model - block.base
        return np.where(np.abs(delta) <= step, model, block.base + np.sign(delta) * step)

    return formula
