"""The trunk: by name, by merge, by measurement."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from solera.rebuild import rebuild
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
def tuned(with_own_attention: Callable[[float], dict[str, Path]]) -> dict[str, Path]:
    return with_own_attention(0.02)


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
        ({"merge": {"merge_method": ["ties"]}}, "trunk.merge.merge_method: "),
        ({"merge": {}}, "trunk.merge.merge_method: field required"),
        ({"merge": None}, "trunk.merge: input should be a valid dictionary"),
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


def copied(source: Path, target: Path) -> Path:
    """A copy of a checkpoint with two tokens swapped in its tokenizer."""
    shutil.copytree(source, target)
    file = target / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[40:42]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(content))
    return target


def test_the_base_whose_tokenizer_is_written_must_fit_a_trunk_of_an_expert(
    moe_config: Callable[..., MoeConfig], siblings: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    base = copied(siblings["base"], tmp_path / "base")
    with pytest.raises(CheckpointError, match="2 tokens have other ids than in the trunk's"):
        plan_moe(moe_config(base, tuned, trunk="digits"), Context())


@pytest.mark.parametrize(
    "recipe",
    [
        {"merge_method": "linear", "parameters": {"weight": 1}, "tokenizer": {"source": "OTHER"}},
        {"merge_method": "passthrough", "models": [{"model": "OTHER"}]},
    ],
)
def test_a_merge_with_another_tokenizer_than_the_bases_is_refused(
    recipe: dict[str, Any],
    build: Callable[..., Path],
    siblings: dict[str, Path],
    tuned: dict[str, Path],
    tmp_path: Path,
) -> None:
    other = copied(tuned["signs"], tmp_path / "other")
    written = json.loads(json.dumps(recipe).replace("OTHER", str(other)))
    with pytest.raises(CheckpointError, match=r"trunk: the MoE gets the tokenizer of .* and the merge has another one"):
        build(tmp_path / "moe", siblings["base"], tuned, trunk={"merge": written})
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_errors_of_the_merge_say_whose_they_are(
    moe_config: Callable[..., MoeConfig], siblings: dict[str, Path], tuned: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"trunk: parameters: linear needs `weight` for .*\ntrunk: parameters: "):
        plan_moe(moe_config(siblings["base"], tuned, trunk={"merge": {"merge_method": "linear"}}), Context())


def lora(path: Path, base: Path, seed: int) -> str:
    """A reference to `base` under a small adapter on a projection of attention and one of the feed-forward network."""
    path.mkdir()
    draw = np.random.default_rng(seed)
    stored = load_file(base / "model.safetensors")
    tensors: dict[str, np.ndarray] = {}
    for module in ("self_attn.q_proj", "mlp.up_proj"):
        rows, columns = stored[f"model.layers.1.{module}.weight"].shape
        where = f"base_model.model.model.layers.1.{module}"
        tensors[f"{where}.lora_A.weight"] = draw.standard_normal((2, columns)).astype(np.float32)
        tensors[f"{where}.lora_B.weight"] = 0.1 * draw.standard_normal((rows, 2)).astype(np.float32)
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"]}
    (path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    return f"{base}+{path}"


def test_adapters_are_merged_into_trunks_and_all_are_in_the_record(
    moe_config: Callable[..., MoeConfig], build: Callable[..., Path], siblings: dict[str, Path], tmp_path: Path
) -> None:
    base = siblings["base"]
    one, two, other = (lora(tmp_path / f"lora{seed}", base, seed) for seed in range(3))
    recipe = {
        "merge_method": "linear",
        "models": [{"model": ref, "parameters": {"weight": 1}} for ref in ("one", other)],
    }
    experts: dict[str, Any] = {"one": one, "two": two}
    out = build(tmp_path / "moe", base, experts, trunk={"merge": recipe})
    expected = []
    for seed in (0, 2):
        adapter = load_file(tmp_path / f"lora{seed}" / "adapter_model.safetensors")
        a, b = (adapter[f"base_model.model.{Q.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
        expected.append(attention(base) + b @ a)
    np.testing.assert_allclose(attention(out), np.mean(expected, axis=0), atol=1e-6)
    inputs = json.loads((out / "solera.json").read_text())["inputs"]
    assert [item["ref"] for item in inputs] == [str(base), one, two, other]  # one base, three adapters
    assert inputs[-1]["name"] == f"trunk: {other}"
    plan = plan_moe(moe_config(base, experts, trunk={"merge": recipe}), Context())
    assert [row["ref"] for row in plan.reads if row["what"] == "trunk"] == [other]


def test_the_same_recipe_makes_the_same_bytes(
    build: Callable[..., Path],
    siblings: dict[str, Path],
    tuned: dict[str, Path],
    tmp_path: Path,
) -> None:
    out = build(tmp_path / "moe", siblings["base"], tuned, trunk="average")
    assert rebuild(out, Context()).problems == ()


def test_an_average_of_other_widths_is_refused(
    moe_config: Callable[..., MoeConfig], siblings: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    narrow = tmp_path / "narrow"
    shutil.copytree(tuned["digits"], narrow)
    tensors = load_file(narrow / "model.safetensors")
    for name, value in tensors.items():
        if ".mlp." in name:
            tensors[name] = np.ascontiguousarray(value[:, :8] if "down_proj" in name else value[:8])
    save_file(tensors, narrow / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**settings, "intermediate_size": 8}))
    experts = {"letters": tuned["letters"], "narrow": narrow}
    with pytest.raises(CheckpointError, match=r"trunk: .*mlp.*shapes differ"):
        plan_moe(moe_config(siblings["base"], experts, trunk="average"), Context())
    assert plan_moe(moe_config(siblings["base"], experts, trunk="narrow"), Context()).rows


def test_a_nan_in_a_model_of_the_merge_is_named(
    build: Callable[..., Path], siblings: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tuned["digits"], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors[Q][0, 0] = np.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    experts = {"letters": tuned["letters"], "broken": broken}
    with pytest.raises(CheckpointError, match=rf"{Q}.* holds nan at \(0, 0\)"):
        build(tmp_path / "moe", siblings["base"], experts, trunk="average")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_copy_of_the_base_is_named_under_any_trunk(
    build: Callable[..., Path], siblings: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(siblings["base"], tmp_path / "copy")
    experts = {"letters": tuned["letters"], "copy": tmp_path / "copy"}
    out = build(tmp_path / "moe", siblings["base"], experts, trunk="average")
    assert any("expert 'copy' holds the weights of the base" in warning for warning in checks(out)["warnings"])
