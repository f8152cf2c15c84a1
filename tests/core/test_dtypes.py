"""Conversions in numpy against torch's, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from solera_core.dtypes import FLOATS, ITEM_BYTES, from_float32, nonfinite, to_float32
from solera_core.errors import CheckpointError

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

bits32 = hnp.arrays(np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1))


def torch_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(values.copy()).to(TORCH[dtype]).view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=200, deadline=None)
@given(bits=bits32)
def test_from_float32_equals_torch_on_any_bit_pattern(bits: np.ndarray, dtype: str) -> None:
    values = bits.view(np.float32)
    number = ~np.isnan(values)
    width = ITEM_BYTES[dtype]
    ours = from_float32(values, dtype).reshape(-1, width)
    theirs = torch_bytes(values, dtype).reshape(-1, width)
    assert np.array_equal(ours[number], theirs[number])
    assert np.isnan(to_float32(np.ascontiguousarray(ours[~number]).reshape(-1), dtype)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=100, deadline=None)
@given(raw=st.binary(min_size=8, max_size=80))
@example(raw=b"\x01\0\0\0\0\0\xf1\x7f")  # a signalling NaN, of which numpy warns
def test_to_float32_equals_torch_on_any_bytes(raw: bytes, dtype: str) -> None:
    data = np.frombuffer(raw[: len(raw) // 8 * 8], dtype=np.uint8)
    ours = to_float32(data, dtype)
    theirs = torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).to(torch.float32).numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_every_16_bit_pattern_survives_the_round_trip() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    for dtype in ("F16", "BF16"):
        values = to_float32(every.view(np.uint8), dtype)
        number = ~np.isnan(values)
        back = from_float32(values, dtype).view(np.uint16)
        assert np.array_equal(back[number], every[number])
        assert np.isnan(to_float32(np.ascontiguousarray(back[~number]).view(np.uint8), dtype)).all()


def test_bf16_rounds_ties_to_even_by_hand() -> None:
    # 1 + 2^-8 lies halfway between 1 and 1 + 2^-7: to the even 1. 1 + 3 * 2^-8 lies halfway too: to the even 1 + 2^-6.
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)], dtype=np.float32)
    assert to_float32(from_float32(values, "BF16"), "BF16").tolist() == [1.0, 1 + 2**-6, -1.0]


def test_nan_payloads_that_would_carry_into_infinity_stay_nan() -> None:
    values = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], dtype=np.uint32).view(np.float32)
    assert np.isnan(to_float32(from_float32(values, "BF16"), "BF16")).all()


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=100, deadline=None)
@given(bits=bits32)
def test_nonfinite_counts_what_numpy_counts(bits: np.ndarray, dtype: str) -> None:
    raw = from_float32(bits.view(np.float32), dtype)
    assert nonfinite(raw, dtype) == int((~np.isfinite(to_float32(raw, dtype))).sum())


@pytest.mark.parametrize(("dtype", "name"), [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")])
def test_nonfinite_of_every_float8_equals_torch(dtype: str, name: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    values = torch.from_numpy(every.copy()).view(getattr(torch, name)).to(torch.float32)
    assert nonfinite(every, dtype) == int((~torch.isfinite(values)).sum())


def test_integers_are_refused_as_numbers() -> None:
    with pytest.raises(CheckpointError, match="I8 cannot be computed with"):
        to_float32(np.zeros(4, np.uint8), "I8")
    with pytest.raises(CheckpointError, match="cannot be written as I8"):
        from_float32(np.zeros(4, np.float32), "I8")
    assert nonfinite(np.full(8, 255, np.uint8), "I64") == 0
