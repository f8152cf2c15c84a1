"""What every stage gets besides its own settings: where names resolve, the seed, the permissions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from solera_core.progress import Progress, Silent

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """The surroundings of one stage run.

    Attributes:
        seed: root of all randomness of the stage.
        base_dir: relative paths in a recipe (models and data) resolve against it.
        models: finished stages by name; a model reference that equals a name means that directory.
        overwrite: an existing target may be replaced (atomically, at the end).
        allow_pickle: `.bin` weights may be read, through torch's weights_only loader.
        trust_remote_code: Python code inside a checkpoint may run. Never a default.
        threads: worker threads (None: as many as there are cores).
        memory_bytes: bound of the anonymous memory of a merge (None: a quarter of what is free, at most 2 GiB).
        reload_check: what was written is loaded through transformers, unless it is proved to load.
        attest: every byte of the inputs is hashed; else large ones are identified by their headers and by samples.
        compat: reproduce the bytes of another tool, its rounding included: `mergekit`; None: the most exact result.
        device: where the hot merge methods compute: `cpu`, `cuda`, `cuda:1`, `mps`.
        flush: outputs are on the disk, not only in the system's cache, before they get their name.
        progress: where to report.
    """

    seed: int = 0
    base_dir: Path = Path()
    models: Mapping[str, Path] = field(default_factory=dict[str, Path])
    overwrite: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False
    threads: int | None = None
    memory_bytes: int | None = None
    reload_check: bool = True
    attest: bool = False
    compat: str | None = None
    device: str = "cpu"
    flush: bool = True
    progress: Progress = field(default_factory=Silent)
