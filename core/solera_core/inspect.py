"""What a checkpoint is, from config and headers alone: family, size, active parameters, formats, origin."""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from solera_core.architecture import (
    experts_per_token,
    is_embedding,
    is_head,
    layer_of,
    num_experts,
    num_layers,
    text_config,
    ties_embeddings,
    vocab_size,
)
from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.digest import file_sha256
from solera_core.errors import CheckpointError
from solera_core.hub import resolve, split_adapter
from solera_core.licence import read_licence
from solera_core.lora import StoredAdapter, is_adapter, open_stored
from solera_core.provenance import FILE_NAME, read_provenance

__all__ = ["ParameterCount", "describe", "describe_adapter", "describe_reference", "parameter_count"]

_ROUTED: Final = re.compile(r"\.experts\.")
_FUSED: Final = re.compile(r"\.block_sparse_moe\.(input_linear|output_linear)\.weight$")  # GraniteMoe: experts first


@dataclass(frozen=True)
class ParameterCount:
    """How large a model is.

    Attributes:
        total: parameters stored; tied embeddings count once.
        active: parameters that one token passes through: of the routed experts only as many as it visits. The input
            embedding counts in full, as published counts have it.
        embedding: of the total, those of input embedding and output head.
        bytes: stored size.
    """

    total: int
    active: int
    embedding: int
    bytes: int


def parameter_count(checkpoint: Checkpoint) -> ParameterCount:
    """Count parameters from the headers.

    Raises:
        CheckpointError: there are routed experts, but the config does not say how many a token visits, or visits more
            than there are.
    """
    config = checkpoint.config
    total = routed = embedding = 0
    for name, info in checkpoint.tensors.items():
        total += info.size
        if _ROUTED.search(name) or _FUSED.search(name):
            routed += info.size
        elif is_embedding(name) or is_head(name):
            embedding += info.size
    active = total
    if routed:
        experts, visited = num_experts(config), experts_per_token(config)
        if experts is None or visited is None or not 0 < visited <= experts:
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: the weights hold routed experts, but the config does not say "
                f"how many there are (num_experts: {experts}) "
                f"or how many a token visits (num_experts_per_tok: {visited})"
            )
        active = total - routed + routed * visited // experts
    return ParameterCount(total, active, embedding, sum(info.nbytes for info in checkpoint.tensors.values()))


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """A JSON-serialisable description of a checkpoint.

    Example:
        >>> describe(open_checkpoint("org/name", Context()))["parameters"]["total"]
    """
    config = checkpoint.config
    inner = text_config(config)
    licence = read_licence(checkpoint.ref, checkpoint.path)
    stacks = Counter(found[0] for found in set(map(layer_of, checkpoint.tensors)) if found)
    return {
        "ref": checkpoint.ref,
        "revision": checkpoint.revision,
        "family": config.get("model_type"),
        "architectures": config.get("architectures") or [],
        "layers": num_layers(config) or max(stacks.values(), default=0),
        "hidden_size": inner.get("hidden_size"),
        "experts": num_experts(config),
        "experts_per_token": experts_per_token(config),
        "vocab_size": vocab_size(config),
        "context": inner.get("max_position_embeddings"),
        "tied_embeddings": not any(is_head(n) for n in checkpoint.tensors)
        if (t := ties_embeddings(config)) is None
        else t,
        "quantization": (config.get("quantization_config") or {}).get("quant_method"),
        "tensors": len(checkpoint.tensors),
        "files": len({info.file for info in checkpoint.tensors.values()}),
        "dtypes": dict(sorted(Counter(info.dtype for info in checkpoint.tensors.values()).items())),
        "parameters": asdict(parameter_count(checkpoint)),
        "tokenizer": _tokenizer(checkpoint),
        "licence": None if licence.id is None else licence.label,
        "provenance": _provenance(checkpoint.path),
    }


def describe_reference(ref: str, ctx: Context) -> dict[str, Any]:
    """What `ref` is: a checkpoint, whose weights stay on the hub, or a LoRA adapter.

    Raises:
        CheckpointError: not found, or neither of the two.
    """
    if split_adapter(ref, ctx) is None and is_adapter(resolve(ref, ctx, weights="later").path):
        return describe_adapter(open_stored(ref, ctx))
    return describe(open_checkpoint(ref, ctx, weights="later"))


def describe_adapter(adapter: StoredAdapter) -> dict[str, Any]:
    """A JSON-serialisable description of a LoRA adapter."""
    settings, tensors = adapter.settings, adapter.source.tensors.values()
    kinds = [kind for kind, key in (("DoRA", "use_dora"), ("rank-stabilised", "use_rslora")) if settings.get(key)]
    return {
        "ref": adapter.ref,
        "revision": adapter.revision,
        "family": " ".join(["LoRA adapter", *(f"({kind})" for kind in kinds)]),
        "base_model": adapter.base_model,
        "task": settings.get("task_type"),
        "modules": len(adapter.modules),
        "targets": dict(sorted(Counter(module.name.rpartition(".")[2] for module in adapter.modules).items())),
        "ranks": {str(r): n for r, n in sorted(Counter(module.a.shape[0] for module in adapter.modules).items())},
        "alpha": settings["lora_alpha"],
        "saved_in_full": sorted(adapter.full),
        "tensors": len(tensors),
        "dtypes": dict(sorted(Counter(info.dtype for info in tensors).items())),
        "parameters": {"total": sum(info.size for info in tensors), "bytes": adapter.nbytes},
        "licence": read_licence(adapter.ref, adapter.directory).label,
        "provenance": _provenance(adapter.directory),
    }


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    files = {file.name: file for file in checkpoint.sidecars}
    identity = next(
        (files[n] for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json") if n in files), None
    )
    if identity is None:
        return None
    settings = _json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    templates = "chat_template.jinja" in files or "chat_template.json" in files or bool(settings.get("chat_template"))
    return {
        "class": settings.get("tokenizer_class"),
        "file": identity.name,
        "sha256": file_sha256(identity),
        "chat_template": templates,
    }


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file}: cannot be read as JSON: {e}") from e
    return content if isinstance(content, dict) else {}


def _provenance(directory: Path) -> dict[str, Any] | None:
    if not (directory / FILE_NAME).exists():
        return None
    record = read_provenance(directory)
    inputs = [{k: i.get(k) for k in ("name", "ref", "revision")} for i in record["inputs"]]
    return {"kind": record["kind"], "seed": record.get("seed"), "solera": record.get("solera"), "inputs": inputs}
