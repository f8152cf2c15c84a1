"""Every quantisation that can be undone, and a checkpoint seen without it."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, TypeAlias

from solera_core.architecture import text_config
from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import FLOATS, SAFETENSORS_NAME
from solera_core.errors import CheckpointError
from solera_core.headers import TensorInfo
from solera_core.quantised.awq import awq
from solera_core.quantised.bitsandbytes import bitsandbytes
from solera_core.quantised.compressed_tensors import compressed_tensors
from solera_core.quantised.fp8 import F8, fp8
from solera_core.quantised.gptq import gptq
from solera_core.quantised.modelopt import modelopt
from solera_core.quantised.mxfp4 import mxfp4
from solera_core.quantised.parts import Scheme, Stored, Weight
from solera_core.views import Derived, view

__all__ = ["FORMATS", "dequantised"]

Format: TypeAlias = Callable[[Stored, Mapping[str, Any]], Scheme]

FORMATS: Final[Mapping[str, Format]] = {
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "fbgemm_fp8": fp8,
    "fp8": fp8,
    "gptq": gptq,
    "modelopt": modelopt,
    "mxfp4": mxfp4,
    "mxfp8": fp8,
}
"""By `quant_method` of config.json."""

_KEYS: Final = ("quantization_config", "compression_config")  # the second as llm-compressor first called it
_SHOWN: Final = 8
_WHOLE_NUMBERS: Final = ("I64", "BOOL")  # tables and masks that models really have
_CODES: Final = re.compile(
    r"(^|\.)(qweight|qzeros|SCB|absmax|quant_map|quant_state\.\w+|weight_packed|weight_scale|\w+_scale_inv|"
    r"\w+_proj_(blocks|scales))$"
)
_COMPANION: Final = re.compile(
    rf"{_CODES.pattern}|(^|\.)(scales|g_idx|weight_format|nested_absmax|nested_quant_map|weight_shape|weight_g_idx|"
    r"weight_zero_point|weight_global_scale|weight_scale_2)$"
)


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself; a quantised one as a view of the weights that its codes stand for.

    Their dtype is the config's, else bfloat16; the values are float32 and not rounded to it. The view's config has no
    quantisation. 8-bit floats without any quantisation in the config, and without scales, are the numbers themselves.

    Raises:
        CheckpointError: a quantisation that cannot be undone, by name; or one line for every tensor that lacks its
            scales, has some of a wrong shape, or is not accounted for.
    """
    config = checkpoint.config
    settings = _settings(checkpoint, config)
    stored = Stored(checkpoint)
    if settings is not None:
        scheme = FORMATS[settings["quant_method"]](stored, settings)
        if not scheme.weights and not stored.problems:
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: says that the weights are quantised ({scheme.label}), but no "
                "tensor is; delete `quantization_config` if they are not"
            )
    elif any(info.dtype in F8 or _CODES.search(name) for name, info in checkpoint.tensors.items()):
        scheme = _casts(stored)
    else:
        return checkpoint
    used = {part for weight in scheme.weights for part in weight.parts} | set(scheme.dropped)
    _check_the_rest(stored, used, quantised=settings is not None)
    if stored.problems:
        more = len(stored.problems) - _SHOWN
        lines = [*stored.problems[:_SHOWN], *([f"... and {more} more such tensors"] if more > 0 else [])]
        raise CheckpointError("\n".join(f"{line} (quantised: {scheme.label})" for line in lines))
    dtype = _dtype(config)
    codes = {weight.parts[0]: weight for weight in scheme.weights}
    seen: dict[str, str | Derived] = {}
    for name in checkpoint.tensors:
        if (weight := codes.get(name)) is not None:
            seen[weight.name] = Derived(_info(checkpoint, weight, dtype), weight.read, weight.scratch)
        elif name not in used:
            seen[name] = name
    return view(
        checkpoint,
        seen,
        what={"dequantised": scheme.label, "dtype": dtype},
        config=_without_quantisation(config),
        notes=(_note(scheme),),
    )


def _settings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the config says about a quantisation, its `quant_method` one of `FORMATS`; None where there is none."""
    for key in _KEYS:
        found = config.get(key) or text_config(config).get(key)
        if not found:
            continue
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        if method is None and key == "compression_config":
            method = "compressed-tensors"
        if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
            method = "bitsandbytes"  # as it was written before there were others
        if method not in FORMATS or not isinstance(found, Mapping):
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: `{key}` says that the weights are quantised ({method}), which "
                f"cannot be undone here (only {', '.join(FORMATS)}); use the original checkpoint, or dequantise it "
                "with the library that made it"
            )
        return {**found, "quant_method": method}
    return None


def _casts(stored: Stored) -> Scheme:
    """8-bit floats that are the numbers themselves."""

    def weight(name: str, info: TensorInfo) -> Weight:
        return Weight(name, info.shape, (name,), lambda start, stop: stored.values(name, start, stop))

    weights = [weight(name, info) for name, info in stored.tensors.items() if info.dtype in F8]
    return Scheme("8-bit floats without scales", weights)


def _check_the_rest(stored: Stored, used: Collection[str], *, quantised: bool) -> None:
    """Nothing is left that a weight needed, and no codes that nobody read."""
    for name, info in stored.tensors.items():
        if name in used or name in stored.seen:
            continue
        if (_COMPANION if quantised else _CODES).search(name):
            why = "belongs to no quantised weight" if quantised else "belongs to a quantised weight"
            stored.problem(name, why + ("" if quantised else ", but config.json has no `quantization_config`"))
        elif info.dtype not in (*FLOATS, *_WHOLE_NUMBERS):
            stored.problem(name, "is no floating-point number, and no part of a quantised weight that is known here")


def _note(scheme: Scheme) -> str:
    n = len(scheme.dropped)
    dropped = f"; {n} scales of activations are left out" if n else ""
    return f"stored as {scheme.label}: dequantised, and written unquantised{dropped}"


def _info(checkpoint: Checkpoint, weight: Weight, dtype: str) -> TensorInfo:
    """Its length is that of all its parts: what is read for it."""
    size = sum(checkpoint.tensors[part].nbytes for part in weight.parts)
    return TensorInfo(weight.name, dtype, weight.shape, checkpoint.tensors[weight.parts[0]].file, 0, size)


def _dtype(config: Mapping[str, Any]) -> str:
    """The format that the config states, in safetensors' spelling; bfloat16 where it states none to compute in."""
    for level in (text_config(config), config):
        for key in ("dtype", "torch_dtype"):
            if (name := SAFETENSORS_NAME.get(str(level.get(key)))) is not None:
                return name
    return "BF16"


def _without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    without = {key: value for key, value in config.items() if key not in _KEYS}
    for key, value in without.items():
        if value is text_config(config):
            without[key] = {k: v for k, v in value.items() if k not in _KEYS}
    return without
