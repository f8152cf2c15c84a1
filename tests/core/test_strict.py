"""The door: every wrong key or value is named with its path, and a near word is suggested."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, field_validator, model_validator

from solera_core.errors import ConfigError
from solera_core.strict import Strict, did_you_mean, load_yaml, parse


class Inner(Strict):
    density: float = Field(default=1.0, ge=0, le=1)


class Outer(Strict):
    merge_method: str
    parameters: Inner = Inner()
    models: list[Inner] = Field(default_factory=list[Inner])
    by_name: dict[str, Inner] = Field(default_factory=dict[str, Inner])
    step: int = Field(default=1, alias="step-size")

    @field_validator("merge_method")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "ties":
            raise ValueError(f"unknown method {value!r}{did_you_mean(value, ['ties'])}")
        return value


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "r.yml: merge_method: field required"),
    ({"merge_method": "tise"}, r"r.yml: merge_method: unknown method 'tise' \(did you mean 'ties'\?\)"),
    ({"merge_method": "ties", "paramters": {}}, r"r.yml: paramters: unknown key \(did you mean 'parameters'\?\)"),
    (
        {"merge_method": "ties", "xyz": 1},
        r"xyz: unknown key \(known: by_name, merge_method, models, parameters, step-size\)",
    ),
    (
        {"merge_method": "ties", "parameters": {"densty": 1}},
        r"parameters\.densty: unknown key \(did you mean 'density'\?\)",
    ),
    (
        {"merge_method": "ties", "models": [{}, {"densty": 1}]},
        r"models\.1\.densty: unknown key \(did you mean 'density'\?\)",
    ),
    (
        {"merge_method": "ties", "by_name": {"a": {"densty": 1}}},
        r"by_name\.a\.densty: unknown key \(did you mean 'density'\?\)",
    ),
    (
        {"merge_method": "ties", "parameters": {"density": 2}},
        r"parameters\.density: .*less than or equal to 1 \(given: 2\)",
    ),
    ({"merge_method": "ties", "step-size": "a"}, r"step-size: .*valid integer.*\(given: 'a'\)"),
]


@pytest.mark.parametrize(("data", "message"), WRONG)
def test_wrong_input_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Outer, data, where="r.yml")


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, {"merge_method": "tise", "paramters": 1, "step-size": "a"}, where="r.yml")
    assert len(str(caught.value).splitlines()) == 4  # `parameters` was meant, and cannot be 1


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_not_a_mapping(data: Any) -> None:
    with pytest.raises(ConfigError, match=r"r.yml: expected a mapping of keys"):
        parse(Outer, data, where="r.yml")


def test_right_input_is_frozen() -> None:
    found = parse(Outer, {"merge_method": "ties", "step-size": 3}, where="r.yml")
    assert (found.step, found.parameters.density) == (3, 1.0)
    with pytest.raises(ValueError, match="frozen"):
        setattr(found, "step", 4)  # noqa: B010  # an assignment that type checkers would refuse


def test_yaml(tmp_path: Path) -> None:
    file = tmp_path / "r.yml"
    file.write_text("a: [1, 2.5, x]\nb: {c: null}\n")
    assert load_yaml(file) == {"a": [1, 2.5, "x"], "b": {"c": None}}
    file.write_text('{"a": 1}')
    assert load_yaml(file) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"r\.yml:3: key 'a' is given twice"),
        ("x:\n  a: 1\n  a: 1\n", r"r\.yml:3: key 'a' is given twice"),
        ("a: [1\n", r"r\.yml: not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "holds 2 documents"),
    ],
)
def test_bad_yaml(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_yaml(file)


def test_yaml_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_yaml(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_yaml(tmp_path)
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_yaml(tmp_path / "x")


def test_suggestions() -> None:
    assert did_you_mean("densty", ["density", "weight"]) == " (did you mean 'density'?)"
    assert did_you_mean("zzz", ["b", "a"]) == " (known: a, b)"
    assert did_you_mean("zzz", []) == ""


class _Circle(Strict):
    kind: Literal["circle"]
    radius: int = 1


class _Square(Strict):
    kind: Literal["square"]
    side: int = 1


class _Drawing(Strict):
    shapes: list[Annotated[_Circle | _Square, Field(discriminator="kind")]]


def test_inside_a_union_the_keys_of_the_tagged_model_are_suggested() -> None:
    with pytest.raises(ConfigError, match=r"shapes.0.square.sid: unknown key \(did you mean 'side'\?\)"):
        parse(_Drawing, {"shapes": [{"kind": "square", "sid": 2}]}, where="r.yml")


class Cat(Strict):
    kind: Literal["cat"]
    lives: int = 9


class Dog(Strict):
    kind: Literal["dog"]


class Zoo(Strict):
    animals: list[Annotated[Cat | Dog, Field(discriminator="kind")]]


def test_an_unknown_kind_is_named_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"r: animals\.0\.kind: unknown kind 'cta' \(did you mean 'cat'\?\)"):
        parse(Zoo, {"animals": [{"kind": "cta"}]}, where="r")
    with pytest.raises(ConfigError, match=r"r: animals\.0\.kind: is missing"):
        parse(Zoo, {"animals": [{"lives": 1}]}, where="r")


def test_unknown_keys_come_first() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Zoo, {"animal": []}, where="r")
    assert str(caught.value).splitlines() == [
        "r: animal: unknown key (did you mean 'animals'?)",
        "r: animals: field required",
    ]


@pytest.mark.parametrize("text", ["a: b\0c", "day: 2026-13-45", "a: [", "[" * 5000])
def test_text_that_is_no_yaml(text: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"r\.yml: not valid YAML: "):
        load_yaml(file)


def test_an_unknown_key_does_not_hide_what_is_wrong_with_the_whole() -> None:
    class Whole(Strict):
        low: int = 0
        high: int = 1

        @model_validator(mode="after")
        def _ordered(self) -> "Whole":
            if self.low > self.high:
                raise ValueError("low: is above high")
            return self

    data = {"low": 5, "colour": 9}
    with pytest.raises(ConfigError) as caught:
        parse(Whole, data, where="r.yml")
    assert str(caught.value).splitlines() == [
        "r.yml: colour: unknown key (known: high, low)",
        "r.yml: low: is above high",
    ]
    assert data == {"low": 5, "colour": 9}


def test_what_is_wrong_in_one_place_does_not_hide_what_is_wrong_elsewhere() -> None:
    """An empty list, a value of the wrong kind and a misspelt key each keep pydantic from looking at the whole."""
    from solera_merge.config import MergeConfig

    def problems(**content: object) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            parse(MergeConfig, {"merge_method": "ties", **content}, where="r")
        return [line.removeprefix("r: ")[:33] for line in str(caught.value).splitlines()]

    assert problems(models=[], parameters={"densty": 1, "weight": "x"}) == [
        "models: list should have at least",
        "parameters.densty: ties has no su",
        "parameters.weight: `weight`: inpu",
    ]
    models = [{"model": "a", "parameters": {"densty": 1}}, {"modl": "b", "parameters": {"gama": 1}}]
    assert problems(models=models, dtype="float8", tokenizer_source="base") == [
        "models.1.modl: unknown key (did y",
        "models.1.model: field required",
        "dtype: input should be 'float32',",
        "tokenizer_source: `base` needs a ",
        "models.0.parameters.densty: ties ",
        "models.1.parameters.gama: ties ha",
    ]
    slices = [{"sources": []}, {"sources": [{"model": "a", "layer_range": [3, 1], "parameters": {"zz": 1}}]}]
    assert problems(slices=slices, parameters={"normalise": True}) == [
        "slices.0.sources: list should hav",
        "slices.1.sources.0.layer_range: l",
        "parameters.normalise: ties has no",
    ]
