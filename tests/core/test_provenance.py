"""solera.json: the same bytes for the same work, and every later change found."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from safetensors.torch import load_file, save_file

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.data import DataSource
from solera_core.errors import CheckpointError, DataError, VerificationError
from solera_core.provenance import InputRecord, data_record, input_record, read_provenance, verify, write_provenance


def record(directory: Path, tensors: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "kind": "merge",
        "recipe": {"merge_method": "linear", "name": "Bläh"},
        "seed": 7,
        "inputs": [InputRecord("base", "me/base", "abc", "blake3:00")],
        "checks": {"finite": True},
    }
    return write_provenance(directory, tensors=tensors, **(settings | changes))


@pytest.fixture
def made(sharded: Path) -> Path:
    """A sharded model with its record."""
    record(sharded)
    return sharded


def test_the_content(made: Path) -> None:
    content = json.loads((made / "solera.json").read_text(encoding="utf-8"))
    assert content == read_provenance(made)
    assert content["schema"] == 1
    assert content["recipe"] == {"merge_method": "linear", "name": "Bläh"}
    assert content["inputs"] == [{"name": "base", "ref": "me/base", "revision": "abc", "digest": "blake3:00"}]
    assert {"python", "numpy", "torch", "transformers", "safetensors"} <= content["versions"].keys()
    tensors = {k: v for file in made.glob("model-*.safetensors") for k, v in load_file(file).items()}
    assert content["tensors"] == {n: "blake3:" + blake3(t.numpy().tobytes()).hexdigest() for n, t in tensors.items()}
    files = {p.name for p in made.iterdir() if p.suffix != ".safetensors"} - {"solera.json"}
    assert content["files"] == {n: hashlib.sha256((made / n).read_bytes()).hexdigest() for n in files}
    assert "model.safetensors.index.json" in files


def test_the_same_work_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    first = (made / "solera.json").read_bytes()
    other = tmp_path / "elsewhere" / "another-name"
    shutil.copytree(made, other)
    (other / "solera.json").unlink()
    os.utime(other / "config.json", (0, 0))
    digests = json.loads(first)["tensors"]
    record(other, dict(reversed(digests.items())))
    assert (other / "solera.json").read_bytes() == first
    assert str(tmp_path).encode() not in first


def test_digests_must_be_of_the_tensors_that_are_there(sharded: Path) -> None:
    with pytest.raises(VerificationError, match=r"22 tensors are written or hashed, not both: ghost, lm_head.weight"):
        record(sharded, {"ghost": "blake3:00"})
    assert not (sharded / "solera.json").exists()


def test_not_a_number_is_no_json(sharded: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        record(sharded, checks={"loss": float("nan")})


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "items.jsonl").write_text("x")
    content = record(tmp_path, kind="eval")
    assert content["tensors"] == {}
    assert set(content["files"]) == {"results.json", "sub/items.jsonl"}
    assert verify(tmp_path) == []
    (tmp_path / "sub" / "items.jsonl").write_text("y")
    assert verify(tmp_path) == ["sub/items.jsonl: changed"]


# verify


def change_tensor(made: Path) -> None:
    file = sorted(made.glob("model-*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def remove_weights(made: Path) -> None:
    for file in made.glob("model*"):
        file.unlink()


def patch_header(made: Path, old: bytes, new: bytes) -> None:
    file = next(p for p in sorted(made.glob("model-*.safetensors")) if old in p.read_bytes())
    file.write_bytes(file.read_bytes().replace(old, new, 1))


def rename_tensor(made: Path) -> None:
    patch_header(made, b'"model.norm.weight"', b'"model.morn.weight"')
    index = made / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model.norm.weight", "model.morn.weight"))


def reshape_tensor(made: Path) -> None:
    patch_header(made, b"[48,32]", b"[32,48]")


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda d: None, []),
    "a tensor": (change_tensor, ["tensor lm_head.weight: changed"]),
    "a name": (
        rename_tensor,
        [
            "tensor model.norm.weight: missing",
            "tensor model.morn.weight: not in solera.json",
            "model.safetensors.index.json: changed",
        ],
    ),
    "a shape": (reshape_tensor, ["solera.json: its digest disagrees with what it lists"]),
    "the config": (lambda d: (d / "config.json").write_text("{}"), ["config.json: changed"]),
    "a file gone": (lambda d: (d / "tokenizer.json").unlink(), ["tokenizer.json: missing"]),
    "a file more": (lambda d: (d / ".hidden.py").write_text(""), [".hidden.py: not in solera.json"]),
    "weights more": (lambda d: (d / "x.safetensors").write_text(""), ["x.safetensors: not in solera.json"]),
    "a shard gone": (lambda d: sorted(d.glob("model-*.safetensors"))[0].unlink(), ["which is not|not there"]),
    "a shard cut": (lambda d: os.truncate(sorted(d.glob("model-*.safetensors"))[0], 3000), ["truncated"]),
    "all weights gone": (remove_weights, ["not a checkpoint", "index.json: missing"]),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_every_change_is_found_and_nothing_else(kind: str, made: Path) -> None:
    change, expected = CHANGES[kind]
    change(made)
    problems = verify(made)
    assert len(problems) == len(expected), problems
    for problem, message in zip(problems, expected, strict=True):
        assert any(part in problem for part in message.split("|")), problem


def test_a_forged_record_is_found(made: Path) -> None:
    content = json.loads((made / "solera.json").read_text())
    content["digest"] = "blake3:" + "0" * 64
    (made / "solera.json").write_text(json.dumps(content))
    assert "its digest disagrees" in verify(made)[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 2}', '{"schema": 1}'])
def test_a_damaged_record(content: str, made: Path) -> None:
    (made / "solera.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"solera\.json"):
        verify(made)


def test_no_record(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no solera\.json; it was not made by solera"):
        verify(sharded)


# What the digest of a checkpoint takes from the record


def test_the_recorded_digest_is_the_computed_one(made: Path, ctx: Context) -> None:
    recorded = json.loads((made / "solera.json").read_text())["digest"]
    assert open_checkpoint(made, ctx).digest() == recorded
    (made / "solera.json").unlink()
    assert open_checkpoint(made, ctx).digest() == recorded


def test_the_record_spares_reading(made: Path, ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(made, ctx)
    monkeypatch.setattr(type(checkpoint), "tensor_digests", lambda self: pytest.fail("the weights were read"))
    assert checkpoint.digest().startswith("blake3:")


def test_weights_changed_after_the_record_are_read(made: Path, ctx: Context) -> None:
    before = open_checkpoint(made, ctx).digest()
    change_tensor(made)
    assert open_checkpoint(made, ctx).digest() != before


def test_a_config_changed_after_the_record_counts(made: Path, ctx: Context) -> None:
    before = open_checkpoint(made, ctx).digest()
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert open_checkpoint(made, ctx).digest() != before


def test_a_record_that_was_downloaded_is_not_believed(made: Path, tmp_path: Path, ctx: Context) -> None:
    """It agrees with itself and with the headers, but nobody here has hashed those weights."""
    honest = open_checkpoint(made, ctx).digest()
    digests = json.loads((made / "solera.json").read_text())["tensors"]
    (made / "solera.json").unlink()
    record(made, dict.fromkeys(digests, "blake3:" + "0" * 64))
    assert open_checkpoint(made, ctx).digest() != honest
    snapshot = tmp_path / "models--me--model" / "snapshots" / "abc"
    shutil.copytree(made, snapshot)
    assert open_checkpoint(snapshot, ctx).revision == "abc"
    assert open_checkpoint(snapshot, ctx).digest() == honest


# Inputs


def test_the_record_of_a_model(made: Path, ctx: Context) -> None:
    checkpoint = open_checkpoint("sharded", ctx)
    assert input_record(checkpoint) == InputRecord("sharded", "sharded", None, checkpoint.digest())
    assert input_record(checkpoint, name="base").name == "base"


def test_the_record_of_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    found = data_record("prose", DataSource(path="a.txt"), tmp_path)
    assert found == InputRecord("prose", "a.txt", None, "sha256:" + hashlib.sha256(b"one").hexdigest())
    (tmp_path / "folder").mkdir()
    digests = set()
    for name, text in [("a.txt", "one"), ("a.txt", "two"), ("b.txt", "one")]:
        (tmp_path / "folder" / name).write_text(text)
        digests.add(data_record("prose", DataSource(path="folder"), tmp_path).digest)
    assert len(digests) == 3
    with pytest.raises(DataError, match=r"none\.txt: no such file"):
        data_record("prose", DataSource(path="none.txt"), tmp_path)


def test_resaving_equal_weights_keeps_the_digest(made: Path, ctx: Context) -> None:
    """The digest is of the content: another library writes another header order, and nothing changes."""
    before = open_checkpoint(made, ctx).digest()
    for file in made.glob("model-*.safetensors"):
        save_file(dict(sorted(load_file(file).items(), reverse=True)), file, metadata={"format": "pt"})
    assert open_checkpoint(made, ctx).digest() == before
    assert verify(made) == []


def test_what_a_download_leaves_beside_a_model_is_no_change(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    write_provenance(tmp_path, kind="merge", recipe={}, seed=0, inputs=[], tensors=None, checks={})
    (tmp_path / ".gitattributes").write_text("*.safetensors filter=lfs")
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "x.metadata").write_text("x")
    assert verify(tmp_path) == []
    (tmp_path / ".cache" / "other").write_text("x")
    assert len(verify(tmp_path)) == 1
