"""The config.json of the output: the owner's, with what the merge changes computed anew."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from solera_core.towers import Tower, count_keys, find_tower, layer_count, tower_config
from solera_merge.models import Models
from solera_merge.problems import Problems, some
from solera_merge.runs import Part

__all__ = ["output_config"]

# Lists of layer numbers: renumbered.
_LAYER_NUMBERS: Final = (
    "attn_layer_indices",
    "cross_attention_layers",
    "deepstack_visual_indexes",
    "full_attn_idxs",
    "fullatt_block_indexes",
    "hybrid_layer_ids",
    "intermediate_layers_indices",
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
    "moe_layer_interval",
    "moe_layer_start_index",
    "no_rope_layer_interval",
    "num_kv_shared_layers",
    "sliding_window_pattern",
)


# Lists that may have as many entries as there are layers by chance: end-of-text ids, ranges, sizes of images. Where
# there are few layers (in tests, and in small towers) any list may, so there the key must say that it is about layers.
_NO_LAYERS: Final = re.compile(r"token|^mtp|limit|range|image|patch|^architectures$")
_SAYS_LAYERS: Final = re.compile(r"layer|block|pattern|types")
_FEW: Final = 6
_STEP: Final = re.compile(r"(period|step|interval|freq)$")
_DENSE: Final = "first_k_dense_replace"


def output_config(models: Models, parts: Sequence[Part], *, dtype: str) -> tuple[dict[str, Any], list[str]]:
    """The owner's config with dtype set and, for slices, the number of layers and every per-layer list; and warnings.

    Args:
        models: as opened.
        parts: of the recipe.
        dtype: as torch spells it.

    Raises:
        CheckpointError: layers that are merged with each other differ in kind (`layer_types` and the like), or lie
            where the config's own pattern has layers of another kind.
    """
    config = models.checkpoints[models.owner].config
    config.pop("_name_or_path", None)  # the name of an input, not of this model
    warnings: list[str] = []
    for part in parts:
        if not part.whole:
            warnings += _restack(config, part, models)
    for level in (config, *(value for value in config.values() if isinstance(value, dict))):
        level.update({key: dtype for key in ("dtype", "torch_dtype") if level.get(key) is not None})
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype
    return config, warnings


def _restack(config: dict[str, Any], part: Part, models: Models) -> list[str]:
    """Change the layer keys of a tower's level in place; returns warnings."""
    tower = part.tower or models.towers[models.owner][0]
    inner = tower_config(config, tower)
    assert isinstance(inner, dict)  # `config` is a deep copy, so all of it may be changed in place
    origins = [[(s.model, s.first + layer) for s in run.sources] for run in part.runs for layer in range(run.length)]
    old = next(iter(tower.stacks.values()))
    in_place = [dict(row).get(models.owner) for row in origins] == list(range(old))
    problems, warnings = Problems(), list[str]()
    levels = [_level(models, i, tower) for i in range(len(models.checkpoints))]
    counts = count_keys(inner, tower)
    if (
        not counts
        and layer_count(config, tower) is None
        and not any(_is_per_layer(k, v, old) for k, v in inner.items())
    ):
        problems.checkpoint(
            f"{models.checkpoints[models.owner].path / 'config.json'}: has no key for the number of layers of "
            f"{tower.name!r}; slices are not possible"
        )
    kinds = _Kinds(models, next(iter(tower.stacks)), levels)
    settled = [*counts, *_set_dense_layers(inner, origins, kinds, problems)]
    if settled == counts:
        kinds.check(inner, origins, problems)
    for key in counts:
        inner[key] = len(origins)
    for key, value in list(inner.items()):
        if key in settled:
            continue
        if isinstance(value, list) and key in _LAYER_NUMBERS:
            inner[key] = [
                new for new, row in enumerate(origins) if any(at in (levels[m].get(key) or ()) for m, at in row)
            ]
        elif _is_per_layer(key, value, old):
            entries = [_entry(key, row, levels, models, problems) for row in origins]
            inner[key] = "".join(entries) if isinstance(value, str) and not problems.found else entries
        elif key == "moe_layer_end_index" and value == old - 1:
            inner[key] = len(origins) - 1
        elif key in _PATTERNS and value is not None and not in_place:
            warnings.append(
                f"config.json: `{key}` ({value!r}) sets a pattern by layer number, and layers are moved; "
                "check that the layers of the output still are what the pattern says"
            )
    problems.raise_any()
    return warnings


def _set_dense_layers(
    inner: dict[str, Any], origins: Sequence[Sequence[tuple[int, int]]], kinds: "_Kinds", problems: Problems
) -> list[str]:
    """`first_k_dense_replace` of DeepSeek and others: the layers before the first with experts; what was set."""
    if not isinstance(inner.get(_DENSE), int):
        return []
    dense = [not any("experts" in suffix for suffix, _ in kinds.of(*row[0])) for row in origins]
    count = next((i for i, alone in enumerate(dense) if not alone), len(dense))
    if any(dense[count:]):
        at = count + dense[count:].index(True)
        model, layer = origins[at][0]
        problems.checkpoint(
            f"config.json: `{_DENSE}` can only say that the first layers have no experts, and layer {at} of the "
            f"output (layer {layer} of {kinds.models.ref(model)!r}) has none behind layers with experts"
        )
    inner[_DENSE] = count
    return [_DENSE]


@dataclass(frozen=True)
class _Kinds:
    """What a layer holds, and whether its place in the config's lists tells it; else its number does.

    Attributes:
        models: as opened.
        stack: prefix of the layers.
        levels: of each model's config.
    """

    models: Models
    stack: str
    levels: Sequence[Mapping[str, Any]]

    def count(self, model: int) -> int:
        """Number of a model's layers."""
        return next((t.stacks[self.stack] for t in self.models.towers[model] if self.stack in t.stacks), 0)

    def of(self, model: int, layer: int) -> frozenset[tuple[str, tuple[int, ...]]]:
        """(name behind the number, shape) of the tensors of a layer."""
        prefix = f"{self.stack}.{layer}."
        tensors = self.models.checkpoints[model].tensors
        return frozenset((n.removeprefix(prefix), t.shape) for n, t in tensors.items() if n.startswith(prefix))

    def listed(self, model: int, layer: int) -> tuple[str, ...]:
        """What the per-layer lists of a config say about a layer."""
        entries: list[str] = []
        for key, value in sorted(self.levels[model].items()):
            if isinstance(value, list) and key in _LAYER_NUMBERS:
                entries.append(f"{key}:{layer in value}")
            elif _is_per_layer(key, value, self.count(model)):
                entries.append(f"{key}:{value[layer]}")
        return tuple(entries)

    def check(self, inner: Mapping[str, Any], origins: Sequence[Sequence[tuple[int, int]]], problems: Problems) -> None:
        """Refuse layers that lie where the model class, counting, makes layers of another kind."""
        owner, layers = self.models.owner, self.count(self.models.owner)
        own = [(self.listed(owner, i), self.of(owner, i)) for i in range(layers)]
        ambiguous = {listed for listed, kind in own if any(a == listed and b != kind for a, b in own)}
        steps = [v for k, v in inner.items() if _STEP.search(k) and isinstance(v, int) and 0 < v <= layers]
        for at, row in enumerate(origins):
            model, layer = row[0]
            back = max(steps, default=1)
            like = at if at < layers else at - back * -(-(at - layers + 1) // back)
            if self.listed(model, layer) not in ambiguous or own[like][0] != self.listed(model, layer):
                continue
            if differing := sorted({name for name, _ in own[like][1] ^ self.of(model, layer)}):
                problems.checkpoint(
                    f"{self.stack}.{at}: would be layer {layer} of {self.models.ref(model)!r}, but layers of this "
                    f"model differ by their number, and one with this number differs in {some(differing)}; "
                    "choose ranges that keep such layers in their places"
                )


def _level(models: Models, model: int, tower: Tower) -> Mapping[str, Any]:
    """The level of a model's config that describes the tower."""
    pair = models.fills[model]
    own = pair[1] if pair is not None else find_tower(models.towers[model], tower.name) or tower
    return tower_config(models.checkpoints[model].config, own)


def _is_per_layer(key: str, value: Any, layers: int) -> bool:
    """A list with an entry a layer; or a string with a letter a layer (`hybrid_override_pattern`)."""
    kind = isinstance(value, list) or (isinstance(value, str) and key.endswith("pattern"))
    says = layers >= _FEW or _SAYS_LAYERS.search(key) is not None
    return kind and len(value) == layers and says and _NO_LAYERS.search(key) is None


def _entry(
    key: str, row: Sequence[tuple[int, int]], configs: Sequence[Mapping[str, Any]], models: Models, problems: Problems
) -> Any:
    found: list[tuple[Any, str]] = []
    for model, layer in row:
        values = configs[model].get(key)
        where = f"layer {layer} of {models.ref(model)!r}"
        found.append((values[layer] if isinstance(values, list | str) and layer < len(values) else None, where))
    if any(value != found[0][0] for value, _ in found):
        kinds = ", ".join(f"{value!r} ({where})" for value, where in found)
        problems.checkpoint(f"config.json: `{key}` differs between layers that are merged: {kinds}")
    return found[0][0]
