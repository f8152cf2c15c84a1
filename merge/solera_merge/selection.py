"""The k largest elements by magnitude, exactly, without sorting and without holding the tensor.

The bits of a non-negative float32 are ordered as the number is. So a histogram of the upper 15 magnitude bits, then
one of the lower 16 bits within the bin where the k-th element lies, give the k-th magnitude exactly in two passes. When
several elements have just that magnitude and not all of them are wanted (common in bf16, where deltas take few
values), the first ones by flat index are kept; a third pass finds the last of them.

A ranking may run through one tensor or through all tensors of a model: then ties go to the first tensor, by flat index
within it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from solera_merge.block import Block, Float32, Tensor

__all__ = [
    "KEEP_ALL",
    "KEEP_NONE",
    "LOWER",
    "TABLES",
    "UPPER",
    "Band",
    "Cut",
    "Kept",
    "Ranked",
    "bands",
    "count_kept",
    "cuts",
    "descend",
    "largest_deltas",
    "middle_deltas",
    "order_statistics",
]

_MAGNITUDE = np.uint32(0x7FFFFFFF)  # all but the sign
UPPER, LOWER = 1 << 15, 1 << 16
"""Bins of the two levels."""

TABLES = 4
"""Tables of the first level: neighbours often share a bin, and two additions to one cell must wait for each other."""


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
        magnitude = x.view(np.uint32) & _MAGNITUDE
        keep = magnitude > np.uint32(self.bits)
        count = min(max(self.last + 1 - start, 0), x.size)  # elements of this block at or before `last`
        keep[:count] |= magnitude[:count] == np.uint32(self.bits)
        return keep


KEEP_ALL = Cut(0, 2**63)
KEEP_NONE = Cut(int(_MAGNITUDE), -1)


@dataclass(frozen=True)
class Band:
    """Which elements of a tensor are kept: those of `outer` that are not among the largest, `inner`."""

    outer: Cut
    inner: Cut

    def keeps(self, x: Float32, start: int) -> npt.NDArray[np.bool_]:
        """[n] bool for the block `x` that begins at flat index `start`."""
        return self.outer.keeps(x, start) & ~self.inner.keeps(x, start)


Kept: TypeAlias = Cut | Band

Value: TypeAlias = Callable[[Block, int], Float32]
"""(block, place of the source in it) -> what is ranked, [n], newly allocated."""


@dataclass(frozen=True)
class Ranked:
    """One ranking of all elements of a source.

    Attributes:
        places: for every tensor which of its models the source is; None where the tensor has nothing of it.
        k: how many of the largest elements are wanted, or a function of the number of those that are not 0.
    """

    places: tuple[int | None, ...]
    k: int | Callable[[int], int]


def largest_deltas(tensor: Tensor, densities: Sequence[float]) -> list[Cut]:
    """For every model the cut that keeps the int(density * n) deltas W_i - W_0 of largest magnitude.

    At least one is kept when the density is positive, as mergekit does. All models are searched in the same passes.
    """
    rankings = [Ranked((i,), count_kept(d, tensor.size)) for i, d in enumerate(densities)]
    return [row[0] for row in cuts([tensor], rankings)]


def middle_deltas(tensor: Tensor, densities: Sequence[float], gammas: Sequence[float]) -> list[Band]:
    """For every model the band that leaves out the largest deltas, then keeps the int(density * n) next largest.

    int(gamma * n) are left out, but never so many that fewer than the density asks for remain. At least one is kept
    when the density is positive.
    """
    places = [(i,) for i in range(len(densities))]
    return [row[0] for row in bands([tensor], places, densities, gammas)]


def bands(
    tensors: Sequence[Tensor],
    places: Sequence[tuple[int | None, ...]],
    densities: Sequence[float],
    gammas: Sequence[float],
) -> list[list[Band]]:
    """`middle_deltas` with a ranking that runs through all tensors: a row a source, in it a band a tensor.

    Args:
        tensors: in order.
        places: for every source, as in `Ranked`.
        densities: one a source.
        gammas: one a source.
    """
    rankings: list[Ranked] = []
    for where, density, gamma in zip(places, densities, gammas, strict=True):
        size = sum(tensor.size for tensor, place in zip(tensors, where, strict=True) if place is not None)
        wanted = count_kept(density, size)
        left_out = min(int(gamma * size), size - wanted)
        rankings += [Ranked(where, left_out + wanted if wanted else 0), Ranked(where, left_out)]
    found = cuts(tensors, rankings)
    return [
        [Band(outer, inner) for outer, inner in zip(*pair, strict=True)]
        for pair in zip(found[::2], found[1::2], strict=True)
    ]


def cuts(tensors: Sequence[Tensor], rankings: Sequence[Ranked], value: Value | None = None) -> list[list[Cut]]:
    """The exact cuts of several rankings, found in the same passes: a row a ranking, in it a cut a tensor.

    Among elements that are 0 no choice is made: where the k-th is one of them, all are kept.

    Args:
        tensors: in order.
        rankings: any number.
        value: what is ranked by its magnitude; the deltas W_i - W_0 if None.
    """
    from solera_merge.kernels.selection import count_words, count_words_of_bin

    passes = _Passes(tensors, value or _delta)
    found: dict[Ranked, list[Cut]] = {}
    sources: dict[tuple[int | None, ...], _Source] = {}
    searches: list[_Search] = []
    for ranking in rankings:
        size = sum(t.size for t, place in zip(tensors, ranking.places, strict=True) if place is not None)
        if isinstance(ranking.k, int) and not 0 < ranking.k < size:
            found[ranking] = [KEEP_NONE if ranking.k <= 0 else KEEP_ALL] * len(tensors)
        else:
            source = sources.setdefault(ranking.places, _Source(ranking.places))
            searches.append(_Search(ranking, source))
    for source, _, _, magnitude in passes.over(list(sources.values())):
        source.nonzero += magnitude.size - count_words(magnitude, source.tables)
    for search in searches:
        k = search.ranking.k
        k = k if isinstance(k, int) else k(search.source.nonzero)
        if k <= 0:
            found[search.ranking] = [KEEP_NONE] * len(tensors)
            continue
        search.bin, above = descend(search.source.tables.sum(axis=0, dtype=np.int64), k)
        search.wanted = k - above
        search.source.searches.append(search)
    searches = [s for s in searches if s.ranking not in found]
    for source, _, _, magnitude in passes.over(_sources_of(searches)):
        for search in source.searches:
            count_words_of_bin(magnitude, search.bin, search.lower)
    for search in searches:
        low, above = descend(search.lower, search.wanted)
        search.wanted -= above
        search.bits = search.bin << 16 | low
        # All of them are kept, or they are zeros.
        search.closed = search.wanted == int(search.lower[low]) or search.bits == 0
    _find_last(passes, searches)
    for search in searches:
        found[search.ranking] = search.cuts(len(tensors))
    return [found[ranking] for ranking in rankings]


def count_kept(density: float, size: int) -> int:
    """How many of `size` elements a density keeps: int(density * size), but at least one of a density above 0."""
    if density >= 1:
        return size
    return max(1, int(density * size)) if density > 0 and size > 0 else 0


def order_statistics(passes: Callable[[], Iterator[Float32]], ranks: Sequence[int]) -> list[float]:
    """The magnitudes of the given ranks, ascending from 0; exact, in two passes whatever the number of ranks.

    Args:
        passes: called twice; each time the same blocks, [n] each.
        ranks: below the number of elements. (Without any element every magnitude is 0.)

    Example:
        >>> order_statistics(lambda: iter([np.float32([3, -1]), np.float32([2])]), [0, 2])
        [1.0, 3.0]
    """
    from solera_merge.kernels.selection import count_words, count_words_of_bin

    tables = np.zeros((TABLES, UPPER), np.uint32)
    for magnitude in map(_magnitude, passes()):
        count_words(magnitude, tables)
    upper = tables.sum(axis=0, dtype=np.int64)
    size = int(upper.sum())
    if size == 0:
        return [0.0] * len(ranks)
    places = [descend(upper, size - rank) for rank in ranks]  # the r-th smallest is the (size - r)-th largest
    lower = {upper_bin: np.zeros(LOWER, np.int64) for upper_bin, _ in places}
    for magnitude in map(_magnitude, passes()):
        for upper_bin, histogram in lower.items():
            count_words_of_bin(magnitude, upper_bin, histogram)
    found: list[float] = []
    for rank, (upper_bin, above) in zip(ranks, places, strict=True):
        low, _ = descend(lower[upper_bin], size - rank - above)
        found.append(float(np.asarray(upper_bin << 16 | low, np.uint32).view(np.float32)))
    return found


def _magnitude(x: Float32) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(x).view(np.uint32) & _MAGNITUDE


def _delta(block: Block, place: int) -> Float32:
    assert block.base is not None
    return block.models[place] - block.base


@dataclass(eq=False)
class _Source:
    """One model (or whatever else is ranked) with the first level of its histogram."""

    places: tuple[int | None, ...]
    tables: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros((TABLES, UPPER), np.uint32))
    nonzero: int = 0
    searches: "list[_Search]" = field(default_factory=list["_Search"])


@dataclass(eq=False)
class _Search:
    """The search for the k-th largest value of one source."""

    ranking: Ranked
    source: _Source
    lower: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(LOWER, np.int64))
    bin: int = 0
    bits: int = 0
    wanted: int = 0  # how many of the elements that have the k-th magnitude are kept
    closed: bool = False  # all of them are
    last: tuple[int, int] = (0, 0)  # tensor and flat index of the last one that is kept, unless `closed`

    def cuts(self, tensors: int) -> list[Cut]:
        if self.closed:
            return [Cut(self.bits, KEEP_ALL.last)] * tensors
        here, index = self.last
        return [Cut(self.bits, KEEP_ALL.last if t < here else index if t == here else -1) for t in range(tensors)]


def _sources_of(searches: Sequence[_Search]) -> list[_Source]:
    return list(dict.fromkeys(search.source for search in searches))


@dataclass(frozen=True)
class _Passes:
    """Passes over the tensors that compute and yield only what is asked for."""

    tensors: Sequence[Tensor]
    value: Value

    def over(self, sources: Sequence[_Source]) -> Iterator[tuple[_Source, int, int, npt.NDArray[np.uint32]]]:
        """(source, tensor, start of the block, magnitude bits [n]) over all tensors, their blocks, and the sources."""
        for t, tensor in enumerate(self.tensors):
            here = [(source, place) for source in sources if (place := source.places[t]) is not None]
            for block in tensor.blocks() if here else ():
                for source, place in here:
                    yield source, t, block.start, _magnitude(self.value(block, place))


def descend(histogram: npt.NDArray[np.int64], k: int) -> tuple[int, int]:
    """(the bin that holds the k-th largest element, how many lie in bins above it)."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, k))
    return len(histogram) - 1 - place, int(from_top[place]) - int(histogram[len(histogram) - 1 - place])


def _find_last(passes: _Passes, searches: Sequence[_Search]) -> None:
    left = [search for search in searches if not search.closed]
    to_go = {id(search): search.wanted for search in left}
    for source, tensor, start, magnitude in passes.over(_sources_of(left)):
        for search in source.searches:
            if to_go.get(id(search), 0) <= 0:
                continue
            places = np.flatnonzero(magnitude == np.uint32(search.bits))
            if places.size >= to_go[id(search)]:
                search.last = tensor, start + int(places[to_go[id(search)] - 1])
            to_go[id(search)] -= places.size
        if all(count <= 0 for count in to_go.values()):
            return
