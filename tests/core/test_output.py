"""The last steps of every stage: what is written is read back, and whatever does not add up is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, VerificationError
from solera_core.output import check_output, write_metadata
from solera_core.writer import CheckpointWriter, TensorSpec

MOE: dict[str, Any] = {"num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {},
    "mixtral": {**MOE, "num_local_experts": 4},
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "qwen3, tied": {"head_dim": 8, "tie_word_embeddings": True},
    "qwen2_moe": {**MOE, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**MOE, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {**MOE, "num_experts": 4},
}


def copy(source: Path, target: Path) -> Path:
    """Copy a checkpoint through our own reader and writer, as a stage does."""
    checkpoint = open_checkpoint(source, Context())
    target.mkdir()
    with CheckpointWriter(
        target, [TensorSpec(t.name, t.dtype, t.shape) for t in checkpoint.tensors.values()]
    ) as writer:
        for name in checkpoint.tensors:
            writer.write_flat(name, 0, checkpoint.read_flat(name))
        writer.finish()
    write_metadata(target, config=checkpoint.config, sidecars=checkpoint.sidecars)
    return target


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_copy_of_every_family_passes(kind: str, tmp_path: Path, make_model: Callable[..., Path]) -> None:
    family = kind.split(",")[0]
    source = make_model(tmp_path / "source", family=family, **FAMILIES[kind])
    checks = check_output(copy(source, tmp_path / "copy"))
    assert checks["transformers"] == {"mismatched": [], "missing": [], "unexpected": []}
    assert checks["layers"] == 2
    assert checks["vocab_size"] == 304
    assert checks["tied"] is ("tied" in kind)
    assert checks["tensors"] == len(load_file(source / "model.safetensors"))
    names = {p.name: p.read_bytes() for p in source.iterdir() if "model" not in p.name and p.name != "config.json"}
    assert {n: (tmp_path / "copy" / n).read_bytes() for n in names} == names
    assert json.loads((tmp_path / "copy/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_mixtral_is_read_with_the_names_on_disk(tmp_path: Path, make_model: Callable[..., Path], ctx: Context) -> None:
    source = make_model(tmp_path / "m", family="mixtral", **FAMILIES["mixtral"])
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in open_checkpoint(source, ctx).tensors


def test_the_config_is_written_as_transformers_writes_it(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "out").mkdir()
    write_metadata(tmp_path / "out", config=config, sidecars=[])
    assert (tmp_path / "out/config.json").read_bytes() == (llama / "config.json").read_bytes()


def test_template_folders_keep_their_name(llama: Path, tmp_path: Path) -> None:
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tool.jinja").write_text("x")
    (tmp_path / "out").mkdir()
    write_metadata(tmp_path / "out", config={}, sidecars=open_checkpoint(llama, Context()).sidecars)
    assert (tmp_path / "out/additional_chat_templates/tool.jinja").read_text() == "x"


# What does not add up. Each damage is found twice: by our own look at config and names, and by transformers.

Damage = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def _more_rows(name: str) -> Damage:
    return lambda config, tensors: tensors.update({name: torch.zeros(310, 32)})


def _drop_layer(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if n.startswith("model.layers.1.")]:
        del tensors[name]


def _shift_layer(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if n.startswith("model.layers.1.")]:
        tensors[name.replace("layers.1.", "layers.2.")] = tensors.pop(name)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "too many layers": (
        lambda c, t: c.update(num_hidden_layers=1),
        r"says num_hidden_layers 1, but the weights hold 2 layers.*too many: \[1\]",
    ),
    "too few layers": (
        lambda c, t: c.update(num_hidden_layers=3),
        r"num_hidden_layers 3, .* 2 layers under model.layers .*absent: \[2\]",
    ),
    "a dropped layer": (_drop_layer, r"num_hidden_layers 2, .* 1 layers .*absent: \[1\]"),
    "a gap": (_shift_layer, r"absent: \[1\]"),
    "layer types": (lambda c, t: c.update(layer_types=["full_attention"] * 3), "layer_types has 3 entries"),
    "vocabulary": (lambda c, t: c.update(vocab_size=300), r"vocab_size 300, but tensor '.*' has shape \(304, 32\)"),
    "embedding rows": (_more_rows("model.embed_tokens.weight"), r"'model.embed_tokens.weight' has shape \(310, 32\)"),
    "head rows": (_more_rows("lm_head.weight"), r"'lm_head.weight' has shape \(310, 32\)"),
    "tied with a head": (
        lambda c, t: c.update(tie_word_embeddings=True),
        "ties the embeddings .*, yet 'lm_head.weight' is stored",
    ),
    "untied without a head": (lambda c, t: t.pop("lm_head.weight"), "tie_word_embeddings false, yet no output head"),
}


def damaged(model: Path, change: Damage) -> Path:
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    change(config, tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("kind", DAMAGES)
def test_config_against_tensors(kind: str, llama: Path) -> None:
    change, message = DAMAGES[kind]
    with pytest.raises(VerificationError, match=message) as caught:
        check_output(damaged(llama, change), reload=False)
    assert str(llama) in str(caught.value)


def test_a_family_that_ties_without_saying_so(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """Gemma's configs often leave the flag out; a head beside the embedding would only double the size."""
    model = make_model(tmp_path / "m", family="gemma", head_dim=8, tie_word_embeddings=True)

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config.pop("tie_word_embeddings", None)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert check_output(model)["tied"] is True
    damaged(model, change)
    assert "lm_head.weight" not in open_checkpoint(model, Context()).tensors
    with pytest.raises(
        VerificationError, match=r"ties the embeddings .*its default for 'gemma'.*'lm_head.weight' is stored"
    ):
        check_output(model)


RELOADS: dict[str, tuple[Damage, str]] = {
    "missing": (
        lambda c, t: t.pop("model.layers.0.mlp.up_proj.weight"),
        r"missing model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    "unexpected": (
        lambda c, t: t.update({"model.layers.0.mlp.extra": torch.zeros(1)}),
        r"unexpected model\.layers\.0\.mlp\.extra",
    ),
    "mismatched": (
        lambda c, t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(47, 32)}),
        r"mismatched model\.layers\.0\.mlp\.up_proj\.weight \(47, 32\) \(expected \(48, 32\)\)",
    ),
    "another family": (
        lambda c, t: c.update(model_type="qwen3", architectures=["Qwen3ForCausalLM"]),
        "missing .*q_norm",
    ),
    "an unknown family": (lambda c, t: c.update(model_type="tomorrow"), "cannot load what was written.*tomorrow"),
}


@pytest.mark.parametrize("kind", RELOADS)
def test_transformers_must_agree(kind: str, llama: Path) -> None:
    change, message = RELOADS[kind]
    damaged(llama, change)
    check_output(llama, reload=False)
    with pytest.raises(VerificationError, match=message):
        check_output(llama)


def test_a_missing_expert_is_found(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    model = make_model(tmp_path / "m", family="mixtral", **FAMILIES["mixtral"])
    damaged(model, lambda c, t: t.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"))
    with pytest.raises(VerificationError):
        check_output(model)


def test_a_damaged_file_is_found(llama: Path) -> None:
    with (llama / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match="1 bytes behind the last tensor"):
        check_output(llama)


def test_a_classifier_is_loaded_as_what_it_is(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    classifier: Any = LlamaForSequenceClassification
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=None,
    )
    classifier(config).save_pretrained(tmp_path / "m")
    assert check_output(tmp_path / "m")["transformers"]["missing"] == []


def test_checking_reads_headers_only(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The data may even be a hole: nothing of it is needed."""
    shutil.copy(llama / "model.safetensors", tmp_path / "whole")
    header = int.from_bytes((tmp_path / "whole").read_bytes()[:8], "little") + 8
    content = (tmp_path / "whole").read_bytes()
    with (llama / "model.safetensors").open("wb") as stream:
        stream.write(content[:header])
        stream.truncate(len(content))
    assert check_output(llama)["tensors"] == 21
