"""The value of a parameter in mergekit's language: a scalar, a gradient over the layers, or a choice by tensor name.

    weight: 0.5                                    the same everywhere
    weight: [0, 0.3, 1]                            a gradient: piecewise linear from the first layer to the last
    weight:                                        by name: the first entry whose filter is part of the tensor's name,
      - {filter: self_attn, value: [0, 1]}         or that has no filter (or "*"); its value may be a gradient
      - {value: 0.5}

Tensors outside the layers (embeddings, final norm, head) take the first value of a gradient, as in mergekit.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, WithJsonSchema

from solera_core.strict import did_you_mean
from solera_merge.methods.signature import Parameter

__all__ = ["Setting", "evaluate", "filters_of", "gradients_of", "scalars_of"]

Scalar: TypeAlias = bool | int | float | str


def _checked(value: Any) -> Any:
    """The setting itself when it has one of the forms above. Raises ValueError saying which form was expected."""
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and any(isinstance(v, Mapping) for v in value)):
        for entry in [value] if isinstance(value, Mapping) else value:
            _check_conditional(entry)
    else:
        _check_gradient(value)
    return value


def _check_conditional(entry: Any) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f"a list mixes {{filter, value}} entries with the plain value {entry!r}")
    for key in entry:
        if key not in ("filter", "value"):
            raise ValueError(
                f"unknown key {key!r} in a {{filter, value}} entry{did_you_mean(str(key), ('filter', 'value'))}"
            )
    if "value" not in entry:
        raise ValueError(f"a {{filter, value}} entry has no value: {dict(entry)!r}")
    if not isinstance(entry.get("filter", "*"), str | None):
        raise ValueError(f"a filter is a part of a tensor's name, found {entry['filter']!r}")
    _check_gradient(entry["value"])


def _check_gradient(value: Any) -> None:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values:
        raise ValueError("an empty list is no value")
    for scalar in values:
        if not isinstance(scalar, Scalar):
            raise ValueError(f"expected a number, a list of numbers, or {{filter, value}} entries, found {scalar!r}")


Setting = Annotated[
    Any,
    BeforeValidator(_checked),
    WithJsonSchema(
        {
            "$comment": "scalar, gradient (list over the layers), or list of {filter, value}",
            "anyOf": [
                {"type": ["number", "boolean", "string"]},
                {"type": "array", "items": {"type": ["number", "boolean", "string"]}, "minItems": 1},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"filter": {"type": ["string", "null"]}, "value": {}},
                        "required": ["value"],
                        "additionalProperties": False,
                    },
                },
            ],
        }
    ),
]
"""A parameter's value as written in the recipe, of checked form; `evaluate` gives it a meaning."""


def evaluate(setting: Any, parameter: Parameter, tensor: str, t: float) -> Any:
    """The value for one tensor, or None where no filter matches it.

    Args:
        setting: as `Setting`.
        parameter: gives the type; numbers are interpolated, all else takes the entry at or before `t`.
        tensor: name of the tensor.
        t: place of the layer within its slice, 0 to 1.

    Raises:
        ValueError: the value does not fit the parameter; between two whole numbers lies none where one is needed.
    """
    for value in _choices(setting, tensor):
        if not isinstance(value, Sequence) or isinstance(value, str):
            return parameter.validate(value)
        values = [parameter.validate(v) for v in value]
        place = t * (len(values) - 1)
        left = int(place)
        if parameter.kind not in (float, int):
            return values[left]
        right = min(left + 1, len(values) - 1)
        share = place - left
        between = (1 - share) * values[left] + share * values[right]
        if parameter.kind is int:
            if not math.isclose(between, round(between), abs_tol=1e-9):
                raise ValueError(
                    f"a gradient from {values[left]} to {values[right]} gives {between:g}, no whole number"
                )
            between = round(between)
        return parameter.validate(between)
    return None


def scalars_of(setting: Any) -> Iterator[Any]:
    """Every single value that is written in a setting."""
    for entry in _entries(setting):
        value = entry["value"] if isinstance(entry, Mapping) else entry
        if isinstance(value, Sequence) and not isinstance(value, str):
            yield from value
        else:
            yield value


def gradients_of(setting: Any) -> Iterator[Sequence[Any]]:
    """Every gradient that is written in a setting."""
    for entry in _entries(setting):
        value = entry["value"] if isinstance(entry, Mapping) else entry
        if isinstance(value, Sequence) and not isinstance(value, str):
            yield value


def filters_of(setting: Any) -> list[str]:
    """The filters that must match something, in order."""
    filters = [entry.get("filter") for entry in _entries(setting) if isinstance(entry, Mapping)]
    return [f for f in filters if f is not None and f != "*"]


def _entries(setting: Any) -> Sequence[Any]:
    if isinstance(setting, Sequence) and not isinstance(setting, str) and any(isinstance(v, Mapping) for v in setting):
        return setting
    return [setting]


def _choices(setting: Any, tensor: str) -> Iterator[Any]:
    for entry in _entries(setting):
        if not isinstance(entry, Mapping):
            yield entry
        elif entry.get("filter") in (None, "*") or entry["filter"] in tensor:
            yield entry["value"]
