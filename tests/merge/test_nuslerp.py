import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_merge.plan import make_plan

Apply = Callable[..., Any]
HALF = math.sqrt(0.5)


def arc(a: Any, b: Any, t: float) -> Any:
    """The definition, for one pair of vectors in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    theta = math.acos(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


def test_quarter_circle_by_hand(apply: Apply) -> None:
    np.testing.assert_allclose(apply("nuslerp", [[1, 0], [0, 1]], weight=(1, 1)), [HALF, HALF], rtol=1e-7)
    # From a base: the arc is between the task vectors, here those of the line above.
    merged = apply("nuslerp", [[4, 2], [3, 3]], [3, 2], weight=(2, 2))
    np.testing.assert_allclose(merged, [3 + HALF, 2 + HALF], rtol=1e-7)


def test_weights_are_relative(apply: Apply) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 5000)).astype(np.float32)
    np.testing.assert_allclose(apply("nuslerp", [a, b], weight=(1, 3)), arc(a, b, 0.75), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "flags", [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}]
)
def test_endpoints_are_exact(apply: Apply, flags: dict[str, bool]) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 40, 30)).astype(np.float32)
    assert np.array_equal(apply("nuslerp", [a, b], weight=(1, 0), **flags), a.ravel())
    assert np.array_equal(apply("nuslerp", [a, b], weight=(0, 2), **flags), b.ravel())


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 6)])
def test_one_arc_for_every_vector(apply: Apply, shape: tuple[int, ...]) -> None:
    """Along the last axis, or with `nuslerp_row_wise` along the first."""
    a, b = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    for axis, row_wise in ((-1, False), (0, True)):
        expected = np.empty(shape)
        for i in np.ndindex(*np.moveaxis(a, axis, -1).shape[:-1]):
            x, y, out = (np.moveaxis(v, axis, -1)[i] for v in (a, b, expected))
            out[...] = arc(x, y, 0.3)
        merged = apply("nuslerp", [a, b], weight=(7, 3), nuslerp_flatten=False, nuslerp_row_wise=row_wise)
        np.testing.assert_allclose(merged.reshape(shape), expected, rtol=1e-5, atol=1e-6)


def test_nearly_parallel_vectors_stay_on_the_arc(apply: Apply) -> None:
    """Where `slerp` is linear: the arc is outside the chord by theta^2 / 8."""
    merged = apply("nuslerp", [[1, 0], [math.cos(0.02), math.sin(0.02)]], weight=(1, 1))
    assert np.linalg.norm(merged.astype(np.float64)) == pytest.approx(1, abs=1e-7)


def test_parallel_opposite_and_zero_vectors_are_linear(apply: Apply) -> None:
    assert apply("nuslerp", [[1, 2], [2, 4]], weight=(3, 1)).tolist() == [1.25, 2.5]
    assert apply("nuslerp", [[1, 2], [-3, -6]], weight=(3, 1)).tolist() == [0, 0]
    # mergekit takes a zero vector for one at 90 degrees, and gives sin(pi / 4) * 4 here.
    assert apply("nuslerp", [[0, 0], [4, 8]], weight=(1, 1)).tolist() == [2, 4]


def test_short_vectors_are_not_shrunk(apply: Apply) -> None:
    """mergekit divides vectors shorter than 1e-7 by 1e-7, and so takes any two of them for perpendicular."""
    a, b = np.asarray([[3e-9, 0], [2e-9, 2e-9]], np.float32)
    np.testing.assert_allclose(apply("nuslerp", [a, b], weight=(1, 1)), arc(a, b, 0.5), rtol=1e-6)


def test_a_recipe_may_name_a_base_or_not(bare_model: Any, recipe: Any, tmp_path: Any) -> None:
    names = [str(bare_model(tmp_path / name, {"x": np.ones(2)})) for name in "abc"]
    content = {"merge_method": "nuslerp", "models": names[:2], "parameters": {"weight": 1}}
    for base, has_base in ({}, False), ({"base_model": names[2]}, True):
        plan, _ = make_plan(recipe(**content, **base), Context())
        assert (plan.tensors[0].base is not None) == has_base
    with pytest.raises(ConfigError, match="exactly 2"):
        make_plan(recipe(**content | {"models": names}), Context())


def test_weights_that_cancel_are_refused(bare_model: Any, recipe: Any, tmp_path: Any) -> None:
    """mergekit takes the middle of the arc."""
    names = [str(bare_model(tmp_path / name, {"x": np.ones(2)})) for name in "ab"]
    models = [{"model": m, "parameters": {"weight": w}} for m, w in zip(names, (1, -1), strict=True)]
    with pytest.raises(ConfigError, match=r"nuslerp divides by their sum; change a weight$"):
        make_plan(recipe(merge_method="nuslerp", models=models), Context())
