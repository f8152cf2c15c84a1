"""How far models are from a base and from each other, tensor by tensor, streamed in blocks with float64 sums.

tau_i = W_i - W_0 is the change that model i brings to the base (its task vector). Of every tensor:

    relative change     |tau_i| / |W_0|, Frobenius norms
    cosine              <W_0, W_i> / |W_0||W_i|
    changed             share of elements with tau_i != 0
    effective rank      of tau_i, a matrix: exp of the entropy of its singular values (`solera_core.spectrum`)

and of every two models:

    cosine              <tau_i, tau_j> / |tau_i||tau_j|
    sign conflict       share of elements where tau_i and tau_j have opposite signs, of those that both change
    conflict by mass    sum of |tau_i| + |tau_j| over these elements, divided by the sum over all

Two unrelated changes have a cosine near 0 and a sign conflict near one half.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final, Self, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from solera_core.architecture import is_embedding, is_head
from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import FLOATS
from solera_core.headers import TensorInfo
from solera_core.places import place_of
from solera_core.progress import Progress, Silent, Task
from solera_core.spectrum import effective_rank, singular_values, stable_rank
from solera_core.threads import cores

__all__ = ["Change", "Diff", "Pair", "Ranks", "TensorDiff", "diff", "is_matrix", "kind_of", "layer_label", "whole"]

Float64 = npt.NDArray[np.float64]
Group = TypeVar("Group")

_BLOCK: Final = 1 << 16  # elements: the float64 arrays of a block stay in the second-level cache
_PIECE: Final = 1 << 24  # elements that one thread takes at a time
_WINDOWS: Final = 16  # places of a tensor that a sample is taken from


@dataclass
class Change:
    """Sums over elements of a base W_0 and a model W_1, tau = W_1 - W_0; those of two parts can be added.

    Attributes:
        elements: compared.
        base: |W_0|^2.
        along: <W_0, tau>.
        square: |tau|^2.
        changed: elements with tau != 0.
        largest: max |tau|.
    """

    elements: int = 0
    base: float = 0.0
    along: float = 0.0
    square: float = 0.0
    changed: int = 0
    largest: float = 0.0

    def __iadd__(self, other: "Change") -> Self:
        self.elements += other.elements
        self.base += other.base
        self.along += other.along
        self.square += other.square
        self.changed += other.changed
        self.largest = float(np.maximum(self.largest, other.largest))  # keeps NaN
        return self

    @property
    def finite(self) -> bool:
        """Whether all values were."""
        return math.isfinite(self.base + self.square)

    @property
    def relative_change(self) -> float | None:
        """|tau| / |W_0|; None where the base is zero and the model is not."""
        if self.base:
            return math.sqrt(self.square / self.base)
        return None if self.square else 0.0

    @property
    def cosine(self) -> float | None:
        """Of W_0 and W_1; None where one is zero."""
        norms = math.sqrt(self.base) * math.sqrt(max(self.base + 2 * self.along + self.square, 0.0))
        return (self.base + self.along) / norms if norms else None

    def figures(self) -> dict[str, Any]:
        """What a person reads."""
        return {
            "elements": self.elements,
            "relative_change": self.relative_change if self.finite else None,
            "cosine": self.cosine if self.finite else None,
            "changed": self.changed / self.elements if self.elements and self.finite else None,
            "max_abs": self.largest if self.finite else None,
        }


@dataclass
class Pair:
    """Sums over elements of two changes tau_a and tau_b; those of two parts can be added.

    Attributes:
        square_a, square_b: |tau_a|^2, |tau_b|^2.
        dot: <tau_a, tau_b>.
        both: elements that both change.
        opposed: of those, how many in opposite directions.
        mass, opposed_mass: sum of |tau_a| + |tau_b|, over all elements and over the opposed ones.
    """

    square_a: float = 0.0
    square_b: float = 0.0
    dot: float = 0.0
    both: int = 0
    opposed: int = 0
    mass: float = 0.0
    opposed_mass: float = 0.0

    def __iadd__(self, other: "Pair") -> Self:
        self.square_a += other.square_a
        self.square_b += other.square_b
        self.dot += other.dot
        self.both += other.both
        self.opposed += other.opposed
        self.mass += other.mass
        self.opposed_mass += other.opposed_mass
        return self

    def figures(self) -> dict[str, Any]:
        """What a person reads; None for all where one of the two changes nothing, or something is not finite."""
        norms = math.sqrt(self.square_a) * math.sqrt(self.square_b)
        known = norms > 0 and math.isfinite(norms)
        return {
            "cosine": self.dot / norms if known else None,
            "sign_conflict": self.opposed / self.both if known and self.both else None,
            "sign_conflict_mass": self.opposed_mass / self.mass if known else None,
        }


@dataclass(frozen=True)
class Ranks:
    """Of one matrix of a change.

    Attributes:
        effective: exp of the entropy of the singular values.
        stable: sum of their squares over the largest square.
        full: the smaller side of the matrix.
    """

    effective: float
    stable: float
    full: int


@dataclass(frozen=True)
class TensorDiff:
    """One tensor of one model against the base.

    Attributes:
        name: of the tensor.
        model: position among the models.
        shape: in the base, or in the model where only that has it.
        change: None where it cannot be computed; `note` says why.
        ranks: of the change; None where it is no matrix, nothing changed, or they were not asked for.
        identical: same dtype, shape and bytes.
        note: `only in ...`, both shapes or dtypes where they differ, `not finite`, rows compared; else empty.
    """

    name: str
    model: int
    shape: tuple[int, ...]
    change: Change | None
    ranks: Ranks | None
    identical: bool
    note: str


@dataclass(frozen=True)
class Diff:
    """What `diff` found.

    Attributes:
        base: reference of the base.
        models: references of the models.
        tensors: in the order of the base, then what only a model has; of each the models in order.
        pairs: by tensor and (position, position) of two models.
    """

    base: str
    models: tuple[str, ...]
    tensors: tuple[TensorDiff, ...]
    pairs: dict[tuple[str, int, int], Pair]

    def rows(self) -> list[dict[str, Any]]:
        """One flat mapping a tensor and model."""
        return [self._row(tensor) for tensor in self.tensors]

    def pair_rows(self) -> list[dict[str, Any]]:
        """One flat mapping a tensor and pair of models."""
        return [
            {"name": name, "a": self.models[i], "b": self.models[j], **pair.figures()}
            for (name, i, j), pair in self.pairs.items()
        ]

    def totals(self, group: Callable[[str], Group]) -> dict[tuple[Group, int], dict[str, Any]]:
        """The figures over all tensors of a group, by group and position of the model.

        Ranks are means over the group's matrices.
        """
        sums: dict[tuple[Group, int], Change] = {}
        ranks: dict[tuple[Group, int], list[Ranks]] = {}
        for tensor in self.tensors:
            if tensor.change is None or not tensor.change.finite:
                continue
            place = (group(tensor.name), tensor.model)
            total = sums.setdefault(place, Change())
            total += tensor.change
            if tensor.ranks is not None:
                ranks.setdefault(place, []).append(tensor.ranks)
        return {place: change.figures() | _mean_ranks(ranks.get(place, [])) for place, change in sums.items()}

    def pair_totals(self, group: Callable[[str], Group]) -> dict[tuple[Group, int, int], dict[str, Any]]:
        """The figures of every two models over all tensors of a group, by group and positions."""
        sums: dict[tuple[Group, int, int], Pair] = {}
        for (name, i, j), pair in self.pairs.items():
            if math.isfinite(pair.square_a + pair.square_b):
                total = sums.setdefault((group(name), i, j), Pair())
                total += pair
        return {place: pair.figures() for place, pair in sums.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-serialisable."""

        def labelled(totals: dict[tuple[str, int], dict[str, Any]], key: str) -> list[dict[str, Any]]:
            return [{key: group, "model": self.models[i], **row} for (group, i), row in totals.items()]

        def paired(totals: dict[tuple[str, int, int], dict[str, Any]], key: str) -> list[dict[str, Any]]:
            return [
                {key: group, "a": self.models[i], "b": self.models[j], **row} for (group, i, j), row in totals.items()
            ]

        return {
            "base": self.base,
            "models": list(self.models),
            "total": labelled(self.totals(whole), "part"),
            "pairs": paired(self.pair_totals(whole), "part"),
            "layers": labelled(self.totals(layer_label), "layer"),
            "pair_layers": paired(self.pair_totals(layer_label), "layer"),
            "kinds": labelled(self.totals(kind_of), "kind"),
            "pair_kinds": paired(self.pair_totals(kind_of), "kind"),
            "tensors": self.rows(),
            "pair_tensors": self.pair_rows(),
        }

    def _row(self, tensor: TensorDiff) -> dict[str, Any]:
        place = place_of(tensor.name)
        figures = (tensor.change or Change()).figures()
        if tensor.change is None:
            figures = dict.fromkeys(figures)
        return {
            "name": tensor.name,
            "model": self.models[tensor.model],
            "layer": place.layer,
            "kind": place.kind,
            "shape": list(tensor.shape),
            **figures,
            "effective_rank": tensor.ranks and tensor.ranks.effective,
            "stable_rank": tensor.ranks and tensor.ranks.stable,
            "identical": tensor.identical,
            "note": tensor.note,
        }


def whole(name: str) -> str:
    """All tensors are one group."""
    del name
    return "all"


def kind_of(name: str) -> str:
    """`self_attn.q_proj`, over all layers."""
    return place_of(name).kind


def layer_label(name: str) -> str:
    """`model.layers.3`, or `outside the layers`."""
    place = place_of(name)
    return "outside the layers" if place.layer is None else f"{place.stack}.{place.layer}"


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor maps activations, so that the rank of its change says something: no tables, no vectors."""
    table = is_embedding(name) or is_head(name) or "embed" in name
    return len(shape) == 2 and min(shape) > 1 and not table


def diff(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    ranks: bool = False,
    sample: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compare models with a base, and with each other as to how they change it.

    Embeddings and heads of different vocabularies are compared in the rows that all have.

    Args:
        base: W_0.
        models: W_1, ... (weights of all of them must be here: `Checkpoint.fetch`).
        ranks: compute the ranks of the changes, too: a second pass, and the cube of the smaller side of each matrix.
        sample: compare only about so many elements of each tensor, at 16 places spread over it: estimates.
        threads: that read and sum up (None: one a core). They change no figure.
        progress: where to report.

    Raises:
        CheckpointError: a weight cannot be read.
    """
    comparison = _Comparison(base, models, sample)
    threads = threads or cores()
    progress = progress or Silent()
    found = _elementwise(comparison, threads, progress)
    ranked = _ranks(comparison, found, threads, progress) if ranks else {}
    tensors: list[TensorDiff] = []
    pairs: dict[tuple[str, int, int], Pair] = {}
    for name in comparison.names:
        sums = found.get(name)
        for i, model in enumerate(models):
            row = comparison.outline(name, i)
            if row is None:
                continue
            shape, note = row
            change = None if sums is None else sums.changes.get(i)
            if change is not None and not change.finite:
                note = "not finite"
            same = sums.identical[i] if sums is not None and i in sums.identical else _same_bytes(base, model, name)
            tensors.append(TensorDiff(name, i, shape, change, ranked.get((name, i)), same, note))
        if sums is not None:
            pairs |= {(name, i, j): pair for (i, j), pair in sums.pairs.items()}
    return Diff(base.ref, tuple(model.ref for model in models), tuple(tensors), pairs)


@dataclass
class _Sums:
    """Of some elements of one tensor, by position of the model."""

    changes: dict[int, Change]
    pairs: dict[tuple[int, int], Pair]
    identical: dict[int, bool]

    def add(self, other: "_Sums") -> None:
        for i, change in other.changes.items():
            self.changes[i] += change
            self.identical[i] = self.identical[i] and other.identical[i]
        for place, pair in other.pairs.items():
            self.pairs[place] += pair


class _Comparison:
    """Which tensors of which models can be compared, and how much of them."""

    def __init__(self, base: Checkpoint, models: Sequence[Checkpoint], sample: int | None) -> None:
        self.base, self.models, self.sample = base, models, sample
        self.names = list(dict.fromkeys([*base.tensors, *(name for model in models for name in model.tensors)]))

    def outline(self, name: str, model: int) -> tuple[tuple[int, ...], str] | None:
        """Shape and note of a tensor; None where neither base nor model has it."""
        left, right = self.base.tensors.get(name), self.models[model].tensors.get(name)
        if left is None or right is None:
            there = left or right
            who = self.base.ref if right is None else self.models[model].ref
            return None if there is None else (there.shape, f"only in {who}")
        notes: list[str] = []
        if left.shape != right.shape:
            rows = f", rows compared: {min(left.shape[0], right.shape[0])}" if _rows_differ(left, right) else ""
            notes.append(f"shape {list(left.shape)} and {list(right.shape)}{rows}")
        if left.dtype != right.dtype:
            notes.append(f"dtype {left.dtype} and {right.dtype}")
        return left.shape, "; ".join(notes)

    def comparable(self, name: str) -> tuple[list[int], int]:
        """The models whose values can be compared with the base's, and in how many elements."""
        left = self.base.tensors.get(name)
        if left is None or left.dtype not in FLOATS:
            return [], 0
        chosen: list[int] = []
        size = left.size
        for i, model in enumerate(self.models):
            right = model.tensors.get(name)
            if right is None or right.dtype not in FLOATS:
                continue
            if left.shape == right.shape or _rows_differ(left, right):
                chosen.append(i)
                size = min(size, right.size)
        return chosen, size

    def pieces(self, size: int) -> list[tuple[int, int]]:
        if self.sample is None or size <= self.sample:
            return [(at, min(at + _PIECE, size)) for at in range(0, size, _PIECE)]
        width = max(self.sample // _WINDOWS, 1)
        return [(i * (size - width) // (_WINDOWS - 1), i * (size - width) // (_WINDOWS - 1) + width) for i in range(16)]


def _rows_differ(left: TensorInfo, right: TensorInfo) -> bool:
    """Whether these are embeddings or heads of two vocabularies."""
    table = is_embedding(left.name) or is_head(left.name)
    return table and left.shape[1:] == right.shape[1:] and left.shape != right.shape


def _elementwise(comparison: _Comparison, threads: int, progress: Progress) -> dict[str, _Sums]:
    """All sums of all tensors, in one pass; in the order of the pieces whatever the threads do."""
    work: list[tuple[str, list[int], int, int]] = []
    for name in comparison.names:
        chosen, size = comparison.comparable(name)
        work += [(name, chosen, start, stop) for start, stop in comparison.pieces(size) if chosen]
    found: dict[str, _Sums] = {}
    total = sum((stop - start) * (1 + len(chosen)) for _, chosen, start, stop in work)
    # One BLAS thread a dot product: it would else be split by their number, and its last bits with it.
    with (
        threadpool_limits(1, "blas"),
        progress.task("comparing", total, "elements") as task,
        ThreadPoolExecutor(threads) as pool,
    ):
        for (name, *_), sums in zip(work, pool.map(lambda w: _piece(comparison, task, *w), work), strict=True):
            if name in found:
                found[name].add(sums)
            else:
                found[name] = sums
    return found


def _piece(comparison: _Comparison, task: Task, name: str, chosen: Sequence[int], start: int, stop: int) -> _Sums:
    base, models = comparison.base, comparison.models
    sums = _Sums(
        {i: Change() for i in chosen},
        {pair: Pair() for pair in combinations(chosen, 2)},
        {i: base.tensors[name].shape == models[i].tensors[name].shape for i in chosen},
    )
    width = min(_BLOCK, stop - start)
    deltas = {i: np.empty(width) for i in chosen}  # allocated once: the C library would page in new ones every time
    sizes = {i: np.empty(width) for i in chosen}
    space = np.empty(width), np.empty(width)
    for at in range(start, stop, _BLOCK):
        n = min(_BLOCK, stop - at)
        x = base.read_flat(name, at, at + n)
        x64 = space[0][:n]
        x64[:] = x
        square = float(np.dot(x64, x64))
        for i in chosen:
            y = models[i].read_flat(name, at, at + n)
            if sums.identical[i]:
                sums.identical[i] = _same_values(base, models[i], name, at, at + n, x, y)
            d = np.subtract(y, x64, out=deltas[i][:n])
            size = np.abs(d, out=sizes[i][:n])
            sums.changes[i] += Change(
                n,
                square,
                float(np.dot(x64, d)),
                float(np.dot(d, d)),
                int(np.count_nonzero(d)),
                float(size.max(initial=0.0)),
            )
        for (i, j), pair in sums.pairs.items():
            pair += _opposition(deltas[i][:n], deltas[j][:n], sizes[i][:n], sizes[j][:n], space)
        task.advance(n * (1 + len(chosen)))
    return sums


def _opposition(a: Float64, b: Float64, size_a: Float64, size_b: Float64, space: Sequence[Float64]) -> Pair:
    product = np.multiply(a, b, out=space[0][: a.size])
    mass = np.add(size_a, size_b, out=space[1][: a.size])
    opposed = product < 0
    return Pair(
        float(np.dot(a, a)),
        float(np.dot(b, b)),
        float(product.sum()),
        int(np.count_nonzero(product)),
        int(np.count_nonzero(opposed)),
        float(mass.sum()),
        float(np.dot(mass, opposed)),
    )


def _same_values(
    a: Checkpoint,
    b: Checkpoint,
    name: str,
    at: int,
    end: int,
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.float32],
) -> bool:
    dtype = a.tensors[name].dtype
    if dtype != b.tensors[name].dtype or not np.array_equal(x.view(np.uint32), y.view(np.uint32)):
        return False
    if dtype != "F64" or a.is_derived(name) or b.is_derived(name):
        return True
    return np.array_equal(a.read_raw(name, at, end), b.read_raw(name, at, end))  # float32 could hide a difference


def _same_bytes(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    """Of tensors that are no floating-point numbers."""
    left, right = a.tensors.get(name), b.tensors.get(name)
    if left is None or right is None or (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    if a.is_derived(name) or b.is_derived(name):
        return False
    return all(
        np.array_equal(a.read_raw(name, at, end), b.read_raw(name, at, end))
        for at, end in ((at, min(at + _PIECE, left.size)) for at in range(0, left.size, _PIECE))
    )


def _ranks(
    comparison: _Comparison, found: dict[str, _Sums], threads: int, progress: Progress
) -> dict[tuple[str, int], Ranks]:
    """Matrix after matrix: the linear algebra has threads of its own."""
    work = [
        (name, i)
        for name, sums in found.items()
        for i, change in sums.changes.items()
        if is_matrix(name, comparison.base.tensors[name].shape) and change.square and change.finite
    ]
    ranks: dict[tuple[str, int], Ranks] = {}
    cost = {place: _flops(comparison.base.tensors[place[0]].shape) for place in work}
    with threadpool_limits(threads, "blas"), progress.task("ranks", sum(cost.values()), "steps") as task:
        for name, i in work:
            values = _singular_values(comparison.base, comparison.models[i], name)
            effective, stable = effective_rank(values), stable_rank(values)
            if effective is not None and stable is not None:
                ranks[name, i] = Ranks(effective, stable, values.size)
            task.advance(cost[name, i])
    return ranks


def _singular_values(base: Checkpoint, model: Checkpoint, name: str) -> Float64:
    height, width = base.tensors[name].shape

    def rows(start: int, stop: int) -> Float64:
        cut = (name, start * width, stop * width)
        delta: Float64 = np.subtract(model.read_flat(*cut), base.read_flat(*cut), dtype=np.float64)
        return delta.reshape(stop - start, width)

    return singular_values(rows, (height, width))


def _flops(shape: Sequence[int]) -> float:
    small, large = sorted(shape)
    return float(small) ** 2 * (large + 2 * small)


def _mean_ranks(ranks: Iterable[Ranks]) -> dict[str, Any]:
    known = list(ranks)
    count = len(known)
    return {
        "effective_rank": sum(r.effective for r in known) / count if count else None,
        "stable_rank": sum(r.stable for r in known) / count if count else None,
    }
