"""`solera plan`: what it says of models and recipes is so, and its recipes run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from solera.advice import Advice
from solera.cli import main
from solera.plan_command import plan_models
from solera_core.context import Context
from solera_core.strict import parse
from solera_merge.config import MergeConfig
from solera_merge.run import merge, plan_merge

Siblings = dict[str, Path]


@pytest.fixture
def family(siblings: Siblings, tmp_path: Path) -> Context:
    """`base`, `a`, `b`, `c` in a folder of their own."""
    for name, path in siblings.items():
        shutil.copytree(path, tmp_path / name)
    return Context(base_dir=tmp_path)


def card(ctx: Context, name: str, **front: Any) -> None:
    (ctx.base_dir / name / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# A card\n")


def advice(ctx: Context, *refs: str, base: str | None = None) -> Advice:
    found = plan_models(refs, base, ctx)
    json.dumps(found.to_json(), allow_nan=False)
    return found


def test_every_recipe_can_be_run(family: Context) -> None:
    sets = (advice(family, "a", "b", base="base"), advice(family, "a", "b"), advice(family, "a", base="base"))
    recipes = [recipe for found in sets for recipe in found.recipes]
    assert [recipe.title for recipe in recipes] == ["task_arithmetic", "ties", "linear", "slerp", "task_arithmetic"]
    configs = [parse(MergeConfig, yaml.safe_load(recipe.yaml), where=recipe.title) for recipe in recipes]
    for recipe, config in zip(recipes, configs, strict=True):
        assert config.merge_method == recipe.title
        plan_merge(config, family)
    out = merge(configs[0], family.base_dir / "out", family)
    assert (out / "solera.json").exists()


def test_what_is_measured_is_what_diff_says(family: Context) -> None:
    from solera_core.checkpoint import open_checkpoint
    from solera_core.diff import diff, whole

    found = advice(family, "a", "b", base="base")
    opened = [open_checkpoint(name, family) for name in ("base", "a", "b")]
    exact = diff(opened[0], opened[1:])  # the tiny tensors are sampled whole
    assert [row["relative_change"] for row in found.measured] == [
        row["relative_change"] for row in exact.totals(whole).values()
    ]
    assert found.pairs == [{"a": "a", "b": "b", **exact.pair_totals(whole)[whole(""), 0, 1]}]
    assert [row["tokenizer"] for row in found.models][1:] == ["same file", "same file"]
    assert all("share an ancestor" in line for line in found.findings)


def test_the_base_is_found_by_measurement_by_its_card_or_asked_for(family: Context) -> None:
    assert advice(family, "a", "b").base is None
    assert "pass it as --base" in advice(family, "a", "b").base_from
    found = advice(family, "a", "base", "b")
    assert (found.base, "by measurement" in found.base_from) == ("base", True)
    assert [row["a"] + row["b"] for row in found.pairs] == ["ab"]
    assert advice(family, "a", "b", "c").base is None  # siblings alone: none of them is in the middle
    card(family, "a", base_model="org/origin")
    assert "the cards name org/origin" in advice(family, "a", "b").base_from
    card(family, "a", base_model=["b"])
    found = advice(family, "a", "b")
    assert (found.base, "on the cards" in found.base_from) == ("b", True)


def test_unrelated_models_get_no_recipe(family: Context, make_model: Callable[..., Path]) -> None:
    make_model(family.base_dir / "stranger", seed=99)
    found = advice(family, "a", "stranger")
    assert any("a and stranger are unrelated: the cosine of their weights is" in line for line in found.findings)
    assert found.recipes == []


def test_models_that_do_not_fit_are_told_why(family: Context, make_model: Callable[..., Path]) -> None:
    make_model(family.base_dir / "larger", hidden_size=64)
    found = advice(family, "a", "larger")
    assert any("shapes differ" in line for line in found.problems)
    assert (found.recipes, found.measured) == ([], [])


def test_a_tokenizer_is_suggested_where_vocabularies_differ(family: Context) -> None:
    """More rows, or tokens that the others lack: the recipes say so, and run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto_model: Any = AutoModelForCausalLM
    auto_tokenizer: Any = AutoTokenizer
    assert all("tokenizer" not in recipe.yaml for recipe in advice(family, "a", "b", base="base").recipes)
    tokenizer = auto_tokenizer.from_pretrained(family.base_dir / "b")
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.save_pretrained(family.base_dir / "b")
    found = advice(family, "a", "b", base="base")
    assert any("the others' tokens are lost" in line for line in found.findings)
    model = auto_model.from_pretrained(family.base_dir / "b", dtype="float32")
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(family.base_dir / "b")
    found = advice(family, "a", "b", base="base")
    assert found.problems == []
    assert any("cannot be merged without it" in line for line in found.findings)
    assert any("share an ancestor" in line for line in found.findings)
    assert [recipe.title for recipe in found.recipes] == ["task_arithmetic", "ties"]
    for recipe in found.recipes:
        out = merge(
            parse(MergeConfig, yaml.safe_load(recipe.yaml), where="pasted"), family.base_dir / recipe.title, family
        )
        assert "<tool>" in auto_tokenizer.from_pretrained(out).get_vocab()


def test_sparse_and_unequal_changes_are_pointed_out(family: Context) -> None:
    from safetensors.numpy import load_file, save_file

    base = load_file(family.base_dir / "base" / "model.safetensors")
    for name, scale in (("sparse", 1e-3), ("loud", 0.5)):
        shutil.copytree(family.base_dir / "base", family.base_dir / name)
        changed = {n: t.copy() for n, t in base.items()}
        for tensor in changed.values():
            flat = tensor.reshape(-1)
            flat[:: 10 if name == "sparse" else 1] *= 1 + scale
        save_file(changed, family.base_dir / name / "model.safetensors")
    findings = advice(family, "sparse", "loud", base="base").findings
    assert any("sparse changes only 10 % of the elements" in line for line in findings)
    assert any("very different size (50.00% and 0.03% of the base)" in line for line in findings)


def test_licences_are_listed_and_concerns_said(family: Context) -> None:
    card(family, "a", license="cc-by-nc-4.0")
    card(family, "b", license="apache-2.0")
    found = advice(family, "a", "b")
    assert [row["licence"] for row in found.models] == ["cc-by-nc-4.0", "apache-2.0"]
    assert any("licence of a: cc-by-nc-4.0 is for non-commercial use" in line for line in found.findings)
    recipe = {"merge_method": "linear", "models": [{"model": m} for m in "ab"], "parameters": {"weight": 1}}
    plan = plan_merge(parse(MergeConfig, recipe, where="recipe"), family)
    assert [row["licence"] for row in plan.reads] == ["cc-by-nc-4.0", "apache-2.0"]
    assert any("non-commercial" in warning for warning in plan.warnings)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_on_the_command_line(
    family: Context, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family.base_dir)
    code, out, err = run(capsys, "a", "b", "--base", "base")
    assert code == 0, err
    assert "# task_arithmetic: " in out
    assert "arXiv 2511.21437" in " ".join(out.split())
    pasted = out[out.index("merge_method: task_arithmetic") : out.index("# ties")]
    assert parse(MergeConfig, yaml.safe_load(pasted), where="pasted")
    assert json.loads(run(capsys, "a", "b", "--json")[1])["base"] is None
    assert [r["what"] for r in json.loads(run(capsys, "a", "b", "--dry-run", "--json")[1])["reads"]] == ["a", "b"]
    for wrong, words in ((["a"], "'a' is no file"), (["a", "none"], "model 'none' not found")):
        code, _, err = run(capsys, *wrong)
        assert (code, words in err) == (3, True)
    assert sorted(p.name for p in family.base_dir.iterdir()) == ["a", "b", "base", "c"]


def test_of_settings(family: Context, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family.base_dir)
    Path("ties.yml").write_text("merge_method: ties\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    code, out, err = run(capsys, "ties.yml")
    assert code == 0, err
    assert "for all rows: " in out
    assert "model.layers.0-1.self_attn.q_proj.weight" in out  # never cut
    assert "advice: compare ties with task_arithmetic" in out
    shown = json.loads(run(capsys, "ties.yml", "--json")[1])
    assert (shown["stage"], shown["models"][0]["model"]) == ("merge", "a")
    Path("recipe.yml").write_text(
        "solera: 1\nstages:\n  blend:\n    merge: {merge_method: passthrough, models: [{model: a}]}\n"
    )
    assert "plan: 1 stages" in run(capsys, "recipe.yml")[1]
    Path("odd.yml").write_text("a: 1\n")
    code, _, err = run(capsys, "odd.yml")
    assert (code, "is neither a recipe" in err) == (3, True)
    Path("bad.yml").write_text("merge_method: ties\ndensty: 1\nbase_model: none\nmodels: [{model: a}]\n")
    code, _, err = run(capsys, "bad.yml")
    assert code == 3
    assert "densty: unknown key" in err
    assert "model 'none' not found" in err


def test_adapters_lie_on_their_base(family: Context) -> None:
    import torch
    from safetensors.torch import save_file

    name, random = "base_model.model.model.layers.0.self_attn.q_proj", torch.Generator().manual_seed(0)
    for adapter in ("one", "two"):
        directory = family.base_dir / adapter
        directory.mkdir()
        factors = {
            f"{name}.lora_A.weight": torch.randn(2, 32, generator=random),
            f"{name}.lora_B.weight": torch.randn(32, 2, generator=random) * 0.01,
        }
        save_file(factors, directory / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
        (directory / "adapter_config.json").write_text(json.dumps(settings))
    found = advice(family, "base+one", "base+two")
    assert (found.base, found.base_from) == ("base", "what the adapters lie on")
    assert [row["model"] for row in found.measured] == ["base+one", "base+two"]
    assert found.recipes[0].title == "task_arithmetic"


def test_models_on_the_hub_are_not_downloaded_for_advice(siblings: Siblings, tmp_path: Path) -> None:
    from tests import loopback_hub

    for name in ("a", "b"):
        shutil.copytree(siblings[name], tmp_path / "served" / name)
    (tmp_path / "served" / "a" / "README.md").write_text("---\nlicense: mit\nbase_model: me/base\n---\n")
    code = """
from solera.plan_command import plan_models
from solera_core.context import Context
answer |= plan_models(["me/a", "me/b"], None, Context()).to_json()
"""
    with loopback_hub.serve(tmp_path / "served") as hub:
        answer = loopback_hub.ask(code, hub.endpoint, tmp_path)
        assert all(asked.first is not None and asked.served < 5000 for asked in hub.weights())
    assert [row["licence"] for row in answer["models"]] == ["mit", "unknown"]
    assert "the cards name me/base: pass it as --base" in answer["base_from"]
    assert any("weights are on the hub: me/a, me/b" in line for line in answer["findings"])
    assert (answer["measured"], [recipe["title"] for recipe in answer["recipes"]]) == ([], ["linear", "slerp"])
