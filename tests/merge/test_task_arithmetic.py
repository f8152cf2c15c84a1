from collections.abc import Callable
from typing import Any

import numpy as np

Apply = Callable[..., Any]


def test_by_hand(apply: Apply) -> None:
    base, a, b = [1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [1.0, 3.0, 1.0]
    assert apply("task_arithmetic", [a, b], base, weight=(1, 0.5)).tolist() == [2.0, 2.0, 0.0]
    assert apply("task_arithmetic", [a, b], base, weight=(1, 0.5), lambda_=2.0).tolist() == [3.0, 3.0, -1.0]
    assert apply("task_arithmetic", [a, b], base, weight=(1, 1), normalize=True).tolist() == [1.5, 2.0, 0.5]


def test_negative_weight_subtracts_a_task(apply: Apply) -> None:
    assert apply("task_arithmetic", [[3.0]], [1.0], weight=(-1,)).tolist() == [-1.0]


def test_all_weights_zero_is_the_base(apply: Apply) -> None:
    base = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    merged = apply("task_arithmetic", [base + 1, base - 1], base, weight=(0, 0), normalize=True)
    assert np.array_equal(merged, base)
