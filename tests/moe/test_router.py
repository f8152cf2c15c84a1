"""The router's formulas: closed forms by other roads, cases by hand, and the scale search."""

from collections.abc import Sequence

import numpy as np
import pytest

from solera_merge.moe.router import SCALES, random_router, ridge_router, search_scale


def statistics(x_ND: np.ndarray, labels_N: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sums = np.stack([x_ND[labels_N == e].sum(axis=0) for e in range(experts)])
    return x_ND.T @ x_ND, sums, np.bincount(labels_N, minlength=experts)


def cloud(seed: int, counts: tuple[int, ...], width: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian clouds around random centres, and their labels."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(len(counts), width))
    labels = np.repeat(np.arange(len(counts)), counts)
    return centres[labels] + spread * draw.normal(size=(len(labels), width)), labels


def test_equals_least_squares_on_the_augmented_system() -> None:
    # min |X W - Yc|^2 + lambda |W|^2 is plain least squares on [X; sqrt(lambda) I], [Yc; 0]
    x, labels = cloud(0, (50, 30, 20), width=8, spread=1.0)
    centred = np.eye(3)[labels] - np.eye(3)[labels].mean(axis=0)
    penalty = 0.05 * np.trace(x.T @ x) / 8
    augmented = np.vstack([x, np.sqrt(penalty) * np.eye(8)])
    expected = np.linalg.lstsq(augmented, np.vstack([centred, np.zeros((8, 3))]), rcond=None)[0]
    np.testing.assert_allclose(ridge_router(*statistics(x, labels, 3), ridge=0.05), expected.T, atol=1e-12)


def test_a_case_by_hand() -> None:
    # One feature, x = +1 for two tokens of expert 0 and -1 for two of expert 1: X'X = 4, lambda = 1 * 4, and
    # X'(Y - 1/2) = [2, -2], so W = [2, -2] / 8.
    router = ridge_router(np.array([[4.0]]), np.array([[2.0], [-2.0]]), np.array([2, 2]), ridge=1.0)
    np.testing.assert_allclose(router, [[0.25], [-0.25]])


def test_separable_clouds_are_told_apart_on_new_tokens_and_mixed_ones_are_not() -> None:
    for spread, low, high in ((0.5, 0.99, 1.0), (50.0, 0.2, 0.5)):
        x, labels = cloud(1, (800, 400, 800), width=16, spread=spread)
        router = ridge_router(*statistics(x[::2], labels[::2], 3), ridge=1e-3)
        accuracy = ((x[1::2] @ router.T).argmax(axis=1) == labels[1::2]).mean()
        assert low <= accuracy <= high


def test_rows_add_up_to_zero() -> None:
    x, labels = cloud(2, (50, 30, 20), width=8, spread=1.0)
    router = ridge_router(*statistics(x, labels, 3), ridge=1e-3)
    np.testing.assert_allclose(router.sum(axis=0), 0, atol=1e-12)


def test_permuting_the_experts_permutes_the_rows() -> None:
    x, labels = cloud(3, (50, 30, 20), width=8, spread=1.0)
    gram, sums, counts = statistics(x, labels, 3)
    order = [2, 0, 1]
    expected = ridge_router(gram, sums, counts, ridge=1e-3)[order]
    np.testing.assert_allclose(ridge_router(gram, sums[order], counts[order], ridge=1e-3), expected, atol=1e-14)


def test_does_not_depend_on_the_scale_of_the_states() -> None:
    x, labels = cloud(4, (50, 50), width=8, spread=1.0)
    one = ridge_router(*statistics(x, labels, 2), ridge=1e-2)
    np.testing.assert_allclose(ridge_router(*statistics(10 * x, labels, 2), ridge=1e-2), one / 10, rtol=1e-9)


def test_random_router_is_keyed_by_seed_and_name() -> None:
    one = random_router("layer 0", (4, 1000), std=0.02, seed=1)
    assert (random_router("layer 0", (4, 1000), std=0.02, seed=1) == one).all()
    assert (random_router("layer 1", (4, 1000), std=0.02, seed=1) != one).any()
    assert (random_router("layer 0", (4, 1000), std=0.02, seed=2) != one).any()
    assert one.dtype == np.float32
    assert one.std() == pytest.approx(0.02, rel=0.05)
    assert one.mean() == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize("best", [0.1, 0.3, 1.0, 7.0, 30.0, 1000.0])
def test_search_finds_the_minimum_of_a_bowl_or_the_edge(best: float) -> None:
    scale, tried = search_scale(lambda scales: [(np.log(s) - np.log(best)) ** 2 for s in scales])
    inside = min(max(best, SCALES[0]), SCALES[-1])
    assert scale == pytest.approx(inside, rel=0.35)
    assert tried[scale] == min(tried.values())
    assert set(SCALES) <= set(tried)


def test_search_asks_for_no_scale_twice() -> None:
    asked: list[float] = []

    def losses(scales: Sequence[float]) -> list[float]:
        asked.extend(scales)
        return [float(abs(np.log(scale) - 1)) for scale in scales]

    search_scale(losses)
    assert len(asked) == len(set(asked))


def test_a_flat_loss_takes_the_smallest_scale() -> None:
    assert search_scale(lambda scales: [1.0] * len(scales))[0] == SCALES[0]
