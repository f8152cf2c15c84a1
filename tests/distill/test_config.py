"""The recipes: what is accepted, what is refused, and with which words."""

from typing import Any

import pytest

from solera_core.errors import ConfigError
from solera_core.strict import parse
from solera_core.tokens import parse_tokens
from solera_distill.config import DistillConfig, InitConfig, TuneConfig

TUNE: dict[str, Any] = {"model": "base", "data": "a.jsonl", "tokens": "2M"}
DISTILL: dict[str, Any] = {"teachers": [{"model": "t"}], "student": {"from": "s"}, "data": "a.jsonl", "tokens": 1000}


@pytest.mark.parametrize(
    "written, tokens", [("300k", 300_000), ("2M", 2_000_000), ("1.5M", 1_500_000), ("1B", 10**9), (7, 7), ("12", 12)]
)
def test_token_counts(written: str | int, tokens: int) -> None:
    assert parse_tokens(written) == tokens


@pytest.mark.parametrize("written", ["", "2X", "-3", 0, "0k", 1.5, "1.0001k", True, None, "inf", float("inf")])
def test_what_is_no_token_count(written: Any) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        parse(TuneConfig, {**TUNE, "tokens": written}, where="r.yml")


@pytest.mark.parametrize(
    "data, expected",
    [
        ("a.jsonl", [("a.jsonl", None)]),
        ({"path": "a.jsonl", "domain": "x"}, [("a.jsonl", "x")]),
        (["a.jsonl", {"path": "b.txt"}], [("a.jsonl", None), ("b.txt", None)]),
        ({"math": "a.jsonl", "code": ["b.jsonl", {"path": "c.jsonl"}]},
         [("a.jsonl", "math"), ("b.jsonl", "code"), ("c.jsonl", "code")]),
    ],
)  # fmt: skip
def test_ways_to_write_data(data: Any, expected: list[tuple[str, str | None]]) -> None:
    config = parse(TuneConfig, {**TUNE, "data": data, "eval_data": data}, where="r.yml")
    assert [(s.path, s.domain) for s in config.data] == expected
    assert config.eval_data == config.data


def test_the_resolved_recipe_is_a_recipe_again() -> None:
    config = parse(DistillConfig, {**DISTILL, "student": {"from": "s", "layer_drop": {"ratio": 0.5}}}, where="r.yml")
    assert parse(DistillConfig, config.model_dump(mode="json", by_alias=True), where="again") == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"token": "2M"}, "unknown key.*did you mean 'tokens'"),
        ({"lr": 0}, "lr: .*greater than 0"),
        ({"lr": float("nan")}, "lr"),
        ({"schedule": "cosin"}, "schedule"),
        ({"parts": ["ffn", "atention"]}, "parts"),
        ({"parts": []}, "nothing would train"),
        ({"parts": ["ffn"], "lr_parts": {"norms": 0.1}}, "norms would not train"),
        ({"lr_parts": {"norm": 0.1}}, "lr_parts"),
        ({"data": []}, "at least one source"),
        ({"data": {"math": {"path": "a", "domain": "code"}}}, "math: its source says domain 'code'"),
        ({"sequence_tokens": 1}, "sequence_tokens"),
        ({"warmup": 1.0}, "warmup"),
    ],
)
def test_refused_tune_recipes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(TuneConfig, {**TUNE, **change}, where="r.yml")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"teachers": []}, "teachers"),
        ({"teachers": [{"model": "a", "domain": "x"}, {"model": "b", "domain": "x"}]}, "2 teachers teach domain 'x'"),
        ({"teachers": [{"model": "a"}, {"model": "b"}]}, "2 teachers have no domain"),
        ({"student": {"from_": "s"}}, "student"),
        ({"student": {"from": "s", "layer_drop": {}}}, "exactly one of layers, ratio and keep"),
        ({"student": {"from": "s", "layer_drop": {"layers": 2, "ratio": 0.5}}}, "exactly one"),
        ({"student": {"from": "s", "layer_drop": {"layers": 1}}}, "layers: 1 is too few: .* at least 2"),
        ({"student": {"from": "s", "layer_drop": {"keep": [1, 0]}}}, "ascending"),
        ({"student": {"from": "s", "layer_drop": {"ratio": 1.0}}}, "ratio"),
        ({"objective": {"kl": 0}}, "nothing to learn"),
        ({"objective": {"temperature": 0}}, "temperature"),
        ({"objective": {"kd": 1}}, "unknown key"),
    ],
)
def test_refused_distill_recipes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(DistillConfig, {**DISTILL, **change}, where="r.yml")


def test_init_recipe() -> None:
    config = parse(InitConfig, {"config": {"hidden_size": 8}, "tokenizer": {"data": "a.txt"}}, where="r.yml")
    assert (config.architecture, config.tokenizer.vocab_size, config.dtype) == ("llama", 1024, "float32")
    with pytest.raises(ConfigError, match="vocab_size"):
        parse(InitConfig, {"tokenizer": {"data": "a.txt", "vocab_size": 200}}, where="r.yml")


@pytest.mark.parametrize("model", [TuneConfig, DistillConfig, InitConfig])
def test_recipes_have_a_schema_for_editors(model: Any) -> None:
    schema = model.model_json_schema()
    assert schema["additionalProperties"] is False
    if model is TuneConfig:
        assert {"type": "string"} in schema["properties"]["tokens"]["anyOf"]
        assert {"type": "string"} in schema["properties"]["data"]["anyOf"]
