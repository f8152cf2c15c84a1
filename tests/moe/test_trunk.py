"""The trunk: by name, by merge, by measurement."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError
from solera_core.strict import parse
from solera_merge.moe.build import build_moe, plan_moe
from solera_merge.moe.config import MoeConfig
from solera_merge.moe.trunk_config import SCALES

EXPERTS = [{"name": "math", "model": "m"}, {"name": "code", "model": "c"}]
DATA = {"math": "math.jsonl", "code": "code.jsonl"}
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tuned(specialists: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The specialists with attention of their own: each a little off the base's."""
    import shutil

    root = tmp_path_factory.mktemp("tuned")
    for seed, (name, path) in enumerate(specialists.items()):
        shutil.copytree(path, root / name)
        tensors = load_file(path / "model.safetensors")
        draw = np.random.default_rng(seed)
        for key, value in tensors.items():
            if "self_attn" in key:
                tensors[key] = value + 0.02 * draw.standard_normal(value.shape).astype(value.dtype)
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
    return {name: root / name for name in specialists}


def checks(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "solera.json").read_text())["checks"]
    return found


def attention(path: Path) -> np.ndarray:
    return load_file(path / "model.safetensors")[Q]


def test_an_experts_trunk_is_taken_as_it_is(
    build: Callable[..., Path], siblings: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    out = build(tmp_path / "moe", siblings["base"], tuned, trunk="digits")
    np.testing.assert_array_equal(attention(out), attention(tuned["digits"]))
    assert checks(out)["trunk"] == {"chosen": "digits"}


def test_the_average_is_that_of_the_merge_engine(
    build: Callable[..., Path], siblings: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    out = build(tmp_path / "moe", siblings["base"], tuned, trunk="average")
    expected = np.mean([attention(path) for path in tuned.values()], axis=0)
    np.testing.assert_allclose(attention(out), expected, atol=1e-6)
    found = checks(out)["trunk"]
    assert found["merge"]["recipe"]["merge_method"] == "task_arithmetic"
    assert len(found["merge"]["inputs"]) == 4
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_recipe_may_call_models_by_their_names(
    build: Callable[..., Path], siblings: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [
            {"model": "letters", "parameters": {"weight": 0.5}},
            {"model": "signs", "parameters": {"weight": 2}},
        ],
    }
    out = build(tmp_path / "moe", siblings["base"], tuned, trunk={"merge": recipe})
    base = attention(siblings["base"])
    expected = base + 0.5 * (attention(tuned["letters"]) - base) + 2 * (attention(tuned["signs"]) - base)
    np.testing.assert_allclose(attention(out), expected, atol=1e-6)


def test_auto_takes_the_least_loss_under_perfect_routing(
    build: Callable[..., Path],
    siblings: dict[str, Path],
    tuned: dict[str, Path],
    domain_text: dict[str, Path],
    tmp_path: Path,
) -> None:
    out = build(tmp_path / "moe", siblings["base"], tuned, data=domain_text, trunk="auto")
    found = checks(out)["trunk"]
    table = found["oracle_routed_nll"]
    assert list(table) == ["base", "average", *(f"task_arithmetic {scale:g}" for scale in SCALES)]
    assert table[found["chosen"]]["mean"] == min(row["mean"] for row in table.values())
    assert table["base"]["mean"] == pytest.approx(np.mean(list(table["base"]["domains"].values())), abs=1e-3)
    # the whole MoE, routed by hand, measures the same
    measured = checks(out)["router"]["held_out_nll"]["oracle_routed"]
    assert measured == pytest.approx(table[found["chosen"]]["domains"], abs=1e-3)


def test_the_plan_reads_headers_only(
    moe_config: Callable[..., MoeConfig], siblings: dict[str, Path], tuned: dict[str, Path]
) -> None:
    plain = plan_moe(moe_config(siblings["base"], tuned), Context())
    merged = plan_moe(moe_config(siblings["base"], tuned, trunk="average"), Context())
    assert merged.disk_bytes > plain.disk_bytes
    assert [row["tensor"] for row in merged.rows] == [row["tensor"] for row in plain.rows]


@pytest.mark.parametrize(
    ("trunk", "message"),
    [
        ("maths", r"trunk: 'maths' is no expert \(did you mean 'math'\?\)"),
        ("auto", "trunk: auto compares trunks on held-out text; give router.data"),
        ({"merge": {"merge_method": "tiez"}}, "trunk.merge.merge_method: unknown method 'tiez'"),
        ({"merg": {}}, r"trunk.merg: unknown key \(did you mean 'merge'\?\)"),
    ],
)
def test_what_a_trunk_may_not_be(trunk: Any, message: str) -> None:
    raw = {"base_model": "b", "trunk": trunk, "experts": EXPERTS, "router": {"fit": "random"}}
    with pytest.raises(ConfigError, match=message):
        parse(MoeConfig, raw, where="recipe.yml")


def test_no_expert_is_called_like_a_word_of_trunk() -> None:
    raw = {"base_model": "b", "experts": [{"name": "auto", "model": "m"}, EXPERTS[1]], "router": {"fit": "random"}}
    with pytest.raises(ConfigError, match="'auto' is a word of `trunk`"):
        parse(MoeConfig, raw, where="recipe.yml")


def test_a_merge_of_unknown_models_is_found_by_the_plan(
    moe_config: Callable[..., MoeConfig], siblings: dict[str, Path], tuned: dict[str, Path]
) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "nowhere", "parameters": {"weight": 1}}]}
    with pytest.raises(CheckpointError, match="'nowhere' not found"):
        plan_moe(moe_config(siblings["base"], tuned, trunk={"merge": recipe}), Context())


def test_a_merge_of_another_depth_is_refused_and_leaves_nothing(
    moe_config: Callable[..., MoeConfig], siblings: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "letters", "layer_range": [0, 1]}]} for _ in range(3)],
    }
    with pytest.raises(CheckpointError, match="a trunk has the layers and the vocabulary of the base"):
        build_moe(moe_config(siblings["base"], tuned, trunk={"merge": recipe}), tmp_path / "moe", Context())
    assert list(tmp_path.iterdir()) == []
