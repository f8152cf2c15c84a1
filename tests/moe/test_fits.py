"""Fits as formulas, by other roads and by hand; the sums beside a MoE; and what `auto`, `nll` and `extend` build."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, SoleraError
from solera_core.output import verify
from solera_core.strict import parse
from solera_merge.moe.build import build_moe, plan_moe
from solera_merge.moe.config import AUTO, FITS, MoeConfig, RouterConfig
from solera_merge.moe.lda import constant_direction, lda_router
from solera_merge.moe.logistic import logistic_router
from solera_merge.moe.router import ridge_router
from solera_merge.moe.states import RouterStatistics
from solera_merge.moe.statistics_file import STATISTICS_FILE, StatisticsReader, StatisticsWriter, statistics_bytes
from solera_merge.moe.unlabelled import running_labels

Build = Callable[..., Path]


def cloud(seed: int, counts: tuple[int, ...], width: int, *, spread: float = 1.0, shift: float = 0.0) -> Any:
    """Gaussian clouds around random centres, all of them moved by `shift` in one direction, and their labels."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(len(counts), width)) + shift * np.eye(width)[0]
    labels = np.repeat(np.arange(len(counts)), counts)
    return centres[labels] + spread * draw.normal(size=(len(labels), width)), labels


def sums_of(x_ND: np.ndarray, labels_N: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sums = np.stack([x_ND[labels_N == e].sum(axis=0) for e in range(experts)])
    return x_ND.T @ x_ND, sums, np.bincount(labels_N, minlength=experts)


def checks_of(out: Path) -> dict[str, Any]:
    checks: dict[str, Any] = json.loads((out / "solera.json").read_text())["checks"]
    return checks


# --- formulas


def test_the_constant_direction_says_one() -> None:
    x, labels = cloud(0, (300, 100), 8, spread=0.1, shift=5.0)
    direction = constant_direction(*sums_of(x, labels, 2))
    assert (x @ direction).mean() == pytest.approx(1)
    assert (x @ direction).std() < 0.05


@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
def test_lda_is_the_log_posterior_of_gaussians(shrinkage: float) -> None:
    # With a feature that is 1 in every state the intercept can be said exactly, and the rows must give the
    # log-densities of the Gaussians, up to what all experts share.
    from scipy.stats import multivariate_normal

    x, labels = cloud(1, (400, 200, 400), 4)
    x1 = np.concatenate([10 * np.ones((len(x), 1)), x], axis=1)
    means = np.stack([x1[labels == e].mean(axis=0) for e in range(3)])
    centred = x1 - means[labels]
    within = centred.T @ centred / len(x1)
    covariance = (1 - shrinkage) * within + shrinkage * np.trace(within) / 5 * np.eye(5)
    expected = np.stack([multivariate_normal(mean, covariance).logpdf(x1) for mean in means], axis=1)
    found = x1 @ lda_router(*sums_of(x1, labels, 3), shrinkage=shrinkage).T
    difference = found - expected
    difference -= difference.mean(axis=1, keepdims=True)
    assert np.abs(difference).max() < 0.02 * np.abs(expected - expected.mean(axis=1, keepdims=True)).max()


def test_the_centroid_is_the_nearest_mean_where_a_state_can_say_one() -> None:
    x, labels = cloud(2, (100, 300), 4, spread=2.0)
    x1 = np.concatenate([30 * np.ones((len(x), 1)), x], axis=1)
    means = np.stack([x1[labels == e].mean(axis=0) for e in range(2)])
    nearest = ((x1[:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
    found = (x1 @ lda_router(*sums_of(x1, labels, 2), shrinkage=1).T).argmax(axis=1)
    assert (found == nearest).mean() > 0.99


def test_what_all_states_share_does_not_decide() -> None:
    x, labels = cloud(3, (500, 500, 500), 16, shift=20.0)
    sums = sums_of(x[::2], labels[::2], 3)
    for rows in (
        lda_router(*sums, shrinkage=0.1),
        lda_router(*sums, shrinkage=1),
        ridge_router(*sums, ridge=1e-3),
        logistic_router(blocks_of(x[::2], labels[::2], 3), sums[0], len(x[::2]), ridge=1e-3),
    ):
        assert ((x[1::2] @ rows.T).argmax(axis=1) == labels[1::2]).mean() > 0.95


def test_more_text_of_one_domain_does_not_favour_it_in_lda() -> None:
    few, many = cloud(4, (200, 200), 4, spread=1.5), cloud(4, (200, 4000), 4, spread=1.5)
    shares: list[float] = []
    for x, labels in (few, many):
        rows = lda_router(*sums_of(x, labels, 2), shrinkage=0.1)
        shares.append(float(((x[labels == 0] @ rows.T).argmax(axis=1) == 0).mean()))
    assert shares[1] > shares[0] - 0.1


def blocks_of(x: np.ndarray, labels: np.ndarray, experts: int, size: int = 100) -> Any:
    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            yield x[part].astype(np.float32), np.eye(experts)[labels[part]]

    return blocks


def test_logistic_has_no_slope_left_and_does_not_depend_on_the_blocks() -> None:
    x, labels = cloud(5, (150, 100, 50), 6, shift=3.0)
    gram = x.T @ x
    found = [logistic_router(blocks_of(x, labels, 3, size), gram, len(x), ridge=1e-2) for size in (1000, 7)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    logits = x @ found[0].T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    square = np.trace(gram) / x.size
    slope = (p - np.eye(3)[labels]).T @ x / len(x) + 1e-2 * square * found[0]
    assert np.abs(slope).max() < 1e-3 * np.abs(x).max()
    np.testing.assert_allclose(found[0].sum(axis=0), 0, atol=1e-9)


def test_logistic_agrees_with_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is no dependency")
    x, labels = cloud(6, (200, 200, 200), 5, spread=2.0)
    x = x.astype(np.float32).astype(np.float64)
    gram = x.T @ x
    penalty = 1e-2 * np.trace(gram) / x.size * len(x)
    peer = linear.LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-8, max_iter=1000).fit(x, labels)
    found = logistic_router(blocks_of(x, labels, 3), gram, len(x), ridge=1e-2)
    np.testing.assert_allclose(found, peer.coef_ - peer.coef_.mean(axis=0), atol=2e-3)


def test_running_labels_by_hand() -> None:
    nll = np.array([[9.0, 1.0, 3.0, 1.0], [0.0, 2.0, 2.0, 0.0]])  # means from token 1 on: 1, 2, 5/3 and 2, 2, 4/3
    found = running_labels(nll)
    assert found.shape == (4, 2)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found[0], found[1])  # nothing predicts the first token
    assert found[1, 0] > 0.9
    assert found[2, 0] == pytest.approx(0.5)
    assert found[3, 1] > 0.7
    assert running_labels(np.zeros((2, 1))).tolist() == [[0.5, 0.5]]


# --- the table of fits


def test_every_fit_says_what_it_needs() -> None:
    assert set(FITS) == set(get_args(RouterConfig.model_fields["fit"].annotation))
    assert set(AUTO) <= set(FITS)
    assert {name for name, fit in FITS.items() if fit.extends} == {"ridge", "lda", "centroid", "auto"}


# --- the file of sums


def test_sums_come_back_bit_by_bit(tmp_path: Path) -> None:
    layers: list[RouterStatistics] = []
    for seed in (0, 1):
        x, labels = cloud(seed, (5, 7), 6)
        gram, sums, counts = sums_of(x, labels, 2)
        layers.append(RouterStatistics(gram, sums, counts))
    with StatisticsWriter(tmp_path, layers=2, width=6, experts=["a", "b"], about={"x": 1}) as writer:
        for layer in layers:
            writer.write(layer)
    stored = load_file(tmp_path / STATISTICS_FILE)  # a safetensors file like any other
    assert stored.keys() == {"counts", *(f"layers.{i}.{kind}" for i in (0, 1) for kind in ("gram", "sums"))}
    size = statistics_bytes(layers=2, width=6, experts=["a", "b"], about={"x": 1})
    assert (tmp_path / STATISTICS_FILE).stat().st_size == size
    reader = StatisticsReader.open(tmp_path)
    assert (reader.experts, reader.about) == (("a", "b"), {"x": 1})
    for i, layer in enumerate(layers):
        found = reader.read(i, experts=3)
        np.testing.assert_array_equal(found.gram, layer.gram)
        np.testing.assert_array_equal(found.sums, [*layer.sums, np.zeros(6)])
        np.testing.assert_array_equal(found.counts, [5, 7, 0])


# --- what is built


@pytest.fixture(scope="module")
def one_mix(tmp_path_factory: pytest.TempPathFactory, domain_text: dict[str, Path]) -> Path:
    """The text of all domains in one file, shuffled."""
    rows = [line for file in domain_text.values() for line in file.read_text().splitlines()]
    file = tmp_path_factory.mktemp("mix") / "mix.jsonl"
    file.write_text("\n".join(np.random.default_rng(0).permutation(rows).tolist()) + "\n")
    return file


@pytest.fixture(scope="module")
def auto(
    tmp_path_factory: pytest.TempPathFactory,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    one_mix: Path,
    build: Build,
) -> Path:
    router = {"fit": "auto", "unlabelled": str(one_mix), "tokens_per_domain": 1000}
    out = tmp_path_factory.mktemp("auto") / "moe"
    return build(out, siblings["base"], specialists, data=domain_text, router=router)


def test_auto_takes_the_best_and_shows_the_table(auto: Path) -> None:
    assert verify(auto) == []
    facts = checks_of(auto)["router"]
    table = facts["candidates"]
    assert [row["fit"] for row in table] == list(AUTO)
    best = min(table, key=lambda row: row["held_out_nll"])
    assert facts["fit"] == best["fit"]
    assert facts["held_out_nll"]["mean"] == pytest.approx(best["held_out_nll"], abs=1e-3)
    # The domains are easy to tell apart: every fit does, also the one without labels.
    assert min(row["route_accuracy"] for row in table) > 0.7, table
    oracle = float(np.mean(list(facts["held_out_nll"]["oracle_routed"].values())))
    assert all(row["held_out_nll"] < oracle + 0.1 for row in table), table
    assert facts["statistics"] == STATISTICS_FILE


def test_the_router_on_disk_is_the_candidate_that_won(
    tmp_path: Path,
    auto: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
) -> None:
    facts = checks_of(auto)["router"]
    router = {"fit": facts["fit"], "temperature": facts["temperature"], "tokens_per_domain": 1000}
    alone = build(tmp_path / "moe", siblings["base"], specialists, data=domain_text, router=router)
    for name, tensor in load_file(alone / "model.safetensors").items():
        np.testing.assert_allclose(load_file(auto / "model.safetensors")[name], tensor, rtol=1e-3, atol=1e-6)


def test_layers_that_are_loaded_anew_each_time_give_the_same_bytes(
    tmp_path: Path,
    two: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("solera_merge.moe.layers._KEEP_BYTES", 0)
    names = ("letters", "digits")
    experts, data = ({n: files[n] for n in names} for files in (specialists, domain_text))
    out = build(tmp_path / "moe", siblings["base"], experts, data=data, router={"temperature": 0.1})
    for file in ("model.safetensors", "solera.json", STATISTICS_FILE):
        assert (out / file).read_bytes() == (two / file).read_bytes()


def test_unlabelled_text_alone(
    tmp_path: Path, siblings: dict[str, Path], specialists: dict[str, Path], one_mix: Path, build: Build
) -> None:
    router = {"fit": "nll", "unlabelled": str(one_mix), "tokens_per_domain": 1000}
    out = build(tmp_path / "moe", siblings["base"], specialists, router=router)
    facts = checks_of(out)["router"]
    assert not (out / STATISTICS_FILE).exists()
    assert list(facts["held_out_nll"]["domains"]) == ["unlabelled"]
    assert facts["held_out_nll"]["mean"] <= facts["held_out_nll"]["at_temperature_1"]
    shares = np.array(facts["first_choices"])  # (L, E)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-3)
    assert shares.min() > 0.05, shares
    assert facts["tokens_fit"]["unlabelled"] > 1000


@pytest.mark.parametrize("fit", ["random", "none"])
def test_text_measures_any_router(
    tmp_path: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
    fit: str,
) -> None:
    out = build(tmp_path / "moe", siblings["base"], specialists, data=domain_text, router={"fit": fit})
    checks = checks_of(out)
    facts = checks["router"]
    assert facts["fit"] == fit
    assert facts["temperature"] == 1
    assert facts["held_out_nll"]["mean"] > np.mean(list(facts["held_out_nll"]["oracle_routed"].values())) + 0.05
    rows = load_file(out / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"]
    assert rows.any() == (fit != "none")
    assert any("the rows are zero" in warning for warning in checks["warnings"]) == (fit == "none")


def test_too_little_unlabelled_text(
    tmp_path: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    moe_config: Callable[..., MoeConfig],
    write_jsonl: Callable[..., Path],
) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "a b"}, {"text": "1 2"}])
    config = moe_config(siblings["base"], specialists, router={"fit": "nll", "unlabelled": str(short)})
    with pytest.raises(SoleraError, match=r"router.unlabelled: \d+ tokens to fit on .*at least 32 are needed"):
        build_moe(config, tmp_path / "moe", Context())
    assert not (tmp_path / "moe").exists()


def test_an_expert_with_the_base_s_networks_is_named(
    tmp_path: Path, siblings: dict[str, Path], specialists: dict[str, Path], domain_text: dict[str, Path], build: Build
) -> None:
    shutil.copytree(siblings["base"], tmp_path / "same")
    weights = load_file(tmp_path / "same" / "model.safetensors")
    weights["lm_head.weight"] *= np.float32(1.01)  # other weights, but none that an expert gives
    save_file(weights, tmp_path / "same" / "model.safetensors", metadata={"format": "pt"})
    experts = {"letters": specialists["letters"], "same": tmp_path / "same"}
    data = {"letters": domain_text["letters"], "same": domain_text["digits"]}
    out = build(tmp_path / "moe", siblings["base"], experts, data=data, router={"temperature": 1})
    said = [warning for warning in checks_of(out)["warnings"] if "adds nothing of its own" in warning]
    assert len(said) == 1
    assert "expert 'same'" in said[0]


# --- adding an expert


def extended(old: Path, specialists: dict[str, Path], data: dict[str, Path], **changes: Any) -> MoeConfig:
    router = {"data": {n: str(p) for n, p in data.items()}, "tokens_per_domain": 1500, **changes.pop("router", {})}
    raw = {
        "extend": str(old),
        "experts": [{"name": n, "model": str(p)} for n, p in specialists.items()],
        "router": router,
        **changes,
    }
    return parse(MoeConfig, raw, where="test")


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
) -> Path:
    names = ("letters", "digits")
    experts, data = ({n: files[n] for n in names} for files in (specialists, domain_text))
    return build(
        tmp_path_factory.mktemp("two") / "moe", siblings["base"], experts, data=data, router={"temperature": 0.1}
    )


@pytest.mark.parametrize("fit", ["ridge", "lda"])
def test_adding_an_expert_equals_building_all_at_once(
    tmp_path: Path,
    two: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
    fit: str,
) -> None:
    router = {"fit": fit, "temperature": 0.25}
    at_once = build(tmp_path / "once", siblings["base"], specialists, data=domain_text, router=router)
    shutil.copytree(two, tmp_path / "two")  # neither the first specialists nor their text are looked at
    only = {"signs": specialists["signs"]}
    config = extended(tmp_path / "two", only, {"signs": domain_text["signs"]}, router=router)
    later = build_moe(config, tmp_path / "later", Context())
    assert verify(later) == []
    expected, found = (load_file(path / "model.safetensors") for path in (at_once, later))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if "gate.weight" in name:
            np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-5 * np.abs(tensor).max())
        else:
            np.testing.assert_array_equal(found[name], tensor)
    for name, values in load_file(at_once / STATISTICS_FILE).items():
        np.testing.assert_allclose(load_file(later / STATISTICS_FILE)[name], values, rtol=1e-9)
    once, after = (json.loads((path / "config.json").read_text()) for path in (at_once, later))
    assert once == after
    record = json.loads((later / "solera.json").read_text())
    assert [entry["name"] for entry in record["inputs"]] == ["extended", "signs", "text of signs"]
    assert record["checks"]["router"]["tokens_fit"] == checks_of(at_once)["router"]["tokens_fit"]
    assert list(record["checks"]["router"]["held_out_nll"]["domains"]) == ["signs"]
    whole, report = checks_of(at_once)["report"], record["checks"]["report"]
    assert report["missing"].keys() == {"base", "average", "model_router"}  # which are not there
    for of in (whole["nll"]["moe"], whole["nll"]["oracle"], whole["nll"]["specialists"]["signs"]):
        assert of["domains"]["signs"] < whole["nll"]["base"]["domains"]["signs"]
    for kind in ("moe", "oracle"):
        assert report["nll"][kind]["mean"] == pytest.approx(whole["nll"][kind]["domains"]["signs"], abs=1e-3)
    assert report["trunk_loss"]["mean"]["value"] == pytest.approx(0, abs=1e-4)
    assert report["recovered"] is None


def test_an_extended_moe_can_be_extended_and_its_temperature_is_kept(
    tmp_path: Path, two: Path, specialists: dict[str, Path], siblings: dict[str, Path], domain_text: dict[str, Path]
) -> None:
    only = {"signs": specialists["signs"]}
    three = build_moe(extended(two, only, {"signs": domain_text["signs"]}), tmp_path / "three", Context())
    assert checks_of(three)["router"]["temperature"] == 0.1
    text = tmp_path / "more.jsonl"
    text.write_text(domain_text["signs"].read_text() + domain_text["digits"].read_text())
    config = extended(three, {"b": siblings["b"]}, {"b": text})
    plan = plan_moe(config, Context())
    four = build_moe(config, tmp_path / "four", Context())
    assert checks_of(four)["router"]["tokens_fit"].keys() == {"letters", "digits", "signs", "b"}
    assert json.loads((four / "config.json").read_text())["num_local_experts"] == 4
    assert {w["what"]: w["bytes"] for w in plan.writes} == {
        str(p.relative_to(four)): p.stat().st_size for p in four.rglob("*.safetensors")
    }


def test_experts_in_one_tensor_and_of_another_width(
    tmp_path: Path, make_model: Callable[..., Path], domain_text: dict[str, Path], build: Build
) -> None:
    base = make_model(tmp_path / "base", family="granite")
    experts = {
        name: make_model(tmp_path / name, family="granite", seed=seed, intermediate_size=width)
        for name, seed, width in (("letters", 5, 24), ("digits", 6, 32), ("signs", 7, 48))
    }
    options: dict[str, Any] = {"router": {"temperature": 1}, "target": "granitemoe"}
    at_once = build(tmp_path / "once", base, experts, data=domain_text, **options)
    first = {n: experts[n] for n in ("letters", "digits")}
    old = build(tmp_path / "old", base, first, data={n: domain_text[n] for n in first}, **options)
    config = extended(old, {"signs": experts["signs"]}, {"signs": domain_text["signs"]}, router={"temperature": 1})
    later = build_moe(config, tmp_path / "later", Context())
    found = load_file(later / "model.safetensors")
    for name, tensor in load_file(at_once / "model.safetensors").items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-5 * np.abs(tensor).max())


def test_what_cannot_be_extended(
    tmp_path: Path,
    two: Path,
    auto: Path,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    build: Build,
) -> None:
    only, data = {"signs": specialists["signs"]}, {"signs": domain_text["signs"]}

    def refused(error: type[SoleraError], message: str, config: MoeConfig) -> None:
        with pytest.raises(error, match=message):
            plan_moe(config, Context())

    refused(CheckpointError, "has no solera.json", extended(siblings["base"], only, data))
    drawn = build(tmp_path / "drawn", siblings["base"], {n: siblings[n] for n in "ab"})
    refused(CheckpointError, f"has no {STATISTICS_FILE}.*build it with", extended(drawn, only, data))
    refused(ConfigError, "experts: signs: .* has an expert of that name", extended(auto, only, data))
    refused(ConfigError, "router.data.sings: no such expert", extended(two, only, {**data, "sings": data["signs"]}))
    refused(ConfigError, "target: qwen2_moe asked, but .* is a mixtral", extended(two, only, data, target="qwen2_moe"))
    refused(ConfigError, "top_k: 4 experts a token asked, but there are only 3", extended(two, only, data, top_k=4))
    refused(ConfigError, "no text for|there is none for letters", extended(two, only, data, router={"fit": "auto"}))
    refused(ConfigError, "was chosen for fit: ridge", extended(two, only, data, router={"fit": "lda"}))
    shutil.copytree(two, tmp_path / "healed")
    record = json.loads((tmp_path / "healed" / "solera.json").read_text())
    record["tensors"]["model.norm.weight"] = "blake3:0"
    (tmp_path / "healed" / "solera.json").write_text(json.dumps(record))
    refused(CheckpointError, "was it trained or healed since", extended(tmp_path / "healed", only, data))
