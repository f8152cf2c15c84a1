"""`compat: mergekit`: the bytes that mergekit writes, for someone who needs just those.

solera computes in float32 and its reductions in float64; mergekit rounds every step to the recipe's `dtype`, and takes
its norms in it. Here mergekit's own method (mergekit is a library of ours) is run on whole tensors in that dtype, and
its result is cast to `out_dtype` as mergekit casts it. Everything around it is ours: plan, checks, finite inputs and
outputs, journal, digests, provenance.

What cannot be the same, and is refused: methods that draw random numbers (mergekit seeds torch once, so that a mask
depends on the order in which its scheduler happens to run the tensors, and on torch's number of threads), a
`tokenizer_source` (mergekit then rebuilds the embeddings), and adapters (mergekit has peft write a merged model first).
What mergekit itself does not repeat: torch splits sums over many elements by its number of threads (OMP_NUM_THREADS),
so what follows from a norm or a dot product can change with it (slerp, nuslerp, multislerp, karcher, model_stock, sce).
The bytes are those of a mergekit with the same number. Tables of integers are copied as in every merge.

torch and mergekit are imported by the functions that need them.
"""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from solera_core.checkpoint import Checkpoint
from solera_core.context import Context
from solera_core.dtypes import ITEM_BYTES, SAFETENSORS_NAME, nonfinite, to_float32
from solera_core.errors import CheckpointError, ConfigError
from solera_core.strict import did_you_mean
from solera_core.writer import CheckpointWriter
from solera_merge.block import BLOCK_ELEMENTS
from solera_merge.config import MergeConfig
from solera_merge.drift import relative
from solera_merge.methods.catalogue import METHODS
from solera_merge.methods.signature import Parameter
from solera_merge.models import Models
from solera_merge.plan import COPY, SourceTensor, TensorPlan
from solera_merge.problems import Problems, some
from solera_merge.streams import refuse

__all__ = ["as_mergekit", "merge_whole", "mergekit_versions", "whole_bytes"]

_DRAW = ("dare_linear", "dare_ties", "della", "della_linear")
_SAMPLED = 1_000_000  # elements from which on arcee_fusion takes its quartiles from a random sample
_RETURN_FLOAT32: Final = ("arcee_fusion", "ramplus_tl")  # whatever the dtype of the inputs

# Peak of the memory that mergekit 0.1.5 takes besides the inputs, in bytes an element: a * models * item size + b.
# Measured with 2 and 5 models in float32 and bfloat16; never below the measured peak.
_WORKSPACE: Final[Mapping[str, tuple[int, int]]] = {
    "arcee_fusion": (0, 24),
    "breadcrumbs": (2, 32),
    "breadcrumbs_ties": (2, 32),
    "karcher": (1, 16),
    "linear": (0, 8),
    "model_stock": (1, 24),
    "multislerp": (4, 12),
    "nearswap": (0, 24),
    "nuslerp": (4, 8),
    "passthrough": (0, 4),
    "sce": (2, 40),
    "slerp": (0, 16),
    "task_arithmetic": (1, 12),
    "ties": (2, 32),
}
_OTHER_WORKSPACE = (7, 44)  # ram and ramplus_tl, the most hungry ones


def as_mergekit(
    config: MergeConfig, tensors: Sequence[TensorPlan], models: Models, ctx: Context, problems: Problems
) -> list[TensorPlan]:
    """The plans of the tensors with the number format in which mergekit computes each, and the one it writes.

    What mergekit could not do, or not with the same bytes twice, is added to `problems`.

    Raises:
        ConfigError: `compat` is no name that is known, or a device is asked for, or mergekit has no such method.
    """
    if ctx.compat != "mergekit":
        raise ConfigError(f"compat: {ctx.compat!r} is not known{did_you_mean(str(ctx.compat), ['mergekit'])}")
    if ctx.device != "cpu":
        raise ConfigError(f"compat: mergekit's bytes are those of its CPU run; leave out the device {ctx.device!r}")
    from mergekit.merge_methods import registered_methods

    if config.towers is not None or len(config.methods) > 1:
        raise ConfigError("compat: mergekit has neither towers nor several methods in one merge; leave compat out")
    theirs = {method.spec.name: method.spec for method in registered_methods()}
    name = config.methods[0].name
    if name not in theirs:
        raise ConfigError(
            f"merge_method: mergekit {mergekit_versions()['mergekit']} has no {name!r}, so there are no bytes of its "
            "to reproduce; leave compat out"
        )
    if config.wanted_tokenizer is not None:
        problems.config(
            "tokenizer_source: mergekit rebuilds the embeddings where one is given, which compat does not reproduce; "
            "leave one of the two out"
        )
    merged = [tensor for tensor in tensors if tensor.method != COPY]
    known = {parameter.name for parameter in theirs[name].parameters}
    for parameter in METHODS[name].parameters.values():
        if parameter.name not in known and any(_is_given(parameter, tensor) for tensor in merged):
            problems.config(f"parameters.{parameter.name}: mergekit's {name} has no such parameter; leave compat out")
    _refuse_random(merged, problems)
    _refuse_overlaid(merged, models, problems)
    return [tensor if tensor.method == COPY else _planned(tensor, config, models) for tensor in tensors]


def mergekit_versions() -> dict[str, str]:
    """What decides about mergekit's bytes: its version and torch's."""
    return {package: importlib.metadata.version(package) for package in ("mergekit", "torch")}


def whole_bytes(tensor: TensorPlan) -> int:
    """Memory that mergekit's method takes for a tensor: the inputs as read and as converted, and its workspace."""
    assert tensor.mergekit is not None
    width = ITEM_BYTES[tensor.mergekit]
    factor, constant = _WORKSPACE.get(tensor.method, _OTHER_WORKSPACE)
    inputs = len(tensor.sources) * (width + 4)
    return tensor.spec.size * (inputs + factor * len(tensor.models) * width + constant)


def merge_whole(
    tensor: TensorPlan,
    checkpoints: Sequence[Checkpoint],
    writer: CheckpointWriter,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Merge one tensor with mergekit's own method, completely.

    Args:
        tensor: its plan, with `mergekit`.
        checkpoints: the models, in the order of the plan.
        writer: gets the result.
        advance: told the bytes of input that are done.

    Raises:
        CheckpointError: an input or the result is not finite; or mergekit cannot merge these tensors.
    """
    import torch
    from mergekit.merge_methods import get, merge_tensors

    assert tensor.mergekit is not None
    advance(0)
    sources = [_load(source, checkpoints, tensor.mergekit) for source in tensor.sources]
    known = {parameter.name for parameter in get(tensor.method).spec.parameters}
    parameters = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in tensor.parameters.items()
        if name in known
    }
    try:
        with torch.no_grad():
            merged = merge_tensors(
                sources,
                tensor.method,
                parameters=parameters,
                base_index=None if tensor.base is None else len(tensor.models),
                name=tensor.name,
            )
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as e:
        raise CheckpointError(
            f"{tensor.name!r} {tensor.shape}: mergekit's {tensor.method} stops here: {e}; without compat solera "
            "merges it by its own formula"
        ) from e
    del sources
    returned = "F32" if tensor.method in _RETURN_FLOAT32 else tensor.mergekit
    if merged.dtype != _torch_dtype(returned):
        raise CheckpointError(
            f"{tensor.name!r} {tensor.shape}: mergekit {mergekit_versions()['mergekit']} returned {merged.dtype}, and "
            f"{_torch_dtype(returned)} was planned; leave compat out"
        )
    raw = merged.to(_torch_dtype(tensor.dtype)).contiguous().reshape(-1).view(torch.uint8).numpy()
    del merged
    writer.annotate(tensor.name, _drift(tensor, checkpoints, raw))
    writer.write_raw(tensor.name, 0, raw)
    advance(sum(checkpoints[s.model].tensors[s.name].nbytes for s in tensor.sources))


def _planned(tensor: TensorPlan, config: MergeConfig, models: Models) -> TensorPlan:
    if config.dtype is not None:
        compute = SAFETENSORS_NAME[config.dtype]
    else:  # torch's promotion of float16 and bfloat16 is float32, as that of either with float32
        stored = {models.checkpoints[s.model].tensors[s.name].dtype for s in tensor.sources}
        compute = stored.pop() if len(stored) == 1 else "F32"
    returned = "F32" if tensor.method in _RETURN_FLOAT32 else compute
    written = returned if config.out_dtype is None else SAFETENSORS_NAME[config.out_dtype]
    return replace(tensor, mergekit=compute, dtype=written)


def _is_given(parameter: Parameter, tensor: TensorPlan) -> bool:
    value = tensor.parameters[parameter.name]
    return any(v != parameter.default for v in (value if isinstance(value, tuple) else (value,)))


def _refuse_random(tensors: Sequence[TensorPlan], problems: Problems) -> None:
    if any(t.method in _DRAW and min(t.parameters["density"]) < 1 for t in tensors):
        problems.config(
            f"merge_method: {tensors[0].method} draws random masks, and mergekit's depend on the order in which its "
            "scheduler runs the tensors; compat cannot reproduce them: leave it out (the masks of solera have the same "
            "distribution, and depend on the seed alone)"
        )
    large = [t.name for t in tensors if t.method == "arcee_fusion" and t.spec.size > _SAMPLED]
    if large:
        problems.config(
            f"merge_method: mergekit's arcee_fusion takes the quartiles of tensors of more than {_SAMPLED} elements "
            f"({some(large)}) from a random sample, which compat cannot reproduce: leave it out (solera takes the "
            "exact ones)"
        )


def _refuse_overlaid(tensors: Sequence[TensorPlan], models: Models, problems: Problems) -> None:
    used = dict.fromkeys(source for tensor in tensors for source in tensor.sources)
    overlaid = dict.fromkeys(s.model for s in used if models.checkpoints[s.model].is_derived(s.name))
    for model in overlaid:
        problems.checkpoint(
            f"{models.ref(model)}: mergekit has peft merge an adapter and merges what peft wrote, and does not "
            "dequantise, which compat does not reproduce; save the model with its adapter merged in "
            "(merge_and_unload), or unquantised (solera merge, merge_method: passthrough), and name that directory"
        )


def _load(source: SourceTensor, checkpoints: Sequence[Checkpoint], compute: str) -> Any:
    """A whole tensor as mergekit loads it: torch, shaped, in the format in which it will be computed with."""
    import torch

    checkpoint = checkpoints[source.model]
    info = checkpoint.tensors[source.name]
    raw = checkpoint.read_raw(source.name)
    if nonfinite(raw, info.dtype):
        refuse(to_float32(raw, info.dtype), checkpoint, info, 0)
    tensor = torch.from_numpy(raw).view(_torch_dtype(info.dtype)).reshape(info.shape)
    return tensor.to(_torch_dtype(compute))


def _drift(tensor: TensorPlan, checkpoints: Sequence[Checkpoint], raw: np.ndarray[Any, Any]) -> float:
    """How far the result is from the base, else from the first model; that one is read again, block by block."""
    from solera_merge.kernels.drift import add_drift_of_block

    source = tensor.models[0] if tensor.base is None else tensor.base
    width, sums = ITEM_BYTES[tensor.dtype], np.zeros(2)
    for start in range(0, tensor.spec.size, BLOCK_ELEMENTS):
        stop = min(start + BLOCK_ELEMENTS, tensor.spec.size)
        merged = to_float32(raw[start * width : stop * width], tensor.dtype)
        add_drift_of_block(merged, checkpoints[source.model].read_flat(source.name, start, stop), sums)
    return relative(sums)


def _torch_dtype(dtype: str) -> Any:
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[dtype]
