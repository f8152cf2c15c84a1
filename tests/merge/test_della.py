from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_merge.methods.catalogue import METHODS
from solera_merge.run import merge
from solera_merge.task_vectors import row_ranks

Apply = Callable[..., Any]


def probabilities(delta: Any, density: float, epsilon: float) -> Any:
    """Keep probabilities from the paper's definition, by stable sorts of the rows."""
    rows = delta.reshape(-1, delta.shape[-1])
    n = rows.shape[1]
    rank = np.empty(rows.shape)
    for i, row in enumerate(np.abs(rows)):
        largest_first = sorted(range(n), key=lambda j: -row[j])  # of equal ones the first
        rank[i, largest_first] = np.arange(n - 1, -1, -1)
    place = rank / (n - 1) if n > 1 else np.full(rows.shape, 0.5)
    return (density - epsilon + 2 * epsilon * place).reshape(delta.shape)


def test_ranks_by_hand() -> None:
    rows = np.array([[3.0, -5.0, 0.0, 1.0], [2.0, -2.0, 0.0, -0.0]], np.float32)
    # Of equal magnitudes the first is the larger: 2 before -2, 0 before -0.
    assert row_ranks(rows.reshape(-1), 4).reshape(2, 4).tolist() == [[2, 3, 0, 1], [3, 2, 1, 0]]
    assert row_ranks(rows.reshape(-1), 1).tolist() == [0] * 8


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("shape", [(7, 90), (2, 3, 40), (300,), (50, 1), (20, 2)])
def test_every_element_is_kept_at_its_own_rate_and_rescaled_by_it(
    apply: Apply, shape: tuple[int, ...], levels: int
) -> None:
    density, epsilon, runs = 0.4, 0.3, 500
    delta = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if levels:
        delta = (np.ceil(np.abs(delta) * levels) / levels).astype(np.float32)
    expected = probabilities(delta, density, epsilon)
    assert np.mean(expected) == pytest.approx(density)
    kept = np.zeros(shape)
    shared = {"weight": (1.0,), "density": (density,), "epsilon": (epsilon,)}
    for key in range(runs):
        merged = apply("della", [delta], np.zeros_like(delta), keys=(key,), **shared).reshape(shape)
        kept += merged != 0
        on = merged != 0
        np.testing.assert_allclose(merged[on], (delta / expected)[on], rtol=1e-6)
    deviations = (kept / runs - expected) / np.sqrt(expected * (1 - expected) / runs)
    assert np.abs(deviations).max() < 5
    assert np.std(deviations) == pytest.approx(1, abs=0.25)


def test_the_expectation_of_large_and_small_changes_is_kept(apply: Apply) -> None:
    """mergekit, which scales to the L1 norm of the tensor, makes 1.34 of the large ones and 0.25 of the small ones."""
    delta = np.random.default_rng(0).standard_normal((400, 100)).astype(np.float32)
    merged = apply("della", [delta], np.zeros_like(delta), weight=(1,), density=(0.3,), epsilon=(0.25,))
    order = np.argsort(np.abs(delta), axis=1)
    ours = np.take_along_axis(merged.reshape(delta.shape), order, axis=1)
    ratios = (ours * np.sign(np.take_along_axis(delta, order, axis=1))).sum(0) / np.sort(np.abs(delta), axis=1).sum(0)
    assert ratios[90:].mean() == pytest.approx(1, abs=0.05)
    assert ratios[5:15].mean() == pytest.approx(1, abs=0.15)


def test_without_rescale(apply: Apply) -> None:
    base = np.zeros((30, 100), np.float32)
    merged = apply("della", [base + 1], base, weight=(1,), density=(0.5,), rescale=False)
    assert set(merged.tolist()) == {0.0, 1.0}


def test_rows_do_not_see_each_other(apply: Apply) -> None:
    """Scaling one row changes no mask."""
    delta = np.random.default_rng(0).standard_normal((5, 200)).astype(np.float32)
    shared = {"weight": (1.0,), "density": (0.5,), "epsilon": (0.4,)}
    one = apply("della", [delta], delta * 0, **shared).reshape(5, 200)
    delta[2] *= 1024
    other = apply("della", [delta], delta * 0, **shared).reshape(5, 200)
    one[2] *= 1024
    assert np.array_equal(one, other)


def test_without_a_window_it_is_dare(apply: Apply) -> None:
    base, a, b = np.random.default_rng(0).standard_normal((3, 40, 50)).astype(np.float32)
    shared = {"weight": (0.4, 0.7), "density": (0.2, 0.6), "normalize": True}
    merged = apply("della", [a, b], base, epsilon=(0.0, 0.0), **shared)
    assert np.array_equal(merged, apply("dare_ties", [a, b], base, **shared))


def test_full_density_is_ties_and_none_is_the_base(apply: Apply) -> None:
    base, a, b = np.random.default_rng(0).standard_normal((3, 40, 50)).astype(np.float32)
    shared = {"weight": (0.4, 0.7), "epsilon": (0.15, 0.15)}
    full = apply("della", [a, b], base, density=(1.0, 1.0), **shared)
    assert np.array_equal(full, apply("ties", [a, b], base, weight=(0.4, 0.7), density=(1.0, 1.0)))
    assert np.array_equal(apply("della", [a, b], base, density=(0.0, 0.0), **shared), base.reshape(-1))


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.25, 0.25), (0.75, 0.25)])
def test_probabilities_outside_0_and_1_are_refused(apply: Apply, method: str, density: float, epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"keep probabilities from .* must lie between 0 and 1"):
        apply(method, [[1.0, 2.0]], [0.0, 0.0], weight=(1,), density=(density,), epsilon=(epsilon,))
    check = METHODS[method].check
    assert check is not None
    with pytest.raises(ValueError, match="make epsilon smaller than"):
        check({"density": (1.0, density), "epsilon": (epsilon, epsilon)})
    check({"density": (1.0, 0.0, 0.5), "epsilon": (0.9, 0.9, 0.4)})


def test_the_plan_refuses_them_too(recipe: Callable[..., Any], bare_model: Callable[..., Path], tmp_path: Path) -> None:
    models = [str(bare_model(tmp_path / name, {"model.norm.weight": np.ones(4)})) for name in "ab"]
    content = {
        "merge_method": "della",
        "base_model": models[0],
        "models": models[1:],
        "parameters": {"weight": 1.0, "density": 0.9},
    }
    with pytest.raises(ConfigError, match=r"`density` 0.9 with `epsilon` 0.15 .*'model.norm.weight'"):
        merge(recipe(**content), tmp_path / "out", Context())
