"""LoRA adapters (peft) laid over a model while it is read: W + scaling * B @ A, a few rows at a time.

Equal to peft's `merge_and_unload` in float32, for every kind that `solera_core.lora` reads: matrices in either
orientation (GPT-2 stores them transposed), embeddings, experts fused into one tensor or stored one by one, biases,
modules saved in full, and DoRA. What cannot be laid over the model is refused by name.
"""

import itertools
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from solera_core.architecture import is_embedding, is_head, text_config
from solera_core.checkpoint import Checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_core.headers import TensorInfo
from solera_core.hub import is_hub_id
from solera_core.lora import CONFIG_FILE, LoraModule, StoredAdapter, open_stored
from solera_core.sidecars import find_sidecars, tokenizer_files
from solera_core.views import Derived, view

__all__ = [
    "Adapter",
    "Added",
    "LowRank",
    "Rescale",
    "Stacked",
    "Update",
    "lay_over",
    "open_adapter",
    "stored_experts",
    "stored_name",
]

Float32 = npt.NDArray[np.float32]

_BLOCK: Final = 1 << 15  # elements of the product worked on at a time: 128 KB of float32, which stays in cache
_NORM_BLOCK: Final = 1 << 20  # elements a step of the pass that finds DoRA's norms
_EXPERTS: Final = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""What fused parameters of experts are made of, where these are stored one by one; in the order of their rows."""

_LAYOUTS: Final = (  # how transformers calls a module, and how the same one may be called on disk
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector|visual)\.", r"\1."),
    (r"\.mlp\.(experts|gate)(?=\.|$)", r".block_sparse_moe.\1"),
    (r"^(model|transformer)\.", ""),
    (r"^", "model."),
    (r"^", "transformer."),
)


class Update(Protocol):
    """What is added to a tensor."""

    def delta(self, start: int, stop: int) -> Float32:
        """Elements [start, stop), flat, in C order; the same bits for every range."""
        ...


@dataclass(frozen=True)
class LowRank:
    """One low-rank update of a (rows, columns) matrix: `scaling * left @ right`.

    Attributes:
        left: (rows, rank).
        right: (rank, columns).
        scaling: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
    """

    left: Float32
    right: Float32
    scaling: float

    @property
    def size(self) -> int:
        """Elements of the update."""
        return math.prod((len(self.left), self.right.shape[1]))

    def delta(self, start: int, stop: int) -> Float32:
        """Elements [start, stop) of the update, flat, in C order.

        One rank after the other is multiplied and added, in float32: a matrix product of a BLAS rounds differently for
        other heights and other numbers of threads, and the same inputs must give the same bytes.
        """
        rank, columns = self.right.shape
        out = np.empty(stop - start, dtype=np.float32)
        height = max(1, _BLOCK // columns)
        product = np.empty((height, columns), dtype=np.float32)
        for row in range(start // columns, -(-stop // columns), height):
            left = self.left[row : row + height]
            term = product[: len(left)]
            block = np.zeros_like(term)
            for k in range(rank):
                block += np.multiply(left[:, k : k + 1], self.right[k], out=term)
            block *= np.float32(self.scaling)
            at = row * columns
            first, last = max(start, at), min(stop, at + block.size)
            out[first - start : last - start] = block.reshape(-1)[first - at : last - at]
        return out


@dataclass(frozen=True)
class Stacked:
    """Updates of equal size one behind the other: the experts of a fused tensor."""

    parts: tuple[LowRank, ...]

    def delta(self, start: int, stop: int) -> Float32:
        """Elements [start, stop) over all parts."""
        size = self.parts[0].size
        pieces = [
            self.parts[i].delta(max(start - i * size, 0), min(stop - i * size, size))
            for i in range(start // size, -(-stop // size))
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, np.float32)


@dataclass(frozen=True)
class Added:
    """A vector that is added: the bias of B (`lora_bias`), scaled."""

    values: Float32

    def delta(self, start: int, stop: int) -> Float32:
        """Elements [start, stop)."""
        return self.values[start:stop].copy()


@dataclass(frozen=True)
class Rescale:
    """DoRA: every row (or column) of W + update is brought to the norm that the adapter has learned.

    Attributes:
        magnitude: the norms to be, [n].
        axis: whether they belong to rows or to columns of the stored matrix.
    """

    magnitude: Float32
    axis: Literal["rows", "columns"]

    def factors(self, shape: tuple[int, ...], read: Callable[[int, int], Float32]) -> Float32:
        """Magnitude / norm, [n] float32; norms of what `read(start, stop)` gives, accumulated in float64."""
        columns = shape[1]
        step = max(_NORM_BLOCK // columns, 1)
        squares = np.zeros(len(self.magnitude))
        for row in range(0, shape[0], step):
            last = min(row + step, shape[0])
            block = read(row * columns, last * columns).reshape(-1, columns).astype(np.float64)
            block *= block
            if self.axis == "rows":
                squares[row:last] = block.sum(axis=1)
            else:
                squares += block.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros: the writer names what is not finite
            return (self.magnitude / np.sqrt(squares)).astype(np.float32)

    def apply(self, values: Float32, factors: Float32, columns: int, start: int) -> None:
        """Multiply elements from `start` on by the factors of their rows (or columns), in place."""
        place = np.arange(start, start + values.size)
        values *= factors[place // columns if self.axis == "rows" else place % columns]


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits the model it was opened for.

    Attributes:
        ref: as written.
        updates: what is added, by the tensor it changes.
        replaced: tensors that the adapter holds in full (`modules_to_save`, biases), by the tensor they replace.
        rescaled: DoRA's magnitudes, by the tensor they rescale.
        digest: of its settings and tensors.
        directory: where it is.
        base_model: the model that it says it was trained on.
        vocabulary: rows of the embedding and head that it holds, where these are not the model's.
    """

    ref: str
    updates: Mapping[str, Update]
    replaced: Mapping[str, TensorInfo]
    rescaled: Mapping[str, Rescale]
    digest: str
    directory: Path
    base_model: str | None
    vocabulary: int | None
    _stored: StoredAdapter
    _factors: dict[str, Float32] = field(default_factory=dict[str, Float32], compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    @property
    def names(self) -> frozenset[str]:
        """The tensors it changes."""
        return frozenset(self.updates) | frozenset(self.replaced)

    def apply(self, info: TensorInfo, start: int, stop: int, base: Callable[[int, int], Float32]) -> Float32:
        """Elements [start, stop) of tensor `info` with the adapter; `base(start, stop)` gives those without.

        Thread-safe. The first read of a tensor with DoRA reads all of it, for the norms.
        """

        def updated(start: int, stop: int) -> Float32:
            if (full := self.replaced.get(info.name)) is not None:
                values = self._stored.read(full, start, stop)
            else:
                values = base(start, stop)
            if (update := self.updates.get(info.name)) is not None:
                values += update.delta(start, stop)
            return values

        values = updated(start, stop)
        if (rescale := self.rescaled.get(info.name)) is not None:
            with self._lock:
                if info.name not in self._factors:
                    self._factors[info.name] = rescale.factors(info.shape, updated)
            rescale.apply(values, self._factors[info.name], info.shape[1], start)
        return values


def lay_over(model: Checkpoint, adapter_ref: str, ctx: Context, *, ref: str) -> Checkpoint:
    """A model with a peft LoRA adapter laid over it, called `ref`.

    An adapter that holds embedding and head with more (or fewer) rows brings its vocabulary: the config's vocab_size
    follows, and its own tokenizer is used where it has one. That it says it was made for another model is only a note.

    Raises:
        CheckpointError: as `open_adapter`.
    """
    adapter = open_adapter(adapter_ref, model.tensors, ctx)
    trained_on = (adapter.base_model or "").partition("@")[0]
    laid_over = model.ref.partition("@")[0]
    if is_hub_id(trained_on) and is_hub_id(laid_over) and trained_on != laid_over:
        ctx.progress.note(f"{adapter_ref}: says it was trained on {trained_on}; here it is laid over {laid_over}")

    def seen(name: str, info: TensorInfo) -> str | Derived:
        if name not in adapter.names:
            return name
        if adapter.vocabulary is not None and name in adapter.replaced:
            info = replace(info, shape=adapter.replaced[name].shape)
        return Derived(info, partial(adapter.apply, info, base=partial(model.read_flat, name)))

    tokenizer = find_sidecars(adapter.directory) if adapter.vocabulary is not None else []
    return view(
        model,
        {name: seen(name, info) for name, info in model.tensors.items()},
        what={"adapter": adapter.digest},
        ref=ref,
        config=None if adapter.vocabulary is None else _with_vocabulary(model.config, adapter.vocabulary),
        sidecars=tokenizer if tokenizer_files(file.name for file in tokenizer) else None,
        directories=(adapter.directory,),
    )


def _with_vocabulary(config: dict[str, Any], rows: int) -> dict[str, Any]:
    inner = text_config(config)
    for level in (config, inner):
        if "vocab_size" in level or level is inner:
            level["vocab_size"] = rows  # type: ignore[index]
    return config


def open_adapter(ref: str, tensors: Mapping[str, TensorInfo], ctx: Context) -> Adapter:
    """Open a peft LoRA adapter for a model with these `tensors`.

    Raises:
        CheckpointError: not found, not a LoRA adapter, a setting that is not supported (named), a tensor that the model
            does not have or of another shape, or anything in the adapter that would be left unused.
    """
    stored = open_stored(ref, ctx)
    fit = _Fit(stored, tensors)
    replaced = fit.replaced()
    vocabulary = fit.vocabulary(replaced)
    updates: dict[str, Update] = {}
    rescaled: dict[str, Rescale] = {}
    for module in stored.modules:
        for target, update, rescale in fit.updates(module):
            if target in updates:
                raise CheckpointError(f"{stored.directory}: two of its modules change {target!r}")
            updates[target] = update
            if rescale is not None:
                rescaled[target] = rescale
    fit.check_ties(frozenset(updates) | frozenset(replaced))
    return Adapter(
        ref, updates, replaced, rescaled, stored.digest(), stored.directory, stored.base_model, vocabulary, stored
    )


def stored_name(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The stored tensor that transformers calls `name` in memory; None where there is none, or more than one.

    Checkpoints keep the layout of the release they were written with: GPT-2 without `transformer.`, LLaVA with
    `language_model.model.` in front, Mixtral with `block_sparse_moe`.
    """
    if name in tensors:
        return name
    found = {other for other in _other_layouts(name) if other in tensors}
    return found.pop() if len(found) == 1 else None


def stored_experts(name: str, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """The stored tensors of fused experts that transformers calls `name` in memory: one, or all of every expert.

    Expert by expert, of each the parts in the order in which they are fused; empty where there are none.
    """
    if (fused := stored_name(name, tensors)) is not None:
        return (fused,)
    prefix, _, wanted = name.rpartition(".")
    found: list[str] = []
    for expert in itertools.count():
        for leaves in _EXPERTS.get(wanted, ()):
            names = [stored_name(f"{prefix}.{expert}.{leaf}.weight", tensors) for leaf in leaves]
            if None not in names:
                found += [name for name in names if name is not None]
                break
        else:
            return tuple(found)
    raise AssertionError("unreachable")


def _other_layouts(name: str) -> Iterator[str]:
    for pattern, replacement in _LAYOUTS:
        other = re.sub(pattern, replacement, name, count=1)
        yield other
        yield from (re.sub(p, r, other, count=1) for p, r in _LAYOUTS[2:4] if other != name)


class _Fit:
    """Finds the place of everything in an adapter among the tensors of a model."""

    def __init__(self, stored: StoredAdapter, tensors: Mapping[str, TensorInfo]) -> None:
        self._stored = stored
        self._tensors = tensors
        self._transposed = any(
            len(info.shape) == 2
            and info.shape[0] != info.shape[1]
            and (bias := tensors.get(_bias_of(name))) is not None
            and bias.shape == info.shape[1:]
            for name, info in tensors.items()
            if name.endswith(".weight")
        )  # Conv1D of GPT-2: [in, out], where a bias is as long as the matrix is wide

    def replaced(self) -> dict[str, TensorInfo]:
        """Tensors held in full, by the tensor of the model that they replace."""
        found: dict[str, TensorInfo] = {}
        for name, info in self._stored.full.items():
            target = stored_name(name, self._tensors)
            if target is None and is_head(name) and self._is_copy_of_embedding(info):
                continue  # the model ties its embeddings, and so does the adapter
            target = target if target is not None else self._target(info, name)
            shape = self._tensors[target].shape
            rows = is_embedding(target) or is_head(target)  # see `vocabulary`
            if info.shape != shape and not (rows and info.shape[1:] == shape[1:]):
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r} {info.shape} replaces {target!r} {shape} of the model: the "
                    f"shapes differ; is the adapter for another model?{self._origin()}"
                )
            found[target] = info
        return found

    def vocabulary(self, replaced: Mapping[str, TensorInfo]) -> int | None:
        """Rows of embedding and head, where the adapter holds both of them with others than the model's."""
        tables = {n: i.shape[0] for n, i in self._tensors.items() if is_embedding(n) or is_head(n)}
        after = {name: replaced[name].shape[0] if name in replaced else rows for name, rows in tables.items()}
        changed = [name for name in tables if after[name] != tables[name]]
        if not changed:
            return None
        if len(set(after.values())) > 1 or any(f"{m.name}.weight" in tables for m in self._stored.modules):
            info = replaced[changed[0]]
            others = ", ".join(f"{name!r} {after[name]}" for name in tables if name != changed[0])
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} {info.shape} replaces {changed[0]!r} "
                f"{self._tensors[changed[0]].shape} of the model: the vocabulary was resized in training, which needs "
                f"the embedding and the head, whole and with equal rows; the others will have: {others}"
            )
        return after[changed[0]]

    def updates(self, module: LoraModule) -> Iterator[tuple[str, Update, Rescale | None]]:
        """(tensor, what is added, what rescales it) of one module."""
        weight = stored_name(f"{module.name}.weight", self._tensors)
        if weight is None and self._is_twin_of_embedding(module):
            return
        if weight is None or module.depth:
            if self._stored.settings.get("target_parameters"):
                yield from ((target, update, None) for target, update in self._experts(module))
                return
            weight = self._target(module.a, f"{module.name}.weight")
        scaling = self._scaling(self._place(module), module.a.shape[0])
        left, right = self._stored.matrix(module.b), self._stored.matrix(module.a)
        axis: Literal["rows", "columns"] = "rows"
        if module.embedding or self._is_transposed(weight):
            left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
            axis = "columns"
        self._require_fit(module, weight, (left.shape[0], right.shape[1]))
        rescale = None if module.magnitude is None else Rescale(self._stored.read(module.magnitude), axis)
        yield weight, LowRank(left, right, scaling), rescale
        if module.bias is not None:
            yield self._bias(module, weight), Added(self._stored.read(module.bias) * np.float32(scaling)), None

    def check_ties(self, changed: frozenset[str]) -> None:
        """Refuse a change of a tied embedding that the adapter made for one of its two uses only.

        In training the head went on using the weights without the change; laid over the stored tensor it would have it.
        peft ties them where it stores the change of the head as well (`ensure_weight_tying`, for some families).
        """
        stored = self._stored
        tied = not any(is_head(name) for name in self._tensors)
        embeddings = sorted(name for name in changed if is_embedding(name))
        if not tied or not embeddings or stored.settings.get("task_type") not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            return
        low_rank = any(is_embedding(f"{module.name}.weight") for module in stored.modules)
        heads = [f"{module.name}.weight" for module in stored.modules] if low_rank else list(stored.full)
        if not any(map(is_head, heads)):
            raise CheckpointError(
                f"{stored.directory}: changes the embedding {embeddings[0]!r} but not the output head, which the "
                "model ties to it: in training the head was without that change; save the base untied first (with its "
                "own lm_head.weight), and use the adapter on that"
            )

    def _is_twin_of_embedding(self, head: LoraModule) -> bool:
        """Whether this update of the head is that of the embedding, as peft stores it where it ties the two."""
        if not is_head(f"{head.name}.weight"):
            return False
        twin = next((m for m in self._stored.modules if m.embedding and is_embedding(f"{m.name}.weight")), None)
        matrix = self._stored.matrix
        return (
            twin is not None
            and np.array_equal(matrix(head.a), matrix(twin.b).T)
            and np.array_equal(matrix(head.b), matrix(twin.a).T)
        )

    def _is_copy_of_embedding(self, head: TensorInfo) -> bool:
        twin = next((info for name, info in self._stored.full.items() if is_embedding(name)), None)
        source = self._stored.source
        return (
            twin is not None
            and (twin.shape, twin.dtype) == (head.shape, head.dtype)
            and np.array_equal(source.read_raw(twin, 0, twin.size), source.read_raw(head, 0, head.size))
        )

    def _origin(self) -> str:
        base = self._stored.base_model
        return "" if base is None else f" (it says that it was trained on {base!r})"

    def _target(self, info: TensorInfo, name: str) -> str:
        """The stored tensor of a name; raises where there is none."""
        target = stored_name(name, self._tensors)
        if target is None:
            tied = is_head(name) and any(is_embedding(n) for n in self._tensors)
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} changes {name!r}, which the model does not store under this name; "
                + (
                    "it ties its output head to the embedding: save it untied first"
                    if tied
                    else f"is the adapter for another model? If not, merge it with peft first{self._origin()}"
                )
            )
        return target

    def _is_targeted(self, parameter: str) -> bool:
        """Whether the settings name this parameter, by itself."""
        targets: Sequence[str] = self._stored.settings.get("target_parameters") or ()
        return any(parameter == target or parameter.endswith(f".{target}") for target in targets)

    def _place(self, module: LoraModule) -> str:
        """What peft matches patterns against: the module, or its weight where that is what is targeted."""
        return weight if self._is_targeted(weight := f"{module.name}.weight") else module.name

    def _scaling(self, place: str, found: int) -> float:
        rank = self._stored.rank(place)
        if rank != found:
            raise CheckpointError(
                f"{self._stored.directory / CONFIG_FILE}: gives rank {rank} for {place}, but its factors have rank "
                f"{found}"
            )
        return self._stored.scaling(place)

    def _is_transposed(self, weight: str) -> bool:
        """Whether a matrix is stored [in, out]: every one with a bias in a model of Conv1D modules."""
        return self._transposed and _bias_of(weight) in self._tensors

    def _require_fit(self, module: LoraModule, target: str, shape: tuple[int, ...]) -> None:
        if shape != self._tensors[target].shape:
            raise CheckpointError(
                f"{self._stored.directory}: tensor {target!r} {self._tensors[target].shape}: the adapter's factors "
                f"{module.b.shape} and {module.a.shape} do not fit; is the adapter for another model?{self._origin()}"
            )

    def _bias(self, module: LoraModule, weight: str) -> str:
        bias = _bias_of(weight)
        assert module.bias is not None
        if bias not in self._tensors:
            raise CheckpointError(
                f"{module.bias.file}: tensor {module.bias.name!r} is added to {bias!r}, which the model does not have; "
                "an adapter with lora_bias only fits modules with a bias"
            )
        if self._tensors[bias].size != module.bias.size:
            raise CheckpointError(
                f"{module.bias.file}: tensor {module.bias.name!r} {module.bias.shape} does not fit {bias!r} "
                f"{self._tensors[bias].shape}; is the adapter for another model?"
            )
        return bias

    def _experts(self, module: LoraModule) -> Iterator[tuple[str, Update]]:
        """Updates of the experts' fused parameters (`target_parameters`), which peft stores without their names."""
        wide, high = module.a.shape[1], module.b.shape[0]
        fits: list[list[tuple[str, Update]]] = []
        for name in ("gate_up_proj", "down_proj"):
            place = f"{module.name}.{name}"
            if self._is_targeted(place) and (found := self._expert_layout(place, wide, high)) is not None:
                experts, layout = found
                fits.append(list(self._expert_updates(module, place, experts, layout)))
        if len(fits) != 1:
            raise CheckpointError(
                f"{self._stored.directory}: {CONFIG_FILE} has target_parameters "
                f"{sorted(self._stored.settings['target_parameters'])}, and none of them, or more than one, is a "
                f"parameter of {module.name!r} that takes {wide} values to {high}; is the adapter for another model? "
                f"If not, merge it with peft first{self._origin()}"
            )
        yield from fits[0]

    def _expert_layout(self, place: str, wide: int, high: int) -> "tuple[int, Sequence[_Part]] | None":
        """How many experts, and where the (high, wide) update of one goes; None where the parameter does not fit."""
        fused = stored_name(place, self._tensors)
        if fused is not None and len(shape := self._tensors[fused].shape) == 3:
            if shape[1:] == (high, wide) and not (shape[1:] == (wide, high) and self._in_first(fused)):
                return shape[0], [_Part(fused, None, 0, high, transposed=False)]
            return (shape[0], [_Part(fused, None, 0, high, transposed=True)]) if shape[1:] == (wide, high) else None
        stored = stored_experts(place, self._tensors)
        halves = 2 if place.endswith("gate_up_proj") else 1
        experts, rest = divmod(len(stored), halves)
        rows = high // halves
        if not experts or rest or any(self._tensors[name].shape != (rows, wide) for name in stored):
            return None
        return experts, [
            _Part(name, i // halves, i % halves * rows, rows, transposed=False) for i, name in enumerate(stored)
        ]

    def _in_first(self, fused: str) -> bool:
        """Whether fused experts are stored [experts, in, out], told by the two parameters together."""
        prefix = fused.rpartition(".")[0]
        both = [self._tensors.get(f"{prefix}.{name}") for name in ("gate_up_proj", "down_proj")]
        return all(both) and both[0].shape[2] == 2 * both[1].shape[1]  # type: ignore[union-attr]

    def _expert_updates(
        self, module: LoraModule, place: str, experts: int, parts: "Sequence[_Part]"
    ) -> Iterator[tuple[str, Update]]:
        if module.a.shape[0] % experts:
            raise CheckpointError(
                f"{module.a.file}: tensor {module.a.name!r} {module.a.shape}: its rows are no multiple of the "
                f"{experts} experts of the model; is the adapter for another model?{self._origin()}"
            )
        scaling = self._scaling(place, module.a.shape[0] // experts)
        a = self._stored.matrix(module.a).reshape(experts, -1, module.a.shape[1])  # experts, rank, in
        b = self._stored.matrix(module.b).reshape(module.b.shape[0], -1, experts)  # out, rank, experts

        def low_rank(expert: int, part: _Part) -> LowRank:
            left = np.ascontiguousarray(b[part.row : part.row + part.rows, :, expert])
            right = np.ascontiguousarray(a[expert])
            if part.transposed:
                left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
            return LowRank(left, right, scaling)

        for part in parts:
            if part.expert is None:
                yield part.target, Stacked(tuple(low_rank(e, part) for e in range(experts)))
            else:
                yield part.target, low_rank(part.expert, part)


@dataclass(frozen=True)
class _Part:
    """Where rows [row, row + rows) of the update of one expert (None: of every one) go."""

    target: str
    expert: int | None
    row: int
    rows: int
    transposed: bool


def _bias_of(weight: str) -> str:
    return weight.removesuffix(".weight") + ".bias"
