"""An embedding or output head with its rows in the order of another vocabulary, read a few rows at a time."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import ITEM_BYTES
from solera_core.views import Derived
from solera_merge.tokenizer.rows import AVERAGE, MEAN, ZERO, Origins

__all__ = ["permuted"]

Float32 = npt.NDArray[np.float32]

_PIECE = 1 << 18  # elements read at a time for the average: 1 MB


def permuted(name: str, model: int, checkpoints: Mapping[int, Checkpoint], origins: Origins) -> Derived:
    """The tensor `name` of a model with the rows that `origins` tells. Shape [rows, ...].

    Args:
        name: of the tensor, in every model that a row comes from.
        model: whose tensor it is.
        checkpoints: the models.
        origins: of its rows.
    """
    info = checkpoints[model].tensors[name]
    shape = (len(origins.row), *info.shape[1:])
    size = int(np.prod(shape))
    table = _Table(name, checkpoints, origins, size // len(origins.row))
    return Derived(replace(info, shape=shape, begin=0, end=size * ITEM_BYTES[info.dtype]), table.read)


class _Table:
    def __init__(self, name: str, checkpoints: Mapping[int, Checkpoint], origins: Origins, width: int) -> None:
        self._name = name
        self._checkpoints = checkpoints
        self._origins = origins
        self._width = width
        self._lock = threading.Lock()
        self._average: Float32 | None = None
        # Where a run of consecutive rows of one model begins: each is one read.
        model, row = origins.model, origins.row
        breaks = (np.diff(model) != 0) | ((model[1:] >= 0) & (np.diff(row) != 1))
        self._starts = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(row)]])

    def read(self, start: int, stop: int) -> Float32:
        """Elements [start, stop)."""
        if start == stop:
            return np.empty(0, np.float32)
        first, last = start // self._width, -(-stop // self._width)
        out = np.empty((last - first) * self._width, np.float32)
        for begin, end in self._runs(first, last):
            out[(begin - first) * self._width : (end - first) * self._width] = self._rows(begin, end)
        return out[start - first * self._width : stop - first * self._width]

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        at = int(np.searchsorted(self._starts, first, "right")) - 1
        while self._starts[at] < last:
            yield max(int(self._starts[at]), first), min(int(self._starts[at + 1]), last)
            at += 1

    def _rows(self, begin: int, end: int) -> Float32:
        """The rows of one run, flat."""
        model, row = int(self._origins.model[begin]), int(self._origins.row[begin])
        if model >= 0:
            return self._read(model, row, row + end - begin)
        if model == ZERO:
            return np.zeros((end - begin) * self._width, np.float32)
        if model == AVERAGE:
            return np.tile(self._mean_of_tokens(), end - begin)
        assert model == MEAN
        return np.concatenate([self._mean(place) for place in range(begin, end)])

    def _read(self, model: int, begin: int, end: int) -> Float32:
        return self._checkpoints[model].read_flat(self._name, begin * self._width, end * self._width)

    def _mean(self, place: int) -> Float32:
        """Summed in float32 in the order of the models, then divided, as in mergekit."""
        rows = self._origins.means[place]
        total = np.zeros(self._width, np.float32)
        for model, row in rows:
            total += self._read(model, row, row + 1)
        return total / np.float32(len(rows))

    def _mean_of_tokens(self) -> Float32:
        """The mean of the rows that have a token, in float64; read once."""
        with self._lock:
            if self._average is None:
                self._average = self._averaged()
            return self._average

    def _averaged(self) -> Float32:
        total = np.zeros(self._width)
        tokens = self._origins.tokens
        step = max(1, _PIECE // self._width)
        for first in range(0, len(tokens), step):
            for begin, end in self._runs(first, min(first + step, len(tokens))):
                if tokens[begin:end].any():
                    rows = self._rows(begin, end).reshape(-1, self._width)
                    total += rows[tokens[begin:end]].sum(axis=0, dtype=np.float64)
        return np.asarray(total / tokens.sum(), np.float32)
