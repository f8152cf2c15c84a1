"""Byte ranges of files, read by position: no shared offset, so any number of threads may read at once."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from solera_core.errors import CheckpointError

__all__ = ["RangeReader", "Stamp", "read_range", "stamp"]

_STEP: Final = 1 << 30  # Linux stops at 2 GiB a call


@dataclass(frozen=True)
class Stamp:
    """What tells whether a file is still the one it was: its size, time of change and place on the disk."""

    nbytes: int
    mtime_ns: int
    inode: int


def stamp(file: Path) -> Stamp:
    """The stamp of a file (of what a link points to).

    Raises:
        CheckpointError: it is gone or cannot be read.
    """
    try:
        return _stamp(file.stat())
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


class RangeReader:
    """One open file, read by position. Use it as a context manager.

    Raises:
        CheckpointError: the file is gone, or is no longer the one that `expected` describes.
    """

    def __init__(self, file: Path, expected: Stamp | None = None) -> None:
        self.file = file
        try:
            self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e
        try:
            found = _stamp(os.fstat(self._descriptor))
        except OSError as e:
            self.close()
            raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e
        if expected is not None and found != expected:
            self.close()
            sizes = "" if found.nbytes == expected.nbytes else f" ({expected.nbytes} bytes then, {found.nbytes} now)"
            raise CheckpointError(
                f"{file}: changed since its header was read{sizes}; leave the inputs alone until the run has ended, "
                "and run again"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor, for whoever reads by position without us."""
        return self._descriptor

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def read_into(self, begin: int, out: npt.NDArray[np.uint8]) -> None:
        """The bytes from `begin` on into `out`, all of it.

        Raises:
            CheckpointError: the file cannot be read, or became shorter than its header said.
        """
        view, done = out.data, 0
        try:
            while done < len(view):
                n = os.preadv(self._descriptor, [view[done : done + _STEP]], begin + done)
                if n == 0:
                    raise CheckpointError(
                        f"{self.file}: ends at byte {begin + done}, but {begin + len(view)} were expected; "
                        "it was cut meanwhile"
                    )
                done += n
        except OSError as e:
            raise CheckpointError(f"{self.file}: cannot be read: {e.strerror}") from e


def read_range(file: Path, begin: int, end: int, expected: Stamp | None = None) -> npt.NDArray[np.uint8]:
    """The bytes [begin, end) of `file`, as a new array.

    The file is opened for each call: that costs microseconds, and models of hundreds of shards never run
    into the limit of open files.

    Raises:
        CheckpointError: the file is gone, cannot be read, is another one than `expected`, or became shorter.
    """
    out = np.empty(end - begin, dtype=np.uint8)
    with RangeReader(file, expected) as reader:
        reader.read_into(begin, out)
    return out
