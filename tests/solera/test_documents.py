"""Several merges in one file, as mergekit-multi has them."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import solera
from solera.cli import main
from solera.documents import DocumentsConfig, merge_documents, plan_documents
from solera.rebuild import rebuild
from solera_core.context import Context
from solera_core.errors import ConfigError, SoleraError
from solera_core.progress import Silent
from solera_core.provenance import verify
from solera_core.strict import parse
from solera_merge.config import MergeConfig
from solera_merge.run import merge

Siblings = dict[str, Path]
Document = dict[str, Any]

HALVES: Document = {
    "name": "halves",
    "merge_method": "slerp",
    "base_model": "a",
    "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"t": 0.5},
    "dtype": "float32",
}
SCALED: Document = {"name": "scaled", "merge_method": "linear", "models": [{"model": "c"}], "parameters": {"weight": 1}}
LAST: Document = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "halves", "parameters": {"weight": 0.7}},
        {"model": "scaled", "parameters": {"weight": 0.4, "density": 0.5}},
    ],
    "dtype": "bfloat16",
}
LINEAR: Document = {"merge_method": "linear", "parameters": {"weight": 1}}


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def several(*documents: Document, keep: Path | None = None) -> DocumentsConfig:
    return DocumentsConfig(documents=list(documents), keep_intermediate=keep)


def by_hand(models: Siblings, folder: Path) -> Path:
    """The same, one merge after the other."""
    made: dict[str, Path] = {}
    for document in (HALVES, SCALED, LAST | {"name": "last"}):
        content = {key: value for key, value in document.items() if key != "name"}
        ctx = Context(models={**models, **made})
        made[document["name"]] = merge(parse(MergeConfig, content, where=""), folder / document["name"], ctx)
    return made["last"]


@pytest.mark.parametrize("order", [[HALVES, SCALED, LAST], [LAST, SCALED, HALVES]])
def test_the_same_as_one_after_the_other(siblings: Siblings, tmp_path: Path, order: list[Document]) -> None:
    """In whatever order they stand."""
    out = merge_documents(several(*order), tmp_path / "out", Context(models=siblings))
    expected = by_hand(siblings, tmp_path / "hand")
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert (out / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hand", "out"]
    assert verify(out) == []


def test_as_mergekit_multi_makes_it_of_the_same_file(
    siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal in float32: a passthrough stack of two halves, whose deltas from a third model are added up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what mergekit and its dependencies warn about is theirs
        from click.testing import CliRunner
        from mergekit.scripts.multimerge import main as mergekit_multi

    monkeypatch.chdir(tmp_path)
    a, b, c, base = (str(siblings[name]) for name in ("a", "b", "c", "base"))
    stack = {
        "name": "stack",
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": m, "layer_range": r}]} for m, r in ((a, [0, 1]), (b, [1, 2]))],
        "dtype": "float32",
    }
    moved = {
        "name": "moved",
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": "stack", "parameters": {"weight": 0.7}}, {"model": c, "parameters": {"weight": [0, 1]}}],
        "dtype": "float32",
    }
    last = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": "moved"}, {"model": "stack"}],
        "parameters": {"weight": 0.5, "density": 0.6},
        "dtype": "float32",
    }
    Path("all.yml").write_text(yaml.safe_dump_all([last, stack, moved], sort_keys=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(mergekit_multi, ["all.yml", "-I", "theirs/kept", "--out-path", "theirs/out"])
    assert result.exit_code == 0, result.output
    assert main(["merge", "all.yml", "ours/out", "-q", "--keep-intermediate", "ours/kept"]) == 0
    for place in ("kept/stack", "kept/moved", "out"):
        ours, theirs = (load_file(Path(who, place, "model.safetensors")) for who in ("ours", "theirs"))
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-7 * np.abs(theirs[name]).max())


def test_the_record_is_about_all_of_them(siblings: Siblings, tmp_path: Path) -> None:
    ctx = Context(models=siblings)
    out = merge_documents(several(HALVES, SCALED, LAST), tmp_path / "out", ctx)
    record = json.loads((out / "solera.json").read_text())
    assert record["recipe"] == {"documents": [HALVES, SCALED, LAST]}
    assert {item["ref"] for item in record["inputs"]} == {"a", "b", "c", "base"}
    assert rebuild(out, ctx).problems == ()


def test_kept_ones_are_used_again_until_something_changes(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings | {"c": Path(shutil.copytree(siblings["c"], tmp_path / "c"))}
    keep = tmp_path / "kept"

    def run(*documents: Document, out: str) -> list[str]:
        notes = Notes()
        merge_documents(several(*documents, keep=keep), tmp_path / out, Context(models=models, progress=notes))
        return [said for said in notes.said if said.endswith("is there already")]

    assert run(HALVES, SCALED, LAST, out="first") == []
    assert verify(keep / "halves") == []
    assert run(HALVES, SCALED, LAST, out="second") == ["halves: is there already", "scaled: is there already"]
    changed = HALVES | {"parameters": {"t": 0.25}}
    assert run(changed, SCALED, LAST, out="third") == ["scaled: is there already"]
    weights = models["c"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert run(changed, SCALED, LAST, out="fourth") == ["halves: is there already"]
    read = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second", "third")}
    assert read["first"] == read["second"] != read["third"]


def test_after_a_kill_it_goes_on(siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from solera import documents

    whole = merge_documents(several(HALVES, SCALED, LAST), tmp_path / "whole", Context(models=siblings))

    def killed(config: MergeConfig, out: Path, ctx: Context, **more: Any) -> Path:
        if config.merge_method == "ties":
            raise KeyboardInterrupt
        return merge(config, out, ctx, **more)

    with monkeypatch.context() as patched:
        patched.setattr(documents, "merge", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_documents(several(HALVES, SCALED, LAST), tmp_path / "out", Context(models=siblings))
    assert not (tmp_path / "out").exists()
    notes = Notes()
    out = merge_documents(several(HALVES, SCALED, LAST), tmp_path / "out", Context(models=siblings, progress=notes))
    assert [said for said in notes.said if "already" in said] == [
        "halves: is there already",
        "scaled: is there already",
    ]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_a_failure_in_between_leaves_nothing(siblings: Siblings, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(siblings["c"], tmp_path / "c"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    from safetensors.numpy import save_file

    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(SoleraError, match="holds nan"):
        merge_documents(several(HALVES, SCALED, LAST), tmp_path / "out", Context(models=siblings | {"c": broken}))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_all_are_planned_before_the_first_runs(siblings: Siblings, tmp_path: Path) -> None:
    wrong = LAST | {"models": [{"model": "halves"}, {"model": "none"}], "parameters": {"weight": 1}}
    with pytest.raises(SoleraError, match=r"'output'.*model 'none' not found.*there are: .*halves"):
        merge_documents(several(HALVES, wrong), tmp_path / "out", Context(models=siblings))
    assert list(tmp_path.iterdir()) == []


def test_the_plan_shows_all(siblings: Siblings) -> None:
    plan = plan_documents(several(HALVES, SCALED, LAST), Context(models=siblings))
    assert plan.stage == "merge in 3 stages: halves, scaled, output"
    assert [(row["stage"], row["what"]) for row in plan.reads] == [
        ("halves", "a"),
        ("halves", "b"),
        ("scaled", "c"),
        ("output", "base"),
    ]
    names = load_file(siblings["a"] / "model.safetensors").keys()
    assert len(plan.rows) == 3 * len(names)
    assert {row["stage"] for row in plan.rows} == {"halves", "scaled", "output"}
    assert plan.parameters["halves.merge_method"] == "slerp"
    sizes = [row["bytes"] for row in plan.writes if row["what"] == "model.safetensors"]
    assert sizes[0] == sizes[1] > sizes[2]


def test_a_tokenizer_made_on_the_way_is_there_for_the_plan_of_the_next(siblings: Siblings, tmp_path: Path) -> None:
    tokens = {"<newer>": {"source": {"kind": "zero"}}}
    first = LINEAR | {"name": "x", "models": [{"model": "a"}, {"model": "b"}]}
    first |= {"tokenizer": {"source": "union", "tokens": tokens, "pad_to_multiple_of": 64}}
    last = LINEAR | {"models": [{"model": "x"}], "tokenizer_source": "x"}
    config = several(first, last)
    rows = {
        row["tensor"]: row["shape"]
        for row in plan_documents(config, Context(models=siblings)).rows
        if row["stage"] == "output"
    }
    out = merge_documents(config, tmp_path / "out", Context(models=siblings))
    made = load_file(out / "model.safetensors")
    assert {name: "x".join(map(str, tensor.shape)) for name, tensor in made.items()} == rows
    assert "<newer>" in (out / "tokenizer.json").read_text()


def test_where_all_have_names_the_last_is_the_output(siblings: Siblings, tmp_path: Path) -> None:
    out = merge_documents(several(HALVES, SCALED, LAST | {"name": "end"}), tmp_path / "o", Context(models=siblings))
    expected = by_hand(siblings, tmp_path / "hand")
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_on_the_command_line(
    siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, path in siblings.items():
        (tmp_path / name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    Path("all.yml").write_text(yaml.safe_dump_all([HALVES, SCALED, LAST]) + "---\n")
    assert main(["merge", "all.yml", "out", "--dry-run", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["stage"].startswith("merge in 3 stages")
    assert main(["plan", "all.yml"]) == 0
    assert not Path("out").exists()
    assert main(["merge", "all.yml", "out", "-q", "--keep-intermediate", "kept"]) == 0
    assert sorted(p.name for p in Path("kept").iterdir() if p.is_dir()) == ["halves", "scaled"]
    assert main(["verify", "out", "--rebuild", "-q"]) == 0
    assert main(["merge", "all.yml", "kept/halves", "-q", "--keep-intermediate", "kept"]) == 3
    capsys.readouterr()
    Path("one.yml").write_text(yaml.safe_dump(HALVES))  # a single one may have a name, which says nothing
    assert main(["merge", "one.yml", "one", "-q"]) == 0
    assert main(["merge", "one.yml", "two", "-q", "--keep-intermediate", "kept"]) == 3
    assert "one.yml holds a single merge" in capsys.readouterr().err
    made = solera.merge({"documents": [HALVES, SCALED, LAST]}, "python")
    assert (made / "model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


A = {"name": "x", **LINEAR, "models": [{"model": "a"}]}


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([A, A, LAST], ["documents.1: the name 'x' is given twice"]),
        ([LAST, LAST], ["documents.1: more than one has no name"]),
        ([A | {"name": 3}, LAST], ["documents.0: name: expected a word, found 3"]),
        ([A | {"name": "../x"}, LAST], ["stages.../x: a stage's name is letters"]),
        (
            [A | {"models": [{"model": "y"}]}, A | {"name": "y", "models": [{"model": "x"}]}, LAST],
            ["read each other in a circle: x -> y -> x"],
        ),
        ([A | {"models": [{"model": "x"}]}, LAST], ["in a circle: x -> x"]),
        ([A, HALVES, SCALED, LAST], ["'x' would be made and thrown away", "--keep-intermediate"]),
        (
            [A | {"densty": 1}, HALVES | {"merge_method": "slrp"}],
            ["documents: x: densty: unknown key", "documents: halves: merge_method: unknown method 'slrp'"],
        ),
        ([A | {"models": [{"model": "halvs"}]}, HALVES, LINEAR | {"models": [{"model": "x"}]}], ["'halvs' not found"]),
    ],
)
def test_bad_input(siblings: Siblings, tmp_path: Path, documents: list[Document], words: list[str]) -> None:
    ctx = Context(models=siblings)
    for run in (
        lambda: plan_documents(several(*documents), ctx),
        lambda: merge_documents(several(*documents), tmp_path / "out", ctx),
    ):
        with pytest.raises(SoleraError) as raised:
            run()
        for word in words:
            assert word in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_unused_ones_are_made_where_they_are_kept(siblings: Siblings, tmp_path: Path) -> None:
    documents = [A, LINEAR | {"models": [{"model": "b"}]}]
    merge_documents(several(*documents, keep=tmp_path / "kept"), tmp_path / "out", Context(models=siblings))
    assert verify(tmp_path / "kept" / "x") == []


def test_the_seed_is_that_of_all(siblings: Siblings, tmp_path: Path) -> None:
    dare = HALVES | {"merge_method": "dare_ties", "base_model": "base", "parameters": {"weight": 0.5, "density": 0.5}}
    ctx = Context(models=siblings)
    made = [
        merge_documents(several(dare, SCALED, LAST), tmp_path / f"out{i}", replace(ctx, seed=seed))
        for i, seed in enumerate((1, 1, 2))
    ]
    first, second, third = ((out / "model.safetensors").read_bytes() for out in made)
    assert first == second != third


def test_files_of_weights_are_no_stage(siblings: Siblings, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copy(siblings[name] / "model.safetensors", tmp_path / f"{name}.safetensors")
    raw = LINEAR | {"name": "x", "models": [{"model": "a.safetensors"}, {"model": "b.safetensors"}]}
    last = LINEAR | {"models": [{"model": "x"}]}
    with pytest.raises((ConfigError, SoleraError), match=r"'output'.*not a checkpoint: it has no config\.json"):
        plan_documents(several(raw, last), Context(models=siblings, base_dir=tmp_path))
