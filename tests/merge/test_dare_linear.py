from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Apply = Callable[..., Any]


def test_what_is_kept_is_rescaled_and_what_is_dropped_is_the_base(apply: Apply) -> None:
    n = 100_000
    base = np.full(n, 2.0, np.float32)
    merged = apply("dare_linear", [base + 1], base, weight=(1,), density=(0.25,))
    values, counts = np.unique(merged, return_counts=True)
    assert values.tolist() == [2.0, 6.0]  # dropped; 2 + 1 / 0.25
    assert abs(counts[1] - 0.25 * n) / np.sqrt(n * 0.25 * 0.75) < 4


def test_no_sign_is_elected(apply: Apply) -> None:
    """Opposite changes cancel where both are kept, and stand alone elsewhere: never anything else."""
    base = np.zeros(10_000, np.float32)
    merged = apply("dare_linear", [base + 1, base - 1], base, weight=(1, 1), density=(0.5, 0.5), rescale=False)
    values, counts = np.unique(merged, return_counts=True)
    assert values.tolist() == [-1.0, 0.0, 1.0]
    assert np.abs(counts / base.size - [0.25, 0.5, 0.25]).max() < 0.02


def test_the_masks_are_those_of_dare_ties(apply: Apply) -> None:
    base, a = np.random.default_rng(0).standard_normal((2, 5000)).astype(np.float32)
    one = apply("dare_linear", [a], base, weight=(0.7,), density=(0.3,))
    assert np.array_equal(one, apply("dare_ties", [a], base, weight=(0.7,), density=(0.3,)))


def test_the_expectation_is_task_arithmetic(apply: Apply) -> None:
    deltas = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
    zero = np.zeros(1000, np.float32)
    weight, density = (0.5, -0.3), (0.4, 0.7)
    runs = [
        apply("dare_linear", deltas, zero, weight=weight, density=density, keys=(key, key + 1000)) for key in range(300)
    ]
    expected = apply("task_arithmetic", deltas, zero, weight=weight)
    variance = sum((w * d) ** 2 * (1 / p - 1) for w, d, p in zip(weight, deltas, density, strict=True))
    assert np.abs((np.mean(runs, axis=0) - expected) / np.sqrt(variance / 300)).max() < 5


@pytest.mark.parametrize("normalize", [False, True])
def test_full_density_is_task_arithmetic_and_none_is_the_base(apply: Apply, normalize: bool) -> None:
    base, a, b = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    shared = {"weight": (0.5, 0.7), "normalize": normalize, "lambda_": 0.9}
    full = apply("dare_linear", [a, b], base, density=(1.0, 1.0), **shared)
    assert np.array_equal(full, apply("task_arithmetic", [a, b], base, **shared))
    assert np.array_equal(apply("dare_linear", [a, b], base, density=(0.0, 0.0), **shared), base)
