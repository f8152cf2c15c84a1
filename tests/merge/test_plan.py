"""What the plan says, before a weight is read."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from solera_core.context import Context
from solera_core.plan import Plan
from solera_core.writer import TensorSpec, layout
from solera_merge.config import MergeConfig
from solera_merge.plan import MergePlan, make_plan
from solera_merge.run import plan_merge

Recipe = Callable[..., MergeConfig]
Siblings = dict[str, Path]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Siblings:
    """Two four-layer models with attention of two kinds."""
    root = tmp_path_factory.mktemp("deep")
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    settings: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 8, "head_dim": 8}
    p = make_model(root / "p", family="qwen2", use_sliding_window=True, max_window_layers=4, **settings)
    q = make_model(root / "q", base=p, seed=1)
    return {"p": p, "q": q}


def test_a_gradient_with_more_values_than_layers_is_pointed_out(recipe: Recipe, deep: Siblings) -> None:
    """As many as layers, or fewer, are right; of more, some count nowhere, which mergekit does not say either."""

    def told(weight: Any, **content: Any) -> list[str]:
        content = content or {"models": [{"model": "p", "parameters": {"weight": weight}}, "q"]}
        warnings = planned(recipe(merge_method="linear", parameters={"weight": 1}, **content), deep).warnings
        return [warning for warning in warnings if "gradient" in warning]

    assert told([0, 1]) == told([0, 1, 2, 3]) == told([{"filter": "mlp", "value": [0, 1, 1, 1]}, {"value": 1}]) == []
    [warning] = told([{"filter": "mlp", "value": [0, 1, 2, 3, 4]}, {"value": 1}])
    assert "parameters.weight: the gradient [0, 1, 2, 3, 4] has 5 values for 4 layers" in warning
    source = {"model": "p", "layer_range": [0, 2], "parameters": {"weight": [1, 5, 1]}}
    [warning] = told(None, slices=[{"sources": [source, {"model": "q", "layer_range": [0, 2]}]}])
    assert "3 values for 2 layers" in warning


def rows(plan: Plan) -> dict[str, Mapping[str, Any]]:
    return {row["tensor"]: row for row in plan.rows}


def planned(config: MergeConfig, models: Siblings, **options: Any) -> MergePlan:
    return make_plan(config, Context(models=models, **options))[0]


def test_plan_is_pure_data(recipe: Recipe, siblings: Siblings) -> None:
    config = recipe(merge_method="ties", base_model="base", models=["a", "b"], parameters={"weight": 1, "density": 0.5})
    plan = plan_merge(config, Context(models=siblings, threads=2))
    text = json.dumps(plan.to_json())
    assert json.loads(text)["stage"] == "merge"
    assert [read["what"] for read in plan.reads] == ["a", "b", "base"]
    assert len({tuple(row) for row in plan.rows}) == 1
    weights = sum(w["bytes"] for w in plan.writes if w["what"].endswith(".safetensors"))
    numbers = sum(math.prod(map(int, row["shape"].split("x"))) for row in plan.rows)
    assert 4 * numbers < weights < 4 * numbers + 4000  # and the header
    assert plan.disk_bytes == sum(w["bytes"] for w in plan.writes)
    assert rows(plan)["model.norm.weight"] == {
        "tensor": "model.norm.weight",
        "dtype": "F32",
        "shape": "32",
        "method": "ties",
        "base": "base",
        "models": "a, b",
        "weight": "1, 1",
        "rescale": False,
        "density": "0.5, 0.5",
        "normalize": True,
        "lambda": 1.0,
        "scope": "tensor",
        "int8_mask": False,
    }


def test_order_of_precedence_gradients_and_filters(recipe: Recipe, deep: Siblings) -> None:
    config = recipe(
        merge_method="linear",
        models=[
            {"model": "p", "parameters": {"weight": [0, 3]}},
            {"model": "q", "parameters": {"weight": [{"filter": "mlp", "value": [10, 13]}]}},
        ],
        parameters={"weight": [{"filter": "norm", "value": 5}, {"value": 7}]},
    )
    found = {t.name: t.parameters["weight"] for t in planned(config, deep).tensors}
    q_proj, up_proj, norm = "self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"
    assert [found[f"model.layers.{i}.{q_proj}"] for i in range(4)] == [(0, 7), (1, 7), (2, 7), (3, 7)]
    assert [found[f"model.layers.{i}.{up_proj}"] for i in range(4)] == [(0, 10), (1, 11), (2, 12), (3, 13)]
    assert found[f"model.layers.2.{norm}"] == (2, 5)
    # Outside the layers a gradient gives its first value, before them and behind them, as in mergekit.
    assert found["model.embed_tokens.weight"] == (0, 7)
    assert found["model.norm.weight"] == (0, 5)


def test_slices_renumber_layers_and_their_config(recipe: Recipe, deep: Siblings) -> None:
    def slice_of(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
        return {"sources": [{"model": model, "layer_range": [first, end]}], "parameters": parameters}

    config = recipe(
        merge_method="passthrough",
        slices=[slice_of("p", 0, 3), slice_of("q", 1, 2, scale=[0.5, 0.25]), slice_of("p", 3, 4)],
    )
    plan = planned(config, deep)
    sources = {t.name: (t.models[0].model, t.models[0].name) for t in plan.tensors}
    layers = [sources[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(5)]
    assert layers == [(m, f"model.layers.{i}.mlp.up_proj.weight") for m, i in [(0, 0), (0, 1), (0, 2), (1, 1), (0, 3)]]
    assert not any(name.startswith("model.layers.5") for name in sources)
    assert plan.config["num_hidden_layers"] == 5
    kinds = [kind.split("_")[0] for kind in plan.config["layer_types"]]
    assert kinds == ["sliding", "full", "sliding", "full", "full"]
    # The only layer of a slice is the end of a gradient, as in mergekit.
    scales = {t.name: t.parameters["scale"] for t in plan.tensors}
    assert scales["model.layers.3.mlp.up_proj.weight"] == (0.25,)
    assert any("max_window_layers" in warning for warning in plan.warnings)


def test_embeddings_come_from_the_first_slice_and_the_head_from_the_last(recipe: Recipe, deep: Siblings) -> None:
    slices = [{"sources": [{"model": m, "layer_range": [0, 2]}]} for m in ("q", "p")]
    plan = planned(recipe(merge_method="passthrough", slices=slices, base_model="p"), deep)
    used = {t.name: t.models[0].model for t in plan.tensors}
    assert (used["model.embed_tokens.weight"], used["model.norm.weight"], used["lm_head.weight"]) == (0, 1, 1)


def test_layers_of_different_kinds_are_not_merged(recipe: Recipe, deep: Siblings) -> None:
    sources = [{"model": "p", "layer_range": [0, 2]}, {"model": "q", "layer_range": [1, 3]}]
    config = recipe(merge_method="linear", slices=[{"sources": sources}], parameters={"weight": 1})
    with pytest.raises(Exception, match=r"layer_types. differs between layers that are merged: 'sliding_attention'"):
        planned(config, deep)


@pytest.mark.parametrize(
    ("dtypes", "wanted", "expected", "stated"),
    [
        ("float32", {}, "F32", "float32"),
        ("bfloat16", {}, "BF16", "bfloat16"),
        ("mixed", {}, "F32", "float32"),
        ("mixed", {"dtype": "bfloat16"}, "BF16", "bfloat16"),
        ("float32", {"dtype": "float32", "out_dtype": "float16"}, "F16", "float16"),
    ],
)
def test_dtype_of_the_output(
    recipe: Recipe,
    make_model: Callable[..., Path],
    tmp_path: Path,
    dtypes: str,
    wanted: dict[str, str],
    expected: str,
    stated: str,
) -> None:
    for name, other in (("x", "bfloat16"), ("y", "float16")):
        make_model(tmp_path / name, seed=ord(name), dtype=other if dtypes == "mixed" else dtypes)
    config = recipe(merge_method="linear", models=["x", "y"], parameters={"weight": 1}, **wanted)
    plan = make_plan(config, Context(base_dir=tmp_path))[0]
    assert {t.dtype for t in plan.tensors} == {expected}
    assert plan.config["dtype"] == stated
    assert "_name_or_path" not in plan.config


def test_seed_tensor_and_model_key_the_randomness(recipe: Recipe, siblings: Siblings) -> None:
    config = recipe(merge_method="dare_ties", base_model="base", models=["a", "b"], parameters={"weight": 1})
    keys = {k for seed in (0, 1) for t in planned(config, siblings, seed=seed).tensors for k in t.keys}
    assert len(keys) == 2 * 2 * len(planned(config, siblings).tensors)


def test_order_of_models_does_not_touch_their_randomness(recipe: Recipe, siblings: Siblings) -> None:
    def keys(*models: str) -> dict[str, dict[str, int]]:
        config = recipe(merge_method="dare_ties", base_model="base", models=list(models), parameters={"weight": 1})
        return {t.name: dict(zip(models, t.keys, strict=True)) for t in planned(config, siblings).tensors}

    assert keys("a", "b") == keys("b", "a")


def test_base_is_appended_for_task_vectors_only(recipe: Recipe, siblings: Siblings) -> None:
    config = recipe(merge_method="task_arithmetic", base_model="base", models=["a"], parameters={"weight": 1})
    tensor = planned(config, siblings).tensors[0]
    assert tensor.base is not None
    assert len(tensor.models) == 1
    listed = recipe(merge_method="task_arithmetic", base_model="base", models=["base", "a"], parameters={"weight": 1})
    assert len(planned(listed, siblings).tensors[0].models) == 1


def test_warnings_name_what_a_careful_person_would_ask(
    recipe: Recipe, siblings: Siblings, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", base=siblings["a"], seed=9)
    content = json.loads((other / "config.json").read_text())
    content["rms_norm_eps"] = 0.5
    (other / "config.json").write_text(json.dumps(content))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    ctx = Context(models=siblings | {"other": other})
    config = recipe(merge_method="linear", models=["a", "other"], parameters={"weight": 1})
    warnings = "\n".join(make_plan(config, ctx)[0].warnings)
    assert "`rms_norm_eps` is 1e-06 and 0.5; the output gets 1e-06" in warnings
    assert "2 of 300 token ids mean different tokens" in warnings
    chosen = recipe(merge_method="linear", models=["a", "other"], parameters={"weight": 1}, tokenizer_source="other")
    plan, models = make_plan(chosen, ctx)  # whose rows are moved to the places of the tokens there
    assert "token ids" not in "\n".join(plan.warnings)
    assert [c.is_derived("lm_head.weight") for c in models.checkpoints] == [True, False]


def test_a_merge_of_models_without_tokenizer_says_so(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(siblings[name], tmp_path / name, ignore=shutil.ignore_patterns("tokenizer*"))
    config = recipe(merge_method="linear", models=["a", "b"], parameters={"weight": 1})
    assert "has no tokenizer" in "\n".join(make_plan(config, Context(base_dir=tmp_path))[0].warnings)


def test_derived_tables_are_left_out_by_name(recipe: Recipe, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    inv = "model.layers.0.self_attn.rotary_emb.inv_freq"
    bare_model(tmp_path / "x", {"w": [1.0], inv: [1.0, 0.5]})
    bare_model(tmp_path / "y", {"w": [2.0]})
    config = recipe(merge_method="linear", models=["x", "y"], parameters={"weight": 1})
    plan = make_plan(config, Context(base_dir=tmp_path))[0]
    assert [t.name for t in plan.tensors] == ["w"]
    assert any(inv in warning for warning in plan.warnings)


def test_models_of_70b_parameters_are_planned_from_their_headers(recipe: Recipe, tmp_path: Path) -> None:
    """Three checkpoints of 141 GB whose weights are holes in sparse files."""
    hidden, ffn, layers, vocab = 8192, 28672, 80, 128256
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (vocab, hidden))]
    for layer in range(layers):
        shapes = {"self_attn.q": (hidden, hidden), "self_attn.k": (1024, hidden), "self_attn.v": (1024, hidden)}
        shapes |= {"self_attn.o": (hidden, hidden), "mlp.gate": (ffn, hidden), "mlp.up": (ffn, hidden)}
        shapes["mlp.down"] = (hidden, ffn)
        p = f"model.layers.{layer}."
        specs += [TensorSpec(f"{p}{name}_proj.weight", "BF16", shape) for name, shape in shapes.items()]
        specs += [TensorSpec(f"{p}{name}_layernorm.weight", "BF16", (hidden,)) for name in ("input", "post_attention")]
    specs += [TensorSpec("model.norm.weight", "BF16", (hidden,)), TensorSpec("lm_head.weight", "BF16", (vocab, hidden))]
    shards = layout(specs)
    index = {"metadata": {}, "weight_map": {s.name: shard.file for shard in shards for s in shard.specs}}
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        for shard in shards:
            with (tmp_path / name / shard.file).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.nbytes)
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps(index))
        content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
        (tmp_path / name / "config.json").write_text(json.dumps(content | {"vocab_size": vocab, "hidden_size": hidden}))
    config = recipe(
        merge_method="ties", base_model="base", models=["a", "b"], parameters={"weight": [0, 1], "density": 0.3}
    )
    plan = plan_merge(config, Context(base_dir=tmp_path, memory_bytes=10**9, threads=4))
    assert len(plan.rows) == len(specs) == 723
    assert sum(row["bytes"] for row in plan.reads) == 3 * sum(spec.nbytes for spec in specs) > 420e9
    assert plan.disk_bytes > 141e9
    assert plan.memory_bytes < 10**9
    by_name = {row["tensor"]: row for row in plan.rows}
    assert by_name["model.layers.79.mlp.up_proj.weight"]["weight"] == "1, 1"
