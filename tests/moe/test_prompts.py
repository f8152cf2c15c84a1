"""Routers made of prompts, mergekit-moe's YAML, and its two knobs on experts; against mergekit itself where it runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from solera.stages import read_stage
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import ConfigError, DataError
from solera_core.strict import parse
from solera_merge.moe.altered import altered
from solera_merge.moe.build import build_moe, plan_moe
from solera_merge.moe.config import MoeConfig
from solera_merge.moe.prompts import MARGIN, prompt_rows

PROMPTS = {
    "letters": ["abc de fgh", "h g f e d c b a", "bead cafe fade"],
    "digits": ["0123 45 678", "9 8 7 6 5 4", "31 41 59 26 53"],
    "signs": ["+-*/ () []", "[+] (-) (*) [/]", "(+-*) [/]"],
}
MODES = ("hidden", "hidden_avg", "cheap_embed")


def routers_of(out: Path, name: str = "block_sparse_moe.gate") -> np.ndarray:
    weights = load_file(out / "model.safetensors")
    return np.stack([weights[f"model.layers.{layer}.{name}.weight"] for layer in (0, 1)])


def settings(base: Path, experts: dict[str, Path], fit: str, **more: Any) -> dict[str, Any]:
    rows = [{"name": n, "model": str(p), "prompts": PROMPTS[n]} for n, p in experts.items()]
    return {"base_model": str(base), "experts": rows, "router": {"fit": fit}, **more}


def built(out: Path, raw: dict[str, Any], **ctx: Any) -> Path:
    return build_moe(parse(MoeConfig, raw, where="test"), out, Context(**ctx))


def checks_of(out: Path) -> dict[str, Any]:
    checks: dict[str, Any] = json.loads((out / "solera.json").read_text())["checks"]
    return checks


@pytest.fixture
def mergekit_yaml(siblings: dict[str, Path], specialists: dict[str, Path]) -> dict[str, Any]:
    """As people write it; the first expert has a negative prompt."""
    experts = [{"source_model": str(path), "positive_prompts": PROMPTS[n]} for n, path in specialists.items()]
    experts[0]["negative_prompts"] = ["1 + 2"]
    return {"base_model": str(siblings["base"]), "dtype": "float32", "experts_per_token": 2, "experts": experts}


# --- prompts at the right site


def test_prompts_route_their_own_domain(
    tmp_path: Path, siblings: dict[str, Path], specialists: dict[str, Path], domain_text: dict[str, Path]
) -> None:
    from solera_core.causal_lm import load_model, load_tokenizer
    from solera_merge.moe.calibration import Sequences
    from solera_merge.moe.routing import first_choices, mean_nll

    out = built(tmp_path / "moe", settings(siblings["base"], specialists, "prompts"))
    facts = checks_of(out)["router"]
    assert facts["fit"] == "prompts"
    assert facts["prompts"] == dict.fromkeys(PROMPTS, 3)
    on_prompts = np.array([facts["route_accuracy_on_prompts"][name] for name in PROMPTS])
    assert on_prompts.shape == (3, 2)
    assert on_prompts.mean() > 0.8
    assert any("made of a few prompts" in warning for warning in checks_of(out)["warnings"])
    model, tokenizer = load_model(out), load_tokenizer(out)
    right: list[float] = []
    for e, file in enumerate(domain_text.values()):
        ids = tuple(tokenizer(json.loads(file.read_text().splitlines()[0])["text"]).input_ids[:100])
        with first_choices(model, 3) as counts:
            mean_nll(model, Sequences((ids,), ((True,) * len(ids),)))
        right.append(float((counts[:, e] / counts.sum(axis=1)).mean()))
    assert np.mean(right) > 0.6, right  # on text that is not the prompts; chance is a third


def test_prompt_rows_by_hand() -> None:
    none = np.zeros((0, 2))
    positive = [np.array([[3.0, 1.0], [1.0, 1.0]]), np.array([[-2.0, 1.0]])]
    rows, right = prompt_rows(positive, [none, none])
    assert right == [1.0, 1.0]
    np.testing.assert_allclose(rows.sum(axis=0), 0, atol=1e-12)
    margins = [x @ (rows[e] - rows[1 - e]) for e, x in enumerate(positive)]
    assert np.concatenate(margins).mean() == pytest.approx(MARGIN)
    negative = np.array([[1.0, -1.0]])
    away, _ = prompt_rows(positive, [negative, none])
    assert float(away[0] @ negative[0]) < float(rows[0] @ negative[0])  # a negative prompt pushes its expert away


def test_a_temperature_divides_the_rows(
    tmp_path: Path, siblings: dict[str, Path], specialists: dict[str, Path]
) -> None:
    raw = settings(siblings["base"], specialists, "prompts")
    one = routers_of(built(tmp_path / "one", raw))
    raw["router"]["temperature"] = 4.0
    np.testing.assert_allclose(routers_of(built(tmp_path / "four", raw)), one / 4, rtol=1e-6)


# --- mergekit's YAML and its gates


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore")  # mergekit's own
def test_gates_are_those_of_mergekit(tmp_path: Path, mergekit_yaml: dict[str, Any], mode: str) -> None:
    moe = pytest.importorskip("mergekit.scripts.moe")
    from mergekit.merge import MergeOptions
    from mergekit.moe.config import MoEMergeConfig

    raw = mergekit_yaml | {"gate_mode": mode}
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    moe.build(MoEMergeConfig.model_validate(raw), str(theirs), MergeOptions(), device="cpu")
    ours = built(tmp_path / "ours", raw)
    expected = routers_of(theirs, "mlp.gate")
    found = routers_of(ours)
    # theirs are means of bfloat16 states, taken in bfloat16
    np.testing.assert_allclose(found, expected, atol=1e-6 if mode == "cheap_embed" else 1e-2)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 0.05  # the tolerance tells experts apart
    # and the experts are the same: fused there, by name here
    fused = load_file(theirs / "model.safetensors")["model.layers.1.mlp.experts.down_proj"]
    for e in range(3):
        name = f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"
        np.testing.assert_array_equal(load_file(ours / "model.safetensors")[name], fused[e])


def test_random_gates_have_the_spread_of_mergekit(tmp_path: Path, mergekit_yaml: dict[str, Any]) -> None:
    normal = routers_of(built(tmp_path / "normal", mergekit_yaml | {"gate_mode": "random"}))
    uniform = routers_of(built(tmp_path / "uniform", mergekit_yaml | {"gate_mode": "uniform_random"}))
    assert normal.std() == pytest.approx(1, abs=0.15)
    bound = 32**-0.5
    assert np.abs(uniform).max() <= bound
    assert uniform.std() == pytest.approx(bound / 3**0.5, rel=0.15)
    again = routers_of(built(tmp_path / "again", mergekit_yaml | {"gate_mode": "random"}, threads=3))
    np.testing.assert_array_equal(again, normal)  # theirs differ in every run


def test_mergekits_yaml_is_read_as_it_stands(tmp_path: Path, mergekit_yaml: dict[str, Any]) -> None:
    file = tmp_path / "mergekit.yml"
    mergekit_yaml["experts"][1]["residual_scale"] = 0.5
    mergekit_yaml["experts"][2]["noise_scale"] = None
    file.write_text(yaml.safe_dump(mergekit_yaml))
    config, base_dir = read_stage("moe", file)
    assert base_dir == Path()  # relative to where one stands, as there
    assert isinstance(config, MoeConfig)
    assert config.router.fit == "mergekit_hidden"
    assert [expert.name for expert in config.experts] == list(PROMPTS)
    assert config.experts[0].negative_prompts == ("1 + 2",)
    assert [expert.residual_scale for expert in config.experts] == [1, 0.5, 1]
    assert config.target == "auto"
    file.write_text(yaml.safe_dump({"base_model": "t", "experts": [], "router": {"fit": "random"}}))
    with pytest.raises(ConfigError):
        read_stage("moe", file)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gate_mode": "magic"}, "gate_mode: 'magic' is none of hidden"),
        ({"architecture": "deepseek"}, "architecture: 'deepseek'.*Python code from the hub"),
        ({"architecture": "strange"}, "architecture: 'strange' is none"),
        ({"shared_experts": [{"source_model": "x"}] * 2}, "shared_experts: one is possible"),
        ({"shared_experts": [{"source_model": "x", "noise_scale": 1}]}, "shared_experts: noise_scale: .*remove it"),
        ({"expert_per_token": 2}, "expert_per_token: unknown key"),
        ({"experts_per_token": 4}, "top_k: 4 experts a token asked, but there are only 3"),
        ({"experts": [{"source_model": "a"}, {"source_model": "b"}]}, "a, b: no prompts, and router.fit: mergekit_hid"),
        (
            {"experts": [{"source_model": n, "positive_prompts": ["x"]} for n in "ab"]},
            "all have the same prompts, so no router can tell them apart",
        ),
        (
            {"experts": [{"source_model": "a", "positive_prompts": [" "]}, {"source_model": "b"}]},
            "'a': a prompt is empty",
        ),
    ],
)
def test_what_is_wrong_in_mergekits_yaml_is_said(
    mergekit_yaml: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(MoeConfig, mergekit_yaml | change, where="test")


def test_architectures_and_names_of_mergekit(mergekit_yaml: dict[str, Any]) -> None:
    experts = [{"source_model": ref} for ref in ("org/one@v1", "other/one", "one+lora", "./x/two/")]
    raw = mergekit_yaml | {"experts": experts, "gate_mode": "random", "architecture": "Qwen3 MoE"}
    config = parse(MoeConfig, raw, where="test")
    assert [expert.name for expert in config.experts] == ["one", "one-2", "one-3", "two"]
    assert config.target == "qwen3_moe"
    assert parse(MoeConfig, mergekit_yaml | {"architecture": "mixtral"}, where="test").target == "mixtral"


def test_prompts_that_nothing_uses_are_an_error(siblings: dict[str, Path], specialists: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"router\.fit: random does not use them"):
        parse(MoeConfig, settings(siblings["base"], specialists, "random"), where="test")


def test_a_prompt_without_tokens(tmp_path: Path, siblings: dict[str, Path], specialists: dict[str, Path]) -> None:
    base = tmp_path / "base"
    shutil.copytree(siblings["base"], base)
    content = json.loads((base / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": ""}
    (base / "tokenizer.json").write_text(json.dumps(content))
    raw = settings(base, specialists, "prompts")
    raw["experts"][1]["prompts"] = ["~"]
    with pytest.raises(DataError, match=r"'digits': the prompt '~' has no tokens"):
        built(tmp_path / "out" / "moe", raw)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_the_plan_of_a_prompt_router_reads_no_weights(siblings: dict[str, Path], specialists: dict[str, Path]) -> None:
    plan = plan_moe(parse(MoeConfig, settings(siblings["base"], specialists, "prompts"), where="test"), Context())
    assert {row["source"] for row in plan.rows if row["from"] == "router"} == {"prompts"}


# --- scaled and noisy experts


def test_residual_scale_and_noise(tmp_path: Path, siblings: dict[str, Path], make_model: Callable[..., Path]) -> None:
    raw = {
        "base_model": str(siblings["base"]),
        "experts": [
            {"name": "scaled", "model": str(siblings["a"]), "residual_scale": 0.25},
            {"name": "noisy", "model": str(siblings["a"]), "noise_scale": 0.5},
        ],
        "router": {"fit": "random"},
    }
    out = built(tmp_path / "moe", raw)
    moe, source = load_file(out / "model.safetensors"), load_file(siblings["a"] / "model.safetensors")
    for slot, part in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        plain = source[f"model.layers.1.mlp.{part}_proj.weight"]
        scaled, noisy = (moe[f"model.layers.1.block_sparse_moe.experts.{e}.{slot}.weight"] for e in (0, 1))
        np.testing.assert_array_equal(scaled, plain * np.float32(0.25 if part == "down" else 1))
        assert (noisy - plain).std() == pytest.approx(0.5, rel=0.1)
        assert abs((noisy - plain).mean()) < 0.05
    assert max(checks_of(out)["identity"]["specialists"].values()) <= 1e-5


def test_noise_is_the_same_however_it_is_read(siblings: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("solera_merge.moe.altered._BLOCK", 100)
    plain = open_checkpoint(siblings["a"], Context())
    noisy = altered(plain, residual_scale=2, noise_scale=0.5, seed=0, name="a")
    tensor = "model.layers.0.mlp.down_proj.weight"
    whole = noisy.read_flat(tensor)
    np.testing.assert_array_equal(noisy.read_flat(tensor, 37, 512), whole[37:512])
    assert (whole / 2 - plain.read_flat(tensor)).std() == pytest.approx(0.5, rel=0.1)
    other = altered(plain, residual_scale=2, noise_scale=0.5, seed=1, name="a")
    assert np.abs(other.read_flat(tensor) - whole).max() > 0.5
    assert other.digest() != noisy.digest() != plain.digest()
    norm = "model.norm.weight"
    np.testing.assert_array_equal(noisy.read_flat(norm), plain.read_flat(norm))
