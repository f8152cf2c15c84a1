"""The hot methods from stored bytes to stored bytes, without float32 blocks in between.

Each function is the twin of the method of the same name in `methods/`: the same parameters, the same bits (tested), but
it looks at raw blocks through the kernels in `kernels/`. The engine takes it where every source is stored as plain
float32, float16 or bfloat16; everything else goes through the readable function.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from solera_core.dtypes import ITEM_BYTES
from solera_merge.block import CHUNK_ELEMENTS
from solera_merge.kernels.elections import ELECT_NONE, ELECT_WEIGHTED
from solera_merge.kernels.formats import CODES
from solera_merge.kernels.spans import Rows
from solera_merge.masks import split_key, threshold
from solera_merge.raw_selection import NotFiniteError, raw_cuts
from solera_merge.reduction import LANES, add_parts, symmetric
from solera_merge.selection import KEEP_NONE, Band, Cut, band_ranks, count_kept
from solera_merge.task_vectors import norm_factors, rank_tables, rescale_factors

__all__ = [
    "FUSED",
    "ROWS",
    "Drift",
    "NotFiniteError",
    "RawBlock",
    "RawFormula",
    "RawTensor",
    "has_twin",
    "merged_blocks",
]


_NO_FILES, _NO_OFFSETS = np.empty(0, np.int32), np.empty(0, np.int64)


@dataclass(frozen=True)
class RawBlock:
    """The same elements of every source, as stored.

    Attributes:
        start: flat index of the first element; a multiple of `CHUNK_ELEMENTS`, or of whole rows (`ROWS`).
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
    def shape(self) -> tuple[int, ...]:
        """Of every source and of the result."""
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
    from solera_merge.kernels.sums import weighted_sum

    factors = np.array(weight, np.float32)
    divisor = np.float32(sum(weight)) if normalize else _one
    return lambda b, out, code, drift: weighted_sum(*b.rows, factors, divisor, out, code, drift, 0)


def passthrough(_tensor: RawTensor, /, *, scale: Sequence[float]) -> RawFormula:
    """As `methods.passthrough`."""
    from solera_merge.kernels.sums import weighted_sum

    factors = np.array(scale, np.float32)
    return lambda b, out, code, drift: weighted_sum(*b.rows, factors, _one, out, code, drift, 0)


def slerp(tensor: RawTensor, /, *, t: float) -> RawFormula:
    """As `methods.slerp`."""
    from solera_merge.kernels.sums import weighted_sum
    from solera_merge.methods.slerp import coefficients

    (model, product), (_, base) = _gram(tensor, 2)
    c_base, c_model = coefficients(t, math.sqrt(base), math.sqrt(model), product)
    factors = np.array([c_model, c_base], np.float32)  # a sum of two has the same bits in either order
    return lambda b, out, code, drift: weighted_sum(*b.rows, factors, _one, out, code, drift, 1)


def nuslerp(
    tensor: RawTensor, /, *, weight: Sequence[float], nuslerp_row_wise: bool, nuslerp_flatten: bool
) -> RawFormula:
    """As `methods.nuslerp` where the whole tensor is one vector."""
    from solera_merge.methods.nuslerp import coefficients

    assert nuslerp_flatten
    del nuslerp_row_wise
    return _in_span(coefficients(_gram(tensor, 2), weight[1] / (weight[0] + weight[1])))


def multislerp(tensor: RawTensor, /, *, weight: Sequence[float], normalize_weights: bool, eps: float) -> RawFormula:
    """As `methods.multislerp`."""
    from solera_merge.methods.multislerp import coefficients

    divisor = math.fsum(weight) if normalize_weights else 1.0
    return _in_span(coefficients(_gram(tensor, len(weight)), [w / divisor for w in weight], eps))


def karcher(tensor: RawTensor, /, *, weight: Sequence[float], max_iter: int, tol: float) -> RawFormula:
    """As `methods.karcher`."""
    from solera_merge.methods.karcher import coefficients

    return _in_span(coefficients(_gram(tensor, len(weight)), weight, max_iter, tol))


def model_stock(tensor: RawTensor, /, *, filter_wise: bool) -> RawFormula:
    """As `methods.model_stock` with one angle a tensor."""
    from solera_merge.kernels.sums import weighted_deltas
    from solera_merge.methods.model_stock import ratio

    assert not filter_wise
    count = len(tensor.keys)
    t = np.float32(ratio(_gram(tensor, count)))
    ones, divisor = np.ones(count, np.float32), np.float32(count)
    return lambda b, out, code, drift: weighted_deltas(*b.rows, ones, divisor, t, out, code, drift)


def task_arithmetic(_tensor: RawTensor, /, *, weight: Sequence[float], normalize: bool, lambda_: float) -> RawFormula:
    """As `methods.task_arithmetic`."""
    from solera_merge.kernels.sums import weighted_deltas

    factors = np.array(weight, np.float32)
    divisor = np.float32(sum(weight) or 1.0) if normalize else _one
    scale = np.float32(lambda_)
    return lambda b, out, code, drift: weighted_deltas(*b.rows, factors, divisor, scale, out, code, drift)


def ties(
    tensor: RawTensor,
    /,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
    scope: str,
    int8_mask: bool,
) -> RawFormula:
    """As `methods.ties` for `scope: tensor`."""
    assert scope == "tensor", "the engine takes the readable method for what a survey has found"
    del int8_mask
    cuts = raw_cuts(tensor, [(i, count_kept(d, tensor.size)) for i, d in enumerate(density)])
    bands = [Band(cut, KEEP_NONE) for cut in cuts]
    return _merged_bands(tensor, bands, weight, ELECT_WEIGHTED, normalize, rescale, lambda_)


class Breadcrumbs(TypedDict):
    """The parameters of both."""

    weight: Sequence[float]
    density: Sequence[float]
    gamma: Sequence[float]
    normalize: bool
    rescale: bool
    lambda_: float
    scope: str
    int8_mask: bool


def breadcrumbs(tensor: RawTensor, /, **parameters: Unpack[Breadcrumbs]) -> RawFormula:
    """As `methods.breadcrumbs` for `scope: tensor`."""
    return _breadcrumbs(tensor, ELECT_NONE, **parameters)


def breadcrumbs_ties(tensor: RawTensor, /, **parameters: Unpack[Breadcrumbs]) -> RawFormula:
    """As `methods.breadcrumbs_ties` for `scope: tensor`."""
    return _breadcrumbs(tensor, ELECT_WEIGHTED, **parameters)


def _breadcrumbs(tensor: RawTensor, elect: int, **parameters: Unpack[Breadcrumbs]) -> RawFormula:
    assert parameters["scope"] == "tensor", "the engine takes the readable method for what a survey has found"
    shares = enumerate(zip(parameters["density"], parameters["gamma"], strict=True))
    cuts = raw_cuts(tensor, [(i, k) for i, (d, g) in shares for k in band_ranks(tensor.size, d, g)])
    bands = [Band(outer, inner) for outer, inner in zip(cuts[::2], cuts[1::2], strict=True)]
    weight, normalize, rescale = parameters["weight"], parameters["normalize"], parameters["rescale"]
    return _merged_bands(tensor, bands, weight, elect, normalize, rescale, parameters["lambda_"])


def _merged_bands(
    tensor: RawTensor,
    bands: Sequence[Band],
    weight: Sequence[float],
    elect: int,
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> RawFormula:
    from solera_merge.kernels.sparsified import merge_band

    limits = _Limits(*_arrays([band.outer for band in bands], tensor), *_arrays([band.inner for band in bands], tensor))
    kept = np.array(_keep_norm(tensor, limits) if rescale else [1.0] * len(bands), np.float32)
    factors, scale = np.array(weight, np.float32), np.float32(lambda_)
    divisor = np.float32(sum(weight) or 1.0)
    return lambda b, out, code, drift: merge_band(
        *b.rows,
        b.start,
        limits.outer,
        limits.outer_last,
        limits.inner,
        limits.inner_last,
        kept,
        factors,
        elect,
        normalize,
        divisor,
        scale,
        out,
        code,
        drift,
    )


class _Limits(NamedTuple):
    """Bands of all models, [N] each, as kernels take them."""

    outer: npt.NDArray[np.uint32]
    outer_last: npt.NDArray[np.int64]
    inner: npt.NDArray[np.uint32]
    inner_last: npt.NDArray[np.int64]


def _arrays(cuts: Sequence[Cut], tensor: RawTensor) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    places = [min(cut.last, tensor.size) for cut in cuts]
    return np.array([cut.bits for cut in cuts], np.uint32), np.array(places, np.int64)


def _keep_norm(tensor: RawTensor, limits: _Limits) -> list[np.float32]:
    """As `task_vectors.keep_norm`."""
    from solera_merge.kernels.sparsified import l1_chunks

    models = limits.outer.size
    before, after = [list[float]() for _ in range(models)], [list[float]() for _ in range(models)]
    for block in tensor.blocks():
        sums = np.empty((2, -(-block.n // CHUNK_ELEMENTS)))
        for i in range(models):
            l1_chunks(
                block.raw,
                block.codes,
                block.n,
                block.start,
                i,
                limits.outer[i],
                limits.outer_last[i],
                limits.inner[i],
                limits.inner_last[i],
                CHUNK_ELEMENTS,
                LANES,
                sums,
            )
            add_parts(before[i], sums[0].tolist())
            add_parts(after[i], sums[1].tolist())
    return norm_factors([math.fsum(x) for x in before], [math.fsum(x) for x in after])


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
    return _dare(tensor, ELECT_WEIGHTED, **parameters)


def dare_linear(tensor: RawTensor, /, **parameters: Unpack[Dare]) -> RawFormula:
    """As `methods.dare_linear`."""
    return _dare(tensor, ELECT_NONE, **parameters)


def _dare(tensor: RawTensor, elect: int, **parameters: Unpack[Dare]) -> RawFormula:
    from solera_merge.kernels.sparsified import merge_random

    weight, density = parameters["weight"], parameters["density"]
    normalize = parameters["normalize"]
    keys = np.array([split_key(key) for key in tensor.keys], np.uint64)
    limits = np.array([threshold(d) for d in density], np.uint64)
    kept = np.array(rescale_factors(density, rescale=parameters["rescale"]), np.float32)
    factors, scale = np.array(weight, np.float32), np.float32(parameters["lambda_"])
    divisor = np.float32(sum(weight) or 1.0)
    return lambda b, out, code, drift: merge_random(
        *b.rows, b.start, keys, limits, kept, factors, elect, normalize, divisor, scale, out, code, drift
    )


class Della(TypedDict):
    """The parameters of both."""

    weight: Sequence[float]
    density: Sequence[float]
    epsilon: Sequence[float]
    normalize: bool
    rescale: bool
    lambda_: float
    int8_mask: bool


def della(tensor: RawTensor, /, **parameters: Unpack[Della]) -> RawFormula:
    """As `methods.della`."""
    return _della(tensor, ELECT_WEIGHTED, **parameters)


def della_linear(tensor: RawTensor, /, **parameters: Unpack[Della]) -> RawFormula:
    """As `methods.della_linear`."""
    return _della(tensor, ELECT_NONE, **parameters)


def _della(tensor: RawTensor, elect: int, **parameters: Unpack[Della]) -> RawFormula:
    from solera_merge.kernels.ranks import merge_ranked

    weight, density = parameters["weight"], parameters["density"]
    normalize, width = parameters["normalize"], _width(tensor)
    shares = zip(density, parameters["epsilon"], strict=True)
    tables = [rank_tables(width, d, e, rescale=parameters["rescale"]) for d, e in shares]
    nothing = [d == 0 for d in density]  # no word is below 0, and the factor of 1 / 0 must not be used
    limits = np.array([np.zeros_like(t) if zero else t for (t, _), zero in zip(tables, nothing, strict=True)])
    kept = np.array([np.ones_like(f) if zero else f for (_, f), zero in zip(tables, nothing, strict=True)])
    drops = np.array([d < 1 for d in density])
    keys = np.array([split_key(key) for key in tensor.keys], np.uint64)
    factors, scale = np.array(weight, np.float32), np.float32(parameters["lambda_"])
    divisor = np.float32(sum(weight) or 1.0)
    return lambda b, out, code, drift: merge_ranked(
        b.raw,
        b.codes,
        b.n,
        b.start,
        width,
        keys,
        drops,
        limits,
        kept,
        factors,
        elect,
        normalize,
        divisor,
        scale,
        out,
        code,
        drift,
    )


def arcee_fusion(tensor: RawTensor, /) -> RawFormula:
    """As `methods.arcee_fusion`."""
    from solera_merge.kernels.fusion import divergence_of_rows, importances, merge_important
    from solera_merge.methods.arcee_fusion import threshold_of

    width = _width(tensor)
    divergence = np.empty(tensor.size // width, np.float32)
    buffer = np.empty(tensor.step, np.float32)

    def of(block: RawBlock) -> npt.NDArray[np.float32]:
        return divergence[block.start // width : (block.start + block.n) // width]

    for block in tensor.blocks():
        if divergence_of_rows(block.raw, block.codes, block.n, width, of(block)):
            raise NotFiniteError

    def passes() -> Iterator[npt.NDArray[np.float32]]:
        for block in tensor.blocks():
            importances(block.raw, block.codes, block.n, of(block), buffer)
            yield buffer[: block.n]

    limit = threshold_of(passes, tensor.size)
    return lambda b, out, code, drift: merge_important(b.raw, b.codes, b.n, of(b), limit, out, code, drift)


def _width(tensor: RawTensor) -> int:
    return max(tensor.shape[-1] if tensor.shape else 1, 1)


def sce(tensor: RawTensor, /, *, select_topk: float, int8_mask: bool) -> RawFormula:
    """As `methods.sce`."""
    from solera_merge.kernels.sce import merge_selected, squares_of_selected
    from solera_merge.kernels.selection import SPREAD
    from solera_merge.methods.sce import count_selected, shares

    del int8_mask
    wanted = tensor.size if select_topk >= 1 else partial(count_selected, select_topk)
    [cut] = raw_cuts(tensor, [(SPREAD, wanted)])
    bits, last = np.uint32(cut.bits), min(cut.last, tensor.size)
    parts = [list[float]() for _ in tensor.keys]
    for block in tensor.blocks():
        sums = np.empty((len(parts), -(-block.n // CHUNK_ELEMENTS)))
        raw, codes = block.raw, block.codes
        if squares_of_selected(raw, codes, block.n, block.start, bits, last, CHUNK_ELEMENTS, LANES, sums):
            raise NotFiniteError
        for part, more in zip(parts, sums.tolist(), strict=True):
            add_parts(part, more)
    weight = np.array(shares([math.fsum(part) for part in parts]), np.float32)
    return lambda b, out, code, drift: merge_selected(*b.rows, b.start, bits, last, weight, out, code, drift)


def nearswap(_tensor: RawTensor, /, *, t: float) -> RawFormula:
    """As `methods.nearswap`."""
    from solera_merge.kernels.changes import merge_near

    step = np.float32(t)
    return lambda b, out, code, drift: merge_near(*b.rows, step, out, code, drift)


def ram(tensor: RawTensor, /, *, epsilon: float) -> RawFormula:
    """As `methods.ram`."""
    return _selective(epsilon, [1.0] * len(tensor.keys))


def ramplus_tl(tensor: RawTensor, /, *, r: float, alpha: float, epsilon: float) -> RawFormula:
    """As `methods.ramplus_tl`."""
    from solera_merge.kernels.changes import count_changes
    from solera_merge.methods.ram import scales

    counts = np.zeros((len(tensor.keys), 2), np.int64)
    for block in tensor.blocks():
        if count_changes(block.raw, block.codes, block.n, np.float32(epsilon), counts):
            raise NotFiniteError
    return _selective(epsilon, scales([(shared, alone) for shared, alone in counts.tolist()], r, alpha))


def _selective(epsilon: float, scales: Sequence[float]) -> RawFormula:
    from solera_merge.kernels.changes import merge_changes

    limit, factors = np.float32(epsilon), np.array(scales, np.float32)
    return lambda b, out, code, drift: merge_changes(*b.rows, limit, factors, out, code, drift)


def _gram(tensor: RawTensor, count: int) -> list[list[float]]:
    """As `solera_merge.reduction.gram`, of the first `count` rows; from the base where there is one more."""
    from solera_merge.kernels.norms import gram_chunks

    parts = [list[float]() for _ in range(count * (count + 1) // 2)]
    for block in tensor.blocks():
        sums = np.empty((len(parts), -(-block.n // CHUNK_ELEMENTS)))
        if gram_chunks(block.raw, block.codes, block.n, count, CHUNK_ELEMENTS, LANES, sums):
            raise NotFiniteError
        for part, more in zip(parts, sums.tolist(), strict=True):
            add_parts(part, more)
    return symmetric([math.fsum(part) for part in parts], count)


def _in_span(coefficients: Sequence[float]) -> RawFormula:
    """As `solera_merge.combination.combine`."""
    from solera_merge.kernels.sums import weighted_deltas, weighted_sum

    factors = np.array(coefficients, np.float32)

    def formula(b: RawBlock, out: npt.NDArray[np.uint8], code: int, drift: Drift) -> int:
        if b.codes.size > factors.size:
            return weighted_deltas(*b.rows, factors, _one, _one, out, code, drift)
        return weighted_sum(*b.rows, factors, _one, out, code, drift, 0)

    return formula


FUSED: Mapping[str, Callable[..., RawFormula]] = MappingProxyType(
    {
        f.__name__: f
        for f in (
            linear,
            passthrough,
            slerp,
            nuslerp,
            multislerp,
            karcher,
            model_stock,
            task_arithmetic,
            ties,
            breadcrumbs,
            breadcrumbs_ties,
            dare_ties,
            dare_linear,
            della,
            della_linear,
            arcee_fusion,
            sce,
            nearswap,
            ram,
            ramplus_tl,
        )
    }
)
"""By the name of the method."""

ROWS = frozenset({"della", "della_linear", "arcee_fusion"})
"""Those whose blocks must be whole rows: the engine makes the tensor's `step` a multiple of its last axis."""

_OVER_SPANS = frozenset(FUSED) - ROWS
"""Those whose last pass reads for itself."""

# The one value of a parameter for which there is a twin.
_ONLY: Mapping[str, tuple[str, Any]] = {
    "nuslerp": ("nuslerp_flatten", True),
    "model_stock": ("filter_wise", False),
    "ties": ("scope", "tensor"),
    "breadcrumbs": ("scope", "tensor"),
    "breadcrumbs_ties": ("scope", "tensor"),
}


def has_twin(method: str, parameters: Mapping[str, Any]) -> bool:
    """Whether there is a twin of a method for these parameters (by their names in a recipe)."""
    only = _ONLY.get(method)
    return method in FUSED and (only is None or parameters[only[0]] == only[1])


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
