"""Random masks that a block can draw for itself: counter-based, so block size, threads and order never matter."""

import hashlib
import json

import numpy as np
import numpy.typing as npt

__all__ = ["bernoulli", "key", "split_key", "threshold", "words"]

_WORDS = 4  # a counter step


def key(seed: int, tensor: str, model: str) -> int:
    """The 128-bit key of one (seed, output tensor, model reference)."""
    identity = json.dumps([seed, tensor, model]).encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=16).digest(), "little")


def split_key(key: int) -> tuple[np.uint64, np.uint64]:
    """The generator's 64-bit key and the upper half of its counter, that a 128-bit key stands for."""
    return np.uint64(key & (1 << 64) - 1), np.uint64(key >> 64)


def words(key: int, start: int, n: int) -> npt.NDArray[np.uint32]:
    """Elements [start, start + n) of the infinite sequence of uniform 32-bit words of `key`, [n] uint32.

    Element i is word i mod 4 of step i div 4 of Philox4x32-10 (SC 2011).

    Example:
        >>> bool((words(7, 0, 100)[40:60] == words(7, 40, 20)).all())
        True
    """
    from solera_merge.kernels.philox import philox_words

    skip = start % _WORDS
    out = np.empty(-(-(skip + n) // _WORDS) * _WORDS, np.uint32)
    philox_words(*split_key(key), np.uint64(start // _WORDS), out)
    return out[skip : skip + n]


def threshold(probability: float) -> int:
    """A word below this number happens with `probability`, exact to 2^-33; 2^32: always."""
    return round(probability * 2**32)


def bernoulli(key: int, start: int, n: int, probability: float) -> npt.NDArray[np.bool_]:
    """Elements [start, start + n) of the infinite Bernoulli(probability) sequence of `key`, [n] bool.

    Example:
        >>> bool((bernoulli(7, 0, 100, 0.5)[40:60] == bernoulli(7, 40, 20, 0.5)).all())
        True
    """
    limit = threshold(probability)
    if limit >= 2**32:
        return np.ones(n, dtype=np.bool_)
    return words(key, start, n) < np.uint32(limit)
