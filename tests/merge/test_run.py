"""Whole merges: directories in, a directory out."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solera_core.context import Context
from solera_core.output import verify
from solera_core.progress import Silent
from solera_core.writer import CheckpointWriter
from solera_merge.block import CHUNK_ELEMENTS
from solera_merge.config import MergeConfig
from solera_merge.engine import execute
from solera_merge.methods.catalogue import METHODS
from solera_merge.plan import make_plan
from solera_merge.run import merge

Recipe = Callable[..., MergeConfig]
Siblings = dict[str, Path]
Weights = Callable[[Path], dict[str, Any]]
REPOSITORY = Path(__file__).resolve().parents[2]

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"models": ["a", "b"], "parameters": {"weight": [0.2, 0.9]}},
    "slerp": {"models": ["a", "b"], "base_model": "a", "parameters": {"t": 0.4}},
    "task_arithmetic": {"models": ["a", "b"], "base_model": "base", "parameters": {"weight": 0.5}},
    "ties": {"models": ["a", "b"], "base_model": "base", "parameters": {"weight": 0.5, "density": 0.3}},
    "dare_ties": {"models": ["a", "b"], "base_model": "base", "parameters": {"weight": 0.5, "density": 0.3}},
    "passthrough": {"models": ["a"]},
    "nuslerp": {"models": ["a", "b"], "parameters": {"weight": [0.2, 0.9]}},
    "multislerp": {"models": ["a", "b"], "base_model": "base", "parameters": {"weight": [0.2, 0.9]}},
    "karcher": {"models": ["a", "b"]},
    "model_stock": {"models": ["a", "b"], "base_model": "base"},
    "nearswap": {"models": ["b"], "base_model": "a", "parameters": {"t": 0.01}},
    "arcee_fusion": {"models": ["b"], "base_model": "a"},
    "magmax": {"models": ["a", "b"], "base_model": "base"},
    "ram": {"models": ["a", "b"], "base_model": "base", "parameters": {"epsilon": 1e-3}},
    "ramplus_tl": {"models": ["a", "b"], "base_model": "base", "parameters": {"epsilon": 1e-3}},
    "ramplus": {"models": ["a", "b"], "base_model": "base", "parameters": {"epsilon": 1e-3}},
    "consensus_ta": {"models": ["a", "b"], "base_model": "base", "parameters": {"k": 1}},
    "tsv_m": {"models": ["a", "b"], "base_model": "base"},
    "iso_c": {"models": ["a", "b"], "base_model": "base"},
    "iso_cts": {"models": ["a", "b"], "base_model": "base", "parameters": {"common_space_fraction": 0.5}},
    "dare_linear": {"models": ["a", "b"], "base_model": "base", "parameters": {"weight": 0.5, "density": 0.3}},
    "breadcrumbs": {"models": ["a", "b"], "base_model": "base", "parameters": {"weight": 0.5, "density": 0.3}},
    "breadcrumbs_ties": {
        "models": ["a", "b"],
        "base_model": "base",
        "parameters": {"weight": 0.5, "density": 0.3, "scope": "model"},
    },
    "della": {"models": ["a", "b"], "base_model": "base", "parameters": {"weight": 0.5, "density": 0.3}},
    "della_linear": {"models": ["a", "b"], "base_model": "base", "parameters": {"weight": 0.5, "density": 0.3}},
    "sce": {"models": ["a", "b"], "base_model": "base", "parameters": {"select_topk": 0.3}},
}


def digest(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.iterdir())}


def test_every_method_has_a_recipe_here() -> None:
    assert set(RECIPES) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_same_recipe_same_bytes_whatever_the_threads(
    recipe: Recipe, siblings: Siblings, tmp_path: Path, method: str
) -> None:
    config = recipe(merge_method=method, **RECIPES[method], dtype="bfloat16")
    one = merge(config, tmp_path / "one", Context(models=siblings, threads=1, seed=3))
    two = merge(config, tmp_path / "two", Context(models=siblings, threads=3, seed=3))
    assert digest(one) == digest(two)
    assert verify(one) == []
    assert {"config.json", "model.safetensors", "solera.json", "tokenizer.json"} <= digest(one).keys()
    record = json.loads((one / "solera.json").read_text())
    assert record["kind"] == "merge"
    assert record["seed"] == 3
    assert record["recipe"] == config.model_dump(mode="json", exclude_none=True)


def test_block_size_changes_no_byte(recipe: Recipe, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((50, 700)).astype(np.float32)
    for name in ("base", "a", "b"):
        bare_model(tmp_path / name, {"w": base + 0.1 * rng.standard_normal(base.shape) * (name != "base")}, "BF16")
    files: dict[str, set[str]] = {}
    for method in METHODS:
        config = recipe(merge_method=method, **RECIPES[method])
        plan, models = make_plan(config, Context(base_dir=tmp_path))
        for chunks in (1, 3, 100):
            out = tmp_path / f"{method}-{chunks}"
            out.mkdir()
            with CheckpointWriter(out, plan.specs) as writer:
                step = chunks * CHUNK_ELEMENTS
                execute(plan.tensors, models.checkpoints, writer, threads=2, progress=Silent(), block_elements=step)
                files.setdefault(method, set()).add(writer.finish()["w"])
    assert {method: len(found) for method, found in files.items()} == dict.fromkeys(METHODS, 1)


def test_the_seed_decides_about_random_masks(
    recipe: Recipe, siblings: Siblings, tmp_path: Path, weights: Weights
) -> None:
    config = recipe(merge_method="dare_ties", **RECIPES["dare_ties"])
    outputs = [weights(merge(config, tmp_path / str(s), Context(models=siblings, seed=s))) for s in (0, 1)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(outputs[0][name], outputs[1][name])


def test_merging_a_model_with_itself_gives_its_bytes(
    recipe: Recipe, make_model: Callable[..., Path], tmp_path: Path, weights: Weights
) -> None:
    """In bf16, where float32 arithmetic rounds back to what was there; every method, every tensor."""
    x = make_model(tmp_path / "x", dtype="bfloat16")
    same = make_model(tmp_path / "same", dtype="bfloat16")
    ctx = Context(models={"a": x, "b": same, "base": make_model(tmp_path / "third", dtype="bfloat16")})
    before = weights(x)
    for method in METHODS:
        config = recipe(merge_method=method, **RECIPES[method])
        after = weights(merge(config, tmp_path / method, ctx))
        assert after.keys() == before.keys()
        assert [n for n in before if not np.array_equal(before[n], after[n])] == [], method


def test_values_of_a_whole_merge(recipe: Recipe, siblings: Siblings, tmp_path: Path, weights: Weights) -> None:
    """The engine puts every block of every tensor where it belongs, and gives every model its own weight."""
    models = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 0.25}}]
    config = recipe(merge_method="task_arithmetic", base_model="base", models=models)
    merged = weights(merge(config, tmp_path / "out", Context(models=siblings)))
    base, a, b = (weights(siblings[n]) for n in ("base", "a", "b"))
    for name, value in merged.items():
        expected = base[name] + 0.5 * (a[name] - base[name]) + 0.25 * (b[name] - base[name])
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)


def test_slices_make_a_deeper_model_that_loads(
    recipe: Recipe, siblings: Siblings, tmp_path: Path, weights: Weights
) -> None:
    slices = [{"sources": [{"model": m, "layer_range": [0, 2]}]} for m in ("a", "b")]
    out = merge(recipe(merge_method="passthrough", slices=slices), tmp_path / "deep", Context(models=siblings))
    merged, a, b = weights(out), weights(siblings["a"]), weights(siblings["b"])
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4
    up = "mlp.up_proj.weight"
    assert np.array_equal(merged[f"model.layers.1.{up}"], a[f"model.layers.1.{up}"])
    assert np.array_equal(merged[f"model.layers.3.{up}"], b[f"model.layers.1.{up}"])
    from solera_core.causal_lm import load_model

    assert load_model(out).config.num_hidden_layers == 4


def test_sharded_inputs_tied_embeddings_and_another_family(
    recipe: Recipe, make_model: Callable[..., Path], tmp_path: Path, weights: Weights
) -> None:
    x = make_model(
        tmp_path / "x", family="gemma2", shards=3, tie_word_embeddings=True, head_dim=8, query_pre_attn_scalar=8
    )
    y = make_model(tmp_path / "y", base=x, seed=1)
    config = recipe(merge_method="linear", models=["x", "y"], parameters={"weight": 1}, tokenizer_source="y")
    merged = weights(merge(config, tmp_path / "out", Context(base_dir=tmp_path)))
    assert not any("lm_head" in name for name in merged)
    for name, value in merged.items():
        np.testing.assert_allclose(value, (weights(x)[name] + weights(y)[name]) / 2, rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_is_merged_in(recipe: Recipe, siblings: Siblings, tmp_path: Path, weights: Weights) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(siblings["a"]), settings)
        model.save_pretrained(tmp_path / "lora")
        expected = model.merge_and_unload().state_dict()
    ctx = Context(models=siblings, base_dir=tmp_path)
    merged = weights(merge(recipe(merge_method="passthrough", models=["a+lora"]), tmp_path / "out", ctx))
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_allclose(merged[name], expected[name].numpy(), rtol=1e-5, atol=1e-7)
    assert not np.array_equal(merged[name], weights(siblings["a"])[name])


def test_integer_tables_are_copied_when_equal(recipe: Recipe, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    table = np.arange(10_000, dtype=np.int64).reshape(100, 100)
    for name in ("x", "y"):
        bare_model(tmp_path / name, {"w": np.ones(5), "table": table, "flag": np.array([True, False])})
    plan, models = make_plan(
        recipe(merge_method="linear", models=["x", "y"], parameters={"weight": 1}), Context(base_dir=tmp_path)
    )
    assert {t.name: t.method for t in plan.tensors} == {"w": "linear", "table": "copy", "flag": "copy"}
    with CheckpointWriter(tmp_path, plan.specs) as writer:
        execute(plan.tensors, models.checkpoints, writer, threads=1, progress=Silent(), block_elements=CHUNK_ELEMENTS)
        writer.finish()
    from safetensors.numpy import load_file

    assert np.array_equal(load_file(tmp_path / "model.safetensors")["table"], table)


def test_memory_stays_bounded(recipe: Recipe, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    """Three models of 64 MB as float32, with one tensor each; a whole tensor would already break the bound."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(1 << 22, dtype=np.float32)
    for name in ("base", "a", "b"):
        bare_model(tmp_path / name, {"w": base + np.float32(name != "base") * base[::-1]}, "BF16")
    plan, models = make_plan(recipe(merge_method="ties", **RECIPES["ties"]), Context(base_dir=tmp_path))
    del base
    with CheckpointWriter(tmp_path, plan.specs) as writer:
        tracemalloc.start()
        execute(plan.tensors, models.checkpoints, writer, threads=1, progress=Silent())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 12e6


def test_progress_counts_every_byte_of_input_once(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> None:
    class Counting(Silent):
        total = done = 0.0

        def task(self, title: str, total: float, unit: str = "") -> Any:
            outer = self
            outer.total = total
            assert unit == "bytes"

            class Task:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *exception: object) -> None: ...

                def advance(self, amount: float = 1.0, note: str = "") -> None:
                    outer.done += amount

            return Task()

    progress = Counting()
    merge(recipe(merge_method="ties", **RECIPES["ties"]), tmp_path / "out", Context(models=siblings, progress=progress))
    assert progress.done == progress.total > 0


def test_planning_and_merging_import_no_torch() -> None:
    code = (
        "import sys, solera_merge.run; print(sorted({'torch', 'transformers', 'mergekit', 'scipy'} & set(sys.modules)))"
    )
    path = os.pathsep.join(str(REPOSITORY / root) for root in ("core", "merge"))
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_killed_at_any_moment_leaves_no_target_and_the_next_run_succeeds(
    recipe: Recipe, siblings: Siblings, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path\n"
        "from solera_core.context import Context; from solera_core.strict import parse\n"
        "from solera_merge.config import MergeConfig; from solera_merge.run import merge\n"
        "c = parse(MergeConfig, {'merge_method': 'linear', 'models': [{'model': m} for m in sys.argv[2:]],\n"
        "                        'parameters': {'weight': 1}}, where='r')\n"
        "merge(c, Path(sys.argv[1]), Context())\n"
    )
    path = os.pathsep.join(str(REPOSITORY / root) for root in ("core", "merge"))
    arguments = [sys.executable, "-c", code, str(out), str(siblings["a"]), str(siblings["b"])]
    process = subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": path})
    staging = tmp_path / ".out.solera-staging"
    deadline = time.monotonic() + 30
    while not (staging / "model.safetensors").exists() and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert staging.exists()
    assert not out.exists()
    merge(recipe(merge_method="linear", **RECIPES["linear"]), out, Context(models=siblings))
    assert verify(out) == []
    assert not staging.exists()
