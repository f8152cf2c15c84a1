"""Weights in a file of their own, without a config: a state dict, as safetensors or torch saves it.

Nothing is known about such a model but its tensors, so nothing is done with it that a config would have to allow.
"""

from pathlib import Path
from typing import Final

from solera_core.checkpoint import Checkpoint, open_checkpoint, read_config
from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_core.hub import When, resolve, split_adapter
from solera_core.quantised.catalogue import dequantised
from solera_core.shards import Weights
from solera_core.sidecars import find_sidecars, tokenizer_files
from solera_core.sources import SafetensorsSource, Source, open_source

__all__ = ["is_weight_file", "open_tokenizer", "open_values", "open_weight_file"]

_PICKLED: Final = (".bin", ".ckpt", ".pt", ".pth")


def is_weight_file(ref: str, ctx: Context) -> bool:
    """Whether a model reference is a file (relative to `ctx.base_dir`), not a directory, a stage or a hub id."""
    try:
        return ref not in ctx.models and (ctx.base_dir / Path(ref).expanduser()).is_file()
    except OSError:  # no name of a file
        return False


def open_values(ref: str, ctx: Context, *, weights: When = "now") -> Checkpoint:
    """A model or a file of weights as the numbers that it stands for, quantised or not.

    Raises:
        CheckpointError, HubError: as `open_checkpoint` and `open_weight_file`.
    """
    if is_weight_file(ref, ctx):
        return open_weight_file(ref, ctx)
    return open_checkpoint(ref, ctx, weights=weights, dequantise=True)


def open_tokenizer(ref: str, ctx: Context) -> Checkpoint:
    """The tokenizer of any model, or of a directory that is none: its small files, and no tensors.

    Raises:
        CheckpointError, HubError: nothing there, or no tokenizer in it.
    """
    if split_adapter(ref, ctx) is not None:
        found = open_checkpoint(ref, ctx, weights="later")
        directory, revision, config, sidecars = found.path, found.revision, found.config, list(found.sidecars)
    else:
        located = resolve(ref, ctx, weights="later")
        directory, revision = located.path, located.revision
        sidecars = find_sidecars(directory, code=ctx.trust_remote_code)
        has_config = (directory / "config.json").exists()
        config = read_config(directory, trust_remote_code=ctx.trust_remote_code) if has_config else {}
    if not tokenizer_files(file.name for file in sidecars):
        raise CheckpointError(f"{directory}: has no tokenizer")
    none = SafetensorsSource({})
    return Checkpoint(
        ref=ref, path=directory, revision=revision, config=config, tensors={}, source=none, sidecars=sidecars
    )


def open_weight_file(ref: str, ctx: Context) -> Checkpoint:
    """Open a file of weights for reading; its config is empty, and its `path` is the file.

    Raises:
        CheckpointError: neither safetensors nor a pickle; pickled without permission; damaged; no tensors in it;
            weights that are quantised, which only a config could tell how to read.
    """
    file = ctx.base_dir / Path(ref).expanduser()
    source = _source(file, ctx)
    if not source.tensors:
        raise CheckpointError(f"{file}: holds no tensors")
    return dequantised(
        Checkpoint(ref=ref, path=file, revision=None, config={}, tensors=source.tensors, source=source, sidecars=[])
    )


def _source(file: Path, ctx: Context) -> Source:
    suffix = file.suffix.lower()
    if suffix == ".safetensors":
        return open_source(Weights((file,), None, None, pickled=False))
    if suffix == ".gguf":
        raise CheckpointError(
            f"{file}: GGUF weights are quantised in llama.cpp's own ways and layout, and cannot be merged; merge the "
            "checkpoints that they were made from, and convert the result"
        )
    if suffix not in _PICKLED:
        raise CheckpointError(
            f"{file}: is a file; a model is a directory, a hub id such as org/name, or a file of weights "
            f"(.safetensors, {', '.join(_PICKLED)})"
        )
    if not ctx.allow_pickle:
        raise CheckpointError(
            f"{file}: the weights are pickled, and a pickle can run code when opened; convert them to safetensors, or "
            "pass --allow-pickle to read them with torch's restricted loader"
        )
    from solera_core.pickled import PickledSource  # imports torch

    return PickledSource(Weights((file,), None, None, pickled=True), bare=True)
