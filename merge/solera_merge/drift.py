"""How far every tensor of a merge has moved, and which ones stand out."""

import math
import re
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["drift_report", "outliers", "relative"]

_FACTOR = 4.0  # a tensor that moved that much more than its like in the other layers stands out
_NUMBER = re.compile(r"\.\d+\.")
_LIKE = 4  # layers needed to say what is usual


def relative(sums: npt.NDArray[np.float64]) -> float:
    """|result - reference| / |reference| from the sums of squares, to 6 digits; the length itself where that is 0.

    Infinite where the squares are too large for float32: values above some 1e19, which no trained model has.
    """
    if not np.isfinite(sums).all():
        return math.inf
    changed, there = math.sqrt(sums[0]), math.sqrt(sums[1])
    return float(f"{changed / there if there > 0 else changed:.6g}")


def drift_report(drifts: Mapping[str, float]) -> dict[str, Any]:
    """For solera.json: the median, every tensor (null: too far to be measured), and those that stand out."""
    known = {name: value for name, value in drifts.items() if math.isfinite(value)}
    return {
        "median": statistics.median(known.values()) if known else 0.0,
        "outliers": outliers(drifts),
        "tensors": {name: known.get(name) for name in drifts},
    }


def outliers(drifts: Mapping[str, float]) -> dict[str, str]:
    """Tensors that moved by more than their own length, or much more than the same tensor of the other layers.

    Example:
        >>> outliers({f"model.layers.{i}.mlp.up_proj.weight": 0.01 if i < 5 else 0.2 for i in range(6)})
        {'model.layers.5.mlp.up_proj.weight': 'moved by 0.2, 20 times as far as in other layers'}
    """
    kinds: dict[str, list[float]] = {}
    for name, value in drifts.items():
        kinds.setdefault(_kind(name), []).append(value)
    found: dict[str, str] = {}
    for name, value in drifts.items():
        like = kinds[_kind(name)]
        usual = statistics.median(like)
        if math.isinf(value):
            found[name] = "holds values whose squares are beyond float32"
        elif value > 1:
            found[name] = f"moved by {value:.3g} times its own length"
        elif len(like) >= _LIKE and usual > 0 and value > _FACTOR * usual:
            found[name] = f"moved by {value:.3g}, {value / usual:.3g} times as far as in other layers"
    return found


def _kind(name: str) -> str:
    """The name with the number of its layer left out."""
    return _NUMBER.sub(".", name, 1)
