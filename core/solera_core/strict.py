"""The door: YAML in, validated plain values out, unknown keys refused with a suggestion.

Nothing behind this file reads raw YAML or guesses at keys.
"""

import copy
import difflib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from solera_core.errors import ConfigError

__all__ = ["Strict", "did_you_mean", "load_yaml", "load_yaml_documents", "parse", "without_unknown_keys"]


class Strict(BaseModel):
    """Base of every recipe model: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


ModelT = TypeVar("ModelT", bound=BaseModel)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'density'?)` where a known word is near, else the list of known words."""
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (known: {', '.join(choices)})" if choices else ""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`: what it brings may be overridden, that is its use
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise ConfigError(
                        f"{node.start_mark.name}:{key_node.start_mark.line + 1}: key {key!r} is given twice"
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> Any:
    """Read one YAML (or JSON) document. Raises ConfigError naming file and line."""
    documents = load_yaml_documents(path)
    if len(documents) > 1:
        raise ConfigError(f"{path}: holds {len(documents)} documents (`---` stands between them), expected one")
    return documents[0] if documents else None


def load_yaml_documents(path: Path) -> list[Any]:
    """Read all YAML documents of a file, empty ones left out. Raises ConfigError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise ConfigError(f"{path}: no such file") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as text: {e}") from e
    try:
        loader = _UniqueKeyLoader(text)  # refuses control characters at once
        loader.name = str(path)
        try:
            documents: list[Any] = []
            while loader.check_data():  # type: ignore[no-untyped-call]
                documents.append(loader.get_data())
            return [document for document in documents if document is not None]
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # ValueError: a date such as 2026-13-45
        raise ConfigError(f"{path}: not valid YAML: {e}") from e


def parse(model: type[ModelT], data: Any, *, where: str) -> ModelT:
    """Validate `data` as `model`; every problem is listed, each with its key path.

    Raises:
        ConfigError: with one line a problem, `where: key.path: what (did you mean ...)`.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys, found {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as e:
        lines = [*_lines(model, e), *_hidden(model, data, e)]
        text = "\n".join(f"{where}: {line}" for message in lines for line in message.splitlines())
        raise ConfigError("\n".join(dict.fromkeys(text.splitlines()))) from e


def _hidden(model: type[BaseModel], data: Any, error: ValidationError) -> list[str]:
    """What else is wrong: pydantic does not look at a mapping as a whole in which a key or value is wrong.

    So misspelt keys are mended, all else that is wrong is taken out, and what is left is looked at again. That what was
    taken out is not there is no news.
    """
    lines: list[str] = []
    gone: set[str] = set()
    while True:
        whole, data = data, copy.deepcopy(data)
        for found in _unknown_first(error):
            location = found["loc"]
            if found["type"] == "extra_forbidden":
                known = _keys(owner) if (owner := _model_at(model, location[:-1])) is not None else ()
                _mend(data, location, known)
            elif found["type"] != "missing":
                gone.add(_take_out(data, location))
            elif location[-1] not in _at(data, location[:-1]):  # else a misspelt key was meant
                gone.add(_take_out(data, location[:-1]))
        if data == whole:
            return lines
        try:
            model.model_validate(data)
        except ValidationError as more:
            error = more
        else:
            return lines
        for line, found in zip(_lines(model, error), _unknown_first(error), strict=True):
            if found["type"] != "missing":
                lines += [one for one in line.splitlines() if not any(f"`{key}`" in one for key in gone)]


def _at(data: Any, location: tuple[int | str, ...]) -> Any:
    """What is at a location; parts of it that are the tag of a union lead nowhere, and are passed over."""
    for part in location:
        here: Any = data if isinstance(data, dict) else dict(enumerate(data)) if isinstance(data, list) else {}
        data = here.get(part, data)
    return data


def _mend(data: Any, location: tuple[int | str, ...], known: Sequence[str]) -> None:
    """Rename an unknown key to the near one that was meant, if that is not there; else take it out. In place."""
    owner, key = _at(data, location[:-1]), location[-1]
    if not isinstance(owner, dict) or key not in owner:
        return
    value = owner.pop(key)
    if (near := difflib.get_close_matches(str(key), known, n=1)) and near[0] not in owner:
        owner[near[0]] = value


def _take_out(data: Any, location: tuple[int | str, ...]) -> str:
    """Take the innermost value at a location that a key leads to out of `data`, in place; returns the key.

    Entries of lists stay, so that places in them are still called by their numbers: the whole list goes.
    """
    for end in range(len(location), 0, -1):
        owner, key = _at(data, location[: end - 1]), location[end - 1]
        if isinstance(owner, dict) and key in owner:
            del owner[key]
            return str(key)
    return ""


def without_unknown_keys(data: Any, error: ValidationError) -> Any:
    """A copy of `data` without the keys that `error` calls unknown."""
    changed = copy.deepcopy(data)
    for found in error.errors():
        if found["type"] != "extra_forbidden":
            continue
        owner: Any = changed
        try:
            for part in found["loc"][:-1]:
                owner = owner[part]
            del owner[found["loc"][-1]]
        except (KeyError, IndexError, TypeError):  # inside a union, whose tag is part of the location
            continue
    return changed


def _unknown_first(e: ValidationError) -> list[ErrorDetails]:
    """A misspelt key also leaves another missing, and it is the typo that must be mended."""
    return sorted(e.errors(), key=lambda error: error["type"] != "extra_forbidden")


def _lines(model: type[BaseModel], e: ValidationError) -> list[str]:
    lines: list[str] = []
    for error in _unknown_first(e):
        # (a tag in brackets says which member of a union is meant, and stands in no file)
        location = ".".join(str(part) for part in error["loc"] if not str(part).startswith("("))
        if error["type"] == "extra_forbidden":
            owner = _model_at(model, error["loc"][:-1])
            known = _keys(owner) if owner is not None else ()
            lines.append(f"{location}: unknown key{did_you_mean(str(error['loc'][-1]), known)}")
        elif error["type"] in ("union_tag_invalid", "union_tag_not_found"):
            lines.append(f"{location}.{_tag_problem(error.get('ctx', {}))}")
        elif error["type"] == "value_error":
            lines.append(f"{location + ': ' if location else ''}{error.get('ctx', {}).get('error', error['msg'])}")
        else:
            given = "" if error["type"] == "missing" else f" (given: {error['input']!r})"
            lines.append(f"{location}: {error['msg'].lower()}{given}")
    return lines


def _tag_problem(context: Mapping[str, Any]) -> str:
    """Of a key that says which kind of mapping this is (`kind: choice`): unknown, or not there."""
    key = str(context["discriminator"]).strip("'")
    known = [tag.strip("' ") for tag in str(context.get("expected_tags", "")).split(",")]
    if "tag" in context:
        return f"{key}: unknown {key} {context['tag']!r}{did_you_mean(str(context['tag']), known)}"
    return f"{key}: is missing; it says which settings are meant"


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model class that owns the key at `location`, as far as annotations tell."""
    owners = [model]  # more than one inside a union, until its tag is seen
    for part in location:
        if isinstance(part, int):
            continue  # a list index
        found = [
            inner
            for owner in owners
            for name, field in owner.model_fields.items()
            if part in (name, field.alias)
            for inner in _models_in(field.annotation)
        ]
        owners = found or [owner for owner in owners if _is_tagged(owner, part)] or owners
    return owners[0] if owners else None


def _is_tagged(model: type[BaseModel], tag: str) -> bool:
    """Whether a field of `model` can only be `tag`, as the discriminator of a union."""
    return any(getattr(field.annotation, "__args__", None) == (tag,) for field in model.model_fields.values())


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for argument in getattr(annotation, "__args__", ()):
        found += _models_in(argument)
    return found
