"""Where a model came from, over stages, folders and the hub's cache, and who of them the card names as its base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from solera.card import base_model_relation
from solera.lineage import hub_parents, sources, trace
from solera_core.context import Context

ONE, TWO = "1" * 40, "2" * 40


def record(
    directory: Path,
    kind: str,
    inputs: list[tuple[str, str | None]],
    digest: str = "",
    algorithm: str = "blake3",
    **recipe: Any,
) -> Path:
    """A solera.json with the keys that lineage reads."""
    directory.mkdir(parents=True)
    rows = [{"name": r, "ref": r, "revision": v, "digest": f"{algorithm}:{r}"} for r, v in inputs]
    (directory / "solera.json").write_text(
        json.dumps(
            {
                "schema": 1,
                "kind": kind,
                "recipe": recipe,
                "inputs": rows,
                "digest": digest or f"blake3:{directory.name}",
            }
        )
    )
    return directory


@pytest.mark.parametrize("algorithm", ["blake3", "sampled"])  # large models are known by samples
def test_merge_of_models_on_the_hub(tmp_path: Path, algorithm: str) -> None:
    blend = record(tmp_path / "blend", "merge", [("org/one", ONE), ("org/two@main", TWO)], algorithm=algorithm)
    found = trace(blend, "blend", Context())
    assert [(p.hub_id, p.revision, p.kind, p.directory) for p in found.parents] == [
        ("org/one", ONE, "given", None),
        ("org/two", TWO, "given", None),
    ]
    assert hub_parents(found) == ["org/one", "org/two"]


def test_stages_of_a_run_are_followed_to_the_hub(tmp_path: Path) -> None:
    base = ("org/base", ONE)
    models = {
        "math": record(tmp_path / "math", "tune", [base]),
        "code": record(tmp_path / "code", "tune", [base]),
        "moe": record(tmp_path / "moe", "moe", [base, ("math", None), ("code", None)]),
        "student": record(
            tmp_path / "student",
            "distill",
            [("org/teacher", TWO), ("moe", None)],
            student={"from": "moe"},
            teachers=[{"model": "org/teacher"}, {"model": "moe"}],
        ),
    }
    found = trace(models["student"], "student", Context(models=models))
    assert [(p.name, p.kind, p.role) for p in found.parents] == [
        ("org/teacher", "given", "teacher"),
        ("moe", "moe", "start"),
    ]
    assert [s.hub_id for s in sources(found)] == ["org/teacher", "org/base"], (
        "each once, teachers too: their licences count"
    )
    assert hub_parents(found) == ["org/base"], "weights come from the start, not from the teacher"
    assert base_model_relation("distill", hub_parents(found)) == "finetune"


def test_a_student_of_a_blend_of_several_is_a_merge_on_the_hub(tmp_path: Path) -> None:
    models = {"blend": record(tmp_path / "blend", "merge", [("org/one", ONE), ("org/two", TWO)])}
    student = record(
        tmp_path / "student", "distill", [("blend", None)], student={"from": "blend"}, teachers=[{"model": "blend"}]
    )
    found = trace(student, "student", Context(models=models))
    assert base_model_relation("distill", hub_parents(found)) == "merge"


@pytest.mark.parametrize(
    ("kind", "parents", "relation"),
    [("merge", ["a/b"], "merge"), ("moe", ["a/b", "c/d"], "merge"), ("tune", ["a/b"], "finetune"), ("init", [], None)],
)
def test_relation(kind: str, parents: list[str], relation: str | None) -> None:
    assert base_model_relation(kind, parents) == relation


def test_stages_beside_the_model_are_found_by_name_and_digest(tmp_path: Path) -> None:
    record(tmp_path / "stages" / "math", "tune", [("org/base", ONE)], digest="blake3:math")
    record(tmp_path / "stages" / "code", "tune", [("org/base", ONE)], digest="blake3:made anew since")
    blend = record(tmp_path / "stages" / "blend", "merge", [("math", None), ("code", None)])
    found = trace(blend, "blend", Context(base_dir=tmp_path))
    assert [(p.name, p.kind) for p in found.parents] == [("math", "tune"), ("code", "given")]


def test_local_folders_are_not_taken_for_hub_ids(tmp_path: Path, siblings: dict[str, Path]) -> None:
    shutil.copytree(siblings["base"], tmp_path / "models" / "base")
    blend = record(
        tmp_path / "out" / "blend", "merge", [("models/base", None), ("models/gone", None), (str(tmp_path / "x"), None)]
    )
    found = trace(blend, "blend", Context(base_dir=tmp_path))
    assert [(p.name, p.hub_id, p.directory is not None) for p in found.parents] == [
        ("models/base", None, True),
        ("models/gone", None, False),
        ("x", None, False),
    ]
    assert hub_parents(found) == []


def test_adapters_are_parents_too(tmp_path: Path) -> None:
    found = trace(
        record(tmp_path / "blend", "merge", [("org/base+org/lora", None), ("org/two", TWO)]), "blend", Context()
    )
    assert hub_parents(found) == ["org/base", "org/lora", "org/two"]


def test_the_hub_cache_is_read_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--org--one" / "snapshots" / ONE
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = trace(record(tmp_path / "blend", "merge", [("org/one", ONE), (str(snapshot), ONE)]), "blend", Context())
    assert [p.directory for p in found.parents] == [snapshot], "the same model by name and by path is one parent"
    assert found.parents[0].hub_id == "org/one"


def test_text_is_no_parent(tmp_path: Path) -> None:
    directory = record(tmp_path / "math", "tune", [("org/base", ONE)])
    content = json.loads((directory / "solera.json").read_text())
    content["inputs"] += [
        {"name": "data", "ref": "data/secret/math.jsonl", "revision": None, "digest": "sha256:0"},
        {"name": "data", "ref": "hub:org/corpus", "revision": None, "digest": "sha256:1"},
    ]
    (directory / "solera.json").write_text(json.dumps(content))
    found = trace(directory, "math", Context())
    assert [p.name for p in found.parents] == ["org/base"]
    assert found.data == ("math.jsonl", "hub:org/corpus")


def test_a_circle_of_records_ends(tmp_path: Path) -> None:
    models = {"a": record(tmp_path / "a", "merge", [("b", None)]), "b": record(tmp_path / "b", "merge", [("a", None)])}
    assert sources(trace(models["a"], "a", Context(models=models))) == []
