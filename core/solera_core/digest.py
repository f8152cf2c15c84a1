"""Content digests: one per tensor, and one over a whole checkpoint that no shard layout or file name can change."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from solera_core.headers import TensorInfo

__all__ = ["checkpoint_digest", "file_sha256", "json_digest", "tensor_digest"]

_BLOCK: Final = 1 << 22  # elements, or bytes of a file, a step


def tensor_digest(size: int, read: Callable[[int, int], npt.NDArray[np.uint8]]) -> str:
    """`blake3:<hex>` of the stored bytes of a tensor of `size` elements; `read(start, stop)` gives an element range."""
    hasher = blake3()
    for start in range(0, size, _BLOCK):
        hasher.update(read(start, min(start + _BLOCK, size)).data)
    return "blake3:" + hasher.hexdigest()


def json_digest(value: Any) -> str:
    """`blake3:<hex>` of the canonical JSON (sorted keys, no spaces) of a plain value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "blake3:" + blake3(text.encode()).hexdigest()


def checkpoint_digest(config: Mapping[str, Any], tensors: Iterable[TensorInfo], digests: Mapping[str, str]) -> str:
    """One digest over config and tensors (name, dtype, shape, digest of the bytes), independent of the shards."""
    return json_digest(
        {"config": config, "tensors": {t.name: [t.dtype, list(t.shape), digests[t.name]] for t in tensors}}
    )


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    hasher = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()
