"""The card: front matter the hub understands, a page that says what was measured, and no markup from outside."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from solera.assemble import Evidence, prepare
from solera.publish import CardConfig, PublishConfig
from solera_core.context import Context
from solera_core.licence import read_front_matter


def card_of(directory: Path, evidence: Evidence | None = None, ctx: Context | None = None, **settings: Any) -> str:
    settings = {"repo": "me/blend", **settings}
    release = prepare(PublishConfig(model=str(directory), **settings), ctx or Context(), evidence)
    content = next(f.content for f in release.files if f.name == "README.md")
    assert content is not None
    return content.decode()


def front_matter(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


@pytest.fixture
def measured(merged: Path, results_of: Any, tmp_path: Path) -> Evidence:
    """Results of the model and of a parent, and a verdict."""
    digest = json.loads((merged / "solera.json").read_text())["digest"]
    verdict = {
        "verdict": "PASS",
        "candidate": "blend",
        "baseline": "one",
        "tasks": [
            {"name": "held-out", "metric": "perplexity", "tier": "critical", "n": 80, "baseline": 5.1, "candidate": 5.0,
             "ratio": 0.98, "bound": 0.991, "margin": 1.05, "verdict": "PASS"},
        ],
        "reasons": [],
    }  # fmt: skip
    (tmp_path / "verdict.json").write_text(json.dumps(verdict))
    return Evidence(
        results={
            "one": results_of(tmp_path / "r" / "one", "blake3:other", 5.1),
            "blend": results_of(tmp_path / "r" / "blend", digest, 5.0, active=10000),
        },
        model="blend",
        verdict=tmp_path / "verdict.json",
    )


def test_front_matter(merged: Path, measured: Evidence) -> None:
    found = front_matter(card_of(merged, measured, license="llama3.2"))
    assert {
        k: found[k] for k in ("license", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags")
    } == {
        "license": "llama3.2",
        "base_model": ["org/one", "org/two"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["solera", "merge"],
    }
    index = found["model-index"]
    assert index[0]["name"] == "blend"
    metric = {r["metrics"][0]["type"]: r["metrics"][0] for r in index[0]["results"]}
    assert metric["perplexity"]["value"] == 5.0
    assert metric["perplexity"]["args"] == {"n": 80, "low": 4.75, "high": 5.25}
    assert metric["accuracy"]["value"] == 0.715


def test_it_reads_back_through_huggingface_hub(merged: Path, measured: Evidence) -> None:
    from huggingface_hub import ModelCard

    text = card_of(merged, measured, license="apache-2.0")
    card: Any = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == ["org/one", "org/two"]
    results = card.data.eval_results
    assert results is not None
    assert {(r.metric_type, r.metric_value) for r in results} == {("perplexity", 5.0), ("accuracy", 0.715)}


def test_no_licence_and_no_results_write_no_keys(merged: Path) -> None:
    text = card_of(merged)
    found = front_matter(text)
    assert "license" not in found
    assert "model-index" not in found
    assert "model_name" not in found
    assert "No licence is given." in text
    assert "Nothing was measured" in text
    assert "org/one | unknown | the model is not on this machine" in text


def test_the_page(merged: Path, measured: Evidence) -> None:
    text = card_of(merged, measured, card=CardConfig(title="A Fine Blend", summary="Two in one."))
    assert "# A Fine Blend" in text
    assert "Two in one." in text
    assert "12.3k parameters, 10k of them active for each token, 49.4 kB" in text
    assert "**PASS.** blend keeps the quality of one within the margin" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| task | metric | items | A Fine Blend | one |" in rows
    assert "| held-out | perplexity ↓ | 80 | **5.000**<br>4.750–5.250 | 5.100<br>4.845–5.355 |" in rows
    assert "- **org/one** at `111111111111`" in text
    assert "merge_method: linear" in text
    assert "solera merge recipe.yml out" in text
    assert 'from_pretrained("me/blend")' in text


def test_many_models_run_down_the_page(merged: Path, measured: Evidence, results_of: Any, tmp_path: Path) -> None:
    more = {n: results_of(tmp_path / "r" / n, "blake3:x", 6.0) for n in ("two", "three")}
    text = card_of(merged, Evidence(results={**measured.results, **more}, model="blend"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| model | size | held-out<br>perplexity ↓, 80 items | pairs<br>accuracy ↑, 400 items |" in rows
    assert "| blend | 12.3k, 49.4 kB | **5.000**<br>4.750–5.250 | **71.5%**<br>68.0%–75.0% |" in rows
    assert "| three | 12.3k, 49.4 kB | 6.000<br>5.700–6.300 | 71.5%<br>68.0%–75.0% |" in rows


def test_every_table_row_has_as_many_cells_as_its_head(merged: Path, measured: Evidence) -> None:
    lines = card_of(merged, measured).splitlines()
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|(-+\|)+", line):
            columns = line.count("|") - 1
            block = [lines[i - 1]]
            for row in lines[i + 1 :]:
                if not row.startswith("|"):
                    break
                block.append(row)
            assert len(block) > 1
            assert [len(re.findall(r"(?<!\\)\|", row)) - 1 for row in block] == [columns] * len(block)


def test_the_recipe_of_a_run_replaces_that_of_the_stage(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text("solera: 1\nstages: {}\n# ```\n# ````\n")
    text = card_of(merged, Evidence(recipe=tmp_path / "recipe.yml"))
    assert "solera run recipe.yml" in text
    assert "`````yaml\nsolera: 1" in text, "the fence is longer than any in the recipe"
    assert "merge_method" not in text


def test_hostile_names_stay_text(merged: Path, finish: Any, results_of: Any, tmp_path: Path) -> None:
    (merged / "solera.json").unlink()
    hostile = "x</td><script>alert(1)</script>|`*\n# head"
    finish(merged, inputs=[("a", hostile, "", "blake3:1")], recipe={"a": "```\n# out of the fence\n"})
    digest = json.loads((merged / "solera.json").read_text())["digest"]
    evidence = Evidence(
        results={"mine": results_of(tmp_path / "r", digest), hostile: results_of(tmp_path / "s", "")}, model="mine"
    )
    text = card_of(merged, evidence, card=CardConfig(title=hostile))
    body = text.split("---\n", 2)[2]
    assert "<script>" not in re.sub(r"\\<", "", body)
    assert not any(line.startswith("# head") for line in body.splitlines())
    assert front_matter(text)["model-index"][0]["name"] == hostile
    assert read_front_matter(merged / "README.md") == {}


@pytest.mark.parametrize(
    ("kind", "tags"),
    [
        ("moe", ["solera", "moe", "merge"]),
        ("distill", ["solera", "distilled"]),
        ("tune", ["solera", "fine-tuned"]),
        ("init", ["solera"]),
    ],
)
def test_tags_by_kind(merged: Path, finish: Any, kind: str, tags: list[str]) -> None:
    (merged / "solera.json").unlink()
    finish(merged, kind=kind)
    found = front_matter(card_of(merged))
    assert found["tags"] == tags
    assert "base_model" not in found
    assert "base_model_relation" not in found


def test_llama_is_named_where_its_licence_asks(
    merged: Path, finish: Any, siblings: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(siblings["base"], tmp_path / "parent")
    (tmp_path / "parent" / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    (merged / "solera.json").unlink()
    finish(merged, inputs=[("parent", "parent", "", "blake3:1")])
    text = card_of(merged, ctx=Context(base_dir=tmp_path, models={str(merged): merged}))
    assert front_matter(text)["license"] == "llama3.2"
    assert "\nBuilt with Llama.\n" in text
