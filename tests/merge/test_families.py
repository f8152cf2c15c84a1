"""Whole merges of many families: what comes out is what transformers expects, and computes what it should.

No code of solera knows one of these families by name.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.towers import find_tower, towers_of
from solera_merge.config import MergeConfig
from solera_merge.run import merge
from tests.merge.families import FAMILIES, context

Recipe = Callable[..., MergeConfig]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """transformers and torch warn about their own code for some families."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """`pair(family)`: two models of it, made once."""
    root = tmp_path_factory.mktemp("families")
    made: dict[str, dict[str, Path]] = {}

    def build(name: str) -> dict[str, Path]:
        if name not in made:
            made[name] = {m: FAMILIES[name].build(root / name / m, seed) for seed, m in enumerate("ab")}
        return made[name]

    return build


@pytest.mark.parametrize("name", FAMILIES)
def test_merge_and_reload(name: str, pair: Any, recipe: Recipe, tmp_path: Path) -> None:
    family, models = FAMILIES[name], pair(name)
    out = merge(
        recipe(merge_method="linear", models=["a", "b"], parameters={"weight": [1, 1]}),
        tmp_path / "linear",
        context(models),
    )
    checkpoints = [open_checkpoint(path, Context()) for path in (models["a"], models["b"], out)]
    for tensor in checkpoints[0].tensors:
        a, b, merged = (checkpoint.read(tensor) for checkpoint in checkpoints)
        np.testing.assert_allclose(merged, (a + b) / 2, rtol=1e-6, atol=1e-7)
    computed = family.outputs(family.exact(out))
    assert bool(computed.isfinite().all())
    ties = recipe(
        merge_method="ties", base_model="a", models=["b"], parameters={"weight": 1, "density": 1, "normalize": True}
    )
    out = merge(ties, tmp_path / "ties", context(models))
    # One task vector, all of it: the fine-tune, but for the rounding of a + (b - a).
    expected = family.outputs(family.exact(models["b"]))
    assert float((family.outputs(family.exact(out)) - expected).abs().max()) < 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_passthrough_and_deeper(name: str, pair: Any, recipe: Recipe, tmp_path: Path) -> None:
    family, models = FAMILIES[name], pair(name)
    out = merge(recipe(merge_method="passthrough", models=["a"]), tmp_path / "copy", context(models))
    expected = family.outputs(family.exact(models["a"]))
    assert bool((family.outputs(family.exact(out)) == expected).all())

    tower, ranges = family.deeper
    slices = [{"sources": [{"model": "a", "layer_range": layers}]} for layers in ranges]
    config = (
        recipe(merge_method="passthrough", slices=slices)
        if tower is None
        else recipe(merge_method="passthrough", base_model="a", towers={tower: {"slices": slices}})
    )
    out = merge(config, tmp_path / "deep", context(models))
    found = find_tower(towers_of(open_checkpoint(out, Context()).tensors), tower or "default")
    assert found is not None
    assert max(found.stacks.values()) == sum(end - first for first, end in ranges)
    computed = family.outputs(family.exact(out))
    assert bool(computed.isfinite().all())
    assert computed.shape == expected.shape
    seen = family.inputs in ("clip", "patches")  # what a vision tower computes
    if tower is None or ("vision" not in tower and "audio" not in tower) or seen:
        assert not bool((computed == expected).all())  # the added layers take part
