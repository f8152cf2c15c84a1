import math
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from solera_merge.block import CHUNK_ELEMENTS, Block, Unit
from solera_merge.reduction import _PARTS, LANES, add_parts, norms_and_dot, sums_of_squares


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


@pytest.mark.parametrize("step", [1, 7, 300, 5000])
def test_few_parts_have_the_sum_of_many(step: int) -> None:
    """Over 120 orders of magnitude, and however they cancel; and what is held stays small."""
    rng = np.random.default_rng(step)
    for _ in range(20):
        values = (rng.choice([-1.0, 1.0], 4000) * 10 ** rng.uniform(-60, 60, 4000)).tolist()
        values += [-value for value in values[::-3]]
        parts: list[float] = []
        for at in range(0, len(values), step):
            add_parts(parts, values[at : at + step])
            assert len(parts) <= _PARTS
        assert math.fsum(parts) == math.fsum(values)


def test_what_is_held_does_not_grow_with_the_tensor(in_memory: Any) -> None:
    """The sums of the chunks of a tensor that is read block by block: of 20,000 chunks 2 MB, were all of them held."""
    a = np.zeros(CHUNK_ELEMENTS, np.float32)
    a[0] = 1

    class Long(in_memory):  # type: ignore[misc]
        """The same block again and again."""

        def blocks(self, unit: Unit = "elements") -> Iterator[Block]:
            for i in range(20_000):
                yield Block(i * CHUNK_ELEMENTS, a, (a,))

    tracemalloc.start()
    norms = norms_and_dot(Long([a], a))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert norms == (math.sqrt(20_000), math.sqrt(20_000), 20_000)
    assert peak < 1_000_000


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
