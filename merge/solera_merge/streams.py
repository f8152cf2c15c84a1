"""Tensors as the methods see them, over the files of the models: read anew in every pass, so that nothing is held."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from solera_core.checkpoint import Checkpoint, TensorInfo
from solera_core.dtypes import ITEM_BYTES
from solera_core.errors import CheckpointError
from solera_core.ranges import RangeReader
from solera_merge.block import CHUNK_ELEMENTS, Block, Float32, Unit, block_starts
from solera_merge.plan import SourceTensor, TensorPlan

if TYPE_CHECKING:
    from solera_merge.fused import RawBlock

__all__ = ["RawStream", "StreamedTensor", "refuse"]


class StreamedTensor:
    """`solera_merge.block.Tensor` over checkpoints.

    Args:
        tensor: its plan.
        checkpoints: the models of the merge.
        step: elements a block.
        advance: called with 0 before every block; raises when another thread has failed.
        begin: where the tensor begins in what is stored (for one expert of several that are stored as one).
    """

    def __init__(
        self,
        tensor: TensorPlan,
        checkpoints: Sequence[Checkpoint],
        step: int,
        advance: Callable[[int], None],
        begin: int = 0,
    ) -> None:
        self.name = tensor.name
        self.size = tensor.spec.size
        self.shape = tensor.shape
        self.keys = tensor.keys
        self.model_ids = tuple(source.model for source in tensor.models)
        self._tensor = tensor
        self._checkpoints = checkpoints
        self._step = step
        self._advance = advance
        self._begin = begin

    def blocks(self, unit: Unit = "elements") -> Iterator[Block]:
        """One pass; values that are not finite are refused by name and place."""
        tensor = self._tensor
        with ExitStack() as files:
            read = {source: self._reader(source, files) for source in tensor.sources}
            for start, stop in pairwise(block_starts(self.shape, unit, self._step)):
                self._advance(0)
                base = None if tensor.base is None else read[tensor.base](start, stop)
                yield Block(start, base, tuple(read[source](start, stop) for source in tensor.models))

    def _reader(self, source: SourceTensor, files: ExitStack) -> Callable[[int, int], Float32]:
        """What reads a range of elements of a source as float32."""
        from solera_merge.kernels.formats import CODES, widen

        checkpoint = self._checkpoints[source.model]
        info, begin = checkpoint.tensors[source.name], self._begin
        if not checkpoint.is_plain(source.name, CODES):

            def read_any(start: int, stop: int) -> Float32:
                values = checkpoint.read_flat(source.name, begin + start, begin + stop)
                if not np.isfinite(values).all():
                    refuse(values, checkpoint, info, begin + start)
                return values

            return read_any
        file = files.enter_context(_open(checkpoint, info))
        code, width = CODES[info.dtype], ITEM_BYTES[info.dtype]

        def read_plain(start: int, stop: int) -> Float32:
            raw = np.empty((stop - start) * width, np.uint8)
            file.read_into(info.begin + (begin + start) * width, raw)
            values = np.empty(stop - start, np.float32)
            if widen(raw, code, 0, stop - start, values):
                refuse(values, checkpoint, info, begin + start)
            return values

        return read_plain


class RawStream:
    """`solera_merge.fused.RawTensor` over files; a context manager.

    Args:
        tensor: its plan.
        checkpoints: the models of the merge.
        step: elements a block.
        advance: as for `StreamedTensor`.
        buffers: how many there are, used in turn; a block is valid until its buffer's next turn.
        buffer: makes one of [rows, bytes].
        begin: as for `StreamedTensor`.
    """

    def __init__(
        self,
        tensor: TensorPlan,
        checkpoints: Sequence[Checkpoint],
        step: int,
        advance: Callable[[int], None],
        *,
        buffers: int = 1,
        buffer: Callable[[int, int], npt.NDArray[np.uint8]] | None = None,
        begin: int = 0,
    ) -> None:
        from solera_merge.kernels.formats import CODES

        self.size = tensor.spec.size
        self.shape = tensor.shape
        self.keys = tensor.keys
        self.step = min(step, max(self.size, 1))
        self._sources = [(checkpoints[s.model], checkpoints[s.model].tensors[s.name]) for s in tensor.sources]
        self._codes = np.array([CODES[info.dtype] for _, info in self._sources], np.int64)
        self._widths = [ITEM_BYTES[info.dtype] for _, info in self._sources]
        rows, width = len(self._sources), self.step * max(self._widths)
        self._buffers = [buffer(rows, width) if buffer else np.empty((rows, width), np.uint8) for _ in range(buffers)]
        self._bytes = np.array(self._widths, np.int64)
        self._begins = np.array([info.begin for _, info in self._sources], np.int64) + begin * self._bytes
        self._advance = advance
        self._files = ExitStack()

    def __enter__(self) -> Self:
        with self._files:  # closes those that are open when a later one cannot be opened
            self._readers = [self._files.enter_context(_open(c, info)) for c, info in self._sources]
            self._descriptors = np.array([reader.fileno() for reader in self._readers], np.int32)
            self._files = self._files.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def blocks(self) -> "Iterator[RawBlock]":
        """One pass."""
        from solera_merge.fused import RawBlock
        from solera_merge.kernels.spans import Rows, fill

        for start, raw in zip(range(0, self.size, self.step), cycle(self._buffers), strict=False):
            n = min(self.step, self.size - start)
            if fill(Rows(raw, self._codes, self._descriptors, self._begins + start * self._bytes), 0, n, n):
                parts = zip(self._begins, self._readers, self._widths, raw, strict=True)
                for first, reader, width, row in parts:  # says what is wrong
                    reader.read_into(int(first) + start * width, row[: n * width])
            self._advance(0)
            yield RawBlock(start, n, raw, self._codes)

    def spans(self) -> "Iterator[RawBlock]":
        """One pass in larger blocks, which are still to be read."""
        from solera_merge.fused import RawBlock

        step = max(self.step // 4 // CHUNK_ELEMENTS, 1) * CHUNK_ELEMENTS
        length, raw = self.step // CHUNK_ELEMENTS * CHUNK_ELEMENTS * 4 or self.size, self._buffers[0]
        for start in range(0, self.size, length):
            self._advance(0)
            n = min(length, self.size - start)
            yield RawBlock(start, n, raw, self._codes, self._descriptors, self._begins + start * self._bytes, step)

    def advance(self, block: "RawBlock") -> None:
        """Say that a block is done."""
        self._advance(block.n * sum(self._widths))


def _open(checkpoint: Checkpoint, info: TensorInfo) -> RangeReader:
    reader = checkpoint.reader(info.name)
    assert reader is not None, "only plain tensors are read from their file"
    return reader


def refuse(values: Float32, checkpoint: Checkpoint, info: TensorInfo, start: int) -> None:
    """Raise CheckpointError for the first of these values of a tensor, from element `start` on, that is not finite."""
    place = int(np.argmin(np.isfinite(values)))
    index = tuple(int(i) for i in np.unravel_index(start + place, info.shape))
    raise CheckpointError(
        f"{info.file}: tensor {info.name!r} {info.shape} of model {checkpoint.ref!r} holds {values[place]} at {index}; "
        "the model is damaged or diverged in training: leave it out, or repair it"
    )
