"""A target either does not exist or is whole: errors, interrupts, kills, two runs at once, a full disk."""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from solera_core import staging as core_staging
from solera_core.errors import DiskFullError, ResourceError, TargetError
from solera_core.staging import check_apart, check_target, require_disk, staged

MARK = "solera.json"


def fill(directory: Path, text: str = "x") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARK).write_text(text)
    return directory


def run(
    target: Path,
    error: BaseException | None = None,
    *,
    overwrite: bool = False,
    key: str | None = None,
    text: str = "x",
) -> None:
    """A run that writes one file and then ends, well or in `error`."""
    with staged(target, overwrite=overwrite, resume_key=key) as staging:
        fill(staging, text)
        if error is not None:
            raise error


def left(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_a_clean_run_becomes_the_target(tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "out") as staging:
        assert not (tmp_path / "deep" / "out").exists()
        assert staging.parent == tmp_path / "deep"  # the same file system, so that a rename is enough
        fill(staging)
    assert left(tmp_path / "deep") == ["out"]
    assert left(tmp_path / "deep" / "out") == [MARK]


@pytest.mark.parametrize("exception", [ValueError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("parent", ["", "new/deeper"])
def test_a_failed_run_leaves_nothing(parent: str, exception: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(exception):
        run(tmp_path / parent / "out", exception())
    assert left(tmp_path) == []


def test_an_empty_target_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as staging:
        fill(staging)
    assert left(tmp_path / "out") == [MARK]


# What stands in the way


def test_a_full_target_is_refused_before_any_work(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(TargetError, match=r"out: exists and is not empty; .*--overwrite"), staged(tmp_path / "out"):
        pytest.fail("the body ran")
    assert (tmp_path / "out" / MARK).read_text() == "old"
    assert left(tmp_path) == ["out"]


def test_overwrite_replaces_all_of_it(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("stale")
    with staged(tmp_path / "out", overwrite=True) as staging:
        fill(staging, "new")
        assert (tmp_path / "out" / MARK).read_text() == "old"
    assert left(tmp_path / "out") == [MARK]
    assert (tmp_path / "out" / MARK).read_text() == "new"
    assert left(tmp_path) == ["out"]


def test_a_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="no"):
        run(tmp_path / "out", ValueError("no"), overwrite=True, text="new")
    assert (tmp_path / "out" / MARK).read_text() == "old"
    assert left(tmp_path) == ["out"]


def test_overwrite_never_destroys_what_solera_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(TargetError, match="was not made by solera"):
        check_target(tmp_path / "home", overwrite=True)


def test_files_and_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    fill(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(TargetError, match="is not a plain directory"):
            check_target(tmp_path / name, overwrite=True)


def test_a_target_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="exists and is not empty"), staged(tmp_path / "out"):
        fill(tmp_path / "out", "theirs")
    assert (tmp_path / "out" / MARK).read_text() == "theirs"
    assert left(tmp_path) == ["out"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TargetError, match="cannot be written"), staged(tmp_path / "file" / "out"):
        pytest.fail("the body ran")


def test_a_target_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be read: File name too long; choose another output path"):
        check_target(tmp_path / ("x" * 300), overwrite=False)


# The atomic exchange


def test_the_exchange_has_no_moment_without_a_whole_target(tmp_path: Path) -> None:
    """A reader that looks all the time sees the old or the new, never nothing and never a mixture."""
    target = tmp_path / "out"
    for name in ("a", "b"):
        fill(target, "0")
        (target / name).write_text("0")
    seen: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            descriptor = os.open(target, os.O_RDONLY)  # raises if there is none
            try:
                pair = []
                for name in ("a", "b"):
                    try:
                        file = os.open(name, os.O_RDONLY, dir_fd=descriptor)
                    except FileNotFoundError:  # the old one, opened just before it was replaced, is being removed
                        break
                    pair.append(os.read(file, 10).decode())
                    os.close(file)
                if len(pair) == 2:
                    seen.append("".join(pair))
            finally:
                os.close(descriptor)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for i in range(1, 10):
            with staged(target, overwrite=True) as staging:
                for name in ("a", "b", MARK):
                    staging.joinpath(name).write_text(str(i))
    finally:
        stop.set()
        thread.join()
    assert set(seen) <= {f"{i}{i}" for i in range(10)}
    assert seen


def test_a_system_without_the_exchange_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "old")
    monkeypatch.setattr(ctypes, "CDLL", lambda *a, **k: object())
    with (
        pytest.raises(ResourceError, match="cannot replace a directory atomically"),
        staged(tmp_path / "out", overwrite=True) as s,
    ):
        fill(s, "new")
    assert (tmp_path / "out" / MARK).read_text() == "old"


# Resuming


def test_an_interrupted_run_is_resumed_with_the_same_key(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", KeyboardInterrupt(), key="k", text="half")
    assert not (tmp_path / "out").exists()
    with staged(tmp_path / "out", resume_key="k") as staging:
        assert (staging / MARK).read_text() == "half"
    assert left(tmp_path / "out") == [MARK]
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("key", ["other", None])
def test_another_run_starts_clean(key: str | None, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", KeyboardInterrupt(), key="k", text="half")
    with staged(tmp_path / "out", resume_key=key) as staging:
        assert not (staging / MARK).exists()


def test_a_key_that_is_no_text_is_another_key(tmp_path: Path) -> None:
    """A power cut may leave anything in a file."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", KeyboardInterrupt(), key="k", text="half")
    (tmp_path / ".out.solera-staging" / ".resume-key").write_bytes(b"\xff\x00")
    with staged(tmp_path / "out", resume_key="k") as staging:
        assert not (staging / MARK).exists()


def test_a_run_that_failed_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad input"):
        run(tmp_path / "out", ValueError("bad input"), key="k")
    assert left(tmp_path) == []


# Two runs

RUN = """
import sys, time
from pathlib import Path
from solera_core.staging import staged
from solera_core.errors import TargetError
target, seconds, tag = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
try:
    with staged(target, overwrite=True) as staging:
        print("in", flush=True)
        for i in range(20):
            (staging / f"part-{i}").write_text(tag)
            time.sleep(seconds / 20)
        (staging / "solera.json").write_text(tag)
except TargetError as e:
    print(e, flush=True)
    sys.exit(3)
"""


def start(target: Path, seconds: float, tag: str) -> "subprocess.Popen[str]":
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(target), str(seconds), tag], env=env, stdout=subprocess.PIPE, text=True
    )


def test_the_second_of_two_runs_is_refused(tmp_path: Path) -> None:
    with start(tmp_path / "out", 30, "first") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        with (
            pytest.raises(TargetError, match="out: another run is writing to it; wait for it"),
            staged(tmp_path / "out"),
        ):
            pytest.fail("two runs in one staging directory")
        assert any(name.endswith("-staging") for name in left(tmp_path))  # the first one's, untouched
        first.kill()
    with staged(tmp_path / "out") as staging:
        assert left(staging) == []
        fill(staging)
    assert left(tmp_path) == ["out"]


def test_a_lock_that_was_unlinked_guards_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking, its holder may finish and unlink the file: the next must take a new one."""
    real = fcntl.flock
    unlinked: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        if not unlinked:
            unlinked.append(os.fstat(descriptor).st_ino)
            (tmp_path / ".out.solera-lock").unlink()
            (tmp_path / "keeps-the-inode-number-busy").write_text("")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with staged(tmp_path / "out") as staging:
        assert (tmp_path / ".out.solera-lock").exists()
        with pytest.raises(TargetError, match="another run"), staged(tmp_path / "out"):
            pytest.fail("two runs in one staging directory")
        fill(staging)
    assert unlinked


def test_many_runs_at_once(tmp_path: Path) -> None:
    """Whoever gets in, gets in alone: the target is always of one run."""
    errors: list[BaseException] = []
    done: list[str] = []
    inside = threading.Lock()

    def work(tag: str) -> None:
        for _ in range(40):
            try:
                with staged(tmp_path / "out", overwrite=True) as staging:
                    assert inside.acquire(blocking=False)
                    try:
                        assert left(staging) == []
                        fill(staging, tag)
                    finally:
                        inside.release()
                done.append(tag)
            except TargetError:
                time.sleep(0.001)
            except BaseException as e:  # handed over to the test
                errors.append(e)

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert done
    assert left(tmp_path) == ["out"]


# Kills


@pytest.mark.parametrize("old", [False, True])
def test_a_kill_at_any_moment_leaves_the_target_absent_or_whole(old: bool, tmp_path: Path) -> None:
    """A run is killed at moments spread over the time that a whole run takes; then a whole run must go through."""
    target = tmp_path / "out"
    with start(tmp_path / "measured", 0.02, "x") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        began = time.monotonic()
    whole_s = time.monotonic() - began
    shutil.rmtree(tmp_path / "measured")
    random = Random(0)
    for attempt in range(8):
        tag = f"run-{attempt}"
        if old and not target.exists():
            fill(target, "old")
        before = (target / MARK).read_text() if target.exists() else None
        with start(target, 0.02, tag) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "in\n"
            time.sleep(whole_s * (attempt + random.random()) / 7)
            process.send_signal(signal.SIGKILL)
        if not target.exists():
            assert before is None
            continue
        now = (target / MARK).read_text()
        assert now in (before, tag)
        parts = [p for p in target.iterdir() if p.name != MARK]
        assert len(parts) == (0 if now == "old" else 20)
        assert all(p.read_text() == now for p in parts)
    with staged(target, overwrite=True) as staging:
        assert left(staging) == []
        fill(staging, "last")
    assert left(target) == [MARK]
    assert left(tmp_path) == ["out"]


# A full disk


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk filled up while writing"),
        (errno.EDQUOT, "the disk quota was used up"),
        (errno.EFBIG, "a file grew beyond what is allowed"),
    ],
)
def test_a_full_disk_is_translated(code: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=f"out: {message}.*nothing was left behind"):
        run(tmp_path / "out", OSError(code, os.strerror(code)))
    assert left(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EROFS])
def test_a_disk_that_is_gone_is_no_traceback(code: int, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=f"out: cannot be written: {os.strerror(code)}; look after the disk"):
        run(tmp_path / "out", OSError(code, os.strerror(code)))
    assert left(tmp_path) == []


def fsync_that_fails(monkeypatch: pytest.MonkeyPatch, code: int, directory: Path | None) -> None:
    """Flushing `directory`, or any directory, fails."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        opened = Path(f"/proc/self/fd/{descriptor}").readlink()
        if opened == directory or (directory is None and opened.is_dir()):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_system_that_cannot_flush_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync_that_fails(monkeypatch, errno.EINVAL, None)
    run(tmp_path / "out")
    assert left(tmp_path) == ["out"]


def test_a_name_that_may_not_outlive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync_that_fails(monkeypatch, errno.EIO, tmp_path)
    with pytest.raises(ResourceError, match=r"out: is complete, but .* cannot be flushed: Input/output error"):
        run(tmp_path / "out")
    assert left(tmp_path) == ["out"]


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), staged(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no")
    assert left(tmp_path) == []


def test_space_is_asked_for_beforehand(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(DiskFullError, match=r"out: needs 1000000000\.000 GB, but only .* GB are free"):
        require_disk(tmp_path / "out", 10**18)


def test_what_shares_a_disk_is_counted_together(tmp_path: Path) -> None:
    half = shutil.disk_usage(tmp_path).free * 2 // 3
    require_disk(tmp_path / "out", half, downloads={tmp_path / "cache": 0})
    require_disk(tmp_path / "out", 0, downloads={tmp_path / "cache": half})
    with pytest.raises(DiskFullError, match=rf"out: needs .* GB \(.* for {tmp_path}/out, .* for {tmp_path}/cache\)"):
        require_disk(tmp_path / "out", half, downloads={tmp_path / "cache": half})
    with pytest.raises(DiskFullError, match=r"cache: needs 1000000000.*set HF_HOME to a place on another disk"):
        require_disk(Path("/proc/out"), 0, downloads={tmp_path / "cache": 10**18})  # two file systems


def test_a_target_that_cannot_be_made_is_found_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TargetError, match=r"out: cannot be written: .*/file is not a directory that you may write to"):
        check_target(tmp_path / "file" / "deep" / "out", overwrite=False)


def test_everything_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_fsync: Callable[[Path], None] = core_staging._fsync
    real_become = core_staging._become

    def fsync(path: Path) -> None:
        order.append(path.name)
        real_fsync(path)

    def become(staging: Path, target: Path, *, overwrite: bool) -> None:
        order.append("rename")
        real_become(staging, target, overwrite=overwrite)

    monkeypatch.setattr(core_staging, "_fsync", fsync)
    monkeypatch.setattr(core_staging, "_become", become)
    with staged(tmp_path / "out") as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text(json.dumps({}))
    assert set(order[: order.index("rename")]) == {"file", "sub", ".out.solera-staging"}
    assert order[-1] == tmp_path.name  # the directory that holds the new name


def test_a_checkpoint_that_solera_did_not_make_is_never_replaced(tmp_path: Path) -> None:
    """Any model has a config.json; only solera.json says that it can be made again."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(TargetError, match="was not made by solera"):
        check_target(tmp_path / "model", overwrite=True)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("a/base", "is the directory of the input"),
        ("link", "is the directory of the input"),
        ("a/base/out", "lies in the directory of the input"),
        ("a", "holds the input .*base"),
        ("texts", r"holds the input .*t\.jsonl"),
        ("texts/t.jsonl", r"holds the input .*t\.jsonl"),
    ],
)
def test_a_target_and_its_inputs_are_apart(target: str, message: str, tmp_path: Path) -> None:
    base, text = tmp_path / "a" / "base", tmp_path / "texts" / "t.jsonl"
    base.mkdir(parents=True)
    text.parent.mkdir()
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(TargetError, match=message):
        check_apart(tmp_path / target, [base], [text])


@pytest.mark.parametrize("target", ["a/out", "a/base2", "texts/out"])
def test_beside_its_inputs_a_target_is_welcome(target: str, tmp_path: Path) -> None:
    check_apart(tmp_path / target, [tmp_path / "a" / "base"], [tmp_path / "texts"])
    check_apart(tmp_path / "out", [], [tmp_path / "a"])
