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

import solera
from solera.cli import main
from solera_core.errors import DiskFullError

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
        env=ENVIRONMENT,
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
    subprocess.run([*COMMAND, "merge", str(config), str(tmp_path / "first"), "-q"], env=ENVIRONMENT, check=True)
    whole_s = time.monotonic() - started
    seen = set()
    for i in range(6):
        out = tmp_path / f"killed{i}"
        process = subprocess.Popen([*COMMAND, "merge", str(config), str(out), "-q"], env=ENVIRONMENT)
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


RECIPE = {"solera": 1, "stages": {"m": {"init": {"tokenizer": {"data": "t.txt"}}}}}


def test_a_full_disk_of_a_run_is_the_environments_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every write to /dev/full fails as on a full disk."""
    (tmp_path / "t.txt").write_text("some words")
    (tmp_path / "r.yml").write_text(json.dumps(RECIPE))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yml").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match="out: the disk filled up while writing"):
        solera.run(tmp_path / "r.yml", tmp_path / "out")
    assert main(["run", str(tmp_path / "r.yml"), "--out", str(tmp_path / "out"), "-q"]) == 4
    assert "the disk filled up while writing. Make room" in capsys.readouterr().err


def test_an_error_of_the_operating_system_is_the_environments_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it comes from; here from a command that expects none."""

    def fail(kind: str) -> None:
        (tmp_path / "full").symlink_to("/dev/full")
        (tmp_path / "full").write_text(kind)

    monkeypatch.setattr("solera.schema.schema", fail)
    assert main(["schema", "merge"]) == 4
    error = capsys.readouterr().err
    assert error.startswith("solera: ")
    assert "make room and run again" in error
    assert "Traceback" not in error


def test_a_bug_is_no_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Python's own exit code, 1, would say that a gate failed."""

    def fail(kind: str) -> None:
        raise TypeError("object is not iterable")

    monkeypatch.setattr("solera.schema.schema", fail)
    assert main(["schema", "merge"]) == 70
    error = capsys.readouterr().err
    assert "solera: TypeError: object is not iterable" in error
    assert "bug of solera" in error
    assert "in fail" in error  # the traceback


@pytest.mark.parametrize(("code", "right"), [(0, True), (1, True), (2, True), (3, False), (4, False), (70, False)])
def test_make_demo_accepts_verdicts_only(code: int, right: bool, tmp_path: Path) -> None:
    """The real Makefile, with a `solera` that only gives an exit code."""
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "solera").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "bin" / "solera").chmod(0o755)
    (tmp_path / ".solera-ready").touch()
    done = subprocess.run(["make", "-C", root, "demo", f"VENV={tmp_path}"], capture_output=True, check=False)
    assert (done.returncode == 0) == right


def test_a_run_directory_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("some words")
    (tmp_path / "r.yml").write_text(json.dumps(RECIPE))
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        assert main(["run", str(tmp_path / "r.yml"), "--out", str(tmp_path / out), "-q"]) == 3
        assert f"{tmp_path / 'file'}: exists and is not a directory" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "change", [{"architectures": 3}, {"architectures": "Llama"}, {"model_type": 7}, {"quantization_config": 3}]
)
def test_a_config_of_the_wrong_kind(
    change: dict[str, object], siblings: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "odd"
    shutil.copytree(siblings["a"], model)
    content = json.loads((model / "config.json").read_text()) | change
    (model / "config.json").write_text(json.dumps(content))
    file = tmp_path / "m.yml"
    models = [{"model": str(m), "parameters": {"weight": 1}} for m in (model, siblings["b"])]
    file.write_text(json.dumps({"merge_method": "linear", "models": models}))
    assert main(["merge", str(file), str(tmp_path / "out"), "-q"]) == 3
    error = capsys.readouterr().err
    assert str(model / "config.json") in error
    assert f"`{next(iter(change))}` must be" in error
    assert nothing_at(tmp_path / "out")


@pytest.mark.parametrize("kind", ["merge", "moe", "tune", "distill", "eval"])
def test_no_stage_replaces_its_own_input(
    kind: str,
    siblings: dict[str, Path],
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not even with --overwrite and where solera made it; nor is anything written into it."""
    models = tmp_path / "models"
    for name in "ab":
        shutil.copytree(siblings[name], models / name)
        (models / name / "solera.json").write_text("{}")
    (models / "run.json").write_text("{}")
    text = str(write_jsonl(tmp_path / "t.jsonl", [{"text": "a few words"}]))
    a, b = str(models / "a"), str(models / "b")
    experts = [{"name": n, "model": m} for n, m in (("a", a), ("b", b))]
    settings = {
        "merge": {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in (a, b)]},
        "moe": {"base_model": a, "experts": experts, "router": {"fit": "random"}},
        "tune": {"model": a, "data": text, "tokens": 100, "sequence_tokens": 32},
        "distill": {
            "teachers": [{"model": b}],
            "student": {"from": a},
            "data": text,
            "tokens": 100,
            "sequence_tokens": 32,
        },
        "eval": {"suite": "s", "tasks": [{"name": "t", "kind": "text", "data": text}]},
    }
    file = tmp_path / "settings.yml"
    file.write_text(json.dumps(settings[kind]))
    before = {p: p.read_bytes() for p in models.rglob("*") if p.is_file()}
    for target, message in (
        (models / "a", "is the directory of the input"),
        (models / "a" / "out", "lies in the directory of the input"),
        (models, "holds the input"),
    ):
        wanted = ["eval", a, "--suite", str(file), "--out"] if kind == "eval" else [kind, str(file)]
        for more in (["--overwrite"], ["--overwrite", "--dry-run"]):
            assert main([*wanted, str(target), "-q", *more]) == 3
            assert message in capsys.readouterr().err
    assert {p: p.read_bytes() for p in models.rglob("*") if p.is_file()} == before
    assert not (models / "a" / "out").exists()


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
        "while weights are written": ("_put", "the disk filled up while writing; nothing was left behind"),
    }[found]
    assert f"in {where}\n" in done.stderr, done.stderr
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
    assert done.stderr.startswith(f"solera: {out}: cannot be written: ")
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
    [("closed/out", "cannot be written: "), ("secret/x/out", "cannot be read: Permission denied")],
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


def test_a_dry_run_of_the_demo_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--dry-run", "--json"]) == 0
    shown = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    (seedling,) = (s for s in json.loads(shown)["stages"] if s["name"] == "seedling")
    assert str(out / "data" / "code-train.jsonl") in json.dumps(seedling["plan"]["reads"])
    assert "solera-demo-" not in shown


def test_a_demo_into_a_file_or_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--out", str(tmp_path / "file"), "-q"]) == 3
    assert "exists and is not a directory" in capsys.readouterr().err
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "demo.yml").symlink_to("/dev/full")
    assert main(["demo", "--out", str(tmp_path / "demo"), "-q"]) == 4
    assert "the disk filled up while writing" in capsys.readouterr().err


def test_every_command_that_recommends_allow_pickle_takes_it(
    siblings: dict[str, Path], tmp_path: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    pickled = tmp_path / "pickled"
    shutil.copytree(siblings["a"], pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    text = str(write_jsonl(tmp_path / "t.jsonl", [{"text": "a few words"}]))
    suite, merging = tmp_path / "suite.yml", tmp_path / "m.yml"
    suite.write_text(json.dumps({"suite": "s", "tasks": [{"name": "t", "kind": "text", "data": text}]}))
    models = [{"model": str(m), "parameters": {"weight": 1}} for m in (pickled, siblings["b"])]
    merging.write_text(json.dumps({"merge_method": "linear", "models": models}))
    for command in (
        ["inspect", str(pickled)],
        ["diff", str(pickled), str(siblings["a"])],
        ["eval", str(pickled), "--suite", str(suite), "--out", str(tmp_path / "results")],
        ["merge", str(merging), str(tmp_path / "out")],
        ["verify", "--rebuild", str(tmp_path / "out")],
    ):
        assert main([*command, "-q"]) == 3, command
        assert "--allow-pickle" in capsys.readouterr().err
        assert main([*command, "-q", "--allow-pickle"]) == 0, capsys.readouterr().err


def test_looking_at_a_checkpoint_with_code(
    siblings: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coded = tmp_path / "coded"
    shutil.copytree(siblings["a"], coded)
    content = json.loads((coded / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling.Mine"}}
    (coded / "config.json").write_text(json.dumps(content))
    for command in (["inspect", str(coded)], ["diff", str(coded), str(siblings["a"])]):
        assert main(command) == 3
        assert "--trust-remote-code" in capsys.readouterr().err
        assert main([*command, "--trust-remote-code"]) == 0


def test_messages_name_file_and_key(
    siblings: dict[str, Path], tmp_path: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path / "nope")]) == 3
    assert f"{tmp_path / 'nope'}: no such directory" in capsys.readouterr().err
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"text": "a few words"}, {"messages": turns}])
    settings = {"model": str(siblings["a"]), "data": str(chats), "tokens": 100, "sequence_tokens": 32}
    (tmp_path / "tune.yml").write_text(json.dumps(settings))
    assert main(["tune", str(tmp_path / "tune.yml"), str(tmp_path / "out"), "-q"]) == 3
    error = capsys.readouterr().err
    assert f"{chats}:2: is a chat, but the tokenizer of {siblings['a']} has no chat template" in error
    (tmp_path / "suite.yml").write_text(json.dumps({"suite": "s", "tasks": [{"name": "t", "kind": "chioce"}]}))
    suite = ["--suite", str(tmp_path / "suite.yml"), "--out", str(tmp_path / "out")]
    assert main(["eval", str(siblings["a"]), *suite]) == 3
    assert "suite.yml: tasks.0.kind: unknown kind 'chioce' (did you mean 'choice'?)" in capsys.readouterr().err
    (tmp_path / "moe.yml").write_text(json.dumps({"base_model": "a", "expert": []}))
    assert main(["moe", str(tmp_path / "moe.yml"), str(tmp_path / "out")]) == 3
    first = capsys.readouterr().err.splitlines()[0]
    assert first.endswith("moe.yml: expert: unknown key (did you mean 'experts'?)")
