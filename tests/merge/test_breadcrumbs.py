from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from solera_merge.methods.catalogue import METHODS

Apply = Callable[..., Any]


def masked_by_sort(delta: Any, density: float, gamma: float) -> Any:
    """The definition, by a stable sort of the whole."""
    n = delta.size
    wanted = n if density >= 1 else max(1, int(density * n)) if density > 0 else 0
    left_out = min(int(gamma * n), n - wanted)
    order = np.argsort(-np.abs(delta), kind="stable")[left_out : left_out + wanted]
    out = np.zeros_like(delta)
    out[order] = delta[order]
    return out


def test_by_hand(apply: Apply) -> None:
    a = [8.0, -1.0, 3.0, 0.5, -4.0]
    zero = [0.0] * 5
    # gamma 0.2 of five drops 8; density 0.4 keeps the two next, -4 and 3.
    merged = apply("breadcrumbs", [a], zero, weight=(1,), density=(0.4,), gamma=(0.2,))
    assert merged.tolist() == [0.0, 0.0, 3.0, 0.0, -4.0]
    b = [1.0, 1.0, 1.0, 9.0, 1.0]
    # Of the equal ones the first two by flat index count as the larger.
    merged = apply("breadcrumbs", [a, b], zero, weight=(1, 2), density=(0.4, 0.4), gamma=(0.2, 0.2), lambda_=0.5)
    assert merged.tolist() == [1.0, 1.0, 1.5, 0.0, -2.0]


@pytest.mark.parametrize("gamma", [0.0, 0.0001, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("levels", [0, 7])
def test_kept_are_exactly_the_middle(apply: Apply, density: float, gamma: float, levels: int) -> None:
    delta = np.random.default_rng(3).standard_normal(10_000).astype(np.float32)
    if levels:  # many equal magnitudes
        delta = (np.round(delta * levels) / levels).astype(np.float32)
    merged = apply("breadcrumbs", [delta], np.zeros_like(delta), weight=(1,), density=(density,), gamma=(gamma,))
    assert np.array_equal(merged, masked_by_sort(delta, density, gamma))


def test_a_gamma_of_less_than_one_element_drops_no_outlier(apply: Apply) -> None:
    """mergekit up to 0.1.4 sliced to `-0` here and lost the whole task vector."""
    delta = np.arange(1, 51, dtype=np.float32)
    merged = apply("breadcrumbs", [delta], np.zeros_like(delta), weight=(1,), density=(0.5,), gamma=(0.01,))
    assert np.array_equal(merged, np.where(delta > 25, delta, 0))


def test_without_outliers_it_is_the_trim_of_ties(apply: Apply) -> None:
    base, a = np.random.default_rng(0).standard_normal((2, 5000)).astype(np.float32)
    shared = {"weight": (1,), "density": (0.2,)}
    assert np.array_equal(apply("breadcrumbs", [a], base, gamma=(0.0,), **shared), apply("ties", [a], base, **shared))


@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
def test_one_element_is_kept(apply: Apply, density: float) -> None:
    """int(density) is 0 for it; mergekit drops it unless the density is 1."""
    assert apply("breadcrumbs", [[3.0]], [1.0], weight=(1,), density=(density,), gamma=(0.5,)).tolist() == [3.0]


def test_full_density_is_task_arithmetic(apply: Apply) -> None:
    base, a, b = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    full = apply("breadcrumbs", [a, b], base, weight=(1, -0.5), density=(1.0, 1.0), gamma=(0.3, 0.0))
    assert np.array_equal(full, apply("task_arithmetic", [a, b], base, weight=(1, -0.5)))


def test_models_and_both_thresholds_share_the_passes(in_memory: Any) -> None:
    base, a, b = np.random.default_rng(0).standard_normal((3, 9000)).astype(np.float32)
    tensor = in_memory([a, b], base)
    METHODS["breadcrumbs"].function(tensor, None, weight=(1, 1), density=(0.1, 0.5), gamma=(0.1, 0.2))
    assert tensor.passes <= 3
