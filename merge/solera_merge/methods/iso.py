"""Isotropic merging: all directions of the merged task vector get the same singular value."""

from collections.abc import Sequence

import numpy as np

from solera_merge.block import Formula, Tensor
from solera_merge.methods.signature import Finite, Fraction
from solera_merge.singular import Float64, matrix_by_matrix, nearest_orthonormal, svd

__all__ = ["iso_c", "iso_cts"]


def iso_c(tensor: Tensor, /, *, lambda_: Finite = 1.0) -> Formula:
    """W = W_0 + lambda s U V^T, for every matrix W, from sum_i tau_i = U S V^T, s = mean of S.

    Iso-C, arXiv 2502.04959. Task arithmetic lets the directions that tasks share dominate; this gives every direction
    of the sum the same length. What is no matrix gets the mean of the task vectors, times lambda, as in the authors'
    code: vectors, scalars, convolutions. Fused experts are merged expert by expert.

    Differences from the authors' code, which was written for the image encoder of CLIP: embedding and head are averaged
    too (see `solera_merge.singular.has_matrices`), as are matrices of one row or column; a direction that the sum does
    not have (singular value 0) stays without a change, where theirs gives an arbitrary one the mean length; float64
    instead of float32. The mean is over all min(m, n) singular values, zeros too, as theirs. mergekit does not have
    this method.

    What it does to language models was measured in arXiv 2511.21437 (four models of 3B to 8B, twelve fine-tunes each,
    16 benchmarks): no reliable gain over the base, where task arithmetic has one. Compare both before you use it.

    It costs one decomposition a matrix, of O(m n min(m, n)): minutes for 4096 x 4096 on a processor.

    Args:
        tensor: base and models.
        lambda_: scale of the merged task vector (the paper's alpha, found by validation).

    Returns:
        The formula of a block of whole matrices (elements, where there are none): base [n], N models [n] -> [n].
    """
    return matrix_by_matrix(tensor, _common, lambda_)


def iso_cts(tensor: Tensor, /, *, common_space_fraction: Fraction = 0.8, lambda_: Finite = 1.0) -> Formula:
    """As iso_c, with the last directions of the sum replaced by directions of each task.

    1. of sum_i tau_i = U S V^T the first k singular values and vectors, U_c: the common space;
    2. of each (1 - U_c U_c^T) tau_i the first (r - k) / N, r = min(m, n): what the common space lacks of task i;
    3. both put side by side: U [m, r], S [r], V [n, r]; U' and V' the nearest matrices with orthonormal columns;
    4. W = W_0 + lambda s U' V'^T, s = mean of S.

    Iso-CTS, arXiv 2502.04959. (r - k) / N is rounded to the nearest whole number, as in the authors' code (to an even
    one from the middle), but never so that k would be negative; then k is what is left. With a common_space_fraction of
    1 it is iso_c, and with one model too. All that is said there holds, except that arXiv 2511.21437 did not measure
    this method. It costs N + 3 decompositions a matrix.

    Args:
        tensor: base and models.
        common_space_fraction: k / r, before rounding.
        lambda_: scale of the merged task vector (the paper's alpha, found by validation).

    Returns:
        The formula of a block of whole matrices (elements, where there are none): base [n], N models [n] -> [n].
    """

    def merge(taus: Sequence[Float64]) -> Float64:
        return _common_and_specific(taus, common_space_fraction)

    return matrix_by_matrix(tensor, merge, lambda_)


def _common(taus: Sequence[Float64]) -> Float64:
    u, s, vt = svd(np.sum(taus, axis=0))
    return np.mean(s) * (u @ vt)


def _common_and_specific(taus: Sequence[Float64], fraction: float) -> Float64:
    r = min(taus[0].shape)
    specific = min(round((r - int(r * fraction)) / len(taus)), r // len(taus))  # of each task
    common = r - specific * len(taus)
    shared = svd(np.sum(taus, axis=0), common)
    space = shared[0]
    parts = [svd(tau - space @ (space.T @ tau), specific, largest=float(np.linalg.norm(tau))) for tau in taus]
    us, ss, vts = zip(*parts, shared, strict=True)
    u = nearest_orthonormal(np.concatenate(us, axis=1))
    vt = nearest_orthonormal(np.concatenate(vts, axis=0))
    merged: Float64 = np.mean(np.concatenate(ss)) * (u @ vt)
    return merged
