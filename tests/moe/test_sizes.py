"""Sizes: a shared expert, neurons that experts have in common, and slimmer experts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError
from solera_core.output import verify
from solera_merge.moe.build import plan_moe
from solera_merge.moe.config import MoeConfig
from solera_merge.moe.dense import FFN, read_dense
from solera_merge.moe.neurons import Group, averaged, compose

Build = Callable[..., Path]


def checks_of(out: Path) -> dict[str, Any]:
    checks: dict[str, Any] = json.loads((out / "solera.json").read_text())["checks"]
    return checks


def changed(source: Path, target: Path, neurons: slice, *, seed: int, size: float = 0.3) -> Path:
    """A copy of a model in which only these neurons of every layer have other weights."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    draw = np.random.default_rng(seed)
    for name, values in weights.items():
        if ".mlp." in name:
            part = (slice(None), neurons) if "down_proj" in name else (neurons, slice(None))
            values[part] += size * draw.standard_normal(values[part].shape).astype(np.float32) * values.std()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def half_equal(tmp_path_factory: pytest.TempPathFactory, siblings: dict[str, Path]) -> dict[str, Path]:
    """Specialists that differ from each other, and from the base, in their last neurons only: a quarter of them."""
    root = tmp_path_factory.mktemp("half-equal")
    width = json.loads((siblings["base"] / "config.json").read_text())["intermediate_size"]
    return {
        name: changed(siblings["base"], root / name, slice(3 * width // 4, width), seed=seed)
        for seed, name in enumerate(("letters", "digits", "signs"))
    }


def two(data: dict[str, Path]) -> dict[str, Path]:
    return {name: data[name] for name in ("letters", "digits")}


# --- neurons in common


@pytest.mark.parametrize("target, score", [("granitemoeshared", "activation"), ("qwen2_moe", "weight")])
def test_shared_neurons_that_agree_change_no_logit(
    tmp_path: Path,
    siblings: dict[str, Path],
    half_equal: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
    logits: Callable[..., Any],
    target: str,
    score: str,
) -> None:
    data = domain_text if score == "activation" else None
    router = {"fit": "random"}  # the same in both, as long as the target is
    plain = build(tmp_path / "plain", siblings["base"], half_equal, data=data, router=router, target=target)
    shared = {"neurons": 0.5, "score": score}
    out = build(tmp_path / "out", siblings["base"], half_equal, data=data, router=router, target=target, shared=shared)
    assert verify(out) == []
    whole = logits(plain)
    assert abs(logits(out) - whole).max() < 1e-5 * max(1.0, float(abs(whole).max()))
    config = json.loads((out / "config.json").read_text())
    width = json.loads((siblings["base"] / "config.json").read_text())["intermediate_size"]
    routed = config["intermediate_size" if target == "granitemoeshared" else "moe_intermediate_size"]
    key = "shared_intermediate_size" if target == "granitemoeshared" else "shared_expert_intermediate_size"
    assert (routed, config[key]) == (width // 2, width // 2)
    sizes = checks_of(out)["sizes"]
    assert max(sizes["differences_given_up"]) < 1e-9
    before, after = sizes["rows"]
    assert (before["setting"], after["setting"]) == ("unsplit", "built")
    assert after["parameters_total"] < before["parameters_total"]
    assert after["parameters_active"] < before["parameters_active"]  # shared neurons run once, not top_k times
    if score == "activation":
        assert after["oracle_routed_nll"]["mean"] == pytest.approx(before["oracle_routed_nll"]["mean"], abs=1e-4)
        assert set(after["oracle_routed_nll"]["domains"]) == set(half_equal)
    files = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert after["bytes"] == pytest.approx(files, rel=0.1)


def test_neurons_that_differ_are_averaged_and_the_loss_says_so(
    tmp_path: Path, siblings: dict[str, Path], specialists: dict[str, Path], domain_text: dict[str, Path], build: Build
) -> None:
    """Neuron 0 of the last layer is all that the specialists have: it stays routed; without it they are all alike."""
    shared = {"neurons": 0.9}
    out = build(tmp_path / "out", siblings["base"], specialists, data=domain_text, shared=shared)
    built, base = load_file(out / "model.safetensors"), load_file(siblings["base"] / "model.safetensors")
    sizes = checks_of(out)["sizes"]
    rows = {row["setting"]: row["oracle_routed_nll"] for row in sizes["rows"]}
    assert rows["built"]["mean"] == pytest.approx(rows["unsplit"]["mean"], abs=1e-3)
    width = base["model.layers.0.mlp.gate_proj.weight"].shape[0]
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    if name in built:  # granitemoeshared
        assert built[name].shape[1] == 2 * (width - sizes["shared_width"])
    # the same of a MoE that is really run, by transformers, with every token sent to its expert
    assert checks_of(out)["router"]["held_out_nll"]["oracle_routed"] == pytest.approx(
        rows["built"]["domains"], abs=1e-3
    )


def test_a_shared_neuron_is_the_mean_of_the_experts(tmp_path: Path, siblings: dict[str, Path], build: Build) -> None:
    experts = {name: siblings[name] for name in "ab"}
    settings = {"shared": {"neurons": 0.25, "score": "weight"}, "target": "qwen2_moe"}
    out = build(tmp_path / "out", siblings["base"], experts, **settings)
    built = load_file(out / "model.safetensors")
    a, b = (load_file(path / "model.safetensors") for path in experts.values())
    mean = {n: (a[n].astype(np.float64) + b[n]) / 2 for n in a}
    gate = built["model.layers.0.mlp.shared_expert.gate_proj.weight"]
    source = mean["model.layers.0.mlp.gate_proj.weight"]
    at = [int(abs(source - row).sum(axis=1).argmin()) for row in gate]
    assert at == sorted(set(at))
    np.testing.assert_allclose(gate, source[at], atol=1e-7)
    up = built["model.layers.0.mlp.shared_expert.up_proj.weight"]
    np.testing.assert_allclose(up, mean["model.layers.0.mlp.up_proj.weight"][at], atol=1e-7)
    down = built["model.layers.0.mlp.shared_expert.down_proj.weight"]  # under sigmoid(0) = 1/2
    np.testing.assert_allclose(down, 2 * mean["model.layers.0.mlp.down_proj.weight"][:, at], atol=1e-7)
    distance = sum(
        ((e[n] - mean[n]) ** 2).sum(axis=0 if "down" in n else 1) / (mean[n] ** 2).sum()
        for e in (a, b)
        for n in (f"model.layers.0.{ffn}" for ffn in FFN)
    )
    assert at == sorted(np.argsort(distance)[: len(at)].tolist())
    rest = [j for j in range(len(source)) if j not in at]
    for e, weights in enumerate((a, b)):
        found = built[f"model.layers.0.mlp.experts.{e}.up_proj.weight"]
        np.testing.assert_array_equal(found, weights["model.layers.0.mlp.up_proj.weight"][rest])


def test_the_activation_score_is_what_the_average_neuron_would_change(
    siblings: dict[str, Path], domain_text: dict[str, Path]
) -> None:
    """Against the definition, by brute force."""
    import torch

    from solera_merge.moe.sizes import _Networks
    from solera_merge.moe.states import LayerInputs, RouterStatistics, Taught

    models = [read_dense(name, open_checkpoint(str(siblings[name]), Context())) for name in "ab"]
    states = [np.random.default_rng(e).standard_normal((700, 32)).astype(np.float32) for e in range(2)]
    del domain_text

    class Text:
        def __init__(self, tokens: int) -> None:
            self.tokens = tokens

    class Inputs(LayerInputs):
        def blocks(self) -> Any:
            for e, x in enumerate(states):
                yield x, np.tile(np.eye(2)[e], (len(x), 1))

    empty = RouterStatistics(np.zeros((32, 32)), np.zeros((2, 32)), np.zeros(2))
    texts: Any = [Taught(e, "", Text(700)) for e in range(2)]  # type: ignore[arg-type]
    found = _Networks.read(models, 1).measure(Inputs(1, empty, texts, None))
    nets = [[m.checkpoint.read(f"model.layers.1.{n}").astype(np.float64) for n in FFN] for m in models]
    mean = [np.mean([net[i] for net in nets], axis=0) for i in range(3)]

    def out(net: list[np.ndarray], x: np.ndarray) -> np.ndarray:
        z = x @ net[0].T
        silu: np.ndarray = z / (1 + np.exp(-z)) * (x @ net[1].T)
        return silu

    expected = np.zeros(len(mean[0]))
    for e, x in enumerate(states):
        own, average = out(nets[e], x), out(mean, x)
        for j in range(len(expected)):
            change = own[:, [j]] * nets[e][2][:, j] - average[:, [j]] * mean[2][:, j]
            expected[j] += (change**2).sum(axis=1).mean()
        worth = np.abs(own).mean(axis=0) * np.linalg.norm(nets[e][2], axis=0)
        np.testing.assert_allclose(found.contributions[e], worth, rtol=1e-4)
    np.testing.assert_allclose(found.differences, expected, rtol=1e-3)
    assert torch.get_num_threads() >= 1


# --- a whole model as the shared expert


@pytest.mark.parametrize("target", ["granitemoeshared", "qwen2_moe"])
def test_a_shared_model_that_all_experts_equal_gives_back_the_dense_model(
    tmp_path: Path, siblings: dict[str, Path], build: Build, logits: Callable[..., Any], target: str
) -> None:
    experts = {"one": siblings["base"], "two": changed(siblings["base"], tmp_path / "two", slice(0, 1), seed=0, size=0)}
    for name in experts:
        data = json.loads((experts[name] / "config.json").read_text())
        assert data["model_type"] == "llama"
    # equal weights are refused; one value that plays no part tells them apart
    weights = load_file(experts["two"] / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, experts["two"] / "model.safetensors", metadata={"format": "pt"})
    out = build(tmp_path / "out", siblings["base"], experts, target=target, shared={"model": str(siblings["base"])})
    assert abs(logits(out) - logits(siblings["base"])).max() < 1e-5
    assert verify(out) == []
    names = [entry["name"] for entry in json.loads((out / "solera.json").read_text())["inputs"]]
    assert names == ["base", "one", "two", "shared"]


def test_mergekits_shared_expert_is_read(tmp_path: Path, siblings: dict[str, Path], logits: Callable[..., Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from solera_core.strict import parse
    from solera_merge.moe.build import build_moe

    raw = {
        "base_model": str(siblings["base"]),
        "architecture": "qwen2",
        "gate_mode": "random",
        "experts": [{"source_model": str(siblings[name])} for name in "ab"],
        "shared_experts": [{"source_model": str(siblings["base"]), "residual_scale": 0.2, "positive_prompts": ["x"]}],
    }
    config = parse(MoeConfig, raw, where="test")
    assert config.shared is not None
    assert (config.shared.residual_scale, config.shared.routed_scale) == (0.1, 1.0)
    out = build_moe(config, tmp_path / "out", Context())
    assert torch.isfinite(logits(out)).all()
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    shared = model.model.layers[0].mlp.shared_expert
    base = load_file(siblings["base"] / "model.safetensors")
    down = base["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_allclose(shared.down_proj.weight.detach().numpy(), 0.2 * down, rtol=1e-6)
    assert not model.model.layers[0].mlp.shared_expert_gate.weight.any()


def test_experts_and_a_shared_model_of_other_widths(
    tmp_path: Path, make_model: Callable[..., Path], build: Build, domain_text: dict[str, Path]
) -> None:
    base = make_model(tmp_path / "base")
    wide = make_model(tmp_path / "wide", seed=5, intermediate_size=80)
    narrow = make_model(tmp_path / "narrow", seed=6, intermediate_size=24)
    experts = {"letters": wide, "digits": narrow}
    settings: dict[str, Any] = {"shared": {"model": str(base), "residual_scale": 0.25, "routed_scale": 1.0}}
    out = build(tmp_path / "out", base, experts, data=two(domain_text), slim={"keep": 0.5}, **settings)
    sizes = checks_of(out)["sizes"]
    assert sizes["expert_width"] == 40
    assert [row["setting"] for row in sizes["rows"]] == ["unsplit", "shared", "slim, not refitted", "built"]
    assert sizes["contribution_dropped"]["digits"] == 0  # it is narrower than what is kept
    assert 0 < sizes["contribution_dropped"]["letters"] < 0.5


# --- slimmer experts


@pytest.mark.parametrize("family", ["phi3", "qwen3"])
def test_slim_experts_lose_little_and_a_refit_loses_less(
    tmp_path: Path, make_model: Callable[..., Path], domain_text: dict[str, Path], build: Build, family: str
) -> None:
    kind: dict[str, Any] = {"phi3": {"pad_token_id": 0, "eos_token_id": 2}}.get(family, {})
    base = make_model(tmp_path / "base", family=family, **kind)
    experts = {n: make_model(tmp_path / n, family=family, seed=i, **kind) for i, n in enumerate(two(domain_text), 1)}
    out = build(tmp_path / "out", base, experts, data=two(domain_text), slim={"keep": 0.5})
    sizes = checks_of(out)["sizes"]
    losses = {row["setting"]: row["oracle_routed_nll"]["mean"] for row in sizes["rows"]}
    width = json.loads((base / "config.json").read_text())["intermediate_size"]
    assert sizes["expert_width"] == width // 2
    config = json.loads((out / "config.json").read_text())
    assert config.get("moe_intermediate_size", config["intermediate_size"]) == width // 2
    assert abs(losses["built"] - losses["unsplit"]) < abs(losses["slim, not refitted"] - losses["unsplit"]) + 0.02
    total = [row["parameters_total"] for row in sizes["rows"]]
    assert total[0] > total[1] == total[2]


def test_dropping_what_adds_nothing_changes_nothing(
    tmp_path: Path,
    siblings: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
    logits: Callable[..., Any],
) -> None:
    width = json.loads((siblings["base"] / "config.json").read_text())["intermediate_size"]
    experts: dict[str, Path] = {}
    for name, source in zip(two(domain_text), "ab", strict=True):
        experts[name] = changed(siblings[source], tmp_path / name, slice(0, 1), seed=0)
        weights = load_file(experts[name] / "model.safetensors")
        for key in weights:
            if "down_proj" in key:
                weights[key][:, 1::2] = 0
        save_file(weights, experts[name] / "model.safetensors", metadata={"format": "pt"})
    options: dict[str, Any] = {"data": two(domain_text), "router": {"fit": "random"}}
    plain = build(tmp_path / "plain", siblings["base"], experts, **options)
    slim = build(tmp_path / "slim", siblings["base"], experts, slim={"keep": 0.5}, **options)
    assert abs(logits(slim) - logits(plain)).max() < 1e-4
    moe = load_file(slim / "model.safetensors")
    gate = load_file(experts["letters"] / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"]
    assert width % 2 == 0
    np.testing.assert_array_equal(moe["model.layers.0.block_sparse_moe.experts.0.w1.weight"], gate[0::2])


def test_a_refit_is_the_least_squares_solution(
    tmp_path: Path, siblings: dict[str, Path], domain_text: dict[str, Path], build: Build
) -> None:
    """Half of the neurons are copies of the other half: dropped, their output moves to their twins."""
    experts: dict[str, Path] = {}
    for name, source in zip(two(domain_text), "ab", strict=True):
        experts[name] = changed(siblings[source], tmp_path / name, slice(0, 1), seed=0)
        weights = load_file(experts[name] / "model.safetensors")
        for key, values in weights.items():
            if "gate_proj" in key or "up_proj" in key:
                values[1::2] = values[0::2]
            if "down_proj" in key:
                values[:, 1::2] = 0.05 * values[:, 0::2]
        save_file(weights, experts[name] / "model.safetensors", metadata={"format": "pt"})
    slim = {"keep": 0.5, "ridge": 1e-9}
    out = build(tmp_path / "out", siblings["base"], experts, data=two(domain_text), slim=slim)
    moe = load_file(out / "model.safetensors")
    down = load_file(experts["letters"] / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    found = moe["model.layers.1.block_sparse_moe.experts.0.w2.weight"]
    np.testing.assert_allclose(found, 1.05 * down[:, 0::2], atol=3e-4)
    rows = checks_of(out)["sizes"]["rows"]
    losses = [row["oracle_routed_nll"]["mean"] for row in rows]
    assert losses[2] == pytest.approx(losses[0], abs=1e-3)


def test_both_at_once_in_half_precision(
    tmp_path: Path, siblings: dict[str, Path], specialists: dict[str, Path], domain_text: dict[str, Path], build: Build
) -> None:
    settings: dict[str, Any] = {"shared": {"neurons": 0.5}, "slim": {"keep": 0.5}, "dtype": "bfloat16"}
    out = build(tmp_path / "out", siblings["base"], specialists, data=domain_text, **settings)
    identity = checks_of(out)["identity"]
    assert max(identity["identical_experts"], identity["on_trunk"], *identity["specialists"].values()) <= 1e-5
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_neurons_are_taken_in_any_range(siblings: dict[str, Path]) -> None:
    """Views are read in pieces by the writer: any range of elements is that of the whole."""
    a, b = (read_dense(name, open_checkpoint(str(siblings[name]), Context())) for name in "ab")
    mean = averaged([a, b])
    groups = [Group(a, [np.array([1, 4, 5])] * 2), Group(mean, [np.array([0, 7])] * 2, scale=0.5)]
    made = compose(a, groups)
    assert made.width == 5
    for name, shape in (("gate_proj", (5, 32)), ("down_proj", (32, 5))):
        full = f"model.layers.1.mlp.{name}.weight"
        whole = made.checkpoint.read(full)
        own = a.checkpoint.read(full)
        other = (own + b.checkpoint.read(full)) / 2
        if name == "down_proj":
            expected = np.concatenate([own[:, [1, 4, 5]], 0.5 * other[:, [0, 7]]], axis=1)
        else:
            expected = np.concatenate([own[[1, 4, 5]], other[[0, 7]]])
        assert whole.shape == shape
        np.testing.assert_allclose(whole, expected, atol=1e-7)
        for start, stop in ((0, 7), (3, 64), (31, 33), (100, 160), (159, 160)):
            np.testing.assert_array_equal(made.checkpoint.read_flat(full, start, stop), whole.reshape(-1)[start:stop])


# --- what is refused


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shared": {"neurons": 0}}, "shared.neurons: .*greater than 0"),
        ({"shared": {"neurons": 1.0}}, "shared.neurons: .*less than 1"),
        ({"shared": {}}, "shared: give either `model` .* or `neurons`"),
        ({"shared": {"neurons": 0.5, "model": "x"}}, "shared: give either `model`"),
        ({"shared": {"neurons": 0.5, "routed_scale": 1}}, "routed_scale: only with `model`"),
        ({"shared": {"model": "x", "score": "weight"}}, "score: only with `neurons`"),
        ({"shared": {"neurons": 0.5}}, "shared.score: activation needs text .*router.data"),
        ({"shared": {"neuron": 0.5}}, r"shared.neuron: unknown key \(did you mean 'neurons'\?\)"),
        ({"slim": {"keep": 1}}, "slim.keep: .*less than 1"),
        ({"slim": {"keep": 0.5}}, "slim: needs text of every expert's domain"),
    ],
)
def test_settings_that_are_refused(
    siblings: dict[str, Path], moe_config: Callable[..., MoeConfig], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        moe_config(siblings["base"], {name: siblings[name] for name in "ab"}, **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target": "mixtral"}, "target mixtral has no shared expert; qwen2_moe and granitemoeshared have one"),
        ({"engines": ["vllm"]}, None),
    ],
)
def test_a_target_without_a_shared_expert_is_refused(
    siblings: dict[str, Path], moe_config: Callable[..., MoeConfig], settings: dict[str, Any], message: str | None
) -> None:
    experts = {name: siblings[name] for name in "ab"}
    config = moe_config(siblings["base"], experts, shared={"neurons": 0.5, "score": "weight"}, **settings)
    if message is None:
        assert plan_moe(config, Context()).parameters["target"] in ("qwen2_moe", "granitemoeshared")
        return
    with pytest.raises(CheckpointError, match=message):
        plan_moe(config, Context())


def test_a_family_without_a_shared_home_and_experts_of_other_widths_are_refused(
    tmp_path: Path, make_model: Callable[..., Path], moe_config: Callable[..., MoeConfig]
) -> None:
    shared = {"neurons": 0.5, "score": "weight"}
    qwen = {n: make_model(tmp_path / n, family="qwen3", seed=i) for i, n in enumerate(("base", "a", "b"))}
    with pytest.raises(CheckpointError, match=r"no format that holds it has a shared expert; .*use `slim`"):
        plan_moe(moe_config(qwen["base"], {n: qwen[n] for n in "ab"}, shared=shared), Context())
    base = make_model(tmp_path / "llama")
    experts = {
        "a": make_model(tmp_path / "same", seed=1),
        "b": make_model(tmp_path / "w", seed=2, intermediate_size=80),
    }
    with pytest.raises(CheckpointError, match=r"shared.neurons: .*80 neurons wide, .*only models of one width"):
        plan_moe(moe_config(base, experts, shared=shared), Context())


def test_the_plan_says_what_will_be_written(
    tmp_path: Path, siblings: dict[str, Path], moe_config: Callable[..., MoeConfig], build: Build
) -> None:
    experts = {name: siblings[name] for name in "ab"}
    settings: dict[str, Any] = {"shared": {"neurons": 0.5, "score": "weight"}}
    plan = plan_moe(moe_config(siblings["base"], experts, **settings), Context())
    out = build(tmp_path / "out", siblings["base"], experts, **settings)
    built = open_checkpoint(str(out), Context())
    rows = {row["tensor"]: row for row in plan.rows}
    assert {name: list(info.shape) for name, info in built.tensors.items()} == {n: r["shape"] for n, r in rows.items()}
    assert plan.parameters["parameters_total"] == sum(info.size for info in built.tensors.values())
    assert "shared" in {row["from"] for row in plan.rows}
