"""The plan of a merge: every output tensor with its sources, method and resolved parameters, from headers alone.

    recipe -> models (opened, compared) -> parts, runs -> targets -> parameters -> plan

Nothing here reads a weight. The plan is pure data: it can be printed, hashed, and executed later or elsewhere.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from solera_core.architecture import fused_experts, has_tokens_beyond_vocabulary, is_embedding, is_head, vocab_size
from solera_core.context import Context
from solera_core.digest import json_digest
from solera_core.dtypes import FLOATS, ITEM_BYTES, SAFETENSORS_NAME
from solera_core.errors import CheckpointError, ResourceError
from solera_core.licence import concerns, read_licence
from solera_core.plan import Plan
from solera_core.ranges import stamp
from solera_core.threads import cores
from solera_core.version import __version__
from solera_core.writer import TensorSpec, layout
from solera_merge.block import BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS, block_starts
from solera_merge.config import MergeConfig
from solera_merge.config_json import output_config
from solera_merge.masks import key
from solera_merge.memory import default_memory_bytes
from solera_merge.methods.catalogue import METHODS
from solera_merge.models import Models, compare, family_of, open_models, with_tokenizer
from solera_merge.problems import Problems
from solera_merge.resolve import check_filters, long_gradients, resolve
from solera_merge.runs import parts_of
from solera_merge.targets import Target, find_targets
from solera_merge.tokenizer.align import Alignment, align_vocabularies
from solera_merge.tokenizer.files import OutputFiles, files_of, with_vocabulary
from solera_merge.tokenizer.models import donor_of, has_tokenizer

__all__ = [
    "COPY",
    "MergePlan",
    "SourceTensor",
    "TensorPlan",
    "budget_bytes",
    "describe",
    "make_plan",
    "plan_key",
    "require_memory",
    "tensor_bytes",
    "worker_threads",
]

COPY = "copy"
"""What happens to tensors that are no floating-point numbers: equal in all sources, and copied."""

_NO_CONFIG = "the models are files of weights: the output has weights and no config.json"
_TEMPORARIES = 8  # float32 blocks that a formula and the cast hold besides the sources
_SELECTION_BYTES = 4 << 20  # histograms and the elements of one bin, a model
_SVD_BYTES = 10  # an element: float64, and a share of LAPACK's workspace (measured: 1.5 N + 13.5 matrices of float64)
_TORCH_NAME = {name: torch for torch, name in SAFETENSORS_NAME.items()}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of one of the models."""

    model: int
    name: str


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: in the output.
        dtype: safetensors' name.
        shape: of the output and of every source.
        method: name in the catalogue, or `COPY`.
        base: the base's tensor where the method has a base.
        models: the other sources, in the order of the recipe.
        parameters: by name in a recipe; a tuple has one value a model.
        keys: a random key a model.
        experts: how many tensors this is, along its first axis: fused experts are merged one by one.
        mergekit: the number format in which mergekit's own method computes it (`solera_merge.compat`); None: the method
            of the catalogue does, in float32.
        scratch: memory that reading all its sources takes besides what is read (dequantising): (bytes an element of a
            block, bytes in any case).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    method: str
    base: SourceTensor | None
    models: tuple[SourceTensor, ...]
    parameters: Mapping[str, Any]
    keys: tuple[int, ...]
    experts: int = 1
    mergekit: str | None = None
    scratch: tuple[int, int] = (0, 0)

    @property
    def spec(self) -> TensorSpec:
        """As the writer wants it."""
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def pieces(self) -> "list[TensorPlan]":
        """The tensor itself, or the experts' one by one, each with keys of its own."""
        if self.experts == 1:
            return [self]
        return [
            replace(self, shape=self.shape[1:], keys=tuple((k + i) % 2**128 for k in self.keys), experts=1)
            for i in range(self.experts)
        ]

    @property
    def sources(self) -> tuple[SourceTensor, ...]:
        """The models, then the base."""
        return self.models if self.base is None else (*self.models, self.base)


@dataclass(frozen=True)
class MergePlan:
    """All of the output.

    Attributes:
        tensors: in the order of the output files.
        config: content of config.json; empty where the models are files of weights.
        sidecars: tokenizer and other files to be copied.
        files: content of those that are written anew, by name.
        warnings: what a careful person would want to know first.
    """

    tensors: tuple[TensorPlan, ...]
    config: Mapping[str, Any]
    sidecars: tuple[Path, ...]
    files: Mapping[str, bytes]
    warnings: tuple[str, ...]

    @property
    def specs(self) -> list[TensorSpec]:
        """What will be written."""
        return [tensor.spec for tensor in self.tensors]

    @property
    def disk_bytes(self) -> int:
        """Size of everything that will be written, provenance excepted."""
        beside = sum(f.stat().st_size for f in self.sidecars if f.exists()) + sum(map(len, self.files.values()))
        return sum(s.nbytes for s in layout(self.specs)) + beside


def make_plan(config: MergeConfig, ctx: Context) -> tuple[MergePlan, Models]:
    """Plan a merge from configs and headers, and check everything that they can tell.

    Every check runs that can; what they find is raised together, one line each.

    Raises:
        ConfigError: the recipe asks for something impossible or meaningless.
        CheckpointError: a model is missing, damaged or cannot be dequantised, or the models do not belong together.
    """
    if ctx.device != "cpu":
        from solera_merge.torch_twins import open_device

        open_device(ctx.device)  # says what is there if it is not
    problems, warnings = Problems(), list[str]()
    models = open_models(config, ctx, problems)
    warnings += [f"{c.ref}: {note}" for c in models.checkpoints for note in c.notes]
    whole, all_here = all(part.models is not None for part in config.parts.values()), not problems.found
    with problems.collected():
        warnings += compare(models, whole=whole, tokenizers=config.wanted_tokenizer is None)
    models = with_tokenizer(models, config, ctx, problems)
    plain = config.models is not None  # else names of tensors in the output are not those in the models
    names = {name for c in models.checkpoints for name in c.tensors} if plain else set[str]()
    wholes = [c for c, fills in zip(models.checkpoints, models.fills, strict=True) if fills is None]
    if not all_here or len({family_of(c.config) for c in wholes}) > 1:
        check_filters(config, names, problems)
        problems.raise_any()  # all that could be said besides would follow from this
    donor = None if models.raw else donor_of(config, models, problems)
    alignment, beside = Alignment(models, models.owner if donor is None else donor), OutputFiles((), {}, ())
    known = len(problems.found)
    parts = parts_of(config, models, problems)
    sound = len(problems.found) == known
    if not sound:
        check_filters(config, names, problems)
    if not sound and not plain:
        problems.raise_any()
    aligned = config.wanted_tokenizer is None
    if donor is not None:
        with problems.collected():
            if sound:
                alignment, aligned = align_vocabularies(config, models, parts, donor), True
        with problems.collected():
            beside = files_of(alignment, config)
    models = alignment.models
    warnings += [*alignment.warnings, *beside.warnings]
    targets, notes = find_targets(parts, models, problems, config.tensors)
    warnings += notes
    _check_shapes(targets, models, problems, vocabularies=aligned)
    resolved: list[dict[str, Any]] = []
    with problems.collected():
        resolved = resolve(config, targets, models) if sound else []
    warnings += long_gradients(config, targets)
    problems.raise_any()
    tensors = _tensor_plans(config, targets, resolved, models, ctx.seed, problems)
    if ctx.compat is not None:
        from solera_merge.compat import as_mergekit

        tensors = as_mergekit(config, tensors, models, ctx, problems)
    problems.raise_any()
    dtype = _main_dtype(tensors)
    content, notes = ({}, [_NO_CONFIG]) if models.raw else output_config(models, parts, dtype=_TORCH_NAME[dtype])
    warnings += notes
    warnings += with_vocabulary(content, alignment)
    _check_vocabulary(tensors, content, models)
    if not models.raw and not has_tokenizer(owner := models.at(alignment.donor)):
        warnings.append(f"{owner.path}: has no tokenizer, and no other model here has one: the output will have none")
    warnings += concerns([read_licence(c.ref, d) for c in models.checkpoints for d in c.directories])
    if config.parameters.get("int8_mask"):
        warnings.append("parameters.int8_mask: has no effect (no mask is stored)")
    unique = tuple(dict.fromkeys(warnings))
    return MergePlan(tuple(tensors), content, beside.copied, beside.written, unique), models


def plan_key(plan: MergePlan, models: Models) -> str:
    """What a killed run and this one must have in common for this one to go on: plan, inputs, version."""
    inputs = [checkpoint.fingerprint() for checkpoint in models.checkpoints]
    sidecars = [[str(file), *astuple(stamp(file))] for file in plan.sidecars]  # else copies of others would be left
    files = {name: blake3(content).hexdigest() for name, content in plan.files.items()}
    key = [__version__, repr(plan.tensors), dict(plan.config), sidecars, files, inputs]
    if any(tensor.mergekit is not None for tensor in plan.tensors):
        from solera_merge.compat import mergekit_versions

        key.append(mergekit_versions())
    return json_digest(key)


def describe(plan: MergePlan, config: MergeConfig, models: Models, ctx: Context) -> Plan:
    """The plan as every stage shows it (`--dry-run`)."""
    used = Counter[int]()
    for tensor in plan.tensors:
        for source in tensor.sources:
            used[source.model] += models.checkpoints[source.model].tensors[source.name].nbytes
    licences = [[read_licence(c.ref, directory).label for directory in c.directories] for c in models.checkpoints]
    reads = [
        {
            "what": c.ref,
            "licence": " + ".join(licences[i]),
            "path": str(c.path),
            "revision": c.revision,
            "bytes": used[i],
            "download_bytes": c.missing_bytes,
            "tensors": len(c.tensors),
            **({"read as": "; ".join(c.notes)} if c.notes else {}),
        }
        for i, c in enumerate(models.checkpoints)
    ]
    if (tokenizer := models.tokenizer) is not None:
        files = [file for file in tokenizer.sidecars if file.exists()]
        reads.append(
            {
                "what": tokenizer.ref,
                "licence": read_licence(tokenizer.ref, tokenizer.path).label,
                "path": str(tokenizer.path),
                "revision": tokenizer.revision,
                "bytes": sum(file.stat().st_size for file in files),
                "download_bytes": 0,
                "tensors": 0,
                "read as": "its tokenizer only",
            }
        )
    writes: list[Mapping[str, Any]] = [{"what": s.file, "bytes": s.nbytes} for s in layout(plan.specs)]
    writes += [{"what": f.name, "bytes": f.stat().st_size} for f in plan.sidecars]
    writes += [{"what": name, "bytes": len(content)} for name, content in plan.files.items()]
    parameters = list(dict.fromkeys(name for method in config.methods for name in method.parameters))
    return Plan(
        stage="merge",
        reads=reads,
        writes=writes,
        memory_bytes=peak_bytes(plan.tensors, ctx),
        disk_bytes=plan.disk_bytes,
        parameters={
            **config.model_dump(mode="json", exclude_none=True),
            "dtype": plan.config.get("dtype") or plan.config.get("torch_dtype"),
            "seed": ctx.seed,
            "threads": worker_threads(ctx),
            "memory": budget_bytes(ctx),
            **({} if ctx.compat is None else {"compat": ctx.compat}),
            **({} if ctx.device == "cpu" else {"device": ctx.device}),
        },
        rows=[_row(tensor, models, parameters) for tensor in plan.tensors],
        warnings=plan.warnings,
    )


def tensor_bytes(tensor: TensorPlan, *, device: str = "cpu") -> int:
    """Memory that merging one tensor takes: blocks of its sources, stored and in float32, and temporaries.

    On a device (`Context.device`) that is host memory: two buffers, and results on their way to the disk.
    """
    if tensor.mergekit is not None:
        from solera_merge.compat import whole_bytes

        return whole_bytes(tensor)
    shape = tensor.pieces[0].shape
    unit = "elements" if tensor.method == COPY else METHODS[tensor.method].unit_of(tensor.name, shape)
    starts = block_starts(shape, unit, _block_elements(tensor.method, device))
    block = starts[1] - starts[0] if len(starts) > 1 else 0
    item_bytes = _SVD_BYTES if unit == "matrices" else 4
    held = 0 if tensor.method == COPY else METHODS[tensor.method].held(shape, tensor.parameters)
    blocks = (len(tensor.sources) * 2 + _TEMPORARIES) * block * item_bytes
    each, once = tensor.scratch
    return blocks + len(tensor.models) * _SELECTION_BYTES + held + each * block + once


def _block_elements(method: str, device: str) -> int:
    if device == "cpu":
        return BLOCK_ELEMENTS
    from solera_merge.torch_twins import TWINS

    return DEVICE_BLOCK_ELEMENTS if method in TWINS else BLOCK_ELEMENTS


def peak_bytes(tensors: Sequence[TensorPlan], ctx: Context) -> int:
    """Memory of the whole merge: the most hungry tensors side by side, one a thread, within the bound."""
    needs = sorted((tensor_bytes(tensor, device=ctx.device) for tensor in tensors), reverse=True)
    return min(sum(needs[: worker_threads(ctx)]), max(budget_bytes(ctx), needs[0] if needs else 0))


def budget_bytes(ctx: Context) -> int:
    """The bound of the anonymous memory of a merge."""
    return ctx.memory_bytes if ctx.memory_bytes is not None else default_memory_bytes()


def require_memory(tensors: Sequence[TensorPlan], ctx: Context) -> None:
    """Raise ResourceError when one tensor alone needs more than the bound."""
    bound = budget_bytes(ctx)
    for tensor in tensors:
        if (need := tensor_bytes(tensor, device=ctx.device)) > bound:
            raise ResourceError(
                f"{tensor.name!r} {tensor.shape}: {tensor.method} needs {need / 1e6:.0f} MB for it, and the bound is "
                f"{bound / 1e6:.0f} MB; raise it with --memory if the machine has more"
            )


def worker_threads(ctx: Context) -> int:
    """Threads that merge tensors: as the caller says, else one a core that this process may use."""
    return ctx.threads if ctx.threads is not None else cores()


def _row(tensor: TensorPlan, models: Models, parameters: Sequence[str]) -> dict[str, Any]:
    def shown(source: SourceTensor) -> str:
        return models.ref(source.model) + ("" if source.name == tensor.name else f":{source.name}")

    def value(name: str) -> Any:
        found = tensor.parameters.get(name, "")
        return ", ".join(f"{v:g}" for v in found) if isinstance(found, tuple) else found

    return {
        "tensor": tensor.name,
        "dtype": tensor.dtype,
        "shape": "x".join(map(str, tensor.shape)),
        "method": tensor.method,
        "base": shown(tensor.base) if tensor.base else "",
        "models": ", ".join(shown(source) for source in tensor.models),
        **{name: value(name) for name in parameters},
    }


def _check_shapes(targets: Sequence[Target], models: Models, problems: Problems, *, vocabularies: bool) -> None:
    """One line for every two models and kind of difference; those of the `vocabularies` may be known already."""
    found: dict[tuple[int, int], list[str]] = {}
    for target in targets:
        infos = [
            (source.model, models.checkpoints[source.model].tensors[name])
            for source, name in zip(target.run.sources, target.inputs, strict=True)
        ]
        first_model, first = infos[0]
        for model, info in infos[1:]:
            if info.shape == first.shape:
                continue
            both = f"{first.file}: {first.name!r} is {first.shape}, {info.file}: {info.name!r} is {info.shape}"
            rows = is_embedding(first.name) or is_head(first.name)
            if rows and first.shape[1:] == info.shape[1:]:
                if vocabularies:
                    problems.checkpoint(
                        f"{both}: the vocabularies of {models.ref(first_model)!r} and {models.ref(model)!r} have "
                        "different sizes; `tokenizer_source: union` (or `base`, or one of the models) gives them one "
                        "vocabulary"
                    )
            else:
                found.setdefault((first_model, model), []).append(both)
    for lines in found.values():
        more = f" (and those of {len(lines) - 1} more tensors)" if len(lines) > 1 else ""
        problems.checkpoint(f"{lines[0]}: shapes differ{more}; merge models of one architecture and size")


def _check_vocabulary(tensors: Sequence[TensorPlan], content: Mapping[str, Any], models: Models) -> None:
    """Slices may take embedding, head and config.json from three models."""
    rows = vocab_size(content)
    more = has_tokens_beyond_vocabulary(content)
    for tensor in tensors:
        if (is_embedding(tensor.name) or is_head(tensor.name)) and tensor.shape and rows not in (None, tensor.shape[0]):
            if more and is_embedding(tensor.name) and rows is not None and tensor.shape[0] > rows:
                continue
            file = models.checkpoints[models.owner].path / "config.json"
            raise CheckpointError(
                f"{file}: vocab_size is {rows}, but {tensor.name!r} of "
                f"{models.ref(tensor.models[0].model)!r} is {tensor.shape}; `tokenizer_source: union` (or `base`, or "
                "one of the models) gives the models one vocabulary"
            )


def _tensor_plans(
    config: MergeConfig,
    targets: Sequence[Target],
    resolved: Sequence[Mapping[str, Any]],
    models: Models,
    seed: int,
    problems: Problems,
) -> list[TensorPlan]:
    wanted = config.out_dtype or config.dtype
    content = models.checkpoints[models.owner].config
    plans: list[TensorPlan] = []
    for target, parameters in zip(targets, resolved, strict=True):
        sources = [SourceTensor(s.model, n) for s, n in zip(target.run.sources, target.inputs, strict=True)]
        infos = [models.checkpoints[s.model].tensors[s.name] for s in sources]
        stored = sorted({info.dtype for info in infos})
        shape = infos[0].shape
        if not any(dtype in FLOATS for dtype in stored):
            if len(stored) > 1 or stored[0].startswith("F"):
                files = f"{infos[0].file}: {infos[0].name!r} is stored as {' and '.join(stored)}"
                problems.checkpoint(f"{files}, which cannot be merged; dequantise the model first")
            plans.append(TensorPlan(target.name, stored[0], shape, COPY, None, tuple(sources), {}, ()))
            continue
        if odd := [info for info in infos if info.dtype not in FLOATS]:
            problems.checkpoint(
                f"{odd[0].file}: {odd[0].name!r} is stored as {odd[0].dtype}, but in another model as floating-point "
                "numbers; dequantise the model first"
            )
        if "F64" in stored and wanted is None:
            problems.config(
                f"dtype: {infos[0].name!r} is stored as F64, and merges are computed in float32; "
                "set `dtype: float32` to accept that"
            )
        dtype = SAFETENSORS_NAME[wanted] if wanted else stored[0] if len(stored) == 1 else "F32"
        base = next((s for s in sources if s.model == target.run.base), None)
        others = tuple(s for s in sources if s is not base)
        method = target.run.method.name
        keys = tuple(key(seed, target.name, models.ref(s.model)) for s in others)
        experts = fused_experts(target.name, shape, content)
        each, once = zip(*(models.checkpoints[s.model].scratch(s.name) for s in sources), strict=True)
        scratch = sum(each), sum(once)
        plans.append(
            TensorPlan(target.name, dtype, shape, method, base, others, parameters, keys, experts, scratch=scratch)
        )
    return plans


def _main_dtype(tensors: Sequence[TensorPlan]) -> str:
    """The floating-point format of most bytes of the output: what config.json states."""
    total = Counter[str]()
    for tensor in tensors:
        if tensor.dtype in FLOATS:
            total[tensor.dtype] += tensor.spec.size * ITEM_BYTES[tensor.dtype]
    return total.most_common(1)[0][0] if total else "F32"
