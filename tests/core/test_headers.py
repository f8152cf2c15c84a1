"""Every way in which a safetensors file can be damaged is named, with the file, the tensor and the sizes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from solera_core.errors import CheckpointError
from solera_core.headers import read_header

Build = Callable[..., Path]


def entry(begin: int, end: int, dtype: str = "F32", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_reads_what_the_safetensors_package_reads(siblings: dict[str, Path]) -> None:
    file = siblings["a"] / "model.safetensors"
    ours = read_header(file)
    with safe_open(file, framework="np") as theirs:
        assert set(ours) == set(theirs.keys())
        for name, info in ours.items():
            part = theirs.get_slice(name)
            assert list(info.shape) == part.get_shape()
            assert info.dtype == part.get_dtype()
            assert file.read_bytes()[info.begin : info.end] == theirs.get_tensor(name).tobytes()


def test_order_is_that_of_the_file(tmp_path: Path, raw_safetensors: Build) -> None:
    file = raw_safetensors(tmp_path / "x", {"b": entry(8, 12), "a": entry(0, 8)}, bytes(12))
    assert list(read_header(file)) == ["a", "b"]
    assert [t.size for t in read_header(file).values()] == [2, 1]


def test_a_scalar_and_an_empty_tensor(tmp_path: Path, raw_safetensors: Build) -> None:
    entries = {"s": entry(0, 4, shape=[]), "e": entry(4, 4, shape=[0, 3])}
    tensors = read_header(raw_safetensors(tmp_path / "x", entries, bytes(4)))
    assert tensors["s"].size == 1
    assert tensors["e"].nbytes == 0


DAMAGED: dict[str, tuple[Any, bytes, str]] = {
    "truncated": (
        {"a": entry(0, 8), "b": entry(8, 16)},
        bytes(11),
        r"truncated: .* promises \d+ bytes, the file has \d+ .*'b'",
    ),
    "trailing": ({"a": entry(0, 8)}, bytes(9), "1 bytes behind the last tensor"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' overlaps tensor 'a'"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "4 unaccounted bytes between tensor 'a' and tensor 'b'"),
    "hole at the start": ({"a": entry(4, 8)}, bytes(8), "4 unaccounted bytes between the header"),
    "dtype": ({"a": entry(0, 8, dtype="F99")}, bytes(8), "'a'.*dtype 'F99' is not known"),
    "shape": ({"a": entry(0, 8, shape=[3])}, bytes(8), r"'a'.*shape \(3,\) in F32 needs 12 bytes, data_offsets give 8"),
    "negative": ({"a": entry(0, 8, shape=[-2])}, bytes(8), r"shape \[-2\] is not"),
    "offsets": ({"a": entry(8, 0, shape=[2])}, bytes(8), r"data_offsets \[8, 0\] are not"),
    "lacking": ({"a": {"dtype": "F32"}}, b"", "lacks dtype, shape or data_offsets"),
    "list": ("[1, 2]", b"", "not an object"),
    "not json": ("{nonsense", b"", "not valid JSON"),
    "twice": ('{"a": {}, "a": {}}', b"", "tensor 'a' is listed twice"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_named(kind: str, tmp_path: Path, raw_safetensors: Build) -> None:
    entries, data, message = DAMAGED[kind]
    file = raw_safetensors(tmp_path / "model.safetensors", entries, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("kind", ["truncated", "trailing", "overlap", "hole", "dtype", "shape", "not json"])
def test_the_safetensors_package_refuses_it_too(kind: str, tmp_path: Path, raw_safetensors: Build) -> None:
    entries, data, _ = DAMAGED[kind]
    file = raw_safetensors(tmp_path / "model.safetensors", entries, data)
    with pytest.raises(SafetensorError), safe_open(file, framework="np"):
        pass


@pytest.mark.parametrize("size", [0, 5, 8, 30])
def test_a_file_cut_inside_the_header(size: int, tmp_path: Path, siblings: dict[str, Path]) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((siblings["a"] / "model.safetensors").read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (truncated|only \d bytes)"):
        read_header(file)


def test_a_pointer_of_git_lfs_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    with pytest.raises(CheckpointError, match=r"not a safetensors file .*Git LFS"):
        read_header(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "nothing")


def test_header_only(tmp_path: Path, llama: Path) -> None:
    """A model whose data is a hole of 1 TB is read at once: nothing but the header is touched."""
    size = 1 << 40
    text = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    file = tmp_path / "big"
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        try:
            stream.truncate(8 + len(text) + size)
        except OSError:
            pytest.skip("this file system has no sparse files of 1 TB")
    assert read_header(file)["a"].nbytes == size
    shutil.rmtree(llama)
