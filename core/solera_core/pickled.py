"""`.bin` weights: pickles, opened by torch's weights-only loader, which builds tensors and runs nothing.

The files are mapped, not loaded, so ranges can be read from models larger than the memory (files in torch's format from
before version 1.6 cannot be mapped and are loaded whole).
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from solera_core.architecture import is_embedding, is_head
from solera_core.errors import CheckpointError
from solera_core.headers import TensorInfo
from solera_core.shards import Weights, compare_index

__all__ = ["PickledSource"]

_NAMES: Final = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class PickledSource:
    """Reads ranges of tensors in `.bin` files.

    Args:
        weights: the files.
        bare: a state dict of which no more is known: it may lie under `state_dict`, as trainers save it, and every
            tensor of it is read. Else an output head that shares the embedding's memory is left out.
    """

    def __init__(self, weights: Weights, *, bare: bool = False) -> None:
        self._flat: dict[str, torch.Tensor] = {}
        tensors: dict[str, TensorInfo] = {}
        places: dict[str, tuple[int, tuple[int, ...]]] = {}
        for file in weights.files:
            for name, tensor in _load(file, bare=bare).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{file}: tensor {name!r} is also in {tensors[name].file.name}; the shards are of two models"
                    )
                tensors[name] = _info(file, name, tensor)
                places[name] = (tensor.data_ptr(), tuple(tensor.shape))
                self._flat[name] = tensor.detach().contiguous().view(-1)
        if weights.weight_map is not None:
            compare_index(weights, {name: info.file.name for name, info in tensors.items()})
        embeddings = set() if bare else {places[name] for name in tensors if is_embedding(name)}
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for name, info in tensors.items() if not (is_head(name) and places[name] in embeddings)
        }

    def read_raw(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The stored bytes of elements [start, stop), a new array."""
        return np.array(self._flat[info.name][start:stop].view(torch.uint8).numpy())


def _load(file: Path, *, bare: bool) -> dict[str, torch.Tensor]:
    try:
        content: Any = _torch_load(file)
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"{file}: refused: the pickle asks for more than tensors, so it may run code when opened "
            f"({_first_line(e)}); convert it to safetensors where you trust it"
        ) from e
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as e:
        raise CheckpointError(f"{file}: truncated or not a torch file: {_first_line(e)}") from e
    if bare and isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a mapping of names to tensors")
    odd = [
        str(name) for name, value in content.items() if not isinstance(value, torch.Tensor) or not isinstance(name, str)
    ]
    if odd:
        raise CheckpointError(
            f"{file}: {odd[0]!r} is not a tensor; this looks like a training checkpoint: "
            "save its model with save_pretrained"
        )
    return dict(content)


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0]


def _torch_load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as e:
        if "mmap can only be used with files saved with" not in str(e):
            raise
        return torch.load(file, map_location="cpu", weights_only=True)


def _info(file: Path, name: str, tensor: torch.Tensor) -> TensorInfo:
    if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{file}: tensor {name!r} is {tensor.dtype}, {tensor.layout}; only plain dense tensors are read"
        )
    return TensorInfo(name, _NAMES[tensor.dtype], tuple(tensor.shape), file, 0, tensor.numel() * tensor.element_size())
