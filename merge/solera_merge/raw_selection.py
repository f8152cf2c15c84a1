"""`solera_merge.selection` on stored bytes: the same cuts, in two passes where the k-th magnitude's bin is small."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from solera_merge.selection import KEEP_ALL, KEEP_NONE, LOWER, TABLES, UPPER, Cut, descend

if TYPE_CHECKING:
    from solera_merge.fused import RawBlock, RawTensor

__all__ = ["NotFiniteError", "Wanted", "raw_cuts"]

_COLLECTED = 1 << 18  # elements of a bin that are held in memory to be ranked: 2.5 MB


class NotFiniteError(Exception):
    """An input holds NaN or infinity, or cannot be read; the engine looks for the place."""


Wanted: TypeAlias = int | Callable[[int], int]
"""How many of the largest values are wanted, or a function of the number of those that are not 0."""


def raw_cuts(tensor: "RawTensor", rankings: Sequence[tuple[int, Wanted]]) -> list[Cut]:
    """As `solera_merge.selection.cuts` for one tensor.

    Args:
        tensor: with a base.
        rankings: (row of a model, whose deltas are ranked, or `kernels.selection.SPREAD`; how many are wanted).

    Raises:
        NotFiniteError: an input is not finite.
    """
    from solera_merge.kernels.selection import count_upper

    found: dict[int, Cut] = {}
    for r, (_, wanted) in enumerate(rankings):
        if isinstance(wanted, int) and not 0 < wanted < tensor.size:
            found[r] = KEEP_ALL if wanted > 0 else KEEP_NONE
    left = [r for r in range(len(rankings)) if r not in found]
    tables = {rankings[r][0]: np.zeros((TABLES, UPPER), np.uint32) for r in left}
    zeros = dict.fromkeys(tables, 0)
    for block in tensor.blocks() if tables else ():
        for source, table in tables.items():
            seen = count_upper(block.raw, block.codes, block.n, source, table)
            if seen < 0:
                raise NotFiniteError
            zeros[source] += seen
    histograms = {source: table.sum(axis=0, dtype=np.int64) for source, table in tables.items()}
    tables.clear()
    searches: dict[int, _Search] = {}
    for r in left:
        source, wanted = rankings[r]
        k = wanted if isinstance(wanted, int) else wanted(tensor.size - zeros[source])
        if k <= 0:
            found[r] = KEEP_NONE
            continue
        place, above = descend(histograms[source], k)
        inside = int(histograms[source][place])
        if place == 0 and k - above > inside - zeros[source]:
            found[r] = Cut(0, tensor.size)  # the k-th is 0, as where less than the density has changed at all
        else:
            searches[r] = _Search(source, place, k - above, inside)
    _search(tensor, list(searches.values()))
    return [found[r] if r in found else searches[r].cut for r in range(len(rankings))]


def _search(tensor: "RawTensor", searches: "Sequence[_Search]") -> None:
    from solera_merge.kernels.selection import count_lower, find_equal

    small = [s for s in searches if s.inside <= _COLLECTED]
    large = [s for s in searches if s.inside > _COLLECTED]
    for block in tensor.blocks() if searches else ():
        for search in small:
            search.collect(block)
        for search in large:
            count_lower(block.raw, block.codes, block.n, search.source, search.bin, search.lower_counts)
    for search in small:
        search.rank(tensor.size)
    for search in large:
        low, above = descend(search.lower_counts, search.wanted)
        search.wanted -= above
        bits = search.bin << 16 | low
        everything = search.wanted == int(search.lower_counts[low]) or bits == 0
        search.cut = Cut(bits, tensor.size if everything else -1)
    open_searches = [s for s in large if s.cut.last < 0]
    for block in tensor.blocks() if open_searches else ():
        for search in open_searches:
            if search.wanted > 0:
                bits, wanted = search.cut.bits, search.wanted
                place, seen = find_equal(block.raw, block.codes, block.n, search.source, bits, wanted)
                if place >= 0:
                    search.cut = Cut(bits, block.start + place)
                search.wanted -= seen


class _Search:
    """The k-th largest value of one source, known to lie in `bin`, as the `wanted`-th of `inside` elements there."""

    def __init__(self, source: int, place: int, wanted: int, inside: int) -> None:
        self.source = source
        self.bin = place
        self.wanted = wanted
        self.inside = inside
        self.cut = KEEP_NONE
        self._found = 0
        small = inside <= _COLLECTED
        self.lower_counts = np.zeros(0 if small else LOWER, np.int64)
        self._places = np.empty(inside if small else 0, np.int64)
        self._lower = np.empty(inside if small else 0, np.uint16)

    def collect(self, block: "RawBlock") -> None:
        """Note the elements of the bin in this block."""
        from solera_merge.kernels.selection import collect_bin

        self._found = collect_bin(
            block.raw, block.codes, block.n, self.source, block.start, self.bin, self._places, self._lower, self._found
        )

    def rank(self, size: int) -> None:
        """Find the cut, from what was collected."""
        low, above = descend(np.bincount(self._lower, minlength=LOWER), self.wanted)
        bits = self.bin << 16 | low
        places = self._places[self._lower == low]
        number = self.wanted - above
        self.cut = Cut(bits, size if number == places.size or bits == 0 else int(places[number - 1]))
