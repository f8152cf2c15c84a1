"""The config.json of the output: the owner's, with what the merge changes computed anew."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from solera_core.architecture import num_layers, text_config
from solera_merge.models import Models
from solera_merge.problems import Problems
from solera_merge.runs import Run

__all__ = ["output_config"]

# Lists of layer numbers: renumbered.
_LAYER_NUMBERS: Final = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "mlp_only_layers",
    "moe_layers",
)
# Numbers that set a pattern along the layers: they cannot follow a layer that is moved.
_PATTERNS: Final = (
    "attn_layer_offset",
    "attn_layer_period",
    "decoder_sparse_step",
    "expert_layer_offset",
    "expert_layer_period",
    "first_k_dense_replace",
    "full_attention_interval",
    "interleave_moe_layer_step",
    "max_window_layers",
    "moe_layer_freq",
    "no_rope_layer_interval",
    "num_kv_shared_layers",
    "sliding_window_pattern",
)


def output_config(models: Models, runs: Sequence[Run], *, whole: bool, dtype: str) -> tuple[dict[str, Any], list[str]]:
    """The owner's config with dtype set and, for slices, the number of layers and every per-layer list; and warnings.

    Args:
        models: as opened.
        runs: of the recipe.
        whole: the layers are those of the owner, in order.
        dtype: as torch spells it.

    Raises:
        CheckpointError: layers that are merged with each other differ in kind (`layer_types` and the like).
    """
    config = models.checkpoints[models.owner].config
    config.pop("_name_or_path", None)  # the name of an input, not of this model
    inner = text_config(config)
    assert isinstance(inner, dict)  # `config` is a deep copy, so both may be changed in place
    warnings = [] if whole else _restack(inner, models, runs)
    for level in (config, inner):
        level.update({key: dtype for key in ("dtype", "torch_dtype") if level.get(key) is not None})
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype
    return config, warnings


def _restack(inner: dict[str, Any], models: Models, runs: Sequence[Run]) -> list[str]:
    """Change the layer keys of the text config in place; returns warnings."""
    origins = [[(s.model, s.first + layer) for s in run.sources] for run in runs for layer in range(run.length)]
    old = num_layers(inner)
    in_place = [dict(row).get(models.owner) for row in origins] == list(range(old or -1))
    problems, warnings = Problems(), list[str]()
    configs = [text_config(checkpoint.config) for checkpoint in models.checkpoints]
    for key, value in list(inner.items()):
        if isinstance(value, int) and num_layers({key: value}) is not None:
            inner[key] = len(origins)
        elif isinstance(value, list) and key in _LAYER_NUMBERS:
            inner[key] = [new for new, row in enumerate(origins) if any(at in configs[m].get(key, ()) for m, at in row)]
        elif isinstance(value, list) and len(value) == old and not _about_tokens(key):
            inner[key] = [_entry(key, row, configs, models, problems) for row in origins]
        elif key in _PATTERNS and value is not None and not in_place:
            warnings.append(
                f"config.json: `{key}` ({value!r}) sets a pattern by layer number, and layers are moved; "
                "check that the layers of the output still are what the pattern says"
            )
    problems.raise_any()
    return warnings


def _about_tokens(key: str) -> bool:
    """Lists that may have as many entries as there are layers, but by chance: several end-of-text ids, say."""
    return "token" in key or key == "architectures"


def _entry(
    key: str, row: Sequence[tuple[int, int]], configs: Sequence[Mapping[str, Any]], models: Models, problems: Problems
) -> Any:
    found: list[tuple[Any, str]] = []
    for model, layer in row:
        values = configs[model].get(key)
        where = f"layer {layer} of {models.ref(model)!r}"
        found.append((values[layer] if isinstance(values, list) and layer < len(values) else None, where))
    if any(value != found[0][0] for value, _ in found):
        kinds = ", ".join(f"{value!r} ({where})" for value, where in found)
        problems.checkpoint(f"config.json: `{key}` differs between layers that are merged: {kinds}")
    return found[0][0]
