"""How much memory a merge may take, and a gate that keeps the threads within it."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Budget", "default_memory_bytes", "keep_freed_memory"]

_MOST = 2 << 30
_LEAST = 256 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 64 << 20


def default_memory_bytes() -> int:
    """A quarter of the memory that is free (control groups count), at most 2 GiB, at least 256 MiB."""
    return max(min(_free_bytes() // 4, _MOST), _LEAST)


def _free_bytes() -> int:
    lines = _lines(Path("/proc/meminfo"))
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for folder, most_name, used_name in _control_groups():
        most, used = _lines(folder / most_name), _lines(folder / used_name)
        if most and used and most[0].isdigit():
            free.append(max(int(most[0]) - int(used[0]), 0))
    return min(free, default=4 * _MOST)


def _control_groups() -> Iterator[tuple[Path, str, str]]:
    """(folder, file of the limit, file of the use) of this process's group and those above it, versions 1 and 2."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif not controllers:
            top, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            yield top / folder, *names


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def keep_freed_memory() -> None:
    """Have the C library keep what a block's temporaries freed for the next block, instead of giving it back.

    glibc gives arrays of a few hundred KB back to the system when they are freed, and every one that follows is paged
    in anew: measured 20 ns an element of `task_arithmetic` in NumPy, against 1.7 ns. At most 64 MB a thread are kept.
    It concerns the whole process; other C libraries have no such call and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


class Budget:
    """Bytes that several threads share: whoever would exceed them waits until another has finished."""

    def __init__(self, total_bytes: int) -> None:
        self._free = total_bytes
        self._total = total_bytes
        self._changed = threading.Condition()

    @contextmanager
    def take(self, need_bytes: int) -> Iterator[None]:
        """Hold `need_bytes` (never more than all there are) while the body runs."""
        need = min(need_bytes, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= need)
            self._free -= need
        try:
            yield
        finally:
            with self._changed:
                self._free += need
                self._changed.notify_all()
