"""The plan of a stage as pure data: what `--dry-run` prints before a byte of weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What a stage will do.

    Attributes:
        stage: its kind (`merge`, `moe`, `tune`, ...).
        reads: one mapping an input: `what` (the reference as written), `path`, `bytes`, and what else helps.
        writes: one mapping an output file: `what`, `bytes`.
        memory_bytes: estimated peak of anonymous memory above the interpreter.
        disk_bytes: free disk space needed at the target.
        parameters: every resolved parameter, defaults included.
        rows: optional detail table (a merge: one row a tensor), each row a flat mapping with equal keys.
        warnings: what a careful person would want to know first.
    """

    stage: str
    reads: Sequence[Mapping[str, Any]]
    writes: Sequence[Mapping[str, Any]]
    memory_bytes: int
    disk_bytes: int
    parameters: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    warnings: Sequence[str] = field(default_factory=list[str])

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable mapping of the whole plan."""
        return asdict(self)

    def renamed(self, old: str, new: str) -> "Plan":
        """The plan with one path in place of another, wherever it is named."""

        def rename(value: Any) -> Any:
            if isinstance(value, str):
                return value.replace(old, new)
            if isinstance(value, Mapping):
                return {key: rename(item) for key, item in value.items()}
            return [rename(item) for item in value] if isinstance(value, (list, tuple)) else value

        return Plan(**rename(self.to_json()))
