"""Random recipes through mergekit and through solera, on tiny models: the same output.

Drawn: any method that mergekit has, models or slices, where each parameter is set (source, slice, global), gradients,
filters, whether the base is listed, tokenizer, dtypes. Models: a Llama and a Qwen2 with rows that have no token, and a
Llama whose fine-tunes have tokens of their own and no other rows, for the tokenizers of methods that look at whole
tables. Where a method draws random masks, mergekit gets solera's. Where mergekit stops, `MERGEKIT_STOPS` names the
entry of docs/parity.md; where the outputs may differ, `DIFFERENT` does. What `dtype` means to mergekit is drawn with
`compat: mergekit`, byte by byte. For more examples by hand:
`SOLERA_EXAMPLES=2000 pytest tests/merge/test_random_configs.py`.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_core.strict import parse
from solera_merge.config import MergeConfig
from solera_merge.masks import words
from solera_merge.methods.catalogue import METHODS
from solera_merge.plan import make_plan
from solera_merge.run import merge
from tests.merge.mergekit_reference import run_mergekit

MakeModel = Callable[..., Path]
Weights = Callable[[Path], dict[str, npt.NDArray[np.float32]]]
Draw = Callable[[st.SearchStrategy[Any]], Any]

LAYERS = 4
DEFAULT_EXAMPLES = 48
EXAMPLES = int(os.environ.get("SOLERA_EXAMPLES", DEFAULT_EXAMPLES))
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
FILTERS = ["self_attn", "mlp", "down_proj", "layernorm", "embed_tokens", "*", None]
RANDOM = ["dare_linear", "dare_ties", "della", "della_linear"]  # with `rescale` off: it differs (docs/parity.md)
DRAWN = [
    "linear",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "task_arithmetic",
    "ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "model_stock",
    "nearswap",
    "arcee_fusion",
    "ram",
    "ramplus_tl",
    "passthrough",
    *RANDOM,
]
# Padding rows, which mergekit drops with a tokenizer, change the norms, angles and sums of a table elsewhere.
BY_ELEMENT = ["linear", "task_arithmetic", "ties", "breadcrumbs", "nearswap", "passthrough"]
PER_MODEL: dict[str, st.SearchStrategy[Any]] = {
    "weight": st.floats(0.1, 1),
    "density": st.floats(0.2, 1),
    "gamma": st.floats(0, 0.15),
    "epsilon": st.floats(0.05, 0.25),
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
    "max_iter": st.integers(1, 6),
    "select_topk": st.floats(0.2, 1),
}
DELLA: dict[str, st.SearchStrategy[Any]] = PER_MODEL | {"density": st.floats(0.3, 0.7)}  # +- epsilon within 0 and 1
FAMILIES = ["llama", "qwen2", "vocabularies"]
OWN_TOKENS = {"base": [], "a": ["<x>", "<y>"], "b": ["<y>", "<z>"], "c": []}  # in the family "vocabularies"
NEW = {token for tokens in OWN_TOKENS.values() for token in tokens}


UNDRAWN = {("rescale", name) for name in RANDOM} | {("normalize", "sce")}


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


@st.composite
def a_setting(draw: Draw, scalar: st.SearchStrategy[Any], *, complete: bool, gradients: bool = True) -> Any:
    """A scalar, a gradient, or choices by name; `complete`: with a value for every tensor."""

    def gradient() -> Any:
        return [_rounded(v) for v in draw(st.lists(scalar, min_size=1, max_size=4))]

    def value() -> Any:
        return gradient() if gradients and draw(st.booleans()) else _rounded(draw(scalar))

    if draw(st.integers(0, 2)) < 2:
        return value()
    choices = [
        {"filter": f, "value": value()} for f in draw(st.lists(st.sampled_from(FILTERS), min_size=1, max_size=2))
    ]
    return [*choices, {"value": value()}] if complete else choices


@st.composite
def a_recipe(draw: Draw, *, methods: Sequence[str] = DRAWN, family: str = "llama") -> dict[str, Any]:
    """A recipe with names for models: `base`, `a`, `b`, `c`."""
    method = METHODS[draw(st.sampled_from(methods))]
    scalars = DELLA if method.name.startswith("della") else PER_MODEL
    based = method.base == "required" or (method.base == "optional" and draw(st.booleans()))
    most = min(method.most_models or 3, 3)
    fewest = max(method.fewest_models, 2 if method.name in ("linear", "multislerp", "model_stock", "karcher") else 1)
    names = draw(st.permutations(["a", "b", "c"]))[: draw(st.integers(min(fewest, most), most))]
    if based and (method.name == "slerp" or draw(st.booleans())):
        names.insert(draw(st.integers(0, len(names))), "base")
    content: dict[str, Any] = {"merge_method": method.name, "parameters": {}}
    if based:
        content["base_model"] = "base"
    per_model = [name for name in PER_MODEL if name in method.parameters and method.parameters[name].per_model]
    shared = [name for name in SHARED if name in method.parameters and (name, method.name) not in UNDRAWN]
    if method.name == "karcher":
        per_model = []  # `weight` is ours

    def own(name: str) -> dict[str, Any]:
        if name == "base" and based:
            return {}
        given = {p: draw(a_setting(scalars[p], complete=False)) for p in per_model if draw(st.booleans())}
        if method.name == "passthrough" and draw(st.booleans()):
            given["scale"] = draw(a_setting(st.floats(0.5, 1.5), complete=False))
        return {"parameters": given} if given else {}

    if method.name == "passthrough" or draw(st.integers(0, 2)) == 0:
        content["slices"] = []
        for _ in range(draw(st.integers(1, 3))):
            length = draw(st.integers(1, 3))
            chosen = [draw(st.sampled_from(names))] if method.name == "passthrough" else names
            same = draw(st.integers(0, LAYERS - length)) if method.name == "model_stock" else None
            if based and "base" not in chosen:
                chosen = [*chosen, "base"]
            sources = []
            for name in chosen:
                # Unrelated layers may be opposed, which model_stock does not extrapolate (docs/parity.md).
                first = draw(st.integers(0, LAYERS - length)) if same is None else same
                sources.append({"model": name, "layer_range": [first, first + length], **own(name)})
            piece: dict[str, Any] = {"sources": sources}
            level = {p: draw(a_setting(scalars[p], complete=False)) for p in per_model if draw(st.booleans())}
            level |= {
                p: draw(a_setting(SHARED[p], complete=False, gradients=p != "max_iter"))
                for p in shared
                if draw(st.integers(0, 3)) == 0
            }
            content["slices"].append(piece | ({"parameters": level} if level else {}))
    else:
        content["models"] = [{"model": name, **own(name)} for name in names]
    for p in per_model:
        if p == "weight" or draw(st.booleans()):
            content["parameters"][p] = draw(a_setting(scalars[p], complete=True))
    for p in shared:
        if p == "t" or draw(st.booleans()):
            scalar = st.floats(1e-5, 1e-3) if method.name == "nearswap" else SHARED[p]
            # Between whole numbers mostly lies none: an error in both tools (test_settings.py).
            content["parameters"][p] = draw(a_setting(scalar, complete=True, gradients=p != "max_iter"))
    if method.name in RANDOM:
        content["parameters"]["rescale"] = False
    content["dtype"] = "float32"
    if (out := draw(st.sampled_from([None, "bfloat16", "float16"]))) is not None:
        content["out_dtype"] = out
    tokenizers = ["none", "none", "source", "union", "model", "pad"]
    if family == "vocabularies":
        # The order of a union's new tokens is a hash table's in mergekit, and masks go by place.
        tokenizers = ["source", "model"] if method.name in RANDOM else ["source", "union", "union", "model", "pad"]
        tokenizers = tokenizers if based else tokenizers[1:]
    elif method.name not in BY_ELEMENT or "rescale" in json.dumps(content):
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
# method: what docs/parity.md says of it, and the share of the model's values that are equal all the same
DIFFERENT = {
    "ties": ("of deltas with equal magnitude at the threshold, the first by position are kept", 0.98),
    "breadcrumbs": (_THRESHOLDS, 0.98),
    "breadcrumbs_ties": (_THRESHOLDS, 0.98),
    "arcee_fusion": ("softmax and divergence are fp64, and no 1e-8 is added to probabilities", 0.98),
    "sce": ("mean squares in float64, in a fixed order", 0.999),
    "della": ("of equal magnitudes in a row the first has the higher rank", 0.999),
    "della_linear": ("of equal magnitudes in a row the first has the higher rank", 0.999),
    "dare_linear": ("masks do not depend on threads, order of models or device", 0.9999),  # a probability's last bit
    "dare_ties": ("masks do not depend on threads, order of models or device", 0.9999),
    "model_stock": ("a negative mean cosine counts as 0 and gives the base", 0.98),
    "karcher": ("angles are fp64", 0.999),
}
# Methods that see every row of a table by itself. Where only models other than the base have a token, the base gets the
# mean of their rows: changes that are each other's opposite, which these two treat in their own way (docs/parity.md).
BY_ROW = ["nuslerp", "model_stock"]
MERGEKIT_STOPS = {  # what it says, and what docs/parity.md says
    "validate_layer_type": "`slices` of any architecture set the number of layers, in its own key",
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> dict[str, dict[str, str]]:
    """A base and three fine-tunes of each family."""
    found: dict[str, dict[str, str]] = {}
    for family in FAMILIES:
        root = tmp_path_factory.mktemp(family)
        size = {"num_hidden_layers": LAYERS, "hidden_size": 16, "intermediate_size": 24}
        if family == "vocabularies":
            size["vocab_size"] = 300  # as many as tokens
        base = make_model(root / "base", family="qwen2" if family == "qwen2" else "llama", **size)
        common = make_model(root / "common", base=base, seed=9, noise=0.2)  # task vectors point the same way in part
        tunes = {name: make_model(root / name, base=common, seed=i, noise=0.2) for i, name in enumerate("abc", 1)}
        if family == "vocabularies":
            for name, path in tunes.items():
                _add_tokens(path, OWN_TOKENS[name])
        found[family] = {name: str(path) for name, path in {"base": base, **tunes}.items()}
    return found


def _add_tokens(path: Path, tokens: list[str]) -> None:
    """More tokens, each with a row of its own in embedding and head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not tokens:
        return
    auto_tokenizer: Any = AutoTokenizer
    auto_model: Any = AutoModelForCausalLM
    tokenizer = auto_tokenizer.from_pretrained(path)
    tokenizer.add_tokens(tokens, special_tokens=True)
    model = auto_model.from_pretrained(path, dtype="float32")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@contextmanager
def masks_of_solera(content: dict[str, Any]) -> Iterator[None]:
    """mergekit draws the words that solera draws for the same tensor and model."""
    import torch
    from mergekit.merge_methods import generalized_task_arithmetic as theirs

    plan, _ = make_plan(parse(MergeConfig, content, where="recipe"), Context())
    keys = {tensor.name: tensor.keys for tensor in plan.tensors}
    left: list[int] = []

    def bernoulli(probability: torch.Tensor) -> torch.Tensor:
        drawn = words(left[0], 0, probability.numel()).astype(np.float64) / 2**32
        return (torch.from_numpy(drawn).reshape(probability.shape) < probability).to(probability.dtype)

    def sparsify(*args: Any, **kwargs: Any) -> Any:
        try:
            return real_sparsify(*args, **kwargs)
        finally:
            left.pop(0)  # the next model's

    def merge_group(self: Any, group: Any, /, **parameters: Any) -> Any:
        left[:] = keys[group.metadata.name]
        return real_merge(self, group, **parameters)

    real_sparsify, real_merge = theirs.sparsify, theirs.GeneralizedTaskArithmeticMerge.merge_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "sparsify", sparsify)
        patch.setattr(theirs.GeneralizedTaskArithmeticMerge, "merge_group", merge_group)
        patch.setattr(torch, "bernoulli", bernoulli)
        yield


@st.composite
def a_case(draw: Draw) -> tuple[dict[str, Any], str]:
    """A recipe and the family that it is for."""
    family = draw(st.sampled_from(FAMILIES))
    return draw(a_recipe(family=family)), family


@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == DEFAULT_EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=a_case())
def test_random_recipes(
    families: dict[str, dict[str, str]], tmp_path: Path, weights: Weights, case: tuple[dict[str, Any], str]
) -> None:
    drawn, family = case
    content = named(drawn, families[family])
    note(json.dumps(drawn))
    event(drawn["merge_method"])
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for out in (theirs, ours):
        shutil.rmtree(out, ignore_errors=True)
    # A refusal would fail the test: nothing that is drawn here is wrong.
    merge(parse(MergeConfig, content, where="recipe"), ours, Context(threads=1, flush=False, reload_check=False))
    try:
        with masks_of_solera(content) if drawn["merge_method"] in RANDOM else nullcontext():
            run_mergekit(content, theirs)
    except Exception as e:  # whatever it is, it must be known
        event(f"mergekit stops: {type(e).__name__}")
        if not any(known in str(e) for known in MERGEKIT_STOPS):
            raise
        return
    require_equal(drawn, (ours, weights(ours)), (theirs, weights(theirs)))
    mine, other = (json.loads((out / "config.json").read_text()) for out in (ours, theirs))
    assert mine["num_hidden_layers"] == other["num_hidden_layers"]


Merged = tuple[Path, dict[str, npt.NDArray[np.float32]]]


def require_equal(drawn: dict[str, Any], ours: Merged, theirs: Merged) -> None:
    """The same names; values within the rounding of the output's format, but for what `DIFFERENT` tells."""
    assert ours[1].keys() == theirs[1].keys()
    method = drawn["merge_method"]
    step = {None: 2e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}[drawn.get("out_dtype")]
    moved = "tokenizer_source" in drawn or "tokenizer" in drawn
    mine, other = (vocabulary(out) for out, _ in (ours, theirs))
    # The class that transformers has for Qwen2's tokenizer adds a token to this small one.
    assert mine.keys() == other.keys() - {"<|endoftext|>"}
    compared = [token for token in mine if method not in BY_ROW or not (token in NEW and "base_model" in drawn)]
    equal = size = 0
    for name, a in ours[1].items():
        b = theirs[1][name]
        if name in TABLES and moved:  # of rows with a token: padding stays here (docs/parity.md)
            a, b = a[[mine[token] for token in compared]], b[[other[token] for token in compared]]
        close = np.abs(a - b) <= step * max(float(np.abs(a).max()), 1e-3)
        assert method in DIFFERENT or close.all(), (name, float(close.mean()))
        equal += int(close.sum())
        size += close.size
    assert equal >= DIFFERENT.get(method, ("", 1.0))[1] * size, equal / size


def vocabulary(directory: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return dict(Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab(with_added_tokens=True))


DTYPES = ["float32", "float16", "bfloat16"]


@st.composite
def a_case_of_bytes(draw: Draw) -> tuple[dict[str, Any], str]:
    """A recipe in which any format is computed in, for a family whose vocabularies agree."""
    content = draw(a_recipe(methods=[name for name in DRAWN if name not in RANDOM]))
    for key in ("tokenizer_source", "tokenizer", "out_dtype"):
        content.pop(key, None)
    content["dtype"] = draw(st.sampled_from(DTYPES))
    if content["merge_method"] == "arcee_fusion" or draw(st.booleans()):
        content["out_dtype"] = draw(st.sampled_from(DTYPES))
    return content, draw(st.sampled_from(FAMILIES[:2]))


@settings(
    max_examples=EXAMPLES // 2,
    derandomize=EXAMPLES == DEFAULT_EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=a_case_of_bytes())
def test_random_recipes_in_mergekits_own_bytes(
    families: dict[str, dict[str, str]], tmp_path: Path, case: tuple[dict[str, Any], str]
) -> None:
    """`compat: mergekit`, computed in float32, float16 or bfloat16."""
    drawn, family = case
    content = named(drawn, families[family])
    note(json.dumps(drawn))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for out in (theirs, ours):
        shutil.rmtree(out, ignore_errors=True)
    context = Context(threads=1, flush=False, reload_check=False, compat="mergekit")
    refused: CheckpointError | None = None
    try:
        merge(parse(MergeConfig, content, where="recipe"), ours, context)
    except CheckpointError as e:
        refused = e
    try:
        run_mergekit(content, theirs)
    except Exception as e:  # whatever it is, it must be known
        if refused is None and not any(known in str(e) for known in MERGEKIT_STOPS):
            raise
        return
    b = open_checkpoint(theirs, Context())
    if refused is not None:
        assert any(not np.isfinite(b.read_flat(name)).all() for name in b.tensors), refused
        return
    a = open_checkpoint(ours, Context())
    assert {n: (t.dtype, t.shape) for n, t in a.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in b.tensors.items()
    }
    assert not [name for name in a.tensors if a.read_raw(name).tobytes() != b.read_raw(name).tobytes()]


def test_what_differs_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")
    for entry in (*(entry for entry, _ in DIFFERENT.values()), *MERGEKIT_STOPS.values()):
        assert entry in text
