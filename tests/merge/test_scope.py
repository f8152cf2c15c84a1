"""One threshold over the whole model, against a stable sort of the whole task vector."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_merge.block import CHUNK_ELEMENTS
from solera_merge.methods.catalogue import METHODS
from solera_merge.run import merge

SHAPES = ((), (3, 50), (CHUNK_ELEMENTS + 5,), (1,), (70, 90))


def kept_by_sort(deltas: Sequence[Any], density: float, gamma: float = 0.0) -> list[Any]:
    """The task vectors of all tensors of one model, of which only the chosen elements are left."""
    whole = np.concatenate([delta.reshape(-1) for delta in deltas])
    wanted = max(1, int(density * whole.size))
    left_out = min(int(gamma * whole.size), whole.size - wanted)
    chosen = np.argsort(-np.abs(whole), kind="stable")[left_out : left_out + wanted]
    mask = np.zeros(whole.size, bool)
    mask[chosen] = True
    parts = np.split(np.where(mask, whole, 0), np.cumsum([delta.size for delta in deltas])[:-1])
    return [part.reshape(delta.shape) for part, delta in zip(parts, deltas, strict=True)]


def in_threads(function: Callable[[int], None], numbers: Sequence[int]) -> None:
    """All at once, and in another order than the model's."""
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(function, [*numbers[1::2], *numbers[::2]]))


def merged(method: str, tensors: Sequence[Any], *parameters: dict[str, Any]) -> list[Any]:
    """Every tensor merged; one mapping of parameters for all, or one a tensor."""
    entry = METHODS[method]
    all_parameters = parameters if len(parameters) > 1 else parameters * len(tensors)
    resolved = [
        {p.name: values.get(p.name, (p.default,) if p.per_model else p.default) for p in entry.parameters.values()}
        for values in all_parameters
    ]
    assert entry.survey is not None
    out: list[Any] = []
    findings = entry.survey(tensors, resolved, in_threads)
    for tensor, finding, values in zip(tensors, findings, all_parameters, strict=True):
        formula = entry.function(tensor, finding, **values)
        out.append(np.concatenate([formula(block) for block in tensor.blocks(entry.unit)]).reshape(tensor.shape))
    return out


def deltas_of(models: int, levels: int, seed: int = 0) -> list[list[Any]]:
    """[model][tensor]; tensors move by different amounts. With `levels` many magnitudes are equal."""
    rng = np.random.default_rng(seed)
    found: list[list[Any]] = []
    for _ in range(models):
        row = [np.asarray(rng.standard_normal(shape) * (1 + t), np.float32) for t, shape in enumerate(SHAPES)]
        found.append([np.asarray(np.round(d * levels) / levels, np.float32) for d in row] if levels else row)
    return found


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.7])
@pytest.mark.parametrize(("method", "gamma"), [("ties", 0.0), ("breadcrumbs", 0.05), ("breadcrumbs_ties", 0.05)])
def test_kept_are_exactly_those_of_the_whole_task_vector(
    in_memory: Any, method: str, gamma: float, density: float, levels: int
) -> None:
    deltas = deltas_of(1, levels)[0]
    tensors = [in_memory([delta], np.zeros_like(delta)) for delta in deltas]
    parameters = {"weight": (1.0,), "density": (density,), "scope": "model"}
    if method != "ties":
        parameters["gamma"] = (gamma,)
    for ours, expected in zip(merged(method, tensors, parameters), kept_by_sort(deltas, density, gamma), strict=True):
        assert np.array_equal(ours, expected)


def test_every_model_has_its_own_threshold_and_all_share_the_passes(in_memory: Any) -> None:
    deltas = deltas_of(2, levels=0)
    tensors = [in_memory(list(pair), np.zeros_like(pair[0])) for pair in zip(*deltas, strict=True)]
    densities = (0.1, 0.6)
    ours = merged(
        "breadcrumbs", tensors, {"weight": (1.0, 1.0), "density": densities, "gamma": (0, 0), "scope": "model"}
    )
    parts = [kept_by_sort(row, density) for row, density in zip(deltas, densities, strict=True)]
    for out, a, b in zip(ours, *parts, strict=True):
        assert np.array_equal(out, a + b)
    assert all(tensor.passes == 3 for tensor in tensors)  # two levels of the histogram, and the merge


def test_one_tensor_is_the_whole_model(in_memory: Any) -> None:
    base, a, b = np.random.default_rng(0).standard_normal((3, 9000)).astype(np.float32)
    parameters = {"weight": (0.4, 0.6), "density": (0.2, 0.5)}
    of_tensor = merged("ties", [in_memory([a, b], base)], parameters)
    of_model = merged("ties", [in_memory([a, b], base)], parameters | {"scope": "model"})
    assert of_tensor[0].tobytes() == of_model[0].tobytes()


def test_a_filter_may_leave_tensors_out_of_the_whole(in_memory: Any) -> None:
    """The task vector then consists of the tensors with that scope; the others count by themselves."""
    deltas = deltas_of(1, levels=0)[0]
    tensors = [in_memory([delta], np.zeros_like(delta)) for delta in deltas]
    shared = {"weight": (1.0,), "density": (0.3,)}
    scopes = ["model", "tensor", "model", "model", "tensor"]
    ours = merged("ties", tensors, *[{**shared, "scope": scope} for scope in scopes])
    together = iter(kept_by_sort([d for d, s in zip(deltas, scopes, strict=True) if s == "model"], 0.3))
    for out, delta, scope in zip(ours, deltas, scopes, strict=True):
        assert np.array_equal(out, next(together) if scope == "model" else kept_by_sort([delta], 0.3)[0])


def test_slices_of_different_models_do_not_mix(in_memory: Any) -> None:
    """In a recipe with slices the same place may be another model; thresholds go by model."""
    deltas = deltas_of(1, levels=0)[0]
    tensors = [in_memory([delta], np.zeros_like(delta)) for delta in deltas]
    owners = [0, 1, 0, 1, 1]
    for tensor, owner in zip(tensors, owners, strict=True):
        tensor.model_ids = (owner,)
    densities = (0.3, 0.5)
    ours = merged("ties", tensors, *[{"weight": (1.0,), "density": (densities[o],), "scope": "model"} for o in owners])
    for owner in (0, 1):
        mine = [t for t, o in enumerate(owners) if o == owner]
        for t, expected in zip(mine, kept_by_sort([deltas[t] for t in mine], densities[owner]), strict=True):
            assert np.array_equal(ours[t], expected)


def test_different_densities_are_refused(in_memory: Any) -> None:
    tensors = [in_memory([np.ones(3, np.float32)], np.zeros(3, np.float32)) for _ in range(2)]
    parameters = [{"weight": (1.0,), "density": (d,), "scope": "model"} for d in (0.5, 0.6)]
    with pytest.raises(ValueError, match=r"one `density` for all tensors of a model, found \[0.5, 0.6\]"):
        merged("ties", tensors, *parameters)


@pytest.mark.parametrize("parameter", ["density", "gamma"])
def test_a_recipe_with_a_gradient_of_densities_is_refused_by_the_plan(
    recipe: Callable[..., Any], bare_model: Callable[..., Path], tmp_path: Path, parameter: str
) -> None:
    tensors = {name: np.ones((2, 2)) for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    layers = {f"model.layers.{i}.mlp.up_proj.weight": np.ones((2, 2)) for i in range(2)}
    models = {
        name: str(bare_model(tmp_path / name, tensors | layers, num_hidden_layers=2, vocab_size=2)) for name in "ab"
    }
    content = {
        "merge_method": "breadcrumbs",
        "base_model": models["b"],
        "models": [{"model": models["a"], "parameters": {parameter: [0.2, 0.4]}}],
        "parameters": {"weight": 1.0, "scope": "model"},
    }
    with pytest.raises(ConfigError, match=f"parameters.{parameter}: `scope: model` needs one value for all tensors"):
        merge(recipe(**content), tmp_path / "out", Context())


@pytest.mark.parametrize("threads", [1, 3])
def test_through_the_engine(
    recipe: Callable[..., Any],
    make_model: Callable[..., Path],
    weights: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
    threads: int,
) -> None:
    paths = {"base": make_model(tmp_path / "base")}
    paths["a"] = make_model(tmp_path / "a", base=paths["base"], seed=1)
    content = {
        "merge_method": "ties",
        "base_model": str(paths["base"]),
        "models": [str(paths["a"])],
        "parameters": {"weight": 1.0, "density": 0.2, "scope": "model"},
    }
    merge(recipe(**content), tmp_path / "out", Context(threads=threads))
    base, a, out = (weights(path) for path in (paths["base"], paths["a"], tmp_path / "out"))
    deltas = [a[name] - base[name] for name in out]
    shares: set[float] = set()
    for name, kept in zip(out, kept_by_sort(deltas, 0.2), strict=True):
        assert np.array_equal(out[name], base[name] + kept), name
        shares.add(round(float(np.mean(kept != 0)), 1))
    assert max(shares) - min(shares) >= 0.1  # tensors that changed more keep more
