"""Adapters in, an adapter out: merged in the space of their updates, without any base model.

A weighted sum is made of the factors alone. Any other method works on the products of the factors, one module at a time
(or, with `space: knots`, on their parts in common singular vectors), and the result is cut to a rank. What the cut
loses is computed, not estimated, and reported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from solera_core.architecture import layer_of
from solera_core.context import Context
from solera_core.dtypes import FLOATS, ITEM_BYTES, SAFETENSORS_NAME
from solera_core.errors import CheckpointError, ConfigError, InputError
from solera_core.hub import resolve
from solera_core.lora import CONFIG_FILE, PREFIX, WEIGHTS_FILE, LoraModule, StoredAdapter, is_adapter, open_stored
from solera_core.plan import Plan
from solera_core.provenance import InputRecord, adapter_record, write_provenance
from solera_core.staging import check_apart, check_target, require_disk, staged
from solera_merge.adapters.knots import align
from solera_merge.adapters.low_rank import Factors, Keep, decompose, recombine, residual, residual_of_sum
from solera_merge.adapters.products import Arrays, Products, merged
from solera_merge.adapters.settings import COMBINATIONS
from solera_merge.adapters.writing import AdapterOutput, target_names
from solera_merge.config import MergeConfig
from solera_merge.masks import key
from solera_merge.models import Models
from solera_merge.problems import Problems, some
from solera_merge.resolve import resolve as resolve_parameters
from solera_merge.runs import Run, Source
from solera_merge.targets import Target

__all__ = ["Record", "merge_adapters", "plan_merge_adapters"]

Float32: TypeAlias = npt.NDArray[np.float32]

Record: TypeAlias = Callable[[Mapping[str, Any], list[InputRecord]], tuple[Mapping[str, Any], list[InputRecord]]]

_BLOCK: Final = 1 << 20
_WAY_OUT: Final = "merge the models instead (models: [{model: base+adapter}, ...], without `adapter:`)"
_WORST: Final = 3  # modules named when the merge ends; solera.json has all


@dataclass(frozen=True)
class _Module:
    """One module of the output.

    Attributes:
        name: of the module.
        shape: of its update, as B @ A has it (of an embedding: vocabulary, width).
        sources: its part in every adapter; None: the adapter does not change it.
        parameters: of the method.
    """

    name: str
    shape: tuple[int, int]
    sources: tuple[LoraModule | None, ...]
    parameters: dict[str, Any]

    @property
    def embedding(self) -> bool:
        return any(source is not None and source.embedding for source in self.sources)


@dataclass(frozen=True)
class _Plan:
    adapters: tuple[StoredAdapter, ...]
    modules: tuple[_Module, ...]
    full: Mapping[str, str]  # tensors held in full: name in the adapters -> "copied" or "averaged"
    dtype: str
    warnings: tuple[str, ...]


def plan_merge_adapters(config: MergeConfig, ctx: Context) -> Plan:
    """What `merge_adapters` would do, from settings and headers alone."""
    plan = _make_plan(config, ctx)
    names = [adapter.ref for adapter in plan.adapters]
    rows: list[dict[str, Any]] = [
        {
            "module": module.name,
            "shape": list(module.shape),
            "ranks in": ", ".join("-" if source is None else str(source.a.shape[0]) for source in module.sources),
            "rank out": _rank_out(module, config),
            **{
                name: ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value
                for name, value in module.parameters.items()
            },
        }
        for module in plan.modules
    ]
    rows += [{"module": name, "shape": "in full", "ranks in": how} for name, how in plan.full.items()]
    nbytes = _most_bytes(plan, config)
    assert config.adapter is not None
    return Plan(
        stage="merge",
        reads=[
            {"what": ref, "path": str(adapter.directory), "bytes": adapter.nbytes}
            for ref, adapter in zip(names, plan.adapters, strict=True)
        ],
        writes=[{"what": WEIGHTS_FILE, "bytes": nbytes}, {"what": CONFIG_FILE, "bytes": None}],
        memory_bytes=max(_work_bytes(module, config) for module in plan.modules),
        disk_bytes=2 * nbytes,
        parameters={
            "merge_method": config.merge_method,
            **config.adapter.model_dump(mode="json"),
            "dtype": plan.dtype,
            "seed": ctx.seed,
        },
        rows=rows,
        warnings=list(plan.warnings),
    )


def merge_adapters(config: MergeConfig, out: Path, ctx: Context, *, record: Record | None = None) -> Path:
    """Merge LoRA adapters into a new one at `out`; the same recipe, inputs and seed give the same bytes.

    The error of every module (of what is stored, against what the method made) is in solera.json. `record`: see
    `solera_merge.run.merge`.

    Raises:
        InputError: as `plan_merge_adapters`; or the target is in the way; or a value is not finite.
        ResourceError: no room on the disk.
    """
    check_target(out, overwrite=ctx.overwrite)
    plan = _make_plan(config, ctx)
    check_apart(out, [adapter.directory for adapter in plan.adapters])
    for warning in plan.warnings:
        ctx.progress.note(warning)
    require_disk(out, 2 * _most_bytes(plan, config))
    errors: dict[str, float] = {}
    squares = [0.0, 0.0]
    with staged(out, overwrite=ctx.overwrite, flush=ctx.flush) as staging:
        with AdapterOutput(staging, plan.dtype) as output:
            with _one_blas_thread(), ctx.progress.task("merging", len(plan.modules), "modules") as task:
                for module in plan.modules:
                    factors, missing, whole = _merge_module(module, plan, config, ctx.seed)
                    output.add(module.name, factors, embedding=module.embedding)
                    errors[module.name] = math.sqrt(missing / whole) if whole else 0.0
                    squares[0] += missing
                    squares[1] += whole
                    task.advance(1, module.name)
            _put_full(plan, config, output)
            digests = output.finish(_settings(plan, output))
        error = math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
        worst = sorted(errors, key=lambda name: -errors[name])[:_WORST]
        listed = ", ".join(f"{name} {errors[name]:.3g}" for name in worst)
        ctx.progress.note(f"relative error of the stored updates: {error:.3g} (largest: {listed})")
        recipe: Mapping[str, Any] = config.model_dump(mode="json", exclude_none=True)
        inputs = [adapter_record(adapter) for adapter in plan.adapters]
        if record is not None:
            recipe, inputs = record(recipe, inputs)
        write_provenance(
            staging,
            kind="merge",
            recipe=recipe,
            seed=ctx.seed,
            inputs=inputs,
            tensors=digests,
            checks={"error": error, "errors": errors},
        )
    return out


def _one_blas_thread() -> Any:
    """The last bits of a product depend on the number of threads."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


def _make_plan(config: MergeConfig, ctx: Context) -> _Plan:
    problems = Problems()
    assert config.models is not None
    if ctx.compat is not None:
        problems.config(
            "mergekit merges no adapters into an adapter, so there are no bytes of its to reproduce (compat)"
        )
    adapters: list[StoredAdapter] = []
    for model in config.models:
        try:
            path = resolve(model.model, ctx, weights="later").path
            if not is_adapter(path):
                raise CheckpointError(
                    f"{path}: is no LoRA adapter (it has no {CONFIG_FILE} or is a model), and `adapter:` in the recipe "
                    "says that all models are; without it models are merged into a model"
                )
            adapters.append(open_stored(model.model, ctx))
        except InputError as e:
            problems.add(e)
    problems.raise_any()
    for adapter in adapters:
        _refuse(adapter, problems)
    names = list(dict.fromkeys(module.name for adapter in adapters for module in adapter.modules))
    rows = {
        name: tuple(next((m for m in a.modules if m.name == name), None) for a in adapters) for name in sorted(names)
    }
    shapes = {name: shape for name, row in rows.items() if (shape := _shape(name, row, adapters, problems)) is not None}
    full = _full(config, adapters, problems)
    problems.raise_any()
    parameters = _parameters(config, list(rows), adapters)
    modules = tuple(
        _Module(name, shapes[name], row, values) for (name, row), values in zip(rows.items(), parameters, strict=True)
    )
    return _Plan(tuple(adapters), modules, full, _dtype(config, adapters), tuple(_warnings(adapters, rows)))


def _refuse(adapter: StoredAdapter, problems: Problems) -> None:
    """What has no meaning without the base, or is no matrix."""
    for setting, why in (
        ("use_dora", "DoRA rescales by the norms of base and update together, so it needs the base"),
        ("lora_bias", "biases of B are not merged yet"),
        ("target_parameters", "LoRA of fused experts is not merged yet"),
    ):
        if adapter.settings.get(setting):
            problems.checkpoint(f"{adapter.directory / CONFIG_FILE}: `{setting}`: {why}; {_WAY_OUT}")
    for info in adapter.source.tensors.values():
        if info.dtype not in FLOATS:
            problems.checkpoint(f"{info.file}: tensor {info.name!r} is stored as {info.dtype}: not a float")
    for module in adapter.modules:
        place = module.name
        if not adapter.settings.get("target_parameters") and adapter.rank(place) != module.a.shape[0]:
            problems.checkpoint(
                f"{adapter.directory / CONFIG_FILE}: gives rank {adapter.rank(place)} for {place}, but its factors "
                f"have rank {module.a.shape[0]}"
            )


def _shape(
    name: str, row: Sequence[LoraModule | None], adapters: Sequence[StoredAdapter], problems: Problems
) -> tuple[int, int] | None:
    """Of the update of a module, which must be the same in all adapters that have it."""
    found: dict[tuple[tuple[int, int], bool], str] = {}
    for module, adapter in zip(row, adapters, strict=True):
        if module is not None:
            high, wide = module.b.shape[0], module.a.shape[1]
            shape = (wide, high) if module.embedding else (high, wide)
            found.setdefault((shape, module.embedding), adapter.ref)
    if len(found) > 1:
        (first, _), (other, _) = list(found)[:2]
        refs = list(found.values())
        problems.checkpoint(
            f"module {name!r}: the update is {first} in {refs[0]} and {other} in {refs[1]}: the adapters are for "
            "different base models"
        )
        return None
    return next(iter(found))[0]


def _full(config: MergeConfig, adapters: Sequence[StoredAdapter], problems: Problems) -> dict[str, str]:
    """What becomes of tensors that are held in full: copied where equal, averaged by `linear`, else refused."""
    found: dict[str, str] = {}
    for name in sorted({name for adapter in adapters for name in adapter.full}):
        infos = [adapter.full.get(name) for adapter in adapters]
        present = [info for info in infos if info is not None]
        everywhere = len(present) == len(adapters) and len({info.shape for info in present}) == 1
        if everywhere and _equal(name, adapters):
            found[name] = "copied"
        elif everywhere and config.merge_method == "linear":
            found[name] = "averaged"
        else:
            who = some([adapter.ref for adapter in adapters if name in adapter.full])
            why = (
                "differs, and only `linear` can merge it without the base"
                if everywhere
                else "not in all adapters in one shape, and what the others leave as it is only the base knows"
            )
            problems.checkpoint(
                f"tensor {name!r} is held in full by {who} (modules_to_save, or a bias), but {why}; {_WAY_OUT}"
            )
    return found


def _equal(name: str, adapters: Sequence[StoredAdapter]) -> bool:
    first = adapters[0].full[name]
    for start in range(0, first.size, _BLOCK):
        stop = min(start + _BLOCK, first.size)
        blocks = [adapter.read(adapter.full[name], start, stop) for adapter in adapters]
        if not all(np.array_equal(block, blocks[0]) for block in blocks[1:]):
            return False
    return True


class _Refs:
    """The adapters' names, as `solera_merge.models.Models` gives those of models."""

    def __init__(self, adapters: Sequence[StoredAdapter]) -> None:
        self._refs = [adapter.ref for adapter in adapters]

    def ref(self, model: int) -> str:
        return self._refs[model]


def _parameters(config: MergeConfig, names: Sequence[str], adapters: Sequence[StoredAdapter]) -> list[dict[str, Any]]:
    """Of every module, as in a merge of models: gradients run over the layers, filters see `module.weight`."""
    assert config.models is not None
    layers = [found[1] for name in names if (found := layer_of(f"{name}.weight")) is not None]
    last = max(layers, default=0)
    sources = tuple(Source(i, 0, model.parameters, f"models.{i}") for i, model in enumerate(config.models))
    run = Run(sources, None, last + 1, config.method, ())

    def target(name: str) -> Target:
        found = layer_of(f"{name}.weight")
        t = 0.0 if found is None else found[1] / last if last else 1.0
        return Target(f"{name}.weight", run, (f"{name}.weight",) * len(adapters), t)

    resolved = resolve_parameters(config, [target(name) for name in names], cast("Models", _Refs(adapters)))
    if any(values.get("scope") == "model" for values in resolved):
        raise ConfigError(
            "parameters.scope: `model` would need the products of all modules at once; with `adapter:` use `tensor`"
        )
    return resolved


def _dtype(config: MergeConfig, adapters: Sequence[StoredAdapter]) -> str:
    wanted = config.out_dtype or config.dtype
    if wanted is not None:
        return SAFETENSORS_NAME[wanted]
    found = {info.dtype for adapter in adapters for info in adapter.source.tensors.values()}
    return next(iter(found)) if len(found) == 1 and found != {"F64"} else "F32"


def _warnings(adapters: Sequence[StoredAdapter], rows: Mapping[str, Sequence[LoraModule | None]]) -> list[str]:
    warnings: list[str] = []
    bases = {adapter.base_model: adapter.ref for adapter in adapters if adapter.base_model is not None}
    if len(bases) > 1:
        listed = ", ".join(f"{ref}: {base}" for base, ref in bases.items())
        warnings.append(f"the adapters say that they were trained on different models ({listed})")
    for i, adapter in enumerate(adapters):
        absent = [name for name, row in rows.items() if row[i] is None]
        if absent:
            warnings.append(f"{adapter.ref}: does not change {some(absent)}; its update there counts as zero")
    return warnings


def _ranks_added(module: _Module) -> int:
    return sum(source.a.shape[0] for source in module.sources if source is not None)


def _rank_out(module: _Module, config: MergeConfig) -> int | str:
    assert config.adapter is not None
    keep = config.adapter.keep
    if keep is None:
        return _ranks_added(module)
    return keep.most(min(module.shape)) if keep.energy is None else f"at most {keep.most(min(module.shape))}"


def _most_bytes(plan: _Plan, config: MergeConfig) -> int:
    assert config.adapter is not None
    keep = config.adapter.keep
    width = ITEM_BYTES[plan.dtype]
    nbytes = sum(plan.adapters[0].full[name].size * width for name in plan.full)
    for module in plan.modules:
        rank = _ranks_added(module) if keep is None else keep.most(min(module.shape))
        nbytes += rank * sum(module.shape) * width
    return nbytes


def _work_bytes(module: _Module, config: MergeConfig) -> int:
    """Factors in float64, twice; and for a method on products the merged one, with what its decomposition holds."""
    assert config.adapter is not None
    rank = _ranks_added(module)
    dense = config.adapter.space == "product" and config.merge_method not in COMBINATIONS
    return 16 * rank * sum(module.shape) + (24 * module.shape[0] * module.shape[1] if dense else 0)


def _update(module: LoraModule | None, adapter: StoredAdapter) -> Factors | None:
    """Scaling * B @ A of one adapter, finite."""
    if module is None:
        return None
    a, b = adapter.matrix(module.a), adapter.matrix(module.b)
    for info, values in ((module.a, a), (module.b, b)):
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} holds values that are NaN or infinite; the adapter is damaged or "
                "diverged in training"
            )
    left, right = (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if module.embedding else (b, a)
    return Factors(left * np.float32(adapter.scaling(module.name)), right)


def _merge_module(module: _Module, plan: _Plan, config: MergeConfig, seed: int) -> tuple[Factors, float, float]:
    """The factors as they will be stored, and the squared norms of what they miss and of the merged update."""
    assert config.adapter is not None
    keep = config.adapter.keep
    name = f"{module.name}.weight"
    updates = [_update(m, adapter) for m, adapter in zip(module.sources, plan.adapters, strict=True)]
    keys = tuple(key(seed, name, adapter.ref) for adapter in plan.adapters)
    method = config.method
    if config.adapter.space == "knots":
        aligned = align(updates, module.shape[1])
        part = merged(method, Arrays(name, aligned.parts, keys), module.parameters)
        lefts, rights = [aligned.left], [part]
    elif config.merge_method in COMBINATIONS:
        weights = _coefficients(config, module, keys)
        terms = [(u, c) for u, c in zip(updates, weights, strict=True) if u is not None and c != 0]
        lefts = [update.left * c for update, c in terms] or [np.zeros((module.shape[0], 1), np.float32)]
        rights = [update.right for update, _ in terms] or [np.zeros((1, module.shape[1]), np.float32)]
    else:
        assert keep is not None, "the recipe is refused without"
        matrix = merged(method, Products(name, module.shape, updates, keys), module.parameters)
        factors = _sized(decompose(matrix, keep, key(seed, name, "svd")), keep, module).stored(plan.dtype)
        whole = float(np.sum(np.square(matrix, dtype=np.float64)))
        return factors, residual(matrix, factors), whole
    if keep is None:
        factors = Factors(np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0))
    else:
        factors = _sized(recombine(lefts, rights, keep), keep, module)
    factors = factors.stored(plan.dtype)
    missing, whole = residual_of_sum(lefts, rights, factors)
    return factors, missing, whole


def _sized(factors: Factors, keep: Keep, module: _Module) -> Factors:
    """With zeros up to the wanted rank, so that all modules have the same; at least rank 1, which peft asks for."""
    return factors.padded(min(keep.rank, *module.shape) if keep.rank is not None else 1)


def _coefficients(config: MergeConfig, module: _Module, keys: tuple[int, ...]) -> list[np.float32]:
    """The weights that a combination gives the updates: what it makes of the unit vectors."""
    units = list(np.eye(len(keys), dtype=np.float32)[:, None, :])
    return list(merged(config.method, Arrays(f"{module.name}.weight", units, keys), module.parameters).reshape(-1))


def _put_full(plan: _Plan, config: MergeConfig, output: AdapterOutput) -> None:
    for name, how in plan.full.items():
        first = plan.adapters[0].full[name]
        place = first.name.removeprefix(PREFIX)
        tensors = [(adapter, adapter.full[name]) for adapter in plan.adapters]

        def blocks(tensors: Sequence[tuple[StoredAdapter, Any]] = tensors, name: str = name, how: str = how) -> Any:
            for at in range(0, tensors[0][1].size, _BLOCK):
                parts = [adapter.read(info, at, min(at + _BLOCK, info.size)) for adapter, info in tensors]
                if how == "copied":
                    yield parts[0]
                    continue
                values = _parameters(config, [name.removesuffix(".weight")], plan.adapters)[0]
                keys = (0,) * len(parts)
                yield merged(config.method, Arrays(name, [part[None] for part in parts], keys), values).reshape(-1)

        output.put_blocks(place, first.shape, blocks())


def _settings(plan: _Plan, output: AdapterOutput) -> dict[str, Any]:
    """Of the output: what all adapters agree on, or else what is safe."""
    settings = [adapter.settings for adapter in plan.adapters]

    def common(name: str) -> Any:
        values = [s.get(name) for s in settings]
        return values[0] if all(value == values[0] for value in values) else None

    saved = sorted({name for s in settings for name in s.get("modules_to_save") or ()}) if plan.full else None
    return {
        "base_model_name_or_path": next((a.base_model for a in plan.adapters if a.base_model is not None), None),
        "bias": next((s["bias"] for s in settings if s.get("bias", "none") != "none"), "none") if plan.full else "none",
        "ensure_weight_tying": any(s.get("ensure_weight_tying") for s in settings),
        "fan_in_fan_out": any(s.get("fan_in_fan_out") for s in settings),
        "modules_to_save": saved or None,
        "target_modules": _targets(settings, output),
        "task_type": common("task_type"),
    }


def _targets(settings: Sequence[Mapping[str, Any]], output: AdapterOutput) -> list[str]:
    """As the adapters chose them where all did so alike, by name alone; else every module in full."""
    first = settings[0].get("target_modules")
    alike = all(
        isinstance(names := s.get("target_modules"), list)
        and isinstance(first, list)
        and set(names) == set(first)
        and not s.get("layers_to_transform")
        and not s.get("exclude_modules")
        for s in settings
    )
    if alike and isinstance(first, list):
        return sorted(first)
    return target_names(output.ranks, list(output.ranks))
