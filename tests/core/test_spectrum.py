"""Singular values from blocks of rows, against numpy's own."""

import numpy as np
import pytest

from solera_core import spectrum
from solera_core.spectrum import effective_rank, singular_values, stable_rank


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 4), (33, 2)])
@pytest.mark.parametrize("elements", [1, 20, 1 << 22])
def test_singular_values(shape: tuple[int, int], elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "_ELEMENTS", elements)
    matrix = np.random.default_rng(0).standard_normal(shape)
    found = singular_values(lambda start, stop: matrix[start:stop], shape)
    np.testing.assert_allclose(found, np.linalg.svd(matrix, compute_uv=False), rtol=1e-7)


def test_ranks_by_hand() -> None:
    assert effective_rank(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert stable_rank(np.array([2.0, 2.0, 2.0, 0.0])) == 3
    assert effective_rank(np.array([5.0])) == 1
    assert stable_rank(np.array([2.0, 1.0])) == 1.25
    half = effective_rank(np.array([3.0, 1.0]))
    assert half == pytest.approx(4 / 3**0.75)  # exp of -(3/4 ln 3/4 + 1/4 ln 1/4)
    assert effective_rank(np.zeros(3)) is None
    assert stable_rank(np.zeros(3)) is None
