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


def test_by_hand(apply: Apply) -> None:
    a = [1.0, 1.0, 0.125, -1.0]
    b = [1.0, 0.125, 0.125, 1.0]
    c = [1.0, 0.125, 0.125, 1.0]
    # The others change the sum by: 2 0.25 0.25 2 (for a), 2 1.125 0.25 0 (for b, c).
    # |own| >= 0.5 |others| holds everywhere but for the second element of b and c.
    half = {"tall_lambda": (0.5, 0.5, 0.5)}
    assert apply("consensus_ta", [a, b, c], ZERO, k=1, **half).tolist() == [3.0, 1.25, 0.375, 1.0]
    assert apply("consensus_ta", [a, b, c], ZERO, k=2, **half).tolist() == [3.0, 0.0, 0.375, 1.0]
    # |own| >= |others| holds for the second element of a, and the last of b and c.
    one = {"tall_lambda": (1.0, 1.0, 1.0)}
    assert apply("consensus_ta", [a, b, c], ZERO, k=1, lambda_=2.0, **one).tolist() == [0.0, 2.5, 0.0, 2.0]


def test_a_threshold_of_its_own_for_every_model(apply: Apply) -> None:
    """Only the second is so lenient that it needs the first element."""
    models = [[1.0, 0.0], [0.5, 0.0]]
    assert apply("consensus_ta", models, [0.0, 0.0], k=2, tall_lambda=(1.0, 0.5)).tolist() == [1.5, 0.0]
    assert apply("consensus_ta", models, [0.0, 0.0], k=2, tall_lambda=(1.0, 0.6)).tolist() == [0.0, 0.0]


def test_k_of_0_is_task_arithmetic(apply: Apply) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(5000).astype(np.float32)
    models = [base + rng.standard_normal(base.size).astype(np.float32) for _ in range(3)]
    ours = apply("consensus_ta", models, base, k=0, tall_lambda=(0.4,) * 3, lambda_=0.3)
    assert np.array_equal(ours, apply("task_arithmetic", models, base, weight=(1, 1, 1), lambda_=0.3))


def test_against_the_paper_on_flat_vectors(apply: Apply) -> None:
    rng = np.random.default_rng(1)
    base = rng.standard_normal(20_000).astype(np.float32)
    models = [(base + rng.standard_normal(base.size) ** 3).astype(np.float32) for _ in range(4)]
    tau = np.stack([m.astype(np.float64) - base for m in models])
    masks = np.abs(tau) >= 0.5 * np.abs(tau.sum(0) - tau)
    expected = base + 0.7 * (masks.sum(0) >= 3) * tau.sum(0)
    merged = apply("consensus_ta", models, base, k=3, tall_lambda=(0.5,) * 4, lambda_=0.7)
    close = np.isclose(merged, expected, rtol=1e-5, atol=1e-5)
    assert close.mean() > 0.9995  # float32 may see the other side of a comparison that is nearly equal


def test_more_agreement_than_models_is_an_error(bare_model: Callable[..., Path], recipe: Any, tmp_path: Path) -> None:
    paths = [str(bare_model(tmp_path / name, {"w": np.full((2, 2), 1.0 + i)})) for i, name in enumerate("xyz")]
    config = recipe(merge_method="consensus_ta", base_model=paths[0], models=paths[1:], parameters={"k": 3})
    with pytest.raises(ConfigError, match="k: 3 tasks"):
        merge(config, tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()
