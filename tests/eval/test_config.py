from typing import Any

import pytest

from solera_core.errors import ConfigError
from solera_core.strict import parse
from solera_eval.config import EvalConfig, GatePolicy, Margins, SuiteConfig, model_name

TEXT = {"name": "t", "kind": "text", "data": "x.jsonl"}
SUITE = {"suite": "s", "tasks": [TEXT]}


def refused(model: Any, data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(model, data, where="here")
    return str(caught.value)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"name": "t", "kind": "txt", "data": "x"}, "kind: unknown kind 'txt' (did you mean 'text'?)"),
        ({"name": "t", "data": "x"}, "kind"),
        ({**TEXT, "windw_tokens": 3}, "did you mean 'window_tokens'"),
        ({**TEXT, "limit": 0}, "limit"),
        ({"name": "t", "kind": "generate", "data": "x", "extract": "("}, "not a regular expression"),
        ({"name": "t", "kind": "generate", "data": "x", "stop": [""]}, "stop"),
        ({"name": "t", "kind": "choice", "data": "x", "normalise": "words"}, "normalise"),
        ({"name": "", "kind": "text", "data": "x"}, "name"),
    ],
)
def test_a_wrong_task_is_refused_with_its_key(task: dict[str, Any], said: str) -> None:
    message = refused(SuiteConfig, {"suite": "s", "tasks": [task]})
    assert message.startswith("here: ")
    assert said in message


def test_task_names_are_unique_and_present() -> None:
    assert "task given twice: t" in refused(SuiteConfig, {"suite": "s", "tasks": [TEXT, TEXT]})
    assert "tasks" in refused(SuiteConfig, {"suite": "s", "tasks": []})


def test_a_bare_margin_is_a_drop_and_a_ratio() -> None:
    policy = parse(GatePolicy, {"margin": 0.02}, where="p")
    assert policy.margin == Margins(accuracy=0.02, perplexity=1.02)
    assert policy.margin.of("exact_match") == 0.02


def test_margins_by_metric_keep_the_defaults_of_the_others() -> None:
    policy = parse(GatePolicy, {"margin": {"accuracy": 0.01}}, where="p")
    assert (policy.margin.of("accuracy"), policy.margin.of("exact_match"), policy.margin.of("perplexity")) == (
        0.01,
        0.01,
        1.05,
    )


@pytest.mark.parametrize(
    "margin",
    [0, -0.1, 1, 5, {"accuracy": 0}, {"accuracy": 1.5}, {"perplexity": 1}, {"perplexity": 0.95}, {"perplexity": -2}],
)
def test_an_absurd_margin_is_refused(margin: Any) -> None:
    assert "margin" in refused(GatePolicy, {"margin": margin})


@pytest.mark.parametrize(
    "policy",
    [{"confidence": 0.5}, {"confidence": 1}, {"minimum_items": 1}, {"tasks": {"t": {"tier": "minor"}}}, {"margins": 1}],
)
def test_an_impossible_policy_is_refused(policy: dict[str, Any]) -> None:
    assert "here: " in refused(GatePolicy, policy)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"suites": [SUITE]}, "either `model` or `models`"),
        ({"model": "a", "models": ["b"], "suites": [SUITE]}, "either `model` or `models`"),
        ({"model": "a", "suites": []}, "suites"),
        ({"models": ["x/a", "y/a"], "suites": [SUITE]}, "model name given twice: a"),
        ({"models": {"../a": "x"}, "suites": [SUITE]}, "cannot name a result directory"),
        ({"models": {"run.json": "x"}, "suites": [SUITE]}, "cannot name a result directory"),
        ({"model": "a", "suites": [SUITE], "gate": {"candidate": "a", "baseline": "a"}}, "a gate compares two models"),
        ({"models": ["a", "b"], "suites": [SUITE], "gate": {"candidate": "a"}}, "gate.baseline: name one"),
        (
            {"models": ["a"], "suites": [SUITE], "gate": {"candidate": "c", "baseline": "a"}},
            "'c' is none of the models",
        ),
        ({"model": "a", "suites": [{"suite": "s"}]}, "tasks"),
        ({"model": "a", "suites": [SUITE], "dtype": "int8"}, "dtype"),
    ],
)
def test_an_inconsistent_evaluation_is_refused(config: dict[str, Any], said: str) -> None:
    assert said in refused(EvalConfig, config)


def test_models_are_named_by_their_last_part_and_found_by_either() -> None:
    config = parse(EvalConfig, {"models": ["org/one@main", "runs/two/"], "suites": ["a.yml", SUITE]}, where="e")
    assert config.named_models() == {"one": "org/one@main", "two": "runs/two/"}
    assert (config.resolve("one"), config.resolve("runs/two/"), config.resolve("three")) == ("one", "two", None)
    assert model_name("student") == "student"


def test_the_schemas_render_and_offer_the_short_forms() -> None:
    margin = GatePolicy.model_json_schema()["properties"]["margin"]
    assert {"type": "number"} in margin["anyOf"]
    assert "suites" in EvalConfig.model_json_schema()["properties"]
