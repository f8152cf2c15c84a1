"""Differences between checkpoints, against numpy on whole tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from solera_core import diff as diff_module
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.diff import diff


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


def rows(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], ctx: Context) -> dict[str, dict[str, Any]]:
    pair = [open_checkpoint(save(ctx.base_dir / name, tensors), ctx) for name, tensors in (("a", a), ("b", b))]
    found = diff(*pair)
    json.dumps(found, allow_nan=False)
    return {row["name"]: row for row in found}


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_equals_numpy(block: int, siblings: dict[str, Path], ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff_module, "_BLOCK", block)
    found = diff(open_checkpoint(siblings["a"], ctx), open_checkpoint(siblings["b"], ctx))
    a, b = (load_file(siblings[n] / "model.safetensors") for n in "ab")
    assert [row["name"] for row in found] == list(open_checkpoint(siblings["a"], ctx).tensors)
    for row in found:
        x, y = (t[row["name"]].double().numpy().ravel() for t in (a, b))
        assert row["relative_change"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
        assert row["cosine"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
        assert row["max_abs"] == np.abs(y - x).max()
        assert row["shape"] == list(a[row["name"]].shape)
        assert not row["identical"]
        assert row["note"] == ""


def test_a_model_and_itself(siblings: dict[str, Path], ctx: Context) -> None:
    checkpoint = open_checkpoint(siblings["a"], ctx)
    for row in diff(checkpoint, checkpoint):
        assert (row["relative_change"], row["max_abs"], row["identical"]) == (0.0, 0.0, True)
        assert row["cosine"] == pytest.approx(1.0, abs=1e-12)


def test_by_hand(ctx: Context) -> None:
    row = rows({"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([4.0, -3.0])}, ctx)["w"]
    assert row["relative_change"] == pytest.approx(50**0.5 / 5)
    assert row["cosine"] == 0.0
    assert row["max_abs"] == 7.0


def test_what_cannot_be_compared_is_noted(ctx: Context) -> None:
    one = torch.ones(2)
    found = rows(
        {
            "shape": torch.ones(3),
            "gone": one,
            "dtype": one,
            "zero": torch.zeros(2),
            "nan": one,
            "int": torch.arange(2),
            "same": torch.arange(2),
        },
        {
            "shape": torch.ones(4),
            "new": one,
            "dtype": one.half(),
            "zero": one,
            "nan": one * float("nan"),
            "int": torch.ones(2).long(),
            "same": torch.arange(2),
        },
        ctx,
    )
    assert list(found)[-1] == "new"
    assert found["shape"]["note"] == "shape [3] and [4]"
    assert found["gone"]["note"] == "only in a"
    assert found["new"]["note"] == "only in b"
    assert found["dtype"]["note"] == "dtype F32 and F16"
    assert (found["dtype"]["max_abs"], found["dtype"]["identical"]) == (0.0, False)
    assert (found["zero"]["relative_change"], found["zero"]["cosine"], found["zero"]["max_abs"]) == (None, None, 1.0)
    assert (found["nan"]["note"], found["nan"]["max_abs"]) == ("not finite", None)
    assert (found["int"]["identical"], found["same"]["identical"]) == (False, True)


def test_float64_differences_below_float32_are_not_identical(ctx: Context) -> None:
    w = torch.ones(3, dtype=torch.float64)
    found = rows({"w": w, "v": w}, {"w": w + 1e-12, "v": w.clone()}, ctx)
    assert (found["w"]["identical"], found["v"]["identical"]) == (False, True)


def test_negative_zero_is_another_bit_pattern(ctx: Context) -> None:
    found = rows({"w": torch.tensor([0.0])}, {"w": torch.tensor([-0.0])}, ctx)
    assert (found["w"]["identical"], found["w"]["relative_change"]) == (False, 0.0)
