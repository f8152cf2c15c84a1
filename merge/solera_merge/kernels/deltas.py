"""How far task vectors are apart, element by element, in float64 as in `methods.sce`."""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.formats import widen

__all__ = ["load_deltas", "spreads"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int64]


@kernel
def load_deltas(raw: Bytes, codes: Codes, begin: int, m: int, base: Float32, terms: Float32) -> bool:
    """The base [m], and W_i - W_0 of all models [N, m]; whether one value is not finite."""
    models = len(terms)
    bad = widen(raw[models], codes[models], begin, m, base)
    for i in range(models):
        term = terms[i]
        bad |= widen(raw[i], codes[i], begin, m, term)
        for j in range(m):
            term[j] = term[j] - base[j]
    return bad


@kernel
def spreads(terms: Float32, m: int, mean: Float64, squares: Float64, out: Float32) -> None:
    """out[:m] = the sum of (tau_i - mean tau)^2; `mean` and `squares` are scratch space of that length."""
    count = len(terms)
    if count == 2:  # the same operations, without the way through memory
        first, second = terms[0], terms[1]
        for j in range(m):
            a, b = np.float64(first[j]), np.float64(second[j])
            middle = (a + b) * 0.5
            out[j] = np.float32((a - middle) * (a - middle) + (b - middle) * (b - middle))
        return
    for i in range(count):
        term = terms[i]
        if i == 0:
            for j in range(m):
                mean[j] = np.float64(term[j])
        else:
            for j in range(m):
                mean[j] += np.float64(term[j])
    for j in range(m):
        mean[j] /= count
    for i in range(count):
        term = terms[i]
        if i == 0:
            for j in range(m):
                apart = np.float64(term[j]) - mean[j]
                squares[j] = apart * apart
        else:
            for j in range(m):
                apart = np.float64(term[j]) - mean[j]
                squares[j] += apart * apart
    for j in range(m):
        out[j] = np.float32(squares[j])
