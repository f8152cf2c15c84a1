import pytest

from solera_merge.methods.catalogue import METHODS
from solera_merge.settings import evaluate, filters_of, scalars_of

WEIGHT = METHODS["ties"].parameters["weight"]
NORMALIZE = METHODS["ties"].parameters["normalize"]


@pytest.mark.parametrize(
    ("setting", "t", "expected"),
    [
        (0.5, 0.3, 0.5),
        ("1e-3", 0.0, 1e-3),  # YAML reads 1e-3 as a string
        ([0, 1], 0.25, 0.25),
        ([0, 1, 0], 0.75, 0.5),
        ([2, 4, 8], 0.0, 2.0),
        ([2, 4, 8], 1.0, 8.0),
        ([7], 0.4, 7.0),
    ],
)
def test_scalars_and_gradients(setting: object, t: float, expected: float) -> None:
    assert evaluate(setting, WEIGHT, "model.norm.weight", t) == pytest.approx(expected)


def test_truth_values_are_not_interpolated() -> None:
    assert [evaluate([True, False, True], NORMALIZE, "x", t) for t in (0, 0.49, 0.5, 1)] == [True, True, False, True]


def test_whole_numbers_are_interpolated_where_one_lies_between() -> None:
    """As in mergekit, whose own message names no parameter."""
    steps = METHODS["karcher"].parameters["max_iter"]
    assert [evaluate([1, 3], steps, "x", t) for t in (0, 0.5, 1)] == [1, 2, 3]
    assert evaluate([2, 8], steps, "x", 1 / 3) == 4
    with pytest.raises(ValueError, match=r"a gradient from 1 to 2 gives 1.5, no whole number"):
        evaluate([1, 2], steps, "x", 0.5)


def test_first_matching_filter_wins() -> None:
    setting = [{"filter": "mlp", "value": 1}, {"filter": "down", "value": 2}, {"value": [3, 4]}]
    assert evaluate(setting, WEIGHT, "layers.0.mlp.down_proj.weight", 0.5) == 1
    assert evaluate(setting, WEIGHT, "layers.0.down", 0.5) == 2
    assert evaluate(setting, WEIGHT, "norm", 0.5) == 3.5
    assert evaluate([{"filter": "*", "value": 5}], WEIGHT, "norm", 0) == 5
    assert evaluate({"filter": "mlp", "value": 1}, WEIGHT, "norm", 0) is None  # the next level decides


def test_what_is_written() -> None:
    setting = [{"filter": "mlp", "value": [1, 2]}, {"filter": "*", "value": 3}, {"value": 4}]
    assert list(scalars_of(setting)) == [1, 2, 3, 4]
    assert filters_of(setting) == ["mlp"]
