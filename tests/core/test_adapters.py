"""LoRA laid over a model while reading: equal to peft's own merge; everything else refused by name."""

import json
import shutil
import tempfile
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from solera_core.adapters import LowRank, lay_over
from solera_core.checkpoint import Checkpoint, locate, open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_core.progress import Silent
from solera_core.views import view

MakeAdapter = Callable[..., Path]


def _loaded(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(base)


def _make_adapter(base: Path, directory: Path, **options: Any) -> Path:
    """An adapter as peft saves it, every trained tensor random."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on its own deprecations, and on saving embeddings
        torch.manual_seed(3)
        model = get_peft_model(_loaded(base), LoraConfig(**settings | options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(str(directory))
    return directory


def _peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What peft itself makes of the two, under the names that transformers gives it on disk."""
    from peft import PeftModel

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as merged:
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(_loaded(base), str(adapter))
        model.merge_and_unload().save_pretrained(merged)
        return load_file(Path(merged) / "model.safetensors")


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
    "saved embeddings": ({"modules_to_save": ["embed_tokens", "lm_head"]}, 6),
    "everything": ({"target_modules": "all-linear"}, 14),
    "one layer": ({"layers_to_transform": [1]}, 2),
    "DoRA": ({"use_dora": True}, 4),
    "DoRA, rank-stabilised, embedding": ({"use_dora": True, "use_rslora": True, "target_modules": ["embed_tokens"]}, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft(kind: str, base: Path, tmp_path: Path, ctx: Context) -> None:
    options, changed = KINDS[kind]
    _compare_with_peft(base, _make_adapter(base, tmp_path / "adapter", **options), changed, ctx)


FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "Conv1D": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}, 8),
    "Conv1D, square only": ("gpt2", {}, {"target_modules": ["attn.c_proj"]}, 2),
    "Conv1D with DoRA": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}, 6),
    "biases of the targets": ("gpt2", {}, {"target_modules": ["c_attn"], "bias": "lora_only"}, 4),
    "all biases": ("gpt2", {}, {"target_modules": ["c_attn"], "bias": "all"}, 2 + 2 * 6 + 1),
    "bias of B": ("qwen2", {}, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, 8),
    "tied embedding, saved": (
        "llama",
        {"tie_word_embeddings": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        5,
    ),
    "fused experts": (
        "mixtral",
        {},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        2 * 3 * 3,
    ),
    "one fused parameter": ("mixtral", {}, {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]}, 2 * 4),
    "experts by their old names": ("mixtral", {}, {"target_modules": ["w1", "w2", "w3"]}, 2 * 3 * 3),
    "experts in Qwen's names": (
        "qwen2_moe",
        {"num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        2 * 3 * 3,
    ),
    "fused on disk": (
        "gpt_oss",
        {"head_dim": 8, "num_local_experts": 3, "intermediate_size": 32},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        2 * 2,
    ),
}
_SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 3},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_equals_peft_for_other_families(
    kind: str, make_model: Callable[..., Path], tmp_path: Path, ctx: Context
) -> None:
    family, config, options, changed = FAMILIES[kind]
    base = make_model(tmp_path / "base", family=family, **_SMALL.get(family, {}) | config)
    _compare_with_peft(base, _make_adapter(base, tmp_path / "adapter", **options), changed, ctx)


def _compare_with_peft(base: Path, adapter: Path, changed: int, ctx: Context) -> None:
    ours, plain = open_checkpoint(f"{base}+{adapter}", ctx), open_checkpoint(base, ctx)
    theirs = _peft_merged(base, adapter)
    assert set(ours.tensors) == set(theirs)
    for name in ours.tensors:
        np.testing.assert_allclose(ours.read(name), theirs[name].numpy(), rtol=0, atol=2e-6, err_msg=name)
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
    "DoRA without magnitudes": ({"use_dora": True}, "says use_dora: True, yet lora_magnitude_vector is absent"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changed the base model"),
    "another kind": ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
    "trained tokens": ({"trainable_token_indices": [3]}, "`trainable_token_indices: .* is not supported"),
    "layers repeated": ({"layer_replication": [[0, 2]]}, "`layer_replication: .* is not supported"),
    "unheard of": ({"use_tomorrow": 1}, "`use_tomorrow: 1` is not supported"),
    "wrong rank": ({"r": 5}, r"gives rank 5 for model\.layers\.\d.*, but its factors have rank 4"),
    "no alpha": ({"lora_alpha": None}, "`lora_alpha` must be a number, found None"),
    "no rank": ({"r": 0}, "`r` must be a whole number above 0, found 0"),
    "no pattern": ({"rank_pattern": ["q_proj"]}, "`rank_pattern` must map patterns to numbers"),
    "a broken pattern": ({"alpha_pattern": {"(": 4}}, r"`alpha_pattern`: '\(' is no regular expression"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_beyond_the_formula_are_refused(kind: str, base: Path, adapter: Path, ctx: Context) -> None:
    changes, message = SETTINGS[kind]
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(f"{base}+{adapter}", ctx)
    assert "adapter_config.json" in str(caught.value)


def _rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> str:
    tensors[new] = tensors.pop(old)
    return new


Q = "base_model.model.model.layers.0.self_attn.q_proj"
Q9 = Q.replace("layers.0", "layers.9")
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "another model": (
        lambda t: [
            _rename(t, f"{Q}.lora_{s}.weight", Q.replace("layers.0", "layers.9") + f".lora_{s}.weight") for s in "AB"
        ],
        "changes 'model.layers.9.self_attn.q_proj.weight', which the model does not store",
    ),
    "half": (lambda t: t.pop(f"{Q}.lora_B.weight"), r"holds \['A'\], expected \['A', 'B'\]"),
    "another width": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 31)}),
        r"\(32, 4\) and \(4, 31\) do not fit",
    ),
    "another rank": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3, 32)}),
        "the first has rank 3, the second 4",
    ),
    "unknown target": (
        lambda t: [_rename(t, f"{Q}.lora_{s}.weight", Q.replace("q_proj", "qq") + f".lora_{s}.weight") for s in "AB"],
        r"changes 'model.layers.0.self_attn.qq.weight', .*\(it says that it was trained on '",
    ),
    "a convolution": (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 32, 1)}), "only LoRA of matrices"),
    "DoRA unannounced": (
        lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(32)}),
        "says use_dora: False, yet lora_magnitude_vector is stored",
    ),
    "LoRA bias": (
        lambda t: t.update({f"{Q}.lora_B.bias": torch.zeros(32)}),
        "this kind of LoRA tensor is not supported",
    ),
    "larger vocabulary": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(310, 32)}),
        r"\(310, 32\) replaces 'lm_head.weight' \(304, 32\) .*: 'model.embed_tokens.weight' 304",
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


def _tie(base: Path, directory: Path) -> Path:
    """A tied copy of an untied model."""
    shutil.copytree(base, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_tied_embeddings_are_changed_together_or_not_at_all(base: Path, tmp_path: Path, ctx: Context) -> None:
    tied = _tie(base, tmp_path / "tied")
    adapter = tmp_path
    for number, (options, message) in enumerate(
        [
            ({"target_modules": ["embed_tokens"]}, "changes the embedding .* but not the output head"),
            ({"modules_to_save": ["embed_tokens"]}, "changes the embedding .* but not the output head"),
            ({"modules_to_save": ["lm_head"]}, "it ties its output head to the embedding: save it untied first"),
            ({"target_modules": ["lm_head"]}, "it ties its output head to the embedding: save it untied first"),
            ({"modules_to_save": ["embed_tokens", "lm_head"]}, "it ties its output head to the embedding"),
        ]
    ):
        adapter = _make_adapter(base, tmp_path / f"adapter{number}", **options)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(f"{tied}+{adapter}", ctx)
    both = load_file(adapter / "adapter_model.safetensors")
    both["base_model.model.lm_head.weight"] = both["base_model.model.model.embed_tokens.weight"].clone()
    save_file(both, adapter / "adapter_model.safetensors")
    saved = open_checkpoint(f"{tied}+{adapter}", ctx).read("model.embed_tokens.weight")
    assert np.array_equal(saved, both["base_model.model.lm_head.weight"].numpy())


def test_a_tied_embedding_with_lora(make_model: Callable[..., Path], tmp_path: Path, ctx: Context) -> None:
    """peft trains and loads this right, but its merge_and_unload adds the update twice."""
    from peft import PeftModel

    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    adapter = _make_adapter(tied, tmp_path / "adapter", target_modules=["embed_tokens"], ensure_weight_tying=True)
    text = torch.arange(20)[None]
    merged = _loaded(tied)
    embedding = open_checkpoint(f"{tied}+{adapter}", ctx).read("model.embed_tokens.weight")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged.model.embed_tokens.weight.copy_(torch.from_numpy(embedding))
        trained: Any = PeftModel.from_pretrained(_loaded(tied), str(adapter))
        torch.testing.assert_close(merged(text).logits, trained(text).logits, rtol=0, atol=1e-5)


def test_a_base_stored_in_another_layout(base: Path, plain: Path, tmp_path: Path, ctx: Context) -> None:
    expected = open_checkpoint(f"{base}+{plain}", ctx)
    for number, prefix in enumerate(("language_model.model.", "")):
        other = Path(shutil.copytree(base, tmp_path / f"other{number}"))
        tensors = load_file(base / "model.safetensors")
        renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
        save_file(renamed, other / "model.safetensors")
        adapter = plain
        if prefix:
            adapter = Path(shutil.copytree(plain, tmp_path / "vlm"))
            factors = load_file(plain / "adapter_model.safetensors")
            renamed = {name.replace(".model.layers", ".model.language_model.layers"): t for name, t in factors.items()}
            save_file(renamed, adapter / "adapter_model.safetensors")
        ours = open_checkpoint(f"{other}+{adapter}", ctx)
        for name in expected.tensors:
            assert np.array_equal(ours.read(name.replace("model.", prefix, 1)), expected.read(name))


def test_an_enlarged_vocabulary(base: Path, tokenizer_dir: Path, tmp_path: Path, ctx: Context) -> None:
    larger = Path(shutil.copytree(base, tmp_path / "larger"))
    resized = _loaded(base)
    resized.resize_token_embeddings(310)
    resized.save_pretrained(larger)
    adapter = _make_adapter(larger, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    shutil.copytree(tokenizer_dir, adapter, dirs_exist_ok=True)
    ours = open_checkpoint(f"{base}+{adapter}", ctx)
    assert ours.config["vocab_size"] == 310
    assert {file.parent for file in ours.sidecars} == {adapter}
    theirs = _peft_merged(larger, adapter)
    for name, tensor in theirs.items():
        assert ours.tensors[name].shape == tensor.shape
        np.testing.assert_allclose(ours.read(name), tensor.numpy(), rtol=0, atol=2e-6, err_msg=name)


def test_an_adapter_of_another_hub_model_is_noted(base: Path, adapter: Path, ctx: Context) -> None:
    notes: list[str] = []

    class Notes(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/another"}))
    lay_over(rename(open_checkpoint(base, ctx), "org/base"), str(adapter), Context(progress=Notes()), ref="both")
    assert notes == [f"{adapter}: says it was trained on org/another; here it is laid over org/base"]
    lay_over(rename(open_checkpoint(base, ctx), "org/another@v1"), str(adapter), Context(progress=Notes()), ref="both")
    assert len(notes) == 1


def rename(model: Checkpoint, ref: str) -> Checkpoint:
    return view(model, {name: name for name in model.tensors}, what={}, ref=ref)


def test_dora_gives_the_same_bits_for_any_range(base: Path, tmp_path: Path, ctx: Context) -> None:
    adapter = _make_adapter(base, tmp_path / "adapter", use_dora=True)
    name = "model.layers.0.mlp.down_proj.weight"
    whole = open_checkpoint(f"{base}+{adapter}", ctx).read_flat(name)
    for start, stop in [(0, 1), (47, 49), (5, 1000), (1535, 1536)]:
        assert np.array_equal(open_checkpoint(f"{base}+{adapter}", ctx).read_flat(name, start, stop), whole[start:stop])
    second = open_checkpoint(f"{base}+{_make_adapter(base, tmp_path / 'first')}+{adapter}", ctx).read(name)
    rows = load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{name[:-7]}.lora_magnitude_vector"]
    np.testing.assert_allclose(np.linalg.norm(second, axis=1), rows.abs().numpy().reshape(-1), rtol=1e-5)
