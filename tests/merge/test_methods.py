"""The contract that every method keeps, whatever its formula."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solera_merge.block import CHUNK_ELEMENTS
from solera_merge.methods.catalogue import METHODS

F32 = npt.NDArray[np.float32]
Apply = Callable[..., F32]
LENGTHS = (1, 2, CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, 3 * CHUNK_ELEMENTS + 17)

PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": (0.3, 0.7)},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weight": (0.3, 0.7), "lambda_": 0.9},
    "ties": {"weight": (0.3, 0.7), "density": (0.4, 0.6)},
    "dare_ties": {"weight": (0.3, 0.7), "density": (0.4, 0.6)},
    "passthrough": {"scale": (1.5,)},
}


def count(method: str) -> int:
    return METHODS[method].most_models or 2


def inputs(method: str, size: int, seed: int = 0) -> tuple[list[F32], F32 | None]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(size).astype(np.float32)
    models = [(base + 0.3 * rng.standard_normal(size)).astype(np.float32) for _ in range(count(method))]
    return models, base if METHODS[method].base == "required" else None


def test_every_method_is_under_contract() -> None:
    assert set(PARAMETERS) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", LENGTHS)
def test_shape_type_finite_and_inputs_unchanged(method: str, size: int, apply: Apply) -> None:
    models, base = inputs(method, size)
    unchanged = [m.tobytes() for m in models]
    unchanged_base = b"" if base is None else base.tobytes()
    merged = apply(method, models, base, **PARAMETERS[method])
    assert merged.shape == (size,)
    assert merged.dtype == np.float32
    assert np.isfinite(merged).all()
    assert [m.tobytes() for m in models] == unchanged
    assert base is None or base.tobytes() == unchanged_base


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.integers(1, 7), size=st.integers(1, 6 * CHUNK_ELEMENTS), seed=st.integers(0, 99))
def test_block_size_changes_no_bit(method: str, chunks: int, size: int, seed: int, apply: Apply) -> None:
    models, base = inputs(method, size, seed)
    in_one = apply(method, models, base, step=8 * CHUNK_ELEMENTS, **PARAMETERS[method])
    in_blocks = apply(method, models, base, step=chunks * CHUNK_ELEMENTS, **PARAMETERS[method])
    assert in_one.tobytes() == in_blocks.tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_merging_equal_models_gives_that_model(method: str, apply: Apply) -> None:
    """Bit for bit where the formula works on differences from the base; else to the last bit of float32."""
    x = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    required = METHODS[method].base == "required"
    parameters = PARAMETERS[method] | ({"scale": (1.0,)} if method == "passthrough" else {})
    merged = apply(method, [x] * count(method), x if required else None, **parameters)
    if method in ("linear", "slerp"):
        np.testing.assert_array_max_ulp(merged, x, maxulp=1)
    else:
        assert merged.tobytes() == x.tobytes()


@pytest.mark.parametrize("method", [m for m in METHODS if "weight" in METHODS[m].parameters])
def test_order_of_models_hardly_matters(method: str, apply: Apply) -> None:
    """Sums of float32 in another order differ in the last bits; nothing else may."""
    models, base = inputs(method, 5000)
    parameters = PARAMETERS[method]
    turned = {k: tuple(reversed(v)) if isinstance(v, tuple) else v for k, v in parameters.items()}
    one = apply(method, models, base, keys=(7, 8), **parameters)
    other = apply(method, models[::-1], base, keys=(8, 7), **turned)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if "weight" in METHODS[m].parameters])
def test_zero_weight_drops_a_model(method: str, apply: Apply) -> None:
    models, base = inputs(method, 5000)
    parameters = PARAMETERS[method] | {"weight": (1.0, 0.0)}
    first = {k: v[:1] if isinstance(v, tuple) else v for k, v in parameters.items()}
    with_both = apply(method, models, base, **parameters)
    alone = apply(method, models[:1], base, **first)
    assert np.array_equal(with_both, alone)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].base == "required" and m != "slerp"])
def test_zero_delta_gives_the_base(method: str, apply: Apply) -> None:
    base = np.random.default_rng(2).standard_normal(100).astype(np.float32)
    assert apply(method, [base, base], base, **PARAMETERS[method]).tobytes() == base.tobytes()
