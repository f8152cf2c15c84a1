"""The rows of a plan for a person: one for all layers that are made alike, not one a tensor."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from solera_core.places import place_of

__all__ = ["by_layers"]

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")


def by_layers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join the rows of the same kind of tensor in consecutive layers, where only layer numbers and figures differ.

    `model.layers.0-15.mlp.up_proj.weight` from `chat:model.layers.8-23.mlp.up_proj.weight`; figures that differ are
    given from the first layer's to the last's.

    Args:
        rows: each with a `tensor`, in the order of the output.
    """
    runs: list[list[Mapping[str, Any]]] = []
    last: dict[str, int] = {}  # the latest run of every kind
    for row in rows:
        layer = place_of(str(row["tensor"])).layer
        kind = _NUMBER.sub("#", str(row["tensor"]), count=1)
        at = last.get(kind)
        if at is not None and layer is not None and _follows(runs[at][-1], row, layer):
            runs[at].append(row)
        else:
            last[kind] = len(runs)
            runs.append([row])
    return [_joined(run) for run in runs]


def _follows(before: Mapping[str, Any], row: Mapping[str, Any], layer: int) -> bool:
    previous = place_of(str(before["tensor"])).layer
    if previous is None or previous + 1 != layer:
        return False
    return all(_alike(_form(before[k], previous), _form(row[k], layer)) for k in row if k != "tensor")


def _form(value: Any, layer: int) -> Any:
    """Names of tensors with their first number relative to the layer's."""
    if not isinstance(value, str):
        return value
    parts = value.split(", ")
    return ", ".join(_NUMBER.sub(lambda match: f"{int(match[1]) - layer:+d}", part, count=1) for part in parts)


def _alike(a: Any, b: Any) -> bool:
    return a == b or (_figures(a) is not None and _figures(b) is not None)


def _figures(value: Any) -> list[float] | None:
    """The numbers of `0.5` or `0.5, 1`; None for anything else."""
    if isinstance(value, bool) or value == "":
        return None
    try:
        return [float(part) for part in str(value).split(",")]
    except ValueError:
        return None


def _joined(run: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, last = run[0], run[-1]
    return {key: _span(first[key], last[key], [row[key] for row in run]) for key in first}


def _span(first: Any, last: Any, values: Sequence[Any]) -> Any:
    if all(value == first for value in values):
        return _short(first)
    if _figures(first) is not None:
        return f"{_short(first)} ... {_short(last)}"
    parts = zip(str(first).split(", "), str(last).split(", "), strict=True)
    return ", ".join(a if a == b else _range(a, b) for a, b in parts)


def _range(first: str, last: str) -> str:
    numbers = _NUMBER.search(first), _NUMBER.search(last)
    if numbers[0] is None or numbers[1] is None:
        return f"{first} ... {last}"
    return _NUMBER.sub(f"{numbers[0][1]}-{numbers[1][1]}", first, count=1)


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
