"""Recipes: what is refused and how, what is resolved, in which order stages run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from solera.recipe import load_recipe, parse_recipe
from solera.schema import schema
from solera.stages import KINDS
from solera_core.errors import ConfigError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def tune(model: str, **more: Any) -> dict[str, Any]:
    return {"tune": {"model": model, "data": "x.jsonl", "tokens": "1k", **more}}


def recipe(stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"solera": 1, "stages": stages, **more}


def refused(data: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(data, base_dir=Path(), where="r.yml", **options)
    return str(caught.value)


def test_stages_run_after_what_they_read_otherwise_in_order() -> None:
    merge = {"merge": {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in "ab"]}}
    loaded = parse_recipe(
        recipe({"blend": merge, "b": tune("base"), "a": tune("base")}), base_dir=Path(), where="r.yml"
    )
    assert [s.name for s in loaded.stages] == ["a", "b", "blend"]
    assert loaded.inputs(loaded.stage("blend")) == ("a", "b")
    assert loaded.inputs(loaded.stage("a")) == ()  # `base` is no stage: a checkpoint


def test_variables_are_filled_and_can_be_overridden() -> None:
    data = recipe({"a": tune("${root}/base")}, vars={"root": "here"})
    assert parse_recipe(data, base_dir=Path(), where="r").stage("a").references.models == ("here/base",)
    over = parse_recipe(data, base_dir=Path(), where="r", variables={"root": "there"})
    assert over.stage("a").references.models == ("there/base",)


@pytest.mark.parametrize(
    "data, says",
    [
        ({"stages": {}}, "solera: field required"),
        (recipe({}), "stages: dictionary should have at least 1 item"),
        (recipe({"a": tune("b")}, stage={}), "stage: unknown key (did you mean 'stages'?)"),
        (recipe({"a": {"tun": {}}}), "stages.a: unknown kind of stage 'tun' (did you mean 'tune'?)"),
        (recipe({"a": {"tune": {}, "merge": {}}}), "a stage is one kind with its settings"),
        (recipe({"a": tune("b", tokns="1k")}), "stages.a.tune: tokns: unknown key (did you mean 'tokens'?)"),
        (recipe({"a/b": tune("b")}), "a stage's name is letters, digits, ., - and _"),
        (recipe({"a": tune("b"), "b": tune("a")}), "in a circle: a -> b -> a"),
        (recipe({"a": tune("${rot}/x")}, vars={"root": "."}), "${rot}: no such variable (did you mean 'root'?)"),
        (recipe({"a": tune("b")}, report={"moe": "c"}), "report.moe: 'c' is neither a stage nor evaluated"),
        (
            recipe({"a": tune("b"), "p": {"publish": {"model": "a", "repo": "x/y", "when": "a"}}}),
            "'a' is no eval stage",
        ),
        ([1], "expected a mapping of keys, found list"),
    ],
)
def test_what_is_wrong_is_named(data: Any, says: str) -> None:
    assert says in refused(data)


def test_an_unknown_override_is_refused() -> None:
    assert "no such variable (did you mean 'root'?)" in refused(
        recipe({"a": tune("b")}, vars={"root": "."}), variables={"rot": "x"}
    )


def test_a_publish_stage_needs_a_gate_to_wait_for() -> None:
    suite = {"suite": "s", "tasks": [{"name": "t", "kind": "text", "data": "x.jsonl"}]}
    stages = {
        "v": {"eval": {"models": ["a"], "suites": [suite]}},
        "p": {"publish": {"model": "a", "repo": "x/y", "when": "v"}},
    }
    assert "has no gate" in refused(recipe(stages))


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.yml"
    file.write_text("solera: 1\nseed: 1\nseed: 2\nstages: {}\n")
    with pytest.raises(ConfigError, match=r"r.yml:3: key 'seed' is given twice"):
        load_recipe(file)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.title
    assert loaded.stages


def test_the_schema_describes_the_shipped_recipes() -> None:
    whole = schema("recipe")
    assert whole["properties"]["stages"]["additionalProperties"]["oneOf"]
    known = {kind: set(whole["$defs"][kind]["properties"]) for kind in KINDS}
    for path in RECIPES.glob("*.yml"):
        for node in yaml.safe_load(path.read_text())["stages"].values():
            ((kind, settings),) = node.items()
            assert set(settings) <= known[kind], f"{path.name}: {kind}"


def test_no_schema_for_an_unknown_kind() -> None:
    with pytest.raises(ConfigError, match="did you mean 'suite'"):
        schema("suit")
