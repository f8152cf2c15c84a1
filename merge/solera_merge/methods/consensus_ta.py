"""Task arithmetic on the elements that matter to several tasks."""

from typing import Annotated

import numpy as np
from pydantic import Field

from solera_core.errors import ConfigError
from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.methods.signature import Finite, NonNegative, PerModel
from solera_merge.signs import total

__all__ = ["consensus_ta"]


def consensus_ta(
    tensor: Tensor,
    /,
    *,
    k: Annotated[int, Field(ge=0)] = 2,
    tall_lambda: PerModel[NonNegative] = (0.4,),
    lambda_: Finite = 1.0,
) -> Formula:
    """W = W_0 + lambda [sum_i m_i >= k] tau, tau = sum_i tau_i, m_i = [|tau_i| >= tall_lambda_i |tau - tau_i|].

    Consensus Merging with task arithmetic, arXiv 2405.07813 (TALL-masks). The mask m_i has the
    elements of the sum that task i needs: those where its own change is large beside the sum of all others. Elements
    that fewer than k tasks need are set to the base: k = 1 removes the "catastrophic" ones (needed by none), k = 2 the
    "selfish" ones too (needed by one task only).

    The comparison is the paper's; the authors' code has > for >=, which differs where both sides are equal, so for
    elements that task i and the sum leave as they are (m_i then multiplies 0) and for tall_lambda_i = 0. The paper
    chooses each tall_lambda from 0.2 to 0.6 by validation accuracy; 0.4 is the middle. mergekit does not have this
    method.

    Args:
        tensor: base and models; only the number of models is used.
        k: how many tasks must need an element. 0 keeps all: task arithmetic with weights of 1.
        tall_lambda: how far the sum of the other changes may exceed the model's own: |tau - tau_i| <= |tau_i| /
            tall_lambda_i. A larger value makes a smaller mask.
        lambda_: scale of the merged task vector (the paper's alpha, found by validation).

    Returns:
        The formula of a block: base [n], N models [n] -> [n].

    Raises:
        ConfigError: k is above the number of models, so that nothing would be left of them.
    """
    if k > len(tensor.keys):
        raise ConfigError(
            f"parameters.k: {k} tasks must need an element, but {tensor.name!r} is merged from {len(tensor.keys)} "
            "models: nothing would be left of them; choose a smaller k"
        )
    thresholds = [np.float32(value) for value in tall_lambda]

    def formula(block: Block) -> Float32:
        deltas = block.deltas
        out = total(deltas)
        needed = [
            np.abs(delta) >= np.abs(out - delta) * threshold
            for delta, threshold in zip(deltas, thresholds, strict=True)
        ]
        out = out * (total([mask.astype(np.float32) for mask in needed]) >= k)
        if lambda_ != 1:
            out *= np.float32(lambda_)
        assert block.base is not None
        out += block.base
        return out

    return formula
