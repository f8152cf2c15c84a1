"""JSON Schema of everything a person writes."""

from typing import Any

from solera.stages import KINDS, stage_config
from solera_core.errors import ConfigError
from solera_core.strict import Strict, did_you_mean

__all__ = ["schema"]


def schema(kind: str) -> dict[str, Any]:
    """The schema of `recipe`, `suite`, `policy` or one kind of stage.

    Raises:
        ConfigError: no such kind.
    """
    if kind == "recipe":
        return _recipe_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_model(kind).model_json_schema(by_alias=True)}


def _model(kind: str) -> type[Strict]:
    if kind in KINDS:
        return stage_config(kind)
    from solera_eval.config import GatePolicy, SuiteConfig

    models: dict[str, type[Strict]] = {"suite": SuiteConfig, "policy": GatePolicy}
    if kind not in models:
        raise ConfigError(f"no schema for {kind!r}{did_you_mean(kind, ['recipe', *models, *KINDS])}")
    return models[kind]


def _recipe_schema() -> dict[str, Any]:
    """A recipe's stages are one of the kinds; their definitions are gathered under $defs."""
    from solera.recipe import RecipeFile

    whole = RecipeFile.model_json_schema(by_alias=True)
    definitions: dict[str, Any] = whole.setdefault("$defs", {})
    options: list[dict[str, Any]] = []
    for kind in KINDS:
        part = stage_config(kind).model_json_schema(by_alias=True, ref_template="#/$defs/" + kind + ".{model}")
        for name, definition in part.pop("$defs", {}).items():
            definitions[f"{kind}.{name}"] = definition
        definitions[kind] = part
        options.append(
            {
                "type": "object",
                "properties": {kind: {"$ref": f"#/$defs/{kind}"}},
                "required": [kind],
                "additionalProperties": False,
            }
        )
    whole["properties"]["stages"]["additionalProperties"] = {"oneOf": options}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}
