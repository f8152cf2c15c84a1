"""The publishable directory: what goes into it, what stays at home, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from solera.assemble import Evidence, assemble, prepare
from solera.publish import PublishConfig
from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, DataError, InputError, TargetError, VerificationError
from solera_core.provenance import verify


def config_for(directory: Path, **settings: Any) -> PublishConfig:
    return PublishConfig(model=str(directory), **settings)


def test_only_files_of_known_kinds_go(merged: Path, tmp_path: Path) -> None:
    strays = [
        ".env",
        "optimizer.pt",
        "notes.txt",
        "modeling_custom.py",
        "wandb/run.json",
        ".cache/x.json",
        "sub/config.json",
        "a.bin",
    ]
    for name in strays:
        (merged / name).parent.mkdir(exist_ok=True)
        (merged / name).write_text("x")
    (merged / "LICENSE.txt").write_text("Do as you like.\n")
    release = assemble(config_for(merged), tmp_path / "out", Context())
    assert {name for name, _ in release.left_out} == set(strays)
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert not written & set(strays)
    assert {"config.json", "model.safetensors", "tokenizer.json", "solera.json", "README.md", "LICENSE.txt"} <= written
    assert verify(tmp_path / "out") == []
    assert verify(merged) != [], "the stray files are told of in the checkpoint itself"


def test_a_language_model_without_a_tokenizer_is_not_published(
    siblings: dict[str, Path], tmp_path: Path, finish: Any
) -> None:
    directory = tmp_path / "bare"
    shutil.copytree(siblings["a"], directory, ignore=shutil.ignore_patterns("tokenizer*"))
    finish(directory)
    with pytest.raises(CheckpointError, match=r"bare: has no tokenizer .*`tokenizer_source`"):
        assemble(config_for(directory), tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_not_replaced(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(TargetError, match="not empty"):
        assemble(config_for(merged), tmp_path / "out", Context())


@pytest.mark.parametrize("name", ["model-extra.safetensors", "README.md", "notes.txt", "linked"])
def test_symbolic_links_are_refused_wherever_they_lead(merged: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir() if name == "linked" else target.write_text("secret")
    (merged / name).symlink_to(target)
    with pytest.raises(InputError, match=f"{name}: is a symbolic link"):
        prepare(config_for(merged), Context())


def test_a_directory_that_solera_did_not_make(siblings: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no solera\.json"):
        prepare(config_for(siblings["a"]), Context())
    with pytest.raises(CheckpointError, match="no such directory"):
        prepare(config_for(tmp_path / "absent"), Context())


def test_weights_added_beside_the_model_are_refused(merged: Path, tmp_path: Path) -> None:
    (merged / "vision.safetensors").write_bytes((merged / "model.safetensors").read_bytes())
    with pytest.raises(VerificationError, match=r"vision\.safetensors"):
        assemble(config_for(merged), tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()


def test_secrets_are_named_by_file_and_line(merged: Path, tmp_path: Path) -> None:
    secret = "hf_" + "a1B2" * 9
    (merged / "LICENSE").write_text(f"line one\nmine: {secret}\nAKIA{'A' * 16}\n")
    with pytest.raises(InputError) as caught:
        assemble(config_for(merged), tmp_path / "out", Context())
    assert "LICENSE:2: Hugging Face token" in str(caught.value)
    assert "LICENSE:3: AWS access key" in str(caught.value)
    assert secret not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_home_directory_in_the_provenance(merged: Path, finish: Any) -> None:
    (merged / "solera.json").unlink()
    finish(merged, recipe={"models": [{"model": "/home" + "/somebody/models/a"}]})
    with pytest.raises(InputError, match=r"solera\.json:\d+: home directory.*relative to the recipe"):
        prepare(config_for(merged), Context())


def test_an_own_card_goes_as_it_is(merged: Path, tmp_path: Path) -> None:
    own = "---\nlicense: mit\n---\n# Mine\n"
    (merged / "README.md").write_text(own)
    release = assemble(config_for(merged), tmp_path / "out", Context())
    assert release.own_card
    assert release.licence.id == "mit"
    assert (tmp_path / "out" / "README.md").read_text() == own
    with pytest.raises(ConfigError, match=r"license: mit.*apache-2\.0"):
        prepare(config_for(merged, license="apache-2.0"), Context())


def test_a_card_of_ours_is_written_anew(merged: Path, tmp_path: Path) -> None:
    assemble(config_for(merged, repo="me/first"), tmp_path / "out", Context())
    again = prepare(config_for(tmp_path / "out", repo="me/second"), Context())
    assert not again.own_card
    card = next(f for f in again.files if f.name == "README.md")
    assert card.content is not None
    assert b"me/second" in card.content
    assert b"me/first" not in card.content


def test_results_of_another_model_are_refused(merged: Path, results_of: Any, tmp_path: Path) -> None:
    other = results_of(tmp_path / "r", "blake3:" + "0" * 64)
    with pytest.raises(DataError, match="measured on blake3:0000"):
        prepare(config_for(merged), Context(), Evidence(results={"blend": other}))
    with pytest.raises(DataError, match="which of the results"):
        prepare(config_for(merged), Context(), Evidence(results={"a": other, "b": other}))
    (tmp_path / "r" / "results.json").write_text("{}")
    with pytest.raises(DataError, match="not the results of an evaluation"):
        prepare(config_for(merged), Context(), Evidence(results={"a": other}))


def test_licence_texts_of_the_parents_are_shipped(
    siblings: dict[str, Path], merged: Path, finish: Any, tmp_path: Path
) -> None:
    import shutil

    for name, text in (("one", "Terms of one."), ("two", "Terms of two.")):
        shutil.copytree(siblings["base"], tmp_path / name)
        (tmp_path / name / "LICENSE").write_text(text)
        (tmp_path / name / "NOTICE").write_text("The same notice.")
        (tmp_path / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (merged / "solera.json").unlink()
    finish(merged, inputs=[("one", "one", "", "blake3:1"), ("two", "two", "", "blake3:2")])
    release = assemble(config_for(merged), tmp_path / "out", Context(base_dir=tmp_path, models={str(merged): merged}))
    texts = {p.name: p.read_text() for p in (tmp_path / "out").iterdir() if p.name.startswith(("LIC", "NOT"))}
    assert texts == {"LICENSE": "Terms of one.", "LICENSE-two": "Terms of two.", "NOTICE": "The same notice."}
    assert release.licence.id == "apache-2.0"
    assert verify(tmp_path / "out") == []


def test_the_record_of_the_release_differs_in_its_files_only(merged: Path, tmp_path: Path) -> None:
    assemble(config_for(merged), tmp_path / "out", Context())
    ours, theirs = (json.loads((d / "solera.json").read_text()) for d in (tmp_path / "out", merged))
    assert {k: v for k, v in ours.items() if k != "files"} == {k: v for k, v in theirs.items() if k != "files"}
    assert set(ours["files"]) - set(theirs["files"]) == {"README.md"}
