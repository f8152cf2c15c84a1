"""Every kind of bad input: an error that names file and tensor or key, and nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, InputError, TargetError
from solera_merge.config import MergeConfig
from solera_merge.plan import make_plan
from solera_merge.run import merge, plan_merge

Recipe = Callable[..., MergeConfig]
Siblings = dict[str, Path]
TASK: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 1}}
LINEAR: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1}}
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def damaged(siblings: Siblings, tmp_path: Path) -> Path:
    """A copy of model `a` to be damaged."""
    return Path(shutil.copytree(siblings["a"], tmp_path / "damaged"))


@pytest.fixture
def refused(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> Callable[..., str]:
    """Merge and expect a refusal: returns its message, after looking that no output and no staging is left."""

    def run(kind: type[InputError], *, planned: bool = True, ctx: Context | None = None, **content: Any) -> str:
        ctx = ctx or Context(models=siblings, base_dir=tmp_path)
        config = recipe(**content)
        parent = tmp_path / "outputs"
        with pytest.raises(kind) as caught:
            merge(config, parent / "out", ctx)
        assert not parent.exists() or list(parent.iterdir()) == []
        if planned:  # the dry run says the same, before a weight is read
            with pytest.raises(kind) as again:
                plan_merge(config, ctx)
            assert str(again.value) == str(caught.value)
        return str(caught.value)

    return run


Refused = Callable[..., str]


def edit_config(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("content", [LINEAR | {"models": ["b", "damaged"]}, TASK | {"models": ["b", "damaged"]}])
def test_not_finite_in_an_input(refused: Refused, damaged: Path, content: dict[str, Any], value: float) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[LAYER][7, 3] = value

    edit_weights(damaged, spoil)
    message = refused(CheckpointError, planned=False, **content)
    assert str(damaged / "model.safetensors") in message
    assert f"{LAYER!r} (48, 32) of model 'damaged' holds {value} at (7, 3)" in message


@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp", "passthrough"])
def test_not_finite_in_the_base_or_in_a_pass_over_all(refused: Refused, damaged: Path, method: str) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][0] = np.nan

    edit_weights(damaged, spoil)
    parameters = {"slerp": {"t": 0.5}, "passthrough": {}}.get(method, {"weight": 1, "density": 0.5})
    models = ["damaged"] if method == "passthrough" else ["b"]
    base = {} if method == "passthrough" else {"base_model": "damaged"}
    message = refused(CheckpointError, planned=False, merge_method=method, models=models, parameters=parameters, **base)
    assert "'model.norm.weight' (32,) of model 'damaged' holds nan at (0,)" in message


def test_overflow_of_the_output_format(refused: Refused, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    bare_model(tmp_path / "x", {"w": np.full(4, 60000.0)})
    bare_model(tmp_path / "y", {"w": np.full(4, 60000.0)})
    content = LINEAR | {"models": ["x", "y"], "dtype": "float16", "parameters": {"weight": 1, "normalize": False}}
    message = refused(CheckpointError, planned=False, **content)
    assert "'w': 4 values are too large for F16" in message


def test_truncated_shard(refused: Refused, damaged: Path) -> None:
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file}: truncated" in refused(CheckpointError, **LINEAR, models=["b", "damaged"])


def test_missing_model(refused: Refused) -> None:
    message = refused(CheckpointError, **LINEAR, models=["a", "nowhere", "neither"])
    assert "'nowhere' not found" in message
    assert "'neither' not found" in message  # all of them at once


def test_not_a_checkpoint(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: not a checkpoint" in refused(CheckpointError, **LINEAR, models=["a", "empty"])


def test_tensor_missing_in_one_model_and_extra_in_another(refused: Refused, damaged: Path, siblings: Siblings) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.self_attn.q_norm.weight"] = tensors.pop(LAYER)

    edit_weights(damaged, rename)
    message = refused(CheckpointError, **LINEAR, models=["b", "damaged"])
    assert f"{damaged}: has no tensor {LAYER!r}, which {siblings['b'] / 'model.safetensors'} has" in message
    extra = "'model.layers.1.self_attn.q_norm.weight'"
    assert f"{siblings['b']}: has no tensor {extra}, which {damaged / 'model.safetensors'} has" in message


def test_shape_mismatch(refused: Refused, damaged: Path, siblings: Siblings) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        tensors[LAYER] = tensors[LAYER][:40].copy()

    edit_weights(damaged, cut)
    message = refused(CheckpointError, **TASK, models=["b", "damaged"])
    assert f"{siblings['b'] / 'model.safetensors'}: {LAYER!r} is (48, 32)" in message
    assert f"{damaged / 'model.safetensors'}: {LAYER!r} is (40, 32)" in message


def test_vocabulary_sizes(refused: Refused, make_model: Callable[..., Path], tmp_path: Path) -> None:
    make_model(tmp_path / "larger", vocab_size=320)
    message = refused(CheckpointError, **LINEAR, models=["a", "larger"])
    assert "'model.embed_tokens.weight' is (304, 32)" in message
    assert (
        "'model.embed_tokens.weight' is (320, 32): the vocabularies of 'a' and 'larger' have different sizes" in message
    )


def test_another_vocabulary_of_equal_size(refused: Refused, damaged: Path) -> None:
    file = damaged / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {t: 299 - i for t, i in content["model"]["vocab"].items()}
    file.write_text(json.dumps(content))
    message = refused(CheckpointError, **LINEAR, models=["b", "damaged"])
    assert str(file) in message
    assert "of 300 token ids mean different tokens" in message


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"type": "BPE", "vocab": 3}}'])
@pytest.mark.parametrize("models", [["damaged", "b"], ["b", "damaged"], ["damaged"]])
def test_a_tokenizer_that_cannot_be_read(refused: Refused, damaged: Path, models: list[str], text: str) -> None:
    """Of the model whose tokenizer the output gets, and of one whose tokens are compared with it."""
    (damaged / "tokenizer.json").write_text(text)
    assert f"{damaged / 'tokenizer.json'}: " in refused(CheckpointError, **LINEAR, models=models)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_a_file_beside_the_tokenizer_that_cannot_be_read(refused: Refused, damaged: Path, name: str) -> None:
    (damaged / name).write_text("{")
    assert f"{damaged / name}: cannot be read" in refused(CheckpointError, **LINEAR, models=["damaged", "b"])


def test_the_tokenizers_owner_has_none(refused: Refused, damaged: Path) -> None:
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    message = refused(ConfigError, **LINEAR, models=["damaged", "b", "c"])
    assert f"tokenizer_source: 'damaged' ({damaged})" in message
    assert "set `tokenizer_source: b` (or one of c)" in message
    refused(ConfigError, **LINEAR, models=["b", "damaged"], tokenizer_source="damaged")
    refused(ConfigError, **(TASK | {"base_model": "damaged"}), models=["b", "c"])


def test_slices_from_models_of_other_vocabularies(
    refused: Refused, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    make_model(tmp_path / "larger", vocab_size=320)
    slices = [{"sources": [{"model": m, "layer_range": [0, 1]}]} for m in ("a", "larger")]
    message = refused(CheckpointError, merge_method="passthrough", slices=slices)
    assert "vocab_size is 304, but 'lm_head.weight' of 'larger' is (320, 32)" in message


def test_different_architectures(refused: Refused, make_model: Callable[..., Path], tmp_path: Path) -> None:
    make_model(tmp_path / "other", family="mistral", sliding_window=None)
    message = refused(CheckpointError, **LINEAR, models=["a", "other"])
    assert "different architectures: LlamaForCausalLM (llama) and MistralForCausalLM (mistral)" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 2}, "`num_attention_heads` is 4 and 2"),
        ({"hidden_act": "gelu"}, "`hidden_act` is 'silu' and 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        (
            {"quantization_config": {"quant_method": "aqlm"}},
            "`quantization_config` says that the weights are quantised (aqlm)",
        ),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map"),
    ],
)
def test_configs_that_do_not_fit(refused: Refused, damaged: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(damaged, **changes)
    message = refused(CheckpointError, **LINEAR, models=["b", "damaged"])
    assert words in message
    assert str(damaged) in message


def test_tied_and_untied(refused: Refused, make_model: Callable[..., Path], tmp_path: Path) -> None:
    make_model(tmp_path / "tied", tie_word_embeddings=True)
    message = refused(CheckpointError, **LINEAR, models=["a", "tied"])
    assert "tie_word_embeddings is False and True" in message


def test_tied_without_a_word_in_the_config(refused: Refused, damaged: Path, siblings: Siblings) -> None:
    file = damaged / "config.json"
    content = json.loads(file.read_text())
    del content["tie_word_embeddings"]
    file.write_text(json.dumps(content))
    edit_weights(damaged, lambda tensors: tensors.pop("lm_head.weight"))
    message = refused(CheckpointError, **LINEAR, models=["b", "damaged"])
    assert f"{damaged}: has no tensor 'lm_head.weight' (its head is tied to the embedding), which" in message


def test_different_numbers_of_layers(refused: Refused, make_model: Callable[..., Path], tmp_path: Path) -> None:
    make_model(tmp_path / "deeper", num_hidden_layers=3)
    message = refused(CheckpointError, **LINEAR, models=["a", "deeper"])
    assert "different numbers of layers: 2 and 3; choose equally many with `slices`" in message


def test_layers_of_different_sizes_cannot_be_stacked(
    refused: Refused, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    make_model(tmp_path / "wider", intermediate_size=64)
    slices = [{"sources": [{"model": m, "layer_range": [0, 1]}]} for m in ("a", "wider")]
    message = refused(CheckpointError, merge_method="passthrough", slices=slices)
    assert "`intermediate_size` is 48 and 64" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [1, 3]}]}]},
            "slices.0.sources.0.layer_range: 'a' has 2 layers, and [1, 3] reaches beyond them",
        ),
        (
            LINEAR
            | {"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 1]}]}]},
            "slices.0.sources: 2 and 1 layers; all sources must have equally many",
        ),
        (TASK | {"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}, "needs the base 'base' here too"),
        (LINEAR | {"models": ["a", "b"], "parameters": {"weight": 0}}, "all weights of"),
        (
            LINEAR
            | {
                "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": -1}}],
                "parameters": {},
            },
            "sum to 0, and normalize divides by their sum",
        ),
        (
            LINEAR
            | {
                "models": ["a", {"model": "b", "parameters": {"weight": [{"filter": "lm_head", "value": -1}]}}],
            },
            "the weights of 'lm_head.weight' sum to 0",
        ),
        (
            {
                "merge_method": "ties",
                "base_model": "base",
                "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": -1}}],
            },
            "sum to 0, and normalize divides by their sum",
        ),
        (TASK | {"models": ["a"], "parameters": {"weight": 0}}, "the result would be the base itself"),
        (LINEAR | {"models": ["a", "a"]}, "models: 'a': the same model twice"),
        (TASK | {"models": ["a", "b"], "base_model": None}, "base_model: task_arithmetic needs one"),
        (TASK | {"models": ["base"]}, "only the base is listed"),
        (
            {"merge_method": "slerp", "base_model": "base", "models": ["a", "b"], "parameters": {"t": 0.5}},
            "slerp needs exactly 1 model besides the base; 2 found: 'a', 'b'",
        ),
        ({"merge_method": "slerp", "base_model": "a", "models": ["a", "b"]}, "slerp needs `t`"),
        ({"merge_method": "passthrough", "models": ["a", "b"]}, "passthrough needs exactly 1 model; 2 found"),
        (
            LINEAR | {"models": ["a", "b"], "base_model": "base"},
            "base_model: linear has no base; list 'base' under `models`",
        ),
        (
            {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}, "b"]},
            "needs `weight` for 'b'",
        ),
        (
            LINEAR | {"models": ["a", "b"], "parameters": {"weight": [{"filter": "self_attn", "value": 1}]}},
            "needs `weight` for 'a' (for ",
        ),
        (
            LINEAR
            | {"models": ["a", "b"], "parameters": {"weight": [{"filter": "self_atn", "value": 1}, {"value": 1}]}},
            "filter 'self_atn' matches no tensor (did you mean 'self_attn'?)",
        ),
        (
            TASK | {"models": [{"model": "base", "parameters": {"weight": 0.5}}, "a"]},
            "models.0.parameters: 'weight' has no effect on the base",
        ),
        (LINEAR | {"models": ["a", "b"], "tokenizer_source": "d"}, "tokenizer_source: 'd' is none of the models"),
    ],
)
def test_recipes_that_make_no_sense(refused: Refused, content: dict[str, Any], words: str) -> None:
    assert words in refused(ConfigError, **content)


def test_a_gradient_between_whole_numbers(refused: Refused, make_model: Callable[..., Path], tmp_path: Path) -> None:
    models = [str(make_model(tmp_path / name, num_hidden_layers=3, seed=i)) for i, name in enumerate("xy")]
    error = refused(ConfigError, merge_method="karcher", models=models, parameters={"max_iter": [1, 2]})
    assert "parameters.max_iter: a gradient from 1 to 2 gives 1.5, no whole number (for 'model.layers.1." in error


def test_the_same_model_by_another_name(refused: Refused, siblings: Siblings, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(siblings["a"])
    message = refused(ConfigError, **LINEAR, models=["a", "link"])
    assert "models: 'a' and 'link': the same model twice" in message


def test_pickled_weights_without_the_flag(refused: Refused, damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    assert "pass --allow-pickle" in refused(CheckpointError, **LINEAR, models=["b", "damaged"])


def test_integer_tables_that_differ(refused: Refused, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    bare_model(tmp_path / "x", {"w": np.ones(4), "table": np.arange(5)})
    bare_model(tmp_path / "y", {"w": np.ones(4), "table": np.arange(5) + 1})
    message = refused(CheckpointError, planned=False, **LINEAR, models=["x", "y"])
    assert "tensor 'table' (I64) is not floating-point and differs" in message


def test_codes_without_a_quantisation_config(refused: Refused, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for name in ("x", "y"):
        bare_model(tmp_path / name, {"w": np.ones((4, 4))})
        tensors = {"w": torch.ones(4, 4).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    message = refused(CheckpointError, **LINEAR, models=["x", "y"], dtype="bfloat16")
    assert "'w_scale_inv' F32 (1,): belongs to a quantised weight, but config.json has no" in message


def test_double_precision_needs_a_word(refused: Refused, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    bare_model(tmp_path / "x", {"w": np.ones(4)}, "F64")
    bare_model(tmp_path / "y", {"w": np.ones(4)}, "F64")
    assert "'w' is stored as F64" in refused(ConfigError, **LINEAR, models=["x", "y"])


def test_target_exists(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(TargetError, match="exists and is not empty"):
        merge(recipe(**LINEAR, models=["a", "b"]), out, Context(models=siblings))
    assert [f.name for f in out.iterdir()] == ["precious.txt"]


def test_overwrite_replaces_a_finished_merge(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> None:
    config = recipe(**LINEAR, models=["a", "b"])
    out = merge(config, tmp_path / "out", Context(models=siblings))
    (out / "stale-shard.safetensors").write_bytes(b"")
    merge(config, out, Context(models=siblings, overwrite=True))
    assert not (out / "stale-shard.safetensors").exists()


def test_failing_threads_stop_each_other(recipe: Recipe, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    """Of many tensors all are bad: one error comes out, and no thread hangs."""
    tensors = {f"w{i}": np.ones(100) for i in range(50)}
    bare_model(tmp_path / "x", tensors)
    bare_model(tmp_path / "y", tensors)
    file = tmp_path / "y" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: -4 * 100 * 50] + np.full(100 * 50, np.nan, np.float32).tobytes())
    config = recipe(**LINEAR, models=["x", "y"])
    with pytest.raises(CheckpointError, match=r"tensor 'w\d+' \(100,\) of model 'y' holds nan at \(0,\)"):
        merge(config, tmp_path / "out", Context(base_dir=tmp_path, threads=4))


def test_config_is_not_changed(recipe: Recipe, siblings: Siblings) -> None:
    config = recipe(**TASK, models=["a", "b"])
    before = config.model_dump_json()
    make_plan(config, Context(models=siblings))
    assert config.model_dump_json() == before


def edit_tensors(path: Path, part: str, value: Any) -> None:
    """Replace the tensors with `part` in their name."""
    edit_weights(path, lambda tensors: tensors.update({name: value for name in tensors if part in name}))


def test_every_problem_of_every_phase_is_said_at_once(refused: Refused, damaged: Path) -> None:
    """Heads, shapes, a tensor that is missing, a filter, a weight and a tokenizer: one run, all of them."""
    edit_config(damaged, num_attention_heads=2)
    edit_tensors(damaged, "up_proj", np.ones((7, 32), np.float32))
    edit_weights(damaged, lambda tensors: tensors.pop("model.norm.weight"))
    message = refused(
        CheckpointError,
        **LINEAR | {"parameters": {"weight": [{"filter": "self_atn", "value": 1}, {"filter": "mlp", "value": 1}]}},
        models=["b", "damaged"],
        tokenizer_source="d",
    )
    for words in (
        "`num_attention_heads` is 4 and 2",
        "'model.layers.0.mlp.up_proj.weight' is (48, 32)",
        "is (7, 32): shapes differ (and those of 1 more tensors)",
        "has no tensor 'model.norm.weight', which",
        "filter 'self_atn' matches no tensor",
        "linear needs `weight` for 'b' (for ",
        "tokenizer_source: 'd' is none of the models",
    ):
        assert words in message
    assert len(message.splitlines()) == 7  # `weight` is missing for both models


def test_models_that_are_missing_do_not_hide_what_is_wrong_with_the_others(refused: Refused, damaged: Path) -> None:
    edit_config(damaged, hidden_act="gelu")
    message = refused(
        CheckpointError,
        **LINEAR | {"parameters": {"weight": [{"filter": "self_atn", "value": 1}]}},
        models=["none", "b", "nowhere", "damaged"],
    )
    for words in ("'none' not found", "'nowhere' not found", "`hidden_act` is", "filter 'self_atn' matches no tensor"):
        assert words in message
