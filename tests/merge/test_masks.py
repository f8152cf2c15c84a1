import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solera_merge.masks import bernoulli, key


@given(start=st.integers(0, 10_000), n=st.integers(0, 300), probability=st.floats(0, 1))
def test_any_part_equals_that_part_of_the_whole(start: int, n: int, probability: float) -> None:
    whole = bernoulli(42, 0, start + n, probability)
    assert np.array_equal(bernoulli(42, start, n, probability), whole[start:])


def philox4x64(key: int, counter: int) -> list[int]:
    """Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), 10 rounds, written from the paper."""
    word = (1 << 64) - 1
    x = [counter >> (64 * i) & word for i in range(4)]
    k = [key & word, key >> 64]
    for _ in range(10):
        a, b = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [(b >> 64) ^ x[1] ^ k[0], b & word, (a >> 64) ^ x[3] ^ k[1], a & word]
        k = [(k[0] + 0x9E3779B97F4A7C15) & word, (k[1] + 0xBB67AE8584CAA73B) & word]
    return x


def test_masks_are_the_published_generator() -> None:
    identity = key(0, "model.norm.weight", "a")
    words = [w for step in range(1, 6) for w in philox4x64(identity, step)]  # NumPy counts before it draws
    halves = [half for w in words for half in (w & 0xFFFFFFFF, w >> 32)]
    expected = [half < round(0.3 * 2**32) for half in halves]
    assert bernoulli(identity, 0, 40, 0.3).tolist() == expected


def test_known_answer() -> None:
    """Frozen: another stream, or another way to key it, would silently change every seeded merge."""
    mask = bernoulli(key(0, "model.norm.weight", "a"), 3, 32, 0.5)
    assert "".join(str(int(bit)) for bit in mask) == "00111001000000100101001001000101"


def test_probability_is_met_and_neighbours_are_independent() -> None:
    mask = bernoulli(key(1, "w", "m"), 0, 400_000, 0.3)
    assert mask.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 400_000))
    for lag in (1, 2, 7, 8, 64):
        correlation = np.corrcoef(mask[:-lag], mask[lag:])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(400_000)


def test_keys_differ_in_every_part() -> None:
    keys = {key(s, t, m) for s in (0, 1) for t in ("w", "v") for m in ("a", "b")} | {key(0, "wa", ""), key(0, "w", "a")}
    assert len(keys) == 9
    assert all(0 <= k < 2**128 for k in keys)


def test_never_and_always() -> None:
    assert not bernoulli(1, 0, 1000, 0.0).any()
    assert bernoulli(1, 0, 1000, 1.0).all()
