"""What is wrong with the models of a recipe that itself is wrong: both are said in one go."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import ValidationError

from solera_core.context import Context
from solera_core.errors import InputError
from solera_core.raw import open_tokenizer, open_values
from solera_core.strict import without_unknown_keys
from solera_merge.config import MergeConfig
from solera_merge.methods.catalogue import METHODS
from solera_merge.plan import make_plan
from solera_merge.problems import Problems

__all__ = ["examine"]

_MODEL_KEYS: Final = ("model", "base_model")


def examine(settings: Any, ctx: Context) -> list[str]:
    """The problems of the models, and of the recipe beside its unknown keys and parameters, one line each.

    Args:
        settings: a merge recipe as read from YAML, refused by `parse`.
        ctx: where names resolve.
    """
    problems = Problems()
    config = _readable(settings)
    if config is not None:
        with problems.collected():
            make_plan(config, ctx)
    else:
        for ref in dict.fromkeys(_references(settings)):
            try:
                open_values(ref, ctx, weights="later")
            except InputError as e:
                problems.add(e)
        for ref in dict.fromkeys(_tokenizers(settings)):
            with problems.collected():
                open_tokenizer(ref, ctx)
    return [str(problem) for problem in problems.found]


def _readable(settings: Any) -> MergeConfig | None:
    """The recipe without the keys and parameters that are unknown; None where more than that is wrong with it."""
    known = copy.deepcopy(settings)
    method = METHODS.get(known.get("merge_method", "")) if isinstance(known, Mapping) else None
    if method is None:
        return None
    for mapping in _mappings(known):
        if isinstance(parameters := mapping.get("parameters"), dict):
            for name in [name for name in parameters if name not in method.parameters]:
                del parameters[name]
    try:
        return MergeConfig.model_validate(known)
    except ValidationError as e:
        try:
            return MergeConfig.model_validate(without_unknown_keys(known, e))
        except ValidationError:
            return None


def _references(settings: Any) -> Iterator[str]:
    for mapping in _mappings(settings):
        for key in _MODEL_KEYS:
            if isinstance(ref := mapping.get(key), str):
                yield ref


def _tokenizers(settings: Any) -> Iterator[str]:
    if not isinstance(settings, Mapping):
        return
    tokenizer = settings.get("tokenizer")
    for ref in (settings.get("tokenizer_source"), tokenizer.get("source") if isinstance(tokenizer, Mapping) else None):
        if isinstance(ref, str) and ref not in ("base", "union", *_references(settings)):
            yield ref


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        yield from _mappings(item)
