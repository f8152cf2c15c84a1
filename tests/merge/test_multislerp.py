import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_merge.plan import make_plan

Apply = Callable[..., Any]


def test_by_hand(apply: Apply) -> None:
    """Norms 2 and 4, directions at 90 degrees: half-way between them, with a norm of 3."""
    side = 3 * math.sqrt(0.5)
    np.testing.assert_allclose(apply("multislerp", [[2, 0], [0, 4]], weight=(1, 1)), [side, side], rtol=1e-7)
    merged = apply("multislerp", [[3, 5], [1, 9]], [1, 5], weight=(1, 1))
    np.testing.assert_allclose(merged, [1 + side, 5 + side], rtol=1e-7)
    # Not normalized: norms sum to 6.
    merged = apply("multislerp", [[2, 0], [0, 4]], weight=(1, 1), normalize_weights=False)
    np.testing.assert_allclose(merged, [2 * side, 2 * side], rtol=1e-7)


def test_mergekits_walk_along_the_tangent_has_length_zero(apply: Apply) -> None:
    """All of its steps in float64, which the closed form must equal."""
    rng = np.random.default_rng(0)
    models = rng.standard_normal((4, 3000)).astype(np.float32)
    weight = np.array([0.1, 0.9, -0.2, 0.4])
    x, w = models.astype(np.float64), weight / weight.sum()
    norms = np.linalg.norm(x, axis=1)
    units = x / norms[:, None]
    mean = w @ units
    mean /= np.linalg.norm(mean)
    tangent = w @ (units - np.outer(units @ mean, mean))
    length = np.linalg.norm(tangent)
    assert length < 1e-14
    walked = (mean * np.cos(length) + tangent) * (norms @ w)
    merged = apply("multislerp", list(models), weight=tuple(weight))
    np.testing.assert_allclose(merged, walked, rtol=1e-5, atol=1e-6)


def test_directions_that_cancel_are_summed(apply: Apply) -> None:
    assert apply("multislerp", [[2, 0], [-4, 0]], weight=(1, 1)).tolist() == [-1, 0]
    # 3 (1, 0) + 4 (0, 1) - 5 (3/5, 4/5) = 0; mergekit stops here.
    merged = apply("multislerp", [[2, 0], [0, 3], [-2.4, -3.2]], weight=(3, 4, 5))
    np.testing.assert_allclose(merged, [-0.5, -1 / 3], rtol=1e-6)


def test_a_zero_vector_counts_in_the_norm_only(apply: Apply) -> None:
    assert apply("multislerp", [[0, 0], [0, 4]], weight=(1, 1)).tolist() == [0, 2]
    # A tensor that no fine-tune changed; mergekit stops here.
    assert apply("multislerp", [[5, 6]] * 3, [5, 6], weight=(1, 1, 1)).tolist() == [5, 6]


def test_short_vectors_have_their_full_say(apply: Apply) -> None:
    """mergekit adds 1e-8 to norms, so that the first model has half a say here; `eps` decides what is zero instead."""
    models = np.asarray([[1e-8, 0], [0, 1e-2]], np.float32)
    merged = apply("multislerp", models, weight=(1, 1), eps=1e-9)
    assert merged[0] == pytest.approx(merged[1], rel=1e-6)
    assert apply("multislerp", models, weight=(1, 1), eps=1e-7)[0] == 0


def test_one_model_is_that_model(apply: Apply) -> None:
    x = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    assert np.array_equal(apply("multislerp", [x], weight=(0.4,)), x)


def test_weights_that_cancel_need_normalize_weights_off(bare_model: Any, recipe: Any, tmp_path: Any) -> None:
    names = [str(bare_model(tmp_path / name, {"x": np.ones(2)})) for name in "ab"]
    models = [{"model": m, "parameters": {"weight": w}} for m, w in zip(names, (1, -1), strict=True)]
    with pytest.raises(ConfigError, match=r"normalize_weights divides by their sum; .* `normalize_weights: false`"):
        make_plan(recipe(merge_method="multislerp", models=models), Context())
    make_plan(recipe(merge_method="multislerp", models=models, parameters={"normalize_weights": False}), Context())


def test_one_model_without_normalizing_is_scaled(apply: Apply) -> None:
    """mergekit ignores the weight then."""
    assert apply("multislerp", [[2, 4]], weight=(0.5,), normalize_weights=False).tolist() == [1, 2]
