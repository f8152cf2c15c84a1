"""The hot methods from stored bytes to stored bytes, without float32 blocks in between.

Each function is the twin of the method of the same name in `methods/`: the same parameters, the same bits (tested), but
it looks at raw blocks through the kernels in `kernels/`. The engine takes it where every source is stored as plain
float32, float16 or bfloat16; everything else goes through the readable function.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from solera_core.dtypes import ITEM_BYTES
from solera_merge.block import CHUNK_ELEMENTS
from solera_merge.kernels.formats import CODES
from solera_merge.kernels.norms import norms_and_dots
from solera_merge.kernels.selection import collect_bin, count_lower, count_upper, find_equal
from solera_merge.kernels.spans import Rows, span_of_deltas, span_of_largest, span_of_random, span_of_sum
from solera_merge.masks import split_key, threshold
from solera_merge.methods.slerp import coefficients
from solera_merge.reduction import LANES, add_parts, root_sums
from solera_merge.selection import KEEP_ALL, KEEP_NONE, LOWER, TABLES, UPPER, Cut, count_kept, descend
from solera_merge.task_vectors import rescale_factors

__all__ = ["FUSED", "Drift", "NotFiniteError", "RawBlock", "RawFormula", "RawTensor", "merged_blocks"]

_COLLECTED = 1 << 18  # elements of a bin that are held in memory to be ranked: 2.5 MB


_NO_FILES, _NO_OFFSETS = np.empty(0, np.int32), np.empty(0, np.int64)


class NotFiniteError(Exception):
    """An input holds NaN or infinity, or cannot be read; the engine looks for the place."""


@dataclass(frozen=True)
class RawBlock:
    """The same elements of every source, as stored.

    Attributes:
        start: flat index of the first element; a multiple of `CHUNK_ELEMENTS`.
        n: number of elements.
        raw: [N, bytes], one row a source: the models, then the base where there is one.
        codes: [N], number format of each row (`solera_merge.kernels.formats.CODES`).
        files: [N], where the elements are still to be read from, `step` at a time into `raw`; empty: they are there.
        offsets: [N], of the first byte in each file.
        step: elements at a time; 0 where all are there.
    """

    start: int
    n: int
    raw: npt.NDArray[np.uint8]
    codes: npt.NDArray[np.int64]
    files: npt.NDArray[np.int32] = field(default_factory=lambda: _NO_FILES)
    offsets: npt.NDArray[np.int64] = field(default_factory=lambda: _NO_OFFSETS)
    step: int = 0

    @property
    def rows(self) -> tuple[Rows, int, int]:
        """What a kernel over spans begins with: sources, number of elements, elements at a time."""
        return Rows(self.raw, self.codes, self.files, self.offsets), self.n, self.step or max(self.n, 1)


class RawTensor(Protocol):
    """One output tensor with all its sources."""

    @property
    def size(self) -> int:
        """Number of elements."""
        ...

    @property
    def step(self) -> int:
        """Elements a block, at most."""
        ...

    @property
    def keys(self) -> tuple[int, ...]:
        """One random key a model."""
        ...

    def blocks(self) -> Iterator[RawBlock]:
        """One pass over all elements, in order; a block is only valid until the next one."""
        ...

    def spans(self) -> Iterator[RawBlock]:
        """As `blocks`, but larger ones, which kernels over spans read for themselves."""
        ...


Drift: TypeAlias = npt.NDArray[np.float64]
RawFormula: TypeAlias = Callable[[RawBlock, npt.NDArray[np.uint8], int, Drift], int]
"""(block, output bytes, their format, drift) -> what was wrong: bit 0 an input is not finite, bit 1 the output, bit 2 a
file cannot be read.

What is added to `drift`: |result - reference|^2 and |reference|^2; the reference is the base, else the first model.
"""

_one = np.float32(1)


def linear(_tensor: RawTensor, /, *, weight: Sequence[float], normalize: bool) -> RawFormula:
    """As `methods.linear`."""
    factors = np.array(weight, np.float32)
    divisor = np.float32(sum(weight)) if normalize else _one
    return lambda b, out, code, drift: span_of_sum(*b.rows, factors, divisor, out, code, drift, 0)


def passthrough(_tensor: RawTensor, /, *, scale: Sequence[float]) -> RawFormula:
    """As `methods.passthrough`."""
    factors = np.array(scale, np.float32)
    return lambda b, out, code, drift: span_of_sum(*b.rows, factors, _one, out, code, drift, 0)


def slerp(tensor: RawTensor, /, *, t: float) -> RawFormula:
    """As `methods.slerp`."""
    base, model, product = list[float](), list[float](), list[float]()
    for block in tensor.blocks():
        sums = np.empty((3, -(-block.n // CHUNK_ELEMENTS)))
        if norms_and_dots(block.raw, block.codes, block.n, CHUNK_ELEMENTS, LANES, sums):
            raise NotFiniteError
        for parts, more in zip((base, model, product), sums.tolist(), strict=True):
            add_parts(parts, more)
    c_base, c_model = coefficients(t, *root_sums(base, model, product))
    factors = np.array([c_model, c_base], np.float32)  # a sum of two has the same bits in either order
    return lambda b, out, code, drift: span_of_sum(*b.rows, factors, _one, out, code, drift, 1)


def task_arithmetic(_tensor: RawTensor, /, *, weight: Sequence[float], normalize: bool, lambda_: float) -> RawFormula:
    """As `methods.task_arithmetic`."""
    factors = np.array(weight, np.float32)
    divisor = np.float32(sum(weight) or 1.0) if normalize else _one
    scale = np.float32(lambda_)
    return lambda b, out, code, drift: span_of_deltas(*b.rows, factors, divisor, scale, out, code, drift)


def ties(
    tensor: RawTensor,
    /,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    lambda_: float,
    scope: str,
    int8_mask: bool,
) -> RawFormula:
    """As `methods.ties` for `scope: tensor`."""
    assert scope == "tensor", "the engine takes the readable method for what a survey has found"
    del int8_mask
    cuts = largest_deltas(tensor, density)
    bits = np.array([cut.bits for cut in cuts], np.uint32)
    last = np.array([min(cut.last, tensor.size) for cut in cuts], np.int64)
    factors, scale = np.array(weight, np.float32), np.float32(lambda_)
    return lambda b, out, code, drift: span_of_largest(
        *b.rows, b.start, bits, last, factors, normalize, scale, out, code, drift
    )


class Dare(TypedDict):
    """The parameters of both."""

    weight: Sequence[float]
    density: Sequence[float]
    normalize: bool
    rescale: bool
    lambda_: float
    int8_mask: bool


def dare_ties(tensor: RawTensor, /, **parameters: Unpack[Dare]) -> RawFormula:
    """As `methods.dare_ties`."""
    return _dare(tensor, elect=True, **parameters)


def dare_linear(tensor: RawTensor, /, **parameters: Unpack[Dare]) -> RawFormula:
    """As `methods.dare_linear`."""
    return _dare(tensor, elect=False, **parameters)


def _dare(tensor: RawTensor, *, elect: bool, **parameters: Unpack[Dare]) -> RawFormula:
    weight, density = parameters["weight"], parameters["density"]
    normalize = parameters["normalize"]
    keys = np.array([split_key(key) for key in tensor.keys], np.uint64)
    limits = np.array([threshold(d) for d in density], np.uint64)
    kept = np.array(rescale_factors(density, rescale=parameters["rescale"]), np.float32)
    factors, scale = np.array(weight, np.float32), np.float32(parameters["lambda_"])
    divisor = np.float32(sum(weight) or 1.0)
    return lambda b, out, code, drift: span_of_random(
        *b.rows, b.start, keys, limits, kept, factors, elect, normalize, divisor, scale, out, code, drift
    )


FUSED: Mapping[str, Callable[..., RawFormula]] = MappingProxyType(
    {f.__name__: f for f in (linear, passthrough, slerp, task_arithmetic, ties, dare_ties, dare_linear)}
)
"""By the name of the method."""

_OVER_SPANS = frozenset(FUSED)
"""Those whose last pass reads for itself."""


def merged_blocks(
    method: str, tensor: RawTensor, dtype: str, keywords: Mapping[str, Any], drift: Drift
) -> Iterator[tuple[RawBlock, npt.NDArray[np.uint8]]]:
    """Every block of the result, in order, each valid until the next.

    Args:
        method: one of `FUSED`.
        tensor: all its sources.
        dtype: of the result, by safetensors name.
        keywords: parameters of the method.
        drift: see `RawFormula`; complete up to the block that was given last.

    Yields:
        Where the block belongs, and its bytes.

    Raises:
        NotFiniteError: an input or the result is not finite, or an input unreadable, in the block behind the one that
            was given last.
    """
    formula = FUSED[method](tensor, **keywords)
    width = ITEM_BYTES[dtype]
    out = np.empty(0, np.uint8)
    for block in tensor.spans() if method in _OVER_SPANS else tensor.blocks():
        if out.size < block.n * width:
            out = np.empty(block.n * width, np.uint8)
        if formula(block, out, CODES[dtype], drift):
            raise NotFiniteError
        yield block, out[: block.n * width]


def largest_deltas(tensor: RawTensor, densities: Sequence[float]) -> list[Cut]:
    """As `solera_merge.selection.largest_deltas`, in two passes where the bin of the k-th magnitude is small."""
    cuts = {i: KEEP_ALL if d >= 1 else KEEP_NONE for i, d in enumerate(densities)}
    wanted = {i: count_kept(d, tensor.size) for i, d in enumerate(densities) if 0 < d < 1 and tensor.size > 0}
    tables = {i: np.zeros((TABLES, UPPER), np.uint32) for i in wanted}
    zeros = dict.fromkeys(wanted, 0)
    for block in tensor.blocks() if wanted else ():
        for i, table in tables.items():
            found = count_upper(block.raw, block.codes, block.n, i, table)
            if found < 0:
                raise NotFiniteError
            zeros[i] += found
    searches: list[_Search] = []
    for i, table in tables.items():
        histogram = table.sum(axis=0, dtype=np.int64)
        place, above = descend(histogram, wanted[i])
        inside = int(histogram[place])
        if place == 0 and wanted[i] - above > inside - zeros[i]:
            cuts[i] = Cut(0, tensor.size)  # the k-th is 0, as where less than the density has changed at all
        else:
            searches.append(_Search(i, place, wanted[i] - above, inside))
    tables.clear()
    small = [s for s in searches if s.inside <= _COLLECTED]
    large = [s for s in searches if s.inside > _COLLECTED]
    for block in tensor.blocks() if searches else ():
        for search in small:
            search.collect(block)
        for search in large:
            count_lower(block.raw, block.codes, block.n, search.model, search.bin, search.lower_counts)
    for search in small:
        cuts[search.model] = search.ranked(tensor.size)
    for search in large:
        low, above = descend(search.lower_counts, search.wanted)
        search.wanted -= above
        search.bits = search.bin << 16 | low
        if search.wanted == int(search.lower_counts[low]) or search.bits == 0:
            search.last = tensor.size
    open_searches = [s for s in large if s.last < 0]
    for block in tensor.blocks() if open_searches else ():
        for search in open_searches:
            if search.wanted > 0:
                place, seen = find_equal(block.raw, block.codes, block.n, search.model, search.bits, search.wanted)
                if place >= 0:
                    search.last = block.start + place
                search.wanted -= seen
    for search in large:
        cuts[search.model] = Cut(search.bits, search.last)
    return [cuts[i] for i in range(len(densities))]


class _Search:
    """The k-th largest delta of one model, known to lie in `bin`, as the `wanted`-th of `inside` elements there."""

    def __init__(self, model: int, place: int, wanted: int, inside: int) -> None:
        self.model = model
        self.bin = place
        self.wanted = wanted
        self.inside = inside
        self.bits = 0
        self.last = -1
        self._found = 0
        small = inside <= _COLLECTED
        self.lower_counts = np.zeros(0 if small else LOWER, np.int64)
        self._places = np.empty(inside if small else 0, np.int64)
        self._lower = np.empty(inside if small else 0, np.uint16)

    def collect(self, block: RawBlock) -> None:
        """Note the elements of the bin in this block."""
        self._found = collect_bin(
            block.raw, block.codes, block.n, self.model, block.start, self.bin, self._places, self._lower, self._found
        )

    def ranked(self, size: int) -> Cut:
        """The cut, from what was collected."""
        low, above = descend(np.bincount(self._lower, minlength=LOWER), self.wanted)
        bits = self.bin << 16 | low
        places = self._places[self._lower == low]
        number = self.wanted - above
        return Cut(bits, size if number == places.size or bits == 0 else int(places[number - 1]))
