"""The stage as a whole: plan, build, what comes out, and what must not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, DataError, SoleraError, TargetError
from solera_core.output import verify
from solera_merge.moe.build import build_moe, plan_moe
from solera_merge.moe.config import MoeConfig

Build = Callable[..., Path]


def checks_of(out: Path) -> dict[str, Any]:
    checks: dict[str, Any] = json.loads((out / "solera.json").read_text())["checks"]
    return checks


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def fitted(
    tmp_path_factory: pytest.TempPathFactory,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "moe"
    return build(out, siblings["base"], specialists, data=domain_text)


# --- what comes out


def test_the_output_is_whole(fitted: Path, siblings: dict[str, Path]) -> None:
    assert verify(fitted) == []
    assert {p.name for p in fitted.iterdir()} == {p.name for p in siblings["base"].iterdir()} | {
        "solera.json",
        "router_statistics",
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (fitted / name).read_bytes() == (siblings["base"] / name).read_bytes()
    record = json.loads((fitted / "solera.json").read_text())
    assert record["kind"] == "moe"
    assert [entry["name"] for entry in record["inputs"]] == [
        "base",
        *("letters", "digits", "signs"),
        *("text of letters", "text of digits", "text of signs"),
    ]


def test_experts_and_trunk_are_copied_bit_by_bit(
    fitted: Path, siblings: dict[str, Path], specialists: dict[str, Path]
) -> None:
    moe, trunk = load_file(fitted / "model.safetensors"), load_file(siblings["base"] / "model.safetensors")
    for e, path in enumerate(specialists.values()):
        weights = load_file(path / "model.safetensors")
        for layer in (0, 1):
            for ours, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                found = moe.pop(f"model.layers.{layer}.block_sparse_moe.experts.{e}.{ours}.weight")
                np.testing.assert_array_equal(found, weights[f"model.layers.{layer}.mlp.{theirs}_proj.weight"])
    routers = [moe.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight") for layer in (0, 1)]
    assert all(router.shape == (3, 32) and np.abs(router).max() > 0 for router in routers)
    assert all(name in trunk for name in moe)
    for name, found in moe.items():
        np.testing.assert_array_equal(found, trunk[name])


def nll(model_dir: Path, text: Path) -> float:
    """Mean loss by transformers' own code, over the documents one by one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    losses: list[float] = []
    for line in text.read_text().splitlines()[:10]:
        ids = torch.tensor([tokenizer(json.loads(line)["text"]).input_ids[:128]])
        with torch.inference_mode():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    return float(np.mean(losses))


def test_a_fitted_router_finds_the_experts_and_a_random_or_a_misled_one_does_not(
    tmp_path: Path,
    fitted: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
) -> None:
    files = list(domain_text.values())
    random = build(tmp_path / "random", siblings["base"], specialists)
    names = list(domain_text)
    misled_text = dict(zip(names, [files[1], files[2], files[0]], strict=True))
    misled = build(tmp_path / "misled", siblings["base"], specialists, data=misled_text)

    def mean(model: Path) -> float:
        return float(np.mean([nll(model, file) for file in files]))

    own = float(np.mean([nll(specialists[name], domain_text[name]) for name in names]))
    values = {"own": own, "fitted": mean(fitted), "random": mean(random), "misled": mean(misled)}
    gap = values["random"] - values["own"]
    assert gap > 0.1, values  # specialists are really better: the comparison means something
    assert values["fitted"] < values["own"] + 0.25 * gap, values
    assert values["misled"] > values["own"] + 0.75 * gap, values

    facts = checks_of(fitted)["router"]
    assert facts["fit"] == "ridge"
    accuracy = np.array([facts["route_accuracy"][name] for name in names])
    assert accuracy.shape == (3, 2)
    assert accuracy.min() > 0.75
    held_out = facts["held_out_nll"]
    assert held_out["mean"] <= held_out["at_temperature_1"]
    assert held_out["mean"] == pytest.approx(np.mean(list(held_out["domains"].values())), abs=1e-3)
    oracle = float(np.mean(list(held_out["oracle_routed"].values())))
    assert held_out["mean"] == pytest.approx(oracle, abs=0.05)
    assert facts["temperature"] < 1  # confident routing pays here: a search stuck at 1 would fail


def test_the_temperature_scales_the_routers_and_nothing_else(
    tmp_path: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
    fitted: Path,
) -> None:
    made = {
        t: load_file(
            build(tmp_path / str(t), siblings["base"], specialists, data=domain_text, router={"temperature": t})
            / "model.safetensors"
        )
        for t in (1.0, 0.25)
    }
    auto = load_file(fitted / "model.safetensors")
    temperature = checks_of(fitted)["router"]["temperature"]
    for name, tensor in made[1.0].items():
        scale = 1.0 if "gate.weight" not in name else 4.0
        np.testing.assert_array_equal(made[0.25][name], scale * tensor)
        scale = 1.0 if "gate.weight" not in name else 1 / temperature
        np.testing.assert_allclose(auto[name], scale * tensor, rtol=1e-4)


def test_one_expert_a_token_needs_no_search(
    tmp_path: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
) -> None:
    out = build(tmp_path / "moe", siblings["base"], specialists, data=domain_text, top_k=1)
    facts = checks_of(out)["router"]
    assert facts["temperature"] == 1
    assert list(facts["tried"]) == ["1"]
    assert json.loads((out / "config.json").read_text())["num_experts_per_tok"] == 1


def test_same_recipe_same_bytes_on_any_number_of_threads(
    tmp_path: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
    fitted: Path,
) -> None:
    for threads in (1, 3):
        ctx = Context(threads=threads)
        again = build(tmp_path / str(threads), siblings["base"], specialists, data=domain_text, ctx=ctx)
        assert contents(again) == contents(fitted)
    other = build(tmp_path / "other", siblings["base"], specialists, data=domain_text, ctx=Context(seed=1))
    assert contents(other) != contents(fitted)


def test_permuting_the_experts_permutes_the_routers_and_changes_no_logit(
    tmp_path: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
    logits: Callable[..., Any],
    fitted: Path,
) -> None:
    order = ["signs", "letters", "digits"]
    out = build(tmp_path / "moe", siblings["base"], {name: specialists[name] for name in order}, data=domain_text)
    one, two = load_file(fitted / "model.safetensors"), load_file(out / "model.safetensors")
    for layer in (0, 1):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        expected = one[name][[list(specialists).index(expert) for expert in order]]
        np.testing.assert_allclose(two[name], expected, rtol=1e-3, atol=1e-4)
    assert abs(logits(out) - logits(fitted)).max() < 1e-3
    assert checks_of(out)["router"]["route_accuracy"].keys() == set(order)


def test_experts_of_other_widths_are_padded_exactly(
    tmp_path: Path, make_model: Callable[..., Path], build: Build, domain_text: dict[str, Path]
) -> None:
    base = make_model(tmp_path / "base")
    wide = make_model(tmp_path / "wide", seed=5, intermediate_size=80)
    narrow = make_model(tmp_path / "narrow", seed=6, intermediate_size=24)
    data = {"wide": domain_text["letters"], "narrow": domain_text["digits"]}
    out = build(tmp_path / "moe", base, {"wide": wide, "narrow": narrow}, data=data)
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 80
    moe, source = load_file(out / "model.safetensors"), load_file(narrow / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe.experts.1."
    for ours, theirs in (("w1", "gate"), ("w3", "up")):
        found = moe[f"{prefix}{ours}.weight"]
        np.testing.assert_array_equal(found[:24], source[f"model.layers.1.mlp.{theirs}_proj.weight"])
        assert not found[24:].any()
    np.testing.assert_array_equal(moe[f"{prefix}w2.weight"][:, :24], source["model.layers.1.mlp.down_proj.weight"])
    assert not moe[f"{prefix}w2.weight"][:, 24:].any()
    identity = checks_of(out)["identity"]  # compared with the specialists at their own widths
    assert max(identity["specialists"].values()) <= 1e-5
    assert identity["ffn_distance"] == {"wide": None, "narrow": None}


def test_half_precision_of_an_odd_width_is_proven_and_its_way_to_run_is_said(
    tmp_path: Path, siblings: dict[str, Path], make_model: Callable[..., Path], build: Build
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    models = [
        make_model(tmp_path / name, seed=i, intermediate_size=36) for i, name in enumerate(("base", "one", "two"))
    ]
    out = build(tmp_path / "moe", models[0], {"one": models[1], "two": models[2]}, dtype="bfloat16")
    assert checks_of(out)["identity"]["agreement"] >= 0.9
    (warning,) = [w for w in checks_of(out)["warnings"] if "no multiple of 8" in w]
    assert 'experts_implementation="eager"' in warning
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype="auto", experts_implementation="eager")
    assert bool(torch.isfinite(loaded(input_ids=torch.arange(20)[None]).logits).all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_rounds_everything_once(tmp_path: Path, siblings: dict[str, Path], build: Build, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file as load_torch

    out = build(tmp_path / "moe", siblings["base"], {n: siblings[n] for n in "ab"}, dtype=dtype)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    expert = load_torch(siblings["b"] / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    found = load_torch(out / "model.safetensors")
    assert {t.dtype for t in found.values()} == {getattr(torch, dtype)}
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    assert torch.equal(found[name], expert.to(getattr(torch, dtype)))


def test_a_trunk_in_bfloat16_makes_everything_bfloat16(
    tmp_path: Path, make_model: Callable[..., Path], siblings: dict[str, Path], build: Build
) -> None:
    trunk = make_model(tmp_path / "trunk", base=siblings["base"], dtype="bfloat16", shards=3)
    out = build(tmp_path / "moe", trunk, {n: siblings[n] for n in "ab"})
    assert checks_of(out)["identity"]["agreement"] >= 0.9
    record = json.loads((out / "config.json").read_text())
    assert record["dtype"] == "bfloat16"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft itself
def test_an_adapter_can_be_an_expert(
    tmp_path: Path, siblings: dict[str, Path], build: Build, domain_text: dict[str, Path]
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapters: dict[str, Path] = {}
    merged: dict[str, Any] = {}
    for seed, name in enumerate(("letters", "digits")):
        model = AutoModelForCausalLM.from_pretrained(siblings["base"], dtype=torch.float32)
        torch.manual_seed(seed)
        lora = get_peft_model(
            model,
            LoraConfig(r=4, target_modules=["up_proj", "down_proj"], init_lora_weights=False),  # pyright: ignore
        )
        lora.save_pretrained(str(tmp_path / name))
        merged[name] = lora.merge_and_unload().state_dict()
        adapters[name] = Path(f"{siblings['base']}+{tmp_path / name}")
    data = {name: domain_text[name] for name in adapters}
    out = build(tmp_path / "moe", siblings["base"], adapters, data=data)
    moe = load_file(out / "model.safetensors")
    for e, state in enumerate(merged.values()):
        found = moe[f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight"]
        np.testing.assert_allclose(found, state["model.layers.1.mlp.up_proj.weight"].numpy(), atol=1e-6)


# --- the plan


def test_the_plan_says_what_the_build_does(
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    moe_config: Callable[..., MoeConfig],
    fitted: Path,
) -> None:
    plan = plan_moe(moe_config(siblings["base"], specialists, data=domain_text), Context())
    assert json.loads(json.dumps(plan.to_json()))["stage"] == "moe"
    written_bytes = {str(p.relative_to(fitted)): p.stat().st_size for p in fitted.rglob("*.safetensors")}
    assert {w["what"]: w["bytes"] for w in plan.writes} == written_bytes
    written = load_file(fitted / "model.safetensors")
    assert {row["tensor"]: tuple(row["shape"]) for row in plan.rows} == {n: t.shape for n, t in written.items()}
    assert plan.parameters["parameters_total"] == sum(t.size for t in written.values())
    one_expert = sum(t.size for n, t in written.items() if ".experts.0." in n)
    assert plan.parameters["parameters_active"] == plan.parameters["parameters_total"] - one_expert
    assert plan.parameters["router"]["tokens_per_domain"] == 1500
    assert any("only the feed-forward networks are used" in warning for warning in plan.warnings)
    assert any("sequence_tokens: 256 is more than" in w and "sequences of 128 are used" in w for w in plan.warnings)
    assert [read["what"] for read in plan.reads][:2] == ["base_model", "expert 'letters'"]
    froms = {row["from"] for row in plan.rows}
    assert froms == {"trunk", "router", "letters", "digits", "signs"}


def test_the_plan_reads_no_weights(
    tmp_path: Path, siblings: dict[str, Path], moe_config: Callable[..., MoeConfig]
) -> None:
    code = (
        "import json, sys; from pathlib import Path; from solera_core.context import Context; "
        "from solera_core.strict import parse; from solera_merge.moe.config import MoeConfig; "
        "from solera_merge.moe.build import plan_moe; "
        "plan_moe(parse(MoeConfig, json.loads(sys.argv[1]), where='x'), Context()); "
        "sys.exit(', '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    config = moe_config(siblings["base"], {n: siblings[n] for n in "ab"})
    done = subprocess.run(
        [sys.executable, "-c", code, config.model_dump_json()],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr


def test_warnings_name_what_a_careful_person_wants_to_know(
    tmp_path: Path, make_model: Callable[..., Path], siblings: dict[str, Path], moe_config: Callable[..., MoeConfig]
) -> None:
    base = siblings["base"]
    far = make_model(tmp_path / "far", base=base, noise=0.1)
    config = json.loads((far / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e6
    (far / "config.json").write_text(json.dumps(config))
    warnings = plan_moe(moe_config(base, {"same": base, "far": far}), Context()).warnings
    assert any("expert 'same' is the base itself" in warning for warning in warnings)
    assert any("expert 'far': its rope_parameters is" in warning for warning in warnings)


# --- bad input: a clear error, and nothing left behind


def bad(
    tmp_path: Path,
    error: type[SoleraError],
    message: str,
    config: MoeConfig,
    *,
    in_plan: bool = True,
    ctx: Context | None = None,
) -> None:
    """Building fails with the message and leaves nothing; planning fails alike where headers can tell."""
    target = tmp_path / "outputs" / "moe"
    with pytest.raises(error, match=message):
        build_moe(config, target, ctx or Context())
    assert not target.parent.exists() or list(target.parent.iterdir()) == []
    if in_plan:
        with pytest.raises(error, match=message):
            plan_moe(config, ctx or Context())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but 2 in the trunk"),
        ({"hidden_size": 48, "head_dim": 8}, "hidden_size is 48, but 32 in the trunk"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, but 2"),
        ({"vocab_size": 310}, "vocab_size is 310, but 304"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but 'silu'"),
        ({"family": "mistral", "sliding_window": None}, "model_type 'mistral', but the trunk .* is 'llama'"),
        ({"attention_bias": True}, "attention_bias is 'qkvo', but 'none' in the trunk"),
        ({"mlp_bias": True}, "mlp_bias is True, but False in the trunk"),
        ({"family": "qwen2"}, "model_type 'qwen2', but the trunk .* is 'llama'"),
        ({"family": "gemma2"}, "attn_logit_softcapping .* has no home in any MoE format.*solera route"),
    ],
)
def test_an_expert_that_does_not_fit(
    tmp_path: Path,
    siblings: dict[str, Path],
    make_model: Callable[..., Path],
    moe_config: Callable[..., MoeConfig],
    change: dict[str, Any],
    message: str,
) -> None:
    odd = make_model(tmp_path / "odd", **change)
    config = moe_config(siblings["base"], {"a": siblings["a"], "odd": odd})
    bad(tmp_path, CheckpointError, f"expert 'odd'.*{message}", config)


def test_the_same_model_under_two_names(
    tmp_path: Path, siblings: dict[str, Path], moe_config: Callable[..., MoeConfig]
) -> None:
    (tmp_path / "link").symlink_to(siblings["a"])
    config = moe_config(siblings["base"], {"a": siblings["a"], "again": tmp_path / "link"})
    bad(tmp_path, ConfigError, "'a' and 'again' are the same model", config)
    shutil.copytree(siblings["a"], tmp_path / "copy")
    config = moe_config(siblings["base"], {"a": siblings["a"], "copy": tmp_path / "copy"})
    bad(tmp_path, ConfigError, "'a' and 'copy' hold the same weights", config, in_plan=False)


def test_a_missing_model(tmp_path: Path, siblings: dict[str, Path], moe_config: Callable[..., MoeConfig]) -> None:
    config = moe_config(siblings["base"], {"a": siblings["a"], "b": tmp_path / "nowhere"})
    bad(tmp_path, CheckpointError, "nowhere", config)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(
    tmp_path: Path, siblings: dict[str, Path], moe_config: Callable[..., MoeConfig], value: float
) -> None:
    shutil.copytree(siblings["b"], tmp_path / "b")
    weights = load_file(tmp_path / "b" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    config = moe_config(siblings["base"], {"a": siblings["a"], "b": tmp_path / "b"})
    message = r"/b: tensor model.layers.1.mlp.up_proj.weight: .*experts.1.w3.weight.*NaN or infinite"
    bad(tmp_path, CheckpointError, message, config, in_plan=False)


def test_values_too_large_for_the_dtype(
    tmp_path: Path, siblings: dict[str, Path], moe_config: Callable[..., MoeConfig]
) -> None:
    shutil.copytree(siblings["base"], tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    config = moe_config(tmp_path / "base", {n: siblings[n] for n in "ab"}, dtype="float16")
    bad(tmp_path, CheckpointError, "too large for F16", config, in_plan=False)


def test_a_truncated_file(tmp_path: Path, siblings: dict[str, Path], moe_config: Callable[..., MoeConfig]) -> None:
    shutil.copytree(siblings["b"], tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    bad(tmp_path, CheckpointError, "truncated", moe_config(siblings["base"], {"a": siblings["a"], "b": tmp_path / "b"}))


def test_text_that_is_missing_or_too_little(
    tmp_path: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    moe_config: Callable[..., MoeConfig],
    write_jsonl: Callable[..., Path],
) -> None:
    data = domain_text | {"signs": tmp_path / "nowhere.jsonl"}
    bad(tmp_path, DataError, "nowhere.jsonl: no such file", moe_config(siblings["base"], specialists, data=data))
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "+"}, {"text": "-"}])
    config = moe_config(siblings["base"], specialists, data=domain_text | {"signs": short})
    message = r"router.data.signs: \d+ tokens to fit on .* too little: at least 32 are needed.* 1500 are asked for"
    bad(tmp_path, DataError, message, config, in_plan=False)
    config = moe_config(siblings["base"], specialists, data=domain_text, router={"tokens_per_domain": 20})
    bad(tmp_path, ConfigError, "tokens_per_domain: 20 is too little: a router has 32 inputs", config)


def test_less_text_than_asked_for_is_a_warning(
    tmp_path: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
) -> None:
    router = {"tokens_per_domain": 1_000_000}
    out = build(tmp_path / "moe", siblings["base"], specialists, data=domain_text, router=router)
    warnings = checks_of(out)["warnings"]
    assert any("router.data.letters" in w and "1000000 were asked for" in w for w in warnings)
    assert any(f"{checks_of(out)['router']['tokens_fit']['letters']} tokens to fit on" in w for w in warnings)


def test_a_trunk_without_a_tokenizer(
    tmp_path: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    moe_config: Callable[..., MoeConfig],
    build: Build,
) -> None:
    shutil.copytree(siblings["base"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    config = moe_config(tmp_path / "bare", specialists, data=domain_text)
    bad(tmp_path, CheckpointError, "has no tokenizer", config, in_plan=False)
    out = build(tmp_path / "moe", tmp_path / "bare", specialists)  # a random router needs none
    assert any("no tokenizer files" in warning for warning in checks_of(out)["warnings"])


def test_a_trunk_whose_tokenizer_cannot_be_read(
    tmp_path: Path, siblings: dict[str, Path], moe_config: Callable[..., MoeConfig]
) -> None:
    """All files alike, so that no comparison finds it."""
    for name in ("base", "a", "b"):
        shutil.copytree(siblings[name], tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text("{")
    config = moe_config(tmp_path / "base", {n: tmp_path / n for n in "ab"})
    bad(tmp_path, CheckpointError, r"base/tokenizer\.json: cannot be read", config)


def test_a_target_in_the_way_is_refused_or_replaced(tmp_path: Path, siblings: dict[str, Path], build: Build) -> None:
    experts = {n: siblings[n] for n in "ab"}
    out = build(tmp_path / "moe", siblings["base"], experts)
    before = contents(out)
    with pytest.raises(TargetError, match="exists and is not empty"):
        build(out, siblings["base"], experts)
    assert contents(out) == before
    build(out, siblings["base"], experts, ctx=Context(seed=1, overwrite=True))
    assert contents(out).keys() == before.keys()
    assert contents(out) != before
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]


def test_no_room_is_found_beforehand(
    tmp_path: Path, siblings: dict[str, Path], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    from solera_core.errors import DiskFullError

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(DiskFullError, match="free some space"):
        build(tmp_path / "moe", siblings["base"], {n: siblings[n] for n in "ab"})
    assert list(tmp_path.iterdir()) == []


def test_kill_leaves_no_target_and_the_next_run_is_whole(
    tmp_path: Path, siblings: dict[str, Path], moe_config: Callable[..., MoeConfig], build: Build
) -> None:
    experts = {n: siblings[n] for n in "ab"}
    code = (
        "import json, sys; from pathlib import Path; from solera_core.context import Context; "
        "from solera_core.strict import parse; from solera_merge.moe.config import MoeConfig; "
        "from solera_merge.moe.build import build_moe; "
        "build_moe(parse(MoeConfig, json.loads(sys.argv[1]), where='x'), Path(sys.argv[2]), Context())"
    )
    target = tmp_path / "outputs" / "moe"
    process = subprocess.Popen(
        [sys.executable, "-c", code, moe_config(siblings["base"], experts).model_dump_json(), str(target)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    staging = target.parent / ".moe.solera-staging"
    deadline = time.monotonic() + 60
    while not (staging / "model.safetensors").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not target.exists()
    build(target, siblings["base"], experts)
    assert verify(target) == []
    assert [p.name for p in target.parent.iterdir()] == ["moe"]


# --- a real model


def test_a_real_pretrained_model(tmp_path: Path, shared_data: Path, build: Build, logits: Callable[..., Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = shared_data / "weights" / "stories260K-hf"
    text = shared_data / "text"
    names = {"plays": "tinyshakespeare.txt", "articles": "wikitext2-valid.txt", "names": "names.txt"}
    experts: dict[str, Path] = {}
    for seed, name in enumerate(names):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".mlp." in key:
                    parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
        experts[name] = tmp_path / name
        model.save_pretrained(experts[name])
        for file in base.glob("tokenizer*"):
            shutil.copy(file, experts[name] / file.name)
    data = {name: text / file for name, file in names.items()}
    out = build(tmp_path / "moe", base, experts, data=data, router={"tokens_per_domain": 4000, "temperature": 0.25})
    checks = checks_of(out)
    assert checks["identity"]["layers"] == [0, 1, 2, 3, 4]
    assert checks["identity"]["identical_experts"] <= 1e-5
    assert set(checks["identity"]["trunk_distance"].values()) == {0.0}
    accuracy = {name: np.mean(values) for name, values in checks["router"]["route_accuracy"].items()}
    assert np.mean(list(accuracy.values())) > 0.6, accuracy  # chance is a third
    assert abs(logits(out) - logits(base)).max() < 5.0
    assert verify(out) == []
