"""The settings: what is refused at the door, and how."""

import re
from pathlib import Path
from typing import Any

import pytest

from solera_core.errors import ConfigError
from solera_core.strict import Strict, parse
from solera_merge.moe.config import Healing, MoeConfig, RouterConfig, RouterTraining

EXPERTS = [{"name": "math", "model": "m"}, {"name": "code", "model": "c"}]
DATA = {"math": "math.jsonl", "code": [{"path": "code.jsonl", "limit": 5}, "more.txt"]}


def moe(**changes: Any) -> MoeConfig:
    raw = {"base_model": "base", "experts": EXPERTS, "router": {"data": DATA}}
    return parse(MoeConfig, raw | changes, where="recipe.yml")


def test_defaults_and_short_forms() -> None:
    config = moe()
    assert (config.top_k, config.dtype, config.router.fit, config.router.temperature) == (2, None, "ridge", "auto")
    assert [source.path for source in config.router.data["math"]] == ["math.jsonl"]
    assert [source.path for source in config.router.data["code"]] == ["code.jsonl", "more.txt"]
    assert config.router.data["code"][0].limit == 5
    assert parse(MoeConfig, config.model_dump(mode="json"), where="again") == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"expert": []}, r"expert: unknown key \(did you mean 'experts'\?\)"),
        ({"router": {"fitt": "ridge"}}, r"router.fitt: unknown key \(did you mean 'fit'\?\)"),
        ({"router": {"fit": "ridg", "data": DATA}}, r"router.fit: .*'ridge', 'lda', .*\(given: 'ridg'\)"),
        ({"top_k": 3}, "top_k: 3 experts a token asked, but there are only 2"),
        ({"top_k": 0}, "top_k: .*greater than or equal to 1"),
        ({"experts": EXPERTS[:1], "router": {"fit": "random"}}, "experts: .*at least 2"),
        ({"experts": [*EXPERTS, {"name": "math", "model": "x"}]}, "experts: the name 'math' is given twice"),
        ({"experts": [*EXPERTS, {"name": "copy", "model": "m"}]}, "experts: the model 'm' is given twice"),
        ({"router": {"data": {"math": "m.jsonl"}}}, "router.data: no text for code; fit: ridge needs some of every"),
        ({"router": {}}, "router.data: no text for math, code"),
        ({"router": {"data": DATA | {"maths": "x"}}}, r"router.data.maths: no such expert \(did you mean 'math'\?\)"),
        (
            {"router": {"fit": "random", "data": {"math": "m"}}},
            "router.data: no text for code; what is",
        ),
        ({"router": {"fit": "nll"}}, "router.unlabelled: no text; fit: nll needs some"),
        ({"router": {"data": DATA, "unlabelled": "x"}}, "router.unlabelled: fit: ridge does not use it"),
        ({"router": {"data": DATA, "shrinkage": 0}}, "router.shrinkage: .*greater than 0"),
        ({"base_model": None}, "base_model: is missing"),
        ({"extend": "old"}, "base_model: extend keeps the trunk of the MoE that it extends"),
        (
            {"base_model": None, "extend": "old", "router": {"fit": "logistic", "data": DATA}},
            "router.fit: logistic cannot add an expert to sums that were saved; use one of ridge, lda, centroid, auto",
        ),
        (
            {"base_model": None, "extend": "old", "router": {"data": {"math": "m"}}},
            "router.data: no text for code; every new expert needs some",
        ),
        ({"router": {"data": DATA | {"math": []}}}, "router.data.math: .*at least 1"),
        ({"router": {"data": DATA, "temperature": 0}}, "router.temperature"),
        ({"router": {"data": DATA, "holdout": 1.0}}, "router.holdout: .*less than 1"),
        ({"router": {"data": DATA, "ridge": 0}}, "router.ridge: .*greater than 0"),
        (
            {"dtype": "int8"},
            "dtype: input should be .*'float32'",
        ),  # typing keeps the order of whichever Literal came first
        ({"base_model": ""}, "base_model: "),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        moe(**changes)
    assert str(caught.value).startswith("recipe.yml: ")


def test_the_documented_recipe_is_valid() -> None:
    import yaml

    text = (Path(__file__).resolve().parents[2] / "docs" / "moe.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        parse(MoeConfig, yaml.safe_load(snippet), where="docs/moe.md")


_PARTS: dict[str, type[Strict]] = {"": MoeConfig, "router": RouterConfig, "train": RouterTraining, "heal": Healing}


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "moe.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([\w.]+)` \|", text, flags=re.MULTILINE))
    missing = {f"{part}.{name}".lstrip(".") for part, model in _PARTS.items() for name in model.model_fields} - rows
    assert missing == {"router"}, "its settings have the rows"


def test_the_documented_defaults_are_the_defaults() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "moe.md").read_text(encoding="utf-8")
    for key, default in re.findall(r"^\| `([\w.]+)` \| (\S+) \|", text, flags=re.MULTILINE):
        part, _, field = key.rpartition(".")
        value = _PARTS[part].model_fields[field].default
        assert default == {None: "null"}.get(value, str(value)), key


def test_importing_the_stage_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import solera_merge.moe.build, solera_merge.moe.config; "
        "bad = {'torch', 'transformers', 'mergekit', 'scipy'} & set(sys.modules); sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr


def test_a_trunk_alone_is_told_where_the_model_goes() -> None:
    with pytest.raises(ConfigError, match="base_model: missing; it names the model"):
        parse(MoeConfig, {"trunk": "./base", "experts": EXPERTS, "router": {"data": DATA}}, where="recipe.yml")
