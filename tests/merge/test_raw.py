"""Files of weights without a config, against mergekit-pytorch."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, SoleraError
from solera_core.provenance import verify
from solera_merge.config import MergeConfig
from solera_merge.run import merge, plan_merge

Recipe = Callable[..., MergeConfig]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with `base`, `a`, `b` as safetensors, `a.pt` and `b.ckpt`; not of any architecture."""
    generator = torch.Generator().manual_seed(0)

    def tensors(of: Tensors | None = None) -> Tensors:
        shapes = {"unet.in.weight": (8, 3, 3, 3), "unet.mid.0.weight": (40, 24), "unet.mid.1.weight": (40, 24)}
        shapes |= {"unet.mid.0.rotary_emb.inv_freq": (12,), "out.bias": (5,), "logit_scale": ()}
        made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        values = made if of is None else {name: of[name] + made[name] / 10 for name in made}
        return {**values, "steps": torch.arange(4)}

    base = tensors()
    for name in ("base", "a", "b"):
        save_file(base if name == "base" else tensors(base), tmp_path / f"{name}.safetensors")
    torch.save(load_file(tmp_path / "a.safetensors"), tmp_path / "a.pt")
    trained = {"state_dict": load_file(tmp_path / "b.safetensors"), "epoch": 3}
    torch.save(trained, tmp_path / "b.ckpt")
    return tmp_path


def run_mergekit(recipe: dict[str, Any], out: Path, *, union: bool = False, intersection: bool = False) -> Tensors:
    out.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what mergekit and its dependencies warn about is theirs
        from mergekit.graph import Executor
        from mergekit.options import MergeOptions
        from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, SimpleLoaderCache, plan_flat_merge

        # It would give an earlier test's file of the same name.
        SimpleLoaderCache._instance = None  # pyright: ignore[reportPrivateUsage]
        config = RawPyTorchMergeConfig.model_validate(recipe)
        tasks: Any = plan_flat_merge(config, str(out), union, intersection, MergeOptions())
        cpu = torch.device("cpu")
        Executor(tasks, math_device=cpu, storage_device=cpu).execute()
    return load_file(out / "model.safetensors")


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": "a.safetensors", "parameters": {"weight": [{"filter": "mid", "value": 0.8}, {"value": 0.3}]}},
            {"model": "b.safetensors", "parameters": {"weight": 0.4}},
        ],
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base.safetensors",
        "models": [{"model": "a.safetensors"}, {"model": "b.safetensors", "parameters": {"density": 0.5}}],
        "parameters": {"weight": 0.6, "density": 0.3},
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base.safetensors",
        "models": [{"model": "base.safetensors"}, {"model": "a.safetensors", "parameters": {"weight": 1.5}}],
        "out_dtype": "bfloat16",
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a.safetensors",
        "models": [{"model": "a.safetensors"}, {"model": "b.safetensors"}],
        "parameters": {"t": 0.3},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_as_mergekit_pytorch(recipe: Recipe, files: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    content = RECIPES[name]
    theirs = run_mergekit(content | {"dtype": "float32"}, files / "theirs")
    out = merge(recipe(**content), files / "out", Context())
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys() == load_file("a.safetensors").keys()
    for tensor, expected in theirs.items():
        assert ours[tensor].dtype == expected.dtype
        exact = torch.float32 if expected.dtype == torch.float32 else torch.bfloat16
        torch.testing.assert_close(ours[tensor], expected, rtol=1e-6 if exact == torch.float32 else 0, atol=1e-6)
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors", "solera.json"]
    assert verify(out) == []
    record = json.loads((out / "solera.json").read_text())
    assert record["checks"]["transformers"] == {"skipped": "there is no config.json"}


@pytest.mark.parametrize("kind", ["intersection", "union"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_tensors_that_some_files_lack(
    recipe: Recipe, files: Path, method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    for name, gone in (("a", "out.bias"), ("b", "unet.mid.1.weight")):
        tensors = load_file(f"{name}.safetensors")
        del tensors[gone]
        save_file(tensors, f"{name}.safetensors")
    content = RECIPES[method] | {"models": RECIPES["linear"]["models"], "dtype": "float32"}
    content.pop("out_dtype", None)
    theirs = run_mergekit(content, files / "theirs", union=kind == "union", intersection=kind == "intersection")
    config = recipe(**content, tensors=kind)
    ours = load_file(merge(config, files / "out", Context()) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert ("out.bias" in ours) == ("unet.mid.1.weight" in ours) == (kind == "union")
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-6)
    [warning] = [w for w in plan_merge(config, Context()).warnings if f"`tensors: {kind}`" in w]
    assert "out.bias" in warning
    assert "unet.mid.1.weight" in warning


def test_a_union_needs_its_base(recipe: Recipe, files: Path, siblings: dict[str, Path]) -> None:
    """And as many others as the method; and files."""
    tensors = load_file(files / "base.safetensors")
    del tensors["out.bias"]
    save_file(tensors, files / "base.safetensors")
    for name in ("task_arithmetic", "slerp"):
        content = RECIPES[name] | ({"base_model": "base.safetensors"} if name == "slerp" else {})
        content["models"] = [{"model": "a.safetensors"}] if name == "slerp" else content["models"]
        with pytest.raises(CheckpointError, match=r"base.safetensors: has no tensor 'out.bias'"):
            merge(recipe(**content, tensors="union"), files / "out", Context(base_dir=files))
    config = recipe(merge_method="linear", models=["a", "b"], parameters={"weight": 1}, tensors="union")
    with pytest.raises(ConfigError, match="tensors: union is for files of weights"):
        plan_merge(config, Context(models=siblings))


def test_pickles_with_permission(recipe: Recipe, files: Path) -> None:
    """Also a trainer's, whose weights lie under `state_dict`; a head tied to an embedding stays, as it is a tensor."""
    config = {"merge_method": "linear", "parameters": {"weight": 1}}
    made = [
        merge(recipe(**config, models=models), files / f"out{i}", Context(base_dir=files, allow_pickle=True))
        for i, models in enumerate((["a.pt", "b.ckpt"], ["a.safetensors", "b.safetensors"]))
    ]
    ours, theirs = (load_file(out / "model.safetensors") for out in made)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_tensors_that_share_memory_are_all_there(recipe: Recipe, files: Path) -> None:
    shared = torch.ones(4, 3)
    for name in ("x", "y"):
        torch.save({"embed_tokens.weight": shared, "lm_head.weight": shared}, files / f"{name}.bin")
    config = recipe(merge_method="linear", models=["x.bin", "y.bin"], parameters={"weight": 1})
    out = merge(config, files / "out", Context(base_dir=files, allow_pickle=True))
    assert load_file(out / "model.safetensors").keys() == {"embed_tokens.weight", "lm_head.weight"}


def test_gradients_follow_the_layers_that_names_show(recipe: Recipe, files: Path) -> None:
    names = [*(f"model.layers.{i}.mlp.weight" for i in range(3)), "norm.weight"]
    for name, value in (("x", 0.0), ("y", 1.0)):
        save_file({n: torch.full((4,), value) for n in names}, files / f"{name}.safetensors")
    weight = {"x.safetensors": 1, "y.safetensors": [0, 1]}
    models = [{"model": m, "parameters": {"weight": w}} for m, w in weight.items()]
    out = merge(recipe(merge_method="linear", models=models), files / "out", Context(base_dir=files))
    found = load_file(out / "model.safetensors")
    np.testing.assert_allclose([found[n][0] for n in names], [0, 1 / 3, 1 / 2, 0], rtol=1e-6)


def test_an_output_is_an_input_again_and_is_made_again(recipe: Recipe, files: Path) -> None:
    from solera.rebuild import rebuild

    ctx = Context(base_dir=files)
    config = {"merge_method": "linear", "parameters": {"weight": 1}}
    out = merge(recipe(**config, models=["a.safetensors", "b.safetensors"]), files / "out", ctx)
    assert rebuild(out, ctx).problems == ()
    again = merge(recipe(**config, models=["out/model.safetensors"]), files / "again", ctx)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_plan(recipe: Recipe, files: Path) -> None:
    config = recipe(**RECIPES["ties"])
    plan = plan_merge(config, Context(base_dir=files))
    assert [Path(row["path"]).name for row in plan.reads] == ["a.safetensors", "b.safetensors", "base.safetensors"]
    assert "the models are files of weights: the output has weights and no config.json" in plan.warnings
    assert [row["what"] for row in plan.writes] == ["model.safetensors"]
    assert not any("tokenizer" in warning for warning in plan.warnings)


def test_on_the_command_line(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from solera.cli import main

    monkeypatch.chdir(files)
    Path("recipe.yml").write_text(yaml.safe_dump(RECIPES["linear"]))
    assert main(["merge", "recipe.yml", "out", "--dry-run", "-q"]) == 0
    assert not Path("out").exists()
    assert main(["merge", "recipe.yml", "out", "-q"]) == 0
    assert main(["verify", "out"]) == 0
    assert "every file and tensor equals its digest" in capsys.readouterr().out
    Path("recipe.yml").write_text(yaml.safe_dump(RECIPES["linear"] | {"slices": [], "models": None}))
    assert main(["merge", "recipe.yml", "out2", "-q"]) == 3


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"models": ["a.safetensors", "b.ckpt"]},
            CheckpointError,
            ["b.ckpt: the weights are pickled", "--allow-pickle"],
        ),
        ({"models": ["a.safetensors", "."]}, ConfigError, ["'a.safetensors' is a file of weights, and '.' is not"]),
        ({"models": ["a.safetensors", "c.gguf"]}, CheckpointError, ["c.gguf: GGUF weights", "convert the result"]),
        ({"models": ["a.safetensors", "d.txt"]}, CheckpointError, ["d.txt: is a file", ".safetensors, .bin, .ckpt"]),
        ({"models": ["a.safetensors", "none.pt"]}, ConfigError, ["model 'none.pt' not found"]),
        (
            {"models": ["a.safetensors", "less.safetensors"]},
            CheckpointError,
            ["less.safetensors: has no tensor 'out.b"],
        ),
        (
            {"models": ["less.safetensors", "a.safetensors"]},
            CheckpointError,
            ["less.safetensors: has no tensor 'out.b"],
        ),
        ({"models": ["a.safetensors", "codes.safetensors"]}, CheckpointError, ["'m.qweight'", "no `quantization_conf"]),
        ({"models": ["a.safetensors", "short.safetensors"]}, CheckpointError, ["out.bias", "(4,)", "(5,)"]),
        (
            {"tokenizer_source": "base", "base_model": "a.safetensors"},
            ConfigError,
            ["tokenizer_source: files of weights"],
        ),
        (
            {"models": None, "slices": [{"sources": [{"model": "a.safetensors", "layer_range": [0, 1]}]}]},
            ConfigError,
            ["slices: files of weights have no config"],
        ),
    ],
)
def test_bad_input(
    recipe: Recipe, files: Path, changes: dict[str, Any], error: type[SoleraError], words: list[str]
) -> None:
    less = load_file(files / "a.safetensors")
    short = less | {"out.bias": torch.zeros(4)}
    del less["out.bias"]
    save_file(less, files / "less.safetensors")
    save_file(short, files / "short.safetensors")
    save_file({"m.qweight": torch.zeros(2, 2, dtype=torch.int32)}, files / "codes.safetensors")
    for name in ("c.gguf", "d.txt"):
        (files / name).write_bytes(b"GGUF")
    content = {"merge_method": "linear", "models": ["a.safetensors", "b.safetensors"], "parameters": {"weight": 1}}
    content = {key: value for key, value in (content | changes).items() if value is not None}
    before = sorted(files.iterdir())
    with pytest.raises(error) as raised:
        merge(recipe(**content), files / "out", Context(base_dir=files))
    for word in words:
        assert word in str(raised.value)
    assert sorted(files.iterdir()) == before


def test_a_folder_of_gguf(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model.gguf").write_bytes(b"GGUF")
    config = recipe(merge_method="linear", models=["x"], parameters={"weight": 1})
    with pytest.raises(CheckpointError, match=r"x: holds GGUF weights.* use the checkpoint that they were made from"):
        plan_merge(config, Context(base_dir=tmp_path))
