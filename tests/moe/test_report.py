"""The report: every figure on a case whose answer is known, and the losses against independent runs."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_merge.moe.dense import read_dense
from solera_merge.moe.measures import balance, document_weights, figure, recovered, routing, sampled
from solera_merge.moe.report import average_of

Build = Callable[..., Path]


# --- the pure functions


def test_routing_by_hand() -> None:
    logits = np.log([[1.0, 2.0, 5.0], [5.0, 2.0, 1.0], [5.0, 2.0, 1.0], [1.0, 2.0, 5.0]])
    chosen = np.array([[2, 1], [0, 1], [0, 1], [2, 1]])
    found = routing(logits, chosen, [3, 1])  # so the last pair is no pair
    np.testing.assert_allclose(found.share, [2.5 / 7, 2 / 7, 2.5 / 7])
    np.testing.assert_allclose(found.load, [0.25, 0.5, 0.25])
    np.testing.assert_allclose(found.first, [0.5, 0, 0.5])
    assert found.top_k_mass == pytest.approx(7 / 8)
    assert found.entropy == pytest.approx(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)))
    assert found.switch_rate == pytest.approx(1 / 2)


def test_a_router_that_sends_everything_to_one_expert() -> None:
    logits = np.tile([-40.0, 40.0, -40.0], (6, 1))
    found = routing(logits, np.full((6, 1), 1), [6])
    assert found.share.tolist() == found.load.tolist() == found.first.tolist() == [0, 1, 0]
    assert found.entropy == pytest.approx(0)
    assert found.top_k_mass == pytest.approx(1)
    assert found.switch_rate == 0
    uneven = balance(found.load)
    assert uneven.max_over_mean == pytest.approx(3)
    assert uneven.dead == (0, 2)
    assert uneven.cv == pytest.approx(math.sqrt(2))  # sqrt(E - 1), the largest there is


def test_a_router_that_knows_nothing() -> None:
    found = routing(np.zeros((4, 4)), np.array([[0, 1], [1, 2], [2, 3], [3, 0]]), [4])
    assert found.entropy == pytest.approx(math.log(4))
    assert found.top_k_mass == pytest.approx(2 / 4)
    assert found.switch_rate == 1
    even = balance(found.load)
    assert [even.max_over_mean, even.cv] == pytest.approx([1, 0])
    assert even.dead == ()


def test_intervals_are_those_of_a_ratio_of_sums() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(50, 150, size=60).astype(np.float64)
    nats = tokens * draw.normal(3.0, 0.3, size=60)
    weights = document_weights(60, seed=1)
    found = sampled(nats, tokens, weights)
    assert found[0] == pytest.approx(nats.sum() / tokens.sum())
    error = math.sqrt(((nats - found[0] * tokens) ** 2).sum()) / tokens.sum()  # Cochran (1977), 6.3
    assert found[1:].std() == pytest.approx(error, rel=0.1)
    shown = figure(found, documents=60)
    assert shown is not None
    assert shown["high"] - shown["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert figure(found, documents=7) == {"value": shown["value"], "low": None, "high": None}


def test_pairing_cancels_what_is_common_to_two_models() -> None:
    draw = np.random.default_rng(0)
    nats, tokens = draw.normal(300, 60, size=40), np.full(40, 100.0)
    weights = document_weights(40, seed=1)
    shown = figure(sampled(nats + 10, tokens, weights) - sampled(nats, tokens, weights), documents=40)
    assert shown == {"value": 0.1, "low": 0.1, "high": 0.1}


def test_the_share_recovered() -> None:
    base, specialist = np.array([4.0, 4.0]), np.array([2.0, 2.0])
    for moe, share in ((2.0, 1.0), (4.0, 0.0), (3.0, 0.5), (5.0, -0.5), (1.0, 1.5)):
        np.testing.assert_allclose(recovered(base, np.full(2, moe), specialist), share)  # type: ignore[arg-type]  # not None
    assert recovered(specialist, specialist, base) is None


# --- built MoEs whose figures are known


def marked(out: Path, model: Path, tokens: dict[str, list[int]]) -> Path:
    """The model with channel d of the embedding large for the tokens of domain d, and read as it is by the routers.

    Its tokenizer puts no BOS in front, which would be a token of no domain.
    """
    shutil.copytree(model, out)
    for file, key in (("tokenizer.json", "post_processor"), ("tokenizer_config.json", "bos_token")):
        settings = json.loads((out / file).read_text())
        settings[key] = None
        (out / file).write_text(json.dumps(settings))
    weights = load_file(out / "model.safetensors")
    for name, tensor in weights.items():
        if name == "model.embed_tokens.weight":
            tensor[:, : len(tokens)] = 0
            for d, ids in enumerate(tokens.values()):
                tensor[ids, d] = 20
        elif name.endswith("post_attention_layernorm.weight"):
            tensor[: len(tokens)] = 1
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def known(
    tmp_path_factory: pytest.TempPathFactory, siblings: dict[str, Path], specialists: dict[str, Path]
) -> dict[str, Any]:
    """A base, its specialists (by their feed-forward networks alone) and text, no token of which is of two domains."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("known")
    draw = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(siblings["base"])
    text: dict[str, Path] = {}
    tokens: dict[str, list[int]] = {}
    for name, alphabet in (("letters", "abcdefgh"), ("digits", "0123456789"), ("signs", "+-*/()[]")):
        rows = ["".join(draw.choice(list(alphabet), size=200)) for _ in range(40)]
        text[name] = root / f"{name}.jsonl"
        text[name].write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
        tokens[name] = sorted({i for row in rows for i in tokenizer(row, add_special_tokens=False).input_ids})
    assert not set(tokens["letters"]) & set(tokens["digits"]) | set(tokens["digits"]) & set(tokens["signs"])
    base = marked(root / "base", siblings["base"], tokens)
    return {
        "base": base,
        "experts": {name: marked(root / name, path, tokens) for name, path in specialists.items()},
        "data": text,
    }


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "solera.json").read_text())["checks"]["report"]
    return report


def routed_by(
    rows: list[list[float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: dict[str, Any], build: Build
) -> dict[str, Any]:
    """The report of a MoE with this router (E, domains) over the marked channels, in every layer."""
    from solera_merge.moe import build as module

    router = np.zeros((3, 32), dtype=np.float32)
    router[:, :3] = rows
    monkeypatch.setattr(module, "random_routers", lambda config, inputs, *, seed: [router] * inputs.trunk.layers)
    # Held-out text of 40 tokens: one document, which is cut before its last token.
    settings = {"router": {"fit": "random", "tokens_per_domain": 160}, "data": known["data"], "top_k": 1}
    out = build(tmp_path / "moe", known["base"], known["experts"], **settings)
    return report_of(out)


def test_a_perfect_router_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: dict[str, Any], build: Build
) -> None:
    found = routed_by([[100, 0, 0], [0, 100, 0], [0, 0, 100]], monkeypatch, tmp_path, known, build)
    for d, name in enumerate(known["experts"]):
        assert found["router_loss"]["domains"][name]["value"] == pytest.approx(0, abs=1e-4)
        assert found["trunk_loss"]["domains"][name]["value"] == pytest.approx(0, abs=1e-4)
        assert found["recovered"]["domains"][name]["value"] == pytest.approx(1, abs=1e-2)
        route = found["routes"][name]
        assert route["accuracy"] == [1, 1]
        assert route["switch_rate"] == [0, 0]
        assert route["share"] == [[float(e == d) for e in range(3)]] * 2
    assert found["load"]["max_over_mean"] == [1, 1]
    assert found["load"]["dead"] == []


def test_a_router_that_knows_one_expert_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: dict[str, Any], build: Build
) -> None:
    found = routed_by([[-100] * 3, [100] * 3, [-100] * 3], monkeypatch, tmp_path, known, build)
    nll = found["nll"]
    # The specialists differ in their feed-forward networks alone, so the MoE is the second specialist.
    for name in known["experts"]:
        assert nll["moe"]["domains"][name] == pytest.approx(nll["specialists"]["digits"]["domains"][name], abs=1e-4)
        lost = nll["specialists"]["digits"]["domains"][name] - nll["specialists"][name]["domains"][name]
        assert found["router_loss"]["domains"][name]["value"] == pytest.approx(lost, abs=2e-4)
        assert found["routes"][name]["accuracy"] == [float(name == "digits")] * 2
        assert found["routes"][name]["share"] == [[0, 1, 0]] * 2
    assert found["recovered"]["domains"]["digits"]["value"] == pytest.approx(1, abs=1e-2)
    assert found["load"]["dead"] == [[0, "letters"], [0, "signs"], [1, "letters"], [1, "signs"]]
    assert found["load"]["max_over_mean"] == [3, 3]
    assert (
        "experts that hardly a token visits: 'letters' in 2 of 2 layers; 'signs' in 2 of 2 layers" in found["warnings"]
    )


def test_equal_experts_have_no_router_loss_and_only_trunk_loss(
    tmp_path: Path, siblings: dict[str, Path], domain_text: dict[str, Path], build: Build
) -> None:
    """Specialists that were tuned everywhere but in their feed-forward networks: nothing of them is in the MoE."""
    base = load_file(siblings["base"] / "model.safetensors")
    experts: dict[str, Path] = {}
    for name, sibling in zip(domain_text, "abc", strict=True):
        experts[name] = tmp_path / name
        shutil.copytree(siblings[sibling], experts[name])
        weights = load_file(experts[name] / "model.safetensors")
        weights |= {n: t for n, t in base.items() if ".mlp." in n}
        save_file(weights, experts[name] / "model.safetensors", metadata={"format": "pt"})
    router = {"fit": "random", "tokens_per_domain": 400}
    out = build(tmp_path / "moe", siblings["base"], experts, data=domain_text, router=router)
    found = report_of(out)
    nll = found["nll"]
    for name in experts:
        assert nll["moe"]["domains"][name] == pytest.approx(nll["base"]["domains"][name], abs=1e-4)
        assert found["router_loss"]["domains"][name]["value"] == pytest.approx(0, abs=1e-4)
        gain = nll["base"]["domains"][name] - nll["specialists"][name]["domains"][name]
        assert found["trunk_loss"]["domains"][name]["value"] == pytest.approx(gain, abs=2e-4)
        share = found["recovered"]["domains"][name]
        assert share is None if gain <= 0 else share["value"] == pytest.approx(0, abs=1e-2)


def test_losses_are_those_of_independent_runs(
    tmp_path: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
) -> None:
    """All by transformers on the same tokens; the average by the merge engine."""
    from solera_core.causal_lm import load_model
    from solera_core.strict import parse
    from solera_merge.config import MergeConfig
    from solera_merge.moe.build import _open
    from solera_merge.moe.config import MoeConfig
    from solera_merge.moe.fit import encode_domains
    from solera_merge.moe.routing import mean_nll
    from solera_merge.run import merge

    out = build(tmp_path / "moe", siblings["base"], specialists, data=domain_text, target="granitemoe")
    record = json.loads((out / "solera.json").read_text())
    found, router = record["checks"]["report"], record["checks"]["router"]
    config = parse(MoeConfig, record["recipe"], where="test")
    inputs, text, *_ = _open(config, Context())
    held_out = encode_domains(text.domains, None, inputs, config.router).held_out
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(p), "parameters": {"weight": 1}} for p in specialists.values()],
    }
    average = merge(parse(MergeConfig, recipe, where="test"), tmp_path / "average", Context())
    rows = {"base": found["nll"]["base"], "moe": found["nll"]["moe"], "average": found["nll"]["average"]}
    rows |= found["nll"]["specialists"]
    places = {"base": siblings["base"], "moe": out, "average": average, **specialists}
    for model, row in rows.items():
        loaded = load_model(places[model])
        for name, sequences in zip(domain_text, held_out, strict=True):
            assert row["domains"][name] == pytest.approx(mean_nll(loaded, sequences), abs=1e-4), model
    assert found["nll"]["moe"]["domains"] == pytest.approx(router["held_out_nll"]["domains"], abs=1e-4)
    assert found["nll"]["oracle"]["domains"] == pytest.approx(router["held_out_nll"]["oracle_routed"], abs=1e-4)
    for name in domain_text:
        assert found["routes"][name]["accuracy"] == pytest.approx(router["route_accuracy"][name], abs=1e-3)
    # Random words over three alphabets are told apart at sight, so each document is read by its specialist.
    assert found["model_router"]["accuracy"] == 1
    assert found["nll"]["model_router"]["domains"] == {
        n: found["nll"]["specialists"][n]["domains"][n] for n in domain_text
    }
    assert not (out / ".report").exists()


def test_what_cannot_be_measured_is_named(
    tmp_path: Path, siblings: dict[str, Path], specialists: dict[str, Path], domain_text: dict[str, Path], build: Build
) -> None:
    few = {}
    for name, file in domain_text.items():
        few[name] = tmp_path / f"{name}.jsonl"
        few[name].write_text("".join(file.read_text().splitlines(keepends=True)[:8]), encoding="utf-8")
    router = {"fit": "random", "tokens_per_domain": 400}
    found = report_of(build(tmp_path / "moe", siblings["base"], specialists, data=few, router=router))
    assert found["nll"]["model_router"] is None
    assert "fewer than 8 documents" in found["missing"]["model_router"]
    assert set(found["against"]) == {"average"}
    plain = build(tmp_path / "plain", siblings["base"], specialists)
    assert "report" not in json.loads((plain / "solera.json").read_text())["checks"]


def test_experts_of_different_width_have_no_average(siblings: dict[str, Path]) -> None:
    base, other = (read_dense(n, open_checkpoint(str(siblings[n]), Context())) for n in ("base", "a"))
    assert average_of(base, [base, other]) is not None
    wider = replace(other, fields={**other.fields, "intermediate_size": 2 * other.width})
    assert average_of(base, [base, wider]) is None


def test_the_command_prints_the_table_and_writes_the_page(
    tmp_path: Path, known: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from solera.cli import main

    settings = {
        "base_model": str(known["base"]),
        "experts": [{"name": name, "model": str(path)} for name, path in known["experts"].items()],
        "router": {"fit": "random", "data": {n: str(p) for n, p in known["data"].items()}, "tokens_per_domain": 400},
    }
    (tmp_path / "moe.yml").write_text(json.dumps(settings), encoding="utf-8")
    arguments = ["moe", str(tmp_path / "moe.yml"), str(tmp_path / "moe"), "--quiet"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert re.search(r"average merge +\d\.\d{3} +\d\.\d{3} +\d\.\d{3} +\d\.\d{3}", said)
    assert re.search(r"router loss +-?\d\.\d{3}", said)
    assert "The mixture stands at" in said
    page = tmp_path / "moe-report.html"
    assert "Which experts the text of a domain visits" in page.read_text(encoding="utf-8")
    assert main([*arguments, "--overwrite", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"] == str(page)
    assert printed["checks"]["report"] == report_of(tmp_path / "moe")
