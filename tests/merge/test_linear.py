from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Apply = Callable[..., Any]


def test_by_hand(apply: Apply) -> None:
    a, b = [1.0, 2.0, -4.0], [3.0, -2.0, 0.0]
    assert apply("linear", [a, b], weight=(1, 3)).tolist() == [2.5, -1.0, -1.0]
    assert apply("linear", [a, b], weight=(1, 3), normalize=False).tolist() == [10.0, -4.0, -4.0]


@pytest.mark.parametrize("weight", [(1, 0), (0, 1), (2, 0)])
def test_endpoints_are_exact(apply: Apply, weight: tuple[int, int]) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 999)).astype(np.float32)
    expected = a if weight[0] else b
    assert np.array_equal(apply("linear", [a, b], weight=weight), expected)
