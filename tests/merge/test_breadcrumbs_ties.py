from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Apply = Callable[..., Any]


def test_by_hand(apply: Apply) -> None:
    a = [9.0, 4.0, -3.0, 0.5, 1.0]
    b = [0.1, -2.0, 2.0, -8.0, 0.2]
    zero = [0.0] * 5
    # Each loses its largest and keeps the two next: a has 4 and -3, b has -2 and 2.
    # Elect:  4 - 2 > 0,  -3 + 2 < 0.  Only a agrees in both places.
    shared = {"weight": (1, 1), "density": (0.4, 0.4), "gamma": (0.2, 0.2)}
    merged = apply("breadcrumbs_ties", [a, b], zero, **shared)
    assert merged.tolist() == [0.0, 4.0, -3.0, 0.0, 0.0]
    # With a heavier b both signs turn: a plain sum of 3 * -2 and 3 * 2.
    merged = apply("breadcrumbs_ties", [a, b], zero, **shared | {"weight": (1, 3)})
    assert merged.tolist() == [0.0, -6.0, 6.0, 0.0, 0.0]
    merged = apply("breadcrumbs_ties", [a, b], zero, **shared | {"weight": (1, 3)}, normalize=True, lambda_=2.0)
    assert merged.tolist() == [0.0, -4.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize("normalize", [False, True])
def test_without_outliers_it_is_ties(apply: Apply, normalize: bool) -> None:
    base, a, b = np.random.default_rng(0).standard_normal((3, 5000)).astype(np.float32)
    shared = {"weight": (0.4, 0.7), "density": (0.2, 0.6), "normalize": normalize}
    merged = apply("breadcrumbs_ties", [a, b], base, gamma=(0.0, 0.0), **shared)
    assert np.array_equal(merged, apply("ties", [a, b], base, **shared))


def test_one_model_is_breadcrumbs(apply: Apply) -> None:
    base, a = np.random.default_rng(0).standard_normal((2, 5000)).astype(np.float32)
    shared = {"weight": (0.4,), "density": (0.2,), "gamma": (0.05,)}
    assert np.array_equal(apply("breadcrumbs_ties", [a], base, **shared), apply("breadcrumbs", [a], base, **shared))


def test_weights_of_mixed_sign_stay_bounded(apply: Apply) -> None:
    """As in ties: mergekit divides by 1 - 0.99 here."""
    merged = apply(
        "breadcrumbs_ties",
        [[0.01], [-0.01]],
        [0.0],
        weight=(1, -0.99),
        density=(1, 1),
        normalize=True,
        gamma=(0.0, 0.0),
    )
    assert merged[0] == pytest.approx(0.01)
