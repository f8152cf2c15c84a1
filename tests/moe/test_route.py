"""Routes over whole models: the fits, the stage, the models behind it, and everything that is refused."""

import json
import math
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from solera_core.context import Context
from solera_core.data import DataSource, Document, Messages, Text, read_documents
from solera_core.errors import CheckpointError, ConfigError, DataError, TargetError
from solera_core.provenance import verify
from solera_core.route import confidences, directions, mean_states, open_route, request_of
from solera_core.strict import parse
from solera_merge.route import RoutedModels
from solera_merge.route.build import build_route, plan_route
from solera_merge.route.config import RouteConfig
from solera_merge.route.fit import (
    Cascade,
    centroid,
    choose_thresholds,
    classifier,
    kmeans,
    path_cost,
    standardisation,
    walk,
)

MakeConfig = Callable[..., RouteConfig]
METHODS = ("centroid", "kmeans", "classifier", "auto", "cascade")


@pytest.fixture(scope="module")
def config(specialists: dict[str, Path], siblings: dict[str, Path], domain_text: dict[str, Path]) -> MakeConfig:
    """`config(method="auto", **settings)`: of the three specialists, on 40 documents of each of their domains."""

    def make(method: str = "auto", **settings: Any) -> RouteConfig:
        raw: dict[str, Any] = {
            "specialists": [{"name": name, "model": str(path)} for name, path in specialists.items()],
            "data": {name: str(path) for name, path in domain_text.items()},
            "method": method,
            **({} if method == "cascade" else {"base_model": str(siblings["base"])}),
            **settings,
        }
        return parse(RouteConfig, {k: v for k, v in raw.items() if v is not None}, where="test")

    return make


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory, config: MakeConfig) -> dict[str, Path]:
    """A route of every method."""
    root = tmp_path_factory.mktemp("routes")
    # The specialists differ by a hundredth: a cascade's tolerance would let one of them do it all.
    exact = {"cascade": {"tolerance": 0.0}}
    return {m: build_route(config(m, **exact.get(m, {})), root / m, Context()) for m in METHODS}


@pytest.fixture(scope="module")
def held_out(domain_text: dict[str, Path]) -> tuple[list[Document], list[str]]:
    """Texts that no fit has seen: new draws from the same alphabets."""
    from tests.moe.conftest import ALPHABETS

    draw = random.Random(99)
    texts = [
        (" ".join("".join(draw.choices(alphabet, k=5)) for _ in range(20)), name)
        for name, alphabet in ALPHABETS.items()
        for _ in range(8)
    ]
    return [Document(f"{i}", name, Text("", text)) for i, (text, name) in enumerate(texts)], [n for _, n in texts]


def checks(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "solera.json").read_text())["checks"]
    return found


# formulas ------------------------------------------------------------------------------------------------------------


def clusters(seed: int = 0, each: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Four well separated groups on the sphere; the first two belong to label 0."""
    draw = np.random.default_rng(seed)
    centres = np.eye(6)[:4]
    states = np.concatenate([c + 0.1 * draw.standard_normal((each, 6)) for c in centres])
    return directions(states, np.zeros(6), np.ones(6)), np.repeat([0, 0, 1, 2], each)


def test_the_nearest_centroid_is_the_nearest() -> None:
    x, labels = clusters()
    found = centroid(x, labels, 3)
    means = np.stack([x[labels == e].mean(axis=0) for e in range(3)])
    by_hand = ((x[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    assert np.array_equal(found.decide(x), by_hand)
    assert centroid(x, np.where(labels == 1, 0, labels), 3).choice == (0, 2)  # nobody is labelled 1


def test_kmeans_gives_every_cluster_its_best_specialist() -> None:
    x, labels = clusters()
    losses = np.ones((len(x), 3))
    losses[np.arange(len(x)), labels] = 0.5
    found = kmeans(x, losses, clusters=4, seed=0)
    assert sorted(found.choice) == [0, 0, 1, 2]
    assert np.array_equal(found.decide(x), labels)
    again = kmeans(x, losses, clusters=4, seed=0)
    assert np.array_equal(again.weight, found.weight)
    # one cluster: the best specialist over all
    assert set(kmeans(x, losses, clusters=1, seed=0).decide(x)) == {0}
    # more clusters than different requests
    same = np.repeat(x[:1], 5, axis=0)
    assert len(kmeans(same, losses[:5], clusters=4, seed=0).choice) == 1


def test_the_classifier_is_at_the_minimum() -> None:
    x, labels = clusters()
    found = classifier(x, labels, 3, penalty=0.01)
    assert np.array_equal(found.decide(x), labels)

    def loss(weight: np.ndarray, bias: np.ndarray) -> float:
        logits = x @ weight.T + bias
        nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(x)), labels]
        return float(np.mean([nll[labels == e].mean() for e in range(3)]) + 0.005 * (weight**2).sum())

    at = loss(found.weight, found.bias)
    draw = np.random.default_rng(1)
    for _ in range(20):
        assert loss(found.weight + 1e-2 * draw.standard_normal(found.weight.shape), found.bias) > at
        assert loss(found.weight, found.bias + 1e-2 * draw.standard_normal(3)) >= at - 1e-9


def test_the_classifier_equals_scikit_learns_definition_in_two_classes_by_hand() -> None:
    # one dimension, two points at +-1: w minimises log(1 + exp(-d)) + penalty / 2 * (w0^2 + w1^2), d = 2 * w, w1 = -w0
    x, labels = np.array([[1.0], [-1.0]]), np.array([0, 1])
    found = classifier(x, labels, 2, penalty=0.1)
    w = found.weight[0, 0]
    assert found.weight[1, 0] == pytest.approx(-w, abs=1e-4)
    assert -2 / (1 + math.exp(2 * w)) + 0.1 * 2 * w == pytest.approx(0, abs=1e-4)


def test_a_cascade_is_walked_in_order() -> None:
    sure = np.array([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.1, 0.1, 0.9], [0.5, 0.0, 0.0]])
    cascade = Cascade((0, 1, 2), (0.5, 0.5))
    assert walk(cascade, sure).tolist() == [0, 1, 2, 0]
    assert path_cost(cascade, walk(cascade, sure), [1.0, 2.0, 4.0]) == (1 + 3 + 7 + 1) / 4


def test_thresholds_are_the_cheapest_within_the_tolerance() -> None:
    draw = np.random.default_rng(0)
    easy = np.arange(200) < 100
    sure = np.stack([np.where(easy, 1.0, -1.0) + 0.1 * draw.standard_normal(200), np.zeros(200)], axis=1)
    losses = np.stack([np.where(easy, 0.50, 0.90), np.full(200, 0.49)], axis=1)  # the large model is best everywhere
    costs = [1.0, 10.0]
    exact = choose_thresholds([0, 1], sure, losses, costs, tolerance=0.0)
    assert exact == Cascade((1,), ())  # the small one is not worth asking
    loose = choose_thresholds([0, 1], sure, losses, costs, tolerance=0.05)
    assert loose.order == (0, 1)
    answer = walk(loose, sure)
    assert ((answer == 0) == easy).mean() > 0.95
    assert losses[np.arange(200), answer].mean() <= 0.49 * 1.05
    careless = choose_thresholds([0, 1], sure, losses, costs, tolerance=1.0)
    assert (walk(careless, sure) == 0).all()
    # nothing to be sure by
    blind = choose_thresholds([0, 1], np.full((200, 2), -math.inf), losses, costs, tolerance=0.5)
    assert blind == Cascade((1,), ())


def test_a_dimension_that_never_moves_is_left_alone() -> None:
    mean, scale = standardisation(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert (mean.tolist(), scale.tolist()) == ([2.0, 5.0], [1.0, 1.0])
    assert np.isfinite(directions(np.array([[2.0, 5.0]]), mean, scale)).all()


# what a router sees --------------------------------------------------------------------------------------------------


def test_a_request_is_what_is_known_before_the_answer() -> None:
    assert request_of(Document("a", None, Text("ask", "answer"))) == "ask"
    assert request_of(Document("a", None, Text("", "text"))) == "text"
    turns = (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"))
    assert request_of(Document("a", None, Messages(turns))) == "s\nu"
    assert request_of(Document("a", None, Messages((("assistant", "a"),)))) == "a"


def test_mean_states_are_the_plainest_means(siblings: dict[str, Path]) -> None:
    import torch

    from solera_core.causal_lm import load_model, load_tokenizer

    model, tokenizer = load_model(siblings["base"]), load_tokenizer(siblings["base"])
    texts = ["one and two make three", "def add", "x" * 60, "a", ""]
    found = mean_states(model, tokenizer, texts, tokens=16)
    for text, row in zip(texts, found, strict=True):
        ids: Any = tokenizer(text).input_ids[:16]
        assert ids[0] == tokenizer.bos_token_id
        with torch.inference_mode():
            states = model.base_model(input_ids=torch.tensor([ids]))[0][0]
        expected = states[1:].mean(0) if len(ids) > 1 else states[0]
        assert row == pytest.approx(expected.numpy(), abs=1e-5)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        mean_states(model, tokenizer, texts, tokens=16)


@pytest.mark.parametrize("kind", ["log_probability", "entropy"])
def test_confidence_is_the_plainest_mean(siblings: dict[str, Path], kind: str) -> None:
    import torch

    from solera_core.causal_lm import load_model, load_tokenizer

    model, tokenizer = load_model(siblings["base"]), load_tokenizer(siblings["base"])
    texts = ["one and two make three", "def add", ""]
    found = confidences(model, tokenizer, texts, tokens=9, kind=kind)
    for text, value in zip(texts[:2], found, strict=False):
        ids: Any = torch.tensor(tokenizer(text).input_ids[:9])
        with torch.inference_mode():
            logprobs = model(input_ids=ids[None, :-1]).logits[0].double().log_softmax(-1)
        of_tokens = logprobs[torch.arange(len(ids) - 1), ids[1:]].mean()
        expected = of_tokens if kind == "log_probability" else (logprobs.exp() * logprobs).sum(-1).mean()
        assert value == pytest.approx(float(expected), abs=1e-4)
    assert found[2] == -math.inf  # a BOS predicts nothing that is there


# the stage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_route_finds_the_specialists(
    routes: dict[str, Path], method: str, held_out: tuple[list[Document], list[str]]
) -> None:
    documents, names = held_out
    found = checks(routes[method])
    assert verify(routes[method]) == []
    least = 0.75 if method == "cascade" else 0.9  # thresholds on one number a specialist are a weaker tool
    assert found["accuracy"]["domain"] >= least
    assert found["mean_bits_per_byte"]["oracle"] <= found["mean_bits_per_byte"]["routed"]
    assert found["mean_bits_per_byte"]["routed"] < min(found["mean_bits_per_byte"][n] for n in set(names))
    assert ("base" in found["mean_bits_per_byte"]) == (method != "cascade")
    models = RoutedModels.open(routes[method])
    answers = models.route(documents)
    assert np.mean([a == n for a, n in zip(answers, names, strict=True)]) >= least
    assert models.route([d.content.completion for d in documents if isinstance(d.content, Text)]) == answers
    assert models.route([]) == []
    # one by one as all together
    assert [models.route([d])[0] for d in documents[:3]] == answers[:3]


def test_auto_compares_on_text_that_the_fits_have_not_seen(routes: dict[str, Path]) -> None:
    found = checks(routes["auto"])
    assert {row["method"] for row in found["tried"]} == {"centroid", "kmeans", "classifier"}
    best = min(row["bits_per_byte"] for row in found["tried"])
    assert found["method"] in {row["method"] for row in found["tried"] if row["bits_per_byte"] == best}
    assert found["documents"]["letters"] == {"fit": 30, "held_out": 10}


def test_the_report_is_what_the_models_say(
    routes: dict[str, Path], config: MakeConfig, domain_text: dict[str, Path]
) -> None:
    from solera_merge.moe.calibration import read_domains

    models = RoutedModels.open(routes["centroid"])
    domains, _ = read_domains(config().data, base_dir=Path(), holdout=0.25, seed=0)
    for domain in domains:
        row = checks(routes["centroid"])["held_out"][domain.name]
        routed = models.nll(domain.held_out)
        assert row["routed"]["nll"] == pytest.approx(
            sum(s.nll for s in routed) / sum(s.tokens for s in routed), rel=1e-4
        )
        each = {name: models.nll(domain.held_out, specialist=name) for name in models.names}
        for name, scores in each.items():
            bits = sum(s.nll for s in scores) / math.log(2) / sum(s.bytes for s in scores)
            assert row["specialists"][name]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
        oracle = sum(min(scores[i].nll for scores in each.values()) for i in range(len(domain.held_out)))
        assert row["oracle"]["bits_per_byte"] == pytest.approx(
            oracle / math.log(2) / sum(s.bytes for s in routed), rel=1e-4
        )


def test_generation_and_losses_come_back_in_order(
    routes: dict[str, Path], specialists: dict[str, Path], held_out: tuple[list[Document], list[str]]
) -> None:
    from solera_core.causal_lm import load_model, load_tokenizer
    from solera_core.generate import generate

    models = RoutedModels.open(routes["classifier"], keep=1)
    texts = [d.content.completion[:40] for d in held_out[0][::5] if isinstance(d.content, Text)]
    names = models.route(texts)
    assert len(set(names)) == 3
    outputs = models.generate(texts, max_new_tokens=5)
    for text, name, output in zip(texts, names, outputs, strict=True):
        model, tokenizer = load_model(specialists[name]), load_tokenizer(specialists[name])
        assert generate(model, tokenizer, [text], max_new_tokens=5, batch_tokens=64) == [output]
    routed, forced = models.nll(texts), models.nll(texts, specialist=names[0])
    assert routed[0].nll == pytest.approx(forced[0].nll, abs=1e-3)
    assert [s.tokens for s in routed] == [s.tokens for s in forced]
    with pytest.raises(ConfigError, match=r"'digit' is no specialist.*did you mean 'digits'"):
        models.nll(texts, specialist="digit")


def test_the_same_recipe_gives_the_same_bytes(routes: dict[str, Path], config: MakeConfig, tmp_path: Path) -> None:
    again = build_route(config("kmeans"), tmp_path / "deep" / "again", Context())
    for name in ("route.json", "route.safetensors", "solera.json"):
        assert (again / name).read_bytes() == (routes["kmeans"] / name).read_bytes(), name


def test_models_of_other_architectures_and_tokenizers(
    tmp_path: Path, make_model: Callable[..., Path], config: MakeConfig, domain_text: dict[str, Path]
) -> None:
    """A GPT-2 whose tokenizer knows bytes only, beside a Llama: compared by the byte, each tokenizing for itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain: Any = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2 = make_model(tmp_path / "gpt2", family="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=256)
    for file in gpt2.glob("*token*"):
        file.unlink()
    fast(tokenizer_object=plain, eos_token="<end>").save_pretrained(gpt2)
    llama = make_model(tmp_path / "llama", seed=5)
    settings = config(
        "kmeans",
        specialists=[{"name": "a", "model": str(gpt2)}, {"name": "b", "model": str(llama)}],
        base_model=str(gpt2),
        clusters=2,
    )
    out = build_route(settings, tmp_path / "route", Context())
    row = checks(out)["held_out"]["digits"]["specialists"]
    assert row["a"]["nll"] / math.log(2) == pytest.approx(row["a"]["bits_per_byte"], rel=1e-4)  # a token is a byte
    models_ = RoutedModels.open(out)
    (bytewise,), (merged,) = (models_.nll(["the cask gives the spirit"], specialist=name) for name in "ab")
    assert bytewise.bytes == merged.bytes == bytewise.tokens > merged.tokens
    assert len(models_.generate(["12"], max_new_tokens=3)) == 1
    assert checks(out)["accuracy"]["domain"] is None  # the domains are no specialists


def test_labels_by_loss_need_no_domains(config: MakeConfig, domain_text: dict[str, Path], tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(file.read_text() for file in domain_text.values()))
    out = build_route(config("classifier", labels="nll", data={"everything": str(mixed)}), tmp_path / "out", Context())
    assert checks(out)["accuracy"]["best"] >= 0.9
    sent = checks(out)["held_out"]["everything"]["sent_to"]
    assert sum(sent.values()) == pytest.approx(1, abs=1e-3)
    assert all(share > 0.1 for share in sent.values())


def test_an_adapter_is_a_specialist(
    tmp_path: Path, siblings: dict[str, Path], specialists: dict[str, Path], config: MakeConfig
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on its own deprecations
        torch.manual_seed(0)
        plain: Any = AutoModelForCausalLM.from_pretrained(siblings["base"])
        settings_of = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        lora: Any = get_peft_model(plain, settings_of)
        lora.save_pretrained(tmp_path / "lora")
    both = f"{siblings['base']}+{tmp_path / 'lora'}"
    settings = config(
        "kmeans",
        specialists=[{"name": "plain", "model": str(specialists["letters"])}, {"name": "lora", "model": both}],
    )
    out = build_route(settings, tmp_path / "route", Context())
    (score,) = RoutedModels.open(out).nll(["abc def abc"], specialist="lora")
    with torch.inference_mode():
        from solera_core.causal_lm import load_tokenizer

        ids = torch.tensor([load_tokenizer(siblings["base"])("abc def abc").input_ids])
        logprobs = lora.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1)
    expected = -float(logprobs[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum())
    assert score.nll == pytest.approx(expected, abs=1e-3)


# places --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_project(
    tmp_path_factory: pytest.TempPathFactory,
    specialists: dict[str, Path],
    siblings: dict[str, Path],
    config: MakeConfig,
) -> Path:
    home = tmp_path_factory.mktemp("built")
    for name, path in {**specialists, "base": siblings["base"]}.items():
        shutil.copytree(path, home / name)
    models = [{"name": n, "model": f"./{n}"} for n in specialists]
    settings = config("centroid", specialists=models, base_model="base", documents_per_domain=12)
    build_route(settings, home / "out" / "route", Context(base_dir=home))
    return home


@pytest.fixture
def project(tmp_path: Path, built_project: Path) -> Path:
    """A folder with models, and a route `out/route` made from relative references."""
    return shutil.copytree(built_project, tmp_path / "project")


def test_a_route_is_found_from_anywhere_and_moves_with_its_models(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = RoutedModels.open(project / "out" / "route").route(["abc", "012", "+-*"])
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved" / "out")
    assert RoutedModels.open("route").route(["abc", "012", "+-*"]) == expected


def test_a_specialist_that_is_gone_is_named(project: Path) -> None:
    shutil.move(project / "digits", project / "elsewhere")
    shutil.rmtree(project / "signs")
    with pytest.raises(CheckpointError, match=r"(?s)specialist 'digits':.*specialist 'signs':.*places="):
        RoutedModels.open(project / "out" / "route")


def test_a_specialist_may_be_put_elsewhere(project: Path) -> None:
    shutil.move(project / "digits", project / "elsewhere")
    found = RoutedModels.open(project / "out" / "route", places={"digits": project / "elsewhere"})
    assert found.names == ("letters", "digits", "signs")
    with pytest.raises(ConfigError, match=r"'digit' is no specialist.*did you mean 'digits'"):
        RoutedModels.open(project / "out" / "route", places={"digit": project / "elsewhere"})
    with pytest.raises(CheckpointError, match=r"specialist 'digits' .* has changed"):
        RoutedModels.open(project / "out" / "route", places={"digits": project / "letters"})


def test_a_specialist_that_has_changed_is_named(project: Path, specialists: dict[str, Path]) -> None:
    shutil.copy(specialists["letters"] / "model.safetensors", project / "digits" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"specialist 'digits' .* has changed: blake3:.* fit the route again"):
        RoutedModels.open(project / "out" / "route")
    assert open_route(project / "out" / "route", Context()).names == ("letters", "digits", "signs")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "route.json").unlink(), "is no route"),
        (lambda d: (d / "route.json").write_text("{"), "cannot be read as JSON"),
        (lambda d: (d / "route.json").write_text('{"schema": 2}'), "not a route of schema 1"),
        (lambda d: (d / "route.json").write_text('{"schema": 1, "method": "kmeans"}'), "`specialists` is missing"),
        (lambda d: (d / "route.safetensors").unlink(), "route.safetensors is missing"),
        (lambda d: (d / "route.safetensors").write_bytes(b"x"), "cannot be read"),
    ],
)
def test_a_damaged_route_is_refused(project: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(project / "out" / "route")
    with pytest.raises(CheckpointError, match=message):
        RoutedModels.open(project / "out" / "route").route(["abc"])


# bad input -----------------------------------------------------------------------------------------------------------

ONE = [{"name": "letters", "model": "a"}]
TWO = [*ONE, {"name": "digits", "model": "b"}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"specialists": ONE}, "specialists: tuple should have at least 2 items"),
        ({"specialists": [*ONE, *ONE]}, "the name 'letters' is given twice; specialists: the model 'a' is given twice"),
        (
            {"specialists": TWO, "data": {"letters": "x", "digit": "y"}},
            r"data.digit: no such specialist \(did you mean",
        ),
        ({"specialists": TWO, "data": {"letters": "x"}}, "data: no text for digits"),
        ({"specialists": TWO, "data": {}}, "data: dictionary should have at least 1 item"),
        ({"base_model": None}, "base_model: method: auto needs one"),
        ({"method": "cascade", "base_model": "b"}, "a cascade asks the specialists themselves"),
        ({"method": "centroid", "clusters": 3}, "clusters: method: centroid has none"),
        ({"method": "nearest"}, "method: input should be"),
        ({"tolerence": 1}, "tolerence: unknown key"),
    ],
)
def test_wrong_settings_are_named(config: MakeConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def few(file: Path, target: Path, documents: int) -> str:
    target.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:documents]))
    return str(target)


def test_too_little_text_says_how_much_is_needed(
    config: MakeConfig, domain_text: dict[str, Path], tmp_path: Path
) -> None:
    data = {name: str(path) for name, path in domain_text.items()}
    data["digits"] = few(domain_text["digits"], tmp_path / "few.jsonl", 8)
    with pytest.raises(DataError, match=r"data.digits: 6 documents to fit on and 2 held out .* at least 8 and 2"):
        plan_route(config(data=data), Context())
    with pytest.raises(DataError, match=r"data.digits: 6 documents"):
        build_route(config(data=data), tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()
    data["digits"] = few(domain_text["digits"], tmp_path / "one.jsonl", 1)
    with pytest.raises(DataError, match=r"data.digits .*: only 1 document"):
        plan_route(config(data=data), Context())
    data["digits"] = data["letters"]
    with pytest.raises(DataError, match="all of it is also the text of 'letters'"):
        plan_route(config(data=data), Context())


def test_models_and_targets_that_will_not_do(config: MakeConfig, specialists: dict[str, Path], tmp_path: Path) -> None:
    twin = shutil.copytree(specialists["letters"], tmp_path / "twin")
    pair = [{"name": "letters", "model": str(specialists["letters"])}, {"name": "twin", "model": str(twin)}]
    with pytest.raises(ConfigError, match="'letters' and 'twin' hold the same weights"):
        build_route(config("kmeans", specialists=pair), tmp_path / "out", Context())
    pair[1]["model"] = str(tmp_path / "none")
    with pytest.raises(CheckpointError, match="none"):
        plan_route(config("kmeans", specialists=pair), Context())
    with pytest.raises(TargetError, match="lies in the directory of the input"):
        build_route(config(), specialists["letters"] / "route", Context())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["twin"]


def test_a_route_that_helps_nobody_says_so(
    config: MakeConfig,
    siblings: dict[str, Path],
    specialists: dict[str, Path],
    domain_text: dict[str, Path],
    tmp_path: Path,
) -> None:
    pair = [{"name": n, "model": str(p)} for n, p in (("letters", specialists["letters"]), ("base", siblings["base"]))]
    data = {"letters": str(domain_text["letters"])}
    out = build_route(config("kmeans", specialists=pair, data=data, clusters=1), tmp_path / "out", Context())
    warnings = " ".join(checks(out)["warnings"])
    assert "is no better than 'letters' alone" in warnings
    assert "no held-out text is sent to base" in warnings
    assert "only 10 documents are held out" in warnings


def test_a_plan_reads_no_weights(config: MakeConfig, specialists: dict[str, Path]) -> None:
    plan = plan_route(config(), Context())
    assert [row["what"] for row in plan.reads] == [
        *(f"specialist {n}" for n in specialists),
        "base",
        *(f"data.{n}" for n in specialists),
    ]
    assert [(row["domain"], row["fit"], row["held out"]) for row in plan.rows] == [(n, 30, 10) for n in specialists]
    assert json.dumps(plan.to_json())
    documents = read_documents(DataSource(path=str(config().data["digits"][0].path)), base_dir=Path())
    assert plan.rows[1]["bytes scored by every specialist"] == sum(d.n_bytes for d in documents)


# evaluation ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, held_out: tuple[list[Document], list[str]]) -> dict[str, Any]:
    """A text, a choice and a generation task over new draws of all three alphabets."""
    root = tmp_path_factory.mktemp("suite")
    texts = [(d.content.completion, name) for d, name in zip(*held_out, strict=True) if isinstance(d.content, Text)]
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": text, "domain": name} for text, name in texts],
        "choice": [{"prompt": t[:30], "choices": [t[30:34], "zzzz", "yyy"], "answer": 0} for t, _ in texts],
        "generate": [{"prompt": t[:30], "answer": "x"} for t, _ in texts],
    }
    for kind, content in rows.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    tasks = [{"name": kind, "kind": kind, "data": str(root / f"{kind}.jsonl")} for kind in rows]
    tasks[2]["max_new_tokens"] = 4  # type: ignore[assignment]
    return {"suite": "three", "tasks": tasks}


@pytest.mark.parametrize("method", ["centroid", "cascade"])
def test_a_route_is_evaluated_like_a_model(
    routes: dict[str, Path], specialists: dict[str, Path], suite: dict[str, Any], tmp_path: Path, method: str
) -> None:
    """Every item has the score that its specialist has on it."""
    from solera_eval.config import EvalConfig
    from solera_eval.records import read_results
    from solera_eval.run import evaluate, plan_evaluate

    models = {"routed": str(routes[method]), **{n: str(p) for n, p in specialists.items()}}
    config = parse(EvalConfig, {"models": models, "suites": [suite]}, where="test")
    reads = [Path(row["path"]).name for row in plan_evaluate(config, Context()).reads if row["kind"] == "model"]
    assert reads == [*specialists, *(["base"] if method == "centroid" else []), *specialists]
    out = evaluate(config, tmp_path / "results", Context())
    found = {name: read_results(out / name) for name in models}
    assert len({json.dumps(results.suite) for results in found.values()}) == 1
    used = set()
    for record in found["routed"].items:
        name = record.detail["specialist"]
        used.add(name)
        other = found[name].items_of(record.task)[record.item]
        assert record.score == pytest.approx(other.score, abs=1e-4)
        assert record.domain == other.domain
    assert used == set(specialists)
    assert [t.name for t in found["routed"].tasks] == ["text", "choice", "generate"]
    text, *_ = found["routed"].tasks
    assert text.value < min(found[name].tasks[0].value for name in specialists)
    assert text.extra["chance"] == found["digits"].tasks[0].extra["chance"]
    assert found["routed"].tasks[1].extra["chance"] == pytest.approx(1 / 3)


def test_an_evaluation_refuses_a_route_whose_models_have_changed(
    project: Path, suite: dict[str, Any], tmp_path: Path
) -> None:
    from solera_eval.config import EvalConfig
    from solera_eval.run import evaluate

    shutil.copy(project / "base" / "model.safetensors", project / "signs" / "model.safetensors")
    config = parse(EvalConfig, {"model": "out/route", "suites": [suite]}, where="test")
    with pytest.raises(CheckpointError, match=r"specialist 'signs' .* has changed"):
        evaluate(config, tmp_path / "results", Context(base_dir=project))
    assert not (tmp_path / "results").exists()


def test_a_route_is_no_checkpoint(project: Path) -> None:
    from solera_core.checkpoint import open_checkpoint

    with pytest.raises(CheckpointError, match="is a route over whole models"):
        open_checkpoint(project / "out" / "route", Context())


# docs ----------------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "route.md").read_text(encoding="utf-8")


def test_the_page_says_what_is_so() -> None:
    whole, stages = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    assert parse(RouteConfig, whole, where="docs").method == "auto"
    assert parse(RouteConfig, stages["door"]["route"], where="docs")
    rows = re.findall(r"^\| `(\w+)` \| ?(\S*) \|", PAGE, re.MULTILINE)
    fields = RouteConfig.model_fields
    table = {name: default for name, default in rows if name in fields}
    assert set(table) == set(fields)
    for name, field in fields.items():
        default = "" if field.is_required() or name == "base_model" else field.default
        assert table[name] == ("null" if default is None else str(default)), name
