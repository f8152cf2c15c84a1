"""Reading dense checkpoints: every field resolved or refused, every tensor accounted for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_merge.moe.dense import Dense, read_dense
from solera_merge.moe.families import ARCHITECTURES, DEFAULTS, PLAIN


def read(path: Path) -> Dense:
    return read_dense("trunk", open_checkpoint(path, Context()))


@pytest.fixture
def edited(tmp_path: Path, siblings: dict[str, Path]) -> Callable[..., Path]:
    """`edited(config={...}, remove=[...], tensors={name: array or None})`: a copy of the base, changed."""

    def make(
        config: dict[str, Any] | None = None,
        remove: tuple[str, ...] = (),
        tensors: dict[str, np.ndarray | None] | None = None,
    ) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(siblings["base"], path)
        content = json.loads((path / "config.json").read_text())
        for key in remove:
            del content[key]
        (path / "config.json").write_text(json.dumps(content | (config or {})))
        if tensors:
            weights: dict[str, np.ndarray] = load_file(path / "model.safetensors")
            for name, value in tensors.items():
                if value is None:
                    del weights[name]
                else:
                    weights[name] = value
            save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


@pytest.mark.parametrize("family", list(DEFAULTS))
def test_defaults_are_those_of_transformers(family: str) -> None:
    import dataclasses

    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = type(AutoConfig.for_model(family))
    theirs = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    for field, value in DEFAULTS[family].items():
        assert theirs[field] == value, field
    # and no field of the family is unknown to us: a later version that adds one shows here
    common = {f.name for f in dataclasses.fields(AutoConfig.for_model("gpt2").__class__.__mro__[1])}
    handled = {"rope_parameters", "pretraining_tp", "layer_types", "original_max_position_embeddings"}
    assert theirs.keys() - common - DEFAULTS[family].keys() - handled == set()
    assert config.default_theta == 10_000.0
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] == ARCHITECTURES[family]


def test_a_sparse_config_is_resolved_as_transformers_resolves_it(edited: Callable[..., Path]) -> None:
    from transformers import AutoConfig

    removed = ("rope_parameters", "rms_norm_eps", "head_dim", "hidden_act", "attention_dropout", "initializer_range")
    path = edited(remove=removed)
    fields, theirs = read(path).fields, AutoConfig.from_pretrained(path)
    for field in fields.keys() - PLAIN.keys():
        assert fields[field] == getattr(theirs, field), field


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0},
        {"rope_theta": 5000.0, "rope_scaling": None},
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 7.0}},
        # both spellings, as solera writes them
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    ],
)
def test_every_spelling_of_rope_is_read_as_transformers_reads_it(
    edited: Callable[..., Path], rope: dict[str, Any]
) -> None:
    from transformers import AutoConfig

    path = edited(config=rope, remove=("rope_parameters",))
    ours = read(path).fields["rope_parameters"]
    theirs = {k: v for k, v in AutoConfig.from_pretrained(path).rope_parameters.items() if k != "type"}
    assert ours == theirs


@pytest.mark.parametrize(
    "config, message",
    [
        ({"attention_bias": True}, "self_attn.q_proj.bias is missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*unquantised"),
        ({"logit_softcap": 30.0}, "logit_softcap: no home in any MoE format.*remove it from config.json"),
        ({"one_thing": 1, "other_thing": 2}, "one_thing, other_thing: no home"),
        ({"sliding_window": 64}, "sliding_window is 64, which LlamaForCausalLM ignores"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types mixes"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "rope_type 'spiral' is not one of"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by layer"),
        ({"rope_theta": 5.0}, "rope_theta of the rotary embedding is given twice, as 10000.0 and as 5.0"),
        ({"model_type": "gemma2"}, "attn_logit_softcapping .*four norms.*solera route.*llama, mistral"),
        ({"model_type": "gemma3_text"}, "layer_types .*four norms.*solera route"),
        ({"model_type": "strange"}, "model_type 'strange' is none of the families.*solera route"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected .'LlamaForCausalLM'.: a causal LM"),
        ({"hidden_size": 48}, r"embed_tokens.weight has shape \(304, 32\), but config.json makes it \(304, 48\)"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.*is missing"),
        ({"num_hidden_layers": 1}, "tensor model.layers.1.* and 8 more is none of those that config.json promises"),
    ],
)
def test_what_has_no_home_is_refused_by_name(edited: Callable[..., Path], config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(edited(config=config))


def test_an_unknown_tensor_is_refused_and_a_derived_one_is_not(edited: Callable[..., Path]) -> None:
    path = edited(
        tensors={
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
            "model.layers.1.self_attn.q_proj.bias": np.ones(32, np.float32),
        }
    )
    with pytest.raises(CheckpointError, match=r"tensor model.layers.1.self_attn.q_proj.bias is none.*attention_bias"):
        read(path)


def test_old_rotary_buffers_are_no_obstacle(edited: Callable[..., Path]) -> None:
    assert read(edited(tensors={"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))


def test_integers_are_refused(edited: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"norm\.weight is stored as I32; dequantise"):
        read(edited(tensors={"model.norm.weight": np.ones(32, np.int32)}))


def test_a_missing_tensor_is_named(edited: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"tensor model.layers.1.mlp.up_proj.weight is missing.*\(48, 32\)"):
        read(edited(tensors={"model.layers.1.mlp.up_proj.weight": None}))
