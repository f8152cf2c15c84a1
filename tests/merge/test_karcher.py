import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_merge.methods.catalogue import METHODS
from solera_merge.plan import make_plan

Apply = Callable[..., Any]


def on_sphere(x: Any) -> Any:
    return np.asarray(x, np.float64) / np.linalg.norm(x, axis=-1, keepdims=True)


def pull(mean: Any, models: Any, weight: Any) -> Any:
    """The weighted mean of the models as seen from `mean`: the gradient that vanishes at the Karcher mean."""
    units = on_sphere(models)
    cosines = units @ mean
    theta = np.arccos(np.clip(cosines, -1, 1))
    return np.asarray(weight) * theta / np.sin(theta) @ (units - np.outer(cosines, mean))


def test_two_models_meet_in_the_middle_of_the_arc(apply: Apply) -> None:
    side = 3 * math.sqrt(0.5)
    np.testing.assert_allclose(apply("karcher", [[2, 0], [0, 4]], weight=(1, 1)), [side, side], rtol=1e-7)


def test_two_weighted_models_are_a_slerp(apply: Apply) -> None:
    """For unit vectors the weighted mean of two is the point at that share of the arc; the chord's share is not."""
    third = math.pi / 6
    expected = [math.cos(third), math.sin(third)]
    # On a circle the first step leads there.
    np.testing.assert_allclose(apply("karcher", [[1, 0], [0, 1]], weight=(2, 1), max_iter=1), expected, rtol=1e-6)
    start = apply("karcher", [[1, 0], [0, 1]], weight=(2, 1), max_iter=0)
    np.testing.assert_allclose(start, on_sphere([2, 1]), rtol=1e-6)


def test_the_gradient_vanishes(apply: Apply) -> None:
    models = np.random.default_rng(0).standard_normal((4, 5000)).astype(np.float32)
    models[1] += models[0]
    weight = np.array([0.1, 0.2, 0.3, 0.4])
    merged = apply("karcher", list(models), weight=tuple(weight), max_iter=50, tol=1e-9).astype(np.float64)
    norms = np.linalg.norm(models.astype(np.float64), axis=1)
    assert np.linalg.norm(merged) == pytest.approx(float(weight @ norms), rel=1e-6)
    assert np.linalg.norm(pull(on_sphere(merged), models, weight)) < 1e-6
    start = apply("karcher", list(models), weight=tuple(weight), max_iter=0).astype(np.float64)
    assert np.linalg.norm(pull(on_sphere(start), models, weight)) > 1e-3


def test_two_reads_whatever_the_steps(in_memory: Any) -> None:
    models = list(np.random.default_rng(0).standard_normal((3, 9000)).astype(np.float32))
    tensor = in_memory(models)
    METHODS["karcher"].function(tensor, weight=(1.0, 1.0, 1.0), max_iter=100, tol=0.0)
    assert tensor.passes == 1  # the second applies the formula


def test_zero_tensors(apply: Apply) -> None:
    assert apply("karcher", [[0, 0], [0, 4]], weight=(1, 1)).tolist() == [0, 2]
    assert apply("karcher", [[0, 0], [0, 0]], weight=(1, 1)).tolist() == [0, 0]


def test_small_tensors_are_not_erased(apply: Apply) -> None:
    """mergekit takes a norm of at most `tol` for 0, and returns zeros here."""
    merged = apply("karcher", [[1e-6, 0], [0, 1e-6]], weight=(1, 1))
    np.testing.assert_allclose(merged, [1e-6 * math.sqrt(0.5)] * 2, rtol=1e-6)


def test_opposite_models(apply: Apply) -> None:
    """No direction is better than another: the first model's is taken."""
    assert apply("karcher", [[2, 0], [-4, 0]], weight=(1, 1)).tolist() == [3, 0]


def test_negative_weights_are_refused(recipe: Any) -> None:
    models = [{"model": "a", "parameters": {"weight": -0.5}}, {"model": "b"}]
    with pytest.raises(ConfigError, match="weight"):
        recipe(merge_method="karcher", models=models)


def test_a_base_is_no_extra_model(bare_model: Any, recipe: Any, tmp_path: Any) -> None:
    """mergekit merges a base_model that is not listed as one more model."""
    names = [str(bare_model(tmp_path / name, {"x": np.ones(2)})) for name in "abc"]
    with pytest.raises(ConfigError, match="karcher has no base"):
        make_plan(recipe(merge_method="karcher", models=names[:2], base_model=names[2]), Context())
