"""Singular values of task vectors: which tensors are matrices, and decompositions that do not return arbitrary vectors.

NumPy's LAPACK computes here, in float64. On one machine, with one build of NumPy and one number of BLAS threads, the
same matrix gives the same bytes. Elsewhere (another processor, another BLAS, another OMP_NUM_THREADS) the last bits of
float64 may differ; rounded to float32 the result is nearly always the same, but that is not guaranteed.
"""

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from solera_core.architecture import is_embedding, is_head
from solera_merge.block import Block, Float32, Formula, Tensor, Unit
from solera_merge.signs import total

__all__ = ["Float64", "has_matrices", "matrix_by_matrix", "nearest_orthonormal", "svd", "unit_of"]

Float64: TypeAlias = npt.NDArray[np.float64]

_TABLE = re.compile("embed|^wpe$")  # module names of tables that `is_embedding` does not count: positions, types
_ZERO = 2.0**-23  # relative to the largest singular value: below the resolution of float32 there is no direction


def has_matrices(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix that maps activations, or a stack of them (fused experts).

    No: vectors and scalars; a matrix with a single row or column, which is a vector; stacked biases; convolutions;
    embeddings and head. (Their rows are tokens or positions to be looked up. Fine-tuning sees few of them, and the
    singular vectors of a change would spread over all.)
    """
    *modules, last = name.split(".")
    stack = len(shape) == 3 and "experts" in modules
    if not (len(shape) == 2 or stack) or min(shape[-2:]) < 2:
        return False
    looked_up = is_embedding(name) or (modules[-1:] and _TABLE.search(modules[-1]) is not None)
    return not ("bias" in last or looked_up or is_head(name))


def unit_of(name: str, shape: tuple[int, ...]) -> Unit:
    """Whole matrices where there are some; all else is averaged, and may be cut anywhere."""
    return "matrices" if has_matrices(name, shape) else "elements"


def matrix_by_matrix(tensor: Tensor, merge: Callable[[Sequence[Float64]], Float64], scale: float) -> Formula:
    """W_0 + scale merge(tau_1, ..., tau_N) for every matrix; W_0 + scale mean(tau_i) where the tensor has no matrices.

    Args:
        tensor: base and models.
        merge: N matrices [rows, columns] -> [rows, columns].
        scale: of the merged task vector.

    Returns:
        The formula of a block: base [n], N models [n] -> [n].
    """
    if not has_matrices(tensor.name, tensor.shape):
        return _average(scale)
    rows, columns = tensor.shape[-2:]

    def formula(block: Block) -> Float32:
        assert block.base is not None
        base = block.base.astype(np.float64).reshape(-1, rows, columns)
        models = [model.reshape(-1, rows, columns) for model in block.models]
        for i, matrix in enumerate(base):
            matrix += scale * merge([model[i] - matrix for model in models])
        return base.reshape(-1).astype(np.float32)

    return formula


def _average(scale: float) -> Formula:
    def formula(block: Block) -> Float32:
        out = total(block.deltas)
        out /= np.float32(len(block.models))
        if scale != 1:
            out *= np.float32(scale)
        assert block.base is not None
        out += block.base
        return out

    return formula


def svd(x: Float64, k: int | None = None, *, largest: float = 0.0) -> tuple[Float64, Float64, Float64]:
    """U [m, k], S [k] and V^T [k, n], the first k parts of x = U diag(S) V^T.

    Where a singular value is zero the singular vectors are arbitrary: LAPACK has to return some, and a method that
    gives them weight would add noise. Here they are zero as well. Zero means at most 2^-23 of the largest.

    The sign of each pair is such that the largest element of the left vector is positive (of equal ones, the first).

    Args:
        x: [m, n].
        k: how many singular values and vectors; all min(m, n) by default.
        largest: what x is small against where it is what a subtraction has left; its own largest value otherwise.
    """
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    place = np.argmax(np.abs(u), axis=0)
    sign = np.where(np.take_along_axis(u, place[None], axis=0)[0] < 0, -1.0, 1.0)
    sign[s <= _ZERO * max(largest, s[0])] = 0
    sign = sign[:k]
    return u[:, :k] * sign, s[:k] * np.abs(sign), vt[:k] * sign[:, None]


def nearest_orthonormal(x: Float64) -> Float64:
    """The matrix with orthonormal columns (or rows, if there are fewer) that is nearest to x, [m, n].

    U V^T of x = U S V^T: the orthogonal Procrustes problem. Directions that x does not have (columns that are zero, or
    repeat each other) are not invented: there it is a partial isometry.
    """
    u, _, vt = svd(x)
    return u @ vt
