"""A target directory either does not exist, or is whole.

Every stage writes into a staging directory beside its target and renames it at the end. The staging directory
is locked while in use (two runs into one target: the second is refused), wiped when a run fails, and, after a kill,
either wiped or, when its `resume_key` is the same, handed over to the next run.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from solera_core.errors import DiskFullError, ResourceError, TargetError

__all__ = ["check_apart", "check_target", "disk_errors", "fsync_tree", "require_disk", "staged"]

RESUME_KEY_FILE = ".resume-key"
_FULL = {
    errno.ENOSPC: "the disk filled up while writing",
    errno.EDQUOT: "the disk quota was used up while writing",
    errno.EFBIG: "a file grew beyond what is allowed (see `ulimit -f`, or the limits of the file system)",
}
_BROKEN = (
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTCONN,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
)  # the disk, or the mount, under the target is gone
_MARKS = ("solera.json", "results.json", "run.json")


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that is in the way, before any work.

    Raises:
        TargetError: it exists and is not empty and `overwrite` is off; or it is no directory; or it is a directory
            that solera did not make (replacing it could destroy something else); or nothing can be made beside it; or
            it cannot be looked at.
    """
    try:
        beside = _existing(target.parent)
        if not beside.is_dir() or not os.access(beside, os.W_OK | os.X_OK):
            raise TargetError(f"{target}: cannot be written: {beside} is not a directory that you may write to")
        _check_target(target, overwrite=overwrite)
    except OSError as e:
        raise TargetError(f"{target}: cannot be read: {e.strerror}; choose another output path") from e


def _check_target(target: Path, *, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise TargetError(f"{target}: exists and is not a plain directory; choose another output path")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise TargetError(f"{target}: exists and is not empty; choose another output path or pass --overwrite")
    if not any((target / mark).exists() for mark in _MARKS):
        raise TargetError(
            f"{target}: holds none of {', '.join(_MARKS)}, so it was not made by solera; "
            "--overwrite will not replace it"
        )


def check_apart(target: Path, models: Sequence[Path], data: Iterable[Path] = ()) -> None:
    """Refuse a target that is, holds or lies in the directory of a model that is read, or is or holds its text.

    Raises:
        TargetError: naming both.
    """
    place = target.resolve()
    for model in models:
        if place == model.resolve() or model.resolve() in place.parents:
            where = "is" if place == model.resolve() else "lies in"
            raise TargetError(f"{target}: {where} the directory of the input {model}; choose another output path")
    for source in (*models, *data):
        if place == source.resolve() or place in source.resolve().parents:
            raise TargetError(f"{target}: holds the input {source}, which it would replace; choose another output path")


def require_disk(target: Path, needed_bytes: int, *, downloads: Mapping[Path, int] | None = None) -> None:
    """Raise DiskFullError when the file system that will hold `target` has less than `needed_bytes` free.

    What a killed run into the same target left behind counts as free: it is gone on with, or removed. `downloads` are
    the bytes that other directories will hold besides (a cache), wherever they are: what shares a file system is
    counted together.
    """
    needs = {target: needed_bytes} | {path: n for path, n in (downloads or {}).items() if n}
    groups: dict[int, list[Path]] = {}
    for path in needs:
        groups.setdefault(_place(path, target).stat().st_dev, []).append(path)
    for paths in groups.values():
        existing = _place(paths[0], target)
        free = shutil.disk_usage(existing).free + (_held_bytes(_staging_of(target)) if target in paths else 0)
        needed = sum(needs[path] for path in paths)
        if free < needed:
            parts = "" if len(paths) == 1 else f" ({', '.join(f'{needs[p] / 1e9:.3f} for {p}' for p in paths)})"
            way_out = "choose an output path" if target in paths else "set HF_HOME to a place"
            raise DiskFullError(
                f"{paths[0]}: needs {needed / 1e9:.3f} GB{parts}, but only {free / 1e9:.3f} GB are free on {existing}; "
                f"free some space or {way_out} on another disk"
            )


def _place(path: Path, target: Path) -> Path:
    """A folder on the file system that will hold `path`; a target is made beside itself."""
    return _existing(path.parent if path == target else path)


def _existing(path: Path) -> Path:
    """The path, or the closest folder above it that exists."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's `no space left`, `quota exceeded` and `file too large` into DiskFullError."""
    try:
        yield
    except OSError as e:
        if (reason := _FULL.get(e.errno or 0)) is not None:
            raise DiskFullError(f"{target}: {reason}. Make room and run again") from e
        raise


def _staging_of(target: Path) -> Path:
    return target.parent / f".{target.name}.solera-staging"


def _held_bytes(directory: Path) -> int:
    """What the disk would get back with the files of a directory that may not exist."""
    held = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                held += (Path(folder) / name).lstat().st_blocks * 512
    return held


def fsync_tree(root: Path) -> None:
    """Flush every file and directory under `root` to the disk."""
    for directory, _, files in os.walk(root):
        for name in files:
            _fsync(Path(directory) / name)
        _fsync(Path(directory))


@contextmanager
def staged(
    target: Path, *, overwrite: bool = False, resume_key: str | None = None, flush: bool = True
) -> Iterator[Path]:
    """Yield a staging directory beside `target`; on a clean exit it becomes `target`, else it is removed.

    With `resume_key`, a staging directory left by a killed or interrupted run that had the same key is handed over
    with its contents (the caller must verify them); one with another key is wiped. A run that ends in an ordinary
    error is wiped too, so bad input leaves nothing behind; KeyboardInterrupt and kills leave a resumable staging.
    Without `flush` a power cut soon after the end can lose the output (a kill cannot).

    Raises:
        TargetError: the target is in the way, or another run is writing to it.
        DiskFullError: the disk, the quota or the file size limit was exceeded while the body or the final flush wrote.
        ResourceError: the disk failed, or is not there any more.
    """
    check_target(target, overwrite=overwrite)
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock_file = target.parent / f".{target.name}.solera-lock"
        lock = _lock(lock_file, target)
    except OSError as e:
        raise TargetError(f"{target}: cannot be written: {e.strerror}") from e
    staging = _staging_of(target)
    try:
        key_file = staging / RESUME_KEY_FILE
        if staging.exists() and not (resume_key and key_file.exists() and key_file.read_bytes() == resume_key.encode()):
            shutil.rmtree(staging)
        keep = False
        try:
            staging.mkdir(exist_ok=True)
            if resume_key:
                key_file.write_text(resume_key)
            yield staging
            key_file.unlink(missing_ok=True)
            if flush:
                fsync_tree(staging)
            _become(staging, target, overwrite=overwrite)
        except KeyboardInterrupt:
            keep = resume_key is not None
            raise
        except OSError as e:
            if (reason := _FULL.get(e.errno or 0)) is not None:
                raise DiskFullError(f"{target}: {reason}; nothing was left behind. Make room and run again") from e
            if e.errno in _BROKEN:
                raise ResourceError(
                    f"{target}: cannot be written: {e.strerror}; look after the disk or the mount, and run again"
                ) from e
            raise
        finally:
            if staging.exists() and not keep:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        # Unlinked while held: whoever waits on this inode finds out in _lock that it is no longer the one on disk.
        lock_file.unlink(missing_ok=True)
        os.close(lock)
        for folder in made:  # a failed run leaves no empty parents behind either
            with contextlib.suppress(OSError):
                folder.rmdir()
    # After the lock is gone, so that a kill during a slow flush leaves no lock file beside the target.
    try:
        _fsync(target.parent)
    except OSError as e:
        raise ResourceError(
            f"{target}: is complete, but {target.parent} cannot be flushed: {e.strerror}; look after the disk"
        ) from e


def _lock(lock_file: Path, target: Path) -> int:
    """The descriptor of the lock file, held exclusively."""
    while True:
        lock = os.open(lock_file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open and flock a finishing run may have unlinked the file: that lock guards nothing any more.
            with contextlib.suppress(FileNotFoundError):
                if lock_file.stat().st_ino == os.fstat(lock).st_ino:
                    return lock
        except BlockingIOError as e:
            os.close(lock)
            raise TargetError(f"{target}: another run is writing to it; wait for it or choose another output") from e
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _become(staging: Path, target: Path, *, overwrite: bool) -> None:
    check_target(target, overwrite=overwrite)  # it may have appeared meanwhile
    if target.exists() and any(target.iterdir()):
        _exchange(staging, target)  # the old output now stands in staging, and is removed by the caller
        shutil.rmtree(staging)
    else:
        if target.exists():
            target.rmdir()
        staging.rename(target)


def _exchange(a: Path, b: Path) -> None:
    """Swap two directories in one step (Linux renameat2), so that no moment is without a whole target."""
    at_fdcwd, rename_exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise ResourceError(f"{b}: this system cannot replace a directory atomically; remove it yourself first")
    if libc.renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) != 0:
        code = ctypes.get_errno()
        raise ResourceError(f"{b}: cannot be replaced atomically: {os.strerror(code)}; remove it yourself first")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot flush a directory
            raise
    finally:
        os.close(descriptor)
