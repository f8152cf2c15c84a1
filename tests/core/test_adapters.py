"""LoRA laid over a model while reading: equal to peft's own merge; everything else refused by name."""

import json
import shutil
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from solera_core.adapters import LowRank
from solera_core.checkpoint import locate, open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError

MakeAdapter = Callable[..., Path]


def _make_adapter(base: Path, directory: Path, **options: Any) -> Path:
    """An adapter as peft saves it, every trained tensor random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on its own deprecations, and on saving embeddings
        torch.manual_seed(3)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings | options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(str(directory))
    return directory


def _peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
        return dict(model.merge_and_unload().state_dict())


@pytest.fixture(scope="module")
def base(siblings: dict[str, Path]) -> Path:
    return siblings["base"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A plain adapter (read-only)."""
    return _make_adapter(base, tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """A writable copy of a plain adapter."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


KINDS: dict[str, tuple[dict[str, Any], int]] = {  # settings, tensors changed of 21
    "plain": ({}, 4),
    "rank-stabilised": ({"use_rslora": True}, 4),
    "patterns": (
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 7, "q_proj": 1},
        },
        4,
    ),
    "patterns, rank-stabilised": (
        {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5}},
        4,
    ),
    "embedding and head": ({"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, 4),
    "saved modules": ({"modules_to_save": ["norm", "lm_head"]}, 10),
    "everything": ({"target_modules": "all-linear"}, 14),
    "one layer": ({"layers_to_transform": [1]}, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft(kind: str, base: Path, tmp_path: Path, ctx: Context) -> None:
    options, changed = KINDS[kind]
    adapter = _make_adapter(base, tmp_path / "adapter", **options)
    ours, plain = open_checkpoint(f"{base}+{adapter}", ctx), open_checkpoint(base, ctx)
    theirs = _peft_merged(base, adapter)
    assert set(ours.tensors) == set(theirs)
    for name in ours.tensors:
        np.testing.assert_allclose(ours.read(name), theirs[name].numpy(), rtol=0, atol=1e-6, err_msg=name)
    assert sum(not np.array_equal(ours.read(n), plain.read(n)) for n in ours.tensors) == changed


def test_a_second_adapter_stands_on_the_first(base: Path, plain: Path, tmp_path: Path, ctx: Context) -> None:
    second = _make_adapter(base, tmp_path / "second", target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    one, two, both = (open_checkpoint(f"{base}+{a}", ctx) for a in (plain, second, f"{plain}+{second}"))
    start = open_checkpoint(base, ctx).read(name)
    np.testing.assert_allclose(both.read(name) - start, one.read(name) + two.read(name) - 2 * start, atol=1e-6)
    assert len({one.digest(), two.digest(), both.digest()}) == 3


def test_any_range_gives_the_same_bits() -> None:
    random = np.random.default_rng(0)
    left = random.standard_normal((700, 64), dtype=np.float32)  # a BLAS gives other bits for other heights here
    right = random.standard_normal((64, 130), dtype=np.float32)
    update = LowRank(left, right, 0.5)
    whole = update.delta(0, 91_000)
    np.testing.assert_allclose(whole, (0.5 * left @ right).reshape(-1), rtol=0, atol=2e-5)
    for start, stop in [(0, 1), (4, 4), (5, 23), (130, 260), (90_999, 91_000), (32_767, 65_537), (129, 90_001)]:
        assert np.array_equal(update.delta(start, stop), whole[start:stop])


def test_memory_is_that_of_a_few_rows() -> None:
    update = LowRank(np.ones((100_000, 2), np.float32), np.ones((2, 100), np.float32), 1.0)
    tracemalloc.start()
    try:
        update.delta(5_000_000, 5_010_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000  # the whole product is 40 MB


def test_bytes_of_a_changed_tensor_are_refused(base: Path, plain: Path, ctx: Context) -> None:
    checkpoint = open_checkpoint(f"{base}+{plain}", ctx)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert checkpoint.is_derived(name)
    with pytest.raises(CheckpointError, match=f"'{name}' is computed"):
        checkpoint.read_raw(name)
    assert checkpoint.read_raw("model.norm.weight").size == 128
    with pytest.raises(CheckpointError, match="a model with an adapter cannot be loaded here"):
        locate(f"{base}+{plain}", ctx)


def test_dtype_stays_that_of_the_base(
    make_model: Callable[..., Path], base: Path, plain: Path, tmp_path: Path, ctx: Context
) -> None:
    half = make_model(tmp_path / "half", base=base, dtype="bfloat16")
    checkpoint = open_checkpoint(f"{half}+{plain}", ctx)
    assert {t.dtype for t in checkpoint.tensors.values()} == {"BF16"}
    name = "model.layers.1.mlp.down_proj.weight"
    a, b = (
        load_file(plain / "adapter_model.safetensors")[f"base_model.model.{name[:-7]}.lora_{s}.weight"] for s in "AB"
    )
    expected = open_checkpoint(half, ctx).read(name) + 2.0 * (b @ a).numpy()
    np.testing.assert_allclose(checkpoint.read(name), expected, atol=1e-7)


def test_pickled_adapters_need_permission(base: Path, adapter: Path, ctx: Context) -> None:
    before = open_checkpoint(f"{base}+{adapter}", ctx)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: the adapter is pickled"):
        open_checkpoint(f"{base}+{adapter}", ctx)
    after = open_checkpoint(f"{base}+{adapter}", Context(base_dir=ctx.base_dir, allow_pickle=True))
    assert after.digest() == before.digest()


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "DoRA adapters .*not supported"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out .*not supported"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changed the base model"),
    "another kind": ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
    "parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "`target_parameters: .* is not supported"),
    "layers repeated": ({"layer_replication": [[0, 2]]}, "`layer_replication: .* is not supported"),
    "unheard of": ({"use_tomorrow": 1}, "`use_tomorrow: 1` is not supported"),
    "wrong rank": ({"r": 5}, r"gives rank 5 for model\.layers\.\d.*, but its factors have rank 4"),
    "no alpha": ({"lora_alpha": None}, "`lora_alpha` must be a number, found None"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_beyond_the_formula_are_refused(kind: str, base: Path, adapter: Path, ctx: Context) -> None:
    changes, message = SETTINGS[kind]
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(f"{base}+{adapter}", ctx)
    assert "adapter_config.json" in str(caught.value)


def _rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "another model": (
        lambda t: _rename(t, f"{Q}.lora_A.weight", Q.replace("layers.0", "layers.9") + ".lora_A.weight"),
        "changes 'model.layers.9.self_attn.q_proj.weight', which the model does not store",
    ),
    "half": (lambda t: t.pop(f"{Q}.lora_B.weight"), r"holds \['A'\], expected \['A', 'B'\]"),
    "another width": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 31)}),
        r"\(32, 4\) and \(4, 31\) do not fit",
    ),
    "a convolution": (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 32, 1)}), "only LoRA of matrices"),
    "DoRA": (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(32)}), "DoRA adapters are not supported"),
    "LoRA bias": (
        lambda t: t.update({f"{Q}.lora_B.bias": torch.zeros(32)}),
        "this kind of LoRA tensor is not supported",
    ),
    "larger vocabulary": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(310, 32)}),
        r"\(310, 32\) replaces 'lm_head.weight' \(304, 32\) of the model: the shapes differ",
    ),
    "nothing": (lambda t: t.clear(), "holds no LoRA tensors"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit_are_refused(kind: str, base: Path, adapter: Path, ctx: Context) -> None:
    change, message = TENSORS[kind]
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(f"{base}+{adapter}", ctx)
    assert str(adapter) in str(caught.value)


def test_not_an_adapter(base: Path, adapter: Path, ctx: Context) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the adapter has no weights"):
        open_checkpoint(f"{base}+{adapter}", ctx)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        open_checkpoint(f"{base}+{adapter}", ctx)
    with pytest.raises(CheckpointError, match=r"not a peft adapter: it has no adapter_config.json"):
        open_checkpoint(f"{base}+{base}", ctx)
    with pytest.raises(CheckpointError, match="model 'nowhere' not found"):
        open_checkpoint(f"{base}+nowhere", ctx)


def test_plus_signs_in_paths(base: Path, plain: Path, tmp_path: Path, ctx: Context) -> None:
    shutil.copytree(base, tmp_path / "my+model")
    shutil.copytree(plain, tmp_path / "my+adapter")
    model = open_checkpoint("my+model", ctx)
    assert not any(model.is_derived(n) for n in model.tensors)
    expected = open_checkpoint(f"{base}+{plain}", ctx).digest()
    assert open_checkpoint("my+model+my+adapter", ctx).digest() == expected
    staged = Context(base_dir=tmp_path, models={"first": base, "second": plain})
    assert open_checkpoint("first+second", staged).digest() == expected
