"""Norms and dot products in float64, in the order that `solera_merge.reduction` lays down."""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.formats import widen

__all__ = ["norms_and_dots"]


@kernel
def norms_and_dots(
    raw: npt.NDArray[np.uint8],
    codes: npt.NDArray[np.int64],
    n: int,
    chunk: int,
    lanes: int,
    sums: npt.NDArray[np.float64],
) -> bool:
    """Chunk sums of W_0^2, W_1^2 and W_0 W_1; the base is the last row. Whether an input is not finite.

    Args:
        raw: two rows; see `solera_merge.kernels`.
        codes: of the rows.
        n: elements.
        chunk: elements a chunk; the last one may be shorter.
        lanes: element j of a chunk is added to lane j mod `lanes`; then the lanes are added from the first to the last.
        sums: [3, number of chunks], overwritten.
    """
    a, b = np.empty(chunk, np.float32), np.empty(chunk, np.float32)
    lane_a, lane_b, lane_ab = np.empty(lanes), np.empty(lanes), np.empty(lanes)
    bad = False
    for c in range(sums.shape[1]):
        begin = c * chunk
        m = min(chunk, n - begin)
        bad |= widen(raw[1], codes[1], begin, m, a)
        bad |= widen(raw[0], codes[0], begin, m, b)
        lane_a[:] = 0
        lane_b[:] = 0
        lane_ab[:] = 0
        for row in range(0, m, lanes):
            part_a, part_b = a[row : min(row + lanes, m)], b[row : min(row + lanes, m)]
            for j in range(part_a.size):
                x, y = np.float64(part_a[j]), np.float64(part_b[j])
                lane_a[j] += x * x
                lane_b[j] += y * y
                lane_ab[j] += x * y
        for j in range(1, lanes):
            lane_a[0] += lane_a[j]
            lane_b[0] += lane_b[j]
            lane_ab[0] += lane_ab[j]
        sums[0, c], sums[1, c], sums[2, c] = lane_a[0], lane_b[0], lane_ab[0]
    return bad
