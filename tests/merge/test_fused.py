"""Every fused twin against its readable method: the same bits, whatever the formats, shapes and parameters."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solera_core.dtypes import ITEM_BYTES, from_float32, nonfinite, to_float32
from solera_merge.block import CHUNK_ELEMENTS, block_starts
from solera_merge.fused import FUSED, ROWS, NotFiniteError, RawBlock, _merged_bands, has_twin
from solera_merge.kernels import compiled
from solera_merge.kernels.elections import ELECT_WEIGHTED
from solera_merge.kernels.formats import CODES, PIECE, narrow, widen
from solera_merge.kernels.selection import collect_bin, find_equal
from solera_merge.kernels.spans import UNREADABLE
from solera_merge.masks import bernoulli
from solera_merge.methods.catalogue import METHODS
from solera_merge.selection import KEEP_ALL, KEEP_NONE, Band, Cut
from solera_merge.signs import disjoint_merge

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass
class RawInMemory:
    """`solera_merge.fused.RawTensor` over bytes."""

    rows: Sequence[Bytes]
    dtypes: Sequence[str]
    size: int
    keys: tuple[int, ...]
    step: int

    def __post_init__(self) -> None:
        self.shape: tuple[int, ...] = (self.size,)

    def blocks(self) -> Iterator[RawBlock]:
        codes = np.array([CODES[d] for d in self.dtypes], np.int64)
        raw = np.zeros((len(self.rows), self.step * 4), np.uint8)
        for start in range(0, self.size, self.step):
            n = min(self.step, self.size - start)
            raw[:] = 0xFF  # what is left of an earlier block must not matter
            for row, stored, dtype in zip(raw, self.rows, self.dtypes, strict=True):
                width = ITEM_BYTES[dtype]
                row[: n * width] = stored[start * width : (start + n) * width]
            yield RawBlock(start, n, raw, codes)

    spans = blocks


def fused(method: str, tensor: RawInMemory, dtype: str, **parameters: Any) -> Bytes:
    formula = FUSED[method](tensor, **parameters)
    out, drift = np.empty(tensor.step * ITEM_BYTES[dtype], np.uint8), np.zeros(2)
    parts: list[Bytes] = []
    for block in tensor.blocks():
        assert formula(block, out, CODES[dtype], drift) == 0
        parts.append(out[: block.n * ITEM_BYTES[dtype]].copy())
    return np.concatenate(parts)


def stored(values: F32, dtype: str) -> Bytes:
    return from_float32(values, dtype).copy()


PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"weight": (0.3, 0.3, 0.4), "normalize": True}, {"weight": (1.0, -2.0, 0.1), "normalize": False}],
    "passthrough": [{"scale": (1.0,)}, {"scale": (-0.7,)}],
    "slerp": [{"t": 0.3}, {"t": 1.0}],
    "task_arithmetic": [
        {"weight": (0.3, 0.3, 0.7), "normalize": True, "lambda_": 0.9},
        {"weight": (0.3, -1.0, 0.7), "normalize": False, "lambda_": 1.0},
        {"weight": (0.0, 0.0, 0.0), "normalize": True, "lambda_": 1.0},
    ],
    "ties": [
        {"weight": w, "density": d, "normalize": n, "lambda_": s, "rescale": r, "scope": "tensor", "int8_mask": False}
        for w, d, n, s, r in [
            ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), True, 1.0, False),
            ((0.3, -0.9, 0.4), (0.1, 1.0, 0.0), True, 1.3, True),
            ((0.3, 0.9, 0.4), (0.9999, 0.01, 0.2), False, 0.5, False),
        ]
    ],
    "nuslerp": [{"weight": (0.3, 1.2), "nuslerp_row_wise": False, "nuslerp_flatten": True}],
    "multislerp": [
        {"weight": (0.3, 0.5, 0.4), "normalize_weights": True, "eps": 1e-8},
        {"weight": (0.3, -0.5, 0.4), "normalize_weights": False, "eps": 0.1},
    ],
    "karcher": [{"weight": (1.0, 1.0, 1.0), "max_iter": 10, "tol": 1e-5}],
    "model_stock": [{"filter_wise": False}],
    "sce": [{"select_topk": k, "int8_mask": False} for k in (1.0, 0.3, 0.001, 0.0)],
    "nearswap": [{"t": 0.1}, {"t": 0.0}],
    "ram": [{"epsilon": 0.2}, {"epsilon": 0.0}],
    "ramplus_tl": [{"r": 0.1, "alpha": 0.2, "epsilon": 0.2}, {"r": -0.7, "alpha": 5.0, "epsilon": 0.1}],
    "dare_ties": [
        {"weight": w, "density": d, "normalize": n, "rescale": r, "lambda_": s, "int8_mask": False}
        for w, d, n, r, s in [
            ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), False, True, 1.0),
            ((0.3, -0.9, 0.4), (0.1, 1.0, 0.0), True, True, 1.3),
            ((0.3, 0.9, 0.4), (0.3, 0.6, 0.2), True, False, 0.5),
        ]
    ],
}
PARAMETERS["dare_linear"] = PARAMETERS["dare_ties"]
PARAMETERS["della"] = PARAMETERS["della_linear"] = [
    dare | {"epsilon": epsilon}
    for dare, epsilon in zip(
        PARAMETERS["dare_ties"], [(0.15, 0.4, 0.0), (0.05, 0.9, 0.3), (0.2, 0.1, 0.1)], strict=True
    )
]
PARAMETERS["arcee_fusion"] = [{}]
PARAMETERS["breadcrumbs"] = PARAMETERS["breadcrumbs_ties"] = [
    ties | {"gamma": gamma}
    for ties, gamma in zip(PARAMETERS["ties"], [(0.01, 0.2, 0.0), (0.3, 0.1, 0.1), (0.01, 0.9, 1.0)], strict=True)
]
CASES = [(method, i) for method, choices in PARAMETERS.items() for i in range(len(choices))]


def sample(
    method: str,
    parameters: dict[str, Any],
    size: int,
    dtypes: list[str],
    levels: int,
    step: int,
    seed: int,
    in_memory: Any,
    based: bool | None = None,
    width: int | None = None,
) -> tuple[list[Bytes], list[str], tuple[int, ...], F32]:
    """Stored sources of a method, their formats, random keys, and what the readable method makes of them.

    `levels`: deltas of few distinct magnitudes, so that many are equal to the k-th. `based`: with a base; None: where
    the method must have one. `width`: of a matrix; None: a vector.
    """
    rng = np.random.default_rng(seed)
    entry = METHODS[method]
    count = entry.most_models or 3
    based = entry.base == "required" if based is None else based
    base = rng.standard_normal(size).astype(np.float32)
    models: list[F32] = []
    for _ in range(count):
        delta = 0.3 * rng.standard_normal(size)
        models.append((base + (np.round(delta * levels) / levels if levels else delta)).astype(np.float32))
    dtypes = dtypes[: count + 1] if based else dtypes[:count]
    rows = [stored(m, d) for m, d in zip([*models, base], dtypes, strict=False)]
    values = [to_float32(r, d) for r, d in zip(rows, dtypes, strict=True)]
    keys = tuple(range(5, 5 + count))
    values = [value.reshape(-1, width or size) for value in values] if method in ROWS else values
    plain = in_memory(values[:count], values[count] if based else None, step * CHUNK_ELEMENTS, keys)
    formula = entry.function(plain, *([] if entry.survey is None else [None]), **parameters)
    unit = "rows" if method in ROWS else "elements"
    expected = np.concatenate([formula(block) for block in plain.blocks(unit)])
    return rows, dtypes, keys, expected


def test_every_twin_is_tried() -> None:
    assert set(PARAMETERS) == set(FUSED)
    for method, choices in PARAMETERS.items():
        names = {p.keyword: p.name for p in METHODS[method].parameters.values()}
        for parameters in choices:
            assert set(parameters) == set(names)
            assert has_twin(method, {names[keyword]: value for keyword, value in parameters.items()})


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"scope": "model"}),
        ("breadcrumbs", {"scope": "model"}),
        ("model_stock", {"filter_wise": True}),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("iso_c", {}),
    ],
)
def test_where_there_is_no_twin(method: str, parameters: dict[str, Any]) -> None:
    assert not has_twin(method, parameters)


@pytest.mark.parametrize(("method", "choice"), CASES)
@settings(max_examples=12, deadline=None)
@given(
    size=st.sampled_from([1, 2, 3, 63, PIECE - 1, PIECE + 1, 4 * CHUNK_ELEMENTS + 5, 6 * CHUNK_ELEMENTS]),
    dtypes=st.lists(st.sampled_from(sorted(CODES)), min_size=5, max_size=5),
    levels=st.sampled_from([0, 3, 40]),
    step=st.integers(1, 3),
    seed=st.integers(0, 1000),
    width=st.sampled_from([1, 3, 96, CHUNK_ELEMENTS]),
)
def test_the_same_bits(
    method: str,
    choice: int,
    size: int,
    dtypes: list[str],
    levels: int,
    step: int,
    seed: int,
    width: int,
    in_memory: Any,
) -> None:
    parameters = PARAMETERS[method][choice]
    width = width if size % width == 0 else size
    rows, dtypes, keys, expected = sample(method, parameters, size, dtypes, levels, step, seed, in_memory, width=width)
    block = block_starts((size // width, width), "rows", step * CHUNK_ELEMENTS)[1]
    for out in CODES:
        tensor = RawInMemory(rows, dtypes, size, keys, block if method in ROWS else step * CHUNK_ELEMENTS)
        tensor.shape = (size // width, width)
        assert fused(method, tensor, out, **parameters).tobytes() == from_float32(expected, out).tobytes()


@pytest.mark.parametrize("method", [name for name in FUSED if METHODS[name].base == "optional"])
def test_the_same_bits_with_a_base_that_may_be_left_out(method: str, in_memory: Any) -> None:
    parameters, size = PARAMETERS[method][0], 2 * CHUNK_ELEMENTS + 5
    rows, dtypes, keys, expected = sample(method, parameters, size, ["BF16"] * 5, 0, 1, 0, in_memory, based=True)
    tensor = RawInMemory(rows, dtypes, size, keys, CHUNK_ELEMENTS)
    assert fused(method, tensor, "F32", **parameters).tobytes() == expected.tobytes()


def test_a_large_bin_takes_another_pass(in_memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("solera_merge.raw_selection._COLLECTED", 10)
    rng = np.random.default_rng(0)
    base = np.zeros(3 * CHUNK_ELEMENTS, np.float32)
    models = [(np.round(rng.standard_normal(base.size) * 4) / 4).astype(np.float32) for _ in range(3)]
    parameters = PARAMETERS["ties"][0]
    plain = in_memory(models, base, CHUNK_ELEMENTS, (1, 2, 3))
    formula = METHODS["ties"].function(plain, None, **parameters)
    expected = np.concatenate([formula(block) for block in plain.blocks()])
    tensor = RawInMemory([m.view(np.uint8) for m in [*models, base]], ["F32"] * 4, base.size, (1, 2, 3), CHUNK_ELEMENTS)
    assert fused("ties", tensor, "F32", **parameters).tobytes() == expected.tobytes()


@pytest.mark.parametrize("method", FUSED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", sorted(CODES))
def test_what_is_not_finite_is_met(method: str, value: float, dtype: str) -> None:
    size = PIECE + 100
    count = METHODS[method].most_models or 3
    rows = [np.zeros(size, np.float32) for _ in range(count + (METHODS[method].base == "required"))]
    rows[-1][PIECE + 7] = value
    keys = tuple(range(1, count + 1))
    step = size if method in ROWS else CHUNK_ELEMENTS
    tensor = RawInMemory([stored(r, dtype) for r in rows], [dtype] * len(rows), size, keys, step)
    out = np.empty(tensor.step * 4, np.uint8)
    try:
        formula = FUSED[method](tensor, **PARAMETERS[method][0])
    except NotFiniteError:
        return
    assert any(formula(block, out, CODES["F32"], np.zeros(2)) & 1 for block in tensor.blocks())


@pytest.mark.parametrize("dtype", sorted(CODES))
def test_all_numbers_of_the_format(dtype: str) -> None:
    """Every half and bfloat16 there is, and float32 around every edge of the narrower formats."""
    words = np.arange(1 << 16, dtype=np.uint16)
    edges = np.concatenate([words.astype(np.uint32) << 16 | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    halves = words.view(np.float16).astype(np.float32).view(np.uint32)
    edges = np.concatenate([edges, *(halves + np.uint32(step) for step in (0, 1, 0xFFF, 0x1000, 0x1001, 2**32 - 1))])
    values = edges.view(np.float32)
    piece = np.empty(PIECE, np.float32)
    raw = np.empty(PIECE * 4, np.uint8)
    with np.errstate(all="ignore"):
        for at in range(0, values.size, PIECE):
            part = values[at : at + PIECE]
            piece[: part.size] = part
            bad = narrow(piece, part.size, raw, CODES[dtype], 0)
            expected = from_float32(part, dtype)
            finite = np.isfinite(part) & np.isfinite(to_float32(expected, dtype))
            assert bad == (not finite.all())
            width = ITEM_BYTES[dtype]
            ours = raw[: part.size * width].reshape(-1, width)
            assert np.array_equal(ours[finite], expected.reshape(-1, width)[finite])
        source = values.view(np.uint8) if dtype == "F32" else words.view(np.uint8)
        number = source.size // ITEM_BYTES[dtype]
        for at in range(0, number, PIECE):
            n = min(PIECE, number - at)
            bad = widen(source, CODES[dtype], at, n, piece)
            part_bytes = source[at * ITEM_BYTES[dtype] : (at + n) * ITEM_BYTES[dtype]]
            assert bad == bool(nonfinite(part_bytes, dtype))
            right = to_float32(part_bytes, dtype)
            finite = np.isfinite(right)
            assert np.array_equal(piece[:n].view(np.uint32)[finite], right.view(np.uint32)[finite])


def test_without_a_place_for_compiled_code() -> None:
    """A read-only installation without a home directory: numba finds no place for its cache."""
    code = (
        "import numba.core.caching as caching\n"
        "getattr(caching, 'CacheImpl', getattr(caching, '_CacheImpl', None))._locator_classes = []\n"
        "import numpy as np\n"
        "from solera_merge.kernels.formats import widen\n"
        "out = np.empty(2, np.float32)\n"
        "print(widen(np.array([1, 2], np.float32).view(np.uint8), 0, 0, 2, out), out.tolist())\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "False [1.0, 2.0]\n", done.stderr


# Tensors of more elements than 32 bits can count: the kernels are given blocks from far behind.

FAR = (1 << 33) + 5 * CHUNK_ELEMENTS


def deltas_of_few_magnitudes() -> tuple[list[F32], F32]:
    rng = np.random.default_rng(0)
    base = np.zeros(CHUNK_ELEMENTS, np.float32)
    return [(np.round(rng.standard_normal(base.size) * 2) / 2).astype(np.float32) for _ in range(2)], base


def far_block(models: list[F32], base: F32) -> RawBlock:
    return RawBlock(FAR, base.size, np.stack([*models, base]).view(np.uint8), np.zeros(len(models) + 1, np.int64))


@pytest.mark.parametrize("method", ["dare_ties"])
def test_random_masks_far_behind(method: str) -> None:
    models, base = deltas_of_few_magnitudes()
    parameters = PARAMETERS[method][0] | {"weight": (1.0, 1.0), "density": (0.5, 0.5)}
    tensor = RawInMemory([], [], FAR + base.size, ((1 << 127) + 5, 6), CHUNK_ELEMENTS)
    out = np.empty(base.size * 4, np.uint8)
    raw = far_block(models, base)
    assert FUSED[method](tensor, **parameters)(raw, out, CODES["F32"], np.zeros(2)) == 0
    keep = [bernoulli(key, FAR, base.size, 0.5) for key in tensor.keys]
    assert not np.array_equal(keep[0], bernoulli(tensor.keys[0], FAR % (1 << 32), base.size, 0.5))
    kept = [m * k * np.float32(2) for m, k in zip(models, keep, strict=True)]
    expected = base + disjoint_merge(kept, (1.0, 1.0), normalize=False, scale=1.0)
    assert out.tobytes() == expected.tobytes()


def test_selection_far_behind() -> None:
    """Of equal magnitudes those up to a place are kept, and the place does not fit into 32 bits."""
    models, base = deltas_of_few_magnitudes()
    raw = far_block(models, base)
    bits = int(np.float32(0.5).view(np.uint32))
    equal = np.flatnonzero(np.abs(models[1]) == np.float32(0.5))
    places, lower = np.empty(base.size, np.int64), np.empty(base.size, np.uint16)
    found = collect_bin(raw.raw, raw.codes, raw.n, 1, FAR, bits >> 16, places, lower, 0)
    assert places[:found].tolist() == (FAR + equal).tolist()
    assert find_equal(raw.raw, raw.codes, raw.n, 1, bits, 7) == (equal[6], 7)
    cut = Cut(bits, FAR + int(equal[6]))
    out = np.empty(base.size * 4, np.uint8)
    bands = [Band(cut, KEEP_NONE), Band(KEEP_ALL, cut)]
    tensor = RawInMemory([], [], FAR + base.size, (1, 2), CHUNK_ELEMENTS)
    formula = _merged_bands(tensor, bands, (1.0, 1.0), ELECT_WEIGHTED, False, False, 1.0)
    assert formula(raw, out, CODES["F32"], np.zeros(2)) == 0
    kept = [m * band.keeps(m, FAR) for m, band in zip(models, bands, strict=True)]
    assert out.tobytes() == (base + disjoint_merge(kept, (1.0, 1.0), normalize=False, scale=1.0)).tobytes()


def test_spans_read_their_files_piece_by_piece(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    models = [rng.standard_normal(10_000, np.float32) for _ in range(3)]
    with ExitStack() as files:
        descriptors = []
        for i, model in enumerate(models):
            file = tmp_path / f"{i}.bin"
            file.write_bytes(b"header" + model.tobytes())
            descriptors.append(files.enter_context(file.open("rb")).fileno())
        raw = np.empty((3, 4096 * 4), np.uint8)
        codes = np.zeros(3, np.int64)
        span = RawBlock(0, 10_000, raw, codes, np.array(descriptors, np.int32), np.full(3, 6, np.int64), 4096)
        whole = RawBlock(0, 10_000, np.stack(models).view(np.uint8), codes)
        linear = FUSED["linear"](RawInMemory([], [], 10_000, (), 10_000), weight=(0.2, 0.3, 0.5), normalize=True)
        results = []
        for block in (span, whole):
            out, drift = np.empty(40_000, np.uint8), np.zeros(2)
            assert linear(block, out, CODES["F32"], drift) == 0
            results.append((out, drift))
        assert np.array_equal(results[0][0], results[1][0])
        assert np.array_equal(results[0][1], results[1][1])


def test_a_file_that_was_cut_is_noticed_in_the_kernel(tmp_path: Path) -> None:
    file = tmp_path / "cut.bin"
    file.write_bytes(np.ones(6000, np.float32).tobytes())
    linear = FUSED["linear"](RawInMemory([], [], 10_000, (), 10_000), weight=(1.0,), normalize=True)
    with file.open("rb") as opened:
        span = RawBlock(
            0,
            10_000,
            np.empty((1, 4096 * 4), np.uint8),
            np.zeros(1, np.int64),
            np.array([opened.fileno()], np.int32),
            np.zeros(1, np.int64),
            4096,
        )
        assert linear(span, np.empty(40_000, np.uint8), CODES["F32"], np.zeros(2)) & UNREADABLE


def test_a_cached_kernel_is_not_used_when_one_inside_it_has_changed(tmp_path: Path) -> None:
    copy = tmp_path / "kernels_copy"
    copy.mkdir()
    (copy / "__init__.py").touch()
    original = Path(compiled.__file__)
    (copy / "compiled.py").write_bytes(original.read_bytes())
    (copy / "inner.py").write_text(
        "from kernels_copy.compiled import kernel\n\n@kernel\ndef inner(x):\n    return x + 1\n"
    )
    (copy / "outer.py").write_text(
        "from kernels_copy.compiled import kernel\nfrom kernels_copy.inner import inner\n\n"
        "@kernel\ndef outer(x):\n    return inner(x) * 10\n"
    )

    def run() -> list[str]:
        code = "from kernels_copy.outer import outer; print(outer(1), sum(outer.stats.cache_hits.values()))"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        )
        return done.stdout.split()

    assert run() == ["20", "0"]
    assert run() == ["20", "1"]
    inner = copy / "inner.py"
    inner.write_text(inner.read_text().replace("+ 1", "+ 2"))
    assert run() == ["30", "0"]
