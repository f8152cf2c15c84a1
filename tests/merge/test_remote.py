"""Merges of models on the hub: planned and refused from headers, downloaded when everything else is right."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from solera_core.context import Context
from solera_core.provenance import verify
from solera_merge.config import MergeConfig
from solera_merge.run import merge
from tests import loopback_hub
from tests.loopback_hub import COMMIT, Hub

LINEAR: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1}, "dtype": "bfloat16"}
PREAMBLE = """
from solera_core.context import Context
from solera_core.progress import Silent
from solera_core.strict import parse
from solera_merge.config import MergeConfig
from solera_merge.run import merge, plan_merge
notes = answer["notes"] = []
class Notes(Silent):
    def note(self, message):
        notes.append(message)
ctx = Context(base_dir=Path(arguments["base_dir"]), progress=Notes())
config = parse(MergeConfig, arguments["recipe"], where="recipe")
"""
PLAN = "answer |= plan_merge(config, ctx).to_json()"
MERGE = "merge(config, Path(arguments['base_dir'], arguments['out']), ctx)"

Ask = Callable[..., Any]
Siblings = dict[str, Path]


@pytest.fixture
def hub(tmp_path: Path, siblings: Siblings) -> Iterator[Hub]:
    """`me/base`, `me/a`, `me/b`: the tiny siblings."""
    folder = tmp_path / "served"
    for name in ("base", "a", "b"):
        shutil.copytree(siblings[name], folder / name)
    with loopback_hub.serve(folder) as hub:
        yield hub


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Ask:
    """`ask(code, models, ...)`: plan or merge in a process of its own; `hub.asked` is about that run alone."""

    def run(code: str, *models: str, out: str = "out", offline: bool = False, **changes: Any) -> Any:
        hub.asked.clear()
        recipe = LINEAR | {"models": [{"model": m} for m in models]} | changes
        options: dict[str, Any] = {"base_dir": str(tmp_path), "recipe": recipe, "out": out}
        return loopback_hub.ask(PREAMBLE + code, hub.endpoint, tmp_path, offline=offline, **options)

    return run


def header_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def test_a_dry_run_of_many_shards(hub: Hub, ask: Ask, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Two models of more than thirty shards, each larger than what may be read."""
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    first = make_model(hub.folder / "x", shards=30, **size)
    make_model(hub.folder / "y", seed=1, shards=30, **size)
    (first / "README.md").write_text("---\nlicense: gemma\n---\n")
    files = sorted(first.glob("*.safetensors"))
    assert len(files) >= 30
    weights = sum(f.stat().st_size for f in files)
    answer = ask(PLAN, "me/x", "me/y@v1")
    assert "error" not in answer
    assert sum(a.served for a in hub.asked) < 1e6 < weights  # both models together
    assert sum(a.served for a in hub.weights()) == 2 * sum(map(header_bytes, files))
    assert all(a.first is not None for a in hub.weights())
    assert [(r["what"], r["download_bytes"], r["revision"]) for r in answer["reads"]] == [
        ("me/x", weights, COMMIT),
        ("me/y@v1", weights, COMMIT),
    ]
    assert [r["licence"] for r in answer["reads"]] == ["gemma", "unknown"]
    assert not (tmp_path / "out").exists()


def test_the_plan_is_that_of_local_models(ask: Ask, siblings: Siblings, recipe: Callable[..., MergeConfig]) -> None:
    from solera_merge.run import plan_merge

    remote = ask(PLAN, "me/a", "me/b")
    config = recipe(**LINEAR, models=["me/a", "me/b"])
    local = json.loads(json.dumps(plan_merge(config, Context(models={f"me/{n}": siblings[n] for n in "ab"})).to_json()))
    for plan in (remote, local):
        for read in plan["reads"]:
            assert read.pop("download_bytes") == (siblings["a"] / "model.safetensors").stat().st_size * (plan is remote)
            read.pop("path")
            read.pop("revision")
    same = ("reads", "writes", "disk_bytes", "rows", "warnings")
    assert {key: remote[key] for key in same} == {key: local[key] for key in same}


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merge_equals_that_of_local_models(
    hub: Hub, ask: Ask, siblings: Siblings, recipe: Callable[..., MergeConfig], tmp_path: Path, method: str
) -> None:
    changes = {"merge_method": method} | ({"base_model": "me/base"} if method == "ties" else {})
    answer = ask(MERGE, "me/a", "me/b@v1", **changes)
    assert "error" not in answer
    size = (siblings["a"] / "model.safetensors").stat().st_size
    downloading = [note for note in answer["notes"] if "downloading" in note]
    assert downloading[:2] == [f"{ref}: downloading {size / 1e9:.3f} GB" for ref in ("me/a", "me/b@v1")]
    assert all(COMMIT in a.path for a in hub.weights())  # what was planned, wherever the branch points by now
    models = {"me/a": siblings["a"], "me/b@v1": siblings["b"], "me/base": siblings["base"]}
    config = recipe(**LINEAR | changes | {"models": ["me/a", "me/b@v1"]})
    local = merge(config, tmp_path / "local", Context(models=models))
    out = tmp_path / "out"
    assert verify(out) == []
    names = {f.name for f in local.iterdir()}
    assert names == {f.name for f in out.iterdir()}
    assert [n for n in names - {"solera.json"} if (out / n).read_bytes() != (local / n).read_bytes()] == []
    records = [json.loads((d / "solera.json").read_text()) for d in (out, local)]
    assert [r.pop("revision") for r in records[0]["inputs"]] == [COMMIT] * (2 + (method == "ties"))
    assert [r.pop("revision") for r in records[1]["inputs"]] == [None] * (2 + (method == "ties"))
    assert records[0] == records[1]


def test_vocabularies_of_models_on_the_hub_are_united(
    hub: Hub, ask: Ask, siblings: Siblings, recipe: Callable[..., MergeConfig], tmp_path: Path
) -> None:
    """Planned from headers and small files; tokens, rows and bytes are those of local models."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto_model: Any = AutoModelForCausalLM
    auto_tokenizer: Any = AutoTokenizer
    folder = hub.folder / "tools"
    shutil.copytree(siblings["b"], folder)
    tokenizer = auto_tokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    model = auto_model.from_pretrained(folder, dtype="float32")
    model.resize_token_embeddings(312, mean_resizing=False)
    for saved in (tokenizer, model):
        saved.save_pretrained(folder)
    for wanted in ("union", "me/only"):  # the second one is not merged, and its weights are not asked for
        shutil.copytree(folder, hub.folder / "only", dirs_exist_ok=True)
        changes = {"tokenizer_source": wanted}
        models = ("me/a", "me/base") if wanted == "me/only" else ("me/a", "me/tools")
        answer = ask(PLAN, *models, **changes)
        weights = hub.weights()
        assert sum(asked.served for asked in weights) < 20_000
        assert not any("only" in asked.path for asked in weights)
        assert {row["what"] for row in answer["reads"]} == {*models, *(["me/only"] if wanted == "me/only" else [])}
        ask(MERGE, *models, out=wanted.replace("/", "-"), **changes)
        assert not any("only" in asked.path for asked in hub.weights())
        local = Context(models={f"me/{p.name}": p for p in hub.folder.iterdir()})
        here = merge(recipe(**LINEAR, models=list(models), **changes), tmp_path / f"here-{wanted[-4:]}", local)
        there = tmp_path / wanted.replace("/", "-")
        for file in ("model.safetensors", "tokenizer.json", "config.json"):
            assert (there / file).read_bytes() == (here / file).read_bytes(), (wanted, file)
        assert auto_tokenizer.from_pretrained(there).convert_tokens_to_ids("<tool>") == 300


def test_the_second_merge_asks_for_no_weights(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    ask(MERGE, "me/a", "me/b", out="first")
    assert hub.weights()
    ask(MERGE, "me/a", "me/b", out="second")
    assert not [a for a in hub.asked if a.file.endswith(".safetensors")]
    ask(MERGE, "me/a", "me/b", out="third", offline=True)
    assert hub.asked == []
    first, second, third = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("first", "second", "third"))
    assert first == second == third


@pytest.mark.parametrize("code", [PLAN, MERGE], ids=["plan", "merge"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 2}, "`num_attention_heads` is 4 and 2"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "the weights are quantised (aqlm)"),
        ({"vocab_size": 999}, ""),
    ],
)
def test_what_does_not_fit_is_found_before_any_weight(
    hub: Hub, ask: Ask, tmp_path: Path, code: str, changes: dict[str, Any], words: str
) -> None:
    file = hub.folder / "b" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    first, second = ("me/b", "me/a") if "vocab_size" in changes else ("me/a", "me/b")
    answer = ask(code, first, second)
    assert answer["error"] == "CheckpointError"
    assert (words or "vocab_size is 999, but") in answer["message"]
    assert all(a.first is not None for a in hub.weights())
    assert sum(a.served for a in hub.weights()) <= 2 * header_bytes(hub.folder / "a" / "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_every_problem_of_every_model_is_said(hub: Hub, ask: Ask) -> None:
    file = hub.folder / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (hub.folder / "b" / "config.json").unlink()
    weight = [{"filter": "self_atn", "value": 1}, {"value": 1}]
    message = ask(MERGE, "me/a", "me/b", "me/none", "me/base", "me/gone", parameters={"weight": weight})["message"]
    assert "truncated" in message
    assert "it has no config.json" in message
    for name in ("me/none", "me/gone"):
        assert f"model '{name}' not found" in message
    assert f"{hub.endpoint} has no such model" in message
    assert "filter 'self_atn' matches no tensor" in message
    assert all(a.first is not None for a in hub.weights())


def test_a_disk_too_small_for_the_download(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    hub.sizes["b/extra.safetensors"] = 10**18  # as if the repository held another file of that size
    answer = ask(MERGE, "me/a", "me/b")
    assert answer["error"] == "DiskFullError"
    assert "needs 1000000000." in answer["message"]
    assert "models--me--b" in answer["message"]  # where the space is missing
    assert all(a.first is not None for a in hub.weights())
    assert not (tmp_path / "out").exists()
    assert ask(PLAN, "me/a", "me/b")["reads"][1]["download_bytes"] > 10**18


def test_too_little_memory_is_found_before_the_download(hub: Hub, ask: Ask) -> None:
    code = "import dataclasses\nctx = dataclasses.replace(ctx, memory_bytes=1000)\n" + MERGE
    assert ask(code, "me/a", "me/b")["error"] == "ResourceError"
    assert all(a.first is not None for a in hub.weights())


def test_a_target_that_cannot_be_made_is_found_before_the_download(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    answer = ask(MERGE, "me/a", "me/b", out="file/out")
    assert answer["error"] == "TargetError"
    assert "cannot be written" in answer["message"]
    assert not hub.weights()


def test_two_references_to_one_commit_are_one_model(hub: Hub, ask: Ask) -> None:
    message = ask(PLAN, "me/a", "me/a@v1")["message"]
    assert "models: 'me/a' and 'me/a@v1': the same model twice" in message
    assert all(a.first is not None for a in hub.weights())
