"""Writing a checkpoint whose layout is known before its contents.

The shard files are created at their final size, header first, so that a full disk is found before any computation;
then blocks of tensors are written at their final places, by any number of threads, and hashed on the way. A journal
names every finished tensor with its digest, so that a run that was killed can go on; its claims are checked.
"""

import contextlib
import ctypes
import errno
import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Final, Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from solera_core.digest import tensor_digest
from solera_core.dtypes import FLOATS, ITEM_BYTES, from_float32, nonfinite
from solera_core.errors import CheckpointError

__all__ = ["INDEX_NAME", "JOURNAL_NAME", "SHARD_BYTES", "CheckpointWriter", "ShardLayout", "TensorSpec", "layout"]

SHARD_BYTES: Final = 5_000_000_000
"""As huggingface_hub splits; transformers 5 alone would write shards of 50 GB."""

INDEX_NAME: Final = "model.safetensors.index.json"
JOURNAL_NAME: Final = ".finished-tensors"
"""One JSON line a finished tensor: [name, digest, annotation]. Only in a staging directory."""

_FLUSH_BYTES: Final = 1 << 25  # written bytes after which the disk is set to work: 32 MiB
_BLOCK: Final = 1 << 18  # elements cast, checked and hashed at a time: 1 MB of float32, which stays in cache


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes it will take."""
        return self.size * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardLayout:
    """One shard file to be: its name, its tensors in the order of the file, and where each begins.

    Attributes:
        file: file name.
        specs: its tensors, in order of their offsets.
        begins: absolute offset of each tensor in the file, by name.
        header: the first bytes of the file: length and JSON.
        nbytes: size of the file.
    """

    file: str
    specs: tuple[TensorSpec, ...]
    begins: dict[str, int]
    header: bytes
    nbytes: int


def layout(specs: Sequence[TensorSpec], *, shard_bytes: int = SHARD_BYTES) -> list[ShardLayout]:
    """The shard files for `specs`, cut as transformers cuts them.

    A shard is closed when the next tensor would push it beyond `shard_bytes` of tensor data; a tensor larger than
    that stands alone. One shard is called `model.safetensors`, several `model-00001-of-0000N.safetensors`. The order of
    `specs` is kept, except that within one file wider number formats come first: torch refuses misaligned tensors.

    Raises:
        ValueError: a name is given twice, or a dtype is unknown (a bug of the caller).
    """
    if len({s.name for s in specs}) != len(specs):
        twice = sorted({s.name for s in specs if sum(t.name == s.name for t in specs) > 1})
        raise ValueError(f"tensor names given twice: {twice}")
    groups: list[list[TensorSpec]] = []
    current: list[TensorSpec] = []
    current_bytes = 0
    for spec in specs:
        if spec.dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {spec.name}: dtype {spec.dtype!r} is not known")
        if spec.nbytes > shard_bytes:
            groups.append([spec])
            continue
        if current and current_bytes + spec.nbytes > shard_bytes:
            groups.append(current)
            current, current_bytes = [], 0
        current.append(spec)
        current_bytes += spec.nbytes
    if current or not groups:
        groups.append(current)
    names = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    )
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _shard(file: str, group: list[TensorSpec]) -> ShardLayout:
    specs = tuple(sorted(group, key=lambda s: -ITEM_BYTES[s.dtype]))  # stable: equal widths keep their order
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    position = 0
    relative: dict[str, int] = {}
    for spec in specs:
        relative[spec.name] = position
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    begins = {name: len(header) + begin for name, begin in relative.items()}
    return ShardLayout(file, specs, begins, header, len(header) + position)


@dataclass
class _Slot:
    """A tensor being written."""

    spec: TensorSpec
    descriptor: int
    begin: int
    file: Path
    done: int = 0  # elements
    unflushed: int = 0  # bytes at the end of what is done that the disk has not been told to write
    hash: blake3 = field(default_factory=blake3)
    lock: threading.Lock = field(default_factory=threading.Lock)


class CheckpointWriter:
    """Writes the weights of one checkpoint into `directory` (a staging directory).

    Tensors may be written by several threads at once; the blocks of one tensor must come in order, because its
    digest is computed on the way. Use it as a context manager, or call `finish` or `close`.

    `early_flush` has the disk write while the computation goes on; the caller flushes at the end all the same.

    Where `directory` was left by a killed run with the same tensors, those that its journal lists are hashed again;
    the ones that are whole need not be written (`is_done`).

    Example:
        >>> with CheckpointWriter(staging, [TensorSpec("w", "BF16", (2, 3))]) as writer:
        ...     writer.write_flat("w", 0, np.zeros(6, np.float32))
        ...     digests = writer.finish()

    Raises:
        OSError: ENOSPC when the disk has no room for all of it, before anything is computed
            (`solera_core.staging.staged` turns it into DiskFullError).
    """

    def __init__(
        self,
        directory: Path,
        specs: Sequence[TensorSpec],
        *,
        shard_bytes: int = SHARD_BYTES,
        early_flush: bool = False,
    ) -> None:
        self._directory = directory
        self._flusher: _Flusher | None = None
        self._order = [spec.name for spec in specs]
        self._shards = layout(specs, shard_bytes=shard_bytes)
        self._descriptors: list[int] = []
        self._slots: dict[str, _Slot] = {}
        self._digests: dict[str, str] = {}
        self._annotations: dict[str, float | None] = {}
        journal = directory / JOURNAL_NAME
        claims = _read_journal(journal)
        try:
            for shard in self._shards:
                path = directory / shard.file
                as_left = path.exists() and path.stat().st_size == shard.nbytes
                mode = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | (0 if as_left else os.O_TRUNC)
                descriptor = os.open(path, mode, 0o644)
                self._descriptors.append(descriptor)
                _allocate(descriptor, shard.nbytes)
                _pwrite(descriptor, memoryview(shard.header), 0)
                for spec in shard.specs:
                    slot = self._slots[spec.name] = _Slot(spec, descriptor, shard.begins[spec.name], path)
                    claim = claims.get(spec.name)
                    if as_left and claim is not None and _digest_on_disk(slot) == claim.digest:
                        slot.done = spec.size
                        self._digests[spec.name] = claim.digest
                        self._annotations[spec.name] = claim.annotation
            self._write_index()
            self._flusher = _Flusher() if early_flush else None
            self._journal = os.open(journal, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._descriptors.append(self._journal)
            for name in self._order:
                if name in self._digests:
                    self._note(name)
                elif self._slots[name].spec.size == 0:
                    self._finish_tensor(self._slots[name])
        except BaseException:
            self.close()
            raise

    def is_done(self, name: str) -> bool:
        """Whether a tensor is complete, of this run or of the killed one before."""
        return name in self._digests

    def annotate(self, name: str, value: float) -> None:
        """A figure about a tensor that must outlive a kill. To be told before the tensor's last block is written."""
        self._annotations[name] = value

    def annotation(self, name: str) -> float | None:
        """What was told about a tensor, by this run or by the killed one before."""
        return self._annotations.get(name)

    def write_flat(self, name: str, start: int, values: npt.NDArray[np.float32]) -> None:
        """Write float32 values at element offset `start` of tensor `name`, cast to its dtype, nearest even.

        Raises:
            CheckpointError: a value is NaN or infinite, or too large for the dtype.
            ValueError: unknown tensor, wrong order, or too many elements (a bug of the caller).
        """
        values = np.asarray(values)
        if values.dtype != np.float32:
            raise ValueError(f"tensor {name}: blocks are float32, found {values.dtype}")
        with self._turn(name, start, values.size) as slot:
            if slot.spec.dtype not in FLOATS:
                raise ValueError(f"tensor {name} is {slot.spec.dtype}: only write_raw can write it")
            flat = values.reshape(-1)
            for at in range(0, flat.size, _BLOCK):
                block = flat[at : at + _BLOCK]
                self._put(slot, from_float32(block, slot.spec.dtype), block)

    def write_raw(self, name: str, start: int, raw: npt.NDArray[np.uint8], *, checked: bool = False) -> None:
        """Write bytes as they are at element offset `start`; NaN and infinity are refused here too.

        `checked`: the caller has made sure that all values are finite.
        """
        if raw.dtype != np.uint8:
            raise ValueError(f"tensor {name}: raw blocks are uint8, found {raw.dtype}")
        flat = np.ascontiguousarray(raw).reshape(-1)
        width = ITEM_BYTES[self._slot(name).spec.dtype]
        if flat.size % width:
            raise ValueError(f"tensor {name}: {flat.size} bytes are no whole number of {width}-byte elements")
        with self._turn(name, start, flat.size // width) as slot:
            for at in range(0, flat.size, _BLOCK * 4):
                self._put(slot, flat[at : at + _BLOCK * 4], None, checked=checked)

    def finish(self) -> dict[str, str]:
        """Close the files and remove the journal; `{tensor: "blake3:<hex>"}` in order.

        Raises:
            ValueError: a tensor is incomplete (a bug of the caller).
        """
        missing = [f"{s.spec.name} ({s.done} of {s.spec.size})" for s in self._slots.values() if s.done != s.spec.size]
        if missing:
            raise ValueError(f"{len(missing)} tensors are incomplete: {', '.join(missing[:5])}")
        self.close()
        (self._directory / JOURNAL_NAME).unlink()
        return {name: self._digests[name] for name in self._order}

    def close(self) -> None:
        """Close the files, finished or not; waits for blocks that are being written."""
        for slot in self._slots.values():
            with slot.lock:  # a thread that lives on after an interrupt must not write into whatever gets this number
                slot.descriptor = -1
        if self._flusher is not None:
            self._flusher.stop()
            self._flusher = None
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_index(self) -> None:
        if len(self._shards) > 1:
            weight_map = {spec.name: shard.file for shard in self._shards for spec in shard.specs}
            total = sum(spec.nbytes for shard in self._shards for spec in shard.specs)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _finish_tensor(self, slot: _Slot) -> None:
        self._digests[slot.spec.name] = "blake3:" + slot.hash.hexdigest()
        self._note(slot.spec.name)

    def _note(self, name: str) -> None:
        os.write(self._journal, (json.dumps([name, self._digests[name], self.annotation(name)]) + "\n").encode())

    def _slot(self, name: str) -> _Slot:
        if name not in self._slots:
            raise ValueError(f"tensor {name!r} is not in the layout")
        return self._slots[name]

    @contextlib.contextmanager
    def _turn(self, name: str, start: int, count: int) -> Iterator[_Slot]:
        slot = self._slot(name)
        with slot.lock:
            if slot.descriptor < 0:
                raise ValueError(f"tensor {name}: the writer is closed")
            if start != slot.done or start + count > slot.spec.size:
                raise ValueError(
                    f"tensor {name} {slot.spec.shape}: block [{start}, {start + count}) is out of order: "
                    f"{slot.done} of {slot.spec.size} elements are written"
                )
            yield slot

    def _put(
        self,
        slot: _Slot,
        raw: npt.NDArray[np.uint8],
        values: npt.NDArray[np.float32] | None,
        *,
        checked: bool = False,
    ) -> None:
        spec = slot.spec
        if not checked and (bad := nonfinite(raw, spec.dtype)):
            if values is not None and np.isfinite(values).all():
                largest = float(np.abs(values).max())
                raise CheckpointError(
                    f"{slot.file.name}: tensor {spec.name!r}: {bad} values are too large for {spec.dtype} "
                    f"(the largest is {largest:.6g}); choose a wider output dtype (bfloat16 or float32)"
                )
            raise CheckpointError(
                f"{slot.file.name}: tensor {spec.name!r}: {bad} of its values are NaN or infinite "
                f"(near element {slot.done}); an input is damaged or the settings diverge"
            )
        _pwrite(slot.descriptor, raw.data, slot.begin + slot.done * ITEM_BYTES[spec.dtype])
        slot.hash.update(raw.data)
        slot.done += raw.size // ITEM_BYTES[spec.dtype]
        slot.unflushed += raw.size
        if slot.unflushed >= _FLUSH_BYTES or slot.done == spec.size:
            end = slot.begin + slot.done * ITEM_BYTES[spec.dtype]
            if self._flusher is not None:
                self._flusher.start(slot.descriptor, end - slot.unflushed, slot.unflushed)
            slot.unflushed = 0
        if slot.done == spec.size:
            self._finish_tensor(slot)


@dataclass(frozen=True)
class _Claim:
    """A line of the journal."""

    digest: str
    annotation: float | None


def _read_journal(file: Path) -> dict[str, _Claim]:
    """What a killed run says it has finished; a last line that was cut off is left out."""
    claims: dict[str, _Claim] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], float | int | None):
                    claims[str(entry[0])] = _Claim(str(entry[1]), entry[2])
    return claims


def _digest_on_disk(slot: _Slot) -> str:
    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        width = ITEM_BYTES[slot.spec.dtype]
        data = os.pread(slot.descriptor, (stop - start) * width, slot.begin + start * width)
        return np.frombuffer(data, np.uint8)

    return tensor_digest(slot.spec.size, read)


class _Flusher:
    """Lets the disk begin to write while we compute, so that the flush at the end has little left to wait for.

    The call waits while the disk's queue is full, so it has a thread of its own. It is a hint: a system without it (it
    is Linux's) just flushes at the end.
    """

    def __init__(self) -> None:
        self._ranges: SimpleQueue[tuple[int, int, int] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="flush", daemon=True)
        self._thread.start()

    def start(self, descriptor: int, offset: int, count: int) -> None:
        """Have a range written soon."""
        self._ranges.put((descriptor, offset, count))

    def stop(self) -> None:
        """Forget what has not begun (the flush at the end covers it), and wait for the call under way."""
        self._stopped = True
        self._ranges.put(None)
        self._thread.join()

    _stopped = False

    def _work(self) -> None:
        write = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
        while (piece := self._ranges.get()) is not None:
            if write is not None and not self._stopped:
                descriptor, offset, count = piece
                write(descriptor, ctypes.c_int64(offset), ctypes.c_int64(count), ctypes.c_uint(2))


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)  # a file system that cannot reserve: a full disk shows while writing


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + (1 << 30)], offset + done)
