"""An expert whose feed-forward networks are scaled or made noisy while they are read (mergekit-moe's two knobs)."""

import hashlib
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from solera_core.checkpoint import Checkpoint
from solera_core.views import Derived, view
from solera_merge.moe.dense import is_ffn

__all__ = ["altered"]

_BLOCK: Final = 1 << 16  # elements drawn at a time: a range of a tensor gets the same noise however it is read


def altered(checkpoint: Checkpoint, *, residual_scale: float, noise_scale: float, seed: int, name: str) -> Checkpoint:
    """The same model with `residual_scale` on the output matrices of its feed-forward networks, and noise on all three.

    Args:
        checkpoint: as stored, of any family.
        residual_scale: factor on `down_proj`.
        noise_scale: standard deviation of normal noise, keyed by seed, expert, tensor and place; added before scaling.
        seed: root of the randomness.
        name: of the expert.
    """
    if residual_scale == 1 and noise_scale == 0:
        return checkpoint
    tensors: dict[str, str | Derived] = {}
    for tensor, info in checkpoint.tensors.items():
        scale = residual_scale if tensor.endswith("mlp.down_proj.weight") else 1.0
        changed = is_ffn(tensor) and (scale != 1 or noise_scale != 0)
        read = partial(_read, checkpoint, tensor, scale, noise_scale, f"{seed}:{name}:{tensor}")
        tensors[tensor] = Derived(info, read) if changed else tensor
    what = {"residual_scale": residual_scale, "noise_scale": noise_scale, "seed": seed, "expert": name}
    return view(checkpoint, tensors, what=what)


def _read(
    checkpoint: Checkpoint, tensor: str, scale: float, noise: float, key: str, start: int, stop: int
) -> npt.NDArray[np.float32]:
    values = checkpoint.read_flat(tensor, start, stop)
    if noise:
        for block in range(start // _BLOCK, -(-stop // _BLOCK)):
            first, last = max(start, block * _BLOCK), min(stop, (block + 1) * _BLOCK)
            number = int.from_bytes(hashlib.sha256(f"noise:{key}:{block}".encode()).digest()[:16], "little")
            drawn = np.random.Generator(np.random.Philox(key=number)).standard_normal(_BLOCK, dtype=np.float32)
            values[first - start : last - start] += np.float32(noise) * drawn[first - block * _BLOCK :][: last - first]
    return values * np.float32(scale)
