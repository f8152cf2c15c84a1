"""Low-rank factors: of a matrix, of a sum of products, cut to a rank or a share of the energy; the exact error.

A matrix is decomposed by the eigenvectors of its Gram matrix in float64 where it is small or much of it is kept, else
by random projection with power iterations (arXiv 0909.4061, algorithm 4.4) in float32. What is missing is never
estimated: it is computed from the factors as they will be stored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from solera_core.dtypes import from_float32, to_float32
from solera_merge.masks import bernoulli

__all__ = ["Factors", "Keep", "decompose", "recombine", "residual", "residual_of_sum"]

Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]

_ZERO = 2.0**-23  # singular values below this share of the largest are none: float32 does not resolve them
_SMALL = 256  # sides up to this are always decomposed exactly
_POWER_ITERATIONS = 3
_FIRST_REACH = 20  # directions that are looked for first where the rank is not known
_BLOCK = 1 << 22  # elements of the difference that are looked at together


@dataclass(frozen=True)
class Factors:
    """A matrix left @ right.

    Attributes:
        left: [rows, rank] float32.
        right: [rank, columns] float32.
    """

    left: Float32
    right: Float32

    @property
    def rank(self) -> int:
        """Columns of the left factor."""
        return int(self.left.shape[1])

    def stored(self, dtype: str) -> "Factors":
        """The values that are left when both are stored in `dtype`."""

        def rounded(x: Float32) -> Float32:
            return to_float32(from_float32(x, dtype), dtype).reshape(x.shape)

        return Factors(rounded(self.left), rounded(self.right))

    def padded(self, rank: int) -> "Factors":
        """The same product with zeros up to `rank`."""
        more = rank - self.rank
        if more <= 0:
            return self
        return Factors(np.pad(self.left, ((0, 0), (0, more))), np.pad(self.right, ((0, more), (0, 0))))


@dataclass(frozen=True)
class Keep:
    """How many singular directions are kept: the same number everywhere, or as many as a share of the energy takes.

    Attributes:
        rank: directions; None: by energy.
        energy: share of the sum of the squared singular values, above 0, at most 1.
        max_rank: bound for a rank that is found by energy.
    """

    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None

    def most(self, side: int) -> int:
        """The largest rank there can be for a matrix whose smaller side is `side`."""
        bounds = [side, self.rank if self.energy is None else None, self.max_rank]
        return min(bound for bound in bounds if bound is not None)

    def choose(self, squares: Float64, total: float) -> int | None:
        """The rank for squared singular values in falling order; None where these are not enough for the energy."""
        found = int(np.count_nonzero(squares > _ZERO**2 * squares[:1].sum()))
        if self.energy is None:
            return min(self.most(len(squares)), found)
        # float64 sums of the two kinds agree to some 1e-13; the energy of 1 must not fail for that
        enough = np.flatnonzero(np.cumsum(squares) >= self.energy * total * (1 - 1e-12))
        if len(enough) == 0:
            return None
        return min(int(enough[0]) + 1, found, self.most(len(squares)))


def decompose(matrix: Float32, keep: Keep, key: int) -> Factors:
    """The best (or nearly best) low-rank factors of a matrix [rows, columns].

    Args:
        matrix: not changed.
        keep: how many directions.
        key: of the random numbers, 128 bits.
    """
    if matrix.shape[0] > matrix.shape[1]:
        factors = decompose(np.ascontiguousarray(matrix.T), keep, key)
        return _with_signs(np.ascontiguousarray(factors.right.T), np.ascontiguousarray(factors.left.T))
    side = matrix.shape[0]
    most = keep.most(side)
    reach = most if keep.energy is None else min(_FIRST_REACH, most)
    if side > _SMALL and 5 * _width(reach) < side:
        total = _square(matrix)
        while 5 * _width(reach) < side:
            basis = _range(matrix, _width(reach), key)
            values, vectors = _gram_vectors(basis.T @ matrix)
            rank = keep.choose(values[:reach], total)
            if rank is None and reach == most:
                rank = most
            if rank is not None:
                return _pair(basis @ vectors[:, :rank].astype(np.float32), matrix)
            reach = min(3 * reach, most)
    values, vectors = _gram_vectors(matrix)
    rank = keep.choose(values, float(values.sum()))
    return _pair(vectors[:, : most if rank is None else rank], matrix)


def _width(reach: int) -> int:
    """Random directions for `reach` wanted ones."""
    return reach + reach // 2 + 10


def _range(matrix: Float32, width: int, key: int) -> Float32:
    """An orthonormal basis [rows, width] of where a matrix [rows, columns] is large."""
    columns = matrix.shape[1]
    signs = bernoulli(key, 0, columns * width, 0.5).reshape(columns, width)
    basis = np.linalg.qr(matrix @ np.where(signs, np.float32(1), np.float32(-1)))[0]
    for _ in range(_POWER_ITERATIONS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    return basis


def _gram_vectors(matrix: Float32) -> tuple[Float64, Float64]:
    """Squared singular values in falling order, and left singular vectors [rows, rows], of a wide matrix."""
    wide = matrix.astype(np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)
    return np.maximum(values[::-1], 0), vectors[:, ::-1]


def _pair(basis: Float32 | Float64, matrix: Float32) -> Factors:
    """The projection of a matrix onto an orthonormal basis [rows, rank], its weight shared by both factors."""
    right = basis.T.astype(np.float64) @ matrix if basis.dtype == np.float64 else basis.T @ matrix
    size = np.sqrt(np.linalg.norm(right, axis=1))
    inverse = np.divide(1, size, out=np.zeros_like(size), where=size > 0)
    return _with_signs((basis * size).astype(np.float32), (right * inverse[:, None]).astype(np.float32))


def _with_signs(left: Float32, right: Float32) -> Factors:
    """The signs of each pair such that the largest element of the left vector is positive (of equal ones the first)."""
    if left.shape[1] == 0:
        return Factors(left, right)
    largest = np.take_along_axis(left, np.argmax(np.abs(left), axis=0)[None], axis=0)[0]
    sign = np.where(largest < 0, np.float32(-1), np.float32(1))
    return Factors(np.ascontiguousarray(left * sign), np.ascontiguousarray(right * sign[:, None]))


def recombine(lefts: Sequence[Float32], rights: Sequence[Float32], keep: Keep) -> Factors:
    """The best low-rank factors of sum_i left_i @ right_i, without ever forming it: QR of both stacks, SVD of the core.

    Args:
        lefts: [rows, r_i] each.
        rights: [r_i, columns] each.
        keep: how many directions.
    """
    left, inner_left = np.linalg.qr(np.concatenate(lefts, axis=1).astype(np.float64))
    right, inner_right = np.linalg.qr(np.concatenate(rights, axis=0).astype(np.float64).T)
    u, s, vt = np.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
    rank = keep.choose(s**2, float((s**2).sum()))
    rank = keep.most(len(s)) if rank is None else rank
    share = np.sqrt(s[:rank])
    return _with_signs(
        ((left @ u[:, :rank]) * share).astype(np.float32), ((share[:, None] * vt[:rank]) @ right.T).astype(np.float32)
    )


def residual(matrix: Float32, factors: Factors) -> float:
    """The squared Frobenius norm of matrix - left @ right, accumulated in float64."""
    step = max(_BLOCK // max(matrix.shape[1], 1), 1)
    return math.fsum(
        _square(matrix[row : row + step] - factors.left[row : row + step] @ factors.right)
        for row in range(0, matrix.shape[0], step)
    )


def residual_of_sum(lefts: Sequence[Float32], rights: Sequence[Float32], factors: Factors) -> tuple[float, float]:
    """Squared Frobenius norms of sum_i left_i @ right_i - left @ right, and of the sum, from the factors alone."""

    def triangle(stack: Sequence[Float32]) -> Float64:
        return np.linalg.qr(np.concatenate(stack, axis=1).astype(np.float64))[1]

    def square(lefts: Sequence[Float32], rights: Sequence[Float32]) -> float:
        return float(np.sum((triangle(lefts) @ triangle([right.T for right in rights]).T) ** 2))

    return square([*lefts, -factors.left], [*rights, factors.right]), square(lefts, rights)


def _square(x: Float32 | Float64) -> float:
    step = max(_BLOCK // max(x.shape[-1], 1), 1)
    return math.fsum(float(np.sum(x[i : i + step].astype(np.float64) ** 2)) for i in range(0, len(x), step))
