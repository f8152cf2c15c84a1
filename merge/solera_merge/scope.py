"""Where a density counts: in every tensor, or in the whole model.

With `scope: model` one threshold runs through the whole task vector of a model, as in the TIES paper: a tensor that
changed little in training may lose all its changes. With `scope: tensor`, as in mergekit, every tensor keeps the same
share.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from solera_merge.block import Tensor
from solera_merge.selection import Band, Each, bands, one_after_another

__all__ = ["SHARED_OVER_MODEL", "Scope", "check_rescale", "survey"]

Scope: TypeAlias = Literal["tensor", "model"]

SHARED_OVER_MODEL = ("density", "gamma")
"""Parameters that have one value a model where the scope is the model."""


def check_rescale(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for `rescale` with one threshold for the whole model.

    A tensor that has nearly nothing above that threshold would have what is left blown up without bound.
    """
    if parameters["rescale"] and parameters["scope"] == "model":
        raise ValueError(
            "`rescale` gives every tensor the norm of its own task vector, which `scope: model` is meant to let go: "
            "leave one of the two out"
        )


def survey(
    tensors: Sequence[Tensor], parameters: Sequence[Mapping[str, Any]], each: Each = one_after_another
) -> list[list[Band] | None]:
    """For every tensor with `scope: model` what its models keep, a band a model; None for the others.

    The task vector of a model consists of its parts in all tensors with `scope: model`, in the given order. Of the
    deltas with just the threshold's magnitude the first are kept, by (place of the tensor, flat index).

    Raises:
        ValueError: a model has several densities (or gammas) though one threshold is to serve all its tensors.
    """
    chosen = [i for i, values in enumerate(parameters) if values["scope"] == "model"]
    if not chosen:
        return [None] * len(tensors)
    models = sorted({model for i in chosen for model in tensors[i].model_ids})
    places = [tuple(_place(tensors[i], model) for i in chosen) for model in models]
    densities, gammas = (
        [_shared(name, where, [parameters[i] for i in chosen]) for where in places] for name in SHARED_OVER_MODEL
    )
    found = bands([tensors[i] for i in chosen], places, densities, gammas, each)
    kept: list[list[Band] | None] = [None] * len(tensors)
    for t, i in enumerate(chosen):
        kept[i] = [found[models.index(model)][t] for model in tensors[i].model_ids]
    return kept


def _place(tensor: Tensor, model: int) -> int | None:
    return tensor.model_ids.index(model) if model in tensor.model_ids else None


def _shared(name: str, places: Sequence[int | None], parameters: Sequence[Mapping[str, Any]]) -> float:
    """The one value that a model has for `name` in all its tensors; 0 where the method has no such parameter."""
    values = {p[name][i] if name in p else 0.0 for i, p in zip(places, parameters, strict=True) if i is not None}
    if len(values) > 1:
        raise ValueError(f"scope: model needs one `{name}` for all tensors of a model, found {sorted(values)}")
    return values.pop()
