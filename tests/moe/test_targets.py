"""Every family in every target that holds it: the identities, the keys, what has no home, and the choice."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_core.output import verify
from solera_merge.moe.build import plan_moe
from solera_merge.moe.config import MoeConfig
from solera_merge.moe.families import resolve
from solera_merge.moe.targets.choice import TARGETS, choose, exact_targets
from solera_merge.moe.targets.target import ENGINES, Sizes

Build = Callable[..., Path]

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
ROTATED_IN_PART = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}  # as Phi-4-mini
GRANITE = {
    "family": "granite",
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
# target, what `auto` chooses, the dense family's config
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("mixtral", {"family": "phi3"}),
    "phi3 longrope": ("mixtral", {"family": "phi3", "rope_parameters": LONGROPE}),
    "phi3 window": ("mixtral", {"family": "phi3", "sliding_window": 16}),
    "llama with biases of attention": ("granitemoe", {"attention_bias": True}),
    "llama": ("granitemoeshared", {}),
    "llama without biases": ("qwen2_moe", {}),
    "llama with wide heads": ("granitemoe", {"head_dim": 16}),
    "qwen2": ("qwen2_moe", {"family": "qwen2"}),
    "qwen2 tied": ("qwen2_moe", {"family": "qwen2", "tie_word_embeddings": True}),
    "qwen2 window": (
        "qwen2_moe",
        {"family": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen2 with q, k, v biases": ("granitemoe", {"family": "qwen2"}),
    "qwen3": ("qwen3_moe", {"family": "qwen3", "head_dim": 16}),
    "qwen3 biased, windowed, tied": (
        "qwen3_moe",
        {
            "family": "qwen3",
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 0,
        },
    ),
    "olmo2": ("flex_olmo", {"family": "olmo2"}),
    "olmo2 biased": ("flex_olmo", {"family": "olmo2", "attention_bias": True}),
    "granite": ("granitemoe", GRANITE),
    "granite tied": ("granitemoeshared", GRANITE | {"tie_word_embeddings": True, "attention_bias": True}),
    "gemma": ("granitemoe", {"family": "gemma", "head_dim": 16, "tie_word_embeddings": True, "pad_token_id": 0}),
}


# one of every target: what depends on the target alone is tried on these
FEW = ("phi3", "llama with biases of attention", "qwen2", "qwen3", "olmo2", "granite tied", "gemma")


def make_case(
    case: tuple[str, dict[str, Any]], root: Path, make_model: Callable[..., Path], build: Build, *, identical: bool
) -> dict[str, Any]:
    """A base, its feed-forward networks under another trunk, a sibling; and a MoE of two of them on the base."""
    target, config = case
    base = make_model(root / "base", **config)
    far = make_model(root / "far", base=base, seed=1, noise=0.3)
    other = root / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    experts = {"untuned": base, "other": other} if identical else {"other": other, "far": far}
    out = build(root / "moe", base, experts, target=target, top_k=2 if identical else 1)
    return {"target": target, "base": base, "far": far, "out": out}


@pytest.fixture(params=CASES.values(), ids=list(CASES), scope="module")
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Path],
    build: Build,
) -> dict[str, Any]:
    """Two experts that compute the same, two a token."""
    return make_case(request.param, tmp_path_factory.mktemp("same"), make_model, build, identical=True)


@pytest.fixture(params=FEW, scope="module")
def mixed(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Path],
    build: Build,
) -> dict[str, Any]:
    """Two different experts, one a token."""
    return make_case(CASES[request.param], tmp_path_factory.mktemp("mixed"), make_model, build, identical=False)


def tensors_of(directory: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                part = opened.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def checks_of(out: Path) -> dict[str, Any]:
    checks: dict[str, Any] = json.loads((out / "solera.json").read_text())["checks"]
    return checks


def test_identical_experts_give_the_dense_logits(case: dict[str, Any], logits: Callable[..., Any]) -> None:
    expected = logits(case["base"])
    assert (logits(case["out"]) - expected).abs().max() <= 1e-5 * max(float(expected.abs().max()), 1)
    assert (logits(case["far"]) - expected).abs().max() > 1e-2  # the test can fail
    assert any("same feed-forward networks" in warning for warning in checks_of(case["out"])["warnings"])
    assert verify(case["out"]) == []


def test_keys_shapes_and_config_are_those_that_save_pretrained_writes(case: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    config: Any = AutoConfig.from_pretrained(case["out"])
    auto.from_config(config).save_pretrained(tmp_path / "golden")
    written = json.loads((case["out"] / "config.json").read_text())
    golden = json.loads((tmp_path / "golden" / "config.json").read_text())
    assert tensors_of(case["out"]) == tensors_of(tmp_path / "golden")
    # Every field of the class is written out: none is left to a default of a later version.
    assert golden.keys() - {"transformers_version"} <= written.keys()
    assert written.keys() - golden.keys() <= {"rope_theta", "rope_scaling", "head_dim", "num_experts"}
    source = AutoConfig.from_pretrained(case["base"]).to_dict()
    told = {"architectures", "model_type", "transformers_version", "attention_multiplier", "embedding_multiplier"}
    told |= {"max_window_layers", "sliding_window", "layer_types", "rope_parameters"}
    for field in golden.keys() & source.keys() - told:
        assert golden[field] == source[field], field


def test_every_build_proves_both_experts(mixed: dict[str, Any]) -> None:
    checks = checks_of(mixed["out"])
    identity = checks["identity"]
    assert identity["specialists"].keys() == {"other", "far"}
    assert max(identity["identical_experts"], identity["on_trunk"], *identity["specialists"].values()) <= 1e-5
    assert checks["target"] == mixed["target"]
    assert checks["engines"].keys() == set(ENGINES)
    assert checks["engines"]["transformers"] == "exact"
    assert identity["trunk_distance"]["far"] > 0.02
    assert identity["ffn_distance"]["far"] > 0.02


def test_an_expert_lies_where_transformers_looks_for_it(mixed: dict[str, Any]) -> None:
    """T2 by hand: the second expert's networks in transformers' memory are the sibling's own."""
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    moe = auto.from_pretrained(mixed["out"], dtype=torch.float32)
    dense = auto.from_pretrained(mixed["far"], dtype=torch.float32).model.layers[1].mlp
    layer = moe.model.layers[1]
    experts = (layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe).experts
    fused = torch.cat([dense.gate_proj.weight, dense.up_proj.weight]) if hasattr(dense, "gate_proj") else None
    assert torch.equal(experts.gate_up_proj[1], dense.gate_up_proj.weight if fused is None else fused)
    assert torch.equal(experts.down_proj[1], dense.down_proj.weight)


def test_permuting_experts_and_routers_changes_no_logit(
    mixed: dict[str, Any], tmp_path: Path, logits: Callable[..., Any]
) -> None:
    """In the files: experts of their own exchange names, those in one tensor places; the router its rows."""
    permuted = tmp_path / "permuted"
    shutil.copytree(mixed["out"], permuted)
    weights = load_file(permuted / "model.safetensors")
    stacked = (TARGETS[mixed["target"]].router.partition("{layer}.")[2], "input_linear.weight", "output_linear.weight")
    changed: dict[str, np.ndarray] = {}
    for name, tensor in weights.items():
        if name.endswith(stacked) and "shared" not in name:
            changed[name] = np.ascontiguousarray(tensor[::-1])
        elif ".experts." in name:
            changed[name] = weights[_other(name)]
        else:
            changed[name] = tensor
    save_file(changed, permuted / "model.safetensors", metadata={"format": "pt"})
    assert (logits(permuted) - logits(mixed["out"])).abs().max() <= 1e-5


def _other(name: str) -> str:
    prefix, _, rest = name.partition(".experts.")
    return f"{prefix}.experts.{1 - int(rest[0])}{rest[1:]}"


def test_the_loss_reaches_the_router_only_with_two_experts_a_token(mixed: dict[str, Any]) -> None:
    """T9: with one expert and renormalised weights the weight is always 1, so nothing can be learned from it."""
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    target = TARGETS[mixed["target"]]
    ids = torch.arange(40)[None]
    for top_k in (1, 2):
        model = auto.from_pretrained(mixed["out"], dtype=torch.float32)
        routers = [target.router_module(model, layer) for layer in (0, 1)]
        for router in routers:
            router.top_k = top_k
        model(input_ids=ids, labels=ids).loss.backward()
        norms = [float(router.weight.grad.norm()) for router in routers]
        assert max(norms) <= 1e-6 if top_k == 1 else min(norms) > 1e-5, norms


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "granite tied"])
def test_a_narrower_expert_is_padded_exactly(
    tmp_path: Path, make_model: Callable[..., Path], build: Build, name: str
) -> None:
    """T5: the build compares each with the specialist at its own width."""
    target, config = CASES[name]
    base = make_model(tmp_path / "base", **config)
    wide = make_model(tmp_path / "wide", seed=1, intermediate_size=64, **config)
    identity = checks_of(build(tmp_path / "moe", base, {"untuned": base, "wide": wide}, target=target))["identity"]
    assert identity["ffn_distance"] == {"untuned": 0.0, "wide": None}
    assert max(identity["specialists"].values()) <= 1e-5


# --- fitted routers, adapters, widths, number formats


@pytest.mark.parametrize("family, target", [("phi3", "mixtral"), ("olmo2", "flex_olmo"), ("gemma", "granitemoe")])
def test_a_router_is_fitted_at_the_site_that_it_reads(
    tmp_path: Path,
    make_model: Callable[..., Path],
    build: Build,
    domain_text: dict[str, Path],
    family: str,
    target: str,
) -> None:
    """Experts of another width, too: the dense model that states are read from takes each at its own."""
    base = make_model(tmp_path / "base", family=family, pad_token_id=0)
    data = {"letters": domain_text["letters"], "digits": domain_text["digits"]}
    experts = {n: make_model(tmp_path / n, base=base, seed=i, noise=0.1) for i, n in enumerate(data)}
    experts["digits"] = make_model(tmp_path / "wide", family=family, pad_token_id=0, seed=5, intermediate_size=64)
    out = build(tmp_path / "moe", base, experts, data=data)
    checks = checks_of(out)
    assert checks["target"] == target
    assert checks["identity"]["ffn_distance"]["digits"] is None
    assert max(checks["identity"]["specialists"].values()) <= 1e-5
    accuracy = np.array([checks["router"]["route_accuracy"][name] for name in data])
    assert accuracy.mean() > 0.75, accuracy  # chance is a half


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft itself
@pytest.mark.parametrize("family, modules", [("phi3", ["gate_up_proj", "qkv_proj"]), ("gemma", ["up_proj", "q_proj"])])
def test_adapters_on_experts_and_on_the_trunk(
    tmp_path: Path, make_model: Callable[..., Path], build: Build, family: str, modules: list[str]
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base", family=family, pad_token_id=0)
    merged: dict[str, dict[str, Any]] = {}
    for seed, name in enumerate(("a", "b", "trunk")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        lora = get_peft_model(model, LoraConfig(r=2, target_modules=modules, init_lora_weights=False))  # pyright: ignore
        lora.save_pretrained(str(tmp_path / name))
        merged[name] = lora.merge_and_unload().state_dict()
    with_adapter = {name: Path(f"{base}+{tmp_path / name}") for name in merged}
    out = build(tmp_path / "moe", with_adapter["trunk"], {n: with_adapter[n] for n in "ab"})
    moe = load_file(out / "model.safetensors")
    d = 32
    if family == "phi3":
        q = merged["trunk"]["model.layers.1.self_attn.qkv_proj.weight"][:d]
        up = merged["b"]["model.layers.1.mlp.gate_up_proj.weight"][48:]
        found = moe["model.layers.1.block_sparse_moe.experts.1.w3.weight"]
    else:
        q = merged["trunk"]["model.layers.1.self_attn.q_proj.weight"]
        up = merged["b"]["model.layers.1.mlp.up_proj.weight"]
        found = moe["model.layers.1.block_sparse_moe.input_linear.weight"][1, 48:]
    np.testing.assert_allclose(moe["model.layers.1.self_attn.q_proj.weight"], q.numpy(), atol=1e-6)
    np.testing.assert_allclose(found, up.numpy(), atol=1e-6)


@pytest.mark.parametrize("asked", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["gemma", "qwen2", "granite"])
def test_half_precision(
    tmp_path: Path, make_model: Callable[..., Path], build: Build, name: str, asked: str | None
) -> None:
    target, config = CASES[name]
    base = make_model(tmp_path / "base", dtype="float32" if asked else "bfloat16", **config)
    experts = {n: make_model(tmp_path / n, base=base, seed=i, noise=0.1) for i, n in enumerate("ab")}
    out = build(tmp_path / "moe", base, experts, target=target, dtype=asked)
    checks = checks_of(out)
    assert checks["identity"]["identical_experts"] <= 1e-5
    assert checks["identity"]["agreement"] >= 0.9
    dtypes = {tensor: dtype for tensor, (_, dtype) in tensors_of(out).items()}
    # 1 + w of a Gemma's norms would lose what w was stored with
    wide = {tensor for tensor in dtypes if name == "gemma" and tensor.endswith("norm.weight")}
    assert {tensor for tensor, dtype in dtypes.items() if dtype != "BF16"} == wide


def test_a_part_of_mixed_windows_keeps_each_layer_its_own(
    tmp_path: Path, make_model: Callable[..., Path], build: Build, moe_config: Callable[..., MoeConfig]
) -> None:
    from solera_merge.moe.identity import check_identity
    from solera_merge.moe.inputs import open_inputs

    config = {"family": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    base = make_model(tmp_path / "base", num_hidden_layers=4, **config)
    experts = {n: make_model(tmp_path / n, base=base, seed=i, noise=0.1) for i, n in enumerate("ab")}
    out = build(tmp_path / "moe", base, experts)
    types = json.loads((out / "config.json").read_text())["layer_types"]
    assert types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    inputs = open_inputs(moe_config(base, experts), Context())
    part = check_identity(out, tmp_path / "scratch", inputs, top_k=2, dtype=None, limit=60_000)
    assert part.layers == [0, 3]
    assert part.identical_experts <= 1e-5


# --- the choice


FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": ({}, {"mixtral", "qwen2_moe", "granitemoe", "granitemoeshared"}),
    "llama attention_bias": ({"attention_bias": True}, {"granitemoe", "granitemoeshared"}),
    "llama mlp_bias": ({"mlp_bias": True}, set()),
    "mistral window": ({"model_type": "mistral"}, {"mixtral", "qwen2_moe"}),
    "phi3": ({"model_type": "phi3"}, {"mixtral", "qwen2_moe", "granitemoe", "granitemoeshared"}),
    "qwen2": ({"model_type": "qwen2"}, {"qwen2_moe", "granitemoe", "granitemoeshared"}),
    "qwen3": ({"model_type": "qwen3"}, {"qwen3_moe"}),
    "olmo2": ({"model_type": "olmo2"}, {"flex_olmo"}),
    "granite": (
        {"model_type": "granite", "residual_multiplier": 0.5},
        {"granitemoe", "granitemoeshared"},
    ),
    "gemma": ({"model_type": "gemma"}, {"granitemoe", "granitemoeshared"}),
}


@pytest.mark.parametrize("config, expected", FAMILIES.values(), ids=list(FAMILIES))
def test_the_exactness_table(config: dict[str, Any], expected: set[str]) -> None:
    fields = resolve(config, config.get("model_type", "llama"), "test")
    assert {target.name for target in exact_targets(fields)} == expected


@pytest.mark.parametrize(
    "config, engines, sizes, expected, doubted",
    [
        ({}, ENGINES, Sizes(4, 2, 64), "mixtral", []),
        ({"model_type": "mistral"}, ENGINES, Sizes(4, 2, 64), "mixtral", ["llama.cpp"]),
        ({"model_type": "qwen3"}, ENGINES, Sizes(4, 2, 64), "qwen3_moe", []),
        # llama.cpp does not renormalise in qwen2_moe; vLLM drops the biases in granitemoe
        ({"model_type": "qwen2"}, ENGINES, Sizes(4, 2, 64), "qwen2_moe", ["llama.cpp"]),
        ({"model_type": "qwen2"}, ENGINES, Sizes(2, 2, 64), "qwen2_moe", []),
        ({"model_type": "qwen2"}, ("transformers", "llama.cpp"), Sizes(4, 2, 64), "granitemoe", []),
        ({"model_type": "qwen2", "tie_word_embeddings": True}, ("llama.cpp",), Sizes(2, 2, 64), "granitemoe", []),
        ({"attention_bias": True}, ("transformers",), Sizes(4, 2, 64), "granitemoe", []),
        ({"attention_bias": True}, ENGINES, Sizes(4, 2, 64), "granitemoe", ["vllm"]),
        ({"model_type": "olmo2"}, ENGINES, Sizes(4, 2, 64), "flex_olmo", ["vllm", "llama.cpp"]),
        ({"model_type": "olmo2"}, ENGINES, Sizes(2, 2, 64), "flex_olmo", ["llama.cpp"]),
        ({"model_type": "gemma"}, ENGINES, Sizes(2, 2, 64), "granitemoe", ["vllm", "llama.cpp"]),
        ({"model_type": "granite", "head_dim": 64}, ENGINES, Sizes(2, 2, 64), "granitemoe", ["vllm", "llama.cpp"]),
    ],
)
def test_auto_follows_the_engines(
    config: dict[str, Any], engines: Any, sizes: Sizes, expected: str, doubted: list[str]
) -> None:
    fields = resolve(config, config.get("model_type", "llama"), "test")
    target, doubts = choose("auto", engines, fields, sizes, where="test")
    assert target.name == expected
    assert [doubt.partition(" ")[0] for doubt in doubts] == doubted


@pytest.mark.parametrize(
    "target, config, message",
    [
        ("auto", {"mlp_bias": True}, "mlp_bias is true: no home in any MoE format; .*solera route"),
        ("auto", {"mlp_bias": True, "attention_bias": True}, "mlp_bias is true: no home in any MoE"),
        ("mixtral", {"attention_bias": True}, "attention_bias is 'qkvo': no home in Mixtral; target granitemoe"),
        ("mixtral", {"model_type": "qwen3"}, "qk_norm is 'head': no home in Mixtral; target qwen3_moe has one"),
        ("qwen3_moe", {}, "qk_norm is 'none': no home in Qwen3Moe; target mixtral or"),
        ("flex_olmo", {}, "qk_norm is 'none': no home in FlexOlmo"),
        ("granitemoe", {"model_type": "mistral"}, "sliding_window is 4096: no home in GraniteMoe; target mixtral"),
        ("granitemoe", {"model_type": "olmo2"}, "qk_norm is 'width': no home in GraniteMoe; target flex_olmo"),
        ("mixtral", {"model_type": "gemma"}, r"embedding_multiplier is 55\.4.*: no home in Mixtral; target granitemoe"),
        ("mixtral", {"model_type": "granite", "logits_scaling": 8.0}, "attention_multiplier is 1.0: no home|logits_sc"),
        ("olmoe", {"model_type": "olmo2"}, "olmoe cannot be exact for any family.*use flex_olmo"),
    ],
)
def test_the_first_field_without_a_home_is_named(target: str, config: dict[str, Any], message: str) -> None:
    fields = resolve(config, config.get("model_type", "llama"), "trunk")
    with pytest.raises(CheckpointError, match=message):
        choose(target, ENGINES, fields, Sizes(2, 2, 64), where="trunk")


@pytest.mark.parametrize(
    "family, config, message",
    [
        ("gemma2", {}, "attn_logit_softcapping .*solera route"),
        ("gemma3_text", {"head_dim": 8}, "layer_types .*solera route"),
        (
            "phi3",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"}},
            "partial_rotary",
        ),
        ("cohere", {}, "logit_scale .*solera route"),
        ("olmo3", {}, "layer_types .*solera route"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True.*solera route"),
        ("llama", {"mlp_bias": True}, "mlp_bias is true: no home in any MoE format.*solera route"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "layer_types is .*: no home in any MoE format.*solera route",
        ),
    ],
)
def test_families_without_an_exact_target_are_refused_in_the_plan(
    tmp_path: Path,
    make_model: Callable[..., Path],
    moe_config: Callable[..., MoeConfig],
    family: str,
    config: dict[str, Any],
    message: str,
) -> None:
    base = make_model(tmp_path / "base", family=family, **config)
    models = {n: make_model(tmp_path / n, base=base, seed=i) for i, n in enumerate("ab")}
    with pytest.raises(CheckpointError, match=message):
        plan_moe(moe_config(base, models), Context())


def test_olmoe_cannot_be_exact(tmp_path: Path, make_model: Callable[..., Path], logits: Callable[..., Any]) -> None:
    """The run behind the refusal: OLMo-2's weights under OLMoE's names, every expert the same network."""
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    base = make_model(tmp_path / "base", family="olmo2")
    dense = load_file(base / "model.safetensors")
    content: Any = AutoConfig.from_pretrained(base).to_dict()
    keep = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    keep |= {"vocab_size", "rms_norm_eps", "max_position_embeddings", "rope_parameters", "pad_token_id"}
    config = AutoConfig.for_model(
        "olmoe", **{k: content[k] for k in keep}, num_experts=2, num_experts_per_tok=2, norm_topk_prob=True
    )
    auto.from_config(config).save_pretrained(tmp_path / "moe")
    moe = load_file(tmp_path / "moe" / "model.safetensors")
    for name in moe:
        prefix, _, rest = name.partition(".mlp.experts.")
        if rest:
            moe[name] = dense[f"{prefix}.mlp.{rest.partition('.')[2]}"]
        elif name in dense:
            moe[name] = dense[name]
        elif name.endswith("input_layernorm.weight"):  # the nearest that OLMo-2 has
            moe[name] = dense[name.replace("input_layernorm", "post_attention_layernorm")]
        elif name.endswith("post_attention_layernorm.weight"):
            moe[name] = dense[name.replace("post_attention_layernorm", "post_feedforward_layernorm")]
    save_file(moe, tmp_path / "moe" / "model.safetensors", metadata={"format": "pt"})
    assert (logits(tmp_path / "moe") - logits(base)).abs().max() > 0.1


def test_the_plan_shows_target_and_engines(
    tmp_path: Path, make_model: Callable[..., Path], moe_config: Callable[..., MoeConfig]
) -> None:
    make = partial(make_model, family="qwen2")
    base = make(tmp_path / "base")
    models = {n: make(tmp_path / n, base=base, seed=i) for i, n in enumerate("abc")}
    plan = plan_moe(moe_config(base, models), Context())
    assert plan.parameters["target"] == "qwen2_moe"
    matrix = plan.parameters["engine_matrix"]
    assert matrix["transformers"] == "exact"
    assert matrix["vllm"] == "exact"
    assert matrix["llama.cpp"].startswith("approximate: it never renormalises")
    assert any(warning.startswith("llama.cpp with target qwen2_moe: approximate") for warning in plan.warnings)
    assert {row["from"] for row in plan.rows} == {"trunk", "router", "zeros", *"abc"}
    quiet = plan_moe(moe_config(base, models, engines=["transformers", "vllm"]), Context())
    assert not any("llama.cpp" in warning for warning in quiet.warnings)


def test_experts_in_one_tensor_are_one_row_each_in_the_plan(
    tmp_path: Path, make_model: Callable[..., Path], moe_config: Callable[..., MoeConfig]
) -> None:
    base = make_model(tmp_path / "base", attention_bias=True)
    models = {n: make_model(tmp_path / n, base=base, seed=i) for i, n in enumerate("ab")}
    rows = plan_moe(moe_config(base, models), Context()).rows
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    assert [(row["from"], row["source"], row["shape"]) for row in rows if row["tensor"] == name] == [
        (expert, f"model.layers.0.mlp.{half}_proj.weight", [2, 96, 32]) for expert in "ab" for half in ("gate", "up")
    ]
