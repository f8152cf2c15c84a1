from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from solera_core.errors import ConfigError

Apply = Callable[..., Any]


def test_by_hand(apply: Apply) -> None:
    merged = apply("nearswap", [[1.25, 0.5, 3.0, 1.0]], [1.0, 1.0, 1.0, 1.0], t=0.5)
    assert merged.tolist() == [1.25, 0.5, 1.5, 1.0]


def test_is_an_interpolation_by_t_over_the_distance(apply: Apply) -> None:
    """The formula as its author gives it."""
    a, b = np.random.default_rng(0).standard_normal((2, 5000)).astype(np.float32)
    share = np.minimum(0.3 / np.abs(b.astype(np.float64) - a), 1)
    np.testing.assert_allclose(apply("nearswap", [b], a, t=0.3), (1 - share) * a + share * b, rtol=1e-5, atol=1e-6)


def test_endpoints_are_exact(apply: Apply) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 5000)).astype(np.float32)
    assert np.array_equal(apply("nearswap", [b], a, t=0.0), a)
    assert np.array_equal(apply("nearswap", [b], a, t=100.0), b)


def test_a_tiny_t_is_meant(apply: Apply) -> None:
    """mergekit would take half of this difference."""
    assert apply("nearswap", [[2e-7]], [0.0], t=5e-7)[0] == np.float32(2e-7)


def test_a_negative_t_is_refused(recipe: Any) -> None:
    with pytest.raises(ConfigError, match="`t`"):
        recipe(merge_method="nearswap", base_model="a", models=["b"], parameters={"t": -0.1})
