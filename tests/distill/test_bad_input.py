"""Bad input: a clear error, and nothing left behind."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, DataError, ResourceError, SoleraError, TargetError
from solera_core.strict import parse
from solera_distill.config import DistillConfig, TuneConfig
from solera_distill.run import distill, plan_tune, tune


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A target that must not exist afterwards, nor anything beside it."""
    folder = tmp_path / "target"
    folder.mkdir()
    yield folder / "out"
    assert list(folder.iterdir()) == []


def refused(kind: type[SoleraError], message: str, recipe: dict[str, Any], out: Path, ctx: Context) -> None:
    def run() -> None:
        if "teachers" in recipe:
            distill(parse(DistillConfig, recipe, where="r"), out, ctx)
        else:
            tune(parse(TuneConfig, recipe, where="r"), out, ctx)

    with pytest.raises(kind, match=message):
        run()


@pytest.fixture
def recipe(small: dict[str, Any]) -> dict[str, Any]:
    """A good distill recipe."""
    teachers = [{"model": "a", "domain": "math"}, {"model": "b", "domain": "code"}]
    return {"teachers": teachers, "student": {"from": "base"}, "data": ["math.jsonl", "code.jsonl"], **small}


def test_no_text_for_a_teacher(recipe: dict[str, Any], out: Path, ctx: Context) -> None:
    refused(ConfigError, "b: the data has no text of domain 'code'", {**recipe, "data": "math.jsonl"}, out, ctx)


def test_a_general_teacher_with_nothing_left_to_teach(recipe: dict[str, Any], out: Path, ctx: Context) -> None:
    teachers = [*recipe["teachers"], {"model": "c"}]
    refused(ConfigError, "c: .*what the other teachers leave", {**recipe, "teachers": teachers}, out, ctx)


def test_a_domain_without_a_teacher(recipe: dict[str, Any], out: Path, ctx: Context) -> None:
    refused(
        DataError,
        "domain 'code', which no teacher teaches.*'math'",
        {**recipe, "teachers": recipe["teachers"][:1]},
        out,
        ctx,
    )


def test_a_document_without_a_domain(
    recipe: dict[str, Any], out: Path, ctx: Context, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    write_jsonl(tmp_path / "bare.jsonl", [{"text": "nobody says what this is"}])
    data = [*recipe["data"], str(tmp_path / "bare.jsonl")]
    refused(DataError, "has no domain, which no teacher", {**recipe, "data": data}, out, ctx)


def test_parts_the_model_does_not_have(recipe: dict[str, Any], out: Path, ctx: Context) -> None:
    refused(ConfigError, "no router", {**recipe, "parts": ["router"]}, out, ctx)


def test_more_layers_than_there_are(recipe: dict[str, Any], out: Path, ctx: Context) -> None:
    student = {"from": "base", "layer_drop": {"layers": 3}}
    refused(ConfigError, "3 of base, which has only 2 layers", {**recipe, "student": student}, out, ctx)


def test_tokenizers_that_differ(
    recipe: dict[str, Any], out: Path, ctx: Context, tmp_path: Path, siblings: dict[str, Path]
) -> None:
    other = shutil.copytree(siblings["b"], tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    first, second = (next(t for t, i in content["model"]["vocab"].items() if i == n) for n in (40, 41))
    content["model"]["vocab"] |= {first: 41, second: 40}
    (other / "tokenizer.json").write_text(json.dumps(content))
    teachers = [recipe["teachers"][0], {"model": str(other), "domain": "code"}]
    refused(CheckpointError, "token 40 is .* there and .* here", {**recipe, "teachers": teachers}, out, ctx)


def test_no_tokenizer(
    recipe: dict[str, Any], out: Path, ctx: Context, tmp_path: Path, siblings: dict[str, Path]
) -> None:
    bare = shutil.copytree(siblings["base"], tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refused(CheckpointError, "no tokenizer", {**recipe, "student": {"from": str(bare)}}, out, ctx)


def test_a_tokenizer_larger_than_the_model(
    small: dict[str, Any], out: Path, ctx: Context, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    narrow = make_model(tmp_path / "narrow", vocab_size=280)
    refused(
        CheckpointError,
        "has id 299, but the model's vocabulary has 280 rows",
        {"model": str(narrow), "data": "math.jsonl", **small},
        out,
        ctx,
    )


def test_a_training_that_diverges(small: dict[str, Any], out: Path, ctx: Context) -> None:
    recipe = {"model": "base", "data": "math.jsonl", **small, "lr": 1e30, "warmup": 0.0}
    refused(ConfigError, r"step \d+, learning rate .*e\+\d+: .*diverged", recipe, out, ctx)


def test_weights_that_are_not_numbers(
    small: dict[str, Any], out: Path, ctx: Context, tmp_path: Path, siblings: dict[str, Path]
) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(siblings["base"], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = {"model": str(broken), "data": "math.jsonl", **small}
    refused(CheckpointError, "broken: .*not finite", recipe, out, ctx)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_data(small: dict[str, Any], out: Path, ctx: Context, tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    refused(
        DataError,
        "empty.jsonl: no documents",
        {"model": "base", "data": str(tmp_path / "empty.jsonl"), **small},
        out,
        ctx,
    )


def test_missing_data_is_found_by_the_plan(small: dict[str, Any], out: Path, ctx: Context) -> None:
    recipe = {"model": "base", "data": "nowhere.jsonl", **small}
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file"):
        plan_tune(parse(TuneConfig, recipe, where="r"), ctx)
    refused(DataError, "nowhere.jsonl: no such file", recipe, out, ctx)


def test_a_missing_model(small: dict[str, Any], out: Path, ctx: Context) -> None:
    refused(CheckpointError, "nowhere", {"model": "./nowhere", "data": "math.jsonl", **small}, out, ctx)


def test_heldout_text_that_is_trained_on(small: dict[str, Any], out: Path, ctx: Context) -> None:
    recipe = {"model": "base", "data": "math.jsonl", "eval_data": ["held.jsonl", "math.jsonl"], **small}
    refused(DataError, "40 of its 56 documents are also in the training data", recipe, out, ctx)


def test_sequences_longer_than_the_model(small: dict[str, Any], out: Path, ctx: Context) -> None:
    refused(
        ConfigError,
        "129 is more than base was made for",
        {"model": "base", "data": "math.jsonl", **small, "sequence_tokens": 129},
        out,
        ctx,
    )


def test_a_quantised_model(
    small: dict[str, Any], out: Path, ctx: Context, tmp_path: Path, siblings: dict[str, Path]
) -> None:
    quantised = shutil.copytree(siblings["base"], tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused(CheckpointError, "quantised", {"model": str(quantised), "data": "math.jsonl", **small}, out, ctx)


def test_several_processes(small: dict[str, Any], out: Path, ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(ResourceError, "2 processes", {"model": "base", "data": "math.jsonl", **small}, out, ctx)


def test_target_exists(small: dict[str, Any], ctx: Context, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(TargetError, match="not empty"):
        tune(parse(TuneConfig, {"model": "base", "data": "math.jsonl", **small}, where="r"), tmp_path, ctx)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_long_documents_are_cut_counted_and_noted(
    small: dict[str, Any], ctx: Context, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    write_jsonl(tmp_path / "long.jsonl", [{"text": "1 + 1 = 2; " * 40}, {"text": "short"}])
    notes: list[str] = []

    class Listening:
        task = ctx.progress.task

        def note(self, message: str) -> None:
            notes.append(message)

    config = parse(TuneConfig, {"model": "base", "data": str(tmp_path / "long.jsonl"), **small}, where="r")
    tune(config, tmp_path / "out", dataclasses.replace(ctx, progress=Listening()))
    assert "1 of 2 documents are longer than 32 tokens and are cut into pieces" in notes
    data = json.loads((tmp_path / "out" / "solera.json").read_text())["checks"]["data"]
    assert (data["documents"], data["documents_cut"]) == (2, 1)
    assert data["pieces"] > 5
