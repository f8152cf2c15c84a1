"""Quantised checkpoints against transformers' own dequantisation, and against packings written here bit by bit."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_core.quantised import parts, strips
from solera_core.quantised.catalogue import FORMATS

Tensors = Mapping[str, torch.Tensor]
Open = Callable[..., Checkpoint]
RNG = np.random.default_rng(0)


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """`opened(tensors, method, **settings)`: a checkpoint of these, dequantised."""

    def write(tensors: Tensors, method: str | None = None, *, config: Any = None, **settings: Any) -> Checkpoint:
        content: dict[str, Any] = {"model_type": "llama", "dtype": "bfloat16"} | (config or {})
        if method is not None:
            content["quantization_config"] = {"quant_method": method, **settings}
        (tmp_path / "config.json").write_text(json.dumps(content))
        save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "model.safetensors")
        return open_checkpoint(tmp_path, Context(), dequantise=True)

    return write


@pytest.fixture(autouse=True)
def _short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several strips even of tiny weights."""
    monkeypatch.setattr(strips, "_STRIP_ELEMENTS", 1 << 10)


def check(model: Checkpoint, name: str, expected: Any, *, exact: bool = True) -> None:
    """The whole, and any ranges of it in any order."""
    expected = np.asarray(expected, np.float32)
    info = model.tensors[name]
    assert info.shape == expected.shape
    assert model.is_derived(name)
    whole = model.read(name)
    if exact:
        np.testing.assert_array_equal(whole, expected)
    else:
        np.testing.assert_allclose(whole, expected, rtol=2e-7, atol=0)
    for _ in range(20):
        start, stop = sorted(RNG.integers(0, info.size + 1, 2).tolist())
        np.testing.assert_array_equal(model.read_flat(name, start, stop), whole.reshape(-1)[start:stop])


def read_all(model: Checkpoint) -> None:
    """Some of what is wrong is a value, not a shape."""
    for name in model.tensors:
        model.read(name)


def fp8_dequantize() -> Any:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    upstream: Any = Fp8Dequantize  # untyped
    return upstream(None)


def ints(low: int, high: int, *shape: int) -> np.ndarray[Any, Any]:
    return RNG.integers(low, high, shape)


def words(codes: np.ndarray[Any, Any], bits: int, *, axis: int) -> torch.Tensor:
    """Codes in words of 32 bits along an axis, the first in the lowest bits; a last word is filled with zeros."""
    n = 32 // bits
    codes = np.moveaxis(codes, axis, 0)
    out = np.zeros((-(-len(codes) // n), *codes.shape[1:]), np.uint64)
    for i, row in enumerate(codes):
        out[i // n] |= row.astype(np.uint64) << np.uint64(bits * (i % n))
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(out, 0, axis)).astype(np.uint32).view(np.int32))


def f8(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=shape).astype(np.float32)).to(torch.float8_e4m3fn)


def scale(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(RNG.uniform(0.01, 0.1, shape).astype(np.float32)).to(dtype)


def powers(*shape: int) -> torch.Tensor:
    return torch.from_numpy(ints(120, 130, *shape).astype(np.uint8))


# 8-bit floats


@pytest.mark.parametrize(
    ("shape", "grid", "settings"),
    [
        ((24, 40), (6, 5), {"weight_block_size": [4, 8]}),
        ((24, 40), (24, 1), {}),
        ((24, 40), (1, 1), {}),
        ((3, 24, 40), (3, 6, 5), {"weight_block_size": [4, 8]}),
        ((3, 24, 40), (3, 1, 40), {}),
    ],
)
@pytest.mark.parametrize("kind", ["F32", "BF16", "E8M0", "U8"])
def test_fp8_as_transformers_does_it(
    opened: Open, shape: tuple[int, ...], grid: tuple[int, ...], settings: dict[str, Any], kind: str
) -> None:
    weight = f8(*shape)
    scales = {
        "F32": scale(*grid),
        "BF16": scale(*grid, dtype=torch.bfloat16),
        "E8M0": powers(*grid).view(torch.float8_e8m0fnu),
        "U8": powers(*grid),
    }[kind]
    model = opened({"a.weight": weight, "a.weight_scale_inv": scales, "n.weight": scale(3)}, "fp8", **settings)
    upstream = fp8_dequantize()
    check(model, "a.weight", upstream._dequantize_one(weight, scales, output_dtype=torch.float32))
    assert sorted(model.tensors) == ["a.weight", "n.weight"]
    assert model.tensors["a.weight"].dtype == "BF16"


def test_deepseeks_blocks_are_cut_off_at_the_edges(opened: Open) -> None:
    weight, scales = f8(10, 21), scale(3, 3)
    model = opened({"a.weight": weight, "a.weight_scale_inv": scales}, "fp8", weight_block_size=[4, 8])
    full = torch.repeat_interleave(torch.repeat_interleave(scales, 4, 0), 8, 1)[:10, :21]
    check(model, "a.weight", weight.float() * full)


def test_experts_of_packed_4_bit_floats_beside_fp8(opened: Open) -> None:
    packed, scales = torch.from_numpy(ints(-128, 128, 8, 32).astype(np.int8)), powers(8, 2)
    dense = {"b.weight": f8(8, 8), "b.weight_scale_inv": scale(1)}
    model = opened({"a.weight": packed, "a.weight_scale_inv": scales} | dense, "fp8", weight_block_size=[128, 128])
    upstream = fp8_dequantize()
    check(model, "a.weight", upstream._dequantize_one(packed, scales, output_dtype=torch.float32))


@pytest.mark.parametrize(
    ("name", "shape"), [("weight_scale", ()), ("weight_scale", (1,)), ("weight_scale", (6,)), ("weight_scale_inv", ())]
)
def test_fp8_with_one_scale_or_one_a_row(opened: Open, name: str, shape: tuple[int, ...]) -> None:
    weight, scales = f8(6, 10), scale(*shape)
    model = opened({"a.weight": weight, f"a.{name}": scales, "a.input_scale": scale(1)}, "fp8")
    assert list(model.tensors) == ["a.weight"]
    check(model, "a.weight", weight.float() * scales.reshape(-1, 1))


def test_plain_8_bit_floats_are_the_numbers_themselves(opened: Open) -> None:
    weight = f8(6, 10)
    model = opened({"a.weight": weight, "b.weight": weight.to(torch.float8_e5m2)})
    check(model, "a.weight", weight.float())
    check(model, "b.weight", weight.to(torch.float8_e5m2).float())


# 4-bit floats


def test_mxfp4_as_transformers_does_it(opened: Open) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = torch.from_numpy(ints(0, 256, 3, 20, 4, 16).astype(np.uint8)), powers(3, 20, 4)
    name = "layers.0.mlp.experts.gate_up_proj"
    model = opened({f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": scale(3, 20)}, "mxfp4")
    upstream: Any = convert_moe_packed_tensors
    check(model, name, upstream(blocks, scales, dtype=torch.float32))
    assert sorted(model.tensors) == [name, f"{name}_bias"]


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def two_a_byte(codes: np.ndarray[Any, Any], *, high_first: bool = False) -> torch.Tensor:
    first, second = codes[..., 0::2], codes[..., 1::2]
    return torch.from_numpy((first << 4 | second if high_first else second << 4 | first).astype(np.uint8))


def test_nvfp4_of_modelopt(opened: Open) -> None:
    codes, small, whole = ints(0, 16, 6, 48), f8(6, 3), scale()
    tensors = {"a.weight": two_a_byte(codes), "a.weight_scale": small, "a.weight_scale_2": whole}
    model = opened(tensors | {"a.input_scale": scale()}, "modelopt", quant_algo="NVFP4")
    check(model, "a.weight", E2M1[codes] * (np.repeat(small.float().numpy(), 16, 1) * whole.numpy()))


def test_nvfp4_of_compressed_tensors(opened: Open) -> None:
    codes, small, whole = ints(0, 16, 6, 48), f8(6, 3), scale(1)
    tensors = {"a.weight_packed": two_a_byte(codes), "a.weight_scale": small, "a.weight_global_scale": whole}
    model = opened(tensors | {"a.input_global_scale": scale(1)}, "compressed-tensors", format="nvfp4-pack-quantized")
    check(model, "a.weight", E2M1[codes] * (np.repeat(small.float().numpy(), 16, 1) / whole.numpy()))


def test_mxfp4_of_compressed_tensors(opened: Open) -> None:
    codes, exponents = ints(0, 16, 6, 64), powers(6, 2)
    tensors = {"a.weight_packed": two_a_byte(codes), "a.weight_scale": exponents}
    model = opened(tensors, "compressed-tensors", format="mxfp4-pack-quantized")
    check(model, "a.weight", E2M1[codes] * np.exp2(np.repeat(exponents.numpy().astype(np.float32) - 127, 32, 1)))


# integers


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["in order", "g_idx", "one group"])
def test_gptq(opened: Open, bits: int, version: str, order: str) -> None:
    out, inputs, size = 64, 96, 32
    groups = 1 if order == "one group" else inputs // size
    codes, zeros = ints(0, 1 << bits, out, inputs), ints(1, 1 << bits, groups, out)
    scales = scale(groups, out, dtype=torch.float16)
    group = np.arange(inputs) // (inputs // groups)
    tensors = {
        "a.qweight": words(codes, bits, axis=1).T,
        "a.qzeros": words(zeros - (version == "gptq"), bits, axis=1),
        "a.scales": scales,
        "a.bias": scale(out),
    }
    if order == "g_idx":
        group = RNG.permutation(group)
        tensors["a.g_idx"] = torch.from_numpy(group.astype(np.int32))
    settings = {"bits": bits, "group_size": -1 if groups == 1 else size, "desc_act": order == "g_idx"}
    model = opened(tensors, "gptq", **settings, **({} if version == "gptq" else {"checkpoint_format": version}))
    expected = (codes - zeros.T[:, group]).astype(np.float32) * scales.float().numpy().T[:, group]
    check(model, "a.weight", expected)
    assert sorted(model.tensors) == ["a.bias", "a.weight"]


def test_a_zero_point_of_zero_borrows_in_gptqs_first_version(opened: Open) -> None:
    """GPTQModel subtracts one from every zero point of a word at once, so that 0 takes one from its neighbour."""
    zeros = ints(0, 16, 3, 64)
    zeros[:, ::5] = 0
    stored = words(zeros, 4, axis=1).numpy().view(np.uint32) - np.uint32(0x11111111)
    codes, scales = ints(0, 16, 64, 96), scale(3, 64)
    tensors = {
        "qweight": words(codes, 4, axis=1).T,
        "qzeros": torch.from_numpy(stored.view(np.int32)),
        "scales": scales,
    }
    model = opened({f"a.{k}": v for k, v in tensors.items()}, "gptq", bits=4, group_size=32)
    group = np.arange(96) // 32
    check(model, "a.weight", (codes - zeros.T[:, group]).astype(np.float32) * scales.numpy().T[:, group])


def test_awq(opened: Open) -> None:
    out, inputs, size = 48, 96, 32
    codes, zeros, scales = ints(0, 16, out, inputs), ints(0, 16, 3, out), scale(3, out, dtype=torch.float16)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # which output stands at each place of a word, from the lowest bits on

    def interleaved(matrix: np.ndarray[Any, Any]) -> torch.Tensor:
        return words(matrix.reshape(len(matrix), -1, 8)[:, :, order].reshape(matrix.shape), 4, axis=1)

    tensors = {"a.qweight": interleaved(codes.T), "a.qzeros": interleaved(zeros), "a.scales": scales}
    model = opened(tensors, "awq", bits=4, group_size=size, version="gemm", zero_point=True)
    group = np.arange(inputs) // size
    check(model, "a.weight", (codes - zeros.T[:, group]).astype(np.float32) * scales.float().numpy().T[:, group])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("order", ["channel", "group", "g_idx", "unused g_idx", "tensor"])
def test_packed_integers_of_compressed_tensors(opened: Open, bits: int, zero: bool, order: str) -> None:
    out, inputs, half = 20, 64, 1 << bits - 1
    groups = {"channel": 1, "tensor": 1}.get(order, 4)
    codes, scales = ints(-half, half, out, inputs), scale(*((1,) if order == "tensor" else (out, groups)))
    zeros = ints(-half, half, out, groups) if zero else np.zeros((out, groups), int)
    group = np.arange(inputs) // (inputs // groups)
    tensors = {
        "a.weight_packed": words(codes + half, bits, axis=1),
        "a.weight_scale": scales,
        "a.weight_shape": torch.tensor([out, inputs]),
    }
    if zero:
        tensors["a.weight_zero_point"] = words(zeros + half, bits, axis=0)
    if order == "g_idx":
        group = RNG.permutation(group)
    if "g_idx" in order:
        tensors["a.weight_g_idx"] = torch.from_numpy((group if order == "g_idx" else group * 0 - 1).astype(np.int32))
    settings = {"config_groups": {"group_0": {"weights": {"num_bits": bits, "type": "int"}}}}
    model = opened(tensors, "compressed-tensors", format="pack-quantized", **settings)
    wide = scales.numpy().reshape(-1, groups)[:, group] if order != "tensor" else scales.numpy()
    check(model, "a.weight", (codes - zeros[:, group]).astype(np.float32) * wide)


@pytest.mark.parametrize("grid", [(1,), (6, 1), (6, 4)])
@pytest.mark.parametrize("zero", [False, True])
def test_8_bit_integers_of_compressed_tensors(opened: Open, grid: tuple[int, ...], zero: bool) -> None:
    codes, scales = ints(-128, 128, 6, 16), scale(*grid, dtype=torch.bfloat16)
    zeros = ints(-10, 10, *grid) if zero else np.zeros(grid, int)
    tensors = {"a.weight": torch.from_numpy(codes.astype(np.int8)), "a.weight_scale": scales}
    if zero:
        tensors["a.weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))
    model = opened(tensors, "compressed-tensors", format="int-quantized")
    wide, shift = (np.repeat(x, 16 // grid[-1] if len(grid) > 1 else 1, -1) for x in (scales.float().numpy(), zeros))
    check(model, "a.weight", (codes - shift).astype(np.float32) * wide)


def test_8_bits_of_bitsandbytes(opened: Open) -> None:
    codes, rows = ints(-127, 128, 6, 16), scale(6)
    tensors = {
        "a.weight": torch.from_numpy(codes.astype(np.int8)),
        "a.SCB": rows,
        "a.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    model = opened(tensors, "bitsandbytes", load_in_8bit=True)
    check(model, "a.weight", codes.astype(np.float32) * rows.numpy()[:, None] / 127, exact=False)
    assert list(model.tensors) == ["a.weight"]


def four_bits(kind: str, *, nested: bool) -> tuple[dict[str, torch.Tensor], np.ndarray[Any, Any]]:
    """A weight [10, 14] in blocks of 16 as bitsandbytes stores it, and what it stands for."""
    shape, block, outer = (10, 14), 16, 4
    codes, table = ints(0, 16, 140), np.sort(RNG.uniform(-1, 1, 16)).astype(np.float32)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": shape}
    blocks = -(-140 // block)
    tensors = {"": two_a_byte(codes, high_first=True)[:, None], ".quant_map": torch.from_numpy(table)}
    if nested:
        absmax_codes, map256, outer_max = ints(0, 256, blocks), scale(256), scale(-(-blocks // outer))
        state |= {"nested_blocksize": outer, "nested_dtype": "float32", "nested_offset": 0.125}
        absmax = map256.numpy()[absmax_codes] * outer_max.numpy()[np.arange(blocks) // outer] + np.float32(0.125)
        tensors[".absmax"] = torch.from_numpy(absmax_codes.astype(np.uint8))
        tensors |= {".nested_absmax": outer_max, ".nested_quant_map": map256}
    else:
        absmax = scale(blocks).numpy()
        tensors[".absmax"] = torch.from_numpy(absmax)
    text = json.dumps(state).encode()
    tensors[f".quant_state.bitsandbytes__{kind}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    value = table[codes] * absmax[np.arange(140) // block]
    return {f"a.weight{end}": tensor for end, tensor in tensors.items()}, value.reshape(shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_4_bits_of_bitsandbytes(opened: Open, kind: str, nested: bool, storage: torch.dtype) -> None:
    tensors, expected = four_bits(kind, nested=nested)
    tensors["a.weight"] = tensors["a.weight"].view(-1).view(storage).view(-1, 1)
    model = opened(tensors | {"n.weight": scale(3)}, "bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type=kind)
    check(model, "a.weight", expected)
    assert sorted(model.tensors) == ["a.weight", "n.weight"]


def test_rows_read_by_themselves_in_chunks_and_from_pickles(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {
        "a.qweight": words(ints(0, 16, 96, 64), 4, axis=0),
        "a.qzeros": words(ints(0, 16, 3, 64), 4, axis=1),
        "a.scales": scale(3, 64),
    }
    model = opened(tensors, "gptq", bits=4, group_size=32)
    whole = model.read("a.weight")
    for near, chunk in ((0, 1), (1 << 13, 600)):
        monkeypatch.setattr(parts, "_NEAR_BYTES", near)
        monkeypatch.setattr(parts, "_CHUNK_BYTES", chunk)
        check(opened(tensors, "gptq", bits=4, group_size=32), "a.weight", whole)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    check(open_checkpoint(tmp_path, Context(allow_pickle=True), dequantise=True), "a.weight", whole)


LARGE: dict[str, Callable[[], tuple[Tensors, str, dict[str, Any]]]] = {
    "fp8, blocks": lambda: (
        {"a.weight": f8(256, 4096), "a.weight_scale_inv": scale(2, 32)},
        "fp8",
        {"weight_block_size": [128, 128]},
    ),
    "fp8, long rows": lambda: ({"a.weight": f8(32, 28672), "a.weight_scale_inv": scale(32, 1)}, "fp8", {}),
    "gptq": lambda: (
        {
            "a.qweight": words(ints(0, 16, 512, 4096), 4, axis=1).T,
            "a.qzeros": words(ints(1, 16, 32, 512), 4, axis=1),
            "a.scales": scale(32, 512, dtype=torch.float16),
            "a.g_idx": torch.from_numpy((RNG.permutation(4096) // 128).astype(np.int32)),
        },
        "gptq",
        {"bits": 4, "group_size": 128, "desc_act": True},
    ),
    "packed integers": lambda: (
        {
            "a.weight_packed": words(ints(0, 16, 256, 4096), 4, axis=1),
            "a.weight_scale": scale(256, 32),
            "a.weight_shape": torch.tensor([256, 4096]),
            "a.weight_zero_point": words(ints(0, 16, 256, 32), 4, axis=0),
        },
        "compressed-tensors",
        {"format": "pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}},
    ),
    "mxfp4": lambda: (
        {
            "a.experts.down_proj_blocks": torch.from_numpy(ints(0, 256, 2, 512, 64, 16).astype(np.uint8)),
            "a.experts.down_proj_scales": powers(2, 512, 64),
        },
        "mxfp4",
        {},
    ),
}


@pytest.mark.parametrize("kind", LARGE)
def test_reading_takes_no_more_memory_than_it_says(opened: Open, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A block of a merge, and the whole: what `--memory` counts."""
    import tracemalloc

    monkeypatch.undo()  # strips as they are
    tensors, method, settings = LARGE[kind]()
    model = opened(tensors, method, **settings)
    [name] = model.tensors
    each, once = model.scratch(name)
    model.read_flat(name, 0, 10)  # tables are made, modules imported
    for size in (1 << 17, model.tensors[name].size):
        tracemalloc.start()
        values = model.read_flat(name, 77, size)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0 < peak - values.nbytes <= each * size + once


# what the view says


def test_the_view_has_no_quantisation_and_says_so(opened: Open) -> None:
    tensors = {"a.weight": f8(4, 4), "a.weight_scale_inv": scale(1)}
    model = opened(tensors, "fp8", config={"text_config": {"dtype": "float16", "quantization_config": {"x": 1}}})
    assert "quantization_config" not in json.dumps(model.config)
    assert model.tensors["a.weight"].dtype == "F16"
    assert model.notes == ("stored as fp8: dequantised, and written unquantised",)
    assert not model.as_stored
    stored = open_checkpoint(model.path, Context())
    assert stored.tensors["a.weight"].dtype == "F8_E4M3"
    assert stored.digest() != model.digest()
    assert stored.as_stored


def test_scales_of_activations_are_left_out_and_others_are_not(opened: Open) -> None:
    tensors = {"a.weight": f8(4, 4), "a.weight_scale": scale(1), "a.input_scale": scale(1), "a.k_scale": scale(1)}
    tensors |= {"experts.up_proj_input_scale": scale(1), "b.block_scale": scale(4), "logit_scale": scale()}
    model = opened(tensors, "fp8")
    assert sorted(model.tensors) == ["a.weight", "b.block_scale", "logit_scale"]
    assert model.notes[0].endswith("; 3 scales of activations are left out")


def test_where_the_config_names_no_dtype_it_is_bfloat16(opened: Open) -> None:
    tensors = {"a.weight": f8(4, 4), "a.weight_scale_inv": scale(1)}
    assert opened(tensors, "fp8", config={"dtype": None}).tensors["a.weight"].dtype == "BF16"


def test_an_unquantised_model_is_itself(siblings: dict[str, Path]) -> None:
    model = open_checkpoint(siblings["a"], Context(), dequantise=True)
    assert model.notes == ()
    assert model.as_stored
    assert not any(map(model.is_derived, model.tensors))


# what cannot be read

GPTQ = {
    "a.qweight": torch.zeros(4, 8, dtype=torch.int32),
    "a.qzeros": torch.zeros(1, 1, dtype=torch.int32),
    "a.scales": torch.ones(1, 8),
}
FP8 = {"a.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 2)}
PACKED = {
    "a.weight_packed": torch.zeros(8, 4, dtype=torch.int32),
    "a.weight_scale": torch.ones(8, 1),
    "a.weight_shape": torch.tensor([8, 32]),
}
INT4 = {
    "format": "pack-quantized",
    "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
}


@pytest.mark.parametrize(
    ("tensors", "method", "settings", "words_"),
    [
        (FP8, "aqlm", {}, ["config.json", "`quantization_config` says", "(aqlm)", ", ".join(FORMATS)]),
        (GPTQ, "gptq", {"bits": 3, "group_size": -1}, ["gptq with 3 bits", "only 2, 4, 8"]),
        (GPTQ, "gptq", {"bits": 4}, ["quantization_config.group_size must be of type int, found None"]),
        (GPTQ, "gptq", {"bits": 4, "group_size": -1, "checkpoint_format": "marlin"}, ["'marlin'"]),
        (GPTQ, "gptq", {"bits": 4, "group_size": -1, "dynamic": {"+:.*up": {"bits": 8}}}, ["`dynamic`", "+:.*up"]),
        (GPTQ, "gptq", {"bits": 4, "group_size": 8}, ["'a.scales' F32 (1, 8): expected the shape (4, 8)"]),
        (GPTQ, "awq", {"bits": 4, "group_size": -1, "version": "gemv"}, ["awq in the layout 'gemv'"]),
        (GPTQ, "awq", {"bits": 8, "group_size": -1}, ["awq with 8 bits"]),
        (FP8, "gptq", {"bits": 4, "group_size": -1}, ["but no tensor is", "delete `quantization_config`"]),
        (FP8, "fp8", {"weight_block_size": 128}, ["weight_block_size must be two numbers, found 128"]),
        (FP8, "fp8", {"weight_block_size": [3, 3]}, ["'a.weight_scale_inv'", "in blocks of 3 x 3 has (3, 3) of them"]),
        (FP8, "modelopt", {"quant_algo": "W4A8_AWQ"}, ["quant_algo 'W4A8_AWQ'"]),
        (FP8, "bitsandbytes", {}, ["neither load_in_8bit nor load_in_4bit"]),
        (FP8, "compressed-tensors", {"format": "marlin-24"}, ["layout 'marlin-24'"]),
        (PACKED, "compressed-tensors", INT4 | {"quantization_status": "frozen"}, ["'frozen'"]),
        (PACKED, "compressed-tensors", INT4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparse-24"]),
        (PACKED, "compressed-tensors", INT4 | {"transform_config": {"config_groups": {"u": {}}}}, ["transform"]),
        (
            PACKED,
            "compressed-tensors",
            {"format": "pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 3, "type": "int"}}}},
            ["packed integers of one width", "found: 3"],
        ),
    ],
)
def test_a_quantisation_that_cannot_be_undone(
    opened: Open, tensors: Tensors, method: str, settings: dict[str, Any], words_: list[str]
) -> None:
    with pytest.raises(CheckpointError) as error:
        opened(tensors, method, **settings)
    for word in words_:
        assert word in str(error.value)


FOUR, _ = four_bits("nf4", nested=True)
MXFP4 = {"a.up_proj_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8), "a.up_proj_scales": powers(2, 4, 1)}
EIGHT = {"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.SCB": torch.ones(4)}
KNOWN: dict[str, tuple[Tensors, str, dict[str, Any]]] = {
    "fp8": (FP8, "fp8", {"weight_block_size": [4, 4]}),
    "gptq": (GPTQ, "gptq", {"bits": 4, "group_size": -1}),
    "awq": (
        {
            "a.qweight": torch.zeros(8, 1, dtype=torch.int32),
            "a.qzeros": torch.zeros(1, 1, dtype=torch.int32),
            "a.scales": torch.ones(1, 8),
        },
        "awq",
        {"bits": 4, "group_size": 8},
    ),
    "compressed": (PACKED, "compressed-tensors", INT4),
    "bnb 4": (FOUR, "bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bnb 8": (EIGHT, "bitsandbytes", {"load_in_8bit": True}),
    "mxfp4": (MXFP4, "mxfp4", {}),
}
LOOSE = [("bnb 8", "a.weight"), ("bnb 8", "a.weight_format")]  # any width is right; its value says nothing
PARTS = [(kind, part) for kind, (tensors, _, _) in KNOWN.items() for part in tensors]


@pytest.mark.parametrize("kind", KNOWN)
def test_these_are_right(opened: Open, kind: str) -> None:
    """What the tests below take away and change."""
    tensors, method, settings = KNOWN[kind]
    assert len(opened(tensors, method, **settings).tensors) == 1


@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_every_part_is_missed(opened: Open, kind: str, part: str) -> None:
    tensors, method, settings = KNOWN[kind]
    whole = {
        f"b{name[1:]}": tensor.clone() for name, tensor in tensors.items()
    }  # a second one, to which nothing happens
    with pytest.raises(CheckpointError) as error:
        opened(whole | {n: t for n, t in tensors.items() if n != part}, method, **settings)
    assert "tensor 'a." in str(error.value)
    assert "tensor 'b." not in str(error.value)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize(("kind", "part"), [p for p in PARTS if p not in LOOSE])
def test_every_part_has_its_shape(opened: Open, kind: str, part: str) -> None:
    tensors, method, settings = KNOWN[kind]
    longer = torch.cat([tensors[part], tensors[part][..., :1]], -1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_all(opened(dict(tensors) | {part: longer}, method, **settings))


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("c.weight_scale_inv", torch.ones(1)),
        ("c.qzeros", torch.zeros(1, 1, dtype=torch.int32)),
        ("c.scales", torch.ones(1)),
        ("c.g_idx", torch.zeros(4, dtype=torch.int32)),
        ("c.weight.absmax", torch.ones(1)),
        ("c.weight_zero_point", torch.zeros(1, dtype=torch.int8)),
        ("c.down_proj_scales", torch.ones(1)),
        ("c.codes", torch.zeros(4, dtype=torch.uint8)),
    ],
)
def test_nothing_is_left_over(opened: Open, kind: str, name: str, tensor: torch.Tensor) -> None:
    tensors, method, settings = KNOWN[kind]
    with pytest.raises(CheckpointError) as error:
        opened(dict(tensors) | {name: tensor}, method, **settings)
    assert f"tensor {name!r}" in str(error.value)


@pytest.mark.parametrize("kind", KNOWN)
def test_codes_without_a_word_in_the_config(opened: Open, kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"but config\.json has no `quantization_config`"):
        opened(KNOWN[kind][0])


def test_all_that_is_wrong_is_said(opened: Open) -> None:
    lone = {f"{name}.weight": f8(4, 4) for name in "abcdefghijkl"}
    with pytest.raises(CheckpointError) as error:
        opened(lone, "fp8")
    assert str(error.value).count("needs its scale") == 8
    assert "... and 4 more such tensors" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "part", "value", "words_"),
    [
        ("compressed", "a.weight_shape", torch.tensor([8, 30]), "says [8, 30], but a.weight_packed holds [8, 32]"),
        ("gptq", "a.g_idx", torch.full((32,), 1, dtype=torch.int32), "holds a group outside 0 to 0"),
        ("compressed", "a.weight_g_idx", torch.full((32,), 1, dtype=torch.int32), "holds a group outside 0 to 0"),
    ],
)
def test_values_that_make_no_sense(opened: Open, kind: str, part: str, value: torch.Tensor, words_: str) -> None:
    tensors, method, settings = KNOWN[kind]
    model = opened(dict(tensors) | {part: value}, method, **settings)
    with pytest.raises(CheckpointError) as error:
        model.read("a.weight")
    assert words_ in str(error.value)
    assert repr(part) in str(error.value)


def test_a_quantisation_state_that_is_no_json(opened: Open) -> None:
    state = "a.weight.quant_state.bitsandbytes__nf4"
    broken = dict(FOUR) | {state: torch.zeros(9, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="not the JSON of a quantisation state"):
        opened(broken, "bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
