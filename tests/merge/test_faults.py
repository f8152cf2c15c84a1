"""Faults: a right output, or an error that names file, tensor or key and leaves nothing behind.

First, everything that mergekit 0.1.4 was seen to do wrong without a word, or to find out too late:

    what mergekit does                                    test
    ----------------------------------------------------  ----
    misspelt parameter or key ignored                     test_config.py: test_refusals
    tensors beyond its list of the architecture dropped   test_tensors_that_no_list_knows_are_merged;
                                                          test_bad_input.py: test_tensor_missing_in_...
    shape mismatch: that model left out, or a late crash  test_another_shape (every method)
    embedding rows differ: cut to the common ones         test_another_number_of_embedding_rows
    base with more embedding rows: crash                  test_a_base_with_more_embedding_rows
    karcher with different vocabularies: crash            test_another_number_of_embedding_rows
    NaN of an input copied                                test_nan_in_a_model, test_nan_in_the_base
    linear weights that sum to 0: all NaN                 test_bad_input.py: test_recipes_that_make_no_...
    the same model twice becomes one                      test_bad_input.py: test_the_same_model_by_...
    linear with a base outside `models`: TypeError        test_a_base_where_none_is_used
    karcher averages its base in                          test_a_base_where_none_is_used
    truncated shard: no file name                         test_bad_input.py: test_truncated_shard
    layer_range beyond the model: found while merging     test_bad_input.py: test_recipes_that_make_no_...
    stacked layers, config of the old number              test_stacked_layers_of_families_with_layer_types
    arcee_fusion writes float32 whatever was asked        test_the_number_format_asked_for (every method)
    fp8 weights: crash, or codes taken for values         test_eight_bit_weights
    old shards and index stay in a used directory         test_nothing_old_stays_in_a_replaced_target;
                                                          test_bad_input.py: test_target_exists
    offline, a relative path is asked for on the hub      solera/test_faults.py: test_a_path_with_one_slash
    crash in the middle: no resume                        test_resume.py; solera/test_faults.py: test_a_signal
    disk full shows after all the work                    test_a_disk_that_fails_at_any_call;
                                                          solera/test_faults.py: test_a_small_disk
    half a LoRA cache is taken for a whole one            test_a_damaged_adapter_spoils_no_later_run
    no digests, no revision                               test_inputs_are_on_record
    tied and untied models: the head is ignored           test_bad_input.py: test_tied_and_untied
    exact pins: cannot be imported beside newer packages  test_no_exact_pins

Then what disks and mounts do while a merge reads and writes. Whole processes are in tests/solera/test_faults.py.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
import time
import tomllib
from collections.abc import Callable, Mapping
from concurrent.futures import ALL_COMPLETED
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solera_core import checkpoint as core_checkpoint
from solera_core import shards, sources
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, DiskFullError, ResourceError, SoleraError
from solera_core.output import verify
from solera_merge import engine, run
from solera_merge.config import MergeConfig
from solera_merge.methods.catalogue import METHODS
from solera_merge.methods.signature import REQUIRED
from solera_merge.run import merge, plan_merge

Recipe = Callable[..., MergeConfig]
Siblings = dict[str, Path]
MakeModel = Callable[..., Path]
BareModel = Callable[..., Path]
Fails = Callable[..., str]
LAYER = "model.layers.1.mlp.up_proj.weight"
LINEAR: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1}}
WITH_BASE = [name for name, method in METHODS.items() if method.base != "unused"]
WITHOUT_BASE = [name for name, method in METHODS.items() if method.base == "unused"]
COMPARING = [name for name, method in METHODS.items() if method.base == "required" or method.most_models != 1]


def content(method: str, models: list[str], base: str = "base") -> dict[str, Any]:
    """The simplest recipe of a method: of `models` the last ones that it takes; `base` where it must have one."""
    entry = METHODS[method]
    parameters = {p.name: 0.5 for p in entry.parameters.values() if p.default is REQUIRED}
    chosen = models[-entry.most_models :] if entry.most_models else models
    return {"merge_method": method, "models": chosen, "parameters": parameters} | (
        {"base_model": base} if entry.base == "required" else {}
    )


def bytes_of(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


def edit_weights(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def adding(more: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update(more)


def stored_dtypes(directory: Path) -> dict[str, str]:
    return {name: info.dtype for name, info in open_checkpoint(directory, Context()).tensors.items()}


@pytest.fixture
def damaged(siblings: Siblings, tmp_path: Path) -> Path:
    """A copy of model `a` to be damaged."""
    return Path(shutil.copytree(siblings["a"], tmp_path / "damaged"))


@pytest.fixture
def fails(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> Fails:
    """`fails(kind, planned=True, ctx=None, **recipe)`: merge, expect an error; its message, after a look around.

    `planned`: a dry run says the same.
    """

    def attempt(kind: type[SoleraError], *, planned: bool = True, ctx: Context | None = None, **content: Any) -> str:
        ctx = ctx or Context(models=siblings, base_dir=tmp_path)
        config = recipe(**content)
        outputs = tmp_path / "outputs"
        with pytest.raises(kind) as caught:
            merge(config, outputs / "out", ctx)
        assert not outputs.exists()
        if planned:
            with pytest.raises(kind, match=re.escape(str(caught.value))):
                plan_merge(config, ctx)
        return str(caught.value)

    return attempt


# What mergekit does without a word


def test_tensors_that_no_list_knows_are_merged(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> None:
    extra = "model.layers.1.self_attn.q_norm.weight"
    for name, value in (("a", 1.0), ("b", 3.0)):
        model = Path(shutil.copytree(siblings[name], tmp_path / name))
        edit_weights(model, adding({extra: np.full(8, value, np.float32)}))
    out = merge(recipe(**LINEAR, models=["a", "b"]), tmp_path / "out", Context(base_dir=tmp_path))
    assert open_checkpoint(out, Context()).read(extra).tolist() == [2.0] * 8


@pytest.mark.parametrize("method", COMPARING)
def test_another_shape(fails: Fails, damaged: Path, siblings: Siblings, method: str) -> None:
    edit_weights(damaged, lambda tensors: tensors.update({LAYER: tensors[LAYER][:40].copy()}))
    message = fails(CheckpointError, **content(method, ["a", "b", "damaged"]))
    assert f"{damaged / 'model.safetensors'}: {LAYER!r} is (40, 32)" in message
    assert f"{LAYER!r} is (48, 32)" in message


@pytest.mark.parametrize("method", COMPARING)
def test_another_number_of_embedding_rows(fails: Fails, make_model: MakeModel, tmp_path: Path, method: str) -> None:
    make_model(tmp_path / "larger", vocab_size=320)
    message = fails(CheckpointError, **content(method, ["a", "b", "larger"]))
    assert "'model.embed_tokens.weight' is (304, 32)" in message
    assert "'model.embed_tokens.weight' is (320, 32)" in message
    assert "have different sizes" in message


@pytest.mark.parametrize("method", WITH_BASE)
def test_a_base_with_more_embedding_rows(fails: Fails, make_model: MakeModel, tmp_path: Path, method: str) -> None:
    make_model(tmp_path / "larger", vocab_size=320)
    message = fails(CheckpointError, **content(method, ["a", "b"]) | {"base_model": "larger"})
    assert f"{tmp_path / 'larger' / 'model.safetensors'}: 'lm_head.weight' is (320, 32)" in message


def spoil(tensors: dict[str, Any]) -> None:
    tensors[LAYER][7, 3] = np.nan


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_a_model(fails: Fails, damaged: Path, method: str) -> None:
    edit_weights(damaged, spoil)
    message = fails(CheckpointError, planned=False, **content(method, ["b", "c", "damaged"]))
    assert str(damaged / "model.safetensors") in message
    assert f"{LAYER!r} (48, 32) of model 'damaged' holds nan at (7, 3)" in message


@pytest.mark.parametrize("method", WITH_BASE)
def test_nan_in_the_base(fails: Fails, damaged: Path, method: str) -> None:
    edit_weights(damaged, spoil)
    recipe = content(method, ["b", "c"]) | {"base_model": "damaged"}
    assert f"{LAYER!r} (48, 32) of model 'damaged' holds nan at (7, 3)" in fails(
        CheckpointError, planned=False, **recipe
    )


@pytest.mark.parametrize("method", WITHOUT_BASE)
def test_a_base_where_none_is_used(fails: Fails, method: str) -> None:
    message = fails(ConfigError, **content(method, ["a", "b"]) | {"base_model": "base"})
    assert f"base_model: {method} has no base; list 'base' under `models`" in message


FAMILIES: dict[str, dict[str, Any]] = {
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_layers_of_families_with_layer_types(
    recipe: Recipe, make_model: MakeModel, tmp_path: Path, family: str
) -> None:
    """Three layers of two: the config says three, and of which kinds; transformers finds every tensor its place."""
    x = make_model(tmp_path / "x", family=family, **FAMILIES[family])
    make_model(tmp_path / "y", base=x, seed=1)
    slices = [{"sources": [{"model": m, "layer_range": r}]} for m, r in (("x", [0, 2]), ("y", [1, 2]))]
    out = merge(recipe(merge_method="passthrough", slices=slices), tmp_path / "out", Context(base_dir=tmp_path))
    config = json.loads((out / "config.json").read_text())
    first, second = FAMILIES[family]["layer_types"]
    assert config["num_hidden_layers"] == 3
    assert config["layer_types"] == [first, second, second]
    exact: dict[str, list[str]] = {"mismatched": [], "missing": [], "unexpected": []}
    assert json.loads((out / "solera.json").read_text())["checks"]["transformers"] == exact


@pytest.mark.parametrize("method", METHODS)
def test_the_number_format_asked_for(recipe: Recipe, siblings: Siblings, tmp_path: Path, method: str) -> None:
    config = recipe(**content(method, ["a", "b"]), dtype="bfloat16")
    out = merge(config, tmp_path / "out", Context(models=siblings))
    assert set(stored_dtypes(out).values()) == {"BF16"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", ["of graphics cards that nothing here reads", "with scales"])
def test_eight_bit_weights(fails: Fails, bare_model: BareModel, tmp_path: Path, dtype: str | None, kind: str) -> None:
    import torch
    from safetensors.torch import save_file

    for name in ("x", "y"):
        bare_model(tmp_path / name, {"w": np.ones((4, 4))})
        scales = {"w_scale_inv": torch.ones(1)} if kind == "with scales" else {}
        stored = torch.float8_e4m3fn if scales else torch.float8_e4m3fnuz
        save_file({"w": torch.ones(4, 4).to(stored)} | scales, tmp_path / name / "model.safetensors")
    message = fails(CheckpointError, **LINEAR, models=["x", "y"], **({"dtype": dtype} if dtype else {}))
    file = tmp_path / "x" / "model.safetensors"
    if kind == "with scales":
        assert (
            f"{file}: tensor 'w_scale_inv' F32 (1,): belongs to a quantised weight, but config.json has no" in message
        )
    else:
        assert f"{file}: 'w' is stored as F8_E4M3FNUZ" in message
        assert "dequantise" in message


def test_nothing_old_stays_in_a_replaced_target(
    recipe: Recipe, siblings: Siblings, make_model: MakeModel, tmp_path: Path
) -> None:
    out = make_model(tmp_path / "out", base=siblings["c"], shards=3)
    (out / "solera.json").write_text("{}")  # only what solera made is replaced
    (out / "added_tokens.json").write_text("{}")
    (out / "solera.json").write_text("{}")  # what an output of solera's has
    assert (out / "model.safetensors.index.json").exists()
    config = recipe(**LINEAR, models=["a", "b"])
    merge(config, out, Context(models=siblings, overwrite=True))
    fresh = merge(config, tmp_path / "fresh", Context(models=siblings))
    assert bytes_of(out) == bytes_of(fresh)


def test_a_damaged_adapter_spoils_no_later_run(
    recipe: Recipe, siblings: Siblings, fails: Fails, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    rng = np.random.default_rng(0)
    factors = {side: rng.standard_normal(shape, np.float32) for side, shape in (("A", (2, 32)), ("B", (32, 2)))}
    file = lora / "adapter_model.safetensors"
    save_file({f"{stem}{side}.weight": value for side, value in factors.items()}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert f"{file}: truncated" in fails(CheckpointError, merge_method="passthrough", models=["a+lora"])
    file.write_bytes(whole)
    ctx = Context(models=siblings, base_dir=tmp_path)
    out = merge(recipe(merge_method="passthrough", models=["a+lora"]), tmp_path / "outputs" / "out", ctx)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = open_checkpoint(siblings["a"], Context()).read(name) + 2 * factors["B"] @ factors["A"]
    np.testing.assert_allclose(open_checkpoint(out, Context()).read(name), expected, rtol=1e-5, atol=1e-5)


def test_inputs_are_on_record(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> None:
    out = merge(recipe(**LINEAR, models=["a", "b"]), tmp_path / "out", Context(models=siblings, seed=5))
    record = json.loads((out / "solera.json").read_text())
    assert {i["ref"]: i["digest"] for i in record["inputs"]} == {
        m: open_checkpoint(siblings[m], Context()).digest() for m in "ab"
    }
    assert record["seed"] == 5
    assert {"python", "numpy", "safetensors"} <= record["versions"].keys()
    assert record["tensors"].keys() == stored_dtypes(out).keys()


def test_no_exact_pins() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert [requirement for requirement in needed if re.search(r"[=~]=|<", requirement)] == []


# Mounts that are slow, or go away


def file_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def open_files() -> list[str]:
    """What this process has open, sorted."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists the directory
            found.append(str(entry.readlink()))
    return sorted(found)


@pytest.fixture
def undisturbed(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> tuple[MergeConfig, Context, Mapping[str, str]]:
    """A merge and the bytes that it has to give."""
    config = recipe(**content("ties", ["a", "b"]))
    ctx = Context(models=siblings, threads=3)
    return config, ctx, bytes_of(merge(config, tmp_path / "undisturbed", ctx))


def test_a_slow_mount_that_gives_a_little_at_a_time(
    undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ctx, expected = undisturbed
    real, turns = os.preadv, itertools.count()
    short = []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        turn = next(turns)
        time.sleep(0.0002 * (turn % 3))
        part = buffers[0][: 1 + turn * 733 % 4001]
        short.append(len(part) < len(buffers[0]))
        return real(descriptor, [part], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert bytes_of(merge(config, tmp_path / "out", ctx)) == expected
    assert sum(short) > 100


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_mount_that_goes_away_while_it_is_read(
    fails: Fails,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    siblings: Siblings,
    tmp_path: Path,
    code: int,
    share: float,
) -> None:
    """At the first read, in the middle, and at the very end, where the inputs are identified."""
    real, turns = os.preadv, itertools.count()
    monkeypatch.setattr(os, "preadv", lambda *a: (next(turns), real(*a))[1])
    ctx = Context(models=siblings, threads=3)
    merge(recipe(**content("ties", ["a", "b"])), tmp_path / "counted", ctx)
    last = int(next(turns) * share)
    turns = itertools.count()

    def preadv(*arguments: Any) -> int:
        if next(turns) >= last:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    before = open_files()
    message = fails(CheckpointError, planned=False, ctx=ctx, **content("ties", ["a", "b"]))
    files = [str(model / "model.safetensors") for model in siblings.values()]
    assert message in [f"{file}: cannot be read: {os.strerror(code)}" for file in files]
    assert open_files() == before


@pytest.mark.parametrize("call", ["open", "fstat"])
def test_a_mount_that_goes_away_when_a_file_is_opened(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, siblings: Siblings, call: str
) -> None:
    """The second of two inputs cannot be opened for the first tensor: the first input does not stay open."""
    file = str(siblings["b"] / "model.safetensors")
    real = getattr(os, call)
    armed = threading.Event()

    def gone(target: Any, *arguments: Any, **options: Any) -> Any:
        if armed.is_set() and (file_of(target) if isinstance(target, int) else str(target)) == file:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(target, *arguments, **options)

    real_execute = engine.execute

    def execute(*arguments: Any, **options: Any) -> None:
        armed.set()
        real_execute(*arguments, **options)

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(os, call, gone)
    before = open_files()
    message = fails(
        CheckpointError, planned=False, ctx=Context(models=siblings, threads=2), **LINEAR, models=["a", "b"]
    )
    assert message == f"{file}: cannot be read: {os.strerror(errno.ESTALE)}"
    assert open_files() == before


@pytest.mark.parametrize("place", ["", "config.json", "tokenizer.json", "model.safetensors"])
def test_a_mount_that_is_gone_before_the_plan(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, siblings: Siblings, place: str
) -> None:
    """What the system answers to a look at a directory whose server is gone, or at one of its files."""
    gone = siblings["b"] / place
    real_stat, real_open = os.stat, os.open

    def refuse(path: Any) -> None:
        if not isinstance(path, int) and Path(path) == gone:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(path))

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        refuse(path)
        return real_stat(path, *arguments, **options)

    def open_(path: Any, *arguments: Any, **options: Any) -> int:
        refuse(path)
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(os, "open", open_)
    message = fails(CheckpointError, **LINEAR, models=[str(siblings["a"]), str(siblings["b"])])
    assert str(gone) in message
    assert f"cannot be read: {os.strerror(errno.ENOTCONN)}" in message


@pytest.mark.parametrize("step", ["require_memory", "write_metadata"])
def test_a_tokenizer_that_goes_away_after_the_plan(
    fails: Fails, damaged: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real = getattr(run, step)

    def just_before(*arguments: Any, **options: Any) -> None:
        (damaged / "tokenizer.json").unlink(missing_ok=True)
        real(*arguments, **options)

    monkeypatch.setattr(run, step, just_before)
    message = fails(CheckpointError, planned=False, **LINEAR, models=["damaged", "b"])
    assert f"{damaged / 'tokenizer.json'}: cannot be read: No such file" in message


def test_an_input_that_is_changed_while_it_is_read(
    fails: Fails, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, in the middle of the last tensor: no later read would notice."""
    monkeypatch.setattr(core_checkpoint, "_HASHED_WHOLE", 0)  # as for a large model, which is not read once more
    real = engine.merge_tensor
    file = damaged / "model.safetensors"
    merged: list[str] = []

    def merge_tensor(tensor: Any, *arguments: Any, **options: Any) -> None:
        real(tensor, *arguments, **options)
        merged.append(tensor.name)
        if len(merged) == len(stored_dtypes(damaged)):
            with file.open("r+b") as stream:
                stream.seek(-4, os.SEEK_END)
                stream.write(np.float32(7).tobytes())
            os.utime(file, (1, 1))

    monkeypatch.setattr(engine, "merge_tensor", merge_tensor)
    ctx = Context(base_dir=damaged.parent, threads=1)
    shutil.copytree(damaged, damaged.parent / "other")
    message = fails(CheckpointError, planned=False, ctx=ctx, **LINEAR, models=["damaged", "other"])
    assert f"{file}: changed since its header was read" in message


def test_a_file_that_is_replaced_while_it_is_opened(
    damaged: Path, siblings: Siblings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header was that of another file: what is read later must not be taken for its tensors."""
    file = damaged / "model.safetensors"
    real = shards.read_headers

    def read_headers(weights: Any) -> Any:
        headers = real(weights)
        shutil.copy(siblings["b"] / "model.safetensors", damaged / "new")
        (damaged / "new").replace(file)
        return headers

    monkeypatch.setattr(sources, "read_headers", read_headers)
    checkpoint = open_checkpoint(damaged, Context())
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}: changed since its header was read"):
        checkpoint.read(LAYER)


# Several threads


@pytest.fixture
def many(bare_model: BareModel, tmp_path: Path) -> Context:
    """Two models, `x` and `y`, of forty tensors of one block each; four threads."""
    for name in ("x", "y"):
        bare_model(tmp_path / name, {f"w{i:02}": np.full((4, 100 + i), 1.0 + i) for i in range(40)})
    return Context(base_dir=tmp_path, threads=4)


def test_a_read_error_in_one_thread_stops_the_others(
    fails: Fails, many: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, turns = os.preadv, itertools.count()
    failed = threading.Event()
    later: list[int] = []

    def preadv(descriptor: int, *arguments: Any) -> int:
        if next(turns) == 10:
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if failed.is_set():
            later.append(descriptor)
        return real(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    # However late the main thread wakes up: it is not the one that stops the others.
    monkeypatch.setattr(engine, "wait", lambda futures, return_when: wait_for(futures, return_when=ALL_COMPLETED))
    message = fails(CheckpointError, planned=False, ctx=many, **LINEAR, models=["x", "y"])
    assert message.endswith("model.safetensors: cannot be read: Input/output error")
    assert len(later) <= 3 * 2  # three other threads may each be within a block of two models


def test_the_first_error_is_the_one_that_is_told(fails: Fails, many: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second thread to fail has the tensor that comes first, and the main thread sees both errors at once."""
    real = engine.merge_tensor
    begun = threading.Event()

    def merge_tensor(
        tensor: Any, checkpoints: Any, writer: Any, advance: Callable[[int], None], **options: Any
    ) -> None:
        if tensor.name == "w39":  # the largest, so it is submitted first
            begun.set()
            for _ in range(1000):
                try:
                    advance(0)
                except Exception:
                    raise CheckpointError("a consequence of the first error") from None
                time.sleep(0.005)
            raise CheckpointError("nobody stopped this thread")
        if tensor.name == "w20":
            begun.wait()
            raise CheckpointError("the first error")
        real(tensor, checkpoints, writer, advance, **options)

    monkeypatch.setattr(engine, "merge_tensor", merge_tensor)
    monkeypatch.setattr(engine, "wait", lambda futures, return_when: wait_for(futures, return_when=ALL_COMPLETED))
    assert fails(CheckpointError, planned=False, ctx=many, **LINEAR, models=["x", "y"]) == "the first error"


# Disks that are full, slow or broken


def test_short_writes(undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ctx, expected = undisturbed
    real, turns = os.pwrite, itertools.count()
    short = []

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        part = data[: 1 + next(turns) * 733 % 4001]
        short.append(len(part) < len(data))
        return real(descriptor, part, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert bytes_of(merge(config, tmp_path / "out", ctx)) == expected
    assert sum(short) > 20


FAILING = [
    ("pwrite", 0),
    ("pwrite", 9),
    ("posix_fallocate", 0),
    ("write", 3),
    ("fsync", 0),
    ("fsync", 2),
    ("rename", 0),
]


@pytest.mark.parametrize(("call", "turn"), FAILING)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_at_any_call(
    fails: Fails, siblings: Siblings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str, turn: int, code: int
) -> None:
    """Writing a block, reserving a file, the journal, the flush, the last step: an error with a name, nothing left."""
    real = getattr(os, call)
    turns = itertools.count()

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(turns) >= turn:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, failing)
    kind = DiskFullError if code in (errno.ENOSPC, errno.EDQUOT) else ResourceError
    before = open_files()
    ctx = Context(models=siblings, threads=2)
    message = fails(kind, planned=False, ctx=ctx, **content("ties", ["a", "b"]))
    assert message.startswith(str(tmp_path / "outputs" / "out"))
    assert next(turns) > turn
    assert open_files() == before


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fails_leaves_the_old_output(
    recipe: Recipe, siblings: Siblings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    ctx = Context(models=siblings, overwrite=True)
    out = merge(recipe(**LINEAR, models=["a", "b"]), tmp_path / "outputs" / "out", ctx)
    before = bytes_of(out)

    def failing(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(DiskFullError, match="the disk filled up while writing"):
            merge(recipe(**LINEAR, models=["a", "c"]), out, ctx)
    assert bytes_of(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


# What a killed run left


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`interrupted(config, out, ctx)`: a merge that is interrupted at its sixth tensor."""

    def arrange(config: MergeConfig, out: Path, ctx: Context) -> None:
        real = engine.merge_tensor
        turns = itertools.count()

        def merge_tensor(*arguments: Any, **options: Any) -> None:
            if next(turns) == 5:
                raise KeyboardInterrupt
            real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "merge_tensor", merge_tensor)
            with pytest.raises(KeyboardInterrupt):
                merge(config, out, ctx)
        assert (out.parent / f".{out.name}.solera-staging" / ".finished-tensors").stat().st_size > 0

    return arrange


def test_stale_staging_of_another_tokenizer(
    recipe: Recipe, siblings: Siblings, tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    """The killed run had copied a file that this one has not: the same weights, another tokenizer."""
    other = Path(shutil.copytree(siblings["a"], tmp_path / "a"))
    (other / "added_tokens.json").write_text("{}")
    ctx = Context(models=siblings | {"a": other}, threads=1)
    with_its_tokens = recipe(**LINEAR, models=["a", "b"], tokenizer_source="a")
    without = recipe(**LINEAR, models=["a", "b"], tokenizer_source="b")
    interrupted(with_its_tokens, tmp_path / "out", ctx)
    out = merge(without, tmp_path / "out", ctx)
    assert bytes_of(out) == bytes_of(merge(without, tmp_path / "fresh", ctx))
    assert not (out / "added_tokens.json").exists()
    assert verify(out) == []


def test_what_a_killed_run_reserved_is_not_asked_for_twice(
    recipe: Recipe,
    siblings: Siblings,
    tmp_path: Path,
    interrupted: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, ctx = recipe(**LINEAR, models=["a", "b"]), Context(models=siblings, threads=1)
    interrupted(config, tmp_path / "out", ctx)
    usage = shutil.disk_usage(tmp_path)
    almost_full = usage._replace(free=plan_merge(config, ctx).disk_bytes // 4)
    monkeypatch.setattr("solera_core.staging.shutil.disk_usage", lambda _: almost_full)
    with pytest.raises(DiskFullError, match="free some space"):
        merge(config, tmp_path / "elsewhere", ctx)
    merge(config, tmp_path / "out", ctx)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


# Numbers at the edge


def test_values_whose_squares_are_beyond_float32(recipe: Recipe, bare_model: BareModel, tmp_path: Path) -> None:
    """They can be merged; only their drift cannot be measured, which is said."""
    for name, value in (("x", 1e25), ("y", 3e25)):
        bare_model(tmp_path / name, {"w": np.full(10, value), "v": np.ones(3)})
    out = merge(recipe(**LINEAR, models=["x", "y"]), tmp_path / "out", Context(base_dir=tmp_path, reload_check=False))
    assert open_checkpoint(out, Context()).read("w").tolist() == [np.float32(2e25)] * 10
    drift = json.loads((out / "solera.json").read_text())["checks"]["drift"]
    assert drift["tensors"] == {"w": None, "v": 0.0}
    assert drift["outliers"] == {"w": "holds values whose squares are beyond float32"}
