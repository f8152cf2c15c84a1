"""Byte ranges of files, read by position: no shared offset, so any number of threads may read at once."""

import os
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from solera_core.errors import CheckpointError

__all__ = ["read_range"]

_STEP: Final = 1 << 30  # Linux stops at 2 GiB a call


def read_range(file: Path, begin: int, end: int) -> npt.NDArray[np.uint8]:
    """The bytes [begin, end) of `file`, as a new array.

    The file is opened for each call: that costs microseconds, and models of hundreds of shards never run
    into the limit of open files.

    Raises:
        CheckpointError: the file is gone, cannot be read, or became shorter than its header said.
    """
    out = np.empty(end - begin, dtype=np.uint8)
    view, done = out.data, 0
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while done < len(view):
                n = os.preadv(descriptor, [view[done : done + _STEP]], begin + done)
                if n == 0:
                    raise CheckpointError(
                        f"{file}: ends at byte {begin + done}, but {end} were expected; it was cut meanwhile"
                    )
                done += n
        finally:
            os.close(descriptor)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e
    return out
