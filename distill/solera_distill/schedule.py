"""The learning rate as a function of progress."""

import math
from typing import Literal

__all__ = ["Schedule", "rate"]

Schedule = Literal["cosine", "linear", "constant"]


def rate(progress: float, *, schedule: Schedule, warmup: float, final: float) -> float:
    """Share of the peak rate at `progress`: tokens seen when the step is done / all tokens, in (0, 1].

    Linear from 0 to 1 over the first `warmup` of the tokens, then down to `final` at progress 1 along half a cosine or
    a line, or level. Tokens, not steps: how many steps there will be need not be known, and a resumed run cannot drift.
    """
    if progress < warmup:
        return progress / warmup
    x = min(1.0, (progress - warmup) / (1.0 - warmup))
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - (1.0 - final) * x
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * x))
