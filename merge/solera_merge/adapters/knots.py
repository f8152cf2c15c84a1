"""KnOTS: the updates of several adapters in the singular vectors that they share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from solera_merge.adapters.low_rank import Factors
from solera_merge.singular import svd

__all__ = ["Aligned", "align"]

Float32: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Aligned:
    """Updates U diag(S) V_i^T with common U and S.

    Attributes:
        left: U diag(S), [rows, k].
        parts: V_i^T, [k, columns] each: what is merged in their place.
    """

    left: Float32
    parts: tuple[Float32, ...]


def align(updates: Sequence[Factors | None], columns: int) -> Aligned:
    """The SVD of the updates side by side, [D_1 ... D_N] = U S [V_1^T ... V_N^T] (arXiv 2410.19735, section 4).

    It is found from the factors: the left factors span U (a QR), and what remains is as high as their ranks together.
    An update that is None counts as zero.

    Args:
        updates: D_i = left_i @ right_i, [rows, columns] each, not all None.
        columns: of every update.
    """
    present = [update for update in updates if update is not None]
    basis, inner = np.linalg.qr(np.concatenate([update.left for update in present], axis=1).astype(np.float64))
    pieces: list[npt.NDArray[np.float64]] = []
    at = 0
    for update in updates:
        if update is None:
            pieces.append(np.zeros((len(inner), columns)))
            continue
        pieces.append(inner[:, at : at + update.rank] @ update.right.astype(np.float64))
        at += update.rank
    v, s, ut = svd(np.concatenate(pieces, axis=1).T)
    k = max(int(np.count_nonzero(s)), 1)
    left = (basis @ ut[:k].T) * s[:k]
    parts = [v[i * columns : (i + 1) * columns, :k].T.astype(np.float32, order="C") for i in range(len(updates))]
    for update, part in zip(updates, parts, strict=True):
        part *= update is not None  # rounding must not make it a vote
    return Aligned(left.astype(np.float32), tuple(parts))
