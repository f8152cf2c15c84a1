"""The check through transformers beside the work, and by itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from solera_core.errors import VerificationError
from solera_core.reload_check import ReloadCheck, require_exact

EXACT: dict[str, list[str]] = {"mismatched": [], "missing": [], "unexpected": []}


def in_its_own_process(directory: Path) -> subprocess.CompletedProcess[str]:
    """As a command that has not imported transformers runs it."""
    code = (
        "import json, sys; from pathlib import Path; from solera_core.reload_check import ReloadCheck\n"
        f"with ReloadCheck(Path({str(directory)!r}), trust_remote_code=False) as check:\n"
        "    assert 'transformers' not in sys.modules\n"
        "    print(json.dumps(check.result()))\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)


def test_a_whole_model(siblings: dict[str, Path]) -> None:
    done = in_its_own_process(siblings["a"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EXACT
    import transformers  # noqa: F401  (imported: the check runs here)

    with ReloadCheck(siblings["a"], trust_remote_code=False) as check:
        assert check._process is None
        assert check.result() == EXACT


def test_a_config_that_wants_another_layer(siblings: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "deeper"
    shutil.copytree(siblings["a"], model)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] += 1
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    done = in_its_own_process(model)
    assert done.returncode == 1
    assert "does not load it exactly: missing model.layers.2" in done.stderr.splitlines()[-1]


def test_a_config_that_cannot_be_loaded(siblings: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "odd"
    shutil.copytree(siblings["a"], model)
    (model / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    done = in_its_own_process(model)
    assert done.returncode == 1
    assert "VerificationError" in done.stderr.splitlines()[-1]
    assert "transformers cannot load what was written" in done.stderr.splitlines()[-1]


def test_require_exact_names_what_is_wrong(siblings: dict[str, Path]) -> None:
    require_exact(siblings["a"], EXACT)
    with pytest.raises(VerificationError, match=r"unexpected a, b, c, d, \.\.\.; .*'llama'"):
        require_exact(siblings["a"], EXACT | {"unexpected": list("abcde")})


def test_leaving_ends_the_process(siblings: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with ReloadCheck(siblings["a"], trust_remote_code=False) as check:
        assert check._process is not None
        assert check._process.poll() is None
    assert check._process.poll() is not None


def test_a_check_that_has_ended_leaves_no_pipe_open(siblings: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge failed meanwhile, so nobody asked for the result."""
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with ReloadCheck(siblings["a"], trust_remote_code=False) as check:
        process = check._process
        assert process is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.wait()
    assert process.stdout.closed
    assert process.stderr.closed
