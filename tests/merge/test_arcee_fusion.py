from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from solera_merge.kernels.fusion import exponentials, row_divergences

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


def test_the_exponential_that_is_written_out() -> None:
    """Within 2 units of the last place of the machine's, and as good as 0 far below."""
    x = -np.concatenate([[0.0, 1e-300, 1e-17, 690.0, 5000.0], np.geomspace(1e-9, 690, 20_000)])
    ours = x.copy()
    exponentials(ours, ours.size, np.empty_like(ours))
    near = x >= -690
    assert np.abs(ours[near] / np.exp(x[near]) - 1).max() <= 2 * np.finfo(np.float64).eps
    assert 0 <= ours[~near][0] < 1e-300


def test_rows_that_hardly_differ_have_a_true_divergence() -> None:
    """Differences of 1e-3 of the weights: a divergence of 1e-10, against sums in 80 bits."""
    rng = np.random.default_rng(0)
    base = (0.02 * rng.standard_normal((4, 3000))).astype(np.float32)
    model = (base + 2e-5 * rng.standard_normal(base.shape)).astype(np.float32)
    out = np.empty(4, np.float32)
    row_divergences(model.ravel(), base.ravel(), 3000, out)
    p, q = (np.exp(x.astype(np.longdouble)) for x in (model, base))
    p, q = (x / x.sum(axis=1, keepdims=True) for x in (p, q))
    np.testing.assert_allclose(out, np.sum(p * np.log(p / q), axis=1).astype(np.float64), rtol=2e-5)
