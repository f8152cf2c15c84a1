"""The last steps that every stage shares when it writes a checkpoint: metadata, checks, provenance."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from solera_core.architecture import (
    has_tokens_beyond_vocabulary,
    is_embedding,
    is_head,
    num_layers,
    text_config,
    ties_embeddings,
    ties_with_a_stored_head,
    vocab_size,
)
from solera_core.checkpoint import read_config
from solera_core.errors import VerificationError
from solera_core.headers import TensorInfo
from solera_core.provenance import (
    InputRecord,
    data_record,
    input_record,
    tokenizer_record,
    verify,
    write_provenance,
)
from solera_core.reload_check import require_exact
from solera_core.shards import find_weights, read_headers
from solera_core.sidecars import copy_sidecars
from solera_core.towers import count_keys, layer_count, tower_config, towers_of

__all__ = [
    "InputRecord",
    "check_output",
    "check_weights",
    "data_record",
    "input_record",
    "tokenizer_record",
    "verify",
    "write_metadata",
    "write_provenance",
]


def write_metadata(
    directory: Path, *, config: Mapping[str, Any], sidecars: Iterable[Path], files: Mapping[str, bytes] | None = None
) -> None:
    """Write config.json (sorted keys, as transformers does) and `files`; copy the sidecar files byte for byte."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    copy_sidecars(sidecars, directory)
    for name, content in (files or {}).items():
        (directory / name).write_bytes(content)


def check_output(directory: Path, *, reload: bool = True, trust_remote_code: bool = False) -> dict[str, Any]:
    """Read back what was written and prove that it is a whole model.

    Headers are read and checked again; the config is compared with the tensors (layers, layer types, vocabulary,
    tied embeddings); with `reload`, transformers loads the model on the meta device (no weights are read) and must
    report no missing, unexpected or mismatched tensor.

    Returns:
        What was checked, for solera.json.

    Raises:
        VerificationError: naming config key and tensor.
        CheckpointError: a file is damaged.
    """
    config = read_config(directory, trust_remote_code=trust_remote_code)
    tensors = read_headers(find_weights(directory, allow_pickle=False))
    checks: dict[str, Any] = {
        **_sizes(tensors),
        "layers": _check_layers(directory, config, tensors),
        "vocab_size": _check_vocabulary(directory, config, tensors),
        "tied": _check_tie(directory, config, tensors),
    }
    if reload:
        from solera_core.causal_lm import load_report

        report = load_report(directory, trust_remote_code=trust_remote_code)
        require_exact(directory, report)
        checks["transformers"] = dict(sorted(report.items()))
    return checks


def check_weights(directory: Path) -> dict[str, Any]:
    """As `check_output`, of weights without a config: their headers are read and checked again."""
    return _sizes(read_headers(find_weights(directory, allow_pickle=False)))


def _sizes(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return {
        "tensors": len(tensors),
        "parameters": sum(t.size for t in tensors.values()),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "finite": True,  # the writers refuse anything else
    }


def _check_layers(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> int | None:
    expected = num_layers(config)
    # Models with multi-token prediction store those blocks behind the counted layers.
    extra = text_config(config).get("num_nextn_predict_layers") or 0
    for tower in towers_of(tensors):
        stated = layer_count(config, tower)
        numbers = {stack: _numbers(stack, tower.tensors) for stack in tower.stacks}
        if stated is None or any(_numbered(found, stated, extra) for found in numbers.values()):
            continue
        for stack, found in numbers.items():
            counted, present = count_keys(tower_config(config, tower), tower)[0], set(range(stated))
            wrong = sorted((present - found) or (found - present))
            raise VerificationError(
                f"{directory}: config.json says {counted} {stated}, but the weights hold {len(found)} "
                f"layers under {stack} (0 to {max(found)}); "
                f"{'absent' if present - found else 'too many'}: {wrong[:8]}"
            )
    if expected is None:
        return None
    for key, value in text_config(config).items():
        if key in ("layer_types", "mlp_layer_types") and isinstance(value, list) and len(value) != expected:
            raise VerificationError(
                f"{directory}: config.json says num_hidden_layers {expected}, but {key} has {len(value)} entries"
            )
    return expected


def _numbers(stack: str, names: Iterable[str]) -> set[int]:
    return {int(name[len(stack) + 1 :].split(".")[0]) for name in names if name.startswith(f"{stack}.")}


def _numbered(found: set[int], stated: int, extra: int) -> bool:
    return set(range(stated)) <= found <= set(range(stated + extra))


def _check_vocabulary(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> int | None:
    expected = vocab_size(config)
    more = has_tokens_beyond_vocabulary(config)
    for name, info in tensors.items():
        if not (is_embedding(name) or is_head(name)) or expected is None or not info.shape:
            continue
        if info.shape[0] != expected and not (more and is_embedding(name) and info.shape[0] > expected):
            raise VerificationError(
                f"{directory}: config.json says vocab_size {expected}, but tensor {name!r} has shape {info.shape}"
            )
    return expected


def _check_tie(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> bool | None:
    flag = ties_embeddings(config)
    heads = [name for name in tensors if is_head(name)]
    if heads and ties_with_a_stored_head(config):
        raise VerificationError(
            f"{directory}: config.json ties the embeddings (tie_word_embeddings, or its default for "
            f"{config.get('model_type')!r}), yet {heads[0]!r} is stored; "
            "loading would ignore it: write tie_word_embeddings false, or leave the head out"
        )
    causal = any(
        re.search(r"ForCausalLM|LMHeadModel|ForConditionalGeneration", a) for a in config.get("architectures") or []
    )
    if flag is False and causal and not heads and any(is_embedding(name) for name in tensors):
        raise VerificationError(
            f"{directory}: config.json says tie_word_embeddings false, yet no output head (lm_head.weight) is stored"
        )
    return not heads if flag is None else flag
