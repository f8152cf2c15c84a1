"""The signature is the schema: what a method takes is read off its keyword-only parameters.

    def ties(tensor: Tensor, *, weight: PerModel[Finite], density: PerModel[Fraction] = (1.0,), lambda_: Finite = 1.0)

A `PerModel` parameter has one value a model (the base left out); a one-element default stands for every model. Any
other is shared by all models. A trailing underscore is not part of the name (`lambda_` is `lambda` in a recipe).
"""

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

__all__ = ["REQUIRED", "Finite", "Fraction", "NonNegative", "Parameter", "PerModel", "parameters_of"]

T = TypeVar("T")
PerModel: TypeAlias = tuple[T, ...]
Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Fraction: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: as in a recipe.
        keyword: as in the signature.
        per_model: one value a model, else one for all.
        kind: `float`, `int`, `bool` or `str`.
        default: one value, or `REQUIRED`.
        adapter: checks one value.
    """

    name: str
    keyword: str
    per_model: bool
    kind: type
    default: Any
    adapter: TypeAdapter[Any]

    def validate(self, value: Any) -> Any:
        """One checked value. Raises ValueError saying what is wrong with it."""
        if isinstance(value, bool) != (self.kind is bool):
            wanted = {bool: "true or false", str: "a word"}.get(self.kind, "a number")
            raise ValueError(f"`{self.name}` must be {wanted}, not {value!r}")
        try:
            return self.adapter.validate_python(value)
        except ValidationError as e:
            raise ValueError(f"`{self.name}`: {e.errors()[0]['msg'].lower()}, not {value!r}") from e


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of a method by their names in a recipe."""
    hints = typing.get_type_hints(function, include_extras=True)
    found: dict[str, Parameter] = {}
    for keyword, argument in inspect.signature(function).parameters.items():
        if argument.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints[keyword]
        per_model = typing.get_origin(hint) is tuple
        item = typing.get_args(hint)[0] if per_model else hint
        default: Any = REQUIRED
        if argument.default is not inspect.Parameter.empty:
            default = argument.default[0] if per_model else argument.default
        kind = typing.get_args(item)[0] if typing.get_origin(item) is Annotated else item
        if typing.get_origin(kind) is Literal:
            kind = str
        found[keyword.rstrip("_")] = Parameter(
            keyword.rstrip("_"), keyword, per_model, kind, default, TypeAdapter(item)
        )
    return found
