"""Modules and towers: parts of a model that are merged in their own way, or with models that are only that part."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, InputError
from solera_merge.config import MergeConfig
from solera_merge.plan import MergePlan, make_plan
from solera_merge.run import merge, plan_merge
from tests.merge.families import FAMILIES, Family, context

Recipe = Callable[..., MergeConfig]

# Vision-language model -> the language model that its language tower was made of.
LANGUAGE = {
    "llava": "llama",
    "gemma3": "gemma3_text",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "mistral3": "mistral",
    "smolvlm": "llama",
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """transformers and torch warn about their own code for some families."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def language_of(vlm: str) -> Family:
    family = FAMILIES[LANGUAGE[vlm]]
    tied = FAMILIES[vlm].settings["text_config"].get("tie_word_embeddings", LANGUAGE[vlm] == "gemma3_text")
    return replace(family, settings={**family.settings, "tie_word_embeddings": tied})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """`models(vlm)`: `vlm`, `other` of that kind, and `text`, a language model of its language tower's kind."""
    root = tmp_path_factory.mktemp("towers")
    made: dict[str, dict[str, Path]] = {}

    def build(name: str) -> dict[str, Path]:
        if name not in made:
            family = FAMILIES[name]
            made[name] = {
                "vlm": family.build(root / name / "vlm", 0),
                "other": family.build(root / name / "other", 1),
                "text": language_of(name).build(root / name / "text", 2),
            }
        return made[name]

    return build


def newer(path: Path, out: Path, family: Family) -> Path:
    """The same model under the names that it has in memory, as transformers 4.52 to 4.57 saved it."""
    from safetensors.torch import save_file

    model = family.exact(path)
    shutil.copytree(path, out)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    flag = model.config.tie_word_embeddings
    state = {n: t.contiguous() for n, t in model.state_dict().items() if not (flag and n in tied)}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def read(path: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(path, Context())
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def planned(config: MergeConfig, models: Mapping[str, Path]) -> MergePlan:
    return make_plan(config, context(models))[0]


@pytest.mark.parametrize("layout", ["hub", "newer"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_into_a_vlm(name: str, layout: str, models: Any, recipe: Recipe, tmp_path: Path) -> None:
    family, paths = FAMILIES[name], dict(models(name))
    if layout == "newer":
        paths["vlm"] = newer(paths["vlm"], tmp_path / "vlm", family)
    config = recipe(
        merge_method="linear",
        base_model="vlm",
        towers={"language": {"models": [{"model": "vlm"}, {"model": "text"}], "parameters": {"weight": 0.5}}},
    )
    out = merge(config, tmp_path / "out", context(paths))
    assert read(out).keys() == read(paths["vlm"]).keys()  # its layout
    merged, vlm = family.exact(out), family.exact(paths["vlm"])
    text = language_of(name).exact(paths["text"])
    # In memory the towers are attributes, whatever the files call them.
    towers: list[Any] = [getattr(m.model, "language_model", None) or m.model.text_model for m in (merged, vlm)]
    inner: Any = text.model
    expected = {n: (p + inner.state_dict()[n]) / 2 for n, p in towers[1].state_dict().items()}
    for n, parameter in towers[0].state_dict().items():
        assert float((parameter - expected.pop(n)).abs().max()) < 1e-6
    assert not expected
    head = (merged.lm_head.weight - (vlm.lm_head.weight + text.lm_head.weight) / 2).abs().max()
    assert float(head) < 1e-6
    before = {n: p for n, p in vlm.state_dict().items() if "lm_head" not in n}
    kept = {n for n in before if not n.startswith(("model.language_model", "model.text_model"))}
    assert kept
    assert all(bool((merged.state_dict()[n] == before[n]).all()) for n in kept)
    assert bool(family.outputs(merged).isfinite().all())


def test_a_task_vector_of_language_models_is_added(models: Any, recipe: Recipe, tmp_path: Path) -> None:
    """VLM + 0.5 (fine-tune - its own base): the base of the module is a language model, too."""
    paths = dict(models("llava")) | {"ancestor": FAMILIES["llama"].build(tmp_path / "ancestor", 3)}
    tower = {
        "merge_method": "task_arithmetic",
        "base_model": "ancestor",
        "models": [{"model": "vlm", "parameters": {"weight": 1}}, {"model": "text", "parameters": {"weight": 0.5}}],
    }
    config = recipe(merge_method="passthrough", base_model="vlm", towers={"text_decoder": tower})
    plan = planned(config, paths)
    methods = {t.name: t.method for t in plan.tensors}
    assert methods["language_model.model.norm.weight"] == "task_arithmetic"
    assert methods["vision_tower.post_layernorm.weight"] == "passthrough"
    out = read(merge(config, tmp_path / "out", context(paths)))
    vlm, text, ancestor = read(paths["vlm"]), read(paths["text"]), read(paths["ancestor"])
    for name, value in ancestor.items():
        there = f"language_model.{name}"
        np.testing.assert_allclose(out[there], vlm[there] + 0.5 * (text[name] - value), rtol=1e-5, atol=1e-6)


def test_rows_that_a_language_model_lacks_are_the_vlms_own(models: Any, recipe: Recipe, tmp_path: Path) -> None:
    small = replace(FAMILIES["llama"], settings={"vocab_size": 90})
    paths = dict(models("llava")) | {"text": small.build(tmp_path / "text", 2)}
    config = recipe(
        merge_method="task_arithmetic",
        base_model="vlm",
        towers={"language": {"models": [{"model": "text"}], "parameters": {"weight": 1}}},
    )
    out, vlm = read(merge(config, tmp_path / "out", context(paths))), read(paths["vlm"])
    text = read(paths["text"])
    for there, here in (
        ("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
    ):
        np.testing.assert_allclose(out[there][:90], text[here], atol=1e-6)
        np.testing.assert_array_equal(out[there][90:], vlm[there][90:])
    FAMILIES["llava"].exact(tmp_path / "out")


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "mistral3"])
def test_two_layouts_of_one_family(name: str, models: Any, recipe: Recipe, tmp_path: Path) -> None:
    """The same bytes whichever layout the second model is stored in; the output has the first one's."""
    family, paths = FAMILIES[name], models(name)
    config = recipe(merge_method="linear", models=["vlm", "other"], parameters={"weight": [0.2, 0.8]})
    expected = read(merge(config, tmp_path / "expected", context(paths)))
    layouts = [newer(paths["other"], tmp_path / "newer", family)]
    layouts += [older(paths["other"], tmp_path / "older")] if name == "gemma3" else []
    for other in layouts:
        assert read(other).keys() != expected.keys()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        out = read(merge(config, tmp_path / "out", context({**paths, "other": other})))
        assert out.keys() == expected.keys()
        assert all(bool((out[n] == expected[n]).all()) for n in expected)
    record = json.loads((tmp_path / "out" / "solera.json").read_text(encoding="utf-8"))
    assert [i["ref"] for i in record["inputs"]] == ["vlm", "other"]


def test_gpt2_with_and_without_its_prefix(recipe: Recipe, tmp_path: Path) -> None:
    """The hub's first checkpoints have `h.0.`, later ones `transformer.h.0.`; and causal masks as tensors."""
    from safetensors.numpy import load_file, save_file

    a, b = (FAMILIES["gpt2"].build(tmp_path / name, seed) for seed, name in enumerate("ab"))
    stored = {n.removeprefix("transformer."): t for n, t in load_file(b / "model.safetensors").items()}
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.float32)) for i in range(2)}
    save_file({**stored, **masks}, b / "model.safetensors", metadata={"format": "pt"})
    config = recipe(merge_method="linear", models=["a", "b"], parameters={"weight": 1})
    plan = planned(config, {"a": a, "b": b})
    assert any("attn.bias': left out" in warning or "attn.bias'" in warning for warning in plan.warnings)
    out = read(merge(config, tmp_path / "out", context({"a": a, "b": b})))
    assert out.keys() == read(a).keys()
    name = "transformer.h.1.mlp.c_fc.weight"
    np.testing.assert_allclose(out[name], (read(a)[name] + stored["h.1.mlp.c_fc.weight"]) / 2, atol=1e-7)


def test_levels_of_parameters(models: Any, recipe: Recipe) -> None:
    """Source before slice before module before global before default."""
    slices = [
        {
            "sources": [
                {"model": "vlm", "layer_range": [0, 1], "parameters": {"weight": [{"filter": "mlp", "value": 1}]}},
                {"model": "other", "layer_range": [0, 1]},
            ],
            "parameters": {"weight": [{"filter": "self_attn", "value": 2}]},
        },
        {"sources": [{"model": m, "layer_range": [1, 2]} for m in ("vlm", "other")]},
    ]
    both = [{"model": "vlm"}, {"model": "other"}]
    config = recipe(
        merge_method="linear",
        parameters={"weight": 4},
        modules={
            "language_model": {"slices": slices, "parameters": {"weight": [{"filter": "layernorm", "value": 3}]}},
            "vision_tower": {"models": both, "parameters": {"weight": [5, 7]}},
            "multi_modal_projector": {"models": both, "parameters": {"normalize": False}},
        },
    )
    found = {t.name: t.parameters for t in planned(config, models("llava")).tensors}
    layer, vision = "language_model.model.layers.0.", "vision_tower.encoder.layers"
    assert found[layer + "mlp.up_proj.weight"]["weight"] == (1, 4)
    assert found[layer + "self_attn.q_proj.weight"]["weight"] == (2, 2)
    assert found[layer + "input_layernorm.weight"]["weight"] == (3, 3)
    assert found["language_model.model.layers.1.mlp.up_proj.weight"]["weight"] == (4, 4)
    assert [found[f"{vision}.{i}.mlp.fc1.weight"]["weight"] for i in range(3)] == [(5, 5), (6, 6), (7, 7)]
    normalize = [found[n]["normalize"] for n in (layer + "mlp.up_proj.weight", "multi_modal_projector.linear_1.weight")]
    assert normalize == [True, False]


def test_methods_of_several_modules(models: Any, recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(
        merge_method="ties",
        base_model="vlm",
        parameters={"weight": 1, "density": 0.5, "t": 0.25},
        modules={
            "language": {"models": [{"model": "other"}]},
            "vision": {"merge_method": "slerp", "models": [{"model": "other"}]},
            "projector": {"merge_method": "passthrough", "models": [{"model": "other"}]},
        },
    )
    rows = {row["tensor"]: row for row in plan_merge(config, context(models("llava"))).rows}
    assert len({tuple(row) for row in rows.values()}) == 1
    vision = rows["vision_tower.post_layernorm.weight"]
    assert (vision["method"], vision["t"], vision["density"]) == ("slerp", 0.25, "")
    projector = rows["multi_modal_projector.linear_1.weight"]
    assert (projector["method"], projector["base"], projector["models"]) == ("passthrough", "", "other")
    FAMILIES["llava"].exact(merge(config, tmp_path / "out", context(models("llava"))))


def test_the_last_layer_is_the_end_of_a_gradient_where_more_lie_behind(
    recipe: Recipe, bare_model: Callable[..., Path], tmp_path: Path
) -> None:
    """DeepSeek-V3 stores a layer for multi-token prediction behind its 61."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    for m in "ab":
        bare_model(tmp_path / m, dict.fromkeys(names, np.ones((2, 2))), num_hidden_layers=3, num_nextn_predict_layers=1)
    config = recipe(merge_method="linear", models=["a", "b"], parameters={"weight": [1, 3]})
    plan = make_plan(config, Context(base_dir=tmp_path))[0]
    assert [t.parameters["weight"][0] for t in plan.tensors] == [1, 2, 3, 3]
    sliced = recipe(merge_method="passthrough", slices=[{"sources": [{"model": "a", "layer_range": [0, 3]}]}])
    with pytest.raises(ConfigError, match="behind them 1 for multi-token prediction; slices of such a model are not"):
        make_plan(sliced, Context(base_dir=tmp_path))


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
GATED = Family(
    "T5ForConditionalGeneration",
    "t5",
    {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": True, "decoder_start_token_id": 0},
    "seq2seq",
)


def older(path: Path, out: Path) -> Path:
    """The same Gemma 3 as it was published: its vision tower under one more name."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(path, out)
    stored = load_file(path / "model.safetensors")
    renamed = {n.replace("vision_tower.", "vision_tower.vision_model.", 1): t for n, t in stored.items()}
    save_file(renamed, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("name", ["t5", "gemma3", "qwen2_5_vl"])
def test_modules_against_mergekit(name: str, models: Any, recipe: Recipe, tmp_path: Path) -> None:
    """The same file through both: names of modules, levels of parameters, gradients, values."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    if name == "t5":
        family = GATED
        paths = {m: family.build(tmp_path / m, seed) for seed, m in enumerate(("vlm", "other"))}
        parts = ("decoder", "encoder", "shared")
    else:
        family = FAMILIES[name]
        paths = {m: models(name)[m] for m in ("vlm", "other")}
        if name == "gemma3":
            paths = {m: older(path, tmp_path / m) for m, path in paths.items()}
        parts = ("text_decoder", "vision_tower", "multi_modal_projector")
    both = [{"model": str(paths["vlm"])}, {"model": str(paths["other"])}]
    weights: list[Any] = [[1, 3], [{"filter": "norm", "value": [0.2, 1.7]}], 0.7]
    modules = {part: {"models": both, "parameters": {"weight": w}} for part, w in zip(parts, weights, strict=True)}
    modules[parts[0]]["models"] = [{**both[0], "parameters": {"weight": 0.3}}, both[1]]
    content = {"merge_method": "linear", "dtype": "float32", "parameters": {"weight": 2}, "modules": modules}
    run_merge(
        MergeConfiguration.model_validate(content),
        str(tmp_path / "theirs"),
        MergeOptions(quiet=True, write_model_card=False),
    )
    merge(recipe(**content), tmp_path / "ours", context({}))
    theirs, ours = read(tmp_path / "theirs"), read(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for tensor in theirs:
        np.testing.assert_allclose(ours[tensor], theirs[tensor], rtol=1e-5, atol=1e-6, err_msg=tensor)
    family.exact(tmp_path / "ours")


def test_fused_experts_are_merged_one_by_one(recipe: Recipe, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    """One tensor [E, a, b] gives what E tensors give, for every method that looks at a tensor as a whole."""
    rng = np.random.default_rng(0)
    prefix = "model.layers.0.mlp.experts."
    base = rng.normal(size=(3, 40, 24))
    values = {"base": base} | {m: base + rng.normal(size=base.shape) * [[[0.01]], [[1.0]], [[0.1]]] for m in "ab"}
    for model, experts in values.items():
        bare_model(tmp_path / "one" / model, {f"{prefix}down_proj": experts}, num_experts=3)
        apart = {f"{prefix}{i}.down_proj.weight": expert for i, expert in enumerate(experts)}
        bare_model(tmp_path / "apart" / model, apart, num_experts=3)
    both = {"base_model": "base", "models": ["a", "b"]}
    recipes: dict[str, dict[str, Any]] = {
        "linear": {"models": ["a", "b"], "parameters": {"weight": 1}},
        "slerp": {"base_model": "a", "models": ["b"], "parameters": {"t": 0.3}},
        "nuslerp": {"models": ["a", "b"], "parameters": {"weight": [1, 2]}},
        "multislerp": {"models": ["a", "b"], "parameters": {"weight": 1}},
        "karcher": {"models": ["a", "b"]},
        "ties": {**both, "parameters": {"weight": 1, "density": 0.2}},
        "breadcrumbs": {**both, "parameters": {"weight": 1, "density": 0.5, "gamma": 0.1}},
        "sce": {**both, "parameters": {"select_topk": 0.3}},
        "model_stock": both,
        "arcee_fusion": {"base_model": "base", "models": ["a"]},
        "ramplus_tl": both,
        "tsv_m": both,
        "iso_c": both,
    }
    for method, content in recipes.items():
        out = {
            kind: read(
                merge(
                    recipe(merge_method=method, **content),
                    tmp_path / kind / method,
                    Context(base_dir=tmp_path / kind, reload_check=False, threads=1, flush=False),
                )
            )
            for kind in ("one", "apart")
        }
        for i, expert in enumerate(out["one"][f"{prefix}down_proj"]):
            np.testing.assert_array_equal(expert, out["apart"][f"{prefix}{i}.down_proj.weight"], err_msg=method)


def test_fused_experts_draw_masks_of_their_own(recipe: Recipe, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    bare_model(tmp_path / "base", {name: np.zeros((3, 40, 24))}, num_experts=3)
    bare_model(tmp_path / "a", {name: np.ones((3, 40, 24))}, num_experts=3)
    config = recipe(
        merge_method="dare_linear", base_model="base", models=["a"], parameters={"weight": 1, "density": 0.5}
    )
    out = read(merge(config, tmp_path / "out", Context(base_dir=tmp_path, reload_check=False, threads=1)))[name]
    for i in range(3):
        assert 0.4 < np.count_nonzero(out[i]) / out[i].size < 0.6
        assert np.mean(out[i] == out[(i + 1) % 3]) < 0.6  # equal masks would agree everywhere


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown tower": (
        {"towers": {"audio": {"models": [{"model": "other"}]}}},
        "towers.audio: 'vlm' has no such module; it has language_model, multi_modal_projector, vision_tower",
    ),
    "overlapping towers": (
        {
            "towers": {
                "language": {"models": [{"model": "other"}]},
                "language_model": {"models": [{"model": "text"}]},
            }
        },
        "towers: 'language' and 'language_model' are the same tower (language_model); name it once",
    ),
    "module left out": (
        {"modules": {"language_model": {"models": [{"model": "other"}]}}},
        "modules: 'multi_modal_projector', 'vision_tower' of 'vlm' would be left out",
    ),
    "a base that nothing uses": (
        {
            "merge_method": "linear",
            "modules": {
                name: {"models": [{"model": "other"}]} for name in ("language", "vision", "multi_modal_projector")
            },
        },
        "modules.language.base_model: linear has no base; list 'vlm' under `modules.language.models`",
    ),
    "slices over several stacks": (
        {"slices": [{"sources": [{"model": "vlm", "layer_range": [0, 2]}]}]},
        "has several stacks of layers ('language_model.model.layers', 'vision_tower.encoder.layers'); slice one of its",
    ),
    "layer range beyond": (
        {"towers": {"vision": {"slices": [{"sources": [{"model": "vlm", "layer_range": [0, 4]}]}]}}},
        "towers.vision.slices.0.sources.0.layer_range: 'vlm' has 3 layers, and [0, 4] reaches beyond them",
    ),
    "no layers": (
        {"towers": {"projector": {"slices": [{"sources": [{"model": "vlm", "layer_range": [0, 1]}]}]}}},
        "towers.projector.slices.0.sources.0.layer_range: 'vlm' has no layers that could be sliced",
    ),
    "another family": (
        {"towers": {"language": {"models": [{"model": "qwen3"}]}}},
        "the tower 'language_model' is a llama, and the other model is a qwen3; only models of one family",
    ),
    "a language model as the vision tower": (
        {"towers": {"vision": {"models": [{"model": "text"}]}}},
        "the tower 'vision_tower' is a clip_vision_model, and the other model is a llama",
    ),
    "a language model beside the whole": (
        {"models": [{"model": "vlm"}, {"model": "text"}]},
        "only models of one architecture can be merged (models of one tower of a larger model with `towers`)",
    ),
    "other heads": (
        {"towers": {"language": {"models": [{"model": "heads"}]}}},
        "`language_model.num_attention_heads` is 4 and 2: the weights mean different things",
    ),
    "parameter of another method": (
        {"towers": {"language": {"models": [{"model": "text"}], "parameters": {"t": 0.5}}}},
        "towers.language.parameters.t: passthrough has no such parameter",
    ),
    "models and slices": (
        {"towers": {"language": {}}},
        "towers.language: give either `models` or `slices`",
    ),
    "unknown method of a module": (
        {"towers": {"language": {"models": [{"model": "text"}], "merge_method": "tis"}}},
        "unknown method 'tis' (did you mean 'ties'?)",
    ),
    "towers without a base": (
        {"base_model": None, "towers": {"language": {"models": [{"model": "text"}]}}},
        "towers: need a base_model (the model whose towers they are, and that all else comes from)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, models: Any, recipe: Recipe, tmp_path: Path) -> None:
    content, message = BAD[case]
    paths = dict(models("llava"))
    if "qwen3" in str(content):
        paths["qwen3"] = FAMILIES["qwen3"].build(tmp_path / "qwen3", 0)
    if "heads" in str(content):
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        paths["heads"] = replace(FAMILIES["llama"], settings=heads).build(tmp_path / "heads", 0)
    with pytest.raises(InputError) as caught:
        planned(recipe(**{"merge_method": "passthrough", "base_model": "vlm"} | content), paths)
    assert message in str(caught.value)


def test_layers_that_have_no_place_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    """DeepSeek's config says how many layers come before the experts; T5's first block holds the position biases."""
    deepseek = FAMILIES["deepseek_v3"].build(tmp_path / "deepseek", 0)
    t5 = FAMILIES["t5"].build(tmp_path / "t5", 0)

    def again(model: str, *ranges: list[int]) -> list[dict[str, Any]]:
        return [{"sources": [{"model": model, "layer_range": layers}]} for layers in ranges]

    config = recipe(merge_method="passthrough", slices=again("m", [0, 2], [0, 2]))
    with pytest.raises(CheckpointError, match=r"`first_k_dense_replace` can only say that the first layers have no"):
        planned(config, {"m": deepseek})
    config = recipe(merge_method="passthrough", slices=again("m", [0, 1], [0, 2]))
    plan = planned(config, {"m": deepseek})
    assert (plan.config["first_k_dense_replace"], plan.config["num_hidden_layers"]) == (2, 3)
    FAMILIES["deepseek_v3"].exact(merge(config, tmp_path / "out", context({"m": deepseek})))
    config = recipe(
        merge_method="passthrough", base_model="m", towers={"encoder": {"slices": again("m", [0, 2], [0, 2])}}
    )
    with pytest.raises(CheckpointError, match=r"encoder.block.2: would be layer 0 of 'm'.*relative_attention_bias"):
        planned(config, {"m": t5})


def test_a_tower_with_two_stacks_cannot_be_sliced(recipe: Recipe, tmp_path: Path) -> None:
    mllama = FAMILIES["mllama"].build(tmp_path / "mllama", 0)
    vision = {"vision": {"slices": [{"sources": [{"model": "m", "layer_range": [0, 1]}]}]}}
    config = recipe(merge_method="passthrough", base_model="m", towers=vision)
    with pytest.raises(ConfigError, match=r"several stacks.*global_transformer.layers.*slices need one"):
        planned(config, {"m": mllama})


def test_mergekits_bytes_are_not_to_be_had_for_towers(models: Any, recipe: Recipe) -> None:
    config = recipe(
        merge_method="linear",
        base_model="vlm",
        towers={"language": {"models": [{"model": "text"}], "parameters": {"weight": 1}}},
    )
    with pytest.raises(ConfigError, match="mergekit has neither towers nor several methods"):
        make_plan(config, Context(models=models("llava"), compat="mergekit"))
