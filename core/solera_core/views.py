"""A model seen differently from how it is stored: tensors renamed, left out, or computed when they are read.

Whatever lies between the files and the values is a view: LoRA adapters, dequantisation, embeddings moved to another
vocabulary, a tower of a larger model. Planner and engine see a `Checkpoint` like any other; a tensor that is only
renamed stays as fast as one that is not.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from solera_core.checkpoint import Checkpoint
from solera_core.digest import json_digest
from solera_core.errors import CheckpointError
from solera_core.headers import TensorInfo
from solera_core.ranges import RangeReader

__all__ = ["Derived", "view"]

Float32: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Derived:
    """A tensor whose value is computed when it is read.

    Attributes:
        info: dtype and shape of the value; its name and file are for messages, its offsets mean nothing.
        read: elements [start, stop) in C order as float32, 1-D, a new array. Thread-safe.
        scratch: the memory that takes besides what is returned: (bytes an element that is read, bytes in any case).
    """

    info: TensorInfo
    read: Callable[[int, int], Float32]
    scratch: tuple[int, int] = (0, 0)


def view(
    parent: Checkpoint,
    tensors: Mapping[str, str | Derived],
    *,
    what: Mapping[str, Any],
    ref: str | None = None,
    config: Mapping[str, Any] | None = None,
    sidecars: Sequence[Path] | None = None,
    directories: Sequence[Path] = (),
    notes: Sequence[str] = (),
) -> Checkpoint:
    """The same model, seen differently.

    Args:
        parent: the model.
        tensors: by their name in the view, in order: the name in `parent` of the tensor whose value it has, or how it
            is computed. What is not listed is left out.
        what: how the view differs, as JSON: part of its digest, identity and fingerprint.
        ref: what it is called (default: as the parent).
        config: content of config.json (default: the parent's).
        sidecars: tokenizer files and the like (default: the parent's).
        directories: that it is read from besides the parent's.
        notes: what a plan should say about it.
    """
    return _View(
        parent,
        tensors,
        what=what,
        ref=parent.ref if ref is None else ref,
        config=parent.config if config is None else config,
        sidecars=parent.sidecars if sidecars is None else sidecars,
        directories=directories,
        notes=notes,
    )


class _View(Checkpoint):
    def __init__(
        self,
        parent: Checkpoint,
        tensors: Mapping[str, str | Derived],
        *,
        what: Mapping[str, Any],
        ref: str,
        config: Mapping[str, Any],
        sidecars: Sequence[Path],
        directories: Sequence[Path],
        notes: Sequence[str],
    ) -> None:
        super().__init__(
            ref=ref,
            path=parent.path,
            revision=parent.revision,
            config=config,
            tensors={
                name: replace(parent.tensors[seen] if isinstance(seen, str) else seen.info, name=name)
                for name, seen in tensors.items()
            },
            source=parent._source,
            sidecars=list(sidecars),
        )
        self._parent = parent
        self._seen = dict(tensors)
        self._what = dict(what)
        self._more = tuple(directories)
        self.notes = (*parent.notes, *notes)
        shapes = {name: info.shape for name, info in self.tensors.items()}
        same = shapes == {name: info.shape for name, info in parent.tensors.items()} and self._config == parent._config
        self.as_stored = parent.as_stored and same

    @property
    def directories(self) -> tuple[Path, ...]:
        return (*self._parent.directories, *self._more)

    @property
    def missing_bytes(self) -> int:
        return self._parent.missing_bytes

    def fetch(self) -> None:
        self._parent.fetch()

    def read_flat(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        _, stop = self._range(name, start, stop)
        seen = self._seen[name]
        return self._parent.read_flat(seen, start, stop) if isinstance(seen, str) else seen.read(start, stop)

    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        _, stop = self._range(name, start, stop)
        seen = self._seen[name]
        if not isinstance(seen, str):
            raise CheckpointError(f"{self.ref}: tensor {name!r} is computed; its bytes are not stored")
        return self._parent.read_raw(seen, start, stop)

    def is_derived(self, name: str) -> bool:
        seen = self._seen.get(name)
        return self._parent.is_derived(seen) if isinstance(seen, str) else seen is not None

    def scratch(self, name: str) -> tuple[int, int]:
        seen = self._seen[name]
        if isinstance(seen, str):
            return self._parent.scratch(seen)
        below = self._parent.scratch(name) if name in self._parent.tensors else (0, 0)  # what an adapter lies on
        return seen.scratch[0] + below[0], seen.scratch[1] + below[1]

    def is_plain(self, name: str, dtypes: Collection[str]) -> bool:
        seen = self._seen[name]
        return isinstance(seen, str) and self._parent.is_plain(seen, dtypes)

    def reader(self, name: str) -> RangeReader | None:
        seen = self._seen[name]
        return self._parent.reader(seen) if isinstance(seen, str) else None

    def digest(self) -> str:
        return json_digest({"of": self._parent.digest(), "view": self._what})

    def identity(self) -> str:
        of = self._parent.identity()
        return json_digest({"of": of, "view": self._what}).replace("blake3:", f"{of.partition(':')[0]}:")

    def fingerprint(self) -> str:
        return json_digest({"of": self._parent.fingerprint(), "view": self._what})

    def require_unchanged(self) -> None:
        self._parent.require_unchanged()

    def tensor_digests(self) -> dict[str, str]:
        return self._parent.tensor_digests()
