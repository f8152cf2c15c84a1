"""How many threads work, here and in torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["cores", "torch_threads"]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Torch computes with `count` threads (None: as many as before), and afterwards with as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
