"""`.bin` weights: only with permission, only tensors, read by ranges."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from solera_core.checkpoint import locate, open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError


@pytest.fixture
def allowed(tmp_path: Path) -> Context:
    return Context(base_dir=tmp_path, allow_pickle=True)


@pytest.fixture
def bin_model(llama: Path) -> Path:
    """A tiny Llama as `pytorch_model.bin`."""
    return rewrite(llama, load_file(llama / "model.safetensors"))


def rewrite(model: Path, content: Any, **options: Any) -> Path:
    (model / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, model / "pytorch_model.bin", **options)
    return model


def test_a_pickle_needs_permission(bin_model: Path, ctx: Context) -> None:
    for function in (open_checkpoint, locate):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: the weights are pickled.*--allow-pickle"):
            function(bin_model, ctx)


def test_equal_to_safetensors(bin_model: Path, siblings: dict[str, Path], allowed: Context, ctx: Context) -> None:
    ours, theirs = open_checkpoint(bin_model, allowed), open_checkpoint(siblings["a"], ctx)
    assert set(ours.tensors) == set(theirs.tensors)
    for name in theirs.tensors:
        assert np.array_equal(ours.read_raw(name, 3, 7), theirs.read_raw(name, 3, 7))
        assert np.array_equal(ours.read(name), theirs.read(name))
    assert ours.digest() == theirs.digest()


def test_the_old_format_and_strided_tensors(bin_model: Path, allowed: Context) -> None:
    weight = torch.arange(12.0).view(3, 4)
    rewrite(bin_model, {"w": weight.t(), "h": weight.bfloat16()}, _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(bin_model, allowed)
    assert np.array_equal(checkpoint.read("w"), weight.t().numpy())
    assert checkpoint.tensors["h"].dtype == "BF16"
    assert np.array_equal(checkpoint.read_flat("h", 2, 5), np.arange(2, 5, dtype=np.float32))


def test_a_head_that_shares_memory_with_the_embedding_is_one_tensor(bin_model: Path, allowed: Context) -> None:
    embedding = torch.randn(8, 4)
    rewrite(bin_model, {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding})
    config = json.loads((bin_model / "config.json").read_text())
    del config["tie_word_embeddings"]
    (bin_model / "config.json").write_text(json.dumps(config))
    assert list(open_checkpoint(bin_model, allowed).tensors) == ["model.embed_tokens.weight"]
    rewrite(bin_model, {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()})
    assert len(open_checkpoint(bin_model, allowed).tensors) == 2


def test_sharded(bin_model: Path, siblings: dict[str, Path], allowed: Context) -> None:
    tensors = load_file(siblings["a"] / "model.safetensors")
    names = list(tensors)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    (bin_model / "pytorch_model.bin").unlink()
    for file, part in shards.items():
        torch.save({n: tensors[n] for n in part}, bin_model / file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (bin_model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert set(open_checkpoint(bin_model, allowed).tensors) == set(names)
    index["weight_map"]["ghost"] = "pytorch_model-00001-of-00002.bin"
    (bin_model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lists tensor 'ghost' in pytorch_model-00001"):
        open_checkpoint(bin_model, allowed)
    shutil.copy(bin_model / "pytorch_model-00001-of-00002.bin", bin_model / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match="is also in pytorch_model-00001"):
        open_checkpoint(bin_model, allowed)


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch code-has-run",)


def test_a_pickle_with_code_is_refused_and_does_not_run(
    bin_model: Path, allowed: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rewrite(bin_model, {"w": torch.zeros(2), "x": _Evil()})
    with pytest.raises(CheckpointError, match="refused: the pickle asks for more than tensors"):
        open_checkpoint(bin_model, allowed)
    (bin_model / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil(), protocol=2))
    with pytest.raises(CheckpointError, match=r"refused|not a torch file"):
        open_checkpoint(bin_model, allowed)
    assert not (tmp_path / "code-has-run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not a mapping"),
        ({"w": torch.zeros(1), "step": 3}, "'step' is not a tensor; this looks like a training checkpoint"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "'w' is torch.complex64"),
    ],
)
def test_other_contents(content: Any, message: str, bin_model: Path, allowed: Context) -> None:
    rewrite(bin_model, content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(bin_model, allowed)


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_truncated(size: int, bin_model: Path, allowed: Context) -> None:
    os.truncate(bin_model / "pytorch_model.bin", size)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: (truncated|refused)"):
        open_checkpoint(bin_model, allowed)


def test_safetensors_win_over_a_pickle_beside_them(llama: Path, ctx: Context) -> None:
    (llama / "pytorch_model.bin").write_bytes(b"never opened")
    assert len(open_checkpoint(llama, ctx).tensors) == 21
