"""Every device twin against its compiled twin and its readable method: the same bits, and the same drift.

torch's CPU device stands in for a GPU: the same torch operations, of which each rounds once on either.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solera_core.context import Context
from solera_core.dtypes import ITEM_BYTES, from_float32
from solera_core.errors import CheckpointError, ConfigError, ResourceError
from solera_core.progress import Silent
from solera_core.writer import CheckpointWriter
from solera_merge import fused
from solera_merge.block import CHUNK_ELEMENTS
from solera_merge.config import MergeConfig
from solera_merge.engine import execute
from solera_merge.fused import FUSED, NotFiniteError, RawBlock
from solera_merge.kernels.formats import CODES, PIECE
from solera_merge.masks import words
from solera_merge.methods.catalogue import METHODS
from solera_merge.plan import make_plan
from solera_merge.run import merge, plan_merge
from solera_merge.torch_twins import TWINS, Device, _words, open_device
from tests.merge.test_fused import CASES, PARAMETERS, sample

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Recipe = Callable[..., MergeConfig]
Siblings = dict[str, Path]
CPU = Device("torch:cpu", torch.device("cpu"))


class TwoBuffers:
    """`solera_merge.fused.RawTensor` over bytes, in two buffers by turns, as a device wants them."""

    def __init__(
        self, rows: Sequence[Bytes], dtypes: Sequence[str], size: int, keys: tuple[int, ...], step: int
    ) -> None:
        self.rows, self.dtypes, self.size, self.keys, self.step = rows, dtypes, size, keys, step
        self.shape = (size,)

    def blocks(self) -> Iterator[RawBlock]:
        codes = np.array([CODES[d] for d in self.dtypes], np.int64)
        buffers = cycle([np.zeros((len(self.rows), self.step * 4), np.uint8) for _ in range(2)])
        for start, raw in zip(range(0, self.size, self.step), buffers, strict=False):
            n = min(self.step, self.size - start)
            raw[:] = 0xFF  # what is left of an earlier block must not matter
            for row, stored, dtype in zip(raw, self.rows, self.dtypes, strict=True):
                width = ITEM_BYTES[dtype]
                row[: n * width] = stored[start * width : (start + n) * width]
            yield RawBlock(start, n, raw, codes)

    spans = blocks


def whole(blocks: Iterator[tuple[RawBlock, Bytes]]) -> Bytes:
    parts: list[Bytes] = []
    end = 0
    for block, out in blocks:
        assert block.start == end
        end += block.n
        parts.append(out.copy())
    return np.concatenate(parts)


def test_every_twin_on_a_device_has_one_on_the_cpu() -> None:
    assert set(TWINS) < set(FUSED)


@pytest.mark.parametrize(("method", "choice"), [(method, choice) for method, choice in CASES if method in TWINS])
@settings(max_examples=12)
@given(
    size=st.sampled_from([1, 2, 3, 63, PIECE - 1, PIECE + 1, 4 * CHUNK_ELEMENTS + 5, 6 * CHUNK_ELEMENTS]),
    dtypes=st.lists(st.sampled_from(sorted(CODES)), min_size=5, max_size=5),
    levels=st.sampled_from([0, 3, 40]),
    step=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_the_same_bits(
    method: str, choice: int, size: int, dtypes: list[str], levels: int, step: int, seed: int, in_memory: Any
) -> None:
    parameters = PARAMETERS[method][choice]
    rows, dtypes, keys, expected = sample(method, parameters, size, dtypes, levels, step, seed, in_memory)
    for out in CODES:
        tensor = TwoBuffers(rows, dtypes, size, keys, step * CHUNK_ELEMENTS)
        drift, other = np.zeros(2), np.zeros(2)
        merged = whole(CPU.merged_blocks(method, tensor, out, parameters, drift))
        assert merged.tobytes() == from_float32(expected, out).tobytes()
        assert merged.tobytes() == whole(fused.merged_blocks(method, tensor, out, parameters, other)).tobytes()
        assert drift.tobytes() == other.tobytes()


@pytest.mark.parametrize("key", [0, 7, 2**128 - 1, 0x9E3779B97F4A7C15F39CC0605CEDC835])
@pytest.mark.parametrize("start", [0, 4096, 2**34, 2**40 - 4])
def test_random_words(key: int, start: int) -> None:
    for n in (1, 4, 1023):
        assert np.array_equal(_words(key, start, n, CPU).numpy(), words(key, start, n))


@pytest.mark.parametrize("method", TWINS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", sorted(CODES))
def test_what_is_not_finite_is_met(method: str, value: float, dtype: str) -> None:
    count = METHODS[method].most_models or 3
    rows = [np.zeros(3 * CHUNK_ELEMENTS, np.float32) for _ in range(count + (METHODS[method].base == "required"))]
    rows[-1][CHUNK_ELEMENTS + 7] = value
    tensor = TwoBuffers(
        [from_float32(r, dtype) for r in rows], [dtype] * len(rows), rows[0].size, (1, 2, 3), CHUNK_ELEMENTS
    )
    blocks = CPU.merged_blocks(method, tensor, "F32", PARAMETERS[method][0], np.zeros(2))
    if method != "slerp":  # whose sums over the whole tensor meet it first
        assert next(blocks)[0].start == 0
    with pytest.raises(NotFiniteError):
        next(blocks)


def test_a_result_too_large_for_its_format_is_met() -> None:
    tensor = TwoBuffers([np.full(5, 60000, np.float32).view(np.uint8)] * 2, ["F32"] * 2, 5, (1, 2), CHUNK_ELEMENTS)
    weights = {"weight": (1.0, 1.0), "normalize": False}
    with pytest.raises(NotFiniteError):
        whole(CPU.merged_blocks("linear", tensor, "F16", weights, np.zeros(2)))
    assert len(whole(CPU.merged_blocks("linear", tensor, "F32", weights, np.zeros(2)))) == 20


# ---- whole merges ----

SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"models": ["a", "b"], "parameters": {"weight": [0.3, 0.9]}},
    "passthrough": {"models": ["a"], "parameters": {"scale": 0.7}},
    "slerp": {"base_model": "a", "models": ["b"], "parameters": {"t": 0.3}},
    "task_arithmetic": {"base_model": "base", "models": ["a", "b"], "parameters": {"weight": 0.4}},
    "ties": {"base_model": "base", "models": ["a", "b", "c"], "parameters": {"weight": 0.4, "density": 0.3}},
    "dare_ties": {"base_model": "base", "models": ["a", "b", "c"], "parameters": {"weight": 0.4, "density": 0.3}},
    "dare_linear": {"base_model": "base", "models": ["a", "b"], "parameters": {"weight": 0.4, "density": 0.3}},
    "karcher": {"models": ["a", "b"]},
}


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_merge_on_a_device_has_the_same_bytes(
    recipe: Recipe, siblings: Siblings, tmp_path: Path, method: str
) -> None:
    """All files, solera.json with its drifts included; a method without a twin runs on the CPU and says so."""
    config = recipe(merge_method=method, **SETTINGS[method], dtype="bfloat16")
    progress = Notes()
    merge(config, tmp_path / "cpu", Context(models=siblings))
    merge(config, tmp_path / "device", Context(models=siblings, device="torch:cpu", progress=progress))
    files = [{f.name: f.read_bytes() for f in (tmp_path / who).iterdir()} for who in ("cpu", "device")]
    assert files[0] == files[1]
    said = [note for note in progress.notes if "torch:cpu" in note]
    assert said == ([] if method in TWINS else [f"{method}: is not made for torch:cpu, and runs on the CPU"])


@pytest.mark.parametrize("method", TWINS)
def test_the_device_does_the_work(
    recipe: Recipe, siblings: Siblings, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the compiled twins and the readable functions, and in many small blocks."""
    config = recipe(merge_method=method, **SETTINGS[method])
    plan, models = make_plan(config, Context(models=siblings))
    digests = []
    for device in (None, replace(CPU, block_elements=CHUNK_ELEMENTS)):
        if device is not None:
            monkeypatch.setattr("solera_merge.fused.FUSED", dict.fromkeys(FUSED))
        with CheckpointWriter(tmp_path, plan.specs) as writer:
            execute(
                plan.tensors,
                models.checkpoints,
                writer,
                threads=2,
                progress=Silent(),
                block_elements=CHUNK_ELEMENTS,
                device=device,
            )
            digests.append(writer.finish())
        (tmp_path / "model.safetensors").unlink()
    assert digests[0] == digests[1]


def test_a_damaged_input_is_named_by_its_place(recipe: Recipe, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    values = np.ones((1000, 300), np.float32)
    for name in ("x", "y"):
        bare_model(tmp_path / name, {"w": values}, num_hidden_layers=0)
    values[777, 42] = np.nan
    save_file({"w": values}, tmp_path / "y" / "model.safetensors", metadata={"format": "pt"})
    config = recipe(merge_method="linear", models=["x", "y"], parameters={"weight": 1})
    with pytest.raises(CheckpointError, match=r"'w' \(1000, 300\) of model 'y' holds nan at \(777, 42\)"):
        merge(config, tmp_path / "out", Context(base_dir=tmp_path, device="torch:cpu"))


@pytest.mark.parametrize("name", ["cuda:7", "gpu", "torch:cuda", "cpu:0"])
def test_a_device_that_is_not_there(recipe: Recipe, siblings: Siblings, name: str) -> None:
    config = recipe(merge_method="linear", **SETTINGS["linear"])
    with pytest.raises(
        ResourceError, match=rf"^device: '{name}' is not there: torch {torch.__version__.split('+')[0]}"
    ):
        plan_merge(config, Context(models=siblings, device=name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_refusal_says_what_torch_sees() -> None:
    with pytest.raises(ResourceError, match=r"sees (mps|no accelerator); leave the device out"):
        open_device("cuda")


def test_no_device_with_compat(recipe: Recipe, siblings: Siblings) -> None:
    config = recipe(merge_method="linear", **SETTINGS["linear"])
    with pytest.raises(ConfigError, match=r"^compat: .* leave out the device 'torch:cpu'"):
        plan_merge(config, Context(models=siblings, device="torch:cpu", compat="mergekit"))


def test_memory_counts_the_larger_blocks(recipe: Recipe, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("x", "y"):
        bare_model(tmp_path / name, {"w": np.zeros(1 << 20)}, "BF16", num_hidden_layers=0)
    config = recipe(merge_method="linear", models=["x", "y"], parameters={"weight": 1})
    needs = [
        plan_merge(config, Context(base_dir=tmp_path, threads=1, device=device)).memory_bytes
        for device in ("cpu", "torch:cpu")
    ]
    assert needs[1] > 2 * (1 << 20) * 4 * 2 > needs[0]  # two buffers of two sources


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", SETTINGS)
def test_the_same_bytes_on_a_gpu(recipe: Recipe, siblings: Siblings, tmp_path: Path, method: str) -> None:
    config = recipe(merge_method=method, **SETTINGS[method], dtype="bfloat16")
    merge(config, tmp_path / "cpu", Context(models=siblings))
    merge(config, tmp_path / "cuda", Context(models=siblings, device="cuda"))
    files = [{f.name: f.read_bytes() for f in (tmp_path / who).iterdir()} for who in ("cpu", "cuda")]
    assert files[0] == files[1]
