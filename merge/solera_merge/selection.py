"""The k largest elements by magnitude, exactly, without sorting and without holding the tensor.

The bits of a non-negative float32 are ordered as the number is. So a histogram of the upper 15 magnitude bits, then
one of the lower 16 bits within the bin where the k-th element lies, give the k-th magnitude exactly in two passes. When
several elements have just that magnitude and not all of them are wanted (common in bf16, where deltas take few
values), the first ones by flat index are kept; a third pass finds the last of them.

A ranking may run through one tensor or through all tensors of a model: then ties go to the first tensor, by flat index
within it.
"""

import threading
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
    "Each",
    "Kept",
    "Ranked",
    "band_ranks",
    "bands",
    "count_kept",
    "cuts",
    "descend",
    "largest_deltas",
    "middle_deltas",
    "one_after_another",
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


Each: TypeAlias = Callable[[Callable[[int], None], Sequence[int]], None]
"""Calls a function with every number, in any order, perhaps several at once; returns when all is done."""


def one_after_another(function: Callable[[int], None], numbers: Sequence[int]) -> None:
    """The simplest `Each`."""
    for number in numbers:
        function(number)


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
    each: Each = one_after_another,
) -> list[list[Band]]:
    """`middle_deltas` with a ranking that runs through all tensors: a row a source, in it a band a tensor.

    Args:
        tensors: in order.
        places: for every source, as in `Ranked`.
        densities: one a source.
        gammas: one a source.
        each: how to go over the tensors.
    """
    rankings: list[Ranked] = []
    for where, density, gamma in zip(places, densities, gammas, strict=True):
        size = sum(tensor.size for tensor, place in zip(tensors, where, strict=True) if place is not None)
        rankings += [Ranked(where, k) for k in band_ranks(size, density, gamma)]
    found = cuts(tensors, rankings, each=each)
    return [
        [Band(outer, inner) for outer, inner in zip(*pair, strict=True)]
        for pair in zip(found[::2], found[1::2], strict=True)
    ]


def cuts(
    tensors: Sequence[Tensor], rankings: Sequence[Ranked], value: Value | None = None, each: Each = one_after_another
) -> list[list[Cut]]:
    """The exact cuts of several rankings, found in the same passes: a row a ranking, in it a cut a tensor.

    Among elements that are 0 no choice is made: where the k-th is one of them, all are kept.

    Args:
        tensors: in order.
        rankings: any number.
        value: what is ranked by its magnitude; the deltas W_i - W_0 if None.
        each: how to go over the tensors.
    """
    passes = _Passes(tensors, value or _delta, each)
    found: dict[int, list[Cut]] = {}
    sources: dict[tuple[int | None, ...], _Source] = {}
    for r, ranking in enumerate(rankings):
        size = sum(t.size for t, place in zip(tensors, ranking.places, strict=True) if place is not None)
        if isinstance(ranking.k, int) and not 0 < ranking.k < size:
            found[r] = [KEEP_NONE if ranking.k <= 0 else KEEP_ALL] * len(tensors)
        else:
            sources.setdefault(ranking.places, _Source(ranking.places))
    passes.count_upper(list(sources.values()))
    searches: dict[int, _Search] = {}
    for r, ranking in enumerate(rankings):
        if r in found:
            continue
        source = sources[ranking.places]
        k = ranking.k if isinstance(ranking.k, int) else ranking.k(source.nonzero)
        if k <= 0:
            found[r] = [KEEP_NONE] * len(tensors)
            continue
        place, above = descend(source.upper, k)
        searches[r] = _Search(source, place, k - above)
    passes.count_lower(list(searches.values()))
    for search in searches.values():
        low, above = descend(search.lower, search.wanted)
        search.wanted -= above
        search.equal = int(search.lower[low])
        search.bits = search.bin << 16 | low
    passes.find_last([search for search in searches.values() if not search.closed])
    return [found[r] if r in found else searches[r].cuts(len(tensors)) for r in range(len(rankings))]


def band_ranks(size: int, density: float, gamma: float) -> tuple[int, int]:
    """How many of the largest of `size` elements are kept or left out, and how many of them are left out."""
    wanted = count_kept(density, size)
    left_out = min(int(gamma * size), size - wanted)
    return (left_out + wanted if wanted else 0), left_out


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
    upper: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(UPPER, np.int64))
    nonzero: int = 0


@dataclass(eq=False)
class _Search:
    """The search for the k-th largest value of one source."""

    source: _Source
    bin: int
    wanted: int  # how many are wanted of those in the bin, then of those that have the k-th magnitude
    lower: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(LOWER, np.int64))
    bits: int = 0
    equal: int = 0  # how many have just the k-th magnitude
    last: tuple[int, int] = (0, 0)  # tensor and flat index of the last of them that is kept, unless `closed`

    @property
    def closed(self) -> bool:
        """Whether all of them are kept, or they are zeros."""
        return self.wanted == self.equal or self.bits == 0

    def cuts(self, tensors: int) -> list[Cut]:
        if self.closed:
            return [Cut(self.bits, KEEP_ALL.last)] * tensors
        here, index = self.last
        return [Cut(self.bits, KEEP_ALL.last if t < here else index if t == here else -1) for t in range(tensors)]


@dataclass(frozen=True)
class _Passes:
    """Passes over the tensors, each of which reads only what is asked for.

    What a tensor gives is counted by itself and then added, as whole numbers, so that the order of the tensors does
    not matter.
    """

    tensors: Sequence[Tensor]
    value: Value
    each: Each
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count_upper(self, sources: Sequence[_Source]) -> None:
        """The upper histograms."""
        from solera_merge.kernels.selection import count_words

        def count(t: int) -> None:
            here = [source for source in sources if source.places[t] is not None]
            tables = [np.zeros((TABLES, UPPER), np.uint32) for _ in here]
            nonzero = [0] * len(here)
            for _, magnitudes in self._blocks(t, here):
                for i, magnitude in enumerate(magnitudes):
                    nonzero[i] += magnitude.size - count_words(magnitude, tables[i])
            with self.lock:
                for source, table, more in zip(here, tables, nonzero, strict=True):
                    source.upper += table.sum(axis=0, dtype=np.int64)
                    source.nonzero += more

        self.each(count, self._with([source.places for source in sources]))

    def count_lower(self, searches: Sequence[_Search]) -> None:
        """The lower histograms."""
        from solera_merge.kernels.selection import count_words_of_bin

        def count(t: int) -> None:
            here = [search for search in searches if search.source.places[t] is not None]
            found = [np.zeros(LOWER, np.int64) for _ in here]
            sources = list(dict.fromkeys(search.source for search in here))
            for _, magnitudes in self._blocks(t, sources):
                of_source = dict(zip(sources, magnitudes, strict=True))
                for search, counts in zip(here, found, strict=True):
                    count_words_of_bin(of_source[search.source], search.bin, counts)
            with self.lock:
                for search, counts in zip(here, found, strict=True):
                    search.lower += counts

        self.each(count, self._with([search.source.places for search in searches]))

    def find_last(self, searches: Sequence[_Search]) -> None:
        """The last of the elements of just the k-th magnitude that is kept: first its tensor, then its place there."""
        equal = np.zeros((len(searches), len(self.tensors)), np.int64)
        spread = [i for i, search in enumerate(searches) if sum(p is not None for p in search.source.places) > 1]

        def count(t: int) -> None:
            here = [i for i in spread if searches[i].source.places[t] is not None]
            for _, magnitudes in self._blocks(t, [searches[i].source for i in here]):
                for i, magnitude in zip(here, magnitudes, strict=True):
                    equal[i, t] += np.count_nonzero(magnitude == np.uint32(searches[i].bits))

        self.each(count, self._with([searches[i].source.places for i in spread]))
        to_go = [0] * len(searches)
        ending: dict[int, list[int]] = {}  # tensor -> the searches that end there
        for i, search in enumerate(searches):
            if i not in spread:
                equal[i, self._with([search.source.places])] = search.equal
            up_to = np.cumsum(equal[i])
            t = int(np.searchsorted(up_to, search.wanted))
            to_go[i] = search.wanted - int(up_to[t] - equal[i, t])
            ending.setdefault(t, []).append(i)

        def find(t: int) -> None:
            for block, magnitudes in self._blocks(t, [searches[i].source for i in ending[t]]):
                for i, magnitude in zip(ending[t], magnitudes, strict=True):
                    if to_go[i] <= 0:
                        continue
                    places = np.flatnonzero(magnitude == np.uint32(searches[i].bits))
                    if places.size >= to_go[i]:
                        searches[i].last = t, block.start + int(places[to_go[i] - 1])
                    to_go[i] -= places.size
                if all(to_go[i] <= 0 for i in ending[t]):
                    return

        self.each(find, list(ending))

    def _with(self, places: Sequence[tuple[int | None, ...]]) -> list[int]:
        """The tensors that have something of one of these sources."""
        return [t for t in range(len(self.tensors)) if any(where[t] is not None for where in places)]

    def _blocks(self, t: int, sources: Sequence[_Source]) -> Iterator[tuple[Block, list[npt.NDArray[np.uint32]]]]:
        """(block, magnitude bits [n] of every source) over one tensor."""
        for block in self.tensors[t].blocks():
            yield block, [_magnitude(self.value(block, place)) for s in sources if (place := s.places[t]) is not None]


def descend(histogram: npt.NDArray[np.int64], k: int) -> tuple[int, int]:
    """(the bin that holds the k-th largest element, how many lie in bins above it)."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, k))
    return len(histogram) - 1 - place, int(from_top[place]) - int(histogram[len(histogram) - 1 - place])
