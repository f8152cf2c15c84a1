from collections.abc import Callable
from typing import Any

import numpy as np

Apply = Callable[..., Any]


def test_by_hand(apply: Apply) -> None:
    base = [1.0, 1.0, 1.0, 1.0]
    a, b = [3.0, 1.0, 0.0, 1.0], [0.0, 1.5, 0.5, 1.0]  # changes 2, 0, -1, 0 and -1, 0.5, -0.5, 0
    assert apply("magmax", [a, b], base).tolist() == [3.0, 1.5, 0.0, 1.0]
    assert apply("magmax", [a, b], base, lambda_=0.5).tolist() == [2.0, 1.25, 0.5, 1.0]


def test_the_last_of_equal_changes_counts(apply: Apply) -> None:
    assert apply("magmax", [[2.0], [0.0], [1.5]], [1.0]).tolist() == [0.0]
    assert apply("magmax", [[0.0], [2.0], [1.5]], [1.0]).tolist() == [2.0]


def test_one_model_is_itself(apply: Apply) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(-9, 9, 100).astype(np.float32)
    model = rng.integers(-9, 9, 100).astype(np.float32)
    assert np.array_equal(apply("magmax", [model], base), model)


def test_against_argmax(apply: Apply) -> None:
    rng = np.random.default_rng(1)
    base = rng.standard_normal(10_000).astype(np.float32)
    models = [base + rng.standard_normal(base.size).astype(np.float32) for _ in range(5)]
    deltas = np.stack([m - base for m in models])
    largest = np.take_along_axis(deltas, np.argmax(np.abs(deltas), axis=0)[None], axis=0)[0]
    assert np.array_equal(apply("magmax", models, base), base + largest)
