"""Index against shards, stale files, and file names that try to leave the directory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_core.headers import read_header

INDEX = "model.safetensors.index.json"


def edit_index(model: Path, **changes: Any) -> None:
    """Change entries of the weight map (None removes one)."""
    index = json.loads((model / INDEX).read_text())
    for name, file in changes.items():
        key = name.replace("__", ".")
        if file is None:
            del index["weight_map"][key]
        else:
            index["weight_map"][key] = file
    (model / INDEX).write_text(json.dumps(index))


def refused(model: Path, ctx: Context, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(model, ctx)
    assert str(model) in str(caught.value)


def test_a_sharded_model_opens_in_order_of_file_and_offset(sharded: Path, ctx: Context) -> None:
    checkpoint = open_checkpoint(sharded, ctx)
    places = [(t.file.name, t.begin) for t in checkpoint.tensors.values()]
    assert places == sorted(places)
    assert len({file for file, _ in places}) > 1
    assert set(checkpoint.tensors) == set(json.loads((sharded / INDEX).read_text())["weight_map"])


def test_listed_but_absent_in_the_shard(sharded: Path, ctx: Context) -> None:
    edit_index(sharded, model__extra__weight="model-00001-of-00004.safetensors")
    shard = sorted(sharded.glob("model-*.safetensors"))[0].name
    edit_index(sharded, model__extra__weight=shard)
    refused(sharded, ctx, f"lists tensor 'model.extra.weight' in {shard}, which does not hold it")


def test_listed_in_another_shard(sharded: Path, ctx: Context) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = next(iter(read_header(first)))
    edit_index(sharded, **{name.replace(".", "__"): second.name})
    refused(sharded, ctx, f"lists tensor '{name}' in {second.name}, but it is in {first.name}")


def test_present_but_unlisted(sharded: Path, ctx: Context) -> None:
    name = list(read_header(sorted(sharded.glob("model-*.safetensors"))[0]))[-1]
    edit_index(sharded, **{name.replace(".", "__"): None})
    refused(sharded, ctx, f"does not list tensor '{name}'")


def test_a_tensor_in_two_shards(sharded: Path, ctx: Context) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    shutil.copy(first, second)
    refused(sharded, ctx, f"is also in {first.name}")


def test_a_missing_shard(sharded: Path, ctx: Context) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(sharded, ctx, rf"lists {shard.name}, but it is not there \(\d of \d shards are\)")


def test_a_truncated_shard_names_file_and_sizes(sharded: Path, ctx: Context) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    whole = shard.stat().st_size
    with shard.open("r+b") as stream:
        stream.truncate(whole - 100)
    refused(sharded, ctx, rf"{shard.name}: truncated: the header promises {whole} bytes, the file has {whole - 100}")


def test_shards_without_an_index(sharded: Path, ctx: Context) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, ctx, "holds shards .* but no model.safetensors.index.json")


def test_a_stale_index_beside_a_new_model(llama: Path, sharded: Path, ctx: Context) -> None:
    shutil.copy(sharded / INDEX, llama)
    refused(llama, ctx, "holds both model.safetensors and model.safetensors.index.json")


def test_stale_shards_beside_a_new_model(llama: Path, sharded: Path, ctx: Context) -> None:
    stale = sorted(sharded.glob("model-*.safetensors"))[0]
    shutil.copy(stale, llama)
    refused(llama, ctx, f"{stale.name} is not part of the model .*left over")


@pytest.mark.parametrize("escape", ["../other/model.safetensors", "/etc/passwd", "..", "sub/model.safetensors", ""])
def test_an_index_cannot_leave_the_directory(escape: str, sharded: Path, llama: Path, ctx: Context) -> None:
    (sharded / "sub").mkdir()
    shutil.copy(llama / "model.safetensors", sharded / "sub")
    edit_index(sharded, lm_head__weight=escape)
    refused(sharded, ctx, "'lm_head.weight' is said to be in .* which is not a plain file name")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_a_damaged_index(content: str, sharded: Path, ctx: Context) -> None:
    (sharded / INDEX).write_text(content)
    refused(sharded, ctx, "cannot be read as JSON|has no weight_map")


def test_a_file_number_is_no_file_name(sharded: Path, ctx: Context) -> None:
    edit_index(sharded, lm_head__weight=3)
    refused(sharded, ctx, "is said to be in 3")


def test_other_safetensors_files_are_not_the_model(llama: Path, ctx: Context) -> None:
    shutil.copy(llama / "model.safetensors", llama / "consolidated.safetensors")
    assert len(open_checkpoint(llama, ctx).tensors) == 21
