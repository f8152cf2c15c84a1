from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Apply = Callable[..., Any]


def test_no_sign_is_elected(apply: Apply) -> None:
    """Opposite changes cancel where both are kept, and stand alone elsewhere: never anything else."""
    base = np.zeros((100, 100), np.float32)
    shared = {"weight": (1, 1), "density": (0.5, 0.5), "epsilon": (0.1, 0.4)}
    merged = apply("della_linear", [base + 1, base - 1], base, rescale=False, **shared)
    values, counts = np.unique(merged, return_counts=True)
    assert values.tolist() == [-1.0, 0.0, 1.0]
    assert np.abs(counts / base.size - [0.25, 0.5, 0.25]).max() < 0.03


def test_one_model_is_della(apply: Apply) -> None:
    base, a = np.random.default_rng(0).standard_normal((2, 40, 50)).astype(np.float32)
    shared = {"weight": (0.7,), "density": (0.3,), "epsilon": (0.2,)}
    one = apply("della_linear", [a], base, **shared)
    assert np.array_equal(one, apply("della", [a], base, normalize=False, **shared))


def test_the_expectation_is_task_arithmetic(apply: Apply) -> None:
    deltas = np.random.default_rng(0).standard_normal((2, 10, 100)).astype(np.float32)
    zero = np.zeros((10, 100), np.float32)
    shared = {"weight": (0.5, -0.3), "density": (0.4, 0.7), "epsilon": (0.3, 0.2)}
    keys = [(key, key + 1000) for key in range(300)]
    runs = np.array([apply("della_linear", list(deltas), zero, keys=k, **shared) for k in keys])
    expected = apply("task_arithmetic", list(deltas), zero, weight=(0.5, -0.3))
    assert np.abs((runs.mean(axis=0) - expected) / (runs.std(axis=0) / np.sqrt(300))).max() < 6


@pytest.mark.parametrize("normalize", [False, True])
def test_full_density_is_task_arithmetic_and_none_is_the_base(apply: Apply, normalize: bool) -> None:
    base, a, b = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    shared = {"weight": (0.5, 0.7), "normalize": normalize, "lambda_": 0.9}
    full = apply("della_linear", [a, b], base, density=(1.0, 1.0), epsilon=(0.15, 0.15), **shared)
    assert np.array_equal(full, apply("task_arithmetic", [a, b], base, **shared))
    none = apply("della_linear", [a, b], base, density=(0.0, 0.0), epsilon=(0.15, 0.15), **shared)
    assert np.array_equal(none, base)
