"""Merges of quantised models: the weights that transformers would load, and an unquantised output."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, ResourceError
from solera_core.provenance import verify
from solera_core.strict import parse
from solera_merge.config import MergeConfig
from solera_merge.plan import make_plan, tensor_bytes
from solera_merge.run import merge, plan_merge
from tests import loopback_hub

Recipe = Callable[..., MergeConfig]
MakeModel = Callable[..., Path]
Siblings = dict[str, Path]

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}


def stored_fp8(source: Path, target: Path) -> Path:
    """A Llama as DeepSeek-V3 is stored: every linear layer in 8 bits with a scale for each block of 8 x 16."""
    shutil.copytree(source, target)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = weight.to(torch.bfloat16)
            continue
        rows, columns = weight.shape
        blocks = weight.float().reshape(rows // 8, 8, columns // 16, 16)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        tensors[name] = (blocks / scale).reshape(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(rows // 8, columns // 16)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    edit_config(target, quantization_config=FP8, dtype="bfloat16")
    return target


def stored_nf4(source: Path, target: Path) -> Path:
    """A Llama as bitsandbytes stores it, each weight in blocks of 64."""
    shutil.copytree(source, target)
    table = torch.linspace(-1, 1, 16)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = weight.to(torch.bfloat16)
            continue
        blocks = weight.float().reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        codes = ((blocks / absmax[:, None] + 1) * 7.5).round().to(torch.uint8).reshape(-1)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        tensors[name] = (codes[0::2] << 4 | codes[1::2])[:, None]
        tensors |= {f"{name}.absmax": absmax, f"{name}.quant_map": table.clone()}
        text = bytearray(json.dumps(state).encode())
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.frombuffer(text, dtype=torch.uint8)
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_config(target, quantization_config=settings, dtype="bfloat16")
    return target


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def written_out(source: Path, target: Path) -> Path:
    """The same model, unquantised in float32 by hand."""
    shutil.copytree(source, target)
    model = open_checkpoint(source, Context(), dequantise=True)
    save_file({n: torch.from_numpy(model.read(n)) for n in model.tensors}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(model.config))
    return target


@pytest.fixture
def models(siblings: Siblings, tmp_path: Path) -> Siblings:
    """The siblings, `a8` and `b4` quantised, `a32` and `b32` the same values in float32."""
    a8, b4 = stored_fp8(siblings["a"], tmp_path / "a8"), stored_nf4(siblings["b"], tmp_path / "b4")
    values = {"a32": written_out(a8, tmp_path / "a32"), "b32": written_out(b4, tmp_path / "b32")}
    return siblings | {"a8": a8, "b4": b4} | values


@pytest.mark.parametrize("method", ["linear", "ties", "iso_c"])
def test_as_if_the_values_had_been_written_out(recipe: Recipe, models: Siblings, tmp_path: Path, method: str) -> None:
    ctx = Context(models=models)
    base = {} if method == "linear" else {"base_model": "base"}
    parameters = {"iso_c": {}, "ties": {"weight": 0.7, "density": 0.4}, "linear": {"weight": 0.7}}[method]
    made = []
    for a, b in (("a8", "b4"), ("a32", "b32")):
        config = recipe(merge_method=method, models=[a, b], parameters=parameters, dtype="bfloat16", **base)
        made.append(merge(config, tmp_path / f"out-{a}", ctx))
    ours, expected, plain = (load_file(p / "model.safetensors") for p in (*made, models["a"]))
    assert ours.keys() == expected.keys() == plain.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    config = json.loads((made[0] / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert json.loads((made[0] / "solera.json").read_text())["checks"]["transformers"].keys() == (
        {"missing", "unexpected", "mismatched"} if method == "linear" else {"skipped"}
    )
    assert verify(made[0]) == []


def test_the_weights_that_transformers_loads(recipe: Recipe, models: Siblings, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    auto_model: Any = AutoModelForCausalLM  # untyped upstream
    settings = FineGrainedFP8Config(weight_block_size=(8, 16), dequantize=True)
    loaded = auto_model.from_pretrained(models["a8"], dtype=torch.bfloat16, quantization_config=settings)
    config = recipe(merge_method="passthrough", models=["a8"])
    out = merge(config, tmp_path / "out", Context(models=models))
    ours = load_file(out / "model.safetensors")
    theirs = loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(ours[name], tensor), name


def test_gpt_oss(recipe: Recipe, make_model: MakeModel, tmp_path: Path) -> None:
    """Experts in MXFP4 blocks: the values, names and shapes that transformers has for them."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    auto_model: Any = AutoModelForCausalLM
    upstream: Any = convert_moe_packed_tensors
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "head_dim": 16,
    }
    plain = make_model(tmp_path / "plain", family="gpt_oss", dtype="bfloat16", **sizes)
    quantised = Path(shutil.copytree(plain, tmp_path / "quantised"))
    tensors, expected = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = expected[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = upstream(blocks, scales)
    assert len(tensors) > len(expected)
    save_file(tensors, quantised / "model.safetensors", {"format": "pt"})
    edit_config(quantised, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    config = recipe(merge_method="passthrough", models=["quantised"])
    out = merge(config, tmp_path / "out", Context(models={"quantised": quantised}))
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    model, info = auto_model.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def lora(directory: Path, base: Path) -> torch.Tensor:
    """An adapter for the first query projection; its update [out, in]."""
    name, rank = "model.layers.0.self_attn.q_proj", 2
    generator = torch.Generator().manual_seed(0)
    columns = json.loads((base / "config.json").read_text())["hidden_size"]
    left = torch.randn(columns, rank, generator=generator)
    right = torch.randn(rank, columns, generator=generator)
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    factors = {f"base_model.model.{name}.lora_A.weight": right, f"base_model.model.{name}.lora_B.weight": left}
    save_file(factors, directory / "adapter_model.safetensors")
    return left @ right


def test_an_adapter_on_a_quantised_base(recipe: Recipe, models: Siblings, tmp_path: Path) -> None:
    """QLoRA: the adapter is added to the values that the codes stand for."""
    update = lora(tmp_path / "lora", models["base"])
    name = "model.layers.0.self_attn.q_proj.weight"
    config = recipe(merge_method="passthrough", models=["b4+lora"], dtype="float32")
    out = merge(config, tmp_path / "out", Context(models=models, base_dir=tmp_path))
    expected = load_file(models["b32"] / "model.safetensors")[name] + update
    np.testing.assert_allclose(load_file(out / "model.safetensors")[name], expected, atol=1e-5)


def test_the_plan_counts_the_memory_of_dequantising(recipe: Recipe, models: Siblings, tmp_path: Path) -> None:
    """Under an adapter too; and `--memory` refuses what does not fit with it."""
    lora(tmp_path / "lora", models["base"])
    models |= {"l": tmp_path / "lora"}
    needs: dict[str, int] = {}
    for ref in ("a32", "a8", "a32+l", "a8+l"):
        config = recipe(merge_method="linear", models=[ref, "b"], parameters={"weight": 1}, dtype="float32")
        plan, opened = make_plan(config, Context(models=models))
        tensor = next(t for t in plan.tensors if t.name == "model.layers.0.self_attn.q_proj.weight")
        assert tensor.scratch == opened.checkpoints[0].scratch(tensor.name)
        needs[ref] = tensor_bytes(tensor)
    assert needs["a8"] > needs["a32"] == needs["a32+l"]
    assert needs["a8+l"] == needs["a8"]
    config = recipe(merge_method="linear", models=["a8", "b"], parameters={"weight": 1})
    plan, _ = make_plan(config, Context(models=models))
    bound = max(tensor_bytes(tensor) for tensor in plan.tensors) - 1
    with pytest.raises(ResourceError, match="needs"):
        merge(config, tmp_path / "out", Context(models=models, memory_bytes=bound))


def test_the_plan_says_what_is_dequantised(recipe: Recipe, models: Siblings) -> None:
    config = recipe(merge_method="linear", models=["a8", "a"], parameters={"weight": 1}, dtype="bfloat16")
    plan = plan_merge(config, Context(models=models))
    note = "stored as fp8, blocks of 8 x 16: dequantised, and written unquantised"
    assert [row.get("read as") for row in plan.reads] == [note, None]
    assert f"a8: {note}" in plan.warnings
    size = (models["a8"] / "model.safetensors").stat().st_size
    assert 0.9 * size < plan.reads[0]["bytes"] <= size  # what is read are the codes


def test_codes_that_stand_for_no_number_are_named(recipe: Recipe, models: Siblings, tmp_path: Path) -> None:
    tensors = load_file(models["a8"] / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(torch.uint8)[2, 3] = 0x7F
    save_file(tensors, models["a8"] / "model.safetensors")
    config = recipe(merge_method="linear", models=["a8", "a"], parameters={"weight": 1})
    with pytest.raises(CheckpointError, match=rf"{name}.* holds nan at \(2, 3\)"):
        merge(config, tmp_path / "out", Context(models=models))


def test_a_merge_is_made_again_from_its_record(recipe: Recipe, models: Siblings, tmp_path: Path) -> None:
    from solera.rebuild import rebuild

    config = recipe(merge_method="linear", models=["a8", "b4"], parameters={"weight": 1}, dtype="bfloat16")
    ctx = Context(models=models)
    assert rebuild(merge(config, tmp_path / "out", ctx), ctx).problems == ()


@pytest.fixture
def hub(models: Siblings, tmp_path: Path) -> Iterator[loopback_hub.Hub]:
    folder = tmp_path / "served"
    for name in ("a8", "b4"):
        shutil.copytree(models[name], folder / name)
    with loopback_hub.serve(folder) as hub:
        yield hub


CODE = """
from solera_core.context import Context
from solera_core.strict import parse
from solera_merge.config import MergeConfig
from solera_merge.run import merge, plan_merge
ctx = Context(base_dir=Path(arguments["base_dir"]))
config = parse(MergeConfig, arguments["recipe"], where="recipe")
"""


def test_on_the_hub_they_are_planned_from_headers(hub: loopback_hub.Hub, models: Siblings, tmp_path: Path) -> None:
    """And, of bitsandbytes, the few bytes of each quantisation state, which hold the shapes."""
    content: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1}, "dtype": "bfloat16"}
    content["models"] = [{"model": "me/a8"}, {"model": "me/b4"}]
    options: dict[str, Any] = {"base_dir": str(tmp_path), "recipe": content}

    def ask(code: str) -> Any:
        return loopback_hub.ask(CODE + code, hub.endpoint, tmp_path, offline=False, **options)

    answer = ask("answer |= plan_merge(config, ctx).to_json()")
    assert len(answer["rows"]) == len(load_file(models["a"] / "model.safetensors"))
    weights = hub.weights()
    assert all(asked.first is not None for asked in weights)
    files = sum((models[n] / "model.safetensors").stat().st_size for n in ("a8", "b4"))
    assert sum(asked.served for asked in weights) < files / 2
    ask("merge(config, Path(arguments['base_dir'], 'out'), ctx)")
    local = Context(models={"me/a8": models["a8"], "me/b4": models["b4"]})
    here = merge(parse(MergeConfig, content, where="recipe"), tmp_path / "here", local)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()
