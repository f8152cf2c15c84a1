"""The k largest elements by magnitude, exactly, without sorting and without holding the tensor.

The bits of a non-negative float32 are ordered as the number is. So a histogram of the upper 15 magnitude bits, then
one of the lower 16 bits within the bin where the k-th element lies, give the k-th magnitude exactly in two passes. When
several elements have just that magnitude and not all of them are wanted (common in bf16, where deltas take few
values), the first ones by flat index are kept; a third pass finds the last of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from solera_merge.block import Float32, Tensor

__all__ = [
    "KEEP_ALL",
    "KEEP_NONE",
    "LOWER",
    "UPPER",
    "Cut",
    "descend",
    "kept",
    "largest_deltas",
    "order_statistics",
]

_MAGNITUDE = np.uint32(0x7FFFFFFF)  # all but the sign
UPPER, LOWER = 1 << 15, 1 << 16
"""Bins of the two levels."""


@dataclass(frozen=True)
class Cut:
    """Which elements of a tensor are kept: |x| above `bits`, or equal to it at a flat index of at most `last`.

    Attributes:
        bits: the k-th magnitude, as the bits of a float32.
        last: flat index of the last kept element of just that magnitude.
    """

    bits: int
    last: int

    def keeps(self, x: Float32, start: int) -> npt.NDArray[np.bool_]:
        """[n] bool for the block `x` that begins at flat index `start`."""
        magnitude = _magnitude(x)
        keep = magnitude > np.uint32(self.bits)
        count = min(max(self.last + 1 - start, 0), x.size)  # elements of this block at or before `last`
        keep[:count] |= magnitude[:count] == np.uint32(self.bits)
        return keep


KEEP_ALL = Cut(0, 2**63)
KEEP_NONE = Cut(int(_MAGNITUDE), -1)


@dataclass
class _Search:
    """The search for the k-th largest delta of one model."""

    model: int
    k: int
    upper: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(UPPER, np.int64))
    lower: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(LOWER, np.int64))
    bin: int = 0
    bits: int = 0
    equal: int = 0  # how many elements have the k-th magnitude
    wanted: int = 0  # how many of those are kept
    last: int = -1


def largest_deltas(tensor: Tensor, densities: Sequence[float]) -> list[Cut]:
    """For every model the cut that keeps the int(density * n) deltas W_i - W_0 of largest magnitude.

    At least one is kept when the density is positive, as mergekit does. All models are searched in the same passes.
    """
    cuts = {i: KEEP_ALL if d >= 1 else KEEP_NONE for i, d in enumerate(densities)}
    searches = [_Search(i, kept(d, tensor.size)) for i, d in enumerate(densities) if 0 < d < 1 and tensor.size > 0]
    if searches:
        for search, _, magnitude in _pass(tensor, searches):
            search.upper += np.bincount(magnitude >> 16, minlength=UPPER)
        for search in searches:
            search.bin, above = descend(search.upper, search.k)
            search.wanted = search.k - above
        for search, _, magnitude in _pass(tensor, searches):
            inside = magnitude[magnitude >> 16 == search.bin]
            search.lower += np.bincount(inside & 0xFFFF, minlength=LOWER)
        for search in searches:
            low, above = descend(search.lower, search.wanted)
            search.wanted -= above
            search.equal = int(search.lower[low])
            search.bits = search.bin << 16 | low
        _find_last(tensor, searches)
    for search in searches:
        cuts[search.model] = Cut(search.bits, search.last)
    return [cuts[i] for i in range(len(densities))]


def kept(density: float, size: int) -> int:
    """How many of `size` elements a density above 0 keeps: int(density * size), at least one, as mergekit does."""
    return max(1, int(density * size))


def order_statistics(passes: Callable[[], Iterator[Float32]], ranks: Sequence[int]) -> list[float]:
    """The magnitudes of the given ranks, ascending from 0; exact, in two passes whatever the number of ranks.

    Args:
        passes: called twice; each time the same blocks, [n] each.
        ranks: below the number of elements. (Without any element every magnitude is 0.)

    Example:
        >>> order_statistics(lambda: iter([np.float32([3, -1]), np.float32([2])]), [0, 2])
        [1.0, 3.0]
    """
    upper = np.zeros(UPPER, np.int64)
    for magnitude in map(_magnitude, passes()):
        upper += np.bincount(magnitude >> 16, minlength=UPPER)
    size = int(upper.sum())
    if size == 0:
        return [0.0] * len(ranks)
    places = [descend(upper, size - rank) for rank in ranks]  # the r-th smallest is the (size - r)-th largest
    lower = {upper_bin: np.zeros(LOWER, np.int64) for upper_bin, _ in places}
    for magnitude in map(_magnitude, passes()):
        for upper_bin, histogram in lower.items():
            histogram += np.bincount(magnitude[magnitude >> 16 == upper_bin] & 0xFFFF, minlength=LOWER)
    found: list[float] = []
    for rank, (upper_bin, above) in zip(ranks, places, strict=True):
        low, _ = descend(lower[upper_bin], size - rank - above)
        found.append(float(np.asarray(upper_bin << 16 | low, np.uint32).view(np.float32)))
    return found


def _magnitude(x: Float32) -> npt.NDArray[np.uint32]:
    return x.view(np.uint32) & _MAGNITUDE


def _pass(tensor: Tensor, searches: Sequence[_Search]) -> Iterator[tuple[_Search, int, npt.NDArray[np.uint32]]]:
    """(search, start of the block, magnitude bits of its model's deltas [n]) over all blocks and searches."""
    for block in tensor.blocks():
        assert block.base is not None
        for search in searches:
            delta = block.models[search.model] - block.base
            yield search, block.start, _magnitude(delta)


def descend(histogram: npt.NDArray[np.int64], k: int) -> tuple[int, int]:
    """(the bin that holds the k-th largest element, how many lie in bins above it)."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, k))
    return len(histogram) - 1 - place, int(from_top[place]) - int(histogram[len(histogram) - 1 - place])


def _find_last(tensor: Tensor, searches: Sequence[_Search]) -> None:
    for search in searches:
        # All of them are kept, or they are zeros, which add nothing whichever are kept.
        if search.wanted == search.equal or search.bits == 0:
            search.last = tensor.size
    open_searches = [s for s in searches if s.last < 0]
    for search, start, magnitude in _pass(tensor, open_searches) if open_searches else ():
        if search.wanted > 0:
            places = np.flatnonzero(magnitude == np.uint32(search.bits))
            if places.size >= search.wanted:
                search.last = start + int(places[search.wanted - 1])
            search.wanted -= places.size
