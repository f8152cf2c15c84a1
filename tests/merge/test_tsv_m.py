from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Apply = Callable[..., Any]
F64 = npt.NDArray[np.float64]


def inverse_root(gram: F64) -> F64:
    values, vectors = np.linalg.eigh(gram)
    root: F64 = vectors / np.sqrt(values) @ vectors.T
    return root


def reference(taus: Sequence[F64]) -> F64:
    """The paper's whitening, X (X^T X)^(-1/2), for tasks without a direction in common."""
    k = min(taus[0].shape) // len(taus)
    parts = [np.linalg.svd(t, full_matrices=False) for t in taus]
    u = np.concatenate([p[0][:, :k] for p in parts], axis=1)
    v = np.concatenate([p[2][:k].T for p in parts], axis=1)
    s = np.concatenate([p[1][:k] for p in parts])
    return u @ inverse_root(u.T @ u) @ np.diag(s) @ (v @ inverse_root(v.T @ v)).T


def random_models(shape: tuple[int, ...], n: int, seed: int = 0) -> tuple[F64, list[F64]]:
    rng = np.random.default_rng(seed)
    return np.zeros(shape), [rng.standard_normal(shape).astype(np.float32).astype(np.float64) for _ in range(n)]


@pytest.mark.parametrize(("shape", "n"), [((12, 12), 2), ((20, 9), 3), ((9, 20), 3), ((10, 11), 3)])
def test_against_the_paper(apply: Apply, shape: tuple[int, int], n: int) -> None:
    base, models = random_models(shape, n)
    merged = apply("tsv_m", models, base, lambda_=0.7).reshape(shape)
    np.testing.assert_allclose(merged, 0.7 * reference(models), rtol=1e-5, atol=1e-6)


def test_tasks_without_interference_are_added(apply: Apply) -> None:
    """They use different rows and columns; each keeps its two largest of four directions."""
    a, b = np.zeros((4, 4)), np.zeros((4, 4))
    a[0, 1], a[1, 0] = 3, -2
    b[2, 2], b[3, 3] = 5, 7
    merged = apply("tsv_m", [1 + a, 1 + b], np.ones((4, 4))).reshape(4, 4)
    np.testing.assert_allclose(merged, 1 + a + b, rtol=1e-6)


def test_one_task_is_itself(apply: Apply) -> None:
    base, (model,) = random_models((8, 5), 1)
    np.testing.assert_allclose(apply("tsv_m", [model], base), model.reshape(-1), rtol=1e-5, atol=1e-6)


def test_only_the_leading_directions_are_kept(apply: Apply) -> None:
    base, models = random_models((15, 10), 3)
    merged = apply("tsv_m", models, base).reshape(15, 10).astype(np.float64)
    expected = np.sort(np.concatenate([np.linalg.svd(m)[1][:3] for m in models]))[::-1]
    np.testing.assert_allclose(np.linalg.svd(merged)[1], [*expected, 0], atol=1e-5)


def test_equal_tasks_give_the_task_without_invented_directions(apply: Apply) -> None:
    """Of [U, U] half of the directions do not exist. A plain SVD fills them with arbitrary vectors."""
    rng = np.random.default_rng(1)
    task = rng.standard_normal((30, 4)) @ rng.standard_normal((4, 20))
    merged = apply("tsv_m", [task, task], np.zeros((30, 20))).reshape(30, 20)
    np.testing.assert_allclose(merged, task, rtol=1e-4, atol=1e-5)


def test_a_task_that_did_not_change_a_matrix_does_not_disturb_it(apply: Apply) -> None:
    base, (a, b) = random_models((12, 6), 2)
    with_idle = apply("tsv_m", [a, b, base, base], base)
    three_each = apply("tsv_m", [a, b, base], base)
    # k is 1 of 4 and 2 of 3: what remains is as if the idle ones had not been there
    for merged, k in ((with_idle, 1), (three_each, 2)):
        parts = [np.linalg.svd(t, full_matrices=False) for t in (a, b)]
        low = [u[:, :k] * s[:k] @ vt[:k] for u, s, vt in parts]
        again = apply("tsv_m", low, base).reshape(12, 6)
        np.testing.assert_allclose(merged.reshape(12, 6), again, rtol=1e-4, atol=1e-5)


def test_more_tasks_than_rows(apply: Apply) -> None:
    base, models = random_models((2, 5), 3)
    merged = apply("tsv_m", models, base)
    assert np.isfinite(merged).all()
    assert merged.any()


def test_turning_the_space_turns_the_result(apply: Apply) -> None:
    base, models = random_models((9, 9), 3)
    q, p = (np.linalg.qr(np.random.default_rng(i).standard_normal((9, 9)))[0] for i in (7, 8))
    merged = apply("tsv_m", models, base).reshape(9, 9)
    turned = apply("tsv_m", [q @ m @ p for m in models], base).reshape(9, 9)
    np.testing.assert_allclose(turned, q @ merged @ p, atol=1e-5)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (7,)),
        ("model.embed_tokens.weight", (9, 4)),
        ("lm_head.weight", (9, 4)),
        ("shared_expert_gate.weight", (1, 7)),
        ("conv1d.weight", (3, 1, 4)),
        ("s", ()),
    ],
)
def test_what_is_no_matrix_is_averaged(apply: Apply, method: str, name: str, shape: tuple[int, ...]) -> None:
    base, models = random_models(shape, 3)
    merged = apply(method, models, base + 2, name=name, lambda_=0.5)
    np.testing.assert_allclose(merged.reshape(shape), 2 + 0.5 * (np.mean(models, axis=0) - 2), rtol=1e-6)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_fused_experts_are_merged_one_by_one(apply: Apply, method: str) -> None:
    base, models = random_models((4, 6, 5), 2)
    fused = apply(method, models, base, name="mlp.experts.up_proj").reshape(4, 6, 5)
    for i in range(4):
        alone = apply(method, [m[i] for m in models], base[i], name=f"mlp.experts.{i}.up_proj.weight")
        assert fused[i].reshape(-1).tobytes() == alone.tobytes()
