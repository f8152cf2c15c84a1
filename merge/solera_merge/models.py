"""The models of a recipe: opened once each, named alike, and compared by what config and tokenizer say."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from solera_core.architecture import num_layers, text_config, ties_embeddings
from solera_core.checkpoint import Checkpoint
from solera_core.context import Context
from solera_core.errors import InputError
from solera_core.hub import split_adapter
from solera_core.raw import is_weight_file, open_tokenizer, open_values
from solera_core.strict import did_you_mean
from solera_core.towers import Tower, find_tower, stacks_of, tower_config, towers_of
from solera_merge.alignment import align, counterpart, fill
from solera_merge.config import MergeConfig, OutputModule
from solera_merge.problems import Problems, some
from solera_merge.vocabulary import conflicting_ids

__all__ = ["Models", "compare", "family_of", "open_models", "with_tokenizer"]

# Keys that change what a weight means although its shape stays the same: numbers and sizes of heads, activations.
_STRUCTURAL = re.compile(r".*head.*|d_kv|(.*_)?(act|activation)(_fn|_function)?")
# Keys that fix the shapes of every layer. (Of one and the same layer, the shapes themselves are compared.)
_SIZES = ("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner")
# Keys that say nothing about the weights, or that are compared elsewhere.
_INDIFFERENT = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "model_type",
    "num_hidden_layers",
    "pad_token_id",
    "text_config",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
    "num_layers",
    "num_decoder_layers",
    *_SIZES,
}
_OTHER_VOCABULARY = 0.1  # share of ids that mean another token from which on two tokenizers are simply different


@dataclass(frozen=True)
class Models:
    """The distinct models of a recipe.

    Attributes:
        checkpoints: one each, in order of appearance in the recipe, the base last where it is named only as such. All
            have the owner's names for their tensors, whatever layout they are stored in.
        index: position in `checkpoints` of every reference that the recipe uses.
        owner: position of the model whose config.json the output gets: the base, else the first.
        towers: of every model.
        fills: where a model is no whole model of the owner's kind: the owner's tower that it is, and the same in the
            model itself.
        inputs: as opened, under their own names and with their own vocabularies.
        raw: they are files of weights without a config.
        tokenizer: where the recipe's `tokenizer_source` is none of the models: what stands there, without its weights.
    """

    checkpoints: tuple[Checkpoint, ...]
    index: dict[str, int]
    owner: int
    towers: tuple[tuple[Tower, ...], ...]
    fills: tuple[tuple[Tower, Tower] | None, ...]
    inputs: tuple[Checkpoint, ...]
    raw: bool = False
    tokenizer: Checkpoint | None = None

    def at(self, model: int) -> Checkpoint:
        """A model by its number; behind the last one `tokenizer`."""
        if self.tokenizer is not None and model == len(self.checkpoints):
            return self.tokenizer
        return self.checkpoints[model]

    def ref(self, model: int) -> str:
        """How the recipe calls a model."""
        return self.at(model).ref


def open_models(config: MergeConfig, ctx: Context, problems: Problems) -> Models:
    """Open every model that the recipe names; two references to one directory are one model.

    The weights of models on the hub stay there until `Checkpoint.fetch`. A model that cannot be opened or dequantised
    is noted as a problem and left out.
    """
    checkpoints: list[Checkpoint] = []
    index: dict[str, int] = {}
    known: dict[tuple[Path, str | None], int] = {}
    references = _references(config)
    raw = _are_files(references, config, ctx, problems)
    for ref in references:
        try:
            checkpoint = open_values(ref, ctx, weights="later")
        except InputError as e:
            problems.add(e)
            continue
        adapter = split_adapter(ref, ctx)
        identity = (checkpoint.path.resolve(), adapter[1] if adapter else None)
        if identity not in known:
            known[identity] = len(checkpoints)
            checkpoints.append(checkpoint)
        index[ref] = known[identity]
    owner = index.get(config.base_model or "", 0)
    if raw:
        towers, opened = tuple(towers_of(checkpoint.tensors) for checkpoint in checkpoints), tuple(checkpoints)
        return Models(opened, index, owner, towers, (None,) * len(opened), opened, raw=True)
    return _named_alike(config, checkpoints, index, owner, problems)


def with_tokenizer(models: Models, config: MergeConfig, ctx: Context, problems: Problems) -> Models:
    """The models, and beside them the one whose tokenizer the recipe asks for, where that is none of them."""
    wanted, references = config.wanted_tokenizer, _references(config)
    if models.raw or wanted is None or wanted.source in ("base", "union", *references):
        return models
    where = "tokenizer_source" if config.tokenizer is None else "tokenizer.source"
    try:
        tokenizer = open_tokenizer(wanted.source, ctx)
    except InputError as e:
        hint = did_you_mean(wanted.source, ["union", "base", *references])
        problems.config(f"{where}: {wanted.source!r} is none of the models of this merge{hint}, and {e}")
        return models
    return replace(models, tokenizer=tokenizer)


def compare(models: Models, *, whole: bool, tokenizers: bool) -> list[str]:
    """Check that the models belong together, as far as configs and tokenizers tell; returns warnings.

    Args:
        models: as opened.
        whole: every model is merged over all its layers, so their number must agree.
        tokenizers: equal ids must mean equal tokens, because the recipe asks for no tokenizer.

    Raises:
        CheckpointError: different architectures, heads, activation, tie flags, layer counts or vocabularies.
    """
    problems, warnings = Problems(), list[str]()
    for other, fills in zip(models.checkpoints, models.fills, strict=True):
        first = models.checkpoints[models.owner]
        if other is first:
            continue
        a, b = first.config, other.config
        where = f"{_config_file(first)} and {_config_file(other)}"
        if fills is None and (families := (family_of(a), family_of(b)))[0] != families[1]:
            problems.checkpoint(
                f"{where}: different architectures: {families[0]} and {families[1]}; only models of one architecture "
                "can be merged (models of one tower of a larger model with `towers`)"
            )
            continue
        if fills is None:
            pairs = _levels(a, b)
        else:
            pairs = [(fills[0].name, tower_config(a, fills[0]), tower_config(b, fills[1]))]
            types = [str(level.get("model_type", "")) for level in pairs[0][1:]]
            if not _derives(*types):
                problems.checkpoint(
                    f"{where}: the tower {fills[0].name!r} is a {types[0]}, and the other model is a {types[1]}; only "
                    "models of one family can be merged in a tower"
                )
                continue
        for level, mine, theirs in pairs:
            _compare_level(where, level, mine, theirs, whole, problems, warnings)
        if (ties := (ties_embeddings(a), ties_embeddings(b))) in ((True, False), (False, True)):
            problems.checkpoint(
                f"{where}: tie_word_embeddings is {ties[0]} and {ties[1]}: one model has its own output head, the "
                "other shares the embedding; save the tied one untied (with its head) and set the flag to false"
            )
        if whole and fills is None and (layers := (num_layers(a), num_layers(b)))[0] != layers[1]:
            problems.checkpoint(
                f"{where}: different numbers of layers: {layers[0]} and {layers[1]}; choose equally many with `slices` "
                "and `layer_range`"
            )
        if tokenizers:
            _compare_tokenizers(first, other, problems, warnings)
    problems.raise_any()
    return warnings


def _compare_level(
    where: str,
    level: str,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    whole: bool,
    problems: Problems,
    warnings: list[str],
) -> None:
    """One level of two configs: the outer one, that of the language model, of the vision tower, ..."""
    of = f"{level}." if level else ""
    for key, mine, theirs in _differences(a, b):
        if _STRUCTURAL.fullmatch(key) and not isinstance(mine, bool):
            problems.checkpoint(
                f"{where}: `{of}{key}` is {mine!r} and {theirs!r}: the weights mean different things although their "
                "shapes may agree; merge models of one base"
            )
        elif key in _SIZES and not whole:
            problems.checkpoint(
                f"{where}: `{of}{key}` is {mine} and {theirs}; layers of different sizes cannot be stacked"
            )
        elif key not in _INDIFFERENT:
            warnings.append(f"{where}: `{of}{key}` is {mine!r} and {theirs!r}; the output gets {mine!r}")


def _named_alike(
    config: MergeConfig, opened: list[Checkpoint], index: dict[str, int], owner: int, problems: Problems
) -> Models:
    """The models under the owner's names; those that are but a tower of it, as that tower."""
    if not opened:
        return Models((), index, 0, (), (), ())
    inputs = tuple(opened)
    towers = [towers_of(checkpoint.tensors) for checkpoint in opened]
    first = opened[owner]
    fills: list[tuple[Tower, Tower] | None] = [None] * len(opened)
    for part, ref in _tower_sources(config):
        tower, i = find_tower(towers[owner], part), index.get(ref, owner)
        if tower is None or i == owner or family_of(opened[i].config) == family_of(first.config):
            continue  # unknown towers are refused with the parts
        if (own := counterpart(tower, towers[i])) is None:
            listed = ", ".join(other.name for other in towers[i])
            problems.checkpoint(f"{opened[i].path}: has no tower that could be {tower.name!r}; it has {listed}")
            continue
        fills[i] = (tower, own)
    for i, checkpoint in enumerate(opened):
        if (pair := fills[i]) is not None:
            opened[i] = fill(checkpoint, pair[1], first, pair[0])
            names = tuple(opened[i].tensors)
            towers[i] = (replace(pair[0], tensors=names, stacks=stacks_of(names)),)
        elif i != owner:
            opened[i] = align(checkpoint, towers[i], towers[owner])
            towers[i] = towers[i] if opened[i] is checkpoint else towers_of(opened[i].tensors)
    return Models(tuple(opened), index, owner, tuple(towers), tuple(fills), inputs)


def _tower_sources(config: MergeConfig) -> list[tuple[str, str]]:
    """(module, model) for everything that is listed under a module."""
    return [(name, ref) for name, part in config.parts.items() if name is not None for ref in _references_of(part)]


def _are_files(references: Sequence[str], config: MergeConfig, ctx: Context, problems: Problems) -> bool:
    """Whether the models are files of weights; notes what is impossible then."""
    files = [ref for ref in references if is_weight_file(ref, ctx)]
    if not files and config.tensors is not None:
        problems.config(
            f"tensors: {config.tensors} is for files of weights; models of one architecture have the same tensors"
        )
    if not files:
        return False
    if others := [ref for ref in references if ref not in files]:
        problems.config(
            f"models: {some(files)} is a file of weights, and {some(others)} is not; merge files with files (tensor by "
            "tensor, without any config), or whole models with whole models"
        )
    for key in ("slices", "modules", "towers", "tokenizer_source", "tokenizer", "chat_template"):
        if getattr(config, key) is not None:
            problems.config(f"{key}: files of weights have no config to say what that would mean; leave it out")
    return True


def _references(config: MergeConfig) -> list[str]:
    refs = [ref for part in config.parts.values() for ref in _references_of(part)]
    refs += [config.base_model] if config.base_model is not None else []
    return list(dict.fromkeys(refs))


def _references_of(part: OutputModule) -> list[str]:
    refs = [model.model for model in part.models or ()]
    for output in part.slices or ():
        refs += [source.model for source in output.sources]
        refs += [output.base_model] if output.base_model is not None else []
    return [*refs, part.base_model] if part.base_model is not None else refs


def _config_file(checkpoint: Checkpoint) -> Path:
    return checkpoint.path / "config.json"


def family_of(config: dict[str, Any]) -> str:
    """Class and model type, as config.json names them."""
    architectures = config.get("architectures") or [None]
    return f"{architectures[0]} ({config.get('model_type')})"


def _derives(tower: str, model: str) -> bool:
    """Whether a language model of type `model` may be what a tower was made of: `qwen2` of `qwen2_5_vl_text`."""
    words = [word for word in model.split("_") if word not in ("text", "model")]
    return not tower or not model or all(any(w.startswith(word) for w in tower.split("_")) for word in words)


def _levels(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(name, level, level) for the levels that two configs have in common: language model, outer one, other towers."""
    mine, theirs = text_config(a), text_config(b)
    pairs = [("", mine, theirs)]
    if mine is not a and theirs is not b:
        pairs.append(("", a, b))
    nested = (key for key in a if isinstance(a[key], Mapping) and isinstance(b.get(key), Mapping) and _is_level(key))
    return pairs + [(key, a[key], b[key]) for key in nested if a[key] is not mine]


def _is_level(key: str) -> bool:
    return key.endswith("_config") or key in ("encoder", "decoder")


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys that both configs give, differently; one that is missing means a default, which only transformers knows."""
    triples = [(key, a[key], b[key]) for key in sorted(a.keys() & b.keys()) if not _is_level(key)]
    return [(key, x, y) for key, x, y in triples if x is not None and y is not None and x != y]


def _compare_tokenizers(first: Checkpoint, other: Checkpoint, problems: Problems, warnings: list[str]) -> None:
    conflict = conflicting_ids(first, other)
    if conflict is None or not conflict.count:
        return
    line = (
        f"{conflict.files[0]} and {conflict.files[1]}: {conflict.count} of {conflict.common} token ids mean different "
        f"tokens (id {conflict.example[0]} is {conflict.example[1]!r} and {conflict.example[2]!r})"
    )
    if conflict.count > _OTHER_VOCABULARY * conflict.common:
        problems.checkpoint(
            f"{line}: embedding rows would be mixed up; `tokenizer_source: union` (or `base`, or one of the models) "
            "gives the models one vocabulary"
        )
    else:
        warnings.append(f"{line}; the output gets the tokenizer of the first")
