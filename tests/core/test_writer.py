"""The writer: layouts as transformers cuts them, bytes as safetensors reads them, damage refused."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, DiskFullError
from solera_core.staging import staged
from solera_core.writer import JOURNAL_NAME, CheckpointWriter, TensorSpec, layout

INDEX = "model.safetensors.index.json"
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "U8": torch.uint8}


def write(directory: Path, tensors: dict[str, np.ndarray], dtype: str, **options: Any) -> dict[str, str]:
    directory.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, dtype, values.shape) for name, values in tensors.items()]
    with CheckpointWriter(directory, specs, **options) as writer:
        for name, values in tensors.items():
            writer.write_flat(name, 0, values)
        return writer.finish()


def some(seed: int = 0, count: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {f"layer.{i}.weight": random.standard_normal((i + 1, 7), dtype=np.float32) for i in range(count)}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_the_safetensors_package_reads_what_was_written(dtype: str, tmp_path: Path) -> None:
    tensors = some()
    digests = write(tmp_path, tensors, dtype)
    file = tmp_path / "model.safetensors"
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    with safe_open(file, framework="pt") as theirs:
        assert theirs.metadata() == {"format": "pt"}
        assert set(theirs.keys()) == set(tensors)
        for name, values in tensors.items():
            expected = torch.from_numpy(values).to(TORCH[dtype])
            assert torch.equal(theirs.get_tensor(name), expected)
            content = expected.view(torch.uint8).numpy().tobytes()
            assert digests[name] == "blake3:" + blake3(content).hexdigest()
    assert list(digests) == list(tensors)


def test_blocks_in_order_give_the_bytes_of_one_block(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal(600_001, dtype=np.float32)
    whole = write(tmp_path / "whole", {"w": values}, "BF16")
    (tmp_path / "parts").mkdir()
    writer = CheckpointWriter(tmp_path / "parts", [TensorSpec("w", "BF16", (600_001,))])
    for start in range(0, values.size, 77_777):
        writer.write_flat("w", start, values[start : start + 77_777])
    assert writer.finish() == whole
    one, two = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("whole", "parts"))
    assert one == two


def test_threads_write_the_same_bytes(tmp_path: Path) -> None:
    tensors = some(count=40)
    write(tmp_path / "one", tensors, "F16", shard_bytes=2000)
    (tmp_path / "many").mkdir()
    specs = [TensorSpec(name, "F16", values.shape) for name, values in tensors.items()]
    with CheckpointWriter(tmp_path / "many", specs, shard_bytes=2000) as writer:

        def work(name: str) -> None:
            flat = tensors[name].reshape(-1)
            for at in range(0, flat.size, 5):
                writer.write_flat(name, at, flat[at : at + 5])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, reversed(tensors)))
        writer.finish()
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert len(files) > 3
    assert files == sorted(p.name for p in (tmp_path / "many").iterdir())
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "many" / file).read_bytes()


def test_raw_bytes_are_kept(tmp_path: Path, sharded: Path, ctx: Context) -> None:
    source = open_checkpoint(sharded, ctx)
    with CheckpointWriter(tmp_path, [TensorSpec(t.name, t.dtype, t.shape) for t in source.tensors.values()]) as writer:
        for name, info in source.tensors.items():
            half = info.size // 2
            writer.write_raw(name, 0, source.read_raw(name, 0, half))
            writer.write_raw(name, half, source.read_raw(name, half))
        assert writer.finish() == source.tensor_digests()


def test_scalars_empty_tensors_and_mixed_widths(tmp_path: Path) -> None:
    """An odd number of bytes before a wider format would be misaligned, and torch would refuse it."""
    specs = [
        TensorSpec("b", "U8", (3,)),
        TensorSpec("s", "F32", ()),
        TensorSpec("e", "F16", (0, 4)),
        TensorSpec("h", "BF16", (3,)),
    ]
    with CheckpointWriter(tmp_path, specs) as writer:
        writer.write_raw("b", 0, np.arange(3, dtype=np.uint8))
        writer.write_flat("s", 0, np.array(2.5, dtype=np.float32))
        writer.write_flat("h", 0, np.ones(3, dtype=np.float32))
        assert list(writer.finish()) == ["b", "s", "e", "h"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as theirs:
        assert theirs.get_tensor("s").item() == 2.5
        assert theirs.get_tensor("e").shape == (0, 4)
        assert theirs.get_tensor("b").tolist() == [0, 1, 2]
        assert theirs.get_tensor("h").tolist() == [1, 1, 1]


# The layout

specs_strategy = st.lists(st.integers(1, 60), min_size=1, max_size=25).map(
    lambda sizes: [TensorSpec(f"t{i}", "U8", (n,)) for i, n in enumerate(sizes)]
)


@settings(max_examples=200, deadline=None)
@given(specs=specs_strategy, limit=st.integers(10, 200))
def test_shards_are_cut_as_transformers_cuts_them(specs: Sequence[TensorSpec], limit: int) -> None:
    state = {s.name: torch.zeros(s.shape, dtype=torch.uint8) for s in specs}
    theirs = split_torch_state_dict_into_shards(
        state, max_shard_size=limit, filename_pattern="model{suffix}.safetensors"
    ).filename_to_tensors
    ours = {s.file: [t.name for t in s.specs] for s in layout(specs, shard_bytes=limit)}
    assert ours == theirs


def test_a_layout_says_where_every_byte_goes(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "F32", (1,))]
    (shard,) = layout(specs)
    assert shard.file == "model.safetensors"
    assert shard.begins == {"a": len(shard.header), "b": len(shard.header) + 24}
    assert shard.nbytes == len(shard.header) + 28
    with CheckpointWriter(tmp_path, specs):
        assert (tmp_path / shard.file).stat().st_size == shard.nbytes  # at full size before anything is written


def test_the_index_is_as_transformers_writes_it(tmp_path: Path) -> None:
    tensors = some()
    write(tmp_path, tensors, "F32", shard_bytes=200)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(4 * v.size for v in tensors.values())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="np") as theirs:
            assert name in theirs.keys()  # noqa: SIM118  # safe_open is no mapping


def test_names_beyond_ascii(tmp_path: Path) -> None:
    write(tmp_path, {"schicht.ä.gewicht": np.ones(2, np.float32)}, "F32")
    with safe_open(tmp_path / "model.safetensors", framework="np") as theirs:
        assert list(theirs.keys()) == ["schicht.ä.gewicht"]


# What is refused

BAD = {"NaN": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("kind", BAD)
def test_non_finite_values_are_refused(kind: str, dtype: str, tmp_path: Path) -> None:
    values = np.zeros(500, dtype=np.float32)
    values[321] = BAD[kind]
    with pytest.raises(CheckpointError, match=r"tensor 'layer\.w': 1 of its values are NaN or infinite"):
        write(tmp_path, {"layer.w": values}, dtype)


def test_non_finite_bytes_are_refused_too(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, [TensorSpec("w", "BF16", (4,))]) as writer:
        raw = np.array([0, 0, 0x7FC0, 0xFF80], dtype=np.uint16).view(np.uint8)
        with pytest.raises(CheckpointError, match="'w': 2 of its values"):
            writer.write_raw("w", 0, raw)


@pytest.mark.parametrize(("dtype", "value"), [("F16", 65520.0), ("BF16", 3.4e38)])
def test_values_too_large_for_the_format_are_refused(dtype: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"'w': 1 values are too large for {dtype} .*wider output dtype"):
        write(tmp_path, {"w": np.array([1, value], dtype=np.float32)}, dtype)


def wrong(values: Any) -> Any:
    """Values of a type that the checkers would refuse."""
    return values


def test_misuse_is_a_bug(tmp_path: Path) -> None:
    ones = np.ones(3, np.float32)
    with CheckpointWriter(tmp_path, [TensorSpec("w", "F32", (2, 3)), TensorSpec("i", "I64", (1,))]) as writer:
        with pytest.raises(ValueError, match="'x' is not in the layout"):
            writer.write_flat("x", 0, ones)
        with pytest.raises(ValueError, match=r"w \(2, 3\): block \[3, 6\) is out of order: 0 of 6"):
            writer.write_flat("w", 3, ones)
        with pytest.raises(ValueError, match="out of order"):
            writer.write_flat("w", 0, np.ones(7, np.float32))
        with pytest.raises(ValueError, match="blocks are float32, found float64"):
            writer.write_flat("w", 0, wrong(np.ones(3)))
        with pytest.raises(ValueError, match="i is I64: only write_raw"):
            writer.write_flat("i", 0, ones[:1])
        with pytest.raises(ValueError, match="no whole number of 8-byte elements"):
            writer.write_raw("i", 0, np.zeros(7, np.uint8))
        with pytest.raises(ValueError, match="raw blocks are uint8"):
            writer.write_raw("i", 0, wrong(np.zeros(1, np.int64)))
        writer.write_flat("w", 0, ones)
        with pytest.raises(ValueError, match=r"2 tensors are incomplete: i \(0 of 1\), w \(3 of 6\)"):
            writer.finish()
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.write_flat("w", 3, ones)
    with pytest.raises(ValueError, match=r"given twice: \['w'\]"):
        layout([TensorSpec("w", "F32", (1,)), TensorSpec("w", "F32", (2,))])
    with pytest.raises(ValueError, match="'F99' is not known"):
        layout([TensorSpec("w", "F99", (1,))])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 50), max_size=6), dtype=st.sampled_from(["F32", "F16", "BF16", "F64"]))
def test_any_cut_gives_the_same_file(cuts: list[int], dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(50, dtype=np.float32)
    edges = sorted({0, 50, *cuts})
    with CheckpointWriter(tmp_path, [TensorSpec("w", dtype, (5, 10))]) as writer:
        for a, b in pairwise(edges):
            writer.write_flat("w", a, values[a:b])
        digest = writer.finish()["w"]
    assert digest == write(tmp_path, {"w": values.reshape(5, 10)}, dtype)["w"]


def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    values = np.zeros(4_000_000, dtype=np.float32)
    tracemalloc.start()
    try:
        write(tmp_path, {"w": values}, "BF16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6_000_000  # the tensor in bfloat16 would be 8 MB, and its temporaries twice as much


# A full disk


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(DiskFullError, match=r"out: the disk filled up while writing"),
        staged(tmp_path / "out") as staging,
    ):
        CheckpointWriter(staging, [TensorSpec("w", "F32", (10,))])
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_reserve_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    expected = write(tmp_path / "a", some(), "BF16")
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert write(tmp_path / "b", some(), "BF16") == expected
    hashes = {hashlib.sha256((tmp_path / d / "model.safetensors").read_bytes()).hexdigest() for d in "ab"}
    assert len(hashes) == 1


def test_a_real_limit_of_the_operating_system(tmp_path: Path) -> None:
    """The kernel itself refuses: files of this process may not exceed 100 kB."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from pathlib import Path\n"
        "from solera_core.errors import DiskFullError\n"
        "from solera_core.staging import staged\n"
        "from solera_core.writer import CheckpointWriter, TensorSpec\n"
        "try:\n"
        f"    with staged(Path({str(tmp_path / 'out')!r})) as staging:\n"
        "        CheckpointWriter(staging, [TensorSpec('w', 'F32', (50_000,))])\n"
        "except DiskFullError as e: print(e); raise SystemExit(e.exit_code)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 4, run.stderr
    assert "a file grew beyond what is allowed" in run.stdout
    assert list(tmp_path.iterdir()) == []


# Going on after a kill


def half_written(directory: Path, tensors: dict[str, np.ndarray]) -> list[TensorSpec]:
    """Two tensors whole and one begun, as a killed run leaves them: nothing is finished or closed."""
    specs = [TensorSpec(name, "F32", values.shape) for name, values in tensors.items()]
    writer = CheckpointWriter(directory, specs, shard_bytes=100)
    names = list(tensors)
    for name in (names[3], names[0]):
        writer.write_flat(name, 0, tensors[name])
    writer.write_flat(names[4], 0, tensors[names[4]].reshape(-1)[:10])
    writer.close()
    return specs


def test_finished_tensors_need_not_be_written_again(tmp_path: Path) -> None:
    tensors = some()
    write(tmp_path / "whole", tensors, "F32", shard_bytes=100)
    specs = half_written(tmp_path, tensors)
    with CheckpointWriter(tmp_path, specs, shard_bytes=100) as writer:
        names = list(tensors)
        assert [n for n in names if writer.is_done(n)] == [names[0], names[3]]
        for name in names:
            if not writer.is_done(name):
                writer.write_flat(name, 0, tensors[name])
        digests = writer.finish()
    assert digests == {n: "blake3:" + blake3(v.tobytes()).hexdigest() for n, v in tensors.items()}
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert not (tmp_path / JOURNAL_NAME).exists()


def test_the_journal_is_checked_not_trusted(tmp_path: Path) -> None:
    tensors = some()
    specs = half_written(tmp_path, tensors)
    shard = next(s for s in layout(specs, shard_bytes=100) if "layer.3.weight" in s.begins)
    with (tmp_path / shard.file).open("r+b") as file:
        file.seek(shard.begins["layer.3.weight"] + 5)
        file.write(b"\x00\x01")
    with CheckpointWriter(tmp_path, specs, shard_bytes=100) as writer:
        assert writer.is_done("layer.0.weight")
        assert not writer.is_done("layer.3.weight")


@pytest.mark.parametrize("annotation", ['"far"', "[]", "{}"])
def test_a_figure_in_the_journal_that_is_none(annotation: str, tmp_path: Path) -> None:
    """The bytes are proved by their digest; what is noted beside it must at least be a number."""
    tensors = some()
    specs = half_written(tmp_path, tensors)
    journal = tmp_path / JOURNAL_NAME
    journal.write_text(journal.read_text().replace("null", annotation))
    with CheckpointWriter(tmp_path, specs, shard_bytes=100) as writer:
        assert not any(writer.is_done(name) for name in tensors)


@pytest.mark.parametrize("damage", ["", '["layer.0.weight", "blake3:', "null\n", "\xff\n"])
def test_a_journal_that_was_cut_off(damage: str, tmp_path: Path) -> None:
    tensors = some()
    specs = half_written(tmp_path, tensors)
    (tmp_path / JOURNAL_NAME).write_text(damage, encoding="latin-1")
    with CheckpointWriter(tmp_path, specs, shard_bytes=100) as writer:
        assert not any(writer.is_done(name) for name in tensors)


def test_files_of_another_size_are_begun_anew(tmp_path: Path) -> None:
    tensors = some()
    specs = half_written(tmp_path, tensors)
    for file in tmp_path.glob("*.safetensors"):
        os.truncate(file, 50)
    with CheckpointWriter(tmp_path, specs, shard_bytes=100) as writer:
        assert not any(writer.is_done(name) for name in tensors)


def test_closing_waits_for_a_block_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that lives on after an interrupt must not write into a file that got the number of the closed one."""
    real = os.pwrite
    writing, closing = threading.Event(), threading.Event()

    def pwrite(*arguments: Any) -> int:
        writing.set()
        assert closing.wait(60)
        time.sleep(0.05)  # long enough for a close that does not wait
        return real(*arguments)

    writer = CheckpointWriter(tmp_path, [TensorSpec("w", "F32", (8,))])
    monkeypatch.setattr(os, "pwrite", pwrite)
    with ThreadPoolExecutor(1) as pool:
        block = pool.submit(writer.write_flat, "w", 0, np.ones(4, np.float32))
        assert writing.wait(60)
        closing.set()
        writer.close()
        block.result()
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.write_flat("w", 4, np.ones(4, np.float32))


def test_the_disk_may_write_early(tmp_path: Path) -> None:
    big = {"a": np.arange(20_000_000, dtype=np.float32)}
    plain = write(tmp_path / "plain", big, "F32")
    assert write(tmp_path / "early", big, "F32", early_flush=True) == plain
    assert (tmp_path / "early/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
