"""Adapters merged into an adapter: equal to peft's own combinations, exact where nothing is cut, errors as reported."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from solera_core.adapters import open_adapter
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, SoleraError
from solera_core.lora import open_stored
from solera_core.progress import Silent
from solera_core.provenance import verify
from solera_core.strict import parse
from solera_merge.adapters.knots import align
from solera_merge.adapters.low_rank import Factors
from solera_merge.adapters.products import Arrays, Products, merged
from solera_merge.adapters.settings import METHODS_OF_UPDATES
from solera_merge.config import MergeConfig
from solera_merge.methods.catalogue import METHODS
from solera_merge.run import merge, plan_merge

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Q = "model.layers.0.self_attn.q_proj.weight"
V = "model.layers.1.self_attn.v_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def _adapter(base: Path, directory: Path, seed: int, **options: Any) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", **settings | options)
        model = get_peft_model(auto.from_pretrained(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="module")
def base(siblings: dict[str, Path]) -> Path:
    return siblings["base"]


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`a` and `b` alike; `c` with other modules, ranks and scaling (read-only)."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "a": _adapter(base, root / "a", 1),
        "b": _adapter(base, root / "b", 2),
        "c": _adapter(
            base,
            root / "c",
            3,
            r=3,
            lora_alpha=5,
            use_rslora=True,
            rank_pattern={"up_proj": 2},
            alpha_pattern={"q_proj": 1},
            target_modules=["q_proj", "up_proj"],
        ),
    }


def _recipe(method: str, models: list[Path], weights: list[float] | None = None, **content: Any) -> MergeConfig:
    listed = [
        {"model": str(m), "parameters": {"weight": w}}
        for m, w in zip(models, weights or [1.0] * len(models), strict=True)
    ]
    if "weight" not in METHODS[method].parameters:
        listed = [{"model": str(m)} for m in models]
    content.setdefault("adapter", {})
    return parse(MergeConfig, {"merge_method": method, "models": listed, **content}, where="recipe")


def _delta(base: Path, adapter: Path, name: str) -> F64:
    checkpoint = open_checkpoint(base, Context())
    fitted = open_adapter(str(adapter), checkpoint.tensors, Context())
    info = checkpoint.tensors[name]
    if name not in fitted.updates:
        return np.zeros(info.shape)
    return fitted.updates[name].delta(0, info.size).reshape(info.shape).astype(np.float64)


def _errors(adapter: Path) -> dict[str, float]:
    checks = json.loads((adapter / "solera.json").read_text())["checks"]
    return {**checks["errors"], "total": checks["error"]}


def _cut(x: F64, rank: int) -> F64:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    best: F64 = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return best


def test_concatenation_is_the_weighted_sum(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    out = merge(_recipe("task_arithmetic", list(adapters.values()), [0.7, -0.4, 0.5]), tmp_path / "out", Context())
    for name in (Q, V, UP):
        expected = sum(w * _delta(base, a, name) for w, a in zip([0.7, -0.4, 0.5], adapters.values(), strict=True))
        np.testing.assert_allclose(_delta(base, out, name), expected, rtol=0, atol=1e-7)
    assert {m.name: m.a.shape[0] for m in open_stored(str(out), Context()).modules if ".0." in m.name} == {
        "model.layers.0.mlp.up_proj": 2,
        "model.layers.0.self_attn.q_proj": 11,
        "model.layers.0.self_attn.v_proj": 8,
    }
    assert max(_errors(out).values()) < 1e-6
    assert verify(out) == []


def test_linear_divides_by_all_weights(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    out = merge(_recipe("linear", list(adapters.values()), [1, 2, 1]), tmp_path / "out", Context())
    np.testing.assert_allclose(_delta(base, out, UP), _delta(base, adapters["c"], UP) / 4, rtol=0, atol=1e-7)


def _by_peft(base: Path, adapters: list[Path], combination: str, **options: Any) -> dict[str, F64]:
    """What peft's own combination adds to the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(auto.from_pretrained(base), str(adapters[0]), adapter_name="0")
        names = [str(i) for i in range(len(adapters))]
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(str(adapter), adapter_name=name)
        model.add_weighted_adapter(names, [1.0, 1.0], "merged", combination_type=combination, **options)
        found: dict[str, F64] = {}
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "lora_A") and "merged" in module.lora_A:
                found[f"{name}.weight"] = module.get_delta_weight("merged").detach().double().numpy()
        return found


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        ({"merge_method": "task_arithmetic", "adapter": {}}, "cat", {}),
        ({"merge_method": "task_arithmetic", "adapter": {"rank": 3}}, "svd", {"svd_rank": 3}),
        (
            {"merge_method": "ties", "adapter": {"rank": 3}, "parameters": {"density": 0.5}},
            "ties_svd",
            {"svd_rank": 3, "density": 0.5},
        ),
    ],
    ids=["concatenation", "SVD", "TIES"],
)
def test_equals_peft(
    ours: dict[str, Any], theirs: str, settings: dict[str, Any], base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    pair = [adapters["a"], adapters["b"]]
    ours = dict(ours)
    out = merge(_recipe(ours.pop("merge_method"), pair, [1.0, 1.0], **ours), tmp_path / "out", Context())
    for name, expected in _by_peft(base, pair, theirs, **settings).items():
        np.testing.assert_allclose(_delta(base, out, name), expected, rtol=0, atol=2e-6, err_msg=name)


def test_peft_runs_the_output(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    out = merge(_recipe("task_arithmetic", list(adapters.values()), [0.5, 0.5, 0.5]), tmp_path / "out", Context())
    text = torch.arange(30)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        merged_model: Any = PeftModel.from_pretrained(auto.from_pretrained(base), str(out))
        by_hand = auto.from_pretrained(base)
        for name, parameter in by_hand.named_parameters():
            parameter += torch.from_numpy(sum(0.5 * _delta(base, a, name) for a in adapters.values()))
        torch.testing.assert_close(merged_model(text).logits, by_hand(text).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "della_linear", "model_stock"])
def test_a_cut_is_the_best_one_and_its_error_is_reported(
    method: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    content: dict[str, Any] = {"parameters": {"density": 0.6}} if "density" in METHODS[method].parameters else {}
    whole = merge(_recipe(method, list(adapters.values()), adapter={"rank": 32}, **content), tmp_path / "w", Context())
    out = merge(_recipe(method, list(adapters.values()), adapter={"rank": 3}, **content), tmp_path / "out", Context())
    errors = _errors(out)
    missing = total = 0.0
    for name in (f"{module.name}.weight" for module in open_stored(str(out), Context()).modules):
        uncut, cut = _delta(base, whole, name), _delta(base, out, name)
        np.testing.assert_allclose(cut, _cut(uncut, 3), rtol=0, atol=1e-5)
        if not uncut.any():
            continue  # model_stock: a module that one adapter alone changes
        error = float(np.linalg.norm(uncut - cut))
        assert errors[name.removesuffix(".weight")] == pytest.approx(error / np.linalg.norm(uncut), rel=1e-3, abs=1e-6)
        missing += error**2
        total += float(np.sum(uncut**2))
    assert errors["total"] == pytest.approx((missing / total) ** 0.5, rel=1e-3, abs=1e-6)
    assert {m.a.shape[0] for m in open_stored(str(out), Context()).modules} == {3}


def test_energy_chooses_the_ranks(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    models = list(adapters.values())
    whole = merge(_recipe("task_arithmetic", models), tmp_path / "whole", Context())
    out = merge(_recipe("task_arithmetic", models, adapter={"energy": 0.8}), tmp_path / "out", Context())
    bound = merge(_recipe("ties", models, adapter={"energy": 1.0, "max_rank": 2}), tmp_path / "bound", Context())
    for module in open_stored(str(out), Context()).modules:
        values = np.linalg.svd(_delta(base, whole, f"{module.name}.weight"), compute_uv=False) ** 2
        assert module.a.shape[0] == np.flatnonzero(np.cumsum(values) >= 0.8 * values.sum())[0] + 1
        assert _errors(out)[module.name] <= 0.2**0.5 + 1e-6
    assert {m.a.shape[0] for m in open_stored(str(bound), Context()).modules} == {2}


def test_knots_of_a_sum_is_the_sum(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    models = list(adapters.values())
    out = merge(
        _recipe("task_arithmetic", models, [0.3, 0.6, 0.9], adapter={"space": "knots"}), tmp_path / "out", Context()
    )
    for name in (Q, V, UP):
        expected = sum(w * _delta(base, a, name) for w, a in zip([0.3, 0.6, 0.9], models, strict=True))
        np.testing.assert_allclose(_delta(base, out, name), expected, rtol=0, atol=1e-6)


def test_knots_ties_by_the_paper(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """SVD of the dense updates side by side, TIES on the V parts, U S in front: the definition, with dense matrices."""
    models = list(adapters.values())
    settings: dict[str, Any] = {"adapter": {"space": "knots"}, "parameters": {"density": 0.4}}
    out = merge(_recipe("ties", models, **settings), tmp_path / "out", Context())
    for name in (Q, UP):
        deltas = [_delta(base, a, name) for a in models]
        u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
        k = int(np.count_nonzero(s > 1e-6 * s[0]))
        width = deltas[0].shape[1]
        parts = [vt[:k, i * width : (i + 1) * width].astype(np.float32) for i in range(len(models))]
        parts = [part if delta.any() else part * 0 for part, delta in zip(parts, deltas, strict=True)]
        values = {"weight": (1.0,) * 3, "density": (0.4,) * 3}
        defaults = {p.name: p.default for p in METHODS["ties"].parameters.values() if p.name not in values}
        part = merged(METHODS["ties"], Arrays(name, parts, (1, 2, 3)), defaults | values)
        np.testing.assert_allclose(_delta(base, out, name), (u[:, :k] * s[:k]) @ part, rtol=0, atol=2e-6)


def test_alignment_reproduces_the_updates() -> None:
    random = np.random.default_rng(0)
    updates = [
        Factors(random.standard_normal((20, r), dtype=np.float32), random.standard_normal((r, 12), dtype=np.float32))
        for r in (3, 2)
    ]
    aligned = align([updates[0], None, updates[1]], 12)
    for update, part in zip([updates[0], updates[1]], [aligned.parts[0], aligned.parts[2]], strict=True):
        np.testing.assert_allclose(aligned.left @ part, update.left @ update.right, rtol=0, atol=1e-5)
    assert not aligned.parts[1].any()


@pytest.mark.parametrize("method", METHODS_OF_UPDATES)
def test_a_method_of_updates_sees_nothing_but_them(method: str, apply: Callable[..., F32]) -> None:
    """On any base, minus that base, it gives what it gives on zero."""
    random = np.random.default_rng(1)
    base = random.integers(-8, 8, (6, 8)).astype(np.float32)  # sums of these are exact
    deltas = [random.integers(-8, 8, (6, 8)).astype(np.float32) for _ in range(3)]
    known = METHODS[method].parameters
    settings: dict[str, Any] = {"weight": (0.5, 0.25, 0.25)} if "weight" in known else {}
    settings |= {"density": (0.5,) * 3} if "density" in known else {}
    settings |= {"select_topk": 0.5} if "select_topk" in known else {}
    name = "model.layers.0.mlp.up_proj.weight"
    resolved = _resolved(method, settings)
    origin = None if method == "linear" else base
    models = [base + delta for delta in deltas]
    on_base = apply(method, models, origin, name=name, **METHODS[method].keywords(resolved)) - base.reshape(-1)
    on_zero = merged(METHODS[method], Arrays(name, deltas, (1, 2, 3)), resolved).reshape(-1)
    np.testing.assert_allclose(on_zero, on_base, rtol=0, atol=1e-5)


def _resolved(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        p.name: settings.get(p.name, (p.default,) * 3 if p.per_model else p.default)
        for p in METHODS[method].parameters.values()
    }


def test_every_pass_over_products_gives_the_same_bits() -> None:
    random = np.random.default_rng(2)
    update = Factors(
        random.standard_normal((700, 33), dtype=np.float32), random.standard_normal((33, 390), dtype=np.float32)
    )
    tensor = Products("w", (700, 390), [update, None], (1, 2))
    passes = [
        np.concatenate([block.models[0] for block in tensor.blocks(unit)])
        for unit in ("elements", "rows", "matrices", "tensor")
    ]
    assert all(np.array_equal(p, passes[0]) for p in passes)
    np.testing.assert_allclose(passes[0].reshape(700, 390), update.left @ update.right, rtol=0, atol=1e-4)
    assert not any(block.models[1].any() or (block.base is not None and block.base.any()) for block in tensor.blocks())


def test_parameters_by_layer_and_by_name(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    by_name = [{"filter": "q_proj", "value": 0.25}, {"value": [0.5, 1]}]
    models = [
        {"model": str(adapters["a"]), "parameters": {"weight": by_name}},
        {"model": str(adapters["b"]), "parameters": {"weight": 1}},
    ]
    config = parse(MergeConfig, {"merge_method": "task_arithmetic", "models": models, "adapter": {}}, where="recipe")
    out = merge(config, tmp_path / "out", Context())
    for name, weight in ((Q, 0.25), (V.replace("1", "0"), 0.5), (V, 1.0)):
        expected = weight * _delta(base, adapters["a"], name) + _delta(base, adapters["b"], name)
        np.testing.assert_allclose(_delta(base, out, name), expected, rtol=0, atol=1e-7)
    rows = {row["module"]: row for row in plan_merge(config, Context()).rows}
    assert rows["model.layers.0.self_attn.v_proj"] == {
        "module": "model.layers.0.self_attn.v_proj",
        "shape": [16, 32],
        "ranks in": "4, 4",
        "rank out": 8,
        "weight": "0.5, 1",
        "normalize": False,
        "lambda": 1.0,
    }


def test_the_same_bytes_again_and_other_seeds_other_bytes(adapters: dict[str, Path], tmp_path: Path) -> None:
    config = _recipe("dare_ties", list(adapters.values()), adapter={"rank": 4}, parameters={"density": 0.5})
    for name, ctx in (("one", Context(threads=1)), ("two", Context(threads=2)), ("other", Context(seed=1))):
        merge(config, tmp_path / name, ctx)
    files = ("adapter_model.safetensors", "adapter_config.json", "solera.json")
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    assert (tmp_path / "one" / files[0]).read_bytes() != (tmp_path / "other" / files[0]).read_bytes()


def test_embeddings_and_full_tensors(base: Path, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["model.norm"]}
    pair = [_adapter(base, tmp_path / str(i), i, **options) for i in (1, 2)]
    out = merge(_recipe("linear", pair, [1.0, 3.0]), tmp_path / "out", Context())
    models = [open_checkpoint(f"{base}+{a}", Context()) for a in (*pair, out)]
    for name in ("model.embed_tokens.weight", "model.norm.weight", Q):
        a, b, ours = (m.read(name) for m in models)
        np.testing.assert_allclose(ours, (a + 3 * b) / 4, rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is held in full by .* and only `linear` can merge"):
        merge(_recipe("task_arithmetic", pair), tmp_path / "no", Context())


def test_a_sum_of_zero_weights_is_an_adapter_that_does_nothing(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    models = [
        {"model": str(adapters["a"]), "parameters": {"weight": [{"filter": "q_proj", "value": 0}, {"value": 1}]}},
    ]
    config = parse(MergeConfig, {"merge_method": "task_arithmetic", "models": models, "adapter": {}}, where="recipe")
    out = merge(config, tmp_path / "out", Context())
    assert not _delta(base, out, Q).any()
    assert _delta(base, out, V).any()


BAD: dict[str, tuple[dict[str, Any], type[SoleraError], str]] = {
    "rank and energy": ({"adapter": {"rank": 2, "energy": 0.5}}, ConfigError, "a rank or an energy, not both"),
    "max_rank alone": ({"adapter": {"max_rank": 2}}, ConfigError, "max_rank bounds the ranks found by energy"),
    "no measure": ({"merge_method": "ties"}, ConfigError, "the merged update of ties has full rank; give `rank`"),
    "a typo": ({"adapter": {"rnak": 2}}, ConfigError, "rank"),
    "a method of weights": ({"merge_method": "slerp"}, ConfigError, "'slerp' needs the weights themselves"),
    "a base": ({"base_model": "x"}, ConfigError, "base_model: has no meaning where adapters are merged"),
    "scope": (
        {"merge_method": "ties", "adapter": {"rank": 2}, "parameters": {"scope": "model", "weight": 1.0}},
        ConfigError,
        "with `adapter:` use `tensor`",
    ),
    "a filter for nothing": (
        {"parameters": {"weight": [{"filter": "k_proj", "value": 1}, {"value": 2}]}},
        ConfigError,
        "filter 'k_proj' matches no tensor",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_recipes(kind: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    content, error, message = BAD[kind]
    recipe = {"merge_method": "task_arithmetic", "adapter": {}, "parameters": {"weight": 1.0}} | content
    models = [{"model": str(adapters[k])} for k in ("a", "b")]
    if recipe["merge_method"] == "slerp":
        recipe["parameters"] = {"t": 0.5}
    with pytest.raises(error, match=message):
        merge(parse(MergeConfig, {"models": models, **recipe}, where="recipe"), tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()


def _changed(source: Path, target: Path, settings: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(source, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any], str]] = {
    "another base": (
        {},
        lambda t: t.update({KEY: torch.zeros(4, 40)}),
        r"the update is \(32, 32\) in .* and \(32, 40\) in .*different base models",
    ),
    "rank": ({"r": 5}, lambda t: None, r"gives rank 5 for model.layers.*, but its factors have rank 4"),
    "not finite": ({}, lambda t: t[KEY].fill_(float("inf")), "holds values that are NaN or infinite"),
    "fused experts": ({"target_parameters": ["x"]}, lambda t: None, "`target_parameters`: LoRA of fused experts"),
    "held by one": (
        {},
        lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}),
        "not in all adapters in one shape, and what the others leave as it is only the base knows",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_adapters_that_cannot_be_merged(kind: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    settings, change, message = DAMAGED[kind]
    other = _changed(adapters["b"], tmp_path / "other", settings, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        merge(_recipe("task_arithmetic", [adapters["a"], other]), tmp_path / "out", Context())
    assert "other" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_dora_needs_its_base(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    dora = _adapter(base, tmp_path / "dora", 5, use_dora=True)
    with pytest.raises(CheckpointError, match=r"`use_dora`: DoRA rescales .* merge the models instead"):
        merge(_recipe("linear", [adapters["a"], dora]), tmp_path / "out", Context())


def test_models_among_adapters_are_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no LoRA adapter"):
        merge(_recipe("linear", [adapters["a"], base]), tmp_path / "out", Context())
    plain = _recipe("linear", list(adapters.values()), adapter=None)
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter, not a model; .* or add `adapter: \{\}`"):
        merge(plain, tmp_path / "out", Context())


def test_what_differs_is_noted(adapters: dict[str, Path], tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    other = _changed(adapters["b"], tmp_path / "other", {"base_model_name_or_path": "org/x"}, lambda t: None)
    merge(_recipe("linear", [adapters["c"], other]), tmp_path / "out", Context(progress=Notes()))
    assert "trained on different models" in notes[0]
    assert any("does not change 'model.layers.0.self_attn.v_proj'" in note for note in notes)
    assert notes[-1].startswith("relative error of the stored updates")
