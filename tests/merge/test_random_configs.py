"""Random recipes through mergekit and through solera, on tiny models of two families: the same output.

Drawn: method, models or slices, where each parameter is set (source, slice, global), gradients, filters, whether the
base is listed, tokenizer, dtypes. Where mergekit stops, `MERGEKIT_STOPS` names the entry of docs/parity.md; where the
outputs may differ, `DIFFERENT` does. For more examples by hand:
`SOLERA_EXAMPLES=2000 pytest tests/merge/test_random_configs.py`.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st

from solera_core.context import Context
from solera_core.strict import parse
from solera_merge.config import MergeConfig
from solera_merge.methods.catalogue import METHODS
from solera_merge.run import merge
from tests.merge.mergekit_reference import run_mergekit

MakeModel = Callable[..., Path]
Weights = Callable[[Path], dict[str, npt.NDArray[np.float32]]]
Draw = Callable[[st.SearchStrategy[Any]], Any]

LAYERS = 4
EXAMPLES = int(os.environ.get("SOLERA_EXAMPLES", "40"))
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
FILTERS = ["self_attn", "mlp", "down_proj", "layernorm", "embed_tokens", "*", None]
# Masks at random (dare, della), and what decides by rounding errors, padding rows or the sign of a cosine
# (arcee_fusion, sce, karcher, model_stock), have tests of their own in
# test_parity_mergekit.py.
DRAWN = [
    "linear",
    "slerp",
    "nuslerp",
    "multislerp",
    "task_arithmetic",
    "ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "nearswap",
    "ram",
    "ramplus_tl",
    "passthrough",
]
# Padding rows, which mergekit drops with a tokenizer, change the norms, angles and sums of a table elsewhere.
BY_ELEMENT = ["linear", "task_arithmetic", "ties", "breadcrumbs", "nearswap", "passthrough"]
PER_MODEL: dict[str, st.SearchStrategy[Any]] = {
    "weight": st.floats(0.1, 1),
    "density": st.floats(0.2, 1),
    "gamma": st.floats(0, 0.15),
}
SHARED: dict[str, st.SearchStrategy[Any]] = {
    "t": st.floats(0, 1),
    "lambda": st.floats(0.3, 1.2),
    "normalize": st.booleans(),
    "normalize_weights": st.booleans(),
    "nuslerp_flatten": st.booleans(),
    "nuslerp_row_wise": st.booleans(),
    "filter_wise": st.booleans(),
    "r": st.floats(0.05, 0.5),
    "alpha": st.floats(0.1, 0.5),
    "int8_mask": st.booleans(),
    "rescale": st.booleans(),
}


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


@st.composite
def a_setting(draw: Draw, scalar: st.SearchStrategy[Any], *, complete: bool) -> Any:
    """A scalar, a gradient, or choices by name; `complete`: with a value for every tensor."""

    def gradient() -> Any:
        return [_rounded(v) for v in draw(st.lists(scalar, min_size=1, max_size=4))]

    def value() -> Any:
        return gradient() if draw(st.booleans()) else _rounded(draw(scalar))

    if draw(st.integers(0, 2)) < 2:
        return value()
    choices = [
        {"filter": f, "value": value()} for f in draw(st.lists(st.sampled_from(FILTERS), min_size=1, max_size=2))
    ]
    return [*choices, {"value": value()}] if complete else choices


@st.composite
def a_recipe(draw: Draw) -> dict[str, Any]:
    """A recipe with names for models: `base`, `a`, `b`, `c`."""
    method = METHODS[draw(st.sampled_from(DRAWN))]
    based = method.base == "required" or (method.base == "optional" and draw(st.booleans()))
    most = min(method.most_models or 3, 3)
    fewest = max(method.fewest_models, 2 if method.name in ("linear", "multislerp", "model_stock") else 1)
    names = draw(st.permutations(["a", "b", "c"]))[: draw(st.integers(min(fewest, most), most))]
    if based and (method.name == "slerp" or draw(st.booleans())):
        names.insert(draw(st.integers(0, len(names))), "base")
    content: dict[str, Any] = {"merge_method": method.name, "parameters": {}}
    if based:
        content["base_model"] = "base"
    required = {"weight": True, "density": False, "gamma": False}
    per_model = [name for name in PER_MODEL if name in method.parameters]
    shared = [name for name in SHARED if name in method.parameters]

    def own(name: str) -> dict[str, Any]:
        if name == "base" and based:
            return {}
        given = {p: draw(a_setting(PER_MODEL[p], complete=False)) for p in per_model if draw(st.booleans())}
        if method.name == "passthrough" and draw(st.booleans()):
            given["scale"] = draw(a_setting(st.floats(0.5, 1.5), complete=False))
        return {"parameters": given} if given else {}

    if method.name == "passthrough" or draw(st.integers(0, 2)) == 0:
        content["slices"] = []
        for _ in range(draw(st.integers(1, 3))):
            length = draw(st.integers(1, 3))
            chosen = [draw(st.sampled_from(names))] if method.name == "passthrough" else names
            if based and "base" not in chosen:
                chosen = [*chosen, "base"]
            sources = []
            for name in chosen:
                first = draw(st.integers(0, LAYERS - length))
                sources.append({"model": name, "layer_range": [first, first + length], **own(name)})
            piece: dict[str, Any] = {"sources": sources}
            level = {p: draw(a_setting(PER_MODEL[p], complete=False)) for p in per_model if draw(st.booleans())}
            level |= {p: draw(a_setting(SHARED[p], complete=False)) for p in shared if draw(st.integers(0, 3)) == 0}
            content["slices"].append(piece | ({"parameters": level} if level else {}))
    else:
        content["models"] = [{"model": name, **own(name)} for name in names]
    for p in per_model:
        if required[p] or draw(st.booleans()):
            content["parameters"][p] = draw(a_setting(PER_MODEL[p], complete=True))
    for p in shared:
        if p == "t" or draw(st.booleans()):
            scalar = st.floats(1e-5, 1e-3) if method.name == "nearswap" else SHARED[p]
            content["parameters"][p] = draw(a_setting(scalar, complete=True))
    content["dtype"] = "float32"
    if (out := draw(st.sampled_from([None, "bfloat16", "float16"]))) is not None:
        content["out_dtype"] = out
    tokenizers = ["none", "none", "source", "union", "model", "pad"]
    if method.name not in BY_ELEMENT or "rescale" in json.dumps(content):
        tokenizers = ["none"]
    match draw(st.sampled_from(tokenizers)):
        case "source" if based:
            content["tokenizer_source"] = "base"
        case "union":
            content["tokenizer_source"] = "union"
        case "model":
            content["tokenizer_source"] = names[0]
        case "pad":
            content["tokenizer"] = {"source": "union", "pad_to_multiple_of": 8}
        case _:
            pass
    return content


def named(content: Any, paths: dict[str, str]) -> Any:
    """The recipe with directories for the names of models."""
    if isinstance(content, dict):
        keys = ("model", "base_model", "tokenizer_source")
        return {k: paths.get(v, v) if k in keys else named(v, paths) for k, v in content.items()}
    return [named(value, paths) for value in content] if isinstance(content, list) else content


_THRESHOLDS = "of deltas with equal magnitude at one of the two thresholds the first by position counts"
DIFFERENT = {  # method: what docs/parity.md says of it, and the share of the model's values that are equal all the same
    "ties": ("of deltas with equal magnitude at the threshold, the first by position are kept", 0.98),
    "breadcrumbs": (_THRESHOLDS, 0.98),
    "breadcrumbs_ties": (_THRESHOLDS, 0.98),
}
MERGEKIT_STOPS = {  # what it says, and what docs/parity.md says
    "validate_layer_type": "`slices` of any architecture set the number of layers, in its own key",
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> list[dict[str, str]]:
    """A base and three fine-tunes of a Llama, and the same of a Qwen2."""
    found: list[dict[str, str]] = []
    for family in ("llama", "qwen2"):
        root = tmp_path_factory.mktemp(family)
        size = {"num_hidden_layers": LAYERS, "hidden_size": 16, "intermediate_size": 24, "family": family}
        base = make_model(root / "base", **size)
        common = make_model(root / "common", base=base, seed=9, noise=0.2)  # task vectors point the same way in part
        tunes = {name: make_model(root / name, base=common, seed=i, noise=0.2) for i, name in enumerate("abc", 1)}
        found.append({name: str(path) for name, path in {"base": base, **tunes}.items()})
    return found


@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=a_recipe(), family=st.integers(0, 1))
def test_random_recipes(
    families: list[dict[str, str]], tmp_path: Path, weights: Weights, drawn: dict[str, Any], family: int
) -> None:
    content = named(drawn, families[family])
    note(json.dumps(drawn))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for out in (theirs, ours):
        shutil.rmtree(out, ignore_errors=True)
    # A refusal would fail the test: nothing that is drawn here is wrong.
    merge(parse(MergeConfig, content, where="recipe"), ours, Context(threads=1, flush=False, reload_check=False))
    try:
        run_mergekit(content, theirs)
    except Exception as e:  # whatever it is, it must be known
        event(f"mergekit stops: {type(e).__name__}")
        if not any(known in str(e) for known in MERGEKIT_STOPS):
            raise
        return
    vocabulary = json.loads(Path(families[family]["base"], "tokenizer.json").read_text())["model"]["vocab"]
    require_equal(drawn, weights(ours), weights(theirs), tokens=len(vocabulary))
    mine, other = (json.loads((out / "config.json").read_text()) for out in (ours, theirs))
    assert mine["num_hidden_layers"] == other["num_hidden_layers"]
    if "tokenizer_source" in drawn or "tokenizer" in drawn:
        vocabularies = [json.loads((out / "tokenizer.json").read_text())["model"]["vocab"] for out in (ours, theirs)]
        assert vocabularies[0] == vocabularies[1]


def require_equal(drawn: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any], *, tokens: int) -> None:
    """The same names; values within the rounding of the output's format, but for what `DIFFERENT` tells."""
    assert ours.keys() == theirs.keys()
    step = {None: 2e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}[drawn.get("out_dtype")]
    equal = size = 0
    for name, mine in ours.items():
        other = theirs[name]
        if name in TABLES and ("tokenizer_source" in drawn or "tokenizer" in drawn):
            # Of rows with a token. Padding stays here (docs/parity.md); and the class that transformers has for Qwen2's
            # tokenizer adds a token to this small one, which then is no padding to mergekit.
            mine, other = mine[:tokens], other[:tokens]
        close = np.abs(mine - other) <= step * max(float(np.abs(mine).max()), 1e-3)
        assert drawn["merge_method"] in DIFFERENT or close.all(), (name, float(close.mean()))
        equal += int(close.sum())
        size += close.size
    assert equal >= DIFFERENT.get(drawn["merge_method"], ("", 1.0))[1] * size, equal / size


def test_what_differs_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")
    for entry in (*(entry for entry, _ in DIFFERENT.values()), *MERGEKIT_STOPS.values()):
        assert entry in text
