"""Every construct of mergekit's documentation and examples, in files of our own: the same plan, the same output.

A file goes to both tools as it is. The plans are compared tensor by tensor (sources, method, every resolved parameter),
the outputs value by value.
"""

from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml

from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_core.strict import load_yaml, parse
from solera_merge.config import MergeConfig
from solera_merge.run import merge
from tests.merge.mergekit_reference import plan_of_mergekit, plan_of_solera, run_mergekit

MakeModel = Callable[..., Path]
Weights = Callable[[Path], dict[str, npt.NDArray[np.float32]]]

FILES = {
    "weights of models": """
        models:
          - model: $a
            parameters:
              weight: 1.0
          - {model: $b, parameters: {weight: 0.3}}
          - model: $c
            parameters: {weight: 5e-1}
        merge_method: linear
        dtype: float32
    """,
    "one weight for all, keys in any order": """
        dtype: float32
        parameters: {weight: 0.5, normalize: false}
        models: [{model: $a}, {model: $b}]
        merge_method: linear
    """,
    "numbers that YAML takes for text": """
        merge_method: linear
        models:
          - {model: $a, parameters: {weight: 3e-1}}
          - {model: $b, parameters: {weight: [1e-3, 1e0]}}
        dtype: float32
    """,
    "a gradient by filter, in slices": """
        slices:
          - sources:
              - model: $a
                layer_range: [0, 5]
              - model: $b
                layer_range: [0, 5]
        merge_method: slerp
        base_model: $a
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5   # everything else
        dtype: float32
    """,
    "a gradient by filter, in models": """
        models: [{model: $a}, {model: $b}]
        merge_method: slerp
        base_model: $a
        parameters:
          t:
            - {filter: input_layernorm, value: [0.2, 0.9, 0.1]}
            - {filter: "*", value: 0.5}
        dtype: float32
    """,
    "a base that is not listed": """
        merge_method: slerp
        base_model: $a
        models: [{model: $b}]
        parameters: {t: 0.4}
        dtype: float32
    """,
    "layers of two models stacked": """
        slices:
          - sources:
              - model: $a
                layer_range: [0, 3]
          - sources:
              - model: $b
                layer_range: [1, 5]
        merge_method: passthrough
        dtype: float16
    """,
    "scaled layers, one filter without a list": """
        merge_method: passthrough
        slices:
          - sources: [{model: $a, layer_range: [0, 3]}]
          - sources:
              - model: $a
                layer_range: [2, 5]
                parameters: {scale: {filter: down_proj, value: 0.5}}
          - sources: [{model: $b, layer_range: [4, 5]}]
            parameters:
              scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]
    """,
    "gradients of density and weight, masks of bytes": """
        models:
          - model: $a
            parameters:
              density: [1, 0.7, 0.1]
              weight: 1.0
          - model: $b
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1]
          - model: $c
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0.1
        merge_method: ties
        base_model: $base
        parameters: {normalize: true, int8_mask: true}
        dtype: float32
    """,
    "a plain sum of trimmed changes, the base listed": """
        models:
          - model: $base
          - {model: $a, parameters: {density: 0.5, weight: 0.5}}
          - {model: $b, parameters: {density: 0.5, weight: 0.5}}
        merge_method: ties
        base_model: $base
        parameters: {normalize: false, int8_mask: true, lambda: 0.8}
        dtype: float32
    """,
    "importance decides, the base listed": """
        models: [{model: $base}, {model: $a}]
        merge_method: arcee_fusion
        base_model: $base
        dtype: float32
        out_dtype: float32
    """,
    "levels: source, slice, global": """
        merge_method: task_arithmetic
        base_model: $base
        parameters: {weight: 0.1, normalize: false}
        slices:
          - sources:
              - {model: $base, layer_range: [0, 2]}
              - {model: $a, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: 0.7}]}}
              - {model: $b, layer_range: [0, 2]}
            parameters: {weight: [{filter: self_attn, value: [0.2, 0.4]}]}
          - sources:
              - {model: $base, layer_range: [2, 5]}
              - {model: $b, layer_range: [2, 5], parameters: {weight: 0.9}}
        dtype: float32
    """,
    "levels: module": """
        merge_method: task_arithmetic
        base_model: $base
        parameters: {weight: 0.1, lambda: 0.5}
        modules:
          default:
            models:
              - {model: $a, parameters: {weight: [{filter: mlp, value: 0.7}]}}
              - {model: $b}
            parameters: {weight: 0.3}
        dtype: float32
    """,
    "a base for one slice": """
        merge_method: task_arithmetic
        base_model: $base
        parameters: {weight: 0.5}
        slices:
          - sources: [{model: $base, layer_range: [0, 2]}, {model: $a, layer_range: [0, 2]}]
          - base_model: $c
            sources: [{model: $c, layer_range: [2, 5]}, {model: $b, layer_range: [2, 5]}]
        dtype: float32
    """,
    "anchors, aliases, merge keys and comments": """
        # what two models share
        merge_method: ties
        base_model: &old $base
        models:
          - model: $a
            parameters: &common {weight: 0.5, density: &kept [0.9, 0.2]}
          - {model: $b, parameters: *common}
          - {model: $c, parameters: {<<: *common, weight: 0.25}}   # the same, weighted less
          - model: *old
        dtype: float32
    """,
    "models as mappings": """
        merge_method: linear
        models:
          - {model: {model: {path: $a}}, parameters: {weight: 0.5}}
          - {model: {model: $b}, parameters: {weight: 0.5}}
        tokenizer_source: {model: {path: $b}}
        dtype: float32
    """,
    "the base's tokenizer": """
        merge_method: linear
        base_model: $a
        models: [{model: $a, parameters: {weight: 0.5}}, {model: $b, parameters: {weight: 0.5}}]
        tokenizer_source: base
        dtype: float32
    """,
    "a union with tokens of its own, a chat format": """
        merge_method: linear
        base_model: $a
        models: [{model: $a, parameters: {weight: 0.5}}, {model: $b, parameters: {weight: 0.5}}]
        tokenizer:
          source: union
          tokens:
            <|copied|>: {source: {kind: model_token, model: $b, token: a}}
            <|row|>: {source: {kind: model_token, model: $b, token_id: 9}}
            <|none|>: {source: {kind: zero}}
            </s>: {source: $b, force: true}
            <s>: {source: {kind: model, model: $b}, force: true}
          pad_to_multiple_of: 16
        chat_template: chatml
        dtype: float32
    """,
}
METHODS = {
    "nuslerp": "models: [{model: $a, parameters: {weight: 0.3}}, {model: $b, parameters: {weight: 0.7}}]",
    "nuslerp, by row": """
        base_model: $base
        models: [{model: $a}, {model: $b}]
        parameters: {weight: 0.5, nuslerp_flatten: false, nuslerp_row_wise: true}
    """,
    "multislerp": """
        models: [{model: $a}, {model: $b}, {model: $c}]
        parameters: {weight: [0.3, 0.6], normalize_weights: true, eps: 1e-10}
    """,
    "karcher": "{models: [{model: $a}, {model: $b}], parameters: {max_iter: 12, tol: 1e-6}}",
    "task_arithmetic": "{base_model: $base, models: [{model: $a}], parameters: {weight: 0.3, lambda: 0.5}}",
    "breadcrumbs": """
        base_model: $base
        models: [{model: $a, parameters: {gamma: 0.02}}, {model: $b}]
        parameters: {weight: 0.5, density: 0.9}
    """,
    "breadcrumbs_ties": """
        base_model: $base
        models: [{model: $a}, {model: $b, parameters: {gamma: [0.1, 0]}}]
        parameters: {weight: 0.5, density: 0.6, lambda: 0.9}
    """,
    "model_stock": "{base_model: $base, models: [{model: $a}, {model: $aa}], parameters: {filter_wise: false}}",
    "nearswap": "{base_model: $base, models: [{model: $a}], parameters: {t: [1e-4, 1e-3]}}",
    "ram": "{base_model: $base, models: [{model: $a}, {model: $b}], parameters: {epsilon: 1e-5}}",
    "ramplus_tl": "{base_model: $base, models: [{model: $a}, {model: $b}], parameters: {r: 0.2, alpha: 0.3}}",
}
RANDOM = {  # other masks: only the plans can be compared (how the outputs agree: test_parity_mergekit.py)
    "dare_ties": """
        base_model: $base
        models: [{model: $a, parameters: {density: 0.6}}, {model: $b, parameters: {density: [0.8, 0.2]}}]
        parameters: {weight: 0.5, lambda: 1.1}
    """,
    "dare_linear": "{base_model: $base, models: [{model: $a}], parameters: {weight: 1, density: 0.5, rescale: false}}",
    "della": """
        base_model: $base
        models: [{model: $a, parameters: {epsilon: 0.05}}, {model: $b}]
        parameters: {weight: 0.5, density: 0.6, epsilon: 0.2}
    """,
    "della_linear": "{base_model: $base, models: [{model: $a}], parameters: {weight: 1, density: 0.5, epsilon: 0.1}}",
    # mergekit takes equal coefficients where changes are small (docs/parity.md)
    "sce": "{base_model: $base, models: [{model: $a}, {model: $b}], parameters: {select_topk: [0.2, 0.8]}}",
}
BY_METHOD = {
    name: f"merge_method: {name.partition(',')[0]}\ndtype: float32\n{text}" for name, text in (METHODS | RANDOM).items()
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> dict[str, str]:
    """A base of five layers and three fine-tunes."""
    root = tmp_path_factory.mktemp("language")
    base = make_model(root / "base", num_hidden_layers=5, hidden_size=16)
    tunes = {name: make_model(root / name, base=base, seed=i, noise=0.05) for i, name in enumerate("abc", 1)}
    tunes["aa"] = make_model(root / "aa", base=tunes["a"], seed=4, noise=0.03)  # changed much as `a` is
    return {name: str(path) for name, path in {"base": base, **tunes}.items()}


@pytest.fixture
def written(tmp_path: Path, models: dict[str, str]) -> Callable[[str], Path]:
    """The file with directories for the names of models."""

    def write(name: str) -> Path:
        text = FILES.get(name) or BY_METHOD[name]
        if text.startswith("merge_method") and text.splitlines()[2][:1] == "{":  # flow style: one mapping
            first, second, *rest = text.splitlines()
            text = "{" + f"{first}, {second}, " + "\n".join(rest)[1:]
        else:
            text = _dedented(text)
        file = tmp_path / "config.yml"
        file.write_text(Template(text).substitute(models), encoding="utf-8")
        return file

    return write


def _dedented(text: str) -> str:
    lines = text.splitlines()
    return "\n".join(line[8:] if line.startswith(" " * 8) else line for line in lines)


def _both(file: Path) -> tuple[dict[str, Any], MergeConfig]:
    return yaml.safe_load(file.read_text()), parse(MergeConfig, load_yaml(file), where=str(file))


@pytest.mark.parametrize("name", [*FILES, *BY_METHOD])
def test_the_plan_is_mergekits(written: Callable[[str], Path], name: str) -> None:
    raw, config = _both(written(name))
    theirs, ours = plan_of_mergekit(raw), plan_of_solera(config)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 40
    for tensor, mine in ours.items():
        other = theirs[tensor]
        assert (mine.method, set(mine.sources), mine.base) == (other.method, set(other.sources), other.base), tensor
        assert set(mine.shared) - set(other.shared) <= {"scope"}, tensor
        assert set(other.shared) <= set(mine.shared), tensor
        assert {n: mine.shared[n] for n in other.shared} == pytest.approx(other.shared), tensor
        assert set(other.per_model) <= set(mine.per_model), tensor
        assert set(mine.per_model) - set(other.per_model) <= ({"weight"} if mine.method == "karcher" else set()), tensor
        for parameter, values in other.per_model.items():
            expected = dict(zip(other.sources, values, strict=True))
            assert dict(zip(mine.sources, mine.per_model[parameter], strict=True)) == pytest.approx(expected), tensor


@pytest.mark.parametrize("name", [*FILES, *METHODS])
def test_the_output_is_mergekits(
    written: Callable[[str], Path], weights: Weights, models: dict[str, str], tmp_path: Path, name: str
) -> None:
    content, config = _both(written(name))
    run_mergekit(content, tmp_path / "theirs")
    merge(config, tmp_path / "ours", Context(threads=1, flush=False))
    theirs, ours = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    tops = {key: np.abs(value).max() for key, value in ours.items()}
    for tensor, mine in ours.items():
        other = theirs[tensor]
        if mine.shape != other.shape:  # padded rows, which mergekit drops (docs/parity.md)
            assert "tokenizer" in name or "mapping" in name or "union" in name
            assert tensor in ("model.embed_tokens.weight", "lm_head.weight")
            mine = mine[: len(other)]
        close = np.abs(mine - other) <= 2e-6 * tops[tensor]
        selects = name.startswith(("breadcrumbs", "importance"))  # equal magnitudes, samples: docs/parity.md
        assert close.mean() >= (0.98 if selects else 1.0), tensor


def test_a_model_as_a_mapping(models: dict[str, str]) -> None:
    """mergekit's long form is read as the line that it stands for."""

    def model(value: Any) -> str:
        content = {"merge_method": "linear", "models": [{"model": value, "parameters": {"weight": 1}}]}
        config = parse(MergeConfig, content, where="recipe")
        assert config.models is not None
        return config.models[0].model

    assert model({"model": {"path": "org/name", "revision": "v1"}}) == "org/name@v1"
    assert (
        model({"model": {"path": "org/name"}, "lora": {"path": "org/lora", "revision": "x"}}) == "org/name+org/lora@x"
    )
    assert model({"model": "org/name@v1", "lora": "./lora"}) == "org/name@v1+./lora"
    for wrong, said in [
        ({"model": {"path": "a"}, "override_architecture": "LlamaForCausalLM"}, "override_architecture: not needed"),
        ({"model": {"path": "a", "version": "1"}}, "model.version: unknown key"),
        ({"modle": "a"}, "modle: unknown key"),
        ({"lora": "a"}, "needs a `model`"),
        ({"model": {"revision": "a"}}, "model: needs a `path`"),
    ]:
        with pytest.raises(ConfigError, match=said):
            model(wrong)
