"""A fine-tune written as its base and a LoRA adapter: every change a low-rank update, a tensor saved in full, or named.

Matrices of linear layers become B @ A, by a fixed rank or by the share of the energy (the squared Frobenius norm of the
change) that is to be kept. Norms, biases and whatever else changed are saved in full. What the adapter leaves out is a
row of the report with its error, never silence.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from solera_core.adapters import stored_experts, stored_name
from solera_core.architecture import is_embedding, is_head
from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.dtypes import FLOATS, ITEM_BYTES, SAFETENSORS_NAME, from_float32, to_float32
from solera_core.errors import CheckpointError
from solera_core.lora import CONFIG_FILE, WEIGHTS_FILE
from solera_core.output import input_record, write_provenance
from solera_core.plan import Plan
from solera_core.staging import check_apart, check_target, require_disk, staged
from solera_core.strict import Strict
from solera_merge.adapters.low_rank import Factors, Keep, decompose, residual
from solera_merge.adapters.writing import AdapterOutput, target_names
from solera_merge.masks import key
from solera_merge.memory import Budget, default_memory_bytes, keep_freed_memory
from solera_merge.plan import worker_threads
from solera_merge.problems import Problems, some

if TYPE_CHECKING:
    from solera_core.causal_lm import ParameterInfo

__all__ = ["ExtractConfig", "Extraction", "extract_lora", "linear_modules", "plan_extract"]

Float32: TypeAlias = npt.NDArray[np.float32]
Place: TypeAlias = Literal["lora", "embedding", "experts", "saved", "bias", "left out"]

_BLOCK: Final = 1 << 20  # elements read at a time
_EXPERT_NAMES: Final = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
_LOW_RANK: Final = ("lora", "embedding", "experts")
_WORK: Final = 6  # float32 copies of a matrix that its decomposition holds at most


class ExtractConfig(Strict):
    """What to extract.

    Attributes:
        base_model: the model that the adapter will be for.
        model: its fine-tune.
        rank: of every update; or
        energy: share of the squared norm of each change that its update keeps, above 0, at most 1.
        max_rank: bound of the ranks that `energy` leads to.
        target_modules: a regular expression; only modules whose name it matches somewhere are captured.
        exclude: a regular expression; modules whose name it matches are left out.
        embeddings: changed embedding and output head: `save`d in full, as `lora`, or `skip`ped.
        modules_to_save: other changed tensors that are no matrices of linear layers: saved in full, or `none` of them.
        dtype: of the adapter; by default the widest of the two models.
    """

    base_model: str
    model: str
    rank: int | None = Field(default=None, ge=1)
    energy: float | None = Field(default=None, gt=0, le=1)
    max_rank: int | None = Field(default=None, ge=1)
    target_modules: str | None = None
    exclude: str | None = None
    embeddings: Literal["save", "lora", "skip"] = "save"
    modules_to_save: Literal["auto", "none"] = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None

    @field_validator("target_modules", "exclude")
    @classmethod
    def _expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as e:
            raise ValueError(f"{value!r} is no regular expression: {e}") from e
        return value

    @model_validator(mode="after")
    def _one_measure(self) -> "ExtractConfig":
        if (self.rank is None) == (self.energy is None):
            raise ValueError("give either a rank or an energy")
        if self.max_rank is not None and self.energy is None:
            raise ValueError("max_rank bounds the ranks found by energy; with a fixed rank give only that")
        return self

    @property
    def keep(self) -> Keep:
        """How many directions an update has."""
        return Keep(self.rank, self.energy, self.max_rank)


@dataclass(frozen=True)
class Extraction:
    """What came of it.

    Attributes:
        out: the adapter's directory.
        rows: one a changed tensor: how it is captured, rank, share of the energy, error relative to its change.
        error: of all changes together: the norm of what is missing over the norm of the change.
        warnings: what is not in the adapter.
    """

    out: Path
    rows: tuple[Mapping[str, Any], ...]
    error: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "out": str(self.out),
            "error": self.error,
            "tensors": [dict(row) for row in self.rows],
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class _Piece:
    """One tensor in memory, and how a change of it is captured.

    Attributes:
        name: in memory.
        stored: on disk; of experts that are stored one by one, all of them, in order.
        shape: in memory; of fused experts that of the update as peft has it, (experts, out, in).
        transposed: [in, out], per expert too.
        why: it is left out.
    """

    name: str
    stored: tuple[str, ...]
    shape: tuple[int, ...]
    place: Place
    transposed: bool
    why: str = ""

    @property
    def side(self) -> int:
        """The largest rank there can be."""
        return min(self.shape[-2:])

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


def plan_extract(config: ExtractConfig, ctx: Context) -> Plan:
    """What `extract_lora` would do, from configs and headers alone: whether a tensor changed only its values tell."""
    base, tuned, pieces = _prepare(config, ctx)
    rows: list[dict[str, Any]] = [
        {
            "tensor": piece.name,
            "if changed": f"left out: {piece.why}" if piece.place == "left out" else piece.place,
            "rank": _most_rank(piece, config) if piece.place in _LOW_RANK else "",
            "bytes": _most_bytes(piece, config, base, tuned),
        }
        for piece in pieces
    ]
    nbytes = sum(_most_bytes(piece, config, base, tuned) for piece in pieces)
    return Plan(
        stage="extract-lora",
        reads=[
            {"what": c.ref, "path": str(c.path), "bytes": sum(t.nbytes for t in c.tensors.values())}
            for c in (base, tuned)
        ],
        writes=[{"what": WEIGHTS_FILE, "bytes": nbytes}, {"what": CONFIG_FILE, "bytes": None}],
        memory_bytes=max(map(_work_bytes, pieces), default=0),
        disk_bytes=2 * nbytes,
        parameters=config.model_dump(mode="json"),
        rows=rows,
    )


def linear_modules(config: ExtractConfig, ctx: Context) -> dict[str, tuple[int, int]]:
    """(out, in) of every module that gets a low-rank update if it changed, experts and embeddings left out."""
    _, _, pieces = _prepare(config, ctx)
    shapes = {
        piece.module: piece.shape[::-1] if piece.transposed else piece.shape for piece in pieces if _is_linear(piece)
    }
    return {module: (shape[0], shape[1]) for module, shape in shapes.items()}


def _is_linear(piece: _Piece) -> bool:
    return piece.place == "lora" and len(piece.shape) == 2


def extract_lora(config: ExtractConfig, out: Path, ctx: Context) -> Extraction:
    """Write the adapter that turns the base into the fine-tune, as far as the rank goes, into a new directory `out`.

    Base and adapter together are as far from the fine-tune as the errors say: these are computed from the numbers that
    are stored. The same inputs, settings and seed give the same bytes.

    Raises:
        InputError: the models do not fit each other, a change cannot be captured, the target is in the way, a value is
            not finite, nothing differs.
        ResourceError: no room on the disk.
    """
    check_target(out, overwrite=ctx.overwrite)
    base, tuned, pieces = _prepare(config, ctx)
    check_apart(out, [*base.directories, *tuned.directories])
    nbytes = sum(_most_bytes(piece, config, base, tuned) for piece in pieces)
    require_disk(out, 2 * nbytes, downloads={c.path: c.missing_bytes for c in (base, tuned)})
    base.fetch()
    tuned.fetch()
    dtype = _dtype(config, base, tuned)
    with staged(out, overwrite=ctx.overwrite, flush=ctx.flush) as staging:
        with AdapterOutput(staging, dtype, as_parameters=_as_parameters(pieces)) as output:
            rows, modules = _capture(pieces, base, tuned, config, output, ctx)
            if not rows:
                raise CheckpointError(f"{base.ref} and {tuned.ref}: no tensor differs, so there is nothing to extract")
            if not output.ranks and not output.parameters:
                raise CheckpointError(
                    f"{base.ref} and {tuned.ref}: no matrix of a linear layer that is to be captured differs, and an "
                    "adapter without a low-rank update cannot be loaded; loosen target_modules or exclude"
                )
            biases = any(row["captured"] == "bias" for row in rows)
            tied = not any(is_head(piece.stored[0]) for piece in pieces) and any(
                is_embedding(row["tensor"]) and row["captured"] != "left out" for row in rows
            )
            others = [
                piece.module for piece in pieces if piece.name.endswith(".weight") and piece.module not in output.ranks
            ]
            digests = output.finish(
                {
                    "base_model_name_or_path": base.ref,
                    "bias": "lora_only" if biases else "none",
                    "ensure_weight_tying": tied,
                    "fan_in_fan_out": any(piece.transposed and piece.module in output.ranks for piece in pieces),
                    "modules_to_save": modules or None,
                    "target_modules": target_names(output.ranks, others),
                    "task_type": _task_type(base.config),
                }
            )
        error = _total_error(rows)
        shown = tuple(_without_squares(row) for row in rows)
        write_provenance(
            staging,
            kind="extract-lora",
            recipe=config.model_dump(mode="json", exclude_none=True),
            seed=ctx.seed,
            inputs=[input_record(base, "base", attest=ctx.attest), input_record(tuned, "model", attest=ctx.attest)],
            tensors=digests,
            checks={"error": error, "errors": {row["tensor"]: row["error"] for row in shown}},
        )
        for checkpoint in (base, tuned):
            checkpoint.require_unchanged()
    left_out = [row for row in rows if row["captured"] == "left out"]
    warnings = tuple(f"{row['tensor']} changed and is not in the adapter: {row['why']}" for row in left_out)
    return Extraction(out, shown, error, warnings)


def _prepare(config: ExtractConfig, ctx: Context) -> tuple[Checkpoint, Checkpoint, list[_Piece]]:
    problems = Problems()
    base = open_checkpoint(config.base_model, ctx, weights="later", dequantise=True)
    tuned = open_checkpoint(config.model, ctx, weights="later", dequantise=True)
    a, b = base.tensors, tuned.tensors
    for only, who, other in ((a.keys() - b.keys(), base, tuned), (b.keys() - a.keys(), tuned, base)):
        if only:
            problems.checkpoint(
                f"{who.ref}: has {some(sorted(only))}, which {other.ref} has not; are they of one architecture, and is "
                "the head of both tied or of neither?"
            )
    for name in a.keys() & b.keys():
        table = is_embedding(name) or is_head(name)
        if a[name].shape != b[name].shape and not (
            table and a[name].shape[1:] == b[name].shape[1:] and config.embeddings == "save"
        ):
            problems.checkpoint(
                f"tensor {name!r} is {a[name].shape} in {base.ref} and {b[name].shape} in {tuned.ref}"
                + ("; use --embeddings save" if table and config.embeddings != "save" else "")
            )
    problems.raise_any()
    return base, tuned, _pieces(base, tuned, config, ctx)


def _pieces(base: Checkpoint, tuned: Checkpoint, config: ExtractConfig, ctx: Context) -> list[_Piece]:
    from solera_core.causal_lm import ParameterInfo, meta_parameters

    try:
        parameters = meta_parameters(base.path, trust_remote_code=ctx.trust_remote_code)
    except CheckpointError as e:
        ctx.progress.note(f"{e}; the adapter gets the names on disk")
        parameters = dict[str, ParameterInfo]()
    names = {stored: name for name in parameters if (stored := stored_name(name, base.tensors)) is not None}
    pieces = list(_expert_pieces(parameters, base, config))
    of_experts = {stored for piece in pieces for stored in piece.stored}
    for stored, info in base.tensors.items():
        if stored in of_experts:
            continue
        name = names.get(stored, stored)
        known = parameters.get(name)
        kind = known.module if known is not None else _guess(name, info.shape)
        shape = tuned.tensors[stored].shape
        place, why = _place(name, shape, info.dtype, kind, not parameters or known is not None, config)
        pieces.append(_Piece(name, (stored,), shape, place, transposed=kind == "Conv1D", why=why))
    low_rank = {piece.module for piece in pieces if piece.place in ("lora", "embedding")}
    return [
        _Piece(p.name, p.stored, p.shape, "bias", p.transposed)
        if p.place == "saved" and p.module in low_rank and p.name.endswith(".bias")
        else p
        for p in pieces
    ]


def _expert_pieces(
    parameters: "Mapping[str, ParameterInfo]", base: Checkpoint, config: ExtractConfig
) -> Iterator[_Piece]:
    """Fused experts, in the order in which their module has them, stored as they are or expert by expert."""
    for name, info in parameters.items():
        module, _, leaf = name.rpartition(".")
        stored = stored_experts(name, base.tensors)
        if len(info.shape) != 3 or not stored:
            continue
        experts, high, wide = info.shape
        shape = (experts, wide, high) if info.transposed else info.shape
        place, why = _place(f"{module}.{leaf}", shape, base.tensors[stored[0]].dtype, "experts", True, config)
        yield _Piece(name, stored, shape, place, transposed=info.transposed, why=why)


def _guess(name: str, shape: tuple[int, ...]) -> str:
    """The class of a module that transformers does not know."""
    if is_embedding(name) or "embed" in name or name.endswith("wpe.weight"):
        return "Embedding"
    return "Linear" if len(shape) == 2 and name.endswith(".weight") else ""


def _place(
    name: str, shape: tuple[int, ...], dtype: str, kind: str, in_memory: bool, config: ExtractConfig
) -> tuple[Place, str]:
    """How a change of a tensor is captured; where it is not, why."""
    module, _, leaf = name.rpartition(".")
    module = name if kind == "experts" else module
    if config.exclude is not None and re.search(config.exclude, module):
        return "left out", "excluded"
    if config.target_modules is not None and not re.search(config.target_modules, module):
        return "left out", "not among target_modules"
    if dtype not in FLOATS:
        return "left out", f"stored as {dtype}"
    if kind == "experts":
        return "experts", ""
    table = is_embedding(name) or is_head(name)
    if table and config.embeddings == "skip":
        return "left out", "embeddings: skip"
    if table and config.embeddings == "lora":
        return ("embedding" if is_embedding(name) else "lora"), ""
    if not table and in_memory and kind in ("Linear", "Conv1D") and leaf == "weight" and len(shape) == 2:
        return "lora", ""
    if not in_memory or leaf not in ("weight", "bias"):
        return "left out", "peft cannot save this parameter by itself"
    if not table and config.modules_to_save == "none":
        return "left out", "modules_to_save: none"
    return "saved", ""


def _dtype(config: ExtractConfig, base: Checkpoint, tuned: Checkpoint) -> str:
    if config.dtype is not None:
        return SAFETENSORS_NAME[config.dtype]
    found = {info.dtype for c in (base, tuned) for info in c.tensors.values() if info.dtype in FLOATS}
    return next(iter(found)) if len(found) == 1 and found != {"F64"} else "F32"


def _as_parameters(pieces: Sequence[_Piece]) -> frozenset[str]:
    """Modules that peft would take for parts of fused experts, by their last name, if they were target_modules."""
    if not any(piece.place == "experts" or len(piece.shape) == 3 for piece in pieces):
        return frozenset()
    return frozenset(p.module for p in pieces if p.place == "lora" and p.module.rpartition(".")[2] in _EXPERT_NAMES)


def _capture(
    pieces: Sequence[_Piece],
    base: Checkpoint,
    tuned: Checkpoint,
    config: ExtractConfig,
    output: AdapterOutput,
    ctx: Context,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Put every changed tensor into the output; the rows of the report, and the modules that are saved in full."""
    from threadpoolctl import threadpool_limits

    keep_freed_memory()
    threads = worker_threads(ctx)
    budget = Budget(default_memory_bytes() if ctx.memory_bytes is None else ctx.memory_bytes)
    total = sum(math.prod(piece.shape) for piece in pieces)
    tied = not any(is_head(piece.stored[0]) for piece in pieces)
    rows: list[dict[str, Any]] = []
    saved: dict[str, None] = {}

    def work(piece: _Piece) -> "_Change":
        with budget.take(_work_bytes(piece)):
            return _change(piece, base, tuned, config, output.dtype, ctx.seed)

    # One BLAS thread: the last bits depend on their number, and the pool keeps the cores busy.
    with (
        threadpool_limits(1),
        ThreadPoolExecutor(threads, "extract") as pool,
        ctx.progress.task("extracting", total, "parameters") as task,
    ):
        futures = [pool.submit(work, piece) for piece in pieces]
        try:
            for piece, future in zip(pieces, futures, strict=True):
                change = future.result()
                task.advance(math.prod(piece.shape))
                if change.square == 0 and not change.resized:
                    continue
                rows.append(_row(piece, change))
                if change.factors is not None:
                    output.add(piece.module, change.factors, embedding=piece.place == "embedding")
                    if tied and piece.place == "embedding":  # peft keeps the tied head's half beside it
                        output.put("lm_head.lora_A.weight", change.factors.right)
                        output.put("lm_head.lora_B.weight", change.factors.left)
                elif change.experts:
                    output.add_experts(piece.name, change.experts)
                elif piece.place == "saved":
                    saved[piece.module] = None
        finally:
            pool.shutdown(cancel_futures=True)
    for row in rows:  # a changed bias of a module without a low-rank update needs the whole module
        module = row["tensor"].rpartition(".")[0]
        if row["captured"] == "bias" and module not in output.ranks and f"{module}.weight" not in output.parameters:
            row["captured"] = "saved"
            saved[module] = None
    biases = any(row["captured"] == "bias" for row in rows)
    for piece in pieces:
        if piece.module in saved:
            output.put_blocks(piece.name, piece.shape, _blocks(tuned, piece.stored[0]))
            if tied and is_embedding(piece.stored[0]):
                output.put_blocks("lm_head.weight", piece.shape, _blocks(tuned, piece.stored[0]))
        elif biases and piece.place == "bias" and piece.module in output.ranks:
            output.put_blocks(f"{piece.module}.base_layer.bias", piece.shape, _blocks(tuned, piece.stored[0]))
    return rows, list(saved)


@dataclass(frozen=True)
class _Change:
    """What became of one tensor: the squared norms of its change, of what the adapter misses, and of the fine-tune."""

    square: float
    missing: float
    weight: float
    factors: Factors | None = None
    experts: tuple[Factors, ...] = ()
    resized: bool = False


def _change(
    piece: _Piece, base: Checkpoint, tuned: Checkpoint, config: ExtractConfig, dtype: str, seed: int
) -> _Change:
    if piece.place == "experts":
        return _change_of_experts(piece, base, tuned, config, dtype, seed)
    if piece.place != "left out" and base.tensors[piece.stored[0]].shape != piece.shape:
        return _Change(0.0, 0.0, 0.0, resized=True)
    if piece.place not in ("lora", "embedding"):
        square = weight = rounding = 0.0
        olds = (block for stored in piece.stored for block in _blocks(base, stored))
        news = (block for stored in piece.stored for block in _blocks(tuned, stored))
        for old, new in zip(olds, news, strict=True):
            square += _square(new - old)
            weight += _square(new)
            if piece.place != "left out":
                rounding += _square(new - to_float32(from_float32(new, dtype), dtype))
        return _Change(square, square if piece.place == "left out" else rounding, weight)
    delta = np.empty(math.prod(piece.shape), np.float32)
    weight, at = 0.0, 0
    for old, new in zip(_blocks(base, piece.stored[0]), _blocks(tuned, piece.stored[0]), strict=True):
        np.subtract(new, old, out=delta[at : at + new.size])
        weight += _square(new)
        at += new.size
    square = _square(delta)
    if square == 0:
        return _Change(0.0, 0.0, weight)
    matrix = delta.reshape(piece.shape)
    matrix = np.ascontiguousarray(matrix.T) if piece.transposed else matrix
    factors = decompose(matrix, config.keep, key(seed, piece.name, "extract-lora"))
    if config.rank is not None:
        factors = factors.padded(min(config.rank, *matrix.shape))
    factors = factors.stored(dtype)
    return _Change(square, residual(matrix, factors), weight, factors)


def _change_of_experts(
    piece: _Piece, base: Checkpoint, tuned: Checkpoint, config: ExtractConfig, dtype: str, seed: int
) -> _Change:
    """One expert after the other; all of them get the rank of the one that needs most."""
    experts, high, wide = piece.shape
    deltas: list[Float32] = []
    square = weight = 0.0
    for expert in range(experts):
        new = _expert(tuned, piece, expert)
        deltas.append(new - _expert(base, piece, expert))
        square += _square(deltas[-1])
        weight += _square(new)
    if square == 0:
        return _Change(0.0, 0.0, weight)
    found = [decompose(d, config.keep, key(seed, f"{piece.name}.{e}", "extract-lora")) for e, d in enumerate(deltas)]
    rank = max(factors.rank for factors in found) if config.rank is None else min(config.rank, high, wide)
    stored = tuple(factors.padded(rank).stored(dtype) for factors in found)
    missing = math.fsum(residual(delta, factors) for delta, factors in zip(deltas, stored, strict=True))
    return _Change(square, missing, weight, experts=stored)


def _expert(checkpoint: Checkpoint, piece: _Piece, expert: int) -> Float32:
    """The matrix of one expert, [out, in]."""
    experts, high, wide = piece.shape
    if len(piece.stored) == 1:
        start, stop = expert * high * wide, (expert + 1) * high * wide
        values = checkpoint.read_flat(piece.stored[0], start, stop)
        matrix = np.ascontiguousarray(values.reshape(wide, high).T) if piece.transposed else values.reshape(high, wide)
    else:
        halves = len(piece.stored) // experts
        names = piece.stored[expert * halves : (expert + 1) * halves]
        matrix = np.concatenate([checkpoint.read(name) for name in names])
    if not np.isfinite(matrix).all():
        raise CheckpointError(
            f"{checkpoint.ref}: expert {expert} of {piece.name!r} holds values that are NaN or infinite; the model is "
            "damaged or diverged in training"
        )
    return matrix


def _blocks(checkpoint: Checkpoint, name: str) -> Iterator[Float32]:
    info = checkpoint.tensors[name]
    for at in range(0, info.size, _BLOCK):
        values = checkpoint.read_flat(name, at, min(at + _BLOCK, info.size))
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{info.file}: tensor {name!r} {info.shape} of {checkpoint.ref} holds values that are NaN or infinite; "
                "the model is damaged or diverged in training"
            )
        yield values


def _square(x: Float32) -> float:
    return float(np.sum(np.square(x, dtype=np.float64)))


def _row(piece: _Piece, change: _Change) -> dict[str, Any]:
    missing = change.missing / change.square if change.square else 0.0
    updates = [change.factors] if change.factors is not None else change.experts
    return {
        "tensor": piece.name,
        "captured": piece.place,
        "rank": updates[0].rank if updates else None,
        "of": piece.side if updates else None,
        "energy": max(1 - missing, 0.0),
        "error": math.sqrt(missing),
        "error_of_weight": math.sqrt(change.missing / change.weight) if change.weight else 0.0,
        "why": piece.why,
        "_square": change.square,
        "_missing": change.missing,
    }


def _without_squares(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.startswith("_") and (k != "why" or v)}


def _total_error(rows: Sequence[Mapping[str, Any]]) -> float:
    total = math.fsum(row["_square"] for row in rows)
    return math.sqrt(math.fsum(row["_missing"] for row in rows) / total) if total else 0.0


def _task_type(config: Mapping[str, Any]) -> str | None:
    names = " ".join(config.get("architectures") or [])
    if re.search(r"ForCausalLM|LMHeadModel", names):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if config.get("is_encoder_decoder") else None


def _most_rank(piece: _Piece, config: ExtractConfig) -> int:
    return config.keep.most(piece.side)


def _most_bytes(piece: _Piece, config: ExtractConfig, base: Checkpoint, tuned: Checkpoint) -> int:
    """What a tensor may take in the adapter."""
    width = ITEM_BYTES[_dtype(config, base, tuned)]
    if piece.place in _LOW_RANK:
        experts = piece.shape[0] if piece.place == "experts" else 1
        return _most_rank(piece, config) * experts * sum(piece.shape[-2:]) * width
    return 0 if piece.place == "left out" else math.prod(piece.shape) * width


def _work_bytes(piece: _Piece) -> int:
    return 4 * (_WORK * math.prod(piece.shape) if piece.place in _LOW_RANK else 4 * _BLOCK)
