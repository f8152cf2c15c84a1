"""Random masks that a block can draw for itself: counter-based, so block size, threads and order never matter."""

import hashlib
import json

import numpy as np
import numpy.typing as npt

__all__ = ["bernoulli", "key"]

_WORDS = 8  # 32-bit words a Philox4x64 counter step gives


def key(seed: int, tensor: str, model: str) -> int:
    """The 128-bit Philox key of one (seed, output tensor, model reference)."""
    identity = json.dumps([seed, tensor, model]).encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=16).digest(), "little")


def bernoulli(key: int, start: int, n: int, probability: float) -> npt.NDArray[np.bool_]:
    """Elements [start, start + n) of the infinite Bernoulli(probability) sequence of `key`, [n] bool.

    Element i compares the i-th 32-bit word of the Philox4x64-10 stream with probability * 2^32, so the probability is
    exact to 2^-33. NumPy guarantees the raw stream of a bit generator across versions (NEP 19).

    Example:
        >>> bool((bernoulli(7, 0, 100, 0.5)[40:60] == bernoulli(7, 40, 20, 0.5)).all())
        True
    """
    threshold = round(probability * 2**32)
    if threshold >= 2**32:
        return np.ones(n, dtype=np.bool_)
    skip = start % _WORDS
    stream = np.random.Philox(key=key)
    stream.advance(start // _WORDS)
    words = stream.random_raw(-(-(skip + n) // 2)).astype("<u8", copy=False).view("<u4")
    return words[skip : skip + n] < np.uint32(threshold)
