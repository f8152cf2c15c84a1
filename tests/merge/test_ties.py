from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_merge.run import merge

Apply = Callable[..., Any]
ZERO = [0.0, 0.0, 0.0, 0.0]


def test_the_three_steps_by_hand(apply: Apply) -> None:
    a = [4.0, -1.0, 3.0, 0.5]
    b = [-1.0, -2.0, 1.0, 0.25]
    # Trim to half: a keeps 4 and 3, b keeps -2 and the first 1 (|-1| at index 0: ties go to the lower flat index).
    # Elect:        4 - 1 > 0,   -2,   3,   0.
    # Mean:         only a,      b,    a,   none.
    merged = apply("ties", [a, b], ZERO, weight=(1, 1), density=(0.5, 0.5))
    assert merged.tolist() == [4.0, -2.0, 3.0, 0.0]
    # Without trimming: element 2 is the mean of 3 and 1, element 1 of -1 and -2.
    merged = apply("ties", [a, b], ZERO, weight=(1, 1), density=(1.0, 1.0))
    assert merged.tolist() == [4.0, -1.5, 2.0, 0.375]
    merged = apply("ties", [a, b], ZERO, weight=(3, 1), density=(1.0, 1.0), normalize=False, lambda_=0.5)
    assert merged.tolist() == [6.0, -2.5, 5.0, 0.875]


def test_weighted_mean_of_the_agreeing(apply: Apply) -> None:
    assert apply("ties", [[2.0], [6.0], [-1.0]], [0.0], weight=(1, 3, 1), density=(1, 1, 1)).tolist() == [5.0]


def test_a_sign_tie_elects_plus(apply: Apply) -> None:
    assert apply("ties", [[3.0], [-1.0]], [1.0], weight=(1, 1), density=(1, 1)).tolist() == [3.0]


def test_weights_of_mixed_sign_stay_bounded(apply: Apply) -> None:
    """mergekit divides by 1 - 0.99 here and makes 1.99 of deltas of 0.01."""
    merged = apply("ties", [[0.01], [-0.01]], [0.0], weight=(1, -0.99), density=(1, 1))
    assert merged[0] == pytest.approx(0.01)


def test_a_negative_weight_means_the_opposite_direction(apply: Apply) -> None:
    """mergekit divides by a negative sum, so that a weight of -1 adds the task it should subtract."""
    assert apply("ties", [[3.0]], [1.0], weight=(-1,), density=(1,)).tolist() == [-1.0]


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_rescale_keeps_the_l1_norm_of_every_task_vector(apply: Apply, method: str) -> None:
    a = [4.0, -1.0, 3.0, 0.5]  # norm 8.5; 7 is kept
    unchanged = ZERO  # no norm to keep
    gamma = {} if method == "ties" else {"gamma": (0.0, 0.0)}
    parameters = {"weight": (1, 1), "density": (0.5, 0.5), "normalize": False, "rescale": True, **gamma}
    merged = apply(method, [a, unchanged], ZERO, **parameters)
    factor = np.float32(8.5 / 7)
    assert merged.tolist() == [4 * factor, 0.0, 3 * factor, 0.0]


def test_rescale_of_what_is_left_by_one_threshold_for_the_model_is_refused(
    recipe: Callable[..., Any], bare_model: Callable[..., Path], tmp_path: Path
) -> None:
    models = [str(bare_model(tmp_path / name, {"model.norm.weight": np.ones(4)})) for name in "ab"]
    content = {
        "merge_method": "ties",
        "base_model": models[0],
        "models": models[1:],
        "parameters": {"weight": 1.0, "density": 0.5, "rescale": True, "scope": "model"},
    }
    with pytest.raises(ConfigError, match=r"`rescale` gives every tensor .* leave one of the two out"):
        merge(recipe(**content), tmp_path / "out", Context())


@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 0.999, 1.0])
def test_kept_are_exactly_the_largest(apply: Apply, density: float) -> None:
    rng = np.random.default_rng(3)
    delta = rng.standard_normal(10_000).astype(np.float32)
    merged = apply("ties", [delta], np.zeros_like(delta), weight=(1,), density=(density,))
    k = int(density * delta.size)
    kept = np.argsort(-np.abs(delta), kind="stable")[:k]
    expected = np.zeros_like(delta)
    expected[kept] = delta[kept]
    assert np.array_equal(merged, expected)
