import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest

Apply = Callable[..., Any]


def reference(models: Any, base: Any) -> Any:
    """The paper's formula for one vector, in float64."""
    deltas = [np.asarray(m, np.float64) - base for m in models]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(deltas, 2)]
    cosine, n = max(float(np.mean(cosines)), 0.0), len(deltas)
    t = n * cosine / (1 + (n - 1) * cosine)
    return base + t * np.mean(deltas, axis=0)


def related(shape: tuple[int, ...], count: int = 3, scale: float = 1.0, seed: int = 0) -> tuple[Any, Any]:
    """A base, and models that have half of their delta in common."""
    rng = np.random.default_rng(seed)
    base, common = rng.standard_normal((2, *shape))
    models = [base + scale * (common + rng.standard_normal(shape)) for _ in range(count)]
    return [m.astype(np.float32) for m in models], base.astype(np.float32)


def test_60_degrees_by_hand(apply: Apply) -> None:
    """cos = 1/2, so t = 2/3 for two models."""
    height = math.sqrt(3)
    merged = apply("model_stock", [[3, 1], [2, 1 + height]], [1, 1])
    np.testing.assert_allclose(merged, [1 + 2 / 3 * 1.5, 1 + 2 / 3 * height / 2], rtol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_against_the_formula(apply: Apply, count: int) -> None:
    models, base = related((5000,), count)
    np.testing.assert_allclose(apply("model_stock", models, base), reference(models, base), rtol=1e-5, atol=1e-6)


def test_every_row_its_own_ratio(apply: Apply) -> None:
    models, base = related((20, 3, 8))
    expected = np.empty((20, 3, 8))
    for i in np.ndindex(20, 3):
        expected[i] = reference([m[i] for m in models], base[i])
    merged = apply("model_stock", models, base, filter_wise=True)
    np.testing.assert_allclose(merged.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(apply("model_stock", models, base), merged, rtol=1e-3)


def test_equal_fine_tunes_are_kept(apply: Apply) -> None:
    assert apply("model_stock", [[3, 2], [3, 2]], [1, 0]).tolist() == [3, 2]


def test_perpendicular_or_opposing_fine_tunes_give_the_base(apply: Apply) -> None:
    """mergekit divides by 1 + (N-1) cos: for the second pair here t = 2 cos / (1 + cos) = -18, for the third 0/0."""
    assert apply("model_stock", [[2, 1], [1, 2]], [1, 1]).tolist() == [1, 1]
    assert apply("model_stock", [[1, 0], [-0.9, math.sqrt(1 - 0.81)]], [0, 0]).tolist() == [0, 0]
    assert apply("model_stock", [[1, 1], [-1, -1]], [0, 0]).tolist() == [0, 0]


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("scale", [1e-4, 1e-7, 1e-12])
def test_small_changes_have_the_same_angle(apply: Apply, scale: float, filter_wise: bool) -> None:
    """mergekit takes 1e-6 for the product of two norms below that: cos 1 becomes 0.2 for a norm vector of a fine-tune.

    The base is 0, so that small changes are exact.
    """
    models, base = related((6, 50))
    deltas = [m - base for m in models]
    zero = np.zeros_like(base)
    usual = apply("model_stock", deltas, zero, filter_wise=filter_wise)
    small = apply("model_stock", [d * np.float32(scale) for d in deltas], zero, filter_wise=filter_wise)
    np.testing.assert_allclose(small, usual * scale, rtol=1e-5)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_an_unchanged_model_has_no_direction(apply: Apply, filter_wise: bool) -> None:
    """Of three pairs one has cos = 1 and two count as 0: cos = 1/3, t = 3/5, and the mean delta is 2/3."""
    merged = apply("model_stock", [[2, 2], [2, 2], [1, 1]], [1, 1], filter_wise=filter_wise)
    np.testing.assert_allclose(merged, [1.4, 1.4], rtol=1e-6)
