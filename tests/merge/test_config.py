"""The recipe language: what mergekit would ignore is refused here."""

from collections.abc import Callable
from typing import Any

import pytest

from solera_core.errors import ConfigError
from solera_merge.config import MergeConfig

Recipe = Callable[..., MergeConfig]
AB = ["a", "b"]


def test_mergekit_recipes_are_read(recipe: Recipe) -> None:
    config = recipe(
        merge_method="ties",
        base_model="mistralai/Mistral-7B-v0.1",
        models=[
            {"model": "mistralai/Mistral-7B-v0.1"},
            {"model": "a@main", "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}},
            {
                "model": "b+lora",
                "parameters": {"density": 0.33, "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}]},
            },
        ],
        parameters={"normalize": True, "int8_mask": True, "lambda": 0.8},
        dtype="float16",
    )
    assert config.method.name == "ties"
    assert recipe(**config.model_dump(exclude_none=True)) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"merge_method": "dare-ties", "models": AB}, "unknown method 'dare-ties' (did you mean 'dare_ties'?)"),
        ({"merge_method": "evolve", "models": AB}, "(known: "),
        ({"merge_method": "linear", "model": AB}, "model: unknown key (did you mean 'models'?)"),
        ({"merge_method": "linear", "models": AB, "normalise": True}, "normalise: unknown key"),
        ({"merge_method": "linear", "models": []}, "models: list should have at least 1 item"),
        ({"merge_method": "linear"}, "give one of `models`, `slices`, `modules` and `towers`"),
        (
            {"merge_method": "linear", "models": AB, "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]},
            "not models and slices",
        ),
        (
            {"merge_method": "ties", "models": [{"model": "a", "parameters": {"densty": 1}}]},
            "models.0.parameters.densty: ties has no such parameter (did you mean 'density'?)",
        ),
        ({"merge_method": "task_arithmetic", "models": AB, "parameters": {"density": 1}}, "has no such parameter"),
        ({"merge_method": "ties", "models": AB, "parameters": {"density": [0.5, 1.5]}}, "less than or equal to 1"),
        ({"merge_method": "ties", "models": AB, "parameters": {"weight": float("nan")}}, "finite number"),
        ({"merge_method": "ties", "models": AB, "parameters": {"weight": True}}, "must be a number, not True"),
        ({"merge_method": "ties", "models": AB, "parameters": {"normalize": "yes"}}, "must be true or false"),
        ({"merge_method": "ties", "models": AB, "parameters": {"weight": []}}, "an empty list is no value"),
        ({"merge_method": "ties", "models": AB, "parameters": {"weight": None}}, "expected a number"),
        (
            {"merge_method": "ties", "models": AB, "parameters": {"weight": [{"filtre": "mlp", "value": 1}]}},
            "unknown key 'filtre' in a {filter, value} entry (did you mean 'filter'?)",
        ),
        ({"merge_method": "ties", "models": AB, "parameters": {"weight": [{"filter": "mlp"}]}}, "has no value"),
        ({"merge_method": "ties", "models": AB, "parameters": {"weight": [{"value": 1}, 2]}}, "mixes"),
        (
            {"merge_method": "slerp", "models": [{"model": "a", "parameters": {"t": 0.5}}]},
            "t: is shared by all models of slerp",
        ),
        ({"merge_method": "linear", "models": AB, "dtype": "bf16"}, "dtype: input should be 'float32', "),
        (
            {"merge_method": "linear", "models": AB, "modules": {"m": {"models": [{"model": "a"}]}}},
            "not models and modules",
        ),
        ({"merge_method": "linear", "models": AB, "tokenizer_source": "base"}, "needs a base_model"),
        (
            {"merge_method": "linear", "slices": [{"sources": [{"model": "a", "layer_range": [2, 2]}]}]},
            "holds no layer",
        ),
        (
            {
                "merge_method": "linear",
                "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}], "residual_weight": 0.5}],
            },
            "mergekit reads `residual_weight` but never uses it",
        ),
    ],
)
def test_refusals(recipe: Recipe, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(**content)
    assert message in str(caught.value)


def test_all_problems_are_listed_at_once(recipe: Recipe) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(merge_method="ties", models=[{"model": "a", "parameters": {"densty": 1, "weight": "x", "lamda": 1}}])
    assert all(word in str(caught.value) for word in ("densty", "weight", "lamda"))


def test_json_schema_names_the_keys() -> None:
    schema = MergeConfig.model_json_schema()
    assert {"merge_method", "models", "slices", "base_model", "parameters", "dtype"} <= schema["properties"].keys()
