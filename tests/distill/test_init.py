"""A model out of nothing: tokenizer, weights, refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from solera_core.context import Context
from solera_core.errors import ConfigError, DataError
from solera_core.output import verify
from solera_core.strict import parse
from solera_distill.config import InitConfig, TuneConfig
from solera_distill.run import init, plan_init, tune

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
RECIPE: dict[str, Any] = {"config": SHAPE, "tokenizer": {"data": ["math.jsonl", "code.jsonl"], "vocab_size": 290}}


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def test_a_model_that_can_be_trained(tmp_path: Path, ctx: Context, small: dict[str, Any]) -> None:
    from solera_core.causal_lm import load_model, load_tokenizer

    init(parse(InitConfig, RECIPE, where="r"), tmp_path / "new", ctx)
    assert verify(tmp_path / "new") == []
    tokenizer: Any = load_tokenizer(tmp_path / "new")
    text = "Ünï 12 + 345 = 357\n\tdef f(a):"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids[1:]) == text
    assert len(tokenizer("345").input_ids) == 4  # BOS and three digits
    model: Any = load_model(tmp_path / "new")
    assert model.config.vocab_size == len(tokenizer) <= 290
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    here = dataclasses.replace(ctx, models={"new": tmp_path / "new"})
    tune(parse(TuneConfig, {"model": "new", "data": "math.jsonl", **small}, where="r"), tmp_path / "tuned", here)
    rows = [json.loads(line) for line in (tmp_path / "tuned" / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2


def test_same_seed_same_bytes(tmp_path: Path, ctx: Context) -> None:
    for name in ("one", "two"):
        init(parse(InitConfig, RECIPE, where="r"), tmp_path / name, ctx)
    init(parse(InitConfig, RECIPE, where="r"), tmp_path / "other", dataclasses.replace(ctx, seed=9))
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one["tokenizer.json"] == other["tokenizer.json"]
    assert one["model.safetensors"] != other["model.safetensors"]


def test_chat_markers_are_single_tokens(tmp_path: Path, ctx: Context) -> None:
    from solera_core.causal_lm import load_tokenizer

    tokenizer_recipe = {
        **RECIPE["tokenizer"],
        "special_tokens": ["<|user|>"],
        "chat_template": "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}",
    }
    init(parse(InitConfig, {**RECIPE, "tokenizer": tokenizer_recipe}, where="r"), tmp_path / "new", ctx)
    tokenizer: Any = load_tokenizer(tmp_path / "new")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "<|user|>a"
    assert tokenizer(text, add_special_tokens=False).input_ids[0] == 2


def test_other_architectures_and_dtypes(tmp_path: Path, ctx: Context) -> None:
    config = {**SHAPE, "num_local_experts": 2, "num_experts_per_tok": 1}
    recipe = {**RECIPE, "architecture": "mixtral", "config": config, "dtype": "bfloat16"}
    init(parse(InitConfig, recipe, where="r"), tmp_path / "moe", ctx)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"
    plan = plan_init(parse(InitConfig, recipe, where="r"), ctx)
    assert plan.writes[0]["bytes"] == 2 * plan.parameters["parameters"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architecture": "lama"}, "architecture: 'lama' is not known.*did you mean 'llama'"),
        ({"architecture": "clip"}, "no causal language model"),
        ({"config": {**SHAPE, "hiden_size": 8}}, "config.hiden_size: .*did you mean 'hidden_size'"),
        ({"config": {**SHAPE, "bos_token_id": 3}}, "bos_token_id: is decided"),
        ({"config": {**SHAPE, "vocab_size": 100}}, "100 rows are fewer"),
        ({"config": {**SHAPE, "num_attention_heads": 3}}, "config"),
        ({"config": {**SHAPE, "hidden_size": "wide"}}, "config"),
        ({"tokenizer": {**RECIPE["tokenizer"], "special_tokens": ["<s>"]}}, "special_tokens"),
        ({"tokenizer": {**RECIPE["tokenizer"], "vocab_size": 258, "special_tokens": ["<x>"]}}, "no room"),
    ],
)
def test_refusals(tmp_path: Path, ctx: Context, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        init(parse(InitConfig, {**RECIPE, **change}, where="r"), tmp_path / "new", ctx)
    assert list(tmp_path.iterdir()) == []


def test_missing_text(tmp_path: Path, ctx: Context) -> None:
    with pytest.raises(DataError, match="nowhere"):
        init(parse(InitConfig, {**RECIPE, "tokenizer": {"data": "nowhere.txt"}}, where="r"), tmp_path / "new", ctx)
    assert list(tmp_path.iterdir()) == []
