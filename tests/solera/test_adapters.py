"""Adapters on the command line: extract, look at, lay over, merge, verify; and docs/adapters.md says what is so."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from solera.cli import main
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.strict import parse
from solera_merge.adapters.extract import ExtractConfig, extract_lora
from solera_merge.config import MergeConfig

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def json_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json", "-q")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_from_fine_tunes_to_one_adapter(
    siblings: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = siblings["base"]
    for name in "ab":
        options = ("--rank", 4, "--embeddings", "skip", "--modules-to-save", "none")
        plan = json_of(capsys, "extract-lora", base, siblings[name], tmp_path / name, *options, "--dry-run")
        assert plan["stage"] == "extract-lora"
        assert not (tmp_path / name).exists()
        code, out, err = run(capsys, "extract-lora", base, siblings[name], tmp_path / name, *options)
        assert code == 0
        assert "base + adapter misses 0." in out
        assert "warning: model.norm.weight changed and is not in the adapter: modules_to_save: none" in err
    facts = json_of(capsys, "inspect", tmp_path / "a")
    assert facts["family"] == "LoRA adapter"
    assert facts["base_model"] == str(base)
    assert facts["ranks"] == {"4": 14}
    assert facts["targets"]["q_proj"] == 2
    assert facts["provenance"]["kind"] == "extract-lora"
    assert json_of(capsys, "inspect", tmp_path / "a", "--dry-run")["reads"][0]["what"] == "adapter_config.json"

    recipe = tmp_path / "merge.yml"
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in "ab"]
    recipe.write_text(yaml.safe_dump({"merge_method": "task_arithmetic", "models": models, "adapter": {"rank": 6}}))
    plan = json_of(capsys, "merge", recipe, tmp_path / "both", "--dry-run")
    assert {(row["ranks in"], row["rank out"]) for row in plan["rows"]} == {("4, 4", 6)}
    assert run(capsys, "merge", recipe, tmp_path / "both", "--dry-run")[0] == 0
    code, _, err = run(capsys, "merge", recipe, tmp_path / "both")
    assert code == 0
    assert "relative error of the stored updates: 0." in err
    for extra in ((), ("--rebuild",)):
        assert json_of(capsys, "verify", tmp_path / "both", *extra)["whole"]
    assert json_of(capsys, "inspect", f"{base}+{tmp_path / 'both'}")["family"] == "llama"

    assert run(capsys, "verify", tmp_path / "a", "--rebuild", "-q")[0] == 0
    weights = tmp_path / "both" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = run(capsys, "verify", tmp_path / "both", "-q")
    assert code == 3
    assert "changed" in err


def test_bad_input(siblings: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "extract-lora", siblings["base"], siblings["a"], tmp_path / "out")
    assert code == 3
    assert "give either a rank or an energy" in err
    code, _, err = run(capsys, "extract-lora", siblings["base"], siblings["a"], siblings["b"], "--rank", 2)
    assert code == 3
    assert "exists and is not empty" in err


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))
def test_every_recipe_is_valid(text: str) -> None:
    assert parse(MergeConfig, yaml.safe_load(text), where="docs/adapters.md")


def test_every_option_is_listed() -> None:
    from solera_merge.adapters.extract import ExtractConfig
    from solera_merge.adapters.settings import METHODS_OF_UPDATES, AdapterSettings

    options = {f"--{name.replace('_', '-')}" for name in ExtractConfig.model_fields} - {"--base-model", "--model"}
    assert all(option in TEXT for option in options)
    assert all(f"`{method}`" in TEXT for method in METHODS_OF_UPDATES)
    assert all(name in TEXT for name in AdapterSettings.model_fields)


def test_an_extraction_is_a_stage_like_any_other(siblings: dict[str, Path], tmp_path: Path) -> None:
    """Planned before it is made, merged with a given adapter, laid over its base, cached, made again."""
    from solera.pipeline import plan_run, run_recipe
    from solera.rebuild import rebuild
    from solera.recipe import load_recipe

    ctx = Context()
    low_rank = "rank: 4, embeddings: skip, modules_to_save: none"
    given = tmp_path / "given"
    settings = {"base_model": str(siblings["base"]), "model": str(siblings["b"]), "rank": 2}
    settings |= {"embeddings": "skip", "modules_to_save": "none"}
    extract_lora(parse(ExtractConfig, settings, where="given"), given, ctx)
    text = f"""
solera: 1
stages:
  out: {{merge: {{merge_method: passthrough, models: [{{model: "{siblings["base"]}+both"}}]}}}}
  both:
    merge:
      merge_method: linear
      adapter: {{}}
      parameters: {{weight: 0.5}}
      models: [{{model: lora}}, {{model: {given}}}]
  lora: {{extract-lora: {{base_model: {siblings["base"]}, model: {siblings["a"]}, {low_rank}}}}}
"""
    (tmp_path / "recipe.yml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yml")
    planned = plan_run(recipe, tmp_path / "run", ctx)
    assert [(p.name, p.kind, p.inputs) for p in planned] == [
        ("lora", "extract-lora", ()),
        ("both", "merge", ("lora",)),
        ("out", "merge", ("both",)),
    ]
    assert not (tmp_path / "run").exists()
    run_recipe(recipe, tmp_path / "run", ctx)
    assert {p.status for p in plan_run(recipe, tmp_path / "run", ctx)} == {"cached"}
    stages = tmp_path / "run" / "stages"
    for name in ("lora", "both", "out"):
        assert rebuild(stages / name, ctx).problems == ()
    name = "model.layers.0.self_attn.q_proj.weight"
    base = open_checkpoint(siblings["base"], ctx).read(name)
    parts = [
        open_checkpoint(f"{siblings['base']}+{adapter}", ctx).read(name) - base for adapter in (stages / "lora", given)
    ]
    np.testing.assert_allclose(open_checkpoint(stages / "out", ctx).read(name), base + sum(parts) / 2, atol=1e-6)
