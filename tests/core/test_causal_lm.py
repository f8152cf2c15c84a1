"""Whole models through transformers: exact loading, canonical names, the same bytes twice."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from solera_core.causal_lm import load_model, load_report, load_tokenizer, save_model
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, DiskFullError, VerificationError
from solera_core.output import check_output
from solera_core.staging import staged

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 8,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_loaded_model_is_ready(siblings: dict[str, Path]) -> None:
    model = load_model(siblings["a"], dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.device.type == "cpu"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_load_and_save_is_the_identity(family: str, tmp_path: Path, make_model: Callable[..., Path]) -> None:
    source = make_model(tmp_path / "source", family=family, **FAMILIES[family])
    (tmp_path / "out").mkdir()
    save_model(load_model(source), tmp_path / "out", like=source, dtype="float32", sidecars_from=source)
    assert set(contents(source)) == set(contents(tmp_path / "out"))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "out/config.json").read_text())
    check_output(tmp_path / "out")


def test_the_same_model_twice_gives_the_same_bytes(tmp_path: Path, siblings: dict[str, Path]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        model = load_model(siblings["a"])
        save_model(model, tmp_path / name, like=None, dtype="bfloat16", sidecars_from=siblings["a"])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_dtype_is_that_asked_for(tmp_path: Path, siblings: dict[str, Path], ctx: Context) -> None:
    model = load_model(siblings["a"])
    save_model(model, tmp_path, like=siblings["a"], dtype="bfloat16", sidecars_from=siblings["a"])
    checkpoint = open_checkpoint(tmp_path, ctx)
    assert {t.dtype for t in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.config["dtype"] == "bfloat16"
    assert model.dtype == torch.float32
    original = load_file(siblings["a"] / "model.safetensors")["lm_head.weight"]
    assert np.array_equal(checkpoint.read("lm_head.weight"), original.bfloat16().float().numpy())


def test_sidecars_are_copied_byte_for_byte(tmp_path: Path, llama: Path) -> None:
    text = (llama / "tokenizer.json").read_text()
    (llama / "tokenizer.json").write_text(text + "\n\n")  # a tokenizer that is saved anew would lose this
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    (llama / "generation_config.json").unlink()
    for like in (None, llama):
        out = tmp_path / f"like-{like is not None}"
        out.mkdir()
        save_model(load_model(llama), out, like=like, dtype="float32", sidecars_from=llama)
        source, found = contents(llama), contents(out)
        assert found.keys() == source.keys()
        assert all(found[name] == source[name] for name in source if name != "config.json")


def test_a_generation_config_that_transformers_would_refuse_to_save(tmp_path: Path, llama: Path) -> None:
    model = load_model(llama)
    generation: Any = model.generation_config
    generation.num_return_sequences = 4
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_model(model, tmp_path / "ours", like=llama, dtype="float32", sidecars_from=llama)
    assert contents(tmp_path / "ours")["generation_config.json"] == contents(llama)["generation_config.json"]
    assert model.generation_config is generation


def test_the_config_of_like_is_kept(tmp_path: Path, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["my_own_note"] = "kept"
    (llama / "config.json").write_text(json.dumps(config))
    model = load_model(llama)
    model.config.use_cache = False  # as training does
    (tmp_path / "out").mkdir()
    save_model(model, tmp_path / "out", like=llama, dtype="bfloat16", sidecars_from=llama)
    written = json.loads((tmp_path / "out/config.json").read_text())
    del config["torch_dtype"]
    assert written == config | {"dtype": "bfloat16"}


def test_another_shape_than_like_is_refused(
    tmp_path: Path, siblings: dict[str, Path], make_model: Callable[..., Path]
) -> None:
    deeper = make_model(tmp_path / "deeper", num_hidden_layers=3)
    wider = make_model(tmp_path / "wider", intermediate_size=40)
    model = load_model(siblings["a"])
    for like, message in [
        (deeper, "absent: model.layers.2."),
        (wider, r"another shape: .* \(32, 48\) \(there \(32, 40\)\)"),
    ]:
        with pytest.raises(VerificationError, match=message), staged(tmp_path / "out") as staging:
            save_model(model, staging, like=like, dtype="float32", sidecars_from=siblings["a"])
    with pytest.raises(VerificationError, match=r"additional: model.layers.2."), staged(tmp_path / "out") as staging:
        save_model(load_model(deeper), staging, like=siblings["a"], dtype="float32", sidecars_from=siblings["a"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [(float("nan"), "float32", "NaN or infinite"), (1e5, "float16", "too large for torch.float16")],
)
def test_bad_values_are_refused(
    value: float, dtype: str, message: str, tmp_path: Path, siblings: dict[str, Path]
) -> None:
    model = load_model(siblings["a"])
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = value
    with pytest.raises(CheckpointError, match=rf"'model\.layers\.1\.mlp\.up_proj\.weight' .*{message}"):
        save_model(model, tmp_path, like=None, dtype=dtype, sidecars_from=siblings["a"])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_stays_recognisable(
    tmp_path: Path, siblings: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors wraps the error of the operating system in its own."""
    from safetensors import SafetensorError

    model = load_model(siblings["a"])

    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(DiskFullError, match="the disk filled up"), staged(tmp_path / "out") as staging:
        save_model(model, staging, like=None, dtype="float32", sidecars_from=siblings["a"])
    assert list(tmp_path.iterdir()) == []


# What cannot be loaded


def test_a_missing_tensor_is_not_invented(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not load it exactly: missing: model\.norm\.weight"):
        load_model(llama)
    assert load_report(llama)["missing"] == ["model.norm.weight"]


def test_remote_code_and_pickles_need_permission(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(tensors, llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        load_model(llama)
    loaded = load_model(llama, allow_pickle=True)
    assert torch.equal(loaded.get_parameter("model.norm.weight"), tensors["model.norm.weight"])
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    with pytest.raises(CheckpointError, match="auto_map"):
        load_model(llama, allow_pickle=True)


@pytest.mark.parametrize("change", [{"model_type": "tomorrow"}, {"model_type": "vit"}, {"num_attention_heads": 5}])
def test_what_transformers_cannot_load(change: dict[str, Any], llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=r"transformers (cannot load it|does not load it exactly)"):
        load_model(llama)


def test_an_unknown_dtype(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype 'float31' is not known"):
        load_model(llama, dtype="float31")


def test_the_tokenizer(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    assert tokenizer.decode(tokenizer("seven times six").input_ids, skip_special_tokens=True) == "seven times six"


def test_no_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer \(none of tokenizer.json, .*copy the tokenizer files"):
        load_tokenizer(llama)


def test_a_damaged_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"the tokenizer \(tokenizer.json\) cannot be loaded"):
        load_tokenizer(llama)


def test_a_tokenizer_with_code_of_its_own(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_x.MyTokenizer", None]}}
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    (llama / "tokenization_x.py").write_text("open('code-has-run', 'w').close()")
    with pytest.raises(CheckpointError, match=r"(?s)cannot be loaded.*trust_remote_code"):
        load_tokenizer(llama)
    assert not (tmp_path / "code-has-run").exists()


def test_nothing_is_printed(tmp_path: Path, siblings: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(siblings["a"])
    load_report(siblings["a"])
    save_model(model, tmp_path, like=None, dtype="float32", sidecars_from=siblings["a"])
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_the_verbosity_of_transformers_is_given_back(siblings: dict[str, Path]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_report(siblings["a"])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_weights_are_as_readable_as_the_other_files(tmp_path: Path, llama: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_model(load_model(llama), out, like=llama, dtype="float32", sidecars_from=llama)
    modes = {file.name: file.stat().st_mode & 0o777 for file in out.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
