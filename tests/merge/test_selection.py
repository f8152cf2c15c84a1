"""Exact selection against a stable sort."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solera_merge.block import CHUNK_ELEMENTS
from solera_merge.selection import KEEP_ALL, KEEP_NONE, largest_deltas, order_statistics


def kept_by_sort(x: Any, density: float) -> Any:
    mask = np.zeros(x.size, bool)
    mask[np.argsort(-np.abs(x), kind="stable")[: max(1, int(density * x.size))]] = True
    return mask


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 3 * CHUNK_ELEMENTS),
    density=st.floats(0.0001, 0.9999),
    levels=st.sampled_from([1, 2, 5, 300, 0]),
    seed=st.integers(0, 1000),
)
def test_equals_a_stable_sort(in_memory: Any, size: int, density: float, levels: int, seed: int) -> None:
    """`levels` distinct magnitudes, so that ties abound; 0: all different. Equal magnitudes: lower flat index wins."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size).astype(np.float32)
    if levels:
        x = (np.round(np.abs(x) * levels) / levels * rng.choice([-1, 1], size)).astype(np.float32)
    tensor = in_memory([x], np.zeros_like(x))
    cut = largest_deltas(tensor, [density])[0]
    kept = np.concatenate([cut.keeps(block.deltas[0], block.start) for block in tensor.blocks()])
    expected = kept_by_sort(x, density)
    if cut.bits == 0:  # zeros may be kept as well: they add nothing
        kept, expected = kept & (x != 0), expected & (x != 0)
    assert np.array_equal(kept, expected)


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1.0, 1e36])
def test_every_range_of_float32(in_memory: Any, scale: float) -> None:
    x = (np.arange(-50, 50) * scale).astype(np.float32)
    cut = largest_deltas(in_memory([x], np.zeros_like(x)), [0.3])[0]
    assert np.array_equal(cut.keeps(x, 0), kept_by_sort(x, 0.3))


def test_all_and_none_need_no_pass(in_memory: Any) -> None:
    x = np.array([0.0, 1.0, -2.0], np.float32)
    tensor = in_memory([x, x], x * 0)
    assert largest_deltas(tensor, [1.0, 0.0]) == [KEEP_ALL, KEEP_NONE]
    assert tensor.passes == 0
    assert KEEP_ALL.keeps(x, 0).all()
    assert not KEEP_NONE.keeps(x, 0).any()


def test_several_models_share_the_passes(in_memory: Any) -> None:
    rng = np.random.default_rng(0)
    models = rng.standard_normal((3, 9000)).astype(np.float32)
    tensor = in_memory(list(models), np.zeros(9000, np.float32))
    cuts = largest_deltas(tensor, [0.1, 1.0, 0.5])
    assert tensor.passes == 2  # no two magnitudes are equal, so the third pass is not needed
    assert [int(c.keeps(m, 0).sum()) for c, m in zip(cuts, models, strict=True)] == [900, 9000, 4500]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 3000),
    ranks=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    levels=st.sampled_from([1, 3, 0]),
    scale=st.sampled_from([1e-45, 1e-20, 1.0, 1e37]),
    seed=st.integers(0, 1000),
)
def test_order_statistics_equal_a_sort(size: int, ranks: list[float], levels: int, scale: float, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(size)
    x = (scale * (np.round(x * levels) if levels else x)).astype(np.float32)
    places = [min(int(r * size), size - 1) for r in ranks]
    found = order_statistics(lambda: iter(np.array_split(x, 3)), places)
    assert found == np.sort(np.abs(x))[places].tolist()


def test_order_statistics_of_nothing() -> None:
    assert order_statistics(lambda: iter([]), [0, 0]) == [0.0, 0.0]
