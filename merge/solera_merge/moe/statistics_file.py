"""The sums that a router was fitted from, beside the MoE, so that an expert can be added without the old text.

One safetensors file in a folder of its own: engines that load every `*.safetensors` of a model's directory must not
meet tensors that are no weights.

    layers.N.gram  (D (D + 1) / 2,) float64: the upper triangle of X'X over all experts' text, row by row
    layers.N.sums  (E, D) float64: sum of the states of every expert's text
    counts         (E,) float64: tokens of every expert's text

    E experts, D model width
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from solera_core.errors import CheckpointError
from solera_core.headers import TensorInfo, read_header
from solera_merge.moe.states import RouterStatistics

__all__ = ["STATISTICS_FILE", "StatisticsReader", "StatisticsWriter", "statistics_bytes"]

STATISTICS_FILE: Final = "router_statistics/sums.safetensors"


class StatisticsWriter:
    """Writes the file layer by layer, so that one layer's sums are in memory."""

    def __init__(self, directory: Path, *, layers: int, width: int, experts: Sequence[str], about: Any) -> None:
        """`experts`: their names, in order; `about`: anything else that `StatisticsReader` shall give back (JSON)."""
        header, _ = _header(layers, width, experts, about)
        path = directory / STATISTICS_FILE
        path.parent.mkdir()
        self._file = path.open("xb")
        self._file.write(header)
        self._upper = np.triu(np.ones((width, width), dtype=np.bool_))
        self._left = layers
        self._counts: np.ndarray | None = None

    def write(self, statistics: RouterStatistics) -> None:
        """The next layer's."""
        self._file.write(statistics.gram[self._upper].tobytes())
        self._file.write(np.ascontiguousarray(statistics.sums).tobytes())
        self._counts = statistics.counts
        self._left -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                assert self._left == 0, f"{self._left} layers are missing"
                assert self._counts is not None
                self._file.write(np.asarray(self._counts, dtype=np.float64).tobytes())


@dataclass(frozen=True)
class StatisticsReader:
    """The file of a MoE, opened.

    Attributes:
        file: where it is.
        experts: their names, in order.
        about: what the writer was told.
    """

    file: Path
    experts: tuple[str, ...]
    about: Any
    _tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, directory: Path) -> "StatisticsReader":
        """Of the MoE in a directory.

        Raises:
            CheckpointError: it has none, or it is damaged.
        """
        file = directory / STATISTICS_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{directory}: has no {STATISTICS_FILE}, so no expert can be added to it without the text of the "
                "others; build it with router.fit: ridge, lda, centroid, logistic or auto"
            )
        tensors = read_header(file)
        try:
            with file.open("rb") as opened:
                metadata = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))["__metadata__"]
            return cls(file, tuple(json.loads(metadata["experts"])), json.loads(metadata["about"]), tensors)
        except (KeyError, ValueError, TypeError) as e:
            raise CheckpointError(f"{file}: is not as solera writes it: {e!r}") from e

    def read(self, layer: int, *, experts: int) -> RouterStatistics:
        """Of one layer, with zeros for those experts (of `experts` in all) that are new.

        Raises:
            CheckpointError: the file lacks the layer, or a value is NaN or infinite.
        """
        packed, old_ED, old_E = (
            self._read(name) for name in (f"layers.{layer}.gram", f"layers.{layer}.sums", "counts")
        )
        width = old_ED.shape[1]
        gram_DD = np.zeros((width, width))
        upper = np.triu(np.ones((width, width), dtype=np.bool_))
        gram_DD[upper] = packed
        gram_DD = np.triu(gram_DD) + np.triu(gram_DD, 1).T
        sums_ED, counts_E = np.zeros((experts, width)), np.zeros(experts)
        sums_ED[: len(old_ED)], counts_E[: len(old_E)] = old_ED, old_E
        return RouterStatistics(gram_DD, sums_ED, counts_E)

    def counts(self) -> np.ndarray:
        """(E,) tokens of every expert's text."""
        return self._read("counts")

    def _read(self, name: str) -> np.ndarray:
        if name not in self._tensors:
            raise CheckpointError(f"{self.file}: has no {name}")
        info = self._tensors[name]
        values = np.fromfile(self.file, dtype="<f8", count=info.size, offset=info.begin).reshape(info.shape)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.file}: {name} holds values that are NaN or infinite")
        return values


def statistics_bytes(*, layers: int, width: int, experts: Sequence[str], about: Any) -> int:
    """Size of the file that `StatisticsWriter` makes of the same arguments."""
    header, data = _header(layers, width, experts, about)
    return len(header) + data


def _header(layers: int, width: int, experts: Sequence[str], about: Any) -> tuple[bytes, int]:
    """The beginning of the file, and the bytes that follow."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.gram": (width * (width + 1) // 2,),
            f"layers.{layer}.sums": (len(experts), width),
        }
    shapes["counts"] = (len(experts),)
    header: dict[str, Any] = {
        "__metadata__": {"experts": json.dumps(list(experts)), "about": json.dumps(about, sort_keys=True)}
    }
    begin = 0
    for name, shape in shapes.items():
        end = begin + 8 * math.prod(shape)
        header[name] = {"dtype": "F64", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begin
