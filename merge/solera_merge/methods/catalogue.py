"""Every merge method, one line each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

from solera_merge.block import Formula, Tensor, Unit
from solera_merge.methods.arcee_fusion import arcee_fusion, held_divergences
from solera_merge.methods.breadcrumbs import breadcrumbs, held_inner_search
from solera_merge.methods.breadcrumbs_ties import breadcrumbs_ties
from solera_merge.methods.consensus_ta import consensus_ta
from solera_merge.methods.dare_linear import dare_linear
from solera_merge.methods.dare_ties import dare_ties
from solera_merge.methods.della import check_della, della
from solera_merge.methods.della_linear import della_linear
from solera_merge.methods.iso import iso_c, iso_cts
from solera_merge.methods.karcher import karcher
from solera_merge.methods.linear import linear
from solera_merge.methods.magmax import magmax
from solera_merge.methods.model_stock import model_stock
from solera_merge.methods.multislerp import multislerp
from solera_merge.methods.nearswap import nearswap
from solera_merge.methods.nuslerp import held_along_first, nuslerp
from solera_merge.methods.passthrough import passthrough
from solera_merge.methods.ram import count_model, ram, ramplus, ramplus_tl
from solera_merge.methods.sce import sce
from solera_merge.methods.signature import Parameter, parameters_of
from solera_merge.methods.slerp import slerp
from solera_merge.methods.task_arithmetic import task_arithmetic
from solera_merge.methods.ties import ties
from solera_merge.methods.tsv_m import tsv_m
from solera_merge.scope import check_rescale, survey
from solera_merge.selection import Each
from solera_merge.singular import unit_of

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """A merge method and what it asks of a recipe.

    Attributes:
        name: as in a recipe.
        function: tensor and parameters -> formula; its keyword-only parameters are the schema.
        base: `required`: the base takes part in the formula and is no model; `optional`: so it does where the recipe
            names one; `unused`: it is a model like any other.
        most_models: besides the base; None: any number.
        reference: arXiv id, or where the method comes from.
        fewest_models: besides the base.
        unit: what the formula must see in one block; see `solera_merge.block.Unit`. A function where it depends on the
            tensor: (name, shape) -> unit.
        normalizes: the weights are divided by their sum always, not only when `normalize` says so.
        survey: for quantities over all tensors of the model: (every tensor, the parameters of each, how to go over
            them) -> for every tensor what `function` gets as second argument. None: the method needs no such thing.
        held: (shape, parameters) -> bytes that the method holds besides blocks and one search a model.
        check: raises ValueError where the resolved parameters of a tensor, each valid, are impossible together.
    """

    name: str
    function: Callable[..., Formula]
    base: Literal["required", "optional", "unused"]
    most_models: int | None
    reference: str
    fewest_models: int = 1
    unit: Unit | Callable[[str, tuple[int, ...]], Unit] = "elements"
    normalizes: bool = False
    survey: Callable[[Sequence[Tensor], Sequence[Mapping[str, Any]], Each], Sequence[Any]] | None = None
    held: Callable[[tuple[int, ...], Mapping[str, Any]], int] = lambda _shape, _parameters: 0
    check: Callable[[Mapping[str, Any]], None] | None = None

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """By name in a recipe."""
        return MappingProxyType(parameters_of(self.function))

    def keywords(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values by the names of a recipe, as keyword arguments of `function`."""
        return {self.parameters[name].keyword: value for name, value in values.items()}

    def unit_of(self, name: str, shape: tuple[int, ...]) -> Unit:
        """What the formula must see in one block of the tensor `name`."""
        return self.unit(name, shape) if callable(self.unit) else self.unit


_ALL = (
    Method("linear", linear, "unused", None, "arXiv 2203.05482"),
    Method("slerp", slerp, "required", 1, "Shoemake 1985"),
    Method("task_arithmetic", task_arithmetic, "required", None, "arXiv 2212.04089"),
    Method("ties", ties, "required", None, "arXiv 2306.01708", survey=survey, check=check_rescale),
    Method("dare_ties", dare_ties, "required", None, "arXiv 2311.03099"),
    Method("passthrough", passthrough, "unused", 1, "a copy"),
    Method(
        "nuslerp",
        nuslerp,
        "optional",
        2,
        "Shoemake 1985",
        fewest_models=2,
        unit="rows",
        normalizes=True,
        held=held_along_first,
    ),
    Method("multislerp", multislerp, "optional", None, "goddard.blog/posts/multislerp-wow-what-a-cool-idea"),
    Method("karcher", karcher, "unused", None, "arXiv 2603.04972", normalizes=True),
    Method("model_stock", model_stock, "required", None, "arXiv 2403.19522", fewest_models=2, unit="rows"),
    Method("nearswap", nearswap, "required", 1, "huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"),
    Method("arcee_fusion", arcee_fusion, "required", 1, "arcee.ai", unit="rows", held=held_divergences),
    Method("magmax", magmax, "required", None, "arXiv 2407.06322"),
    Method("ram", ram, "required", None, "arXiv 2601.13572"),
    Method("ramplus_tl", ramplus_tl, "required", None, "arXiv 2601.13572"),
    Method("ramplus", ramplus, "required", None, "arXiv 2601.13572", survey=count_model),
    Method("consensus_ta", consensus_ta, "required", None, "arXiv 2405.07813", fewest_models=2),
    Method("tsv_m", tsv_m, "required", None, "arXiv 2412.00081", unit=unit_of),
    Method("iso_c", iso_c, "required", None, "arXiv 2502.04959", unit=unit_of),
    Method("iso_cts", iso_cts, "required", None, "arXiv 2502.04959", unit=unit_of),
    Method("dare_linear", dare_linear, "required", None, "arXiv 2311.03099"),
    Method(
        "breadcrumbs",
        breadcrumbs,
        "required",
        None,
        "arXiv 2312.06795",
        survey=survey,
        held=held_inner_search,
        check=check_rescale,
    ),
    Method(
        "breadcrumbs_ties",
        breadcrumbs_ties,
        "required",
        None,
        "arXiv 2312.06795",
        survey=survey,
        held=held_inner_search,
        check=check_rescale,
    ),
    Method("della", della, "required", None, "arXiv 2406.11617", unit="rows", check=check_della),
    Method("della_linear", della_linear, "required", None, "arXiv 2406.11617", unit="rows", check=check_della),
    Method("sce", sce, "required", None, "arXiv 2408.07990", fewest_models=2),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
