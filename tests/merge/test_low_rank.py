"""Factors of matrices and of sums of products: as near as any of their rank, and the error is the error."""

import numpy as np
import numpy.typing as npt
import pytest

from solera_merge.adapters.low_rank import Factors, Keep, decompose, recombine, residual, residual_of_sum

F32 = npt.NDArray[np.float32]


def _falling(rows: int, columns: int, power: float, seed: int = 0) -> F32:
    """A matrix with singular values about k^-power."""
    random = np.random.default_rng(seed)
    side = min(rows, columns)
    left = np.linalg.qr(random.standard_normal((rows, side)))[0]
    right = np.linalg.qr(random.standard_normal((columns, side)))[0]
    matrix: F32 = ((left * np.arange(1, side + 1) ** -power) @ right.T).astype(np.float32)
    return matrix


def _best(matrix: F32, rank: int) -> float:
    return float(np.sum(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[rank:] ** 2))


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (400, 300), (300, 700)])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_no_factors_of_that_rank_are_nearer(shape: tuple[int, int], rank: int) -> None:
    matrix = _falling(*shape, power=0.6)
    factors = decompose(matrix, Keep(rank=rank), key=1)
    assert (factors.left.shape, factors.right.shape) == ((shape[0], rank), (rank, shape[1]))
    found = residual(matrix, factors)
    assert found == pytest.approx(
        float(np.sum((matrix - factors.left @ factors.right).astype(np.float64) ** 2)), rel=1e-6
    )
    assert found == pytest.approx(_best(matrix, rank), rel=2e-3, abs=1e-10)  # by projection within 0.2 %


@pytest.mark.parametrize("shape", [(64, 48), (700, 600)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_energy_takes_the_smallest_rank_that_is_enough(shape: tuple[int, int], energy: float) -> None:
    matrix = _falling(*shape, power=0.8)
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    needed = int(np.flatnonzero(np.cumsum(squares) >= energy * squares.sum())[0]) + 1
    rank = decompose(matrix, Keep(energy=energy), key=1).rank
    assert needed <= rank <= needed + max(1, needed // 50)  # a projection sees a little less than there is
    assert decompose(matrix, Keep(energy=energy, max_rank=5), key=1).rank == min(5, rank)


def test_full_rank_gives_the_matrix_back() -> None:
    matrix = _falling(50, 70, power=0.1)
    factors = decompose(matrix, Keep(energy=1.0), key=1)
    assert factors.rank == 50
    np.testing.assert_allclose(factors.left @ factors.right, matrix, rtol=0, atol=1e-6)


def test_rank_is_never_beyond_what_there_is() -> None:
    random = np.random.default_rng(0)
    thin = random.standard_normal((50, 3), dtype=np.float32) @ random.standard_normal((3, 40), dtype=np.float32)
    assert decompose(thin, Keep(rank=10), key=1).rank == 3
    zero = decompose(np.zeros((20, 30), np.float32), Keep(rank=4), key=1)
    assert zero.rank == 0
    assert zero.padded(4).left.shape == (20, 4)
    assert residual(np.zeros((20, 30), np.float32), zero) == 0


def test_recombining_equals_decomposing_the_sum() -> None:
    random = np.random.default_rng(3)
    lefts = [random.standard_normal((30, r), dtype=np.float32) for r in (3, 5, 40)]
    rights = [random.standard_normal((r, 50), dtype=np.float32) for r in (3, 5, 40)]
    dense = np.asarray(sum(a @ b for a, b in zip(lefts, rights, strict=True)), np.float32)
    for keep in (Keep(rank=6), Keep(energy=0.7), Keep(energy=1.0)):
        ours, theirs = recombine(lefts, rights, keep), decompose(dense, keep, key=1)
        assert ours.rank == theirs.rank
        np.testing.assert_allclose(ours.left @ ours.right, theirs.left @ theirs.right, rtol=0, atol=2e-4)
        missing, whole = residual_of_sum(lefts, rights, ours)
        assert whole == pytest.approx(float(np.sum(dense.astype(np.float64) ** 2)), rel=1e-5)
        assert missing == pytest.approx(residual(dense, ours), rel=1e-4, abs=1e-6 * whole)


def test_stored_factors_are_those_of_the_format() -> None:
    factors = Factors(np.full((2, 1), 1.001, np.float32), np.full((1, 2), 3.0, np.float32)).stored("BF16")
    assert factors.left[0, 0] == 1.0
    assert factors.right[0, 0] == 3.0


def test_the_same_key_gives_the_same_bits_and_signs_are_fixed() -> None:
    matrix = _falling(400, 300, power=0.5)
    one, two = (decompose(matrix, Keep(rank=4), key=7) for _ in range(2))
    assert np.array_equal(one.left, two.left)
    other = decompose(matrix, Keep(rank=4), key=8)
    np.testing.assert_allclose(one.left, other.left, rtol=0, atol=0.02)
    assert all(column[np.argmax(np.abs(column))] > 0 for column in one.left.T)
