"""A route as the teacher: each text is taught by the specialist it is sent to."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError
from solera_core.strict import parse
from solera_distill.config import DistillConfig
from solera_distill.run import distill, plan_distill
from solera_merge.route import RoutedModels
from solera_merge.route.build import build_route
from solera_merge.route.config import RouteConfig

TEXT = ["math.jsonl", "code.jsonl"]


@pytest.fixture
def here(tmp_path: Path, ctx: Context, siblings: dict[str, Path]) -> Context:
    """`ctx` with the route `door` over a (math) and b (code), whose models stand in a folder of their own."""
    for name in ("base", "a", "b"):
        shutil.copytree(siblings[name], tmp_path / "models" / name)
    raw = {
        "base_model": "./base",
        "specialists": [{"name": "A", "model": "./a"}, {"name": "B", "model": "./b"}],
        "data": {"A": str(ctx.base_dir / TEXT[0]), "B": str(ctx.base_dir / TEXT[1])},
        "method": "centroid",
    }
    door = build_route(
        parse(RouteConfig, raw, where="r"), tmp_path / "models" / "door", Context(base_dir=tmp_path / "models")
    )
    return dataclasses.replace(ctx, models={**siblings, "door": door})


def recipe(small: dict[str, Any], teachers: list[dict[str, str]]) -> DistillConfig:
    raw = {"teachers": teachers, "student": {"from": "c"}, "data": TEXT, **small, "tokens": 800}
    return parse(DistillConfig, raw, where="r")


def test_a_route_teaches_as_its_specialists_do_each_its_own(
    tmp_path: Path, here: Context, texts: Path, small: dict[str, Any]
) -> None:
    rows = [json.loads(line) for name in TEXT for line in (texts / name).read_text().splitlines()]
    sent = RoutedModels.open(here.models["door"]).route([row["text"] for row in rows])
    assert sent == [{"math": "A", "code": "B"}[row["domain"]] for row in rows]  # so the two runs below are the same
    routed = distill(recipe(small, [{"model": "door"}]), tmp_path / "routed", here)
    by_domain = [{"model": "a", "domain": "math"}, {"model": "b", "domain": "code"}]
    plain = distill(recipe(small, by_domain), tmp_path / "plain", here)
    for name in ("model.safetensors", "training.jsonl"):
        assert (routed / name).read_bytes() == (plain / name).read_bytes()
    swapped = [{"model": "b", "domain": "math"}, {"model": "a", "domain": "code"}]
    other = distill(recipe(small, swapped), tmp_path / "other", here)
    assert (other / "model.safetensors").read_bytes() != (plain / "model.safetensors").read_bytes()
    inputs = json.loads((routed / "solera.json").read_text())["inputs"]
    assert [r["name"] for r in inputs] == ["student", "route", "teacher A", "teacher B", "route's base", "data", "data"]
    for record, model in zip(inputs[2:4], "ab", strict=True):
        assert (here.base_dir / record["ref"]).resolve() == tmp_path / "models" / model


def test_the_plan_names_the_specialists(tmp_path: Path, here: Context, small: dict[str, Any]) -> None:
    reads = plan_distill(recipe(small, [{"model": "door"}]), here).reads
    folder = tmp_path / "models"
    assert [Path(row["path"]) for row in reads[1:4]] == [folder / "a", folder / "b", folder / "base"]


@pytest.mark.parametrize("teachers", [[{"model": "door"}, {"model": "a"}], [{"model": "door", "domain": "math"}]])
def test_a_route_teaches_alone(
    tmp_path: Path, here: Context, small: dict[str, Any], teachers: list[dict[str, str]]
) -> None:
    if len(teachers) > 1:
        teachers[1]["domain"] = "math"
    with pytest.raises(ConfigError, match=r"door is a route, .* give it alone and without `domain`"):
        distill(recipe(small, teachers), tmp_path / "out", here)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda models: shutil.rmtree(models / "a"), "specialist 'A': "),
        (lambda models: shutil.copy(models / "base" / "model.safetensors", models / "a"), "specialist 'A' .* changed"),
    ],
)
def test_a_pool_that_is_not_what_it_was(
    tmp_path: Path, here: Context, small: dict[str, Any], damage: Callable[[Path], Any], message: str
) -> None:
    damage(tmp_path / "models")
    with pytest.raises(CheckpointError, match=message):
        distill(recipe(small, [{"model": "door"}]), tmp_path / "out", here)
    assert not (tmp_path / "out").exists()
