"""Faults seen from the command line: the exit code, one message that says what to do, and nothing left behind."""

import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from solera.cli import main

COMMAND = [sys.executable, "-m", "solera"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.fixture
def config(siblings: dict[str, Path], tmp_path: Path) -> Path:
    file = tmp_path / "merge.yml"
    models = [{"model": str(siblings[m]), "parameters": {"weight": 1}} for m in "ab"]
    file.write_text(json.dumps({"merge_method": "linear", "models": models}))
    return file


def nothing_at(out: Path) -> bool:
    return not [p.name for p in out.parent.iterdir() if out.name in p.name]


def bytes_of(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


@pytest.fixture
def undisturbed(config: Path, tmp_path: Path) -> dict[str, str]:
    """The bytes that the merge of `config` has to give."""
    assert main(["merge", str(config), str(tmp_path / "undisturbed"), "-q"]) == 0
    return bytes_of(tmp_path / "undisturbed")


SLOW = """
import os, sys, time
real = os.preadv
def preadv(*arguments):
    time.sleep(0.05)
    return real(*arguments)
os.preadv = preadv
from solera.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(*arguments: str, program: str | None = None) -> "subprocess.Popen[str]":
    """The command line in a process of its own; or a program that calls it, such as `SLOW`."""
    command = [sys.executable, "-c", program] if program else COMMAND
    return subprocess.Popen(
        [*command, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended too early: {process.communicate()}")
        time.sleep(0.005)


def finished_tensors(out: Path) -> int:
    journal = out.parent / f".{out.name}.solera-staging" / ".finished-tensors"
    return len(journal.read_text().splitlines()) if journal.exists() else 0


def test_too_little_disk_is_found_before_work(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("solera_core.staging.shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert main(["merge", str(config), str(tmp_path / "out"), "-q"]) == 4
    assert "free some space" in capsys.readouterr().err
    assert nothing_at(tmp_path / "out")


def _small_files() -> None:
    """No file may grow past 20 kB; the process is told so by an error, not killed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_disk_that_fills_up_while_writing(config: Path, tmp_path: Path) -> None:
    """The kernel refuses to let any file grow past 20 kB, as a full disk would."""
    done = subprocess.run(
        [*COMMAND, "merge", str(config), str(tmp_path / "out"), "-q"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=_small_files,
    )
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert nothing_at(tmp_path / "out")


def test_kill_at_any_moment_leaves_the_target_absent_or_whole(config: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    subprocess.run([*COMMAND, "merge", str(config), str(tmp_path / "first"), "-q"], check=True)
    whole_s = time.monotonic() - started
    seen = set()
    for i in range(6):
        out = tmp_path / f"killed{i}"
        process = subprocess.Popen([*COMMAND, "merge", str(config), str(out), "-q"])
        time.sleep(whole_s * (i + 0.7) / 6)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.add(out.exists())
        if out.exists():
            assert main(["verify", str(out), "-q"]) == 0
        else:
            assert main(["merge", str(config), str(out), "-q"]) == 0  # the next run starts clean
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "first" / "model.safetensors").read_bytes()
        if (tmp_path / f".killed{i}.solera-lock").exists():
            # Killed between the rename and the unlink of the lock, which locks nothing now: the next run removes it.
            assert main(["merge", str(config), str(out), "--overwrite", "-q"]) == 0
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(f".killed{i}")] == []
    assert False in seen  # at least one kill came before the end


COUNTING = """
import sys
from solera_merge import engine
real, merged = engine.merge_tensor, []
def merge_tensor(tensor, *arguments, **options):
    real(tensor, *arguments, **options)
    merged.append(tensor.name)
engine.merge_tensor = merge_tensor
from solera.cli import main
code = main(sys.argv[1:])
print(len(merged))
sys.exit(code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal(config: Path, tmp_path: Path, undisturbed: dict[str, str], number: signal.Signals) -> None:
    """In the middle of a merge: the target stays absent, and the next run goes on and ends with the same bytes."""
    out = tmp_path / "out"
    process = start("merge", str(config), str(out), "-q", program=SLOW)
    wait_until(lambda: finished_tensors(out) >= 3, process)
    process.send_signal(number)
    _, errors = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert errors == "solera: interrupted; run the same command again to go on\n"
        assert not (tmp_path / ".out.solera-lock").exists()
    else:
        assert process.returncode == -signal.SIGTERM
    assert not out.exists()
    done = finished_tensors(out)
    assert done >= 3
    again = start("merge", str(config), str(out), "-q", program=COUNTING)
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    tensors = json.loads((out / "solera.json").read_text())["tensors"]
    assert int(output.splitlines()[-1]) == len(tensors) - done
    assert bytes_of(out) == undisturbed
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == ["out"]


# Two runs into one target


def test_a_second_run_into_the_same_target(config: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """The first is held in the middle of its work while the second one runs."""
    out = tmp_path / "out"
    first = start("merge", str(config), str(out), "-q", program=SLOW)
    wait_until(lambda: finished_tensors(out) >= 1, first)
    first.send_signal(signal.SIGSTOP)
    try:
        for more in ([], ["--overwrite"]):
            second = start("merge", str(config), str(out), "-q", *more)
            _, errors = second.communicate()
            assert second.returncode == 3
            assert errors == f"solera: {out}: another run is writing to it; wait for it or choose another output\n"
    finally:
        first.send_signal(signal.SIGCONT)
    _, errors = first.communicate()
    assert first.returncode == 0, errors
    assert bytes_of(out) == undisturbed
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == ["out"]


def test_four_runs_at_once(config: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    out = tmp_path / "out"
    runs = [start("merge", str(config), str(out), "-q") for _ in range(4)]
    ends = [(run.communicate()[1], run.returncode) for run in runs]
    assert sorted(code for _, code in ends) == [0, 3, 3, 3]
    for errors, code in ends:
        refusals = ("another run is writing to it", "exists and is not empty")
        assert code == 0 or any(f"solera: {out}: {reason}" in errors for reason in refusals), errors
    assert bytes_of(out) == undisturbed
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == ["out"]


# Real file systems


Mounted = Callable[..., "subprocess.CompletedProcess[str]"]
IN_A_MOUNT = """
mount -t tmpfs -o "$1" none "$2" || exit 99
disk="$2"; shift 2
"$@"; code=$?
echo "left: $(ls -A "$disk")"
exit $code
"""


@pytest.fixture
def mounted(tmp_path: Path) -> Mounted:
    """`mounted(options, *command)`: run a command that sees a small file system of its own at tmp_path/disk.

    What is left there when it ends is the last line of its output. The mount is private to the command.
    """
    (tmp_path / "disk").mkdir()
    flags = ["-m"] if os.geteuid() == 0 else ["-Urm"]

    def run(options: str, *command: str) -> "subprocess.CompletedProcess[str]":
        words = ["unshare", *flags, "sh", "-c", IN_A_MOUNT, "sh", options, str(tmp_path / "disk"), *command]
        return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    if shutil.which("unshare") is None:
        pytest.skip("file systems cannot be mounted here: there is no unshare command")
    tried = run("size=1m", "true")
    if tried.returncode != 0:
        pytest.skip(f"file systems cannot be mounted here: {tried.stderr.strip()}")
    return run


def disk_bytes(config: Path, capsys: pytest.CaptureFixture[str]) -> int:
    assert main(["merge", str(config), "anywhere", "--dry-run", "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return int(content["disk_bytes"])


FULL = """
import errno, os, shutil, sys
usage = shutil.disk_usage("/")
shutil.disk_usage = lambda _: usage._replace(free=10**12)  # as where a quota is in force
if {late}:
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    os.posix_fallocate = unsupported  # as on a file system that cannot reserve
from solera.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("found", ["before any work", "when space is reserved", "while weights are written"])
def test_a_small_disk(
    config: Path,
    tmp_path: Path,
    mounted: Mounted,
    found: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "SOLERA_TRACEBACK", "1")
    small = disk_bytes(config, capsys) * 2 // 3
    program = FULL.format(late=found == "while weights are written")
    command = COMMAND if found == "before any work" else [sys.executable, "-c", program]
    out = tmp_path / "disk" / "new" / "out"
    done = mounted(f"size={small}", *command, "merge", str(config), str(out), "-q")
    assert done.returncode == 4, done.stderr
    where, said = {
        "before any work": ("require_disk", "free some space"),
        "when space is reserved": ("_allocate", "the disk filled up while writing; nothing was left behind"),
        "while weights are written": ("_pwrite", "the disk filled up while writing; nothing was left behind"),
    }[found]
    assert f"in {where}\n" in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"solera: {out}: ")
    assert said in message
    assert done.stdout == "left: \n"


KILL_AND_RESUME = """
import os, signal, subprocess, sys, time
from pathlib import Path
slow, config, out = sys.argv[1:]
journal = Path(out).parent / ".out.solera-staging" / ".finished-tensors"
process = subprocess.Popen([sys.executable, "-c", slow, "merge", config, out, "-q"])
while not (journal.exists() and journal.read_text().count("\\n") >= 3):
    assert process.poll() is None
    time.sleep(0.005)
process.send_signal(signal.SIGKILL)
process.wait()
sys.exit(subprocess.run([sys.executable, "-m", "solera", "merge", config, out, "-q"]).returncode)
"""


def test_a_killed_run_goes_on_where_only_one_output_fits(
    config: Path, tmp_path: Path, mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    size = disk_bytes(config, capsys) * 3 // 2
    arguments = (SLOW, str(config), str(tmp_path / "disk" / "out"))
    done = mounted(f"size={size}", sys.executable, "-c", KILL_AND_RESUME, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "left: out"


def test_a_read_only_file_system(config: Path, tmp_path: Path, mounted: Mounted) -> None:
    out = tmp_path / "disk" / "out"
    done = mounted("ro", *COMMAND, "merge", str(config), str(out), "-q")
    assert done.returncode == 3
    assert done.stderr == f"solera: {out}: cannot be written: Read-only file system\n"
    assert done.stdout == "left: \n"


NOBODY = """
import os, sys
from solera.cli import main
if os.geteuid() == 0:
    main([*sys.argv[1:], "--dry-run"])  # so that what is imported late is there: it may be of root alone
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def public(siblings: dict[str, Path]) -> Iterator[Path]:
    """A directory that everybody may read, with two models, a recipe, and a directory that nobody may write."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for model in "ab":
            shutil.copytree(siblings[model], root / model)
        models = [{"model": str(root / m), "parameters": {"weight": 1}} for m in "ab"]
        (root / "merge.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
        for path in root.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (root / "closed").mkdir(mode=0o555)
        (root / "secret").mkdir()
        (root / "secret" / "x").mkdir()
        (root / "secret").chmod(0)
        yield root
        (root / "secret").chmod(0o755)


@pytest.mark.parametrize(
    ("out", "said"),
    [("closed/out", "cannot be written: Permission denied"), ("secret/x/out", "cannot be read: Permission denied")],
)
def test_a_target_without_permission(public: Path, out: str, said: str) -> None:
    process = start("merge", str(public / "merge.yml"), str(public / out), "-q", program=NOBODY)
    _, errors = process.communicate()
    assert process.returncode == 3, errors
    assert errors.startswith(f"solera: {public / out}: {said}")
    assert list((public / "closed").iterdir()) == []


def test_an_input_without_permission(public: Path) -> None:
    file = public / "b" / "model.safetensors"
    file.chmod(0)
    (public / "open").mkdir()
    (public / "open").chmod(0o777)
    process = start("merge", str(public / "merge.yml"), str(public / "open" / "out"), "-q", program=NOBODY)
    _, errors = process.communicate()
    assert process.returncode == 3, errors
    assert errors == f"solera: {file}: cannot be read: Permission denied\n"
    assert list((public / "open").iterdir()) == []
    file.chmod(stat.S_IRUSR)


def test_a_path_with_one_slash(siblings: dict[str, Path], tmp_path: Path) -> None:
    """`models/a` looks like a name on the hub. The hub is not asked: not for the model, not for a card."""
    for model in "ab":
        shutil.copytree(siblings[model], tmp_path / "models" / model)
    models = [{"model": f"models/{m}", "parameters": {"weight": 1}} for m in "ab"]
    (tmp_path / "merge.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    unreachable = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [*COMMAND, "merge", "merge.yml", "out", "-q"],
        cwd=tmp_path,
        env=ENVIRONMENT | unreachable,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert main(["verify", str(tmp_path / "out"), "-q"]) == 0


def test_no_tokenizer(
    siblings: dict[str, Path], tmp_path: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(siblings["a"], bare, ignore=lambda _, names: [n for n in names if "token" in n])
    data = write_jsonl(tmp_path / "x.jsonl", [{"text": "a few words"}])
    recipe = tmp_path / "tune.yml"
    recipe.write_text(json.dumps({"model": str(bare), "data": str(data), "tokens": 100}))
    assert main(["tune", str(recipe), str(tmp_path / "out"), "-q"]) == 3
    assert "tokenizer" in capsys.readouterr().err
    suite = tmp_path / "suite.yml"
    suite.write_text(json.dumps({"suite": "s", "tasks": [{"name": "t", "kind": "text", "data": str(data)}]}))
    assert main(["eval", str(bare), "--suite", str(suite), "--out", str(tmp_path / "ev"), "-q"]) == 3
    assert "tokenizer" in capsys.readouterr().err
    assert nothing_at(tmp_path / "out")
    assert nothing_at(tmp_path / "ev")


def test_code_in_a_checkpoint_does_not_run(
    siblings: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "coded"
    shutil.copytree(siblings["a"], model)
    content = json.loads((model / "config.json").read_text())
    content["auto_map"] = {"AutoModelForCausalLM": "modeling.Evil"}
    (model / "config.json").write_text(json.dumps(content))
    (model / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    file = tmp_path / "m.yml"
    models = [{"model": str(m), "parameters": {"weight": 1}} for m in (model, siblings["b"])]
    file.write_text(json.dumps({"merge_method": "linear", "models": models}))
    assert main(["merge", str(file), str(tmp_path / "out"), "-q"]) == 3
    assert "modeling.Evil" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert nothing_at(tmp_path / "out")
