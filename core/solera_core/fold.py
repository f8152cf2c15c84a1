"""A checkpoint written out again as plain files: adapters folded in, tensors renamed or left out, sidecars copied."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import FLOATS
from solera_core.output import write_metadata
from solera_core.writer import CheckpointWriter, TensorSpec

__all__ = ["loadable", "write_folded"]

_BLOCK: Final = 1 << 22  # elements copied at a time


@contextlib.contextmanager
def loadable(checkpoint: Checkpoint, scratch: Path | None = None) -> Iterator[Path]:
    """A directory that transformers can load: the model's own; under an adapter one that is written for the while.

    Args:
        checkpoint: to be loaded.
        scratch: a folder on whose disk it is written (default: the system's own for temporary files).
    """
    if not any(checkpoint.is_derived(name) for name in checkpoint.tensors):
        yield checkpoint.path
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".folded-") as folder:
        write_folded(checkpoint, Path(folder) / "model")
        yield Path(folder) / "model"


def write_folded(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    names: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint into a new `directory`, byte for byte; what an adapter changes is rounded to its dtype.

    Args:
        checkpoint: to be written.
        directory: must not exist.
        names: of the tensors to write, old to new (default: all, as they are called).
        config: content of config.json (default: the checkpoint's).
    """
    names = names if names is not None else {name: name for name in checkpoint.tensors}
    specs = [
        TensorSpec(new, checkpoint.tensors[old].dtype, checkpoint.tensors[old].shape) for old, new in names.items()
    ]
    directory.mkdir()
    with CheckpointWriter(directory, specs) as writer:
        for old, new in names.items():
            info = checkpoint.tensors[old]
            for at in range(0, info.size, _BLOCK):
                stop = min(at + _BLOCK, info.size)
                if checkpoint.is_derived(old) and info.dtype in FLOATS:
                    writer.write_flat(new, at, checkpoint.read_flat(old, at, stop))
                else:
                    writer.write_raw(new, at, checkpoint.read_raw(old, at, stop))
        writer.finish()
    write_metadata(directory, config=config if config is not None else checkpoint.config, sidecars=checkpoint.sidecars)
