"""The command line: its frozen surface, its exit codes, what goes to stdout and what to stderr."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from solera.cli import app, main

SURFACE = Path(__file__).with_name("cli_surface.json")


def surface() -> dict[str, list[str]]:
    command = typer.main.get_command(app)
    commands: dict[str, Any] = command.commands  # type: ignore[attr-defined]  # a group
    return {
        name: sorted(o for p in sub.params for o in ([p.name.upper()] if p.param_type_name == "argument" else p.opts))
        for name, sub in commands.items()
    }


def test_the_surface_is_frozen() -> None:
    """A deliberate change: run this file with SOLERA_FREEZE=1, read the diff, and say it in the changelog."""
    if os.environ.get("SOLERA_FREEZE"):
        SURFACE.write_text(json.dumps(surface(), indent=1) + "\n")
    assert surface() == json.loads(SURFACE.read_text())


def test_every_command_takes_json_quiet_and_a_dry_run() -> None:
    for name, options in surface().items():
        assert {"--json", "--quiet", "-q"} <= set(options), name
        assert "--dry-run" in options or name == "schema", name  # a schema reads and writes nothing


@pytest.fixture
def merge_config(siblings: dict[str, Path], tmp_path: Path) -> Path:
    config = tmp_path / "merge.yml"
    config.write_text(
        "merge_method: linear\nmodels:\n"
        + "".join(f"  - {{model: {siblings[m]}, parameters: {{weight: 1}}}}\n" for m in "ab")
    )
    return config


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], [], ["--version"]])
def test_help_is_right(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert out


@pytest.mark.parametrize(
    "arguments", [["merg"], ["merge"], ["merge", "a", "b", "--no-such"], ["run"], ["merge", "none.yml", "o"]]
)
def test_wrong_usage_is_bad_input_not_inconclusive(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (3, "")
    assert err.startswith("solera: ")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["merge", "none.yml", "o"], "ConfigError"),
        (["inspect", "none"], "CheckpointError"),
        (["gate", "--baseline", "none", "--candidate", "none"], "DataError"),
        (["run", "none.yml"], "ConfigError"),
        (["merge", "a"], "UsageError"),
        (["schema", "non"], "ConfigError"),
    ],
)
def test_an_error_is_one_object_on_stdout_too(
    arguments: list[str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments, "--json")
    shown = json.loads(out)
    assert shown == {"error": shown["error"], "kind": kind, "exit_code": 3}
    assert err == f"solera: {shown['error']}\n"
    assert code == 3
    assert run(capsys, *arguments)[1:] == ("", err)


def test_a_bug_is_one_object_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(kind: str) -> None:
        raise TypeError("object is not iterable")

    monkeypatch.setattr("solera.schema.schema", fail)
    code, out, err = run(capsys, "schema", "--json")
    assert json.loads(out)["kind"] == "TypeError"
    assert json.loads(out)["exit_code"] == code == 70
    assert "Traceback" in err


def test_merge_json_is_one_object_on_stdout(
    merge_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "blend"
    code, stdout, _ = run(capsys, "merge", merge_config, out, "--json")
    assert code == 0
    assert json.loads(stdout)["out"] == str(out)
    assert (out / "solera.json").exists()


def test_dry_run_writes_nothing(merge_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "blend"
    code, stdout, _ = run(capsys, "merge", merge_config, out, "--dry-run", "--json")
    plan = json.loads(stdout)
    assert code == 0
    assert plan["stage"] == "merge"
    assert plan["disk_bytes"] > 0
    assert plan["memory_bytes"] > 0
    code, stdout, _ = run(capsys, "merge", merge_config, out, "--dry-run")
    assert code == 0
    assert "weight" in stdout
    assert not out.exists()


def test_an_existing_target_needs_overwrite(
    merge_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "blend"
    assert run(capsys, "merge", merge_config, out, "-q")[0] == 0
    code, _, err = run(capsys, "merge", merge_config, out, "-q")
    assert code == 3
    assert "--overwrite" in err
    assert run(capsys, "merge", merge_config, out, "-q", "--overwrite")[0] == 0


def test_verify_sees_one_changed_byte(merge_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "blend"
    assert run(capsys, "merge", merge_config, out, "-q")[0] == 0
    assert run(capsys, "verify", out, "-q")[0] == 0
    assert run(capsys, "verify", out, "--rebuild", "-q")[0] == 0
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, stdout, err = run(capsys, "verify", out, "--json")
    assert code == 3
    assert json.loads(stdout)["whole"] is False
    assert json.loads(stdout)["exit_code"] == 3
    assert "lm_head" in err or "model." in err  # the tensor is named


def test_rebuild_sees_a_changed_input(
    siblings: dict[str, Path], tmp_path: Path, make_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        shutil.copytree(siblings[name], tmp_path / name)
    config = tmp_path / "merge.yml"
    config.write_text(
        "merge_method: linear\nmodels:\n"
        + "".join(f"  - {{model: {tmp_path / m}, parameters: {{weight: 1}}}}\n" for m in "ab")
    )
    assert run(capsys, "merge", config, tmp_path / "out", "-q")[0] == 0
    shutil.rmtree(tmp_path / "b")
    make_model(tmp_path / "b", base=siblings["base"], seed=9)
    code, _, err = run(capsys, "verify", tmp_path / "out", "--rebuild", "-q")
    assert code == 3
    assert "has changed" in err


def test_inspect_and_diff(siblings: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", siblings["a"], "--json")
    assert code == 0
    assert json.loads(out)
    code, out, _ = run(capsys, "diff", siblings["a"], siblings["b"], "--json")
    rows = json.loads(out)["tensors"]
    assert code == 0
    assert all(not row["identical"] for row in rows)
    assert run(capsys, "diff", siblings["a"], siblings["b"])[0] == 0
    assert run(capsys, "inspect", siblings["a"])[0] == 0


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--dry-run", "--json")
    assert code == 0, err
    plan: dict[str, Any] = json.loads(out)
    assert (plan["writes"], plan["disk_bytes"]) == ([], 0)
    assert run(capsys, *arguments, "--dry-run")[0] == 0
    return plan


def test_plans_of_what_only_reads(
    siblings: dict[str, Path], merge_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = siblings["a"], siblings["b"]
    weights = (a / "model.safetensors").stat().st_size
    files = {row["what"]: row for row in plan_of(capsys, "inspect", a)["reads"]}
    assert files["model.safetensors"]["headers only"]
    assert files["model.safetensors"]["bytes"] == weights
    assert [row["what"] for row in plan_of(capsys, "diff", a, b)["reads"]] == [str(a), str(b)]
    out = tmp_path / "blend"
    assert run(capsys, "merge", merge_config, out, "-q")[0] == 0
    assert {row["what"] for row in plan_of(capsys, "verify", out)["reads"]} == {p.name for p in out.iterdir()}
    code, shown, _ = run(capsys, "verify", out, "--rebuild", "--dry-run", "--json")
    again = json.loads(shown)
    assert code == 0
    assert again["disk_bytes"] > weights
    assert again["parameters"]["recipe"]["merge_method"] == "linear"
    for wrong in (["inspect", "none"], ["diff", a, "none"], ["verify", a]):
        assert run(capsys, *wrong, "--dry-run")[0] == 3


def test_the_plan_of_a_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text("{}")
        (tmp_path / name / "items.jsonl").write_text("12345")
    sides = ["--baseline", tmp_path / "one", "--candidate", tmp_path / "two"]
    plan = plan_of(capsys, "gate", *sides)
    assert [row["bytes"] for row in plan["reads"]] == [2, 5, 2, 5]
    assert plan["parameters"]["confidence"] == 0.95
    (tmp_path / "two" / "items.jsonl").unlink()
    assert run(capsys, "gate", *sides, "--dry-run")[0] == 3


def test_gate_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results written by hand: a candidate much worse fails, the baseline itself passes, two items decide nothing."""

    def results(name: str, right: list[int]) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        value = sum(right) / len(right)
        (directory / "results.json").write_text(
            json.dumps(
                {
                    "schema": 1,
                    "model": {
                        "ref": name,
                        "digest": "x",
                        "parameters": {"total": 1, "active": 1, "embedding": 1, "bytes": 4},
                    },
                    "suite": {"name": "s", "digest": "d"},
                    "tasks": [
                        {
                            "name": "t",
                            "kind": "choice",
                            "domain": None,
                            "metric": "accuracy",
                            "value": value,
                            "low": 0.0,
                            "high": 1.0,
                            "n": len(right),
                            "extra": {"chance": 0.5},
                        }
                    ],
                    "settings": {},
                }
            )
        )
        (directory / "items.jsonl").write_text(
            "".join(
                json.dumps(
                    {
                        "task": "t",
                        "item": f"i{i}",
                        "domain": None,
                        "score": r,
                        "correct": r,
                        "prediction": r,
                        "logliks": [0.0, 1.0],
                        "chance": 0.5,
                    }
                )
                + "\n"
                for i, r in enumerate(right)
            )
        )
        return directory

    good = results("good", [1] * 380 + [0] * 20)
    bad = results("bad", [1] * 250 + [0] * 150)
    few_a, few_b = results("few_a", [1, 1]), results("few_b", [1, 1])
    assert run(capsys, "gate", "--baseline", good, "--candidate", good)[0] == 0
    code, out, _ = run(capsys, "gate", "--baseline", good, "--candidate", bad, "--json")
    assert code == 1
    assert json.loads(out)["verdict"] == "FAIL"
    code, out, _ = run(capsys, "gate", "--baseline", few_a, "--candidate", few_b)
    assert code == 2
    assert "INCONCLUSIVE" in out


def test_interrupt_is_130(merge_config: Path, tmp_path: Path) -> None:
    """A real process, interrupted while it merges, leaves nothing at the target."""
    code = (
        "import signal, os, sys\n"
        "from solera_core.writer import CheckpointWriter\n"
        "real = CheckpointWriter.finish\n"
        "def finish(self):\n    os.kill(os.getpid(), signal.SIGINT)\n    return real(self)\n"
        "CheckpointWriter.finish = finish\n"
        "from solera.cli import main\n"
        f"sys.exit(main(['merge', {str(merge_config)!r}, {str(tmp_path / 'out')!r}, '-q']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert not (tmp_path / "out").exists()


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "solera", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.strip()
