"""Compiling a kernel: plain loops over arrays, turned into machine code by numba and kept on disk.

Kernels are loops whose every step is one IEEE operation in the order that the source gives: no fast-math, no
contraction of multiply and add, so they equal the NumPy formula bit for bit. They release the GIL. Importing numba
costs 0.3 s, so modules that hold kernels are imported where they are used, never by the catalogue or the command line.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

__all__ = ["kernel"]


def _load_numba() -> Any:
    """numba, without its look for a BLAS in SciPy: 0.15 s of start-up for products that no kernel here takes.

    (Other users of numba in this process lose nothing but the BLAS in numba's own `correlate` and `convolve`.)
    """
    hidden = [name for name in ("scipy.linalg", "scipy.linalg.cython_blas") if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = cast("ModuleType", None)  # importing it raises ImportError, which numba expects
    try:
        import numba
        import numba.np.arraymath
    finally:
        for name in hidden:
            del sys.modules[name]
    return numba


numba = _load_numba()

F = TypeVar("F", bound=Callable[..., Any])


_SOURCES = tuple(
    (file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(Path(__file__).parent.glob("*.py"))
)


def kernel(function: F) -> F:
    """`function`, compiled at its first call and cached beside its source, or in the user's cache directory.

    Where neither can be written, every process compiles anew (some seconds). A cached kernel is used while no file of
    this directory has changed: kernels contain each other, and numba itself looks at the file of the outer one only.
    """
    try:
        compiled = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # numba: no locator available
        return cast("F", numba.njit(nogil=True, error_model="numpy")(function))
    index = compiled._cache._cache_file  # there is no public way to it
    index._source_stamp = (index._source_stamp, _SOURCES)
    return cast("F", compiled)
