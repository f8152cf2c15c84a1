"""How a recipe names a model: a line of text, or mergekit's mapping, which is read as that line."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator

__all__ = ["ModelName"]


def _line(value: Any) -> Any:
    """`{model: {path, revision}, lora: {path, revision}}` as `path@revision+path@revision`; all else as it is."""
    if not isinstance(value, Mapping):
        return value
    if value.get("override_architecture") is not None:
        raise ValueError("override_architecture: not needed, layers and towers are found from the tensors; remove it")
    if unknown := sorted(map(str, value.keys() - {"model", "lora", "override_architecture"})):
        raise ValueError(f"{unknown[0]}: unknown key (known: model, lora)")
    if value.get("model") is None:
        raise ValueError("needs a `model`")
    lora = value.get("lora")
    return _place(value["model"], "model") + ("" if lora is None else f"+{_place(lora, 'lora')}")


def _place(value: Any, key: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
        raise ValueError(f"{key}: needs a `path` (a directory or org/name), and may have a `revision`")
    if unknown := sorted(map(str, value.keys() - {"path", "revision"})):
        raise ValueError(f"{key}.{unknown[0]}: unknown key (known: path, revision)")
    revision = value.get("revision")
    return value["path"] if revision is None else f"{value['path']}@{revision}"


ModelName: TypeAlias = Annotated[str, BeforeValidator(_line)]
"""A directory, `org/name[@revision]`, the name of a stage, or any of them with `+adapter`."""
