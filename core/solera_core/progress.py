"""What a stage may say while it works. The command line decides how it looks; a library call is silent."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Progress", "Silent", "Task"]


class Task(Protocol):
    """One piece of long work."""

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Say that `amount` more units are done; `note` is a short current figure, e.g. `loss 2.31`."""
        ...


class Progress(Protocol):
    """Where a stage reports to."""

    def task(self, title: str, total: float, unit: str = "") -> AbstractContextManager[Task]:
        """Open a piece of work of `total` units (`bytes`, `tokens`, `items`)."""
        ...

    def note(self, message: str) -> None:
        """One line for the person watching."""
        ...


class _SilentTask:
    def advance(self, amount: float = 1.0, note: str = "") -> None:
        del amount, note


class Silent:
    """Reports nothing."""

    @contextmanager
    def task(self, title: str, total: float, unit: str = "") -> Iterator[Task]:
        """A task that nobody watches."""
        del title, total, unit
        yield _SilentTask()

    def note(self, message: str) -> None:
        """Say nothing."""
        del message
