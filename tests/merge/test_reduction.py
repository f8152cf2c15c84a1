import math
from typing import Any

import numpy as np
import pytest

from solera_merge.block import CHUNK_ELEMENTS
from solera_merge.reduction import LANES, norms_and_dot, sums_of_squares


def test_block_size_changes_no_bit_of_the_sums(in_memory: Any) -> None:
    """In float64, where another order of adding shows at once."""
    a, b = np.random.default_rng(0).standard_normal((2, 40 * CHUNK_ELEMENTS + 5)).astype(np.float32)
    results = {norms_and_dot(in_memory([b], a, chunks * CHUNK_ELEMENTS)) for chunks in (1, 2, 3, 7, 100)}
    assert len(results) == 1


def test_the_order_of_adding_is_as_written(in_memory: Any) -> None:
    """32 lanes in chunks of 4096, lanes in order, chunks exactly: by hand, to the last bit."""
    a, b = np.random.default_rng(3).standard_normal((2, 3 * CHUNK_ELEMENTS + 77)).astype(np.float32)
    chunks: list[float] = []
    for begin in range(0, a.size, CHUNK_ELEMENTS):
        lanes = [0.0] * LANES
        for j, (x, y) in enumerate(
            zip(a[begin : begin + CHUNK_ELEMENTS], b[begin : begin + CHUNK_ELEMENTS], strict=True)
        ):
            lanes[j % LANES] += float(x) * float(y)
        total = lanes[0]
        for lane in lanes[1:]:
            total += lane
        chunks.append(total)
    assert norms_and_dot(in_memory([b], a))[2] == math.fsum(chunks)


def test_against_numpy(in_memory: Any) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 10_000)).astype(np.float32)
    norm_a, norm_b, dot = norms_and_dot(in_memory([b], a))
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    assert norm_a == pytest.approx(np.linalg.norm(wide_a), rel=1e-14)
    assert norm_b == pytest.approx(np.linalg.norm(wide_b), rel=1e-14)
    assert dot == pytest.approx(wide_a @ wide_b, rel=1e-12)


def test_sums_of_squares(in_memory: Any) -> None:
    a, b, c = np.random.default_rng(0).standard_normal((3, 40 * CHUNK_ELEMENTS + 5)).astype(np.float32)
    results = {
        tuple(sums_of_squares(in_memory([b, c], a, chunks * CHUNK_ELEMENTS), lambda block: block.deltas))
        for chunks in (1, 2, 7, 100)
    }
    assert len(results) == 1
    expected = [float((x.astype(np.float64) ** 2).sum()) for x in (b - a, c - a)]
    assert results.pop() == pytest.approx(expected, rel=1e-13)


def test_sums_of_squares_of_nothing(in_memory: Any) -> None:
    empty = np.zeros((0,), np.float32)
    assert sums_of_squares(in_memory([empty, empty], empty), lambda block: block.deltas) == []
