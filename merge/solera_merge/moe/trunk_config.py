"""What `trunk:` may say, and the merges that it stands for."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final

from pydantic import Discriminator, Tag

from solera_core.strict import Strict, did_you_mean, parse
from solera_merge.config import MergeConfig
from solera_merge.methods.catalogue import METHODS

__all__ = ["KEYWORDS", "SCALES", "Trunk", "TrunkMerge", "candidates", "named_models", "trunk_problems"]

KEYWORDS: Final = ("base", "average", "auto")
"""What `trunk` may say besides the name of an expert and a merge; no expert may be called so."""

SCALES: Final = (0.2, 0.3, 0.4, 0.6, 1.0)
"""Weights of every task vector that `auto` tries: from the average of three (1/3 each) and below it to their sum."""


class TrunkMerge(Strict):
    """A trunk that is merged.

    Attributes:
        merge: any recipe of `solera merge` whose result has the shape of the base. Its models may be called by the
            names of the experts, and `base`; without `models` all experts are taken.
    """

    merge: MergeConfig


Trunk = Annotated[
    Annotated[str, Tag("(name)")] | Annotated[TrunkMerge, Tag("(recipe)")],
    Discriminator(lambda value: "(name)" if isinstance(value, str) else "(recipe)"),
]


def named_models(trunk: Any, base_model: Any, experts: Any) -> Any:
    """`trunk: {merge: ...}` with the names of experts, and `base`, replaced by the models they stand for."""
    if not (isinstance(trunk, Mapping) and isinstance(trunk.get("merge"), Mapping) and isinstance(experts, list)):
        return trunk
    models = {e["name"]: e.get("model") for e in experts if isinstance(e, Mapping) and isinstance(e.get("name"), str)}
    models = {**models, "base": base_model}

    def named(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {k: named(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [named(item, key) for item in value]
        return models.get(value, value) if key in ("model", "base_model") and isinstance(value, str) else value

    recipe: dict[str, Any] = named(trunk["merge"])
    if not any(key in recipe for key in ("models", "slices", "modules", "towers")):
        recipe["models"] = [{"model": model} for name, model in models.items() if name != "base"]
    method = METHODS.get(str(recipe.get("merge_method")))
    if method is not None and method.base == "required":
        recipe.setdefault("base_model", base_model)
    return {**trunk, "merge": recipe}


def trunk_problems(trunk: str | TrunkMerge, names: Iterable[str], *, has_text: bool) -> list[str]:
    """What is wrong with it."""
    names = list(names)
    taken = [name for name in names if name in KEYWORDS]
    problems = [f"experts: {name!r} is a word of `trunk`; call this expert otherwise" for name in taken]
    if isinstance(trunk, str) and trunk not in (*KEYWORDS, *names):
        problems.append(
            f"trunk: {trunk!r} is no expert{did_you_mean(trunk, (*KEYWORDS, *names))}; write base, average, auto, the "
            "name of an expert, or {merge: {...}}. (The model that the experts were tuned from goes into base_model)"
        )
    if trunk == "auto" and not has_text:
        problems.append("trunk: auto compares trunks on held-out text; give router.data, or choose a trunk")
    return problems


def candidates(
    trunk: str | TrunkMerge, base_model: str | None, experts: Iterable[str]
) -> dict[str, MergeConfig | None]:
    """The trunks to be compared (or the only one), simplest first: by name the recipe of the merge; None: no merge."""
    models = list(experts)
    if isinstance(trunk, TrunkMerge):
        return {"merge": trunk.merge}
    if base_model is None or trunk not in ("average", "auto"):  # (of a MoE that is extended the trunk stays)
        return {trunk: None}
    # The average is written as that of the task vectors, which is the same: so config and tokenizer are the base's.
    found: dict[str, MergeConfig | None] = {"base": None}
    found["average"] = _task_arithmetic(base_model, models, weight=1, normalize=True)
    for scale in SCALES:
        found[f"task_arithmetic {scale:g}"] = _task_arithmetic(base_model, models, weight=scale)
    return found if trunk == "auto" else {trunk: found[trunk]}


def _task_arithmetic(base_model: str, models: Iterable[str], **parameters: Any) -> MergeConfig:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base_model,
        "models": [{"model": model} for model in models],
        "parameters": parameters,
    }
    return parse(MergeConfig, recipe, where="trunk")
