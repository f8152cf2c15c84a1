"""Collecting what is wrong with a recipe and its models, so that a person sees all of it at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from solera_core.errors import CheckpointError, ConfigError, InputError

__all__ = ["Problems", "some"]

_SHOWN = 20


@dataclass
class Problems:
    """Findings in order; `raise_any` turns them into one error of the kind of the first."""

    found: list[InputError] = field(default_factory=list[InputError])

    def add(self, problem: InputError) -> None:
        """Note a problem that was raised elsewhere."""
        self.found += [type(problem)(line) for line in str(problem).splitlines()]
        if self.found and problem.__cause__ is not None:
            self.found[-1].__cause__ = problem.__cause__

    @contextmanager
    def collected(self) -> Iterator[None]:
        """What the body raises is noted, and the body left."""
        try:
            yield
        except InputError as e:
            self.add(e)

    def config(self, message: str) -> None:
        """Note a problem of the recipe."""
        self.found.append(ConfigError(message))

    def checkpoint(self, message: str) -> None:
        """Note a problem of a model."""
        self.found.append(CheckpointError(message))

    def raise_any(self) -> None:
        """Raise all that was found, one line each; nothing when nothing was.

        Raises:
            InputError: of the kind of the first problem.
        """
        if not self.found:
            return
        lines = list(dict.fromkeys(str(problem) for problem in self.found))
        if len(lines) > _SHOWN:
            lines = [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more problems"]
        raise type(self.found[0])("\n".join(lines)) from self.found[0].__cause__


def some(names: list[str], limit: int = 3) -> str:
    """`'a', 'b', 'c' and 7 more`."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
