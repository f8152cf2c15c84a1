"""Compiling a kernel: plain loops over arrays, turned into machine code by numba and kept on disk.

Kernels are loops whose every step is one IEEE operation in the order that the source gives: no fast-math, no
contraction of multiply and add, so they equal the NumPy formula bit for bit. They release the GIL. Importing numba
costs 0.3 s, so modules that hold kernels are imported where they are used, never by the catalogue or the command line.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["kernel"]

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """`function`, compiled at its first call and cached beside its source (or in the user's cache directory).

    Where neither can be written (a read-only installation without a home) it is compiled anew in every process.
    """
    try:
        return cast("F", numba.njit(cache=True, nogil=True, error_model="numpy")(function))
    except RuntimeError:  # numba: no locator available
        return cast("F", numba.njit(nogil=True, error_model="numpy")(function))
