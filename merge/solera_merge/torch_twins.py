"""The hot methods on a device that torch drives (`--device`): from stored bytes to stored bytes, as in `fused.py`.

Each function is the twin of the method of the same name in `methods/`: the same parameters, and the same bits. Every
torch operation here is one IEEE operation an element, and every sum has the order that the CPU's has:

* multiply and add are two operations, so no compiler makes one of them (no addcmul, no `alpha`);
* factors and divisors are tensors of one element: CUDA replaces the division by a Python number by a multiplication
  with its reciprocal, which loses the last bit;
* the sums of slerp and of the drift are taken in the lanes of `reduction.py` and `kernels/drift.py`, one after another;
* random words are computed where they are needed, in integer arithmetic: from the CPU they would take 4 bytes an
  element and model over the bus, twice as much as the bfloat16 weights themselves.

The tests show this on torch's CPU device. It was never run on a GPU: CUDA's float32 and float64 operations are IEEE
exact, so the bytes should be the same there; Metal's need not be (and it has no float64, so slerp stays on the CPU).

While the device computes on one block, the next one is read from disk into a second pinned buffer and copied by a
stream of its own, and the result of the one before is written.

torch is imported here, so this module is imported only where a device was asked for.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from solera_core.errors import ResourceError
from solera_merge.block import CHUNK_ELEMENTS, DEVICE_BLOCK_ELEMENTS
from solera_merge.fused import Dare, Drift, NotFiniteError, RawBlock, RawTensor
from solera_merge.kernels.drift import LANES as DRIFT_LANES
from solera_merge.kernels.formats import BF16, CODES, F16, F32, PIECE
from solera_merge.masks import threshold
from solera_merge.methods.slerp import coefficients
from solera_merge.reduction import LANES, root_sums
from solera_merge.selection import KEEP_ALL, KEEP_NONE, LOWER, UPPER, Cut, count_kept, descend
from solera_merge.task_vectors import norm_factors, rescale_factors

__all__ = ["TWINS", "Device", "open_device"]

Bytes: TypeAlias = npt.NDArray[np.uint8]

_cuda: Any = torch.cuda  # partly untyped upstream

_FORMATS = {F32: torch.float32, BF16: torch.bfloat16, F16: torch.float16}
_MAGNITUDE = 0x7FFFFFFF
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Device:
    """Where torch computes.

    Attributes:
        name: as the user calls it.
        place: as torch calls it.
        block_elements: elements a block; a multiple of what the engine uses on the CPU.
    """

    name: str
    place: torch.device
    block_elements: int = DEVICE_BLOCK_ELEMENTS

    def has(self, method: str) -> bool:
        """Whether a method can be computed here."""
        return method in TWINS and not (self.place.type == "mps" and method == "slerp")

    @property
    def _is_cuda(self) -> bool:
        return self.place.type == "cuda"

    def buffer(self, rows: int, width: int) -> Bytes:
        """[rows, width] bytes of host memory, from which copies to this device need not wait."""
        return torch.empty((rows, width), dtype=torch.uint8, pin_memory=self._is_cuda).numpy()

    def merged_blocks(
        self, method: str, tensor: RawTensor, dtype: str, keywords: Mapping[str, Any], drift: Drift
    ) -> Iterator[tuple[RawBlock, Bytes]]:
        """As `solera_merge.fused.merged_blocks`, on a device.

        Raises:
            NotFiniteError: an input or the result is not finite.
            ResourceError: the device has not enough memory.
        """
        pending: tuple[RawBlock, Callable[[], list[npt.NDArray[Any]]]] | None = None
        reference = -1 if method in _FROM_BASE else 0
        try:
            formula = TWINS[method](tensor, self, **keywords)
            for block in self.blocks(tensor):
                merged = formula(block)
                narrowed = merged.to(_FORMATS[CODES[dtype]])
                finite = torch.stack([torch.isfinite(x).all() for x in (*block.values, narrowed)]).all()
                lanes = _drift_lanes(merged, block.values[reference])
                ready = self.download((narrowed.view(torch.uint8), finite, lanes))
                if pending is not None:
                    yield _collected(*pending, drift)
                pending = block.raw, ready
            if pending is not None:
                yield _collected(*pending, drift)
        except torch.OutOfMemoryError as e:
            raise ResourceError(
                f"device: {self.name} has not enough memory ({e}); use fewer --threads, or the CPU"
            ) from e

    def factor(self, value: float | np.float32) -> Tensor:
        """[1] float32; see above why it is a tensor."""
        return torch.full((1,), float(np.float32(value)), dtype=torch.float32, device=self.place)

    def blocks(self, tensor: RawTensor) -> "Iterator[DeviceBlock]":
        """One pass over a tensor; the bytes of a block must stay until the one after the next is asked for."""
        copies = _cuda.Stream(self.place) if self._is_cuda else None
        before: Any = None
        for block in tensor.blocks():
            rows, copied = self._upload(block, copies)
            values = tuple(row.view(_FORMATS[int(code)]).float() for row, code in zip(rows, block.codes, strict=True))
            yield DeviceBlock(block, values)
            if before is not None:
                before.synchronize()  # the next block is read into the buffer that this copy was made from
            before = copied

    def _upload(self, block: RawBlock, copies: "torch.cuda.Stream | None") -> tuple[list[Tensor], Any]:
        """Copies of the rows on the device, and what says that they are made."""
        used = [block.n * _FORMATS[int(code)].itemsize for code in block.codes]
        sources = [torch.from_numpy(row[:size]) for row, size in zip(block.raw, used, strict=True)]
        if copies is None:
            return [source.to(self.place, copy=True) for source in sources], None
        with torch.cuda.stream(copies):
            rows = [torch.empty_like(source, device=self.place).copy_(source, non_blocking=True) for source in sources]
            copied = _cuda.Event()
            copied.record(copies)
        current = torch.cuda.current_stream(self.place)
        current.wait_event(copied)
        for row in rows:
            row.record_stream(current)
        return rows, copied

    def download(self, tensors: Sequence[Tensor]) -> Callable[[], list[npt.NDArray[Any]]]:
        """Begin to copy tensors to the host; the result waits for them."""
        if not self._is_cuda:
            arrays = [tensor.cpu().numpy() for tensor in tensors]
            return lambda: arrays
        hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        done = _cuda.Event()
        done.record(torch.cuda.current_stream(self.place))

        def wait() -> list[npt.NDArray[Any]]:
            done.synchronize()
            return [host.numpy() for host in hosts]

        return wait


@dataclass(frozen=True)
class DeviceBlock:
    """A block on a device.

    Attributes:
        raw: where it came from; only `start` and `n` are still valid.
        values: [n] float32 each: the models, then the base where there is one.
    """

    raw: RawBlock
    values: tuple[Tensor, ...]

    @property
    def deltas(self) -> list[Tensor]:
        """W_i - W_0, [n] each, newly allocated."""
        return [model - self.values[-1] for model in self.values[:-1]]


Formula: TypeAlias = Callable[[DeviceBlock], Tensor]
"""One block of every source in, [n] float32 out; inputs are not changed."""


def open_device(name: str) -> Device:
    """The device of that name: `cuda`, `cuda:1`, `mps`, or `torch:cpu` (slow; for tests).

    Raises:
        ResourceError: torch does not see it.
    """
    seen = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    seen += ["mps"] if torch.backends.mps.is_available() else []
    if name == "torch:cpu":
        return Device(name, torch.device("cpu"))
    if name in seen:
        return Device(name, torch.device(name))
    if name == "cuda" and "cuda:0" in seen:
        return Device(name, torch.device("cuda:0"))
    raise ResourceError(
        f"device: {name!r} is not there: torch {torch.__version__} sees {', '.join(seen) or 'no accelerator'}; "
        "leave the device out to compute on the CPU"
    )


def _collected(block: RawBlock, ready: Callable[[], list[npt.NDArray[Any]]], drift: Drift) -> tuple[RawBlock, Bytes]:
    out, finite, lanes = ready()
    if not finite:
        raise NotFiniteError
    sums = np.zeros(lanes.shape[:2])
    for j in range(DRIFT_LANES):
        sums += lanes[:, :, j]
    drift[:] = np.cumsum(np.concatenate([drift[:, None], sums], axis=1), axis=1)[:, -1]  # one after another
    return block, out


def linear(_tensor: RawTensor, device: Device, /, *, weight: Sequence[float], normalize: bool) -> Formula:
    """As `methods.linear`."""
    factors = [device.factor(w) for w in weight]
    divisor = np.float32(sum(weight))

    def formula(block: DeviceBlock) -> Tensor:
        out = _total([model * c for model, c in zip(block.values, factors, strict=True)])
        return out.div_(device.factor(divisor)) if normalize and divisor != 1 else out

    return formula


def passthrough(_tensor: RawTensor, device: Device, /, *, scale: Sequence[float]) -> Formula:
    """As `methods.passthrough`."""
    return lambda block: block.values[0] * device.factor(scale[0])


def slerp(tensor: RawTensor, device: Device, /, *, t: float) -> Formula:
    """As `methods.slerp`."""
    parts: list[Tensor] = []
    finite: list[Tensor] = []
    for block in device.blocks(tensor):
        model, base = (x.double() for x in block.values)
        parts.append(_chunk_sums(torch.stack([base * base, model * model, base * model])))
        finite.append(torch.isfinite(parts[-1]).all())
    if not all(finite):
        raise NotFiniteError
    sums = torch.cat(parts, dim=1).tolist() if parts else [[], [], []]
    c_base, c_model = (device.factor(c) for c in coefficients(t, *root_sums(*sums)))
    return lambda block: block.values[1].mul(c_base).add_(block.values[0] * c_model)


def task_arithmetic(
    _tensor: RawTensor, device: Device, /, *, weight: Sequence[float], normalize: bool, lambda_: float
) -> Formula:
    """As `methods.task_arithmetic`."""
    return lambda block: _weighted_sum(block.deltas, weight, device, normalize, lambda_).add_(block.values[-1])


def ties(
    tensor: RawTensor,
    device: Device,
    /,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
    scope: str,
    int8_mask: bool,
) -> Formula:
    """As `methods.ties` for `scope: tensor`."""
    assert scope == "tensor", "the engine takes the readable method for what a survey has found"
    del int8_mask
    cuts = _largest_deltas(tensor, device, density)

    def trim(block: DeviceBlock) -> list[Tensor]:
        deltas = block.deltas
        for delta, cut in zip(deltas, cuts, strict=True):
            magnitude = _magnitude(delta)
            keep = magnitude > cut.bits
            count = min(max(cut.last + 1 - block.raw.start, 0), block.raw.n)  # elements at or before `last`
            keep[:count] |= magnitude[:count] == cut.bits
            delta.mul_(keep)
        return deltas

    factors: list[Tensor] = []
    if rescale:
        sums = [_chunk_sums(torch.stack([*b.deltas, *trim(b)]).abs().double()) for b in device.blocks(tensor)]
        norms = [math.fsum(x) for x in torch.cat(sums, dim=1).tolist()] if sums else [0.0] * 2 * len(weight)
        factors = [device.factor(f) for f in norm_factors(norms[: len(weight)], norms[len(weight) :])]

    def formula(block: DeviceBlock) -> Tensor:
        deltas = trim(block)
        for delta, factor in zip(deltas, factors, strict=False):  # none without `rescale`
            delta.mul_(factor)
        return _disjoint_merge(deltas, weight, device, normalize, lambda_).add_(block.values[-1])

    return formula


def dare_ties(tensor: RawTensor, device: Device, /, **parameters: Unpack[Dare]) -> Formula:
    """As `methods.dare_ties`."""
    return _dare(tensor, device, _disjoint_merge, **parameters)


def dare_linear(tensor: RawTensor, device: Device, /, **parameters: Unpack[Dare]) -> Formula:
    """As `methods.dare_linear`."""
    return _dare(tensor, device, _weighted_sum, **parameters)


def _dare(tensor: RawTensor, device: Device, combine: "Combine", /, **parameters: Unpack[Dare]) -> Formula:
    weight, density = parameters["weight"], parameters["density"]
    factors = rescale_factors(density, rescale=parameters["rescale"])
    draws = list(zip(tensor.keys, density, factors, strict=True))

    def formula(block: DeviceBlock) -> Tensor:
        deltas = block.deltas
        for delta, (key, probability, factor) in zip(deltas, draws, strict=True):
            limit = threshold(probability)
            if limit < 1 << 32:
                delta.mul_(_words(key, block.raw.start, block.raw.n, device) < limit)
            delta.mul_(device.factor(factor))
        return combine(deltas, weight, device, parameters["normalize"], parameters["lambda_"]).add_(block.values[-1])

    return formula


TWINS: Mapping[str, Callable[..., Formula]] = MappingProxyType(
    {f.__name__: f for f in (linear, passthrough, slerp, task_arithmetic, ties, dare_ties, dare_linear)}
)
"""By the name of the method."""

_FROM_BASE = ("slerp", "task_arithmetic", "ties", "dare_ties", "dare_linear")  # the last row is the base


def _total(terms: Sequence[Tensor]) -> Tensor:
    """As `signs.total`, into the first term."""
    out = terms[0]
    for term in terms[1:]:
        out.add_(term)
    return out


Combine: TypeAlias = Callable[[Sequence[Tensor], Sequence[float], Device, bool, float], Tensor]


def _weighted_sum(
    deltas: Sequence[Tensor], weight: Sequence[float], device: Device, normalize: bool, scale: float
) -> Tensor:
    """As `signs.weighted_sum`; overwrites the deltas."""
    out = _total([delta.mul_(device.factor(w)) for delta, w in zip(deltas, weight, strict=True)])
    divisor = np.float32(sum(weight) or 1.0)
    if normalize and divisor != 1:
        out.div_(device.factor(divisor))
    if scale != 1:
        out.mul_(device.factor(scale))
    return out


def _disjoint_merge(
    deltas: Sequence[Tensor], weight: Sequence[float], device: Device, normalize: bool, scale: float
) -> Tensor:
    """As `signs.disjoint_merge`; overwrites the deltas."""
    weighted = [delta.mul_(device.factor(w)) for delta, w in zip(deltas, weight, strict=True)]
    plus = _total([weighted[0].clone(), *weighted[1:]]) >= 0
    agrees = [(term != 0) & ((term > 0) == plus) for term in weighted]
    out = _total([term.mul_(mask) for term, mask in zip(weighted, agrees, strict=True)])
    if normalize:
        divisor = _total([mask * device.factor(abs(w)) for mask, w in zip(agrees, weight, strict=True)])
        out.div_(torch.where(divisor == 0, device.factor(1), divisor))
    if scale != 1:
        out.mul_(device.factor(scale))
    return out


def _magnitude(x: Tensor) -> Tensor:
    """The bits of |x|, [n] int32: ordered as the numbers are."""
    return x.view(torch.int32) & _MAGNITUDE


def _largest_deltas(tensor: RawTensor, device: Device, densities: Sequence[float]) -> list[Cut]:
    """As `selection.largest_deltas`: two histograms, and a third pass where several elements share the last place."""
    cuts = {i: KEEP_ALL if d >= 1 else KEEP_NONE for i, d in enumerate(densities)}
    wanted = {i: count_kept(d, tensor.size) for i, d in enumerate(densities) if 0 < d < 1 and tensor.size > 0}

    def histograms(bins: int, place: Callable[[int, Tensor], Tensor]) -> dict[int, npt.NDArray[np.int64]]:
        counts = {i: torch.zeros(bins, dtype=torch.int64, device=device.place) for i in wanted}
        for block in device.blocks(tensor) if wanted else ():
            for i, count in counts.items():
                magnitude = _magnitude(block.values[i] - block.values[-1])
                count += torch.bincount(place(i, magnitude), minlength=bins)
        return {i: count.cpu().numpy() for i, count in counts.items()}

    upper: dict[int, int] = {}
    for i, histogram in histograms(UPPER, lambda _, magnitude: magnitude >> 16).items():
        upper[i], above = descend(histogram, wanted[i])
        wanted[i] -= above
    open_places: dict[int, tuple[int, int]] = {}  # bits, how many of just these bits are kept
    in_bin = histograms(LOWER, lambda i, magnitude: magnitude[magnitude >> 16 == upper[i]] & 0xFFFF)
    for i, histogram in in_bin.items():
        low, above = descend(histogram, wanted[i])
        bits, number = upper[i] << 16 | low, wanted[i] - above
        cuts[i] = Cut(bits, tensor.size)
        if number < int(histogram[low]) and bits != 0:
            open_places[i] = bits, number
    for block in device.blocks(tensor) if open_places else ():
        for i, (bits, number) in list(open_places.items()):
            places = torch.nonzero(_magnitude(block.values[i] - block.values[-1]) == bits).reshape(-1)
            if places.numel() >= number:
                cuts[i] = Cut(bits, block.raw.start + int(places[number - 1]))
                del open_places[i]
            else:
                open_places[i] = bits, number - places.numel()
    return [cuts[i] for i in range(len(densities))]


def _words(key: int, start: int, n: int, device: Device) -> Tensor:
    """As `masks.words`, [n] int64; `start` is a multiple of 4.

    A product of two 32-bit numbers fills 64 bits: as a signed number it wraps, and its halves are still right.
    """
    counter = torch.arange(start // 4, -(-(start + n) // 4), dtype=torch.int64, device=device.place)
    x0, x1 = counter & _LOW, counter >> 32
    x2, x3 = (torch.full_like(counter, half) for half in (key >> 64 & _LOW, key >> 96))
    a, b = key & _LOW, key >> 32 & _LOW
    for _ in range(10):
        p, q = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1 = (q >> 32 & _LOW) ^ x1 ^ a, q & _LOW
        x2, x3 = (p >> 32 & _LOW) ^ x3 ^ b, p & _LOW
        a, b = a + 0x9E3779B9 & _LOW, b + 0xBB67AE85 & _LOW
    return torch.stack([x0, x1, x2, x3], dim=1).reshape(-1)[:n]


def _lane_sums(values: Tensor, rows: int, lanes: int) -> Tensor:
    """[k, n] -> [k, pieces, lanes]: in every piece of rows * lanes elements, element j is added to lane j mod lanes."""
    pieces = -(-values.shape[1] // (rows * lanes))
    missing = pieces * rows * lanes - values.shape[1]
    table = torch.nn.functional.pad(values, (0, missing)).view(-1, pieces, rows, lanes)
    sums = table[:, :, 0].clone()
    for row in range(1, rows):
        sums += table[:, :, row]
    return sums


def _chunk_sums(values: Tensor) -> Tensor:
    """As `reduction._chunk_sums`: [k, n] float64 -> [k, chunks]."""
    lanes = _lane_sums(values, CHUNK_ELEMENTS // LANES, LANES)
    total = lanes[:, :, 0].clone()
    for j in range(1, LANES):
        total += lanes[:, :, j]
    return total


def _drift_lanes(merged: Tensor, reference: Tensor) -> Tensor:
    """As `kernels.drift.add_drift`, before its lanes are added: [2, pieces, lanes] float32."""
    change = merged - reference
    squares = torch.stack([change * change, reference * reference])
    whole = squares.shape[1] // DRIFT_LANES * DRIFT_LANES
    end = squares[:, whole:]
    padded = torch.cat([squares[:, :whole], torch.zeros_like(end)], dim=1)
    sums = _lane_sums(padded, PIECE // DRIFT_LANES, DRIFT_LANES)
    for j in range(end.shape[1]):  # what does not fill a row goes to the first lane
        sums[:, -1, 0] += end[:, j]
    return sums
