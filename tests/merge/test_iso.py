"""`iso_c` and `iso_cts`; what they share with `tsv_m` (vectors, embeddings, experts) is tested there."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Apply = Callable[..., Any]
F64 = npt.NDArray[np.float64]


def random_models(shape: tuple[int, ...], n: int, seed: int = 0) -> tuple[F64, list[F64]]:
    rng = np.random.default_rng(seed)
    return np.zeros(shape), [rng.standard_normal(shape).astype(np.float32).astype(np.float64) for _ in range(n)]


def inverse_root(gram: F64) -> F64:
    values, vectors = np.linalg.eigh(gram)
    root: F64 = vectors / np.sqrt(values) @ vectors.T
    return root


def cts_reference(taus: Sequence[F64], k: int) -> F64:
    """The paper's algorithm with a common space of k directions, for matrices with no more columns than rows."""
    r, n = min(taus[0].shape), len(taus)
    u, s, vt = np.linalg.svd(sum(taus), full_matrices=False)
    us, ss, vs = [u[:, :k]], [s[:k]], [vt[:k].T]
    for tau in taus:
        ut, st, vtt = np.linalg.svd(tau - u[:, :k] @ u[:, :k].T @ tau, full_matrices=False)
        own = (r - k) // n
        us.append(ut[:, :own])
        ss.append(st[:own])
        vs.append(vtt[:own].T)
    left, right = np.concatenate(us, axis=1), np.concatenate(vs, axis=1)
    left, right = left @ inverse_root(left.T @ left), right @ inverse_root(right.T @ right)
    merged: F64 = np.mean(np.concatenate(ss)) * left @ right.T
    return merged


def test_iso_c_by_hand(apply: Apply) -> None:
    """The sum has singular values 4 and 2, whose mean is 3; its singular vectors are the axes."""
    base = np.full((2, 2), 7.0)
    a, b = base + np.diag([3, 0]), base + np.diag([1, -2])
    np.testing.assert_allclose(apply("iso_c", [a, b], base), [10, 7, 7, 4], rtol=1e-6)
    np.testing.assert_allclose(apply("iso_c", [a, b], base, lambda_=0.5), [8.5, 7, 7, 5.5], rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_all_singular_values_are_equal(apply: Apply, method: str, shape: tuple[int, int]) -> None:
    base, models = random_models(shape, 3)
    values = np.linalg.svd(apply(method, models, base).reshape(shape))[1]
    assert values.max() / values.min() == pytest.approx(1, abs=1e-5)


def test_iso_c_is_the_nearest_isotropic_matrix(apply: Apply) -> None:
    base, models = random_models((9, 6), 4)
    total = np.sum(models, axis=0)
    expected = np.mean(np.linalg.svd(total)[1]) * total @ inverse_root(total.T @ total)
    np.testing.assert_allclose(apply("iso_c", models, base).reshape(9, 6), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fraction", "n", "k"),
    [(0.8, 2, 8), (0.5, 2, 6), (0.5, 3, 4), (0.8, 3, 7), (0.0, 2, 0), (0.9, 4, 10)],  # k: 10 less n times round(...)
)
def test_iso_cts_against_the_paper(apply: Apply, fraction: float, n: int, k: int) -> None:
    base, models = random_models((15, 10), n)
    merged = apply("iso_cts", models, base, common_space_fraction=fraction, lambda_=0.7).reshape(15, 10)
    np.testing.assert_allclose(merged, 0.7 * cts_reference(models, k), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("fraction", "n"), [(1.0, 3), (0.3, 1)])
def test_where_iso_cts_is_iso_c(apply: Apply, fraction: float, n: int) -> None:
    base, models = random_models((7, 10), n)
    merged = apply("iso_cts", models, base, common_space_fraction=fraction)
    np.testing.assert_allclose(merged, apply("iso_c", models, base), rtol=1e-5, atol=1e-6)


def test_a_common_space_is_never_negative(apply: Apply) -> None:
    """3 directions for 2 tasks: 1.5 each, which rounds to 2 and would leave -1. So 1 each, and 1 in common."""
    base, models = random_models((4, 3), 2)
    merged = apply("iso_cts", models, base, common_space_fraction=0.0).reshape(4, 3)
    np.testing.assert_allclose(merged, cts_reference(models, 1), rtol=1e-5, atol=1e-6)


def test_nothing_is_added_where_the_common_space_holds_all_tasks(apply: Apply) -> None:
    """What is left of the tasks is rounding, and has no direction."""
    rng = np.random.default_rng(2)
    models = [rng.integers(-9, 9, (10, 2)) @ rng.integers(-9, 9, (2, 8)) for _ in range(2)]  # rank 2, exactly
    base = np.zeros((10, 8))
    merged = apply("iso_cts", models, base, common_space_fraction=0.5)
    np.testing.assert_allclose(merged, apply("iso_c", models, base), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_no_change_where_no_task_changed_anything(apply: Apply, method: str) -> None:
    """Rows and columns that no task touched stay: a plain U V^T would change them as much as all others."""
    rng = np.random.default_rng(3)
    models = []
    for _ in range(2):
        model = np.zeros((10, 8))
        model[:4, :3] = rng.standard_normal((4, 3))
        models.append(model)
    merged = apply(method, models, np.zeros((10, 8))).reshape(10, 8)
    assert np.abs(merged[:4, :3]).min() > 1e-3
    assert np.abs(merged[4:]).max() < 1e-6
    assert np.abs(merged[:, 3:]).max() < 1e-6


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_turning_the_space_turns_the_result(apply: Apply, method: str) -> None:
    base, models = random_models((8, 8), 3)
    q, p = (np.linalg.qr(np.random.default_rng(i).standard_normal((8, 8)))[0] for i in (7, 8))
    merged = apply(method, models, base).reshape(8, 8)
    turned = apply(method, [q @ m @ p for m in models], base).reshape(8, 8)
    np.testing.assert_allclose(turned, q @ merged @ p, atol=1e-5)
