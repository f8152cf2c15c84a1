"""What a safetensors file says about itself: 8 bytes of length, a JSON header, then the tensors end to end.

Only the header is read; every statement in it is checked against the size of the file. `header_length` and
`parse_header` are for whoever gets those bytes from elsewhere than a file on this machine.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from solera_core.dtypes import ITEM_BYTES
from solera_core.errors import CheckpointError

__all__ = ["PREFIX_BYTES", "TensorInfo", "header_length", "parse_header", "read_header"]

PREFIX_BYTES: Final = 8
"""What stands before the header: its length."""

_HEADER_LIMIT_BYTES: Final = 100_000_000  # as the safetensors package has it
_AGAIN: Final = "download it again"


@dataclass(frozen=True)
class TensorInfo:
    """Where one stored tensor lies.

    Attributes:
        name: as stored.
        dtype: safetensors' name (F32, F16, BF16, F64, I64, ...).
        shape: empty for a scalar.
        file: the file that holds it.
        begin: absolute offset of its first byte in `file`.
        end: absolute offset behind its last byte. (Of a pickled tensor: 0 and its length in bytes.)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes stored."""
        return self.end - self.begin


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in order of their offsets.

    Raises:
        CheckpointError: naming the file (and tensor): not safetensors, truncated (both sizes are given), trailing
            bytes, an unknown dtype, a shape that disagrees with its length, overlapping tensors or a hole.
    """
    try:
        with file.open("rb") as stream:
            actual = os.fstat(stream.fileno()).st_size
            text = stream.read(header_length(file, stream.read(PREFIX_BYTES), actual))
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e
    return parse_header(file, text, actual)


def header_length(file: Path, prefix: bytes, actual: int, *, way_out: str = _AGAIN) -> int:
    """The length of the header that `prefix`, the first bytes of a file of `actual` bytes, announces.

    Raises:
        CheckpointError: not safetensors, or too short for its own header; `way_out` says what to do about it.
    """
    if len(prefix) < PREFIX_BYTES:
        raise CheckpointError(f"{file}: only {actual} bytes, so it is not a safetensors file; {way_out}")
    length = int.from_bytes(prefix, "little")
    if length > _HEADER_LIMIT_BYTES:
        raise CheckpointError(
            f"{file}: not a safetensors file (it starts with {prefix!r}); "
            "a Git LFS pointer or an HTML page saved under this name looks like this"
        )
    if PREFIX_BYTES + length > actual:
        raise CheckpointError(
            f"{file}: truncated: the header alone needs {PREFIX_BYTES + length} bytes, the file has {actual}; {way_out}"
        )
    return length


def parse_header(file: Path, text: bytes, actual: int, *, way_out: str = _AGAIN) -> dict[str, TensorInfo]:
    """The tensors that the header `text` of `file`, which has `actual` bytes, describes, in order of their offsets.

    Raises:
        CheckpointError: as `read_header`; `way_out` says what to do about a damaged file.
    """
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
    except _DuplicateKeyError as e:
        raise CheckpointError(f"{file}: tensor {e} is listed twice in the header") from e
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{file}: the safetensors header is not valid JSON: {e}; {way_out}") from e
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: the safetensors header is not an object; {way_out}")
    entries.pop("__metadata__", None)
    data_begin = PREFIX_BYTES + len(text)
    tensors = [_entry(file, name, entry, data_begin) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.begin, t.end))
    _check_contiguous(file, tensors, data_begin, actual, way_out)
    return {t.name: t for t in tensors}


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(repr(key))
        found[key] = value
    return found


def _entry(file: Path, name: str, entry: Any, data_begin: int) -> TensorInfo:
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where}: its header entry lacks dtype, shape or data_offsets: {entry!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: dtype {dtype!r} is not known (known: {', '.join(ITEM_BYTES)})")
    if not _naturals(shape):
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {offsets!r} are not [begin, end]")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{where}: shape {tuple(shape)} in {dtype} needs {expected} bytes, "
            f"data_offsets give {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_begin + offsets[0], data_begin + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


def _check_contiguous(file: Path, tensors: list[TensorInfo], data_begin: int, actual: int, way_out: str) -> None:
    position, previous = data_begin, "the header"
    for tensor in tensors:
        if tensor.begin < position:
            raise CheckpointError(f"{file}: tensor {tensor.name!r} overlaps {previous}; the file is damaged")
        if tensor.begin > position:
            raise CheckpointError(
                f"{file}: {tensor.begin - position} unaccounted bytes between {previous} and tensor {tensor.name!r}"
            )
        position, previous = tensor.end, f"tensor {tensor.name!r}"
    if actual < position:
        cut = next((t.name for t in tensors if t.end > actual), "")
        raise CheckpointError(
            f"{file}: truncated: the header promises {position} bytes, the file has {actual} "
            f"(tensor {cut!r} is the first that is cut off); {way_out}"
        )
    if actual > position:
        raise CheckpointError(
            f"{file}: {actual - position} bytes behind the last tensor: the header promises {position} bytes, "
            f"the file has {actual}; {way_out}"
        )
