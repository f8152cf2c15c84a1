"""The bound of memory: its default, and the gate that keeps threads within it."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from solera_core.context import Context
from solera_core.errors import ResourceError
from solera_merge import memory
from solera_merge.config import MergeConfig
from solera_merge.memory import Budget, default_memory_bytes
from solera_merge.run import merge

MB = 1 << 20


def machine(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    monkeypatch.setattr(memory, "_lines", lambda file: files.get(str(file), "").splitlines())


@pytest.mark.parametrize(("free_mb", "expected_mb"), [(40_000, 2048), (4_000, 1000), (100, 256)])
def test_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch, free_mb: int, expected_mb: int) -> None:
    machine(monkeypatch, {"/proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {free_mb * 1024} kB\n"})
    assert default_memory_bytes() == expected_mb * MB


@pytest.mark.parametrize(
    ("group", "top", "names"),
    [
        ("4:cpu:/x\n3:memory:/a/b\n", "/sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        ("0::/a/b\n", "/sys/fs/cgroup", ("memory.max", "memory.current")),
    ],
)
@pytest.mark.parametrize("level", ["/a/b", "/a", ""])
def test_the_limit_of_a_control_group_counts(
    monkeypatch: pytest.MonkeyPatch, group: str, top: str, names: tuple[str, str], level: str
) -> None:
    machine(
        monkeypatch,
        {
            "/proc/meminfo": f"MemAvailable: {10**8} kB\n",
            "/proc/self/cgroup": group,
            f"{top}{level}/{names[0]}": f"{3000 * MB}\n",
            f"{top}{level}/{names[1]}": f"{1000 * MB}\n",
        },
    )
    assert default_memory_bytes() == 500 * MB
    machine(monkeypatch, {"/proc/self/cgroup": group, f"{top}{level}/{names[0]}": "max\n"})
    assert default_memory_bytes() == 2048 * MB  # no limit, nothing known


def test_who_would_exceed_the_budget_waits() -> None:
    budget = Budget(10)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with budget.take(7):
            entered.set()
            leave.wait()

    def want(done: list[int]) -> None:
        with budget.take(5):
            done.append(1)

    done: list[int] = []
    first = threading.Thread(target=hold)
    first.start()
    entered.wait()
    second = threading.Thread(target=want, args=(done,))
    second.start()
    with budget.take(3):  # what fits goes ahead
        assert not done
    leave.set()
    first.join()
    second.join()
    assert done == [1]
    with budget.take(10**9):  # never more than there are: nobody waits for ever
        pass


def test_a_tensor_that_cannot_fit_is_refused_before_any_work(
    recipe: Callable[..., MergeConfig], siblings: dict[str, Path], tmp_path: Path
) -> None:
    config = recipe(merge_method="linear", models=["a", "b"], parameters={"weight": 1})
    with pytest.raises(ResourceError, match=r"needs \d+ MB for it, and the bound is 1 MB; raise it with --mem"):
        merge(config, tmp_path / "out", Context(models=siblings, memory_bytes=10**6))
    assert list(tmp_path.iterdir()) == []


def test_the_bound_changes_no_byte(
    recipe: Callable[..., MergeConfig], siblings: dict[str, Path], tmp_path: Path
) -> None:
    config = recipe(merge_method="ties", base_model="base", models=["a", "b"], parameters={"weight": 1, "density": 0.3})
    outs = [
        merge(config, tmp_path / str(m), Context(models=siblings, threads=4, memory_bytes=m)) for m in (11 * MB, None)
    ]
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()
