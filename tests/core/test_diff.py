"""Differences between checkpoints, against numpy on whole tensors."""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from solera_core import diff as diff_module
from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.diff import Diff, diff, is_matrix, kind_of, layer_label, whole

Tensors = dict[str, torch.Tensor]
Siblings = dict[str, Path]


def save(directory: Path, tensors: Tensors) -> Path:
    directory.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


def compared(ctx: Context, *models: Tensors, **options: Any) -> Diff:
    """The first against the others."""
    opened = [open_checkpoint(save(ctx.base_dir / f"m{i}", tensors), ctx) for i, tensors in enumerate(models)]
    found = diff(opened[0], opened[1:], **options)
    json.dumps(found.to_json(), allow_nan=False)
    return found


def rows(ctx: Context, a: Tensors, b: Tensors) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in compared(ctx, a, b).rows()}


def opened(siblings: Siblings, names: str, ctx: Context) -> list[Checkpoint]:
    return [open_checkpoint(siblings[name], ctx) for name in names.split()]


def doubles(directory: Path) -> dict[str, npt.NDArray[np.float64]]:
    return {n: t.double().numpy() for n, t in load_file(directory / "model.safetensors").items()}


def figures(base: Any, model: Any) -> dict[str, Any]:
    x, y = base.ravel(), model.ravel()
    return {
        "elements": x.size,
        "relative_change": pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12),
        "cosine": pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12),
        "changed": np.mean(x != y),
        "max_abs": np.abs(y - x).max(),
    }


def opposition(a: Any, b: Any) -> dict[str, Any]:
    both, opposed = (a * b) != 0, (a * b) < 0
    mass = np.abs(a) + np.abs(b)
    return {
        "cosine": pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-9),
        "sign_conflict": opposed.sum() / both.sum(),
        "sign_conflict_mass": pytest.approx(mass[opposed].sum() / mass.sum(), rel=1e-12),
    }


@pytest.mark.parametrize(("block", "piece"), [(7, 40), (1 << 16, 1 << 24)])
def test_equals_numpy(
    block: int, piece: int, siblings: Siblings, ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff_module, "_BLOCK", block)
    monkeypatch.setattr(diff_module, "_PIECE", piece)
    small = {
        name: path if block > 7 else save(ctx.base_dir / name, _first_tensors(path)) for name, path in siblings.items()
    }
    first, *others = opened(small, "base a b c", ctx)
    found = diff(first, others, threads=3)
    base, *models = (doubles(small[name]) for name in ("base", "a", "b", "c"))
    assert [row["name"] for row in found.rows()] == [name for name in first.tensors for _ in range(3)]
    for i, row in enumerate(found.rows()):
        expected = figures(base[row["name"]], models[i % 3][row["name"]])
        assert {key: row[key] for key in expected} == expected
        assert row["shape"] == list(base[row["name"]].shape)
        assert not row["identical"]
        assert (row["note"], row["effective_rank"]) == ("", None)
    for row, (name, i, j) in zip(found.pair_rows(), found.pairs, strict=True):
        taus = [(models[k][name] - base[name]).ravel() for k in (i, j)]
        expected = opposition(*taus)
        assert {key: row[key] for key in expected} == expected
    assert [pair[1:] for pair in found.pairs][:3] == list(combinations(range(3), 2))


def _first_tensors(path: Path) -> Tensors:
    tensors = load_file(path / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if tensor.numel() < 2000}


def test_totals_are_those_of_all_elements(siblings: Siblings, ctx: Context) -> None:
    base, *models = opened(siblings, "base a b", ctx)
    found = diff(base, models)
    arrays = [doubles(siblings[name]) for name in ("base", "a", "b")]
    for group in (whole, layer_label, kind_of):
        totals, pairs = found.totals(group), found.pair_totals(group)
        for key in {group(name) for name in arrays[0]}:
            parts = [np.concatenate([a[n].ravel() for n in found_names(found) if group(n) == key]) for a in arrays]
            expected = figures(parts[0], parts[1])
            assert {k: totals[key, 0][k] for k in expected} == expected
            assert pairs[key, 0, 1] == opposition(parts[1] - parts[0], parts[2] - parts[0])
    assert "model.layers.1" in {layer for layer, _ in found.totals(layer_label)}
    assert ("self_attn.q_proj", 0) in found.totals(kind_of)


def found_names(found: Diff) -> list[str]:
    return list(dict.fromkeys(tensor.name for tensor in found.tensors))


def test_ranks_against_numpy(siblings: Siblings, ctx: Context) -> None:
    base, model = opened(siblings, "base a", ctx)
    found = {row["name"]: row for row in diff(base, [model], ranks=True).rows()}
    x, y = doubles(siblings["base"]), doubles(siblings["a"])
    for name, row in found.items():
        if not is_matrix(name, row["shape"]):
            assert row["effective_rank"] is None
            continue
        s = np.linalg.svd(y[name] - x[name], compute_uv=False)
        p = s / s.sum()
        assert row["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
        assert row["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-9)
    assert found["model.embed_tokens.weight"]["effective_rank"] is None
    assert found["model.layers.0.self_attn.q_proj.weight"]["effective_rank"] > 20


def test_the_rank_of_an_adapter_is_its_rank(siblings: Siblings, ctx: Context) -> None:
    random = torch.Generator().manual_seed(0)
    w, *factors = (torch.randn(*shape, generator=random) for shape in ((24, 40), (24, 3), (40, 3)))
    u, v = (torch.linalg.qr(factor)[0] for factor in factors)
    found = compared(ctx, {"w.weight": w}, {"w.weight": w + u @ v.T}, ranks=True)
    row = found.rows()[0]
    assert row["effective_rank"] == pytest.approx(3, rel=1e-3)
    assert row["stable_rank"] == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("make", [lambda t: t, lambda t: {n: -x for n, x in t.items()}])
def test_threads_and_blocks_change_no_figure(
    make: Callable[[Tensors], Tensors], siblings: Siblings, ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff_module, "_PIECE", 1 << 12)
    base = load_file(siblings["base"] / "model.safetensors")
    models = [make(load_file(siblings[n] / "model.safetensors")) for n in "ab"]
    one, four = (compared(ctx, base, *models, threads=threads).to_json() for threads in (1, 4))
    assert one == four


def test_a_model_and_itself(siblings: Siblings, ctx: Context) -> None:
    (checkpoint,) = opened(siblings, "a", ctx)
    for row in diff(checkpoint, [checkpoint], ranks=True).rows():
        assert (row["relative_change"], row["changed"], row["max_abs"], row["identical"]) == (0.0, 0.0, 0.0, True)
        assert row["cosine"] == pytest.approx(1.0, abs=1e-12)
        assert row["effective_rank"] is None


def test_by_hand(ctx: Context) -> None:
    base, a, b = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([4.0, 4.0, 2.0]), torch.tensor([2.0, 5.0, 1.0])
    found = compared(ctx, {"w": base}, {"w": a}, {"w": b})
    first, second = found.rows()
    assert first["relative_change"] == pytest.approx(5**0.5 / 5)
    assert (first["changed"], first["max_abs"]) == (pytest.approx(2 / 3), 2.0)
    assert second["changed"] == 1.0
    (pair,) = found.pair_rows()
    assert pair["cosine"] == pytest.approx((-1 + 2) / 5**0.5 / 3**0.5)
    assert pair["sign_conflict"] == 0.5  # of the first and the last element, which both change
    assert pair["sign_conflict_mass"] == pytest.approx(2 / 6)


def test_vocabularies_of_different_sizes_are_compared_in_their_common_rows(ctx: Context) -> None:
    table = torch.arange(12.0).reshape(4, 3) + 1
    larger = torch.cat([table + 1, torch.full((2, 3), 1e6)])
    found = compared(
        ctx,
        {"model.embed_tokens.weight": table, "w": table},
        {"model.embed_tokens.weight": larger, "w": larger},
        {"model.embed_tokens.weight": table[:3] - 1, "w": table},
    )
    shown = {(row["name"], row["model"][-2:]): row for row in found.rows()}
    row = shown["model.embed_tokens.weight", "m1"]
    assert (row["elements"], row["max_abs"], row["identical"]) == (9, 1.0, False)
    assert row["note"] == "shape [4, 3] and [6, 3], rows compared: 4"
    assert shown["w", "m1"]["relative_change"] is None
    assert shown["w", "m1"]["note"] == "shape [4, 3] and [6, 3]"
    assert found.pair_rows()[0]["sign_conflict"] == 1.0


def test_a_sample_is_an_estimate_from_all_over_the_tensor(ctx: Context) -> None:
    base = torch.zeros(1 << 16) + 1
    model = base + torch.linspace(0, 1, 1 << 16)
    found = compared(ctx, {"w": base}, {"w": model}, sample=1 << 12).rows()[0]
    exact = compared(ctx, {"w": base}, {"w": model}).rows()[0]
    assert found["elements"] == 1 << 12
    assert exact["elements"] == 1 << 16
    assert found["relative_change"] == pytest.approx(exact["relative_change"], rel=0.05)
    assert found["max_abs"] == exact["max_abs"]


def test_an_adapter_is_a_change_of_its_rank(siblings: Siblings, ctx: Context) -> None:
    adapter, name = ctx.base_dir / "adapter", "model.layers.0.self_attn.q_proj"
    adapter.mkdir()
    random = torch.Generator().manual_seed(0)
    factors = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(2, 32, generator=random),
        f"base_model.model.{name}.lora_B.weight": torch.randn(32, 2, generator=random),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    base = open_checkpoint(siblings["base"], ctx)
    model = open_checkpoint(f"{siblings['base']}+{adapter}", ctx)
    moved = [row for row in diff(base, [model], ranks=True).rows() if row["relative_change"]]
    assert [row["name"] for row in moved] == [f"{name}.weight"]
    assert 1 < moved[0]["stable_rank"] <= moved[0]["effective_rank"] < 2.01


def test_what_cannot_be_compared_is_noted(ctx: Context) -> None:
    one = torch.ones(2)
    found = rows(
        ctx,
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
    )
    assert list(found)[-1] == "new"
    assert found["shape"]["note"] == "shape [3] and [4]"
    assert found["gone"]["note"] == f"only in {ctx.base_dir / 'm0'}"
    assert found["new"]["note"] == f"only in {ctx.base_dir / 'm1'}"
    assert found["dtype"]["note"] == "dtype F32 and F16"
    assert (found["dtype"]["max_abs"], found["dtype"]["identical"]) == (0.0, False)
    assert (found["zero"]["relative_change"], found["zero"]["cosine"], found["zero"]["max_abs"]) == (None, None, 1.0)
    assert (found["nan"]["note"], found["nan"]["max_abs"]) == ("not finite", None)
    assert (found["int"]["identical"], found["same"]["identical"]) == (False, True)


def test_float64_differences_below_float32_are_not_identical(ctx: Context) -> None:
    w = torch.ones(3, dtype=torch.float64)
    found = rows(ctx, {"w": w, "v": w}, {"w": w + 1e-12, "v": w.clone()})
    assert (found["w"]["identical"], found["v"]["identical"]) == (False, True)


def test_negative_zero_is_another_bit_pattern(ctx: Context) -> None:
    found = rows(ctx, {"w": torch.tensor([0.0])}, {"w": torch.tensor([-0.0])})
    assert (found["w"]["identical"], found["w"]["relative_change"]) == (False, 0.0)
