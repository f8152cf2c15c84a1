"""Making a MoE smaller: every family and layout, the formulas by brute force, what must not change anything."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, DataError, TargetError
from solera_core.output import verify
from solera_core.progress import Silent
from solera_core.strict import Strict, parse
from solera_merge.moe.calibration import Sequences
from solera_merge.moe.config import MoeConfig
from solera_merge.moe.routing import mean_nll
from solera_merge.moe.size.config import ExtractExpertsConfig, MergeExpertsConfig, PruneConfig, TextConfig
from solera_merge.moe.size.existing import read_existing
from solera_merge.moe.size.groups import Group, regrouped
from solera_merge.moe.size.layerwise import layer_by_layer
from solera_merge.moe.size.scores import (
    average,
    closest_groups,
    contribution,
    frequency,
    greedy_groups,
    linked_groups,
    match_neurons,
    most_salient,
    reap,
)
from solera_merge.moe.size.shrink import build_shrunk, neuron_features, plan_shrunk
from solera_merge.moe.size.text import encode_text, read_text
from solera_merge.moe.size.usage import LayerUsage, watch_usage
from solera_merge.moe.write import write_whole

MakeModel = Callable[..., Path]

EXPERTS = 6
SMALL = {"moe_intermediate_size": 12, "num_experts": EXPERTS}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": 12, "sliding_window": 16},
    "qwen2_moe": {
        **SMALL,
        "shared_expert_intermediate_size": 8,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3_moe": SMALL | {"head_dim": 16, "num_local_experts": EXPERTS, "mlp_only_layers": [0], "num_hidden_layers": 3},
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": 12},
    "flex_olmo": {"num_experts": EXPERTS, "intermediate_size": 12},
    "granitemoe": {
        "num_local_experts": EXPERTS,
        "intermediate_size": 12,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "granitemoeshared": {"num_local_experts": EXPERTS, "intermediate_size": 12, "shared_intermediate_size": 8},
}


@pytest.fixture(scope="module")
def moes(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> dict[str, Path]:
    """One MoE of every family: 6 experts, 2 a token, routers sharp enough that tokens choose differently."""
    root = tmp_path_factory.mktemp("moes")
    return {name: make_moe(make_model, root / name, family=name, **extra) for name, extra in FAMILIES.items()}


def make_moe(make_model: MakeModel, path: Path, **options: Any) -> Path:
    made = make_model(path, num_experts_per_tok=2, **options)
    change(
        made,
        lambda name, value: value * (30.0 if is_router(name) else 8.0 if "expert" in name or "linear" in name else 1.0),
    )
    return made


def is_router(name: str) -> bool:
    return name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight", "router.layer.weight"))


def change(model: Path, edit: Callable[[str, np.ndarray], np.ndarray]) -> None:
    file = model / "model.safetensors"
    save_file(
        {n: np.ascontiguousarray(edit(n, v)) for n, v in load_file(file).items()}, file, metadata={"format": "pt"}
    )


def settings(model: Path, text: dict[str, Path], **more: Any) -> dict[str, Any]:
    data = {name: str(path) for name, path in text.items()}
    return {"model": str(model), "data": data, "tokens_per_domain": 400, "sequence_tokens": 64} | more


def prune(model: Path, text: dict[str, Path], out: Path, **more: Any) -> Path:
    return build_shrunk(parse(PruneConfig, settings(model, text, **more), where="test"), out, Context())


def merge_experts(model: Path, text: dict[str, Path], out: Path, **more: Any) -> Path:
    return build_shrunk(parse(MergeExpertsConfig, settings(model, text, **more), where="test"), out, Context())


def checks(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "solera.json").read_text())["checks"]
    return found


def sequences(seed: int, lengths: tuple[int, ...] = (48, 48, 48, 20)) -> Sequences:
    draw = np.random.default_rng(seed)
    ids = tuple(tuple(draw.integers(2, 300, n).tolist()) for n in lengths)
    return Sequences(ids, tuple(tuple(bool(x) for x in draw.integers(0, 4, len(row))) for row in ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_the_whole_model(family: str, moes: dict[str, Path], tmp_path: Path) -> None:
    """Same losses as transformers' own forward of the whole model, and the usage is that of a brute-force loop."""
    import torch
    from transformers import AutoModelForCausalLM

    path = moes[family]
    watched, scored = sequences(0), [sequences(1), sequences(2)]
    found: dict[int, LayerUsage] = {}
    watch = watch_usage(lambda layer, usage, _: found.update({layer: usage}), batches=2, outputs=True)
    losses = layer_by_layer(
        open_checkpoint(path, Context()),
        scored=scored,
        watched=[watched],
        watch=watch,
        scratch=tmp_path / "scratch",
        progress=Silent(),
    )
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    np.testing.assert_allclose(losses, [mean_nll(model, text) for text in scored], rtol=1e-5)
    assert not (tmp_path / "scratch").exists()
    assert sorted(found) == [layer.index for layer in read_existing(open_checkpoint(path, Context())).layers]
    for layer, (x_ND, weights_Nk, indices_Nk, experts) in routed(model, watched).items():
        reap, counts = [0.0] * EXPERTS, [0] * EXPERTS
        for x, weights, indices in zip(x_ND, weights_Nk, indices_Nk, strict=True):
            for weight, e in zip(weights.tolist(), indices.tolist(), strict=True):
                gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
                reap[e] += weight * float((experts.down_proj[e] @ (experts.act_fn(gate) * up)).norm())
                counts[e] += 1
        assert found[layer].counts.tolist() == counts
        assert max(counts) > min(counts) > 0  # tokens do choose
        np.testing.assert_allclose(found[layer].contribution, reap, rtol=1e-4)
        assert found[layer].tokens == watched.tokens


def routed(model: Any, text: Sequences) -> dict[int, tuple[Any, ...]]:
    """By sparse layer: what goes into the experts, weights, choices, and the module, of the whole model."""
    import torch

    kept: dict[int, list[tuple[Any, ...]]] = {}
    modules: dict[int, Any] = {}
    for number, layer in enumerate(model.model.layers):
        block = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
        if hasattr(block, "experts"):
            modules[number] = block.experts
            block.experts.register_forward_pre_hook(
                lambda _, inputs, number=number: kept.setdefault(number, []).append(inputs)
            )
    with torch.inference_mode():
        for ids in text.ids:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    found: dict[int, tuple[Any, ...]] = {}
    for number, calls in kept.items():
        x, indices, weights = (torch.cat(parts) for parts in zip(*calls, strict=True))
        found[number] = (x, weights, indices, modules[number])
    return found


# the stages ----------------------------------------------------------------------------------------------------------


def test_pruning_keeps_the_experts_with_the_highest_scores(
    moes: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path, whole_layout: Callable[..., None]
) -> None:
    """Of every family: what is left is byte for byte the original's, and plain transformers loads it."""
    for family, path in moes.items():
        out = prune(path, domain_text, tmp_path / family, keep=4)
        record = checks(out)
        before, after = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
        model = read_existing(open_checkpoint(out, Context()))
        assert model.experts == 4
        assert [row["experts"] for row in record["sizes"]] == [6, 4]
        for layer in model.layers:
            kept = [members[0] for members in record["layers_shrunk"][str(layer.index)]["experts"]]
            reap = np.array(record["layers_shrunk"][str(layer.index)]["reap"])
            assert kept == sorted(np.argsort(-reap)[:4].tolist())
            np.testing.assert_array_equal(after[layer.router], before[layer.router][kept])
            for names in layer.experts.values():
                for new, old in enumerate(kept):
                    if layer.fused:
                        np.testing.assert_array_equal(after[names[0]][new], before[names[0]][old])
                    else:
                        source = names[new].replace(f"experts.{new}.", f"experts.{old}.")
                        np.testing.assert_array_equal(after[names[new]], before[source])
        whole_layout(path, out)
        assert verify(out) == []


@pytest.fixture
def whole_layout() -> Callable[..., None]:
    """`whole_layout(before, after)`: names are the old ones, without those of experts that are gone; all else equal."""

    def check(before: Path, after: Path) -> None:
        old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
        gone = {name for name in old if any(f"experts.{e}." in name for e in (4, 5))}
        assert new.keys() == old.keys() - gone
        for name in new:
            if "expert" not in name and not is_router(name) and "linear" not in name:
                np.testing.assert_array_equal(new[name], old[name])

    return check


def fused(model: Path, out: Path) -> Path:
    """The same Mixtral in the layout of transformers' memory."""
    shutil.copytree(model, out)
    tensors = load_file(model / "model.safetensors")
    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."

        def take(name: str, old: str = old) -> list[np.ndarray]:
            return [tensors.pop(f"{old}experts.{e}.{name}.weight") for e in range(EXPERTS)]

        pairs = [np.concatenate(pair) for pair in zip(take("w1"), take("w3"), strict=True)]
        tensors[f"{new}experts.gate_up_proj"] = np.stack(pairs)
        tensors[f"{new}experts.down_proj"] = np.stack(take("w2"))
        tensors[f"{new}gate.weight"] = tensors.pop(f"{old}gate.weight")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_both_layouts_give_the_same_model(
    moes: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path, logits: Callable[[Path], Any]
) -> None:
    import torch

    other = fused(moes["mixtral"], tmp_path / "fused")
    assert read_existing(open_checkpoint(other, Context())).layers[0].fused
    for name, build in (("pruned", prune), ("merged", merge_experts)):
        outs = [build(m, domain_text, tmp_path / f"{name}{i}", keep=3) for i, m in enumerate((moes["mixtral"], other))]
        assert checks(outs[0])["sizes"] == checks(outs[1])["sizes"]
        names = [set(load_file(out / "model.safetensors")) for out in outs]
        assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in names[0]
        assert "model.layers.0.mlp.experts.gate_up_proj" in names[1]
        torch.testing.assert_close(logits(outs[0]), logits(outs[1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("group", ["ream", "m_smoe", "hc_smoe"])
def test_merging_every_family(group: str, moes: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path) -> None:
    """Loads, keeps the layout, and the loss that is reported is that of the whole model on the same tokens."""
    for family in ("qwen3_moe", "granitemoe") if group == "ream" else ("mixtral",):
        out = merge_experts(moes[family], domain_text, tmp_path / family, keep=3, group=group, sizes=[4, 5])
        record = checks(out)
        assert [row["experts"] for row in record["sizes"]] == [6, 5, 4, 3]
        sizes = [row["parameters"] for row in record["sizes"]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 4
        for layer in record["layers_shrunk"].values():
            members = sorted(e for group in layer["experts"] for e in group)
            assert set(members) <= set(range(EXPERTS))
            assert len(members) == len(set(members)) > 3
            assert len(layer["experts"]) == 3
        assert all(set(row["held_out_nll"]) == set(domain_text) for row in record["sizes"])


def permuted(model: Path, out: Path, order: list[int]) -> Path:
    shutil.copytree(model, out)
    before = load_file(model / "model.safetensors")

    def edit(name: str, value: np.ndarray) -> np.ndarray:
        if is_router(name):
            return value[order]
        for new, old in enumerate(order):
            if f"experts.{new}." in name:
                return before[name.replace(f"experts.{new}.", f"experts.{old}.")]
        return value

    change(out, edit)
    return out


@pytest.mark.parametrize("build", [prune, merge_experts])
def test_the_order_of_the_experts_does_not_matter(
    build: Callable[..., Path], moes: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path, logits: Any
) -> None:
    import torch

    order = [4, 2, 0, 5, 1, 3]
    other = permuted(moes["mixtral"], tmp_path / "other", order)
    outs = [build(m, domain_text, tmp_path / f"out{i}", keep=3) for i, m in enumerate((moes["mixtral"], other))]
    groups = [
        {frozenset(map(name, group)) for group in checks(out)["layers_shrunk"]["1"]["experts"]}
        for out, name in zip(outs, (lambda e: e, lambda e: order[e]), strict=True)
    ]
    assert groups[0] == groups[1]
    torch.testing.assert_close(logits(outs[0]), logits(outs[1]), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def top_1(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> Path:
    """A Mixtral with one expert a token."""
    path = tmp_path_factory.mktemp("top_1") / "moe"
    made = make_moe(make_model, path, family="mixtral", **FAMILIES["mixtral"])
    (made / "config.json").write_text((made / "config.json").read_text().replace('per_tok": 2', 'per_tok": 1'))
    return made


@pytest.mark.parametrize("build", [prune, merge_experts])
def test_an_expert_that_no_token_is_sent_to_is_not_missed(
    build: Callable[..., Path], top_1: Path, domain_text: dict[str, Path], tmp_path: Path, logits: Any
) -> None:
    """Its logits are the mean of the others', so it is never the first. Not one logit changes."""
    import torch

    model = tmp_path / "moe"
    shutil.copytree(top_1, model)
    others = [0, 1, 2, 4, 5]
    change(model, lambda name, v: np.insert(v[others], 3, v[others].mean(axis=0), axis=0) if is_router(name) else v)
    out = build(model, domain_text, tmp_path / "out", keep=5)
    record = checks(out)
    for layer in record["layers_shrunk"].values():
        assert layer["experts"] == [[e] for e in others]
        assert layer["reap"][3] == layer["share_of_tokens"][3] == 0
    torch.testing.assert_close(logits(out), logits(model), rtol=0, atol=1e-6)
    assert record["sizes"][0]["held_out_nll"] == record["sizes"][1]["held_out_nll"]


@pytest.fixture
def twins(top_1: Path, tmp_path: Path) -> Path:
    """Expert 4 is expert 1 with its neurons in another order, under the same router row."""
    model = tmp_path / "twins"
    shutil.copytree(top_1, model)
    before, order = load_file(model / "model.safetensors"), np.random.default_rng(0).permutation(12)

    def edit(name: str, value: np.ndarray) -> np.ndarray:
        if is_router(name):
            return np.stack([value[1 if e == 4 else e] for e in range(EXPERTS)])
        if "experts.4." in name:
            twin = before[name.replace("experts.4.", "experts.1.")]
            return twin[:, order] if "w2" in name else twin[order]
        return value

    change(model, edit)
    return model


def test_equal_experts_become_one(twins: Path, domain_text: dict[str, Path], tmp_path: Path, logits: Any) -> None:
    import torch

    out = merge_experts(twins, domain_text, tmp_path / "out", keep=5, group="hc_smoe")
    torch.testing.assert_close(logits(out), logits(twins), rtol=0, atol=1e-6)


@pytest.mark.parametrize("align", ["weights", "activations", "none"])
def test_neurons_are_matched_before_they_are_averaged(align: str, twins: Path, tmp_path: Path, logits: Any) -> None:
    """The average of equal experts with shuffled neurons is the expert; without matching it is something else."""

    model = read_existing(open_checkpoint(twins, Context()))
    groups: list[list[Group]] = []

    def decide(layer: int, usage: LayerUsage, experts: Any) -> None:
        def order(leader: int, member: int) -> tuple[int, ...] | None:
            features = [neuron_features(align, e, usage, experts) for e in (leader, member)]
            return None if align == "none" else match_neurons(features[0], features[1])

        counts = np.array([9, 3, 9, 9, 5, 9])
        groups.append([average([4, 1] if e == 1 else [e], counts, order) for e in (0, 1, 2, 3, 5)])

    layer_by_layer(
        model.checkpoint,
        scored=[],
        watched=[sequences(0)],
        watch=watch_usage(decide, batches=1, outputs=True),
        scratch=tmp_path / "scratch",
        progress=Silent(),
    )
    assert groups[0][1].weights == (5 / 8, 3 / 8)
    (tmp_path / "out").mkdir()
    write_whole(tmp_path / "out", regrouped(model, groups), threads=1, progress=None)
    difference = float((logits(tmp_path / "out") - logits(twins)).abs().max())
    assert difference < 1e-5 if align != "none" else difference > 1e-2


def test_the_reported_losses_are_those_of_the_model_in_memory(
    moes: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = parse(PruneConfig, settings(moes["olmoe"], domain_text, keep=2), where="test")
    out = build_shrunk(config, tmp_path / "out", Context())
    domains, _ = read_text(config, Context())
    text = encode_text(domains, open_checkpoint(out, Context()), config)
    loader: Any = AutoModelForCausalLM
    for path, row in zip((moes["olmoe"], out), checks(out)["sizes"], strict=True):
        model = loader.from_pretrained(path, dtype=torch.float32).eval()
        losses = [mean_nll(model, part) for part in text.held_out]
        assert list(row["held_out_nll"].values()) == pytest.approx(losses, rel=1e-4)
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        assert row["bytes"] == 4 * row["parameters"]


def test_number_formats_are_kept(make_model: MakeModel, domain_text: dict[str, Path], tmp_path: Path) -> None:
    path = make_moe_in(make_model, tmp_path / "moe", "bfloat16")
    for build in (prune, merge_experts):
        out = build(path, domain_text, tmp_path / build.__name__, keep=3)
        assert {info.dtype for info in open_checkpoint(out, Context()).tensors.values()} == {"BF16"}


def make_moe_in(make_model: MakeModel, path: Path, dtype: str) -> Path:
    return make_model(path, family="granitemoe", dtype=dtype, num_experts_per_tok=2, **FAMILIES["granitemoe"])


# formulas ------------------------------------------------------------------------------------------------------------


def test_grouping_by_hand() -> None:
    scores = np.array([1.0, 5.0, 2.0, 4.0, 0.5])
    similar = np.eye(5)
    similar[1, [0, 2, 4]] = similar[[0, 2, 4], 1] = (0.9, 0.1, 0.8)
    similar[3, [0, 2, 4]] = similar[[0, 2, 4], 3] = (0.95, 0.2, 0.3)
    assert most_salient(scores, 2) == [1, 3]
    assert closest_groups(scores, similar, 2) == [[1, 4], [3, 0, 2]]
    assert greedy_groups(scores, similar, 2, size=16) == [[1, 0, 2, 4], [3]]
    assert greedy_groups(scores, similar, 2, size=2) == [[1, 0, 4], [3, 2]]  # 2 groups of 2 hold no 5 experts
    points = np.array([[0.0], [10.0], [0.1], [10.2], [5.0]])
    assert linked_groups(scores, points, 3) == [[1, 3], [2, 0], [4]]


def test_scores_by_hand() -> None:
    """Expert 0 is chosen once and adds 4, expert 1 eight times and adds 1 each, expert 2 never, of 10 tokens."""
    usage = LayerUsage(np.array([1, 8, 0]), np.array([4.0, 8.0, 0.0]), np.eye(3), np.zeros((3, 1)), tokens=10)
    assert reap(usage).tolist() == [4.0, 1.0, 0.0]
    assert contribution(usage).tolist() == [0.4, 0.8, 0.0]
    assert frequency(usage).tolist() == [0.1, 0.8, 0.0]


def test_neurons_are_matched_by_hand() -> None:
    leader = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert match_neurons(leader, leader[[2, 0, 1]] * 7) == (1, 2, 0)


# bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change_", "message"),
    [
        ({"keep": 6}, "keep: 6 experts shall be left, but .* has 6; nothing would be smaller"),
        ({"keep": 9}, "keep: 9 experts shall be left, but .* has 6"),
        ({"keep": 1}, "keep at least 2"),
        ({"keep": 4, "sizes": [3, 7]}, "sizes: 7 experts shall be left"),
        ({"keep": [4, 3]}, "one number: the formats have the same number of experts in every layer"),
        ({"keep": 4, "data": {}}, "data"),
        ({"keep": 4, "scores": "reap"}, "did you mean 'score'"),
    ],
)
def test_settings_that_are_wrong(
    change_: dict[str, Any], message: str, moes: dict[str, Path], domain_text: dict[str, Path]
) -> None:
    raw = settings(moes["mixtral"], domain_text) | change_
    with pytest.raises(ConfigError, match=message):
        plan_shrunk(parse(PruneConfig, raw, where="test"), Context())


def test_a_dense_model_has_nothing_to_prune(siblings: dict[str, Path], domain_text: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="'llama' is a dense model, which has no experts"):
        plan_shrunk(parse(PruneConfig, settings(siblings["base"], domain_text, keep=2), where="test"), Context())


@pytest.mark.parametrize("text", [[], [{"text": "only one"}]])
def test_a_domain_without_text(
    text: list[dict[str, str]], moes: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path, write_jsonl: Any
) -> None:
    data = domain_text | {"empty": write_jsonl(tmp_path / "empty.jsonl", text)}
    config = parse(PruneConfig, settings(moes["mixtral"], data, keep=3), where="test")
    with pytest.raises(DataError, match="empty"):
        build_shrunk(config, tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("block_sparse_moe.experts.5.w1.weight", None, "gate matrices of 5 experts, config.json says 6"),
        (
            "block_sparse_moe.gate.weight",
            lambda v: v[:5],
            "router .* has shape .5, 32., but .* says 6 experts",
        ),
        ("block_sparse_moe.gate.weight", None, "has experts but no router"),
        ("block_sparse_moe.experts.0.w2.weight", lambda v: v[:, :10], "has shape"),
        ("block_sparse_moe.experts.0.w4.weight", lambda v: np.ones((2, 2), np.float32), "not a layout of mixtral"),
        (
            "block_sparse_moe.experts.gate_up_proj",
            lambda v: np.ones((6, 24, 32), np.float32),
            "two layouts at once|missing",
        ),
    ],
)
def test_a_layout_that_is_not_known(
    name: str, edit: Any, message: str, moes: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "moe"
    shutil.copytree(moes["mixtral"], model)
    tensors = load_file(model / "model.safetensors")
    full = f"model.layers.1.{name}"
    if edit is None:
        del tensors[full]
    else:
        tensors[full] = np.ascontiguousarray(edit(tensors.get(full)))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        plan_shrunk(parse(PruneConfig, settings(model, domain_text, keep=3), where="test"), Context())


def test_another_kind_of_moe(moes: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "moe"
    shutil.copytree(moes["mixtral"], model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    with pytest.raises(CheckpointError, match="'deepseek_v3' is not among the MoEs whose layout is known"):
        plan_shrunk(parse(PruneConfig, settings(model, domain_text, keep=3), where="test"), Context())


def test_damaged_weights_leave_nothing_behind(
    moes: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "moe"
    shutil.copytree(moes["mixtral"], model)
    change(model, lambda name, v: v * np.nan if name.endswith("1.block_sparse_moe.experts.2.w2.weight") else v)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        prune(model, domain_text, tmp_path / "out", keep=3)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_the_model_is_not_replaced_by_what_is_made_of_it(
    moes: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "moe"
    shutil.copytree(moes["mixtral"], model)
    (model / "solera.json").write_text("{}")
    before = (model / "model.safetensors").read_bytes()
    config = parse(PruneConfig, settings(model, domain_text, keep=3), where="test")
    for out in (model, model / "inside"):
        with pytest.raises(TargetError, match="directory of the input"):
            build_shrunk(config, out, Context(overwrite=True))
    assert (model / "model.safetensors").read_bytes() == before


def test_the_command_line(
    moes: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from solera.cli import main

    for command in ("moe-prune", "moe-merge-experts"):
        file = tmp_path / f"{command}.yml"
        file.write_text(json.dumps(settings(moes["qwen2_moe"], domain_text, keep=3)))
        assert main([command, str(file), str(tmp_path / command), "--dry-run", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert not (tmp_path / command).exists()
        assert main([command, str(file), str(tmp_path / command), "--json", "-q"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["kind"] == command
        assert plan["parameters"]["parameters_total"] == result["checks"]["parameters"]
        (weights,) = (row["bytes"] for row in plan["writes"])
        assert weights == (tmp_path / command / "model.safetensors").stat().st_size


def test_a_recipe_is_planned_through_them(
    siblings: dict[str, Path], specialists: dict[str, Path], domain_text: dict[str, Path], tmp_path: Path
) -> None:
    """Before any stage has run: each stands in for its output by its headers."""
    from solera.planning import plan_stages
    from solera.recipe import parse_recipe

    data = {name: str(path) for name, path in domain_text.items()}
    experts = [{"name": name, "model": str(path)} for name, path in specialists.items()]
    stages = {
        "moe": {"moe": {"base_model": str(siblings["base"]), "experts": experts, "router": {"fit": "random"}}},
        "small": {"moe-prune": {"model": "moe", "keep": 2, "data": data}},
        "merged": {"moe-merge-experts": {"model": "moe", "keep": 2, "data": data}},
        "loras": {"moe-extract-lora": {"base_model": str(siblings["base"]), "specialists": experts, "data": data}},
    }
    recipe = parse_recipe({"solera": 1, "stages": stages}, base_dir=tmp_path, where="test")
    plans = plan_stages(recipe, tmp_path / "run", Context())
    assert list(plans) == list(stages)
    assert plans["small"].parameters["parameters_total"] == plans["merged"].parameters["parameters_total"]
    assert plans["small"].parameters["parameters_before"] == plans["moe"].parameters["parameters_total"]


# documentation -------------------------------------------------------------------------------------------------------

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "moe-size.md").read_text(encoding="utf-8")


def test_the_snippets_are_valid_and_the_tables_are_whole() -> None:
    snippets = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)]
    configs: list[type[Strict]] = [
        MoeConfig if "experts" in text else MergeExpertsConfig if "keep" in text else ExtractExpertsConfig
        for text in snippets
    ]
    assert set(configs) == {MoeConfig, MergeExpertsConfig, ExtractExpertsConfig}
    for text, config in zip(snippets, configs, strict=True):
        parse(config, text, where="docs/moe-size.md")
    rows = [re.findall(r"\w+", row) for row in re.findall(r"^\| ((?:`\w+`(?:, )?)+)", DOCS, re.MULTILINE)]
    by_name: dict[str, type[TextConfig]] = {"prune": PruneConfig, "merge": MergeExpertsConfig, "": ExtractExpertsConfig}
    fields = {name for config in by_name.values() for name in config.model_fields}
    assert fields - {name for row in rows for name in row} == {"model", "base_model", "specialists"}  # see the snippets
    found = re.findall(r"^\| `(\w+)`(?: \((\w+)\))? \| ([^|]+) \|", DOCS, re.MULTILINE)
    assert len(found) > 10
    for name, which, default in found:
        of = by_name[which].model_fields
        value = (of if name in of else PruneConfig.model_fields)[name].default
        assert default == {None: "null"}.get(value, str(list(value) if isinstance(value, tuple) else value)), name
