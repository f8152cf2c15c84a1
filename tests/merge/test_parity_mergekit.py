"""The same recipe through mergekit and through solera, on tiny real models of three families.

Two measures, because float32 sums of several terms are exact to the last bits of the largest term only:

* relative to the value: at least 99.99 % within 1e-6. What is left over are elements where the inputs nearly cancel.
* relative to the largest input at that element: all within 1e-6, that is about 8 units in the last place.

Where solera computes each step as mergekit does (task_arithmetic, ties, passthrough) the bytes are equal. linear
differs in last bits because torch contracts multiply and add into one rounding; slerp, nuslerp, multislerp, karcher
and model_stock because mergekit takes norms and angles in float32.
"""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_merge.config import MergeConfig
from solera_merge.run import merge

Recipe = Callable[..., MergeConfig]
F32 = npt.NDArray[np.float32]
Merged = Callable[..., tuple[F32, F32, F32]]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"head_dim": 8, "use_sliding_window": False},  # biases
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},  # four norms, tied
}


def source(model: str, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "parameters": parameters} if parameters else {"model": model}


def layers(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {**source(model, **parameters), "layer_range": [first, end]}


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [
            source("a", weight=0.3),
            source("b", weight=[0.2, 0.9]),
            source("c", weight=[{"filter": "mlp", "value": 0.1}, {"value": 0.5}]),
        ],
    },
    "linear, not normalized": {
        "merge_method": "linear",
        "models": [source("a", weight=0.3), source("b", weight=0.3)],
        "parameters": {"normalize": False},
    },
    "linear, slices": {
        "merge_method": "linear",
        "slices": [
            {"sources": [layers("a", 0, 2), layers("b", 0, 2)], "parameters": {"weight": [1, 2]}},
            {
                "sources": [
                    layers("b", 1, 2),
                    layers("c", 0, 1, weight=[{"filter": "layers.0.", "value": 3}, {"value": 7}]),
                ]
            },
        ],
        "parameters": {"weight": 1},
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [source("a"), source("b")],
        "parameters": {
            "t": [{"filter": "self_attn", "value": [0, 0.5, 0.3]}, {"filter": "mlp", "value": [1, 0.3]}, {"value": 0.5}]
        },
    },
    "slerp, wide angle": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [source("far")],
        "parameters": {"t": 0.3},
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [source("a", weight=0.5), source("b", weight=[1, -0.3]), source("c", weight=0.2)],
        "parameters": {"lambda": 0.9},
    },
    "task_arithmetic, normalized": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [source("a", weight=0.5), source("b", weight=1.1)],
        "parameters": {"normalize": True},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            source("base"),
            source("a", weight=0.3, density=0.5),
            source("b", weight=[0.2, 0.9], density=[0.1, 0.6, 0.3]),
            source("c", weight=0.4, density=0.33),
        ],
        "parameters": {"lambda": 1.1},
    },
    "ties, a plain sum": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [source("a"), source("b"), source("c")],
        "parameters": {"weight": 0.4, "density": 0.3, "normalize": False, "int8_mask": True},
    },
    "ties, slices": {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [
            {"sources": [layers("base", 0, 2), layers("a", 0, 2, weight=1), layers("b", 0, 2, weight=[0, 1])]},
            {"sources": [layers("base", 1, 2), layers("c", 1, 2)], "parameters": {"weight": 0.3}},
        ],
        "parameters": {"density": 0.5},
    },
    "ram": {
        "merge_method": "ram",
        "base_model": "base",
        "models": [source("a"), source("b"), source("c")],
        "parameters": {"epsilon": 5e-5},  # about as large as the changes of the matrices
    },
    "ramplus_tl": {
        "merge_method": "ramplus_tl",
        "base_model": "base",
        "models": [source("a"), source("b"), source("c")],
        "parameters": {"epsilon": [4e-5, 6e-5], "r": 0.5, "alpha": [{"filter": "mlp", "value": 0.3}, {"value": 3.0}]},
    },
    "passthrough, slices": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [layers("a", 0, 2)]},
            {"sources": [layers("b", 1, 2, scale=[{"filter": "o_proj", "value": 0.5}, {"value": 1.0}])]},
            {"sources": [layers("c", 0, 2)]},
        ],
    },
    "nuslerp": {
        "merge_method": "nuslerp",
        "models": [source("a", weight=0.3), source("b", weight=[0.2, 0.9])],
    },
    "nuslerp, wide angle": {
        "merge_method": "nuslerp",
        "models": [source("a", weight=0.3), source("far", weight=0.5)],
    },
    "nuslerp, task vectors": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": [source("a", weight=0.3), source("b", weight=0.5)],
    },
    "nuslerp, along the last axis": {
        "merge_method": "nuslerp",
        "models": [source("a", weight=0.3), source("b", weight=0.5)],
        "parameters": {"nuslerp_flatten": False},
    },
    "nuslerp, along the first axis": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": [source("wide", weight=0.3), source("wider", weight=0.5)],
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {
        "merge_method": "multislerp",
        "models": [source("a", weight=0.3), source("b", weight=[0.2, 0.9]), source("c", weight=0.4)],
    },
    "multislerp, wide angles": {
        "merge_method": "multislerp",
        "models": [source("a", weight=0.3), source("far", weight=-0.5), source("wide", weight=0.9)],
        "parameters": {"normalize_weights": False},
    },
    "multislerp, task vectors": {
        "merge_method": "multislerp",
        "base_model": "base",
        "models": [source("a", weight=0.3), source("b", weight=[0.2, 0.9]), source("c", weight=0.4)],
        "parameters": {"eps": 1e-12},  # mergekit adds it to every norm, and the usual 1e-8 shows in small tensors
    },
    "karcher": {"merge_method": "karcher", "models": [source("a"), source("b"), source("c")]},
    "karcher, wide angles": {
        "merge_method": "karcher",
        "models": [source("a"), source("far"), source("wide")],
        "parameters": {"max_iter": 4, "tol": 0},
    },
    "model_stock": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [source("wide"), source("wider"), source("widest")],
    },
    "model_stock, filter-wise": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [source("wide"), source("wider"), source("widest")],
        "parameters": {"filter_wise": True},
    },
    "nearswap": {
        "merge_method": "nearswap",
        "base_model": "a",
        "models": [source("b")],
        "parameters": {"t": [0.00002, 0.0002]},
    },
}
RECIPES |= {
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": [
            source("a", weight=0.3, density=0.5, gamma=0.1),
            source("b", weight=[0.2, -0.9], density=[0.15, 0.6, 0.35]),
            source("c", weight=0.4, density=0.9, gamma=0.3),  # together more than 1: gamma yields
        ],
        "parameters": {"lambda": 1.1, "int8_mask": True},
    },
    "breadcrumbs, rescaled": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": [source("a", weight=0.3, density=0.5, gamma=0.1), source("b", weight=0.2, density=1.0)],
        "parameters": {"rescale": True},
    },
    "breadcrumbs_ties, rescaled": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "models": [source("a", weight=0.3, density=0.5, gamma=0.1), source("b", weight=0.2, density=0.1)],
        "parameters": {"rescale": True},
    },
    "ties, rescaled": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [source("a", weight=0.3, density=0.5), source("b", weight=0.2, density=[0.1, 0.9])],
        "parameters": {"rescale": True, "normalize": False},
    },
    "breadcrumbs, no outliers": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": [source("a"), source("b")],
        "parameters": {"weight": 0.5, "density": 0.2, "gamma": 0.0, "normalize": True},
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "models": [
            source("base"),
            source("a", weight=0.3, density=0.5, gamma=0.05),
            source("b", weight=[0.2, 0.9], density=[0.15, 0.6, 0.35]),
            source("c", weight=0.4, density=0.33, gamma=[0.0, 0.2]),
        ],
        "parameters": {"lambda": 0.9, "normalize": True},
    },
    # Large weights make the mean squares large enough for mergekit to use its coefficients; see `test_sce_...`.
    "sce": {
        "merge_method": "sce",
        "base_model": "large base",
        "models": [source("large a"), source("large b")],
    },
    "sce, selected": {
        "merge_method": "sce",
        "base_model": "large base",
        "models": [source("large a"), source("large b"), source("large c")],
        "parameters": {"select_topk": [0.1, 0.9], "int8_mask": True},
    },
}
# These combine tensors that have nothing in common, whose elements nearly cancel all the time.
UNRELATED = {name for name in RECIPES if "wide angle" in name or name.startswith("model_stock")} | {
    "linear, slices",
    "nuslerp, along the first axis",
}
# Share within 1e-6 of the value where elements that nearly cancel are more than 1 in 10,000; see docs/parity.md.
SHARE = {"nuslerp": 0.9998, "nuslerp, along the last axis": 0.9998, "nuslerp, task vectors": 0.9998}
SHARE |= {"multislerp": 0.9998, "multislerp, task vectors": 0.9997, "karcher": 0.998}
# Relative to the largest input. For karcher see `test_karcher_differs_only_where_float32_has_no_angle`.
TOLERANCE = {"karcher": 1e-4}
# mergekit's multislerp stops where more than two models equal the base in a tensor, as bfloat16 norms here do.
STOPS_IN_BFLOAT16 = {"multislerp, task vectors"}
EXACT = {name for name in RECIPES if name.startswith(("task_arithmetic", "ties", "passthrough")) or name == "ram"}
EXACT -= {name for name in RECIPES if name.endswith("rescaled")}  # the last bit of a norm


@pytest.fixture(scope="session")
def run_mergekit() -> Callable[..., None]:
    """`run_mergekit(recipe, out, seed=None)`, through its own command's function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what mergekit and its dependencies warn about is theirs
        from mergekit.config import MergeConfiguration
        from mergekit.merge import MergeOptions, run_merge

    def run(recipe: dict[str, Any], out: Path, seed: int | None = None) -> None:
        options = MergeOptions(quiet=True, write_model_card=False, random_seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_merge(MergeConfiguration.model_validate(recipe), str(out), options)

    return run


@pytest.fixture(scope="session")
def families(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> dict[tuple[str, str], dict[str, str]]:
    """A base, three fine-tunes that differ from it by 0.3 % (real ones: 0.1 to 1 %), and a model of its own."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for family, settings in FAMILIES.items():
        for dtype in ("float32", "bfloat16"):
            root = tmp_path_factory.mktemp(f"{family}-{dtype}")
            base = make_model(root / "base", family=family, dtype=dtype, **settings)
            paths = {"base": base, "far": make_model(root / "far", family=family, dtype=dtype, seed=9, **settings)}
            for i, name in enumerate("abc"):
                paths[name] = fine_tune(base, root / name, seed=i)
            paths["wide"] = fine_tune(base, root / "wide", seed=3, noise=1.0)
            for i, name in enumerate(("wider", "widest"), 4):  # task vectors at about 45 degrees to that of `wide`
                paths[name] = fine_tune(paths["wide"], root / name, seed=i, noise=0.7)
            for name in ("base", "a", "b", "c"):
                paths[f"large {name}"] = times_32(paths[name], root / f"large-{name}")
            found[family, dtype] = {name: str(path) for name, path in paths.items()}
    return found


def fine_tune(base: Path, out: Path, *, seed: int, noise: float = 0.003) -> Path:
    """A copy of a model, every tensor moved by Gaussian noise of `noise` times its own standard deviation."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, out)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        step = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * noise
        tensors[name] = (tensor.float() + step).to(tensor.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def times_32(model: Path, out: Path) -> Path:
    """A copy of a model, all weights multiplied by 32 (exact)."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    save_file({n: t * 32 for n, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture
def merged(run_mergekit: Callable[..., None], families: Any, recipe: Recipe, tmp_path: Path) -> Merged:
    """`merged(name, family, stored)`: all values by mergekit, by solera, and the largest input of each element."""

    def run(name: str, family: str, stored: str, **dtypes: str) -> tuple[F32, F32, F32]:
        paths = families[family, stored]
        content = resolved(RECIPES[name], paths) | dtypes
        run_mergekit(content, tmp_path / "theirs")
        merge(recipe(**content), tmp_path / "ours", Context())
        theirs, ours = (open_checkpoint(tmp_path / who, Context()) for who in ("theirs", "ours"))
        assert {n: t.shape for n, t in theirs.tensors.items()} == {n: t.shape for n, t in ours.tensors.items()}
        assert {t.dtype for t in theirs.tensors.values()} == {t.dtype for t in ours.tensors.values()}
        for key in ("num_hidden_layers", "vocab_size", "tie_word_embeddings"):
            assert theirs.config.get(key) == ours.config.get(key)
        values = [np.concatenate([c.read_flat(n) for n in ours.tensors]) for c in (theirs, ours)]
        refs = [content.get("base_model"), *(entry["model"] for entry in content.get("models", ()))]
        inputs = [open_checkpoint(ref, Context()) for ref in dict.fromkeys(refs) if ref is not None]
        if "slices" in content:  # renumbered layers have no input of the same name: the tensor's own range stands in
            tops = [np.full(t.size, np.abs(ours.read_flat(n)).max()) for n, t in ours.tensors.items()]
        else:
            tops = [np.max([np.abs(c.read_flat(n)) for c in inputs], axis=0) for n in ours.tensors]
        largest = np.concatenate(tops)
        return values[0], values[1], largest

    return run


def resolved(content: Any, paths: dict[str, str]) -> Any:
    """The recipe with model names replaced by directories."""
    if isinstance(content, dict):
        return {
            key: paths[value] if key in ("model", "base_model") else resolved(value, paths)
            for key, value in content.items()
        }
    return [resolved(value, paths) for value in content] if isinstance(content, list) else content


CASES = [
    (name, family)
    for name in RECIPES
    for family in FAMILIES
    # mergekit sets num_hidden_layers but not layer_types, and transformers 5 refuses such a config.
    if family == "llama" or "slices" not in name
]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_float32(merged: Merged, name: str, family: str) -> None:
    theirs, ours, largest = merged(name, family, "float32", dtype="float32")
    difference = np.abs(theirs - ours)
    close = float(np.mean(difference <= 1e-6 * np.abs(theirs)))
    print(f"PARITY {name} {family}: equal {np.mean(theirs == ours):.5f}, within 1e-6 {close:.6f}")  # pytest -rP
    if name.startswith("breadcrumbs"):
        # A few elements have just the magnitude of a threshold (in float32 too: a weight near 1 moves in steps); the
        # tools choose among those differently, see `test_equal_magnitudes_...`. All else is equal, but for the last bit
        # of the norms in a rescale, which mergekit sums in float32.
        assert (close if "rescaled" in name else np.mean(theirs == ours)) >= 0.9998
        return
    if name in EXACT:
        assert np.array_equal(theirs, ours)
    elif name not in UNRELATED:
        assert close >= SHARE.get(name, 0.9999)
    assert (difference <= TOLERANCE.get(name, 1e-6) * largest).all()


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in STOPS_IN_BFLOAT16])
def test_computed_in_float32_written_in_bfloat16(merged: Merged, name: str) -> None:
    """The setting that mergekit's own documentation recommends: a last bit of float32 rarely moves a bfloat16.

    Where a density selects, deltas of bfloat16 weights take few values, so that many are equal to the k-th magnitude.
    mergekit keeps whichever of those an unstable sort puts first, solera the first by position.
    """
    theirs, ours, largest = merged(name, "llama", "bfloat16", dtype="float32", out_dtype="bfloat16")
    same = float(np.mean(theirs == ours))
    print(f"PARITY {name} of bfloat16: equal {same:.5f}")
    if name.startswith(("ties", "breadcrumbs", "sce, selected")):
        assert same >= (0.97 if name.startswith("ties") else 0.9)  # breadcrumbs has two thresholds
        return
    assert same >= (1.0 if name in EXACT else 0.99)
    assert (np.abs(theirs - ours) <= 2.0**-7 * largest).all()  # one unit in the last place


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith(("linear", "slerp", "passthrough"))])
def test_bfloat16_throughout(merged: Merged, name: str) -> None:
    """mergekit computes these in float32 as well, so the same bounds hold."""
    theirs, ours, largest = merged(name, "llama", "bfloat16", dtype="bfloat16")
    assert np.mean(theirs == ours) >= 0.99
    assert (np.abs(theirs - ours) <= 2.0**-7 * largest).all()


@pytest.mark.parametrize(("name", "share"), [("task_arithmetic", 0.98), ("ties", 0.95)])
def test_rounding_of_task_vectors_is_the_known_difference(merged: Merged, name: str, share: float) -> None:
    """With `dtype: bfloat16` mergekit rounds every step of task-vector methods to bfloat16; only the result is here.

    A documented difference: without it the values are equal (see the tests above).
    """
    theirs, ours, _ = merged(name, "llama", "bfloat16", dtype="bfloat16")
    same = float(np.mean(theirs == ours))
    print(f"PARITY {name} in bfloat16: equal {same:.5f}")
    assert share <= same < 0.999


@pytest.mark.parametrize(
    ("method", "density", "gamma"),
    [("ties", 0.1, 0.0), ("ties", 0.5, 0.0), ("breadcrumbs", 0.5, 0.1), ("breadcrumbs_ties", 0.2, 0.3)],
)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_equal_magnitudes_differ_only_at_the_threshold(
    run_mergekit: Callable[..., None],
    families: Any,
    recipe: Recipe,
    tmp_path: Path,
    stored: str,
    method: str,
    density: float,
    gamma: float,
) -> None:
    """Every element where the two tools keep something else has exactly the magnitude of a threshold."""
    paths = families["llama", stored]
    share = {"gamma": gamma} if method != "ties" else {}
    content = {
        "merge_method": method,
        "base_model": paths["base"],
        "models": [source(paths["a"], weight=1, density=density, **share)],
        "dtype": "float32",
    }
    run_mergekit(content, tmp_path / "theirs")
    merge(recipe(**content), tmp_path / "ours", Context())
    theirs, ours, base, a = (
        open_checkpoint(p, Context()) for p in (tmp_path / "theirs", tmp_path / "ours", paths["base"], paths["a"])
    )
    for name, info in ours.tensors.items():
        magnitude = np.abs(a.read_flat(name) - base.read_flat(name))
        ranked = np.sort(magnitude)[::-1]
        first, end = int(gamma * info.size), int(gamma * info.size) + max(1, int(density * info.size))
        thresholds = ranked[[max(first - 1, 0), end - 1]]
        different = theirs.read_flat(name) != ours.read_flat(name)
        assert np.isin(magnitude[different], thresholds).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_karcher_differs_only_where_float32_has_no_angle(
    run_mergekit: Callable[..., None], families: Any, recipe: Recipe, tmp_path: Path, family: str
) -> None:
    """The smallest angle that arccos of a float32 can give is 3.5e-4; mergekit leaves out what it takes for 0."""
    paths = families[family, "float32"]
    content = {**resolved(RECIPES["karcher"], paths), "dtype": "float32"}
    run_mergekit(content, tmp_path / "theirs")
    merge(recipe(**content), tmp_path / "ours", Context())
    theirs, ours, *models = (
        open_checkpoint(p, Context()) for p in (tmp_path / "theirs", tmp_path / "ours", *(paths[m] for m in "abc"))
    )
    for name in ours.tensors:
        inputs = [m.read_flat(name).astype(np.float64) for m in models]
        mean = np.mean([x / np.linalg.norm(x) for x in inputs], axis=0)
        mean /= np.linalg.norm(mean)
        angles = [np.linalg.norm(x / np.linalg.norm(x) - mean) for x in inputs]  # small, so the chord will do
        difference = np.abs(theirs.read_flat(name) - ours.read_flat(name))
        if min(angles) > 5e-4:
            assert (difference <= 1e-6 * np.max(np.abs(inputs), axis=0)).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_arcee_fusion_differs_only_at_the_threshold(
    run_mergekit: Callable[..., None], families: Any, recipe: Recipe, tmp_path: Path, family: str
) -> None:
    """With a change as large as the weights: below that, mergekit's float32 divergences are rounding errors."""
    paths = families[family, "float32"]
    content = {"merge_method": "arcee_fusion", "base_model": paths["base"], "models": [source(paths["wide"])]}
    run_mergekit({**content, "dtype": "float32"}, tmp_path / "theirs")
    merge(recipe(**content), tmp_path / "ours", Context())
    theirs, ours, base, wide = (
        open_checkpoint(p, Context()) for p in (tmp_path / "theirs", tmp_path / "ours", paths["base"], paths["wide"])
    )
    different = size = 0
    for name, info in ours.tensors.items():
        old, new = (c.read(name).astype(np.float64) for c in (base, wide))
        p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in (new, old))
        scores = (np.abs(new - old) * np.sum(p * np.log(p / q), axis=-1, keepdims=True)).reshape(-1)
        low, median, high = (np.sort(scores)[q * (info.size - 1) // 4] for q in (1, 2, 3))
        threshold = median + 1.5 * (high - low)
        other = np.abs(theirs.read_flat(name) - ours.read_flat(name)) > 1e-6 * np.abs(wide.read_flat(name))
        assert (np.abs(scores - threshold)[other] <= 0.01 * threshold).all(), name
        different += int(other.sum())
        size += info.size
    print(f"PARITY arcee_fusion {family}: the same choice for {1 - different / size:.6f}")
    assert different <= 1e-3 * size


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear"])
def test_dare_statistically(
    run_mergekit: Callable[..., None], families: Any, recipe: Recipe, tmp_path: Path, method: str
) -> None:
    """Random masks cannot be equal; per tensor, the share that changes and the factor on what is kept can.

    mergekit scales what is kept to the L1 norm of all, solera by 1 / density; both keep the mean of a tensor's deltas.
    """
    paths = families["llama", "float32"]
    density = 0.3
    content = resolved(
        {
            "merge_method": method,
            "base_model": "base",
            "models": [source("a")],
            "parameters": {"weight": 1, "density": density},
            "dtype": "float32",
        },
        paths,
    )
    run_mergekit(content, tmp_path / "theirs", seed=1234)  # not the seed of `fine_tune`
    merge(recipe(**content), tmp_path / "ours", Context(seed=1234))
    theirs, ours, base, a = (
        open_checkpoint(p, Context()) for p in (tmp_path / "theirs", tmp_path / "ours", paths["base"], paths["a"])
    )
    for name, info in ours.tensors.items():
        if info.size < 1000:
            continue
        delta = a.read_flat(name) - base.read_flat(name)
        kept, factor = {}, {}
        for who, checkpoint in (("theirs", theirs), ("ours", ours)):
            change = checkpoint.read_flat(name) - base.read_flat(name)
            kept[who] = np.mean(change != 0)
            factor[who] = np.median(change[change != 0] / delta[change != 0])
        deviation = np.sqrt(density * (1 - density) / info.size)
        assert abs(kept["ours"] - density) < 4 * deviation, name
        assert abs(kept["ours"] - kept["theirs"]) < 4 * np.sqrt(2) * deviation, name
        assert factor["ours"] == pytest.approx(1 / density, rel=1e-3), name
        assert factor["theirs"] == pytest.approx(factor["ours"], rel=8 * deviation / density), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_draws_alike_but_rescales_every_element_by_its_own_probability(
    run_mergekit: Callable[..., None], families: Any, recipe: Recipe, tmp_path: Path, method: str, family: str
) -> None:
    """The share that is kept agrees for every fifth of the ranks; the factor is the paper's, not one a tensor."""
    paths = families[family, "float32"]
    density, epsilon = 0.4, 0.3
    content = {
        "merge_method": method,
        "base_model": paths["base"],
        "models": [source(paths["a"])],
        "parameters": {"weight": 1, "density": density, "epsilon": epsilon},
        "dtype": "float32",
    }
    run_mergekit(content, tmp_path / "theirs", seed=1234)
    merge(recipe(**content), tmp_path / "ours", Context(seed=1234))
    theirs, ours, base, a = (
        open_checkpoint(p, Context()) for p in (tmp_path / "theirs", tmp_path / "ours", paths["base"], paths["a"])
    )
    compared = 0
    for name, info in ours.tensors.items():
        if info.size < 1000:
            continue
        compared += 1
        shape = info.shape
        delta = (a.read_flat(name) - base.read_flat(name)).reshape(shape)
        place = np.argsort(np.argsort(np.abs(delta), axis=1, kind="stable"), axis=1) / (shape[1] - 1)
        probability = density - epsilon + 2 * epsilon * place
        kept: dict[str, Any] = {}
        factor: dict[str, Any] = {}
        for who, checkpoint in (("theirs", theirs), ("ours", ours)):
            change = (checkpoint.read_flat(name) - base.read_flat(name)).reshape(shape)
            kept[who] = change != 0
            factor[who] = change[kept[who]] / delta[kept[who]]
        for low in np.arange(0, 1, 0.2):
            fifth = (place >= low) & (place <= low + 0.2)
            expected = probability[fifth].mean()
            bound = 4.5 * np.sqrt(expected * (1 - expected) / fifth.sum())
            for who in kept:
                assert abs(kept[who][fifth].mean() - expected) < bound, (name, who, low)
        exact = np.median(np.abs(factor["ours"] * probability[kept["ours"]] - 1))
        assert exact < 1e-4, name  # what float32 leaves of a small change of a larger weight
        one = np.abs(delta).sum() / np.abs(delta[kept["theirs"]]).sum()
        assert np.median(np.abs(factor["theirs"] / one - 1)) < 1e-4, name
    assert compared >= 3


def test_without_a_window_della_is_rescaled_alike(
    run_mergekit: Callable[..., None], families: Any, recipe: Recipe, tmp_path: Path
) -> None:
    """With an epsilon of (almost) 0 both factors are 1 / density, mergekit's up to chance."""
    paths = families["llama", "float32"]
    content = {
        "merge_method": "della",
        "base_model": paths["base"],
        "models": [source(paths["a"])],
        "parameters": {"weight": 1, "density": 0.3, "epsilon": 1e-7},
        "dtype": "float32",
    }
    run_mergekit(content, tmp_path / "theirs", seed=1234)
    merge(recipe(**content), tmp_path / "ours", Context(seed=1234))
    for who in ("theirs", "ours"):
        out = open_checkpoint(tmp_path / who, Context())
        base, a = (open_checkpoint(paths[name], Context()) for name in ("base", "a"))
        name = "model.embed_tokens.weight"
        change = out.read_flat(name) - base.read_flat(name)
        on = change != 0
        factor = np.median(change[on] / (a.read_flat(name) - base.read_flat(name))[on])
        assert factor == pytest.approx(1 / 0.3, rel=0.05 if who == "theirs" else 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_sce_of_small_changes_has_coefficients(
    run_mergekit: Callable[..., None], families: Any, recipe: Recipe, tmp_path: Path, family: str
) -> None:
    """mergekit takes uniform weights for changes as small as these; SCE does not depend on the scale of the weights.

    32 is a power of two, so merging weights 32 times as large must give just 32 times the result.
    """
    results: dict[str, dict[str, Any]] = {}
    for size in ("", "large "):
        paths = {name: families[family, "float32"][size + name] for name in ("base", "a", "b", "c")}
        content = {
            "merge_method": "sce",
            "base_model": paths["base"],
            "models": [source(paths["a"]), source(paths["b"]), source(paths["c"])],
            "parameters": {"select_topk": 0.8},
            "dtype": "float32",
        }
        run_mergekit(content, tmp_path / f"{size}theirs")
        merge(recipe(**content), tmp_path / f"{size}ours", Context())
        for who in ("theirs", "ours"):
            out = open_checkpoint(tmp_path / f"{size}{who}", Context())
            results[size + who] = {name: out.read_flat(name) for name in out.tensors}
    ours = np.concatenate([results["ours"][name] * 32 for name in results["ours"]])
    theirs = np.concatenate([results["theirs"][name] * 32 for name in results["ours"]])
    large_ours, large_theirs = (
        np.concatenate([results[f"large {who}"][name] for name in results["ours"]]) for who in ("ours", "theirs")
    )
    assert np.array_equal(ours, large_ours)
    close = float(np.mean(np.abs(theirs - large_theirs) <= 1e-6 * np.abs(large_theirs)))
    print(f"PARITY sce {family}: mergekit's own result at two scales, within 1e-6 {close:.5f}")
    assert close < 0.95


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_sce_selects_alike_but_for_equal_variances(
    run_mergekit: Callable[..., None], families: Any, recipe: Recipe, tmp_path: Path, stored: str
) -> None:
    """Where only one of the tools keeps a change, its variance is the k-th; so the coefficients differ a little too."""
    paths = {name: families["llama", stored][f"large {name}"] for name in ("base", "a", "b", "c")}
    content = {
        "merge_method": "sce",
        "base_model": paths["base"],
        "models": [source(paths["a"]), source(paths["b"]), source(paths["c"])],
        "parameters": {"select_topk": 0.3},
        "dtype": "float32",
    }
    run_mergekit(content, tmp_path / "theirs")
    merge(recipe(**content), tmp_path / "ours", Context())
    theirs, ours = (open_checkpoint(tmp_path / who, Context()) for who in ("theirs", "ours"))
    models = {name: open_checkpoint(path, Context()) for name, path in paths.items()}
    for name in ours.tensors:
        base = models["base"].read_flat(name)
        deltas = np.array([models[m].read_flat(name) - base for m in "abc"], np.float64)
        variance = deltas.var(axis=0).astype(np.float32)
        k_th = np.sort(variance)[-max(1, int(0.3 * np.count_nonzero(variance)))]
        changed = [out.read_flat(name) != base for out in (theirs, ours)]
        different = changed[0] != changed[1]
        np.testing.assert_allclose(variance[different], k_th, rtol=3e-7, err_msg=name)
