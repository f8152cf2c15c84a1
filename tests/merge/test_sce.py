from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from solera_core.errors import ConfigError

Apply = Callable[..., Any]
ZERO = [0.0, 0.0, 0.0, 0.0]


def by_definition(deltas: Sequence[Any], share: float) -> Any:
    """The merged task vector from the paper's three steps, in float64, with a stable sort."""
    taus = np.array(deltas, np.float64).reshape(len(deltas), -1)
    if share < 1:
        variance = taus.var(axis=0).astype(np.float32)
        k = max(1, int(share * np.count_nonzero(variance)))
        chosen = np.argsort(-variance, kind="stable")[:k]
        mask = np.zeros(variance.size, bool)
        mask[chosen] = True
        taus = taus * mask
    weight = (taus**2).sum(axis=1) / (taus**2).sum()
    sign = np.where(taus.sum(axis=0) >= 0, 1, -1)
    agrees = weight[:, None] * (np.sign(taus) == sign)
    return (taus * agrees).sum(axis=0) / np.where(agrees.sum(axis=0) == 0, 1, agrees.sum(axis=0))


def test_by_hand(apply: Apply) -> None:
    a = [3.0, -1.0, 0.0, 1.0]
    b = [1.0, 2.0, 0.0, 1.0]
    # Squares 11 and 6; elected: +, +, (none), +.
    # Element 0: (11 * 3 + 6 * 1) / 17; element 1: only b, 2; element 3: both have 1.
    merged = apply("sce", [a, b], ZERO)
    assert merged.tolist() == pytest.approx([39 / 17, 2.0, 0.0, 1.0])
    # Variances 1, 2.25, 0, 0: half of the two that are not 0 is element 1. Only b agrees with the sign of -1 + 2.
    assert apply("sce", [a, b], ZERO, select_topk=0.5).tolist() == [0.0, 2.0, 0.0, 0.0]


def test_the_sign_is_elected_without_weights(apply: Apply) -> None:
    """Two small models outvote nobody, but their sum counts as it is: the weights come after the election."""
    a, b, c = [2.0, 30.0], [-1.5, 1.0], [-1.5, 1.0]
    merged = apply("sce", [a, b, c], [0.0, 0.0])
    assert merged[0] == -1.5  # 2 - 1.5 - 1.5 < 0, though a has 99 % of the weight


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("levels", [0, 4])
def test_against_the_definition(apply: Apply, share: float, count: int, levels: int) -> None:
    deltas = np.random.default_rng(0).standard_normal((count, 9000)) * np.arange(1, count + 1)[:, None]
    if levels:  # many equal variances, and elements that all models agree about
        deltas = np.round(deltas * levels) / levels
        deltas[:, ::7] = deltas[0, ::7]
    deltas = deltas.astype(np.float32)
    merged = apply("sce", list(deltas), np.zeros(9000, np.float32), select_topk=share)
    np.testing.assert_allclose(merged, by_definition(list(deltas), share), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-12, 1.0, 2.0**20])
def test_the_scale_of_the_weights_does_not_matter(apply: Apply, scale: float) -> None:
    """mergekit takes uniform coefficients where the mean squares sum to less than 1e-6."""
    deltas = np.random.default_rng(0).standard_normal((2, 5000)).astype(np.float32)
    deltas[1] *= 0.3
    zero = np.zeros(5000, np.float32)
    merged = apply("sce", list(deltas), zero, select_topk=0.4)
    scaled = apply("sce", list(deltas * np.float32(scale)), zero, select_topk=0.4)
    assert np.array_equal(merged * np.float32(scale), scaled)


def test_a_model_with_a_tiny_share_keeps_its_own_changes(apply: Apply) -> None:
    """mergekit divides by at least 1e-6, and makes a hundredth of the change of a model whose share is 1e-8."""
    merged = apply("sce", [[1e4, 0.0], [0.0, 1.0]], [0.0, 0.0])
    assert merged.tolist() == [1e4, 1.0]


def test_what_all_models_agree_about_is_only_kept_without_selection(apply: Apply) -> None:
    a, b = [1.0, 2.0, 5.0], [1.0, 3.0, 5.0]
    assert apply("sce", [a, b], [0.0] * 3, select_topk=0.99).tolist()[::2] == [0.0, 0.0]
    assert apply("sce", [a, b], [0.0] * 3).tolist()[::2] == [1.0, 5.0]


def test_at_least_one_element_is_kept(apply: Apply) -> None:
    assert apply("sce", [[1.0, 5.0], [2.0, 7.0]], [0.0, 0.0], select_topk=0.1)[0] == 0.0
    assert apply("sce", [[5.0], [5.5]], [1.0], select_topk=0.1)[0] > 5


def test_selecting_nothing_gives_the_base(apply: Apply) -> None:
    base, a, b = np.random.default_rng(0).standard_normal((3, 100)).astype(np.float32)
    assert np.array_equal(apply("sce", [a, b], base, select_topk=0.0), base)


def test_one_model_is_refused(recipe: Callable[..., Any], tmp_path: Any, make_model: Callable[..., Any]) -> None:
    """Its variance is 0 everywhere, so a selection would silently give the base."""
    from solera_core.context import Context
    from solera_merge.run import merge

    paths = [str(make_model(tmp_path / name, seed=i)) for i, name in enumerate("ab")]
    content = {"merge_method": "sce", "base_model": paths[0], "models": paths[1:]}
    with pytest.raises(ConfigError, match="sce"):
        merge(recipe(**content), tmp_path / "out", Context())
