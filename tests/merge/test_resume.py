"""A merge that was killed goes on from its journal and ends with the bytes of an undisturbed one."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_core.output import verify
from solera_merge import engine
from solera_merge.config import MergeConfig
from solera_merge.run import merge

Recipe = Callable[..., MergeConfig]
KILLS = 50


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> dict[str, Path]:
    """Models large enough that a merge takes a while: 7M parameters in 60 tensors."""
    root = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 256, "intermediate_size": 700, "num_hidden_layers": 6, "shards": 3}
    base = make_model(root / "base", dtype="bfloat16", **sizes)
    return {"base": base} | {
        m: make_model(root / m, dtype="bfloat16", base=base, seed=i, **sizes) for i, m in enumerate("ab")
    }


def recipe_of(models: dict[str, Path]) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": str(models["base"]),
        "models": [{"model": str(models[m])} for m in "ab"],
        "parameters": {"weight": 0.5, "density": 0.3},
    }


ATTACK = """
import json, os, random, signal, sys, time
from pathlib import Path
from solera_core.context import Context
from solera_core.strict import parse
from solera_merge import fused  # what a fresh process would spend its time on
from solera_merge.config import MergeConfig
from solera_merge.run import merge

config = parse(MergeConfig, json.loads(sys.argv[1]), where="recipe")
root = Path(sys.argv[2])

def begin(out):
    child = os.fork()
    if child == 0:
        merge(config, out, Context(threads=2))
        os._exit(0)
    return child

began = time.monotonic()
os.waitpid(begin(root / "whole"), 0)
whole_s = time.monotonic() - began
random.seed(0)
out, journal = root / "out", root / ".out.solera-staging" / ".finished-tensors"
finished = resumed = 0
for i in range(int(sys.argv[3])):
    child = begin(out)
    time.sleep(random.random() * whole_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    resumed += journal.exists() and journal.stat().st_size > 0
    if out.exists():
        out.rename(root / f"finished{finished}")
        finished += 1
assert os.waitpid(begin(out), 0)[1] == 0
print(json.dumps({"finished": finished, "resumed": resumed}))
"""


def bytes_of(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


def test_killed_at_fifty_moments(large: dict[str, Path], tmp_path: Path) -> None:
    """One target is attacked again and again: it is absent or whole at every moment, and right in the end."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", ATTACK, json.dumps(recipe_of(large)), str(tmp_path), str(KILLS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["resumed"] > 0  # else nothing was shown
    assert told["finished"] < KILLS
    expected = bytes_of(tmp_path / "whole")
    outputs = ["out", *(f"finished{i}" for i in range(told["finished"]))]
    for name in outputs:
        assert bytes_of(tmp_path / name) == expected
    assert verify(tmp_path / "out") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*outputs, "whole"])


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """`stop_after(n)`: the merge of the n-th tensor is interrupted; the list names the tensors merged from then on."""

    real = engine.merge_tensor

    def arrange(count: int) -> list[str]:
        done: list[str] = []

        def merge_tensor(tensor: Any, *arguments: Any, **options: Any) -> None:
            if len(done) == count:
                raise KeyboardInterrupt
            real(tensor, *arguments, **options)
            done.append(tensor.name)

        monkeypatch.setattr(engine, "merge_tensor", merge_tensor)
        return done

    return arrange


def test_only_what_is_missing_is_merged(
    recipe: Recipe, large: dict[str, Path], tmp_path: Path, stop_after: Any
) -> None:
    config = recipe(**recipe_of(large))
    first = stop_after(20)
    with pytest.raises(KeyboardInterrupt):
        merge(config, tmp_path / "out", Context(threads=1))
    assert len(first) == 20
    second = stop_after(10**9)
    merge(config, tmp_path / "out", Context(threads=1))
    assert not set(first) & set(second)
    merge(config, tmp_path / "whole", Context())
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("change", ["parameters", "seed", "input", "dtype"])
def test_another_plan_starts_clean(
    recipe: Recipe, siblings: dict[str, Path], make_model: Any, tmp_path: Path, stop_after: Any, change: str
) -> None:
    own = make_model(tmp_path / "own", base=siblings["base"], seed=7)
    content = {
        "merge_method": "dare_ties",
        "base_model": str(siblings["base"]),
        "models": [str(own), str(siblings["b"])],
        "parameters": {"weight": 0.5, "density": 0.5},
    }
    stop_after(8)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe(**content), tmp_path / "out", Context(threads=1))
    seed = 0
    if change == "parameters":
        content["parameters"] = {"weight": 0.5, "density": 0.4}
    elif change == "dtype":
        content["dtype"] = "float16"
    elif change == "seed":
        seed = 1
    else:
        file = own / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-2] ^= 1
        file.write_bytes(data)
        os.utime(file, (1, 1))
    done = stop_after(10**9)
    merge(recipe(**content), tmp_path / "out", Context(threads=1, seed=seed))
    assert len(done) == len(json.loads((tmp_path / "out" / "solera.json").read_text())["tensors"])
    merge(recipe(**content), tmp_path / "whole", Context(seed=seed))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_an_input_that_changes_between_plan_and_read(
    recipe: Recipe,
    siblings: dict[str, Path],
    make_model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    own = make_model(tmp_path / "own", base=siblings["base"], seed=7)
    file = own / "model.safetensors"
    real = engine.merge_tensor

    def merge_tensor(*arguments: Any, **options: Any) -> None:
        if how == "changed":
            data = file.read_bytes()
            file.write_bytes(data[:-4] + np.float32(7).tobytes())
        elif how == "cut":
            os.truncate(file, 2000)
        elif file.exists():
            file.unlink()
        real(*arguments, **options)

    monkeypatch.setattr(engine, "merge_tensor", merge_tensor)
    config = recipe(merge_method="linear", models=[str(own), str(siblings["b"])], parameters={"weight": 1})
    expected = {"changed": "changed since its header was read", "cut": "bytes then, 2000 now", "gone": "No such file"}
    with pytest.raises(CheckpointError, match=expected[how]) as caught:
        merge(config, tmp_path / "outputs" / "out", Context(threads=1))
    assert str(file) in str(caught.value)
    assert not (tmp_path / "outputs").exists()
