from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Apply = Callable[..., Any]
N = 200_000


def test_what_is_kept_is_rescaled_and_what_is_dropped_is_the_base(apply: Apply) -> None:
    base = np.full(N, 2.0, np.float32)
    merged = apply("dare_ties", [base + 1], base, weight=(1,), density=(0.25,))
    values, counts = np.unique(merged, return_counts=True)
    assert values.tolist() == [2.0, 6.0]  # dropped; 2 + 1 / 0.25
    deviation = (counts[1] - 0.25 * N) / np.sqrt(N * 0.25 * 0.75)
    assert abs(deviation) < 4


def test_the_expectation_is_task_arithmetic(apply: Apply) -> None:
    rng = np.random.default_rng(0)
    delta = rng.standard_normal(2000).astype(np.float32)
    runs = [
        apply("dare_ties", [delta], np.zeros_like(delta), weight=(0.5,), density=(0.4,), keys=(key,))
        for key in range(400)
    ]
    # Variance of one draw: d^2 w^2 (1/p - 1); the mean of 400 lies within five deviations for all of 2000 elements.
    deviations = (np.mean(runs, axis=0) - 0.5 * delta) / (0.5 * np.abs(delta) * np.sqrt(1.5 / 400))
    assert np.abs(deviations).max() < 5


def test_without_rescale(apply: Apply) -> None:
    base = np.zeros(1000, np.float32)
    merged = apply("dare_ties", [base + 1], base, weight=(1,), density=(0.5,), rescale=False)
    assert set(merged.tolist()) == {0.0, 1.0}


def test_models_draw_independently(apply: Apply) -> None:
    base = np.zeros(N, np.float32)
    merged = apply("dare_ties", [base + 1, base + 1], base, weight=(1, 1), density=(0.5, 0.5))
    share_of_both = np.mean(merged == 4)
    assert share_of_both == pytest.approx(0.25, abs=0.01)


def test_full_density_is_ties_and_none_is_the_base(apply: Apply) -> None:
    rng = np.random.default_rng(0)
    base, a, b = rng.standard_normal((3, 1000)).astype(np.float32)
    full = apply("dare_ties", [a, b], base, weight=(1, 1), density=(1.0, 1.0))
    assert np.array_equal(full, apply("ties", [a, b], base, weight=(1, 1), density=(1.0, 1.0), normalize=False))
    assert np.array_equal(apply("dare_ties", [a, b], base, weight=(1, 1), density=(0.0, 0.0)), base)
