"""Where stored bytes come from: safetensors files, or pickles through torch's restricted loader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from solera_core.dtypes import ITEM_BYTES
from solera_core.headers import TensorInfo
from solera_core.ranges import RangeReader, Stamp, read_range, stamp
from solera_core.shards import Weights, read_headers

__all__ = ["SafetensorsSource", "Source", "open_source"]


class Source(Protocol):
    """Stored tensors by name, and the bytes of any element range of one of them."""

    tensors: Mapping[str, TensorInfo]

    def read_raw(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The stored bytes of elements [start, stop), a new array. Thread-safe."""
        ...


class SafetensorsSource:
    """Reads ranges of safetensors files by position.

    Attributes:
        tensors: by name.
        stamps: of every file, taken before its header was read. A file that changes later is refused.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], stamps: Mapping[Path, Stamp] | None = None) -> None:
        self.tensors = tensors
        self.stamps = stamps or {file: stamp(file) for file in {info.file for info in tensors.values()}}

    def read_raw(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The stored bytes of elements [start, stop), a new array."""
        width = ITEM_BYTES[info.dtype]
        begin, end = info.begin + start * width, info.begin + stop * width
        return read_range(info.file, begin, end, self.stamps[info.file])

    def require_unchanged(self) -> None:
        """Raise CheckpointError when a file is no longer the one whose header was read."""
        for file, expected in self.stamps.items():
            RangeReader(file, expected).close()

    def reader(self, info: TensorInfo) -> RangeReader:
        """The file of a tensor, open for many reads; its offsets are those of `info`."""
        return RangeReader(info.file, self.stamps[info.file])


def open_source(weights: Weights) -> Source:
    """The tensors of some weight files; headers and index are checked, no weight is read."""
    if weights.pickled:
        from solera_core.pickled import PickledSource  # imports torch

        return PickledSource(weights)
    stamps = {file: stamp(file) for file in weights.files}  # first: a file that is replaced meanwhile is then refused
    return SafetensorsSource(read_headers(weights), stamps)
