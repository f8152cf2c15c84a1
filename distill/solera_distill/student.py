"""A student made of some of the layers of a deeper model: which to keep, and the checkpoint that results.

Files in, files out: the kept tensors are copied byte for byte under their canonical names, so that every family that
can be read can be shortened. Only the choice of layers runs the model.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from solera_core.architecture import layer_of, num_layers, text_config
from solera_core.checkpoint import Checkpoint
from solera_core.errors import CheckpointError, ConfigError
from solera_core.fold import write_folded
from solera_distill.config import LayerDrop

__all__ = ["choose_layers", "layers_to_keep", "renumbered", "shortened_config", "write_layers"]

_INDEX_SETS: Final = ("mlp_only_layers", "no_rope_layer_indices", "global_attention_layers", "global_attn_layers")
"""Lists of layer numbers: renumbered."""

_COUNTS: Final = ("first_k_dense_replace", "max_window_layers")
"""`the first k layers are different`: becomes the number of those that are kept."""

_PERIODS: Final = (
    "sliding_window_pattern",
    "full_attention_interval",
    "no_rope_layer_interval",
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "moe_layer_freq",
    "expert_layer_period",
    "attn_layer_period",
    "cross_attention_interval",
    "global_attn_every_n_layers",
)
"""`every n-th layer is different`: only n = 1, or a config that also lists its layers, survives renumbering."""

_LISTS_OF_OTHER_THINGS: Final = re.compile(
    r"architectures|eos_token_id|bos_token_id|pad_token_id|suppress_tokens|keys_to_ignore|id2label|label"
)


def layers_to_keep(drop: LayerDrop, layers: int, where: str) -> int | list[int]:
    """How many layers the student keeps, or exactly which.

    Raises:
        ConfigError: more than there are.
    """
    if drop.keep is not None:
        if drop.keep[-1] >= layers:
            raise ConfigError(f"layer_drop.keep: layer {drop.keep[-1]} of {where}, which has layers 0 to {layers - 1}")
        return drop.keep
    wanted = drop.layers if drop.layers is not None else max(2, int(layers * (drop.ratio or 0.0) + 0.5))
    if wanted > layers:
        raise ConfigError(f"layer_drop.layers: {wanted} of {where}, which has only {layers} layers")
    return wanted


def choose_layers(
    layers: int, wanted: int, loss_without: Callable[[frozenset[int]], float]
) -> tuple[list[int], list[float]]:
    """Greedy choice: at each round the inner layer goes whose absence gives the lowest loss; ties go to the deeper one.

    Choosing one at a time and measuring again sees that layers stand in for each other, which scoring each layer once
    does not (research on depth pruning agrees: greedy on loss beats block influence).

    Args:
        layers: of the model.
        wanted: how many stay.
        loss_without: mean loss with a set of layers skipped.

    Returns:
        The kept layers, ascending; and the loss after each round, beginning with the whole model.
    """
    gone: frozenset[int] = frozenset()
    losses = [loss_without(gone)]
    while layers - len(gone) > wanted:
        candidates = [i for i in range(layers - 2, 0, -1) if i not in gone]
        measured = {i: loss_without(gone | {i}) for i in candidates}
        best = min(candidates, key=lambda i: measured[i])
        gone |= {best}
        losses.append(measured[best])
    return [i for i in range(layers) if i not in gone], losses


def shortened_config(config: Mapping[str, Any], keep: Sequence[int], where: str) -> dict[str, Any]:
    """The config of the model with the layers `keep` only: number of layers, and everything that is told per layer.

    Raises:
        CheckpointError: something depends on the position of a layer in a way that cannot be renumbered.
    """
    result = dict(config)
    layers = num_layers(config)
    if layers is None or text_config(config) is not config:
        raise CheckpointError(
            f"{where}: its config does not give a number of layers at the top level; layer_drop cannot shorten it"
        )
    if list(keep) == list(range(layers)):
        return result
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if key in result:
            result[key] = len(keep)
    for key, value in config.items():
        if key in _COUNTS and isinstance(value, int):
            result[key] = sum(i < value for i in keep)
        elif key in _PERIODS and value not in (None, 0, 1) and not isinstance(value, list):
            if "layer_types" not in config:
                raise CheckpointError(
                    f"{where}: config key {key!r} ({value!r}) makes layers differ by their position, so leaving some "
                    "out would change the others; write out `layer_types` in its config.json first"
                )
            result.pop(key)  # layer_types says the same, layer by layer
        elif isinstance(value, list) and key in _INDEX_SETS:
            result[key] = [keep.index(i) for i in value if i in keep]
        elif isinstance(value, list) and len(value) == layers and not _LISTS_OF_OTHER_THINGS.search(key):
            if "layer" not in key and key not in _PERIODS:
                raise CheckpointError(
                    f"{where}: config key {key!r} has {layers} entries, as many as layers, and it is not known whether "
                    "it is told per layer; layer_drop cannot renumber it"
                )
            result[key] = [value[i] for i in keep]
    return result


def write_layers(checkpoint: Checkpoint, keep: Sequence[int] | None, directory: Path) -> None:
    """Write the checkpoint with the layers `keep` (None: all) into `directory`, adapters folded in, sidecars copied.

    Raises:
        CheckpointError: layers are not numbered 0 to L - 1, or as `shortened_config`.
    """
    names = {name: name for name in checkpoint.tensors}
    config = checkpoint.config
    if keep is not None:
        config = shortened_config(config, keep, checkpoint.ref)
        found = {layer[1] for name in names if (layer := layer_of(name)) is not None}
        stacks = {layer[0] for name in names if (layer := layer_of(name)) is not None}
        if len(stacks) != 1 or found != set(range(num_layers(checkpoint.config) or 0)):
            raise CheckpointError(
                f"{checkpoint.ref}: its tensors name layers {sorted(found)} in {sorted(stacks) or 'no stack'}, not 0 "
                f"to {(num_layers(checkpoint.config) or 0) - 1} in one; layer_drop cannot shorten it"
            )
        names = {name: new for name in names if (new := renumbered(name, keep)) is not None}
    write_folded(checkpoint, directory, names=names, config=config)


def renumbered(name: str, keep: Sequence[int]) -> str | None:
    """The name of a tensor in the model with the layers `keep` only; None when its layer is left out."""
    layer = layer_of(name)
    if layer is None:
        return name
    stack, index = layer
    if index not in keep:
        return None
    return f"{stack}.{keep.index(index)}{name[len(f'{stack}.{index}') :]}"
