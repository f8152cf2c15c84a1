import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Apply = Callable[..., Any]


def test_quarter_circle_by_hand(apply: Apply) -> None:
    half = math.sqrt(0.5)
    merged = apply("slerp", [[0.0, 1.0]], [1.0, 0.0], t=0.5)
    np.testing.assert_allclose(merged, [half, half], rtol=1e-7)


def test_norm_of_unit_vectors_is_kept(apply: Apply) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 5000))
    merged = apply("slerp", [b / np.linalg.norm(b)], a / np.linalg.norm(a), t=0.3)
    assert np.linalg.norm(merged.astype(np.float64)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("noise", [0.001, 1.0], ids=["nearly parallel", "wide angle"])
def test_endpoints_are_exact(apply: Apply, noise: float) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal(5000).astype(np.float32)
    b = (a + noise * rng.standard_normal(5000)).astype(np.float32)
    assert np.array_equal(apply("slerp", [b], a, t=0.0), a)
    assert np.array_equal(apply("slerp", [b], a, t=1.0), b)


def test_nearly_parallel_and_opposite_are_linear(apply: Apply) -> None:
    assert apply("slerp", [[2.0, 0.0]], [1.0, 0.0], t=0.25).tolist() == [1.25, 0.0]
    assert apply("slerp", [[-3.0, 0.0]], [1.0, 0.0], t=0.25).tolist() == [0.0, 0.0]


def test_a_zero_vector_is_linear(apply: Apply) -> None:
    """mergekit takes the angle to a zero vector for 90 degrees, and would give sin(pi/8) * 4 here."""
    assert apply("slerp", [[4.0, 8.0]], [0.0, 0.0], t=0.25).tolist() == [1.0, 2.0]


def test_norms_beyond_float32_are_fine(apply: Apply) -> None:
    a = np.full(10, 1e30, np.float32)
    b = np.full(10, -1e30, np.float32)
    b[:5] = 1e30
    assert np.isfinite(apply("slerp", [b], a, t=0.5)).all()
