"""The models of a recipe: opened once each, and compared by what config and tokenizer say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solera_core.architecture import num_layers, text_config, ties_embeddings
from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, InputError
from solera_core.hub import split_adapter
from solera_merge.config import MergeConfig
from solera_merge.problems import Problems
from solera_merge.vocabulary import conflicting_ids

__all__ = ["Models", "compare", "open_models"]

# Keys that change what a weight means although its shape stays the same.
_STRUCTURAL = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "activation_function",
)
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
    *_STRUCTURAL,
    *_SIZES,
}
_OTHER_VOCABULARY = 0.1  # share of ids that mean another token from which on two tokenizers are simply different


@dataclass(frozen=True)
class Models:
    """The distinct models of a recipe.

    Attributes:
        checkpoints: one each, in order of appearance in the recipe, the base last where it is named only as such.
        index: position in `checkpoints` of every reference that the recipe uses.
        owner: position of the model whose config.json the output gets: the base, else the first.
        inputs: `checkpoints` as they were opened, before the recipe's tokenizer changes how they are seen.
    """

    checkpoints: tuple[Checkpoint, ...]
    index: dict[str, int]
    owner: int
    inputs: tuple[Checkpoint, ...]

    def ref(self, model: int) -> str:
        """How the recipe calls a model."""
        return self.checkpoints[model].ref


def open_models(config: MergeConfig, ctx: Context) -> Models:
    """Open every model that the recipe names; two references to one directory are one model.

    The weights of models on the hub stay there until `Checkpoint.fetch`.

    Raises:
        InputError: one line for every model that cannot be opened or is quantised.
    """
    problems = Problems()
    checkpoints: list[Checkpoint] = []
    index: dict[str, int] = {}
    known: dict[tuple[Path, str | None], int] = {}
    for ref in _references(config):
        try:
            checkpoint = open_checkpoint(ref, ctx, weights="later")
            _refuse_quantised(checkpoint)
        except InputError as e:
            problems.add(e)
            continue
        adapter = split_adapter(ref, ctx)
        identity = (checkpoint.path.resolve(), adapter[1] if adapter else None)
        if identity not in known:
            known[identity] = len(checkpoints)
            checkpoints.append(checkpoint)
        index[ref] = known[identity]
    problems.raise_any()
    owner = index[config.base_model] if config.base_model is not None else 0
    return Models(tuple(checkpoints), index, owner, tuple(checkpoints))


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
    first = models.checkpoints[models.owner]
    for other in models.checkpoints:
        if other is first:
            continue
        a, b = first.config, other.config
        where = f"{_config_file(first)} and {_config_file(other)}"
        if (families := (_family(a), _family(b)))[0] != families[1]:
            problems.checkpoint(
                f"{where}: different architectures: {families[0]} and {families[1]}; only models of one architecture "
                "can be merged"
            )
            continue
        for key, mine, theirs in _differences(a, b, _STRUCTURAL):
            problems.checkpoint(
                f"{where}: `{key}` is {mine!r} and {theirs!r}: the weights mean different things although their "
                "shapes may agree; merge models of one base"
            )
        if (ties := (ties_embeddings(a), ties_embeddings(b))) in ((True, False), (False, True)):
            problems.checkpoint(
                f"{where}: tie_word_embeddings is {ties[0]} and {ties[1]}: one model has its own output head, the "
                "other shares the embedding; save the tied one untied (with its head) and set the flag to false"
            )
        for key, mine, theirs in [] if whole else _differences(a, b, _SIZES):
            problems.checkpoint(f"{where}: `{key}` is {mine} and {theirs}; layers of different sizes cannot be stacked")
        if whole and (layers := (num_layers(a), num_layers(b)))[0] != layers[1]:
            problems.checkpoint(
                f"{where}: different numbers of layers: {layers[0]} and {layers[1]}; choose equally many with `slices` "
                "and `layer_range`"
            )
        warnings += [
            f"{where}: `{key}` is {mine!r} and {theirs!r}; the output gets {mine!r}"
            for key, mine, theirs in _differences(a, b, _other_keys(a, b))
        ]
        if tokenizers:
            _compare_tokenizers(first, other, problems, warnings)
    problems.raise_any()
    return warnings


def _references(config: MergeConfig) -> list[str]:
    refs = [model.model for model in config.models or ()]
    for output in config.slices or ():
        refs += [source.model for source in output.sources]
        refs += [output.base_model] if output.base_model is not None else []
    refs += [config.base_model] if config.base_model is not None else []
    return list(dict.fromkeys(refs))


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    for key in ("quantization_config", "compression_config"):
        found = config.get(key) or text_config(config).get(key)
        if found:
            kind = found.get("quant_method", "unknown") if isinstance(found, dict) else found
            raise CheckpointError(
                f"{_config_file(checkpoint)}: `{key}` says that the weights are quantised ({kind}); they cannot be "
                "merged as they are: use the original checkpoint, or dequantise it first"
            )


def _config_file(checkpoint: Checkpoint) -> Path:
    return checkpoint.path / "config.json"


def _family(config: dict[str, Any]) -> str:
    architectures = config.get("architectures") or [None]
    return f"{architectures[0]} ({config.get('model_type')})"


def _other_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted((text_config(a).keys() | text_config(b).keys()) - _INDIFFERENT)


def _differences(a: dict[str, Any], b: dict[str, Any], keys: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Keys that both configs give, differently; one that is missing means a default, which only transformers knows."""
    mine, theirs = text_config(a), text_config(b)
    pairs = [(key, mine.get(key), theirs.get(key)) for key in keys]
    return [(key, x, y) for key, x, y in pairs if x is not None and y is not None and x != y]


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
