from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Apply = Callable[..., Any]


def importance(model: Any, base: Any) -> Any:
    """|difference| times KL of the softmax over the last axis, in float64."""
    p, q = (np.exp(np.asarray(x, np.float64)) for x in (model, base))
    p /= p.sum(axis=-1, keepdims=True)
    q /= q.sum(axis=-1, keepdims=True)
    return np.abs(model - base) * np.sum(p * np.log(p / q), axis=-1, keepdims=True)


def threshold_of(scores: Any) -> float:
    low, median, high = (np.sort(scores, axis=None)[q * (scores.size - 1) // 4] for q in (1, 2, 3))
    return float(median + 1.5 * (high - low))


def test_one_row_by_hand(apply: Apply) -> None:
    """Within a row the importance is proportional to the change, so the quartiles are those of the changes.

    Changes 1 2 3 4 40: quartiles 2, 3, 4, threshold 3 + 1.5 * 2 = 6.
    """
    assert apply("arcee_fusion", [[1, -2, 3, 4, -40]], [0, 0, 0, 0, 0]).tolist() == [0, 0, 0, 0, -40]


@pytest.mark.parametrize("shape", [(30, 200), (4, 5, 60), (5000,)])
@pytest.mark.parametrize("noise", [1.0, 0.003])
def test_against_a_sort_in_float64(apply: Apply, shape: tuple[int, ...], noise: float) -> None:
    rng = np.random.default_rng(0)
    base = (0.02 * rng.standard_normal(shape)).astype(np.float32)
    model = (base + 0.02 * noise * rng.standard_normal(shape)).astype(np.float32)
    scores = importance(model, base)
    threshold = threshold_of(scores)
    merged = apply("arcee_fusion", [model], base).reshape(shape)
    clear = np.abs(scores - threshold) > 1e-5 * threshold  # all but what float32 may put on the other side
    assert clear.mean() > 0.999
    assert np.array_equal(merged[clear], np.where(scores >= threshold, model, base)[clear])
    assert 0.01 < np.mean(merged == model) < 0.25


def test_few_changes_are_all_taken(apply: Apply) -> None:
    """Three quartiles of 0."""
    base = np.zeros((4, 10), np.float32)
    model = base.copy()
    model[1, 3] = 1e-3
    model[2, 0] = -1.0
    assert np.array_equal(apply("arcee_fusion", [model], base), model.ravel())


def test_large_weights_do_not_overflow(apply: Apply) -> None:
    base = np.zeros((2, 4), np.float32)
    model = np.full((2, 4), 1e4, np.float32) * np.arange(4, dtype=np.float32)
    assert np.isfinite(apply("arcee_fusion", [model], base)).all()
