"""Publishing to a real hub on 127.0.0.1, in a process of its own: what arrives, what never leaves, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from solera.publish import PublishConfig, plan_publish, publish
from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_core.strict import parse


def local_files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_what_arrives_is_what_was_made(hub: Any, publish_to: Any, merged: Path, tmp_path: Path) -> None:
    before = local_files(merged)
    done = publish_to({"model": str(merged), "repo": "me/blend", "license": "apache-2.0", "tag": "v1"})
    assert done.error == ""
    repo = hub.repos["me/blend"]
    assert repo.private
    assert done.result["commit"] == repo.head == repo.tags["v1"]
    assert done.result["changed"]
    remote = {name: entry.data for name, entry in repo.files.items() if name != ".gitattributes"}
    assert set(done.result["files"]) == set(remote) == {*before, "README.md"}
    assert {n: d for n, d in remote.items() if n not in ("README.md", "solera.json")} == {
        n: d for n, d in before.items() if n != "solera.json"
    }
    assert len(repo.commits) == 2, "the hub's own first commit, and one of ours"
    assert local_files(merged) == before, "the checkpoint itself is not touched"
    assert list(merged.parent.iterdir()) == [merged], "nothing is left beside it"
    assert "hf_" not in done.output


def test_it_downloads_and_loads_as_the_same_model(hub: Any, publish_to: Any, merged: Path, tmp_path: Path) -> None:
    assert publish_to({"model": str(merged), "repo": "me/blend"}).error == ""
    script = """
import sys, torch
from pathlib import Path
from huggingface_hub import snapshot_download
from solera_core.provenance import verify
from transformers import AutoModelForCausalLM, AutoTokenizer
near = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").state_dict()
far = AutoModelForCausalLM.from_pretrained("me/blend", dtype="float32").state_dict()
assert near.keys() == far.keys() and all(torch.equal(near[k], far[k]) for k in near)
ids = [AutoTokenizer.from_pretrained(where)("a cask").input_ids for where in ("me/blend", sys.argv[1])]
assert ids[0] == ids[1]
copy = Path(snapshot_download("me/blend", ignore_patterns=".gitattributes", local_dir=sys.argv[2]))
import shutil; shutil.rmtree(copy / ".cache")
assert verify(copy) == [], verify(copy)
"""
    env = hub.environment(tmp_path / "hf2", PYTHONWARNINGS="default")
    arguments = [sys.executable, "-c", script, str(merged), str(tmp_path / "copy")]
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_publishing_twice_makes_one_commit(hub: Any, publish_to: Any, merged: Path) -> None:
    config = {"model": str(merged), "repo": "me/blend", "tag": "v1"}
    first = publish_to(config)
    again = publish_to(config)
    assert first.error == again.error == ""
    assert first.result["commit"] == again.result["commit"]
    assert not again.result["changed"]
    assert len(hub.repos["me/blend"].commits) == 2


def test_shards_of_an_earlier_publication_go_in_the_same_commit(
    hub: Any, publish_to: Any, merged: Path, make_model: Any, finish: Any, tmp_path: Path
) -> None:
    sharded = finish(make_model(tmp_path / "sharded", seed=3, shards=3))
    assert publish_to({"model": str(sharded), "repo": "me/blend"}).error == ""
    shards = {n for n in hub.repos["me/blend"].files if n.endswith(".safetensors")}
    assert len(shards) >= 3
    assert publish_to({"model": str(merged), "repo": "me/blend"}).error == ""
    files = hub.repos["me/blend"].files
    assert "model.safetensors" in files
    assert not shards & set(files)
    assert "model.safetensors.index.json" not in files
    assert ".gitattributes" in files, "made by the hub, and kept"
    assert len(hub.repos["me/blend"].commits) == 3, "uploads and deletions are one commit each time"


def test_evidence_of_the_run_goes_along(
    hub: Any, publish_to: Any, merged: Path, results_of: Any, tmp_path: Path
) -> None:
    digest = json.loads((merged / "solera.json").read_text())["digest"]
    (tmp_path / "verdict.json").write_text(
        json.dumps({"verdict": "PASS", "candidate": "blend", "baseline": "one", "tasks": []})
    )
    (tmp_path / "recipe.yml").write_text("solera: 1\n")
    (tmp_path / "report.html").write_text("<!DOCTYPE html><title>run</title>")
    evidence = {
        "results": {"blend": str(results_of(tmp_path / "r" / "blend", digest))},
        "verdict": str(tmp_path / "verdict.json"),
        "recipe": str(tmp_path / "recipe.yml"),
        "report": str(tmp_path / "report.html"),
    }
    done = publish_to({"model": str(merged), "repo": "me/blend", "when": "verdict"}, evidence)
    assert done.error == ""
    files = hub.repos["me/blend"].files
    assert {"results.json", "verdict.json", "recipe.yml", "report.html"} <= set(files)
    assert b"perplexity" in files["README.md"].data
    assert b"items.jsonl" not in b" ".join(n.encode() for n in files)


def test_a_failed_gate_publishes_nothing(hub: Any, publish_to: Any, merged: Path, tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_text(json.dumps({"verdict": "INCONCLUSIVE", "tasks": []}))
    done = publish_to(
        {"model": str(merged), "repo": "me/blend", "when": "check"}, {"verdict": str(tmp_path / "verdict.json")}
    )
    assert "check says INCONCLUSIVE" in done.error
    assert hub.requests == []
    assert "needs the verdict of a run" in publish_to({"model": str(merged), "repo": "me/blend", "when": "check"}).error


def test_public_is_private_until_everything_is_verified(hub: Any, publish_to: Any, merged: Path) -> None:
    done = publish_to({"model": str(merged), "repo": "me/blend", "private": False})
    assert done.error == ""
    assert not hub.repos["me/blend"].private
    commit = next(i for i, r in enumerate(hub.requests) if r.startswith("POST /api/models/me/blend/commit"))
    tree = max(i for i, r in enumerate(hub.requests) if r.startswith("GET /api/models/me/blend/tree"))
    settings = hub.requests.index("PUT /api/models/me/blend/settings")
    assert commit < tree < settings


# what is refused before anything is sent -----------------------------------------------------------------------------


def test_a_changed_weight_is_found(hub: Any, publish_to: Any, merged: Path) -> None:
    file = merged / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = publish_to({"model": str(merged), "repo": "me/blend"})
    assert done.error.startswith("VerificationError")
    assert "changed" in done.error
    assert hub.requests == []


def test_a_changed_config_and_an_added_template_are_found(hub: Any, publish_to: Any, merged: Path) -> None:
    (merged / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat_template.jinja" in publish_to({"model": str(merged), "repo": "me/blend"}).error
    (merged / "chat_template.jinja").unlink()
    text = (merged / "generation_config.json").read_text()
    (merged / "generation_config.json").write_text(text + "\n")
    assert "generation_config.json: changed" in publish_to({"model": str(merged), "repo": "me/blend"}).error
    assert hub.requests == []


def test_a_public_repository_is_not_published_to_by_accident(hub: Any, publish_to: Any, merged: Path) -> None:
    hub.always_public = True
    done = publish_to({"model": str(merged), "repo": "me/blend"})
    assert done.error.startswith("HubError")
    assert "not private" in done.error
    assert list(hub.repos["me/blend"].files) == [".gitattributes"]


def test_a_tag_never_moves(
    hub: Any, publish_to: Any, merged: Path, make_model: Any, finish: Any, tmp_path: Path
) -> None:
    assert publish_to({"model": str(merged), "repo": "me/blend", "tag": "v1"}).error == ""
    assert publish_to({"model": str(merged), "repo": "me/blend", "card": {"summary": "Better words."}}).error == ""
    done = publish_to({"model": str(merged), "repo": "me/blend", "tag": "v1"})
    assert "tag 'v1' names commit" in done.error
    assert len(hub.repos["me/blend"].commits) == 3


# what goes wrong at the hub ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "status", "message", "expected"),
    [
        ("POST /api/repos/create", 403, "You don't have the rights", "may not write to me"),
        ("POST .*/commit/main", 412, "A commit has happened since", "somebody else changed"),
        ("POST .*/commit/main", 500, "internal error", "the hub answered 500"),
        ("PUT /lfs/.*", 403, "storage limit", "storage is full"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub: Any, publish_to: Any, merged: Path, pattern: str, status: int, message: str, expected: str
) -> None:
    hub.answers[pattern] = (status, message)
    done = publish_to({"model": str(merged), "repo": "me/blend"})
    assert done.error.startswith("HubError: me/blend on http://127.0.0.1")
    assert expected in done.error
    assert "\n" not in done.error
    assert all(list(r.files) == [".gitattributes"] for r in hub.repos.values())
    assert list(merged.parent.iterdir()) == [merged]


def test_without_a_token_or_a_network(hub: Any, publish_to: Any, merged: Path, tmp_path: Path) -> None:
    config = {"model": str(merged), "repo": "me/blend"}
    wrong = "hf_" + "wrong" * 7
    done = publish_to(config, HF_TOKEN=wrong)
    assert "set HF_TOKEN" in done.error
    assert wrong not in done.output
    assert "HF_HUB_OFFLINE is set" in publish_to(config, HF_HUB_OFFLINE="1").error
    assert "cannot be reached" in publish_to(config, HF_ENDPOINT="http://127.0.0.1:9").error


def test_a_hub_without_xet_storage_is_named(hub: Any, publish_to: Any, merged: Path) -> None:
    pytest.importorskip("hf_xet")
    done = publish_to({"model": str(merged), "repo": "me/blend"}, HF_HUB_DISABLE_XET="0")
    assert "HF_HUB_DISABLE_XET=1" in done.error
    assert list(hub.repos["me/blend"].files) == [".gitattributes"]


def test_bytes_that_the_hub_gets_wrong_are_noticed(hub: Any, publish_to: Any, merged: Path) -> None:
    hub.corrupt = "config.json"
    done = publish_to({"model": str(merged), "repo": "me/blend", "tag": "v1", "private": False})
    assert done.error.startswith("VerificationError")
    assert "config.json" in done.error
    assert hub.repos["me/blend"].tags == {}
    assert hub.repos["me/blend"].private, "never made public"


# without a hub -------------------------------------------------------------------------------------------------------


def test_a_dry_run_asks_no_hub_and_writes_nothing(hub: Any, merged: Path, tmp_path: Path) -> None:
    (merged / "wandb").mkdir()
    (merged / "wandb" / "log.txt").write_text("loss 1.0")
    before = local_files(tmp_path)
    script = """
import json, sys
from solera.publish import PublishConfig, plan_publish, publish
from solera_core.context import Context
print(json.dumps(plan_publish(PublishConfig(model=sys.argv[1], repo="me/blend"), Context()).to_json()))
"""
    arguments = [sys.executable, "-c", script, str(merged)]
    done = subprocess.run(
        arguments, env=hub.environment(tmp_path), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert hub.requests == []
    assert local_files(tmp_path) == before
    rows = {row["file"]: row["action"] for row in plan["rows"]}
    assert rows["model.safetensors"] == rows["README.md"] == "upload"
    assert rows["wandb/log.txt"] == "stays here"
    assert any("wandb/log.txt" in warning for warning in plan["warnings"])
    assert plan["parameters"]["base_model"] == ["org/one", "org/two"]
    assert plan["parameters"]["base_model_relation"] == "merge"


def test_the_plan_says_what_publish_would_refuse(merged: Path) -> None:
    (merged / "LICENSE").write_text("token = " + "hf_" + "x" * 34 + "\n")
    with pytest.raises(Exception, match=r"LICENSE:1: Hugging Face token"):
        plan_publish(PublishConfig(model=str(merged), repo="me/blend"), Context())


@pytest.mark.parametrize("repo", ["blend", "me/", "/blend", "me/a/b", "me/a..b", "https://x/y/z", "me/blend.git"])
def test_a_repository_is_called_name_model(repo: str) -> None:
    with pytest.raises(ConfigError, match=r"publish: repo: .*name/model"):
        parse(PublishConfig, {"model": "x", "repo": repo}, where="publish")


def test_licence_and_tag_are_checked_at_the_door() -> None:
    with pytest.raises(ConfigError, match=r"publish: license: 'apache2.0' .*did you mean 'apache-2.0'"):
        parse(PublishConfig, {"model": "x", "license": "apache2.0"}, where="publish")
    with pytest.raises(ConfigError, match="publish: tag"):
        parse(PublishConfig, {"model": "x", "tag": "v 1"}, where="publish")


def test_configuration_imports_neither_torch_nor_huggingface_hub() -> None:
    script = """
import sys
from solera.publish import PublishConfig
PublishConfig(model="x", repo="me/x", license="mit")
print([m for m in ("torch", "transformers", "huggingface_hub", "jinja2") if m in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_a_repository_only_the_directory_is_written(merged: Path, tmp_path: Path) -> None:
    result = publish(PublishConfig(model=str(merged)), Context(), out=tmp_path / "release")
    assert (result.url, result.commit, result.changed) == (None, None, False)
    assert set(result.files) == set(local_files(tmp_path / "release"))
    with pytest.raises(ConfigError, match="`repo` is not given"):
        publish(PublishConfig(model=str(merged)), Context())


def test_weights_are_linked_not_copied_where_possible(merged: Path, tmp_path: Path) -> None:
    from solera.assemble import assemble

    out = tmp_path / "release"
    assemble(PublishConfig(model=str(merged)), out, Context())
    assert (out / "model.safetensors").stat().st_ino == (merged / "model.safetensors").stat().st_ino
    assert (out / "config.json").stat().st_ino != (merged / "config.json").stat().st_ino
    shutil.rmtree(out)
    assert (merged / "model.safetensors").exists()
