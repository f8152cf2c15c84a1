"""The contract that every method keeps, whatever its formula."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
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
SHAPES = ((), (1,), (2,), (5, 1), (1, 7), (40, 300), (3, 5, 11), (CHUNK_ELEMENTS - 1,), (3 * CHUNK_ELEMENTS + 17,))


@dataclass(frozen=True)
class Case:
    """How the contract tries one method.

    Attributes:
        parameters: by keyword; a tuple has one value a model.
        identity_rtol: merging equal models gives that model within this; 0: bit for bit. None: it need not
            (explain why beside the case).
        order_rtol: merging in another order gives the same within this. None: the order means something.
        base: give an optional base too.
    """

    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    identity_rtol: float | None = 0.0
    order_rtol: float | None = 1e-5
    base: bool = False


ULP = 1.2e-7
CASES: dict[str, Case] = {
    "linear": Case({"weight": (0.3, 0.7)}, identity_rtol=ULP),
    "slerp": Case({"t": 0.3}, identity_rtol=ULP),
    "task_arithmetic": Case({"weight": (0.3, 0.7), "lambda_": 0.9}),
    "ties": Case({"weight": (0.3, 0.7), "density": (0.4, 0.6)}),
    "dare_ties": Case({"weight": (0.3, 0.7), "density": (0.4, 0.6)}),
    "passthrough": Case({"scale": (1.0,)}),
    "nuslerp": Case({"weight": (0.3, 0.7)}, identity_rtol=2 * ULP),
    "nuslerp, base": Case({"weight": (0.3, 0.7)}, base=True),
    "nuslerp, last axis": Case({"weight": (0.3, 0.7), "nuslerp_flatten": False}, identity_rtol=2 * ULP),
    "nuslerp, first axis": Case(
        {"weight": (0.3, 0.7), "nuslerp_flatten": False, "nuslerp_row_wise": True}, identity_rtol=2 * ULP
    ),
    "multislerp": Case({"weight": (0.3, 0.7)}, identity_rtol=2 * ULP),
    "multislerp, base": Case({"weight": (0.3, 0.7)}, base=True),
    "karcher": Case({"weight": (0.3, 0.7)}, identity_rtol=2 * ULP),
    "model_stock": Case(),
    "model_stock, filter-wise": Case({"filter_wise": True}),
    "nearswap": Case({"t": 0.1}),
    "arcee_fusion": Case(),
    "magmax": Case({"lambda_": 0.8}),
    # Changes of 0.3 on average: about a quarter counts as none, a third is made by one model alone.
    "ram": Case({"epsilon": 0.1}),
    "ramplus_tl": Case({"epsilon": 0.1, "r": 0.3, "alpha": 5.0}),
    "ramplus": Case({"epsilon": 0.1, "r": 0.3, "alpha": 5.0}),
    "consensus_ta": Case({"k": 1, "tall_lambda": (0.4, 0.6), "lambda_": 0.9}),
    "tsv_m": Case({"lambda_": 0.9}),
    "iso_c": Case({"lambda_": 0.9}),
    "iso_cts": Case({"common_space_fraction": 0.7, "lambda_": 0.9}),
    "dare_linear": Case({"weight": (0.3, 0.7), "density": (0.4, 0.6), "lambda_": 0.9}),
    "breadcrumbs": Case({"weight": (0.3, 0.7), "density": (0.4, 0.6), "gamma": (0.1, 0.02)}),
    "breadcrumbs_ties": Case({"weight": (0.3, 0.7), "density": (0.4, 0.6), "gamma": (0.1, 0.02)}),
    "ties, of the model": Case({"weight": (0.3, 0.7), "density": (0.4, 0.6), "scope": "model"}),
    "breadcrumbs, of the model": Case(
        {"weight": (0.3, 0.7), "density": (0.4, 0.6), "gamma": (0.1, 0.1), "scope": "model"}
    ),
    "della": Case({"weight": (0.3, 0.7), "density": (0.4, 0.6), "epsilon": (0.2, 0.1)}),
    "della_linear": Case({"weight": (0.3, 0.7), "density": (0.4, 0.6), "epsilon": (0.2, 0.1)}),
    "sce": Case({"select_topk": 0.4}),
    "sce, all elements": Case({"select_topk": 1.0}, identity_rtol=0),
}
"""By a name that begins with the method's; `nuslerp, rows` is a second case of `nuslerp`."""


def method_of(case: str) -> str:
    return case.split(",")[0]


def count(method: str) -> int:
    return METHODS[method].most_models or max(METHODS[method].fewest_models, 2)


def has_base(case: str) -> bool:
    return METHODS[method_of(case)].base == "required" or CASES[case].base


def inputs(case: str, shape: tuple[int, ...], seed: int = 0) -> tuple[list[F32], F32 | None]:
    rng = np.random.default_rng(seed)
    base = np.asarray(rng.standard_normal(shape), np.float32)
    models = [np.asarray(base + 0.3 * rng.standard_normal(shape), np.float32) for _ in range(count(method_of(case)))]
    return models, base if has_base(case) else None


def test_every_method_is_under_contract() -> None:
    assert {method_of(case) for case in CASES} == set(METHODS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shape_type_finite_and_inputs_unchanged(case: str, shape: tuple[int, ...], apply: Apply) -> None:
    models, base = inputs(case, shape)
    unchanged = [m.tobytes() for m in models]
    unchanged_base = b"" if base is None else base.tobytes()
    merged = apply(method_of(case), models, base, **CASES[case].parameters)
    assert merged.shape == (math.prod(shape),)
    assert merged.dtype == np.float32
    assert np.isfinite(merged).all()
    assert [m.tobytes() for m in models] == unchanged
    assert base is None or base.tobytes() == unchanged_base


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chunks=st.integers(1, 7),
    shape=st.one_of(
        st.tuples(st.integers(1, 6 * CHUNK_ELEMENTS)), st.tuples(st.integers(1, 90), st.integers(1, 3 * CHUNK_ELEMENTS))
    ),
    seed=st.integers(0, 99),
)
def test_block_size_changes_no_bit(case: str, chunks: int, shape: tuple[int, ...], seed: int, apply: Apply) -> None:
    if math.prod(shape) > 8 * CHUNK_ELEMENTS:
        shape = (shape[0], max(8 * CHUNK_ELEMENTS // shape[0], 1))
    method, parameters = method_of(case), CASES[case].parameters
    models, base = inputs(case, shape, seed)
    in_one = apply(method, models, base, step=8 * CHUNK_ELEMENTS, **parameters)
    in_blocks = apply(method, models, base, step=chunks * CHUNK_ELEMENTS, **parameters)
    assert in_one.tobytes() == in_blocks.tobytes()


@pytest.mark.parametrize("case", CASES)
def test_the_same_again(case: str, apply: Apply) -> None:
    models, base = inputs(case, (50, 130))
    once, again = (apply(method_of(case), models, base, **CASES[case].parameters) for _ in range(2))
    assert once.tobytes() == again.tobytes()


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c].identity_rtol is not None])
def test_merging_equal_models_gives_that_model(case: str, apply: Apply) -> None:
    """Bit for bit where the formula works on differences from the base."""
    x = np.random.default_rng(1).standard_normal((50, 100)).astype(np.float32)
    merged = apply(
        method_of(case), [x] * count(method_of(case)), x if has_base(case) else None, **CASES[case].parameters
    )
    rtol = CASES[case].identity_rtol
    if rtol == 0:
        assert merged.tobytes() == x.tobytes()
    else:
        assert rtol is not None
        np.testing.assert_allclose(merged, x.reshape(-1), rtol=rtol)


@pytest.mark.parametrize("case", [c for c in CASES if count(method_of(c)) > 1 and CASES[c].order_rtol is not None])
def test_order_of_models_hardly_matters(case: str, apply: Apply) -> None:
    """Sums of float32 in another order differ in the last bits; nothing else may."""
    models, base = inputs(case, (50, 100))
    parameters = CASES[case].parameters
    keys = tuple(range(7, 7 + len(models)))
    turned = {k: tuple(reversed(v)) if isinstance(v, tuple) else v for k, v in parameters.items()}
    one = apply(method_of(case), models, base, keys=keys, **parameters)
    other = apply(method_of(case), models[::-1], base, keys=keys[::-1], **turned)
    np.testing.assert_allclose(one, other, rtol=CASES[case].order_rtol or 0, atol=1e-6)


@pytest.mark.parametrize(
    "method", [m for m in METHODS if "weight" in METHODS[m].parameters and METHODS[m].fewest_models == 1]
)
def test_zero_weight_drops_a_model(method: str, apply: Apply) -> None:
    models, base = inputs(method, (5000,))
    parameters = CASES[method].parameters | {"weight": (1.0, 0.0)}
    first = {k: v[:1] if isinstance(v, tuple) else v for k, v in parameters.items()}
    with_both = apply(method, models, base, **parameters)
    alone = apply(method, models[:1], base, **first)
    assert np.array_equal(with_both, alone)


@pytest.mark.parametrize("case", [c for c in CASES if METHODS[method_of(c)].base == "required" and c != "slerp"])
def test_zero_delta_gives_the_base(case: str, apply: Apply) -> None:
    base = np.random.default_rng(2).standard_normal((10, 10)).astype(np.float32)
    merged = apply(method_of(case), [base] * count(method_of(case)), base, **CASES[case].parameters)
    assert merged.tobytes() == base.tobytes()


@pytest.mark.parametrize("case", CASES)
def test_inputs_may_be_views(case: str, apply: Apply) -> None:
    """Every second element of a larger array: the same as a copy of them."""
    models, base = inputs(case, (30, 40))
    wide = [np.repeat(m, 2, axis=-1)[..., ::2] for m in models]
    wide_base = None if base is None else np.repeat(base, 2, axis=-1)[..., ::2]
    assert not wide[0].flags.c_contiguous
    parameters = CASES[case].parameters
    plain = apply(method_of(case), models, base, **parameters)
    assert apply(method_of(case), wide, wide_base, **parameters).tobytes() == plain.tobytes()
