"""TSV-M: the leading singular vectors of every task, made orthogonal to each other."""

from collections.abc import Sequence

import numpy as np

from solera_merge.block import Formula, Tensor
from solera_merge.methods.signature import Finite
from solera_merge.singular import Float64, matrix_by_matrix, nearest_orthonormal, svd

__all__ = ["tsv_m"]


def tsv_m(tensor: Tensor, /, *, lambda_: Finite = 1.0) -> Formula:
    """W = W_0 + lambda U' S V'^T for every matrix, from the leading singular vectors of the N task vectors.

    1. of each tau_i = U_i S_i V_i^T [m, n] the k = min(m, n) / N (rounded down, at least 1) largest singular values
       with their vectors;
    2. U, S and V put side by side: U [m, N k], V [n, N k];
    3. U' and V' the nearest matrices with orthonormal columns: tasks no longer share directions.

    Task Singular Vectors, arXiv 2412.00081 (TSV-Merge). What is no matrix gets the mean of the task vectors, times
    lambda, as in the authors' code: vectors, scalars, convolutions. Fused experts are merged expert by expert.

    Differences from the authors' code, which was written for the image encoder of CLIP: embedding and head are averaged
    too (see `solera_merge.singular.has_matrices`), as are matrices of one row or column; k is at least 1, where theirs
    is 0 for more tasks than rows and leaves the base; directions with a singular value of zero (a task that did not
    change a matrix, or only in few directions; tasks that are equal) get no arbitrary vectors to be made orthogonal to
    (`solera_merge.singular.svd`); float64 instead of float32. mergekit does not have this method.

    What it does to language models was measured in arXiv 2511.21437 (four models of 3B to 8B, twelve fine-tunes each,
    16 benchmarks): no reliable gain over the base, where task arithmetic has one. Compare both before you use it.

    It costs N + 2 decompositions a matrix, of O(m n min(m, n)) each: minutes for 4096 x 4096 on a processor.

    Args:
        tensor: base and models.
        lambda_: scale of the merged task vector (the paper's alpha).

    Returns:
        The formula of a block of whole matrices (elements, where there are none): base [n], N models [n] -> [n].
    """
    return matrix_by_matrix(tensor, _merge, lambda_)


def _merge(taus: Sequence[Float64]) -> Float64:
    k = max(min(taus[0].shape) // len(taus), 1)
    us, ss, vts = zip(*(svd(tau, k) for tau in taus), strict=True)
    u = nearest_orthonormal(np.concatenate(us, axis=1))
    s = np.concatenate(ss)
    vt = nearest_orthonormal(np.concatenate(vts, axis=0))
    merged: Float64 = u * s @ vt
    return merged
