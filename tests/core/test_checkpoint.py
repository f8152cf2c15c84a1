"""Opening and reading a checkpoint: values, ranges, threads, the config, the tied head, the digest."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from solera_core.checkpoint import locate, open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def save(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A directory with these tensors and this config."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return directory


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_the_values_that_torch_reads(dtype: str, tmp_path: Path, ctx: Context) -> None:
    tensor = torch.randn(7, 5).to(getattr(torch, dtype))
    checkpoint = open_checkpoint(save(tmp_path / "m", {"w": tensor}), ctx)
    assert checkpoint.tensors["w"].dtype == DTYPES[dtype]
    assert np.array_equal(checkpoint.read("w"), tensor.float().numpy())
    assert checkpoint.read("w").dtype == np.float32
    assert checkpoint.read_raw("w").tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_ranges_are_parts_of_the_whole(sharded: Path, ctx: Context) -> None:
    checkpoint = open_checkpoint(sharded, ctx)
    for name, info in checkpoint.tensors.items():
        whole = checkpoint.read_flat(name)
        for start, stop in [(0, info.size), (0, 0), (3, 17), (info.size - 1, info.size)]:
            assert np.array_equal(checkpoint.read_flat(name, start, stop), whole[start:stop])
            assert np.array_equal(
                checkpoint.read_raw(name, start, stop), checkpoint.read_raw(name)[4 * start : 4 * stop]
            )


def test_what_is_read_may_be_changed(llama: Path, ctx: Context) -> None:
    checkpoint = open_checkpoint(llama, ctx)
    values = checkpoint.read_flat("model.norm.weight")
    values += 1
    assert not np.array_equal(values, checkpoint.read_flat("model.norm.weight"))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 3), (0, 10**9)])
def test_a_range_outside_is_a_bug(start: int, stop: int, llama: Path, ctx: Context) -> None:
    with pytest.raises(ValueError, match=r"model.norm.weight"):
        open_checkpoint(llama, ctx).read_flat("model.norm.weight", start, stop)


def test_an_unknown_tensor(llama: Path, ctx: Context) -> None:
    with pytest.raises(CheckpointError, match="has no tensor 'nothing'"):
        open_checkpoint(llama, ctx).read("nothing")


def test_integers_are_moved_but_not_computed_with(tmp_path: Path, ctx: Context) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "m", {"i": torch.arange(3)}), ctx)
    assert checkpoint.read_raw("i").view(np.int64).tolist() == [0, 1, 2]
    with pytest.raises(CheckpointError, match="'i' is stored as I64, which cannot be computed with"):
        checkpoint.read_flat("i")


def test_a_range_takes_no_more_memory_than_itself(tmp_path: Path, ctx: Context) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "m", {"w": torch.zeros(4_000_000, dtype=torch.bfloat16)}), ctx)
    tracemalloc.start()
    try:
        checkpoint.read_flat("w", 1_000_000, 1_010_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000


def test_threads_read_at_once(sharded: Path, ctx: Context) -> None:
    checkpoint = open_checkpoint(sharded, ctx)
    names = list(checkpoint.tensors) * 8
    expected = {name: checkpoint.read(name) for name in checkpoint.tensors}
    with ThreadPoolExecutor(8) as pool:
        for name, values in zip(names, pool.map(checkpoint.read, names), strict=True):
            assert np.array_equal(values, expected[name])


def test_a_file_cut_after_opening_is_noticed(llama: Path, ctx: Context) -> None:
    checkpoint = open_checkpoint(llama, ctx)
    last = list(checkpoint.tensors)[-1]
    os.truncate(llama / "model.safetensors", 5000)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: changed since its header was read \(\d+ bytes then, 5000 now\)"
    ):
        checkpoint.read(last)
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.read(last)


def test_the_config_is_a_copy(llama: Path, ctx: Context) -> None:
    checkpoint = open_checkpoint(llama, ctx)
    checkpoint.config["rope_parameters"]["rope_theta"] = 1
    assert checkpoint.config["rope_parameters"]["rope_theta"] == 10000.0


def test_sidecars_are_what_makes_the_model_usable(llama: Path, ctx: Context) -> None:
    for name in (
        "chat_template.jinja",
        "processor_config.json",
        "notes.md",
        "README.md",
        "modeling_x.py",
        "x.tiktoken",
    ):
        (llama / name).write_text("{}")
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tool.jinja").write_text("x")
    names = [file.name for file in open_checkpoint(llama, ctx).sidecars]
    assert names == [
        "tool.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "x.tiktoken",
    ]


# What is not a checkpoint


def refused(model: Path, ctx: Context, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(model, ctx)
    assert str(model) in str(caught.value)


def test_no_config(llama: Path, ctx: Context) -> None:
    (llama / "config.json").unlink()
    refused(llama, ctx, "not a checkpoint: it has no config.json")


def test_no_weights(llama: Path, ctx: Context) -> None:
    (llama / "model.safetensors").unlink()
    refused(llama, ctx, "not a checkpoint: neither model.safetensors nor")


def test_no_tensors(llama: Path, ctx: Context) -> None:
    save_file({}, llama / "model.safetensors")
    refused(llama, ctx, "holds no tensors")


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_a_damaged_config(content: str, llama: Path, ctx: Context) -> None:
    (llama / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    refused(llama, ctx, "cannot be read as JSON|expected an object, found list")


def test_an_adapter_is_no_model(llama: Path, ctx: Context) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "adapter_config.json").write_text("{}")
    refused(llama, ctx, "is a LoRA adapter, not a model; write it as <model>[+]llama")
    (llama / "config.json").unlink()
    refused(llama, ctx, "is a LoRA adapter, not a model; write <model>[+]llama")


def test_remote_code_needs_permission(llama: Path, ctx: Context) -> None:
    config = json.loads((llama / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.Model"}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "modeling_x.py").write_text("raise SystemExit('this code ran')")
    refused(llama, ctx, "auto_map.*--trust-remote-code")
    with pytest.raises(CheckpointError, match="auto_map"):
        locate(llama, ctx)
    trusting = open_checkpoint(llama, Context(base_dir=ctx.base_dir, trust_remote_code=True))
    assert "modeling_x.py" in [file.name for file in trusting.sidecars]


# Tied embeddings


def tied(directory: Path, head: torch.Tensor | None, *, flag: bool | None) -> Path:
    embedding = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    tensors = {"model.embed_tokens.weight": embedding}
    if head is not None:
        tensors["lm_head.weight"] = embedding + head
    return save(directory, tensors, **({} if flag is None else {"tie_word_embeddings": flag}))


def test_a_head_that_repeats_tied_embeddings_is_left_out(tmp_path: Path, ctx: Context) -> None:
    copy = open_checkpoint(tied(tmp_path / "a", torch.zeros(8, 4), flag=True), ctx)
    assert list(copy.tensors) == ["model.embed_tokens.weight"]
    assert copy.digest() == open_checkpoint(tied(tmp_path / "b", None, flag=True), ctx).digest()


def test_a_head_that_contradicts_the_tie_is_refused(tmp_path: Path, ctx: Context) -> None:
    other = torch.zeros(8, 4)
    other[7, 3] = 1e-3
    refused(
        tied(tmp_path / "m", other, flag=True),
        ctx,
        r"'lm_head.weight' \(8, 4\) differs from 'model.embed_tokens.weight'",
    )


@pytest.mark.parametrize("flag", [False, None])
def test_an_equal_head_that_is_not_tied_stays(flag: bool | None, tmp_path: Path, ctx: Context) -> None:
    assert len(open_checkpoint(tied(tmp_path / "m", torch.zeros(8, 4), flag=flag), ctx).tensors) == 2


# The digest


def test_the_digest_does_not_depend_on_the_shards(sharded: Path, tmp_path: Path, ctx: Context) -> None:
    tensors = {k: v for file in sharded.glob("model-*.safetensors") for k, v in load_file(file).items()}
    one = tmp_path / "one"
    one.mkdir()
    save_file(tensors, one / "model.safetensors")
    shutil.copy(sharded / "config.json", one)
    assert open_checkpoint(one, ctx).digest() == open_checkpoint(sharded, ctx).digest()


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


def _negate_one(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["model.norm.weight"][3] *= -1


CHANGES: dict[str, Change] = {
    "one value": _negate_one,
    "a dtype": lambda tensors, config: tensors.update({"model.norm.weight": tensors["model.norm.weight"].half()}),
    "a shape": lambda tensors, config: tensors.update({"model.norm.weight": tensors["model.norm.weight"][None]}),
    "a name": lambda tensors, config: tensors.update({"model.nrm.weight": tensors.pop("model.norm.weight")}),
    "the config": lambda tensors, config: config.update({"rms_norm_eps": 1e-3}),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_the_digest_changes_with(kind: str, llama: Path, ctx: Context) -> None:
    before = open_checkpoint(llama, ctx).digest()
    tensors = load_file(llama / "model.safetensors")
    config = json.loads((llama / "config.json").read_text())
    CHANGES[kind](tensors, config)
    save_file(tensors, llama / "model.safetensors")
    (llama / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(llama, ctx).digest() != before


# References


def test_stage_then_directory(llama: Path, siblings: dict[str, Path], tmp_path: Path, ctx: Context) -> None:
    assert locate("llama", ctx) == llama
    assert open_checkpoint("llama", ctx).ref == "llama"
    assert locate(llama.absolute(), ctx) == llama
    staged = Context(base_dir=tmp_path, models={"llama": siblings["b"]})
    assert locate("llama", staged) == siblings["b"]
    assert locate("./llama", staged) == llama


def test_reading_needs_no_torch(llama: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from solera_core.checkpoint import open_checkpoint\n"
        "from solera_core.context import Context\n"
        "import solera_core.writer, solera_core.provenance, solera_core.output, solera_core.causal_lm\n"
        "import solera_core.inspect, solera_core.diff, solera_core.data\n"
        f"open_checkpoint(Path({str(llama)!r}), Context()).digest()\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'huggingface_hub', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False
    )
    assert run.returncode == 0
