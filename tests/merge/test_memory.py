"""The bound of memory: its default, and the gate that keeps threads within it."""

import gc
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solera_core.context import Context
from solera_core.errors import ResourceError
from solera_core.writer import CheckpointWriter
from solera_merge import memory
from solera_merge.config import MergeConfig
from solera_merge.engine import merge_tensor
from solera_merge.memory import Budget, default_memory_bytes
from solera_merge.methods.catalogue import METHODS
from solera_merge.plan import make_plan, tensor_bytes
from solera_merge.run import merge
from solera_merge.selection import middle_deltas

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


@pytest.mark.parametrize("dtype", ["F32", "F64"])  # with a fused twin and without
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"weight": 1.0, "density": 0.5, "rescale": True}),
        ("breadcrumbs", {"weight": 1.0, "density": 0.5, "gamma": 0.1}),
        ("della", {"weight": 1.0, "density": 0.5}),
        ("sce", {"select_topk": 0.5}),
        ("arcee_fusion", {}),
        ("model_stock", {}),
        ("nuslerp", {"weight": 1.0}),
        ("nuslerp", {"weight": 1.0, "nuslerp_flatten": False}),
        ("nuslerp", {"weight": 1.0, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
)
def test_a_tensor_takes_no_more_than_was_planned(
    recipe: Callable[..., MergeConfig],
    bare_model: Callable[..., Path],
    tmp_path: Path,
    method: str,
    parameters: dict[str, Any],
    dtype: str,
) -> None:
    rng = np.random.default_rng(0)
    models = [
        bare_model(tmp_path / name, {"model.norm.weight": rng.standard_normal((2, 400_000), np.float32)}, dtype)
        for name in ("base", "a", "b")
    ]
    entry = METHODS[method]
    config = recipe(
        merge_method=method,
        **({"base_model": str(models[0])} if entry.base == "required" else {}),
        models=[str(model) for model in models[1 : 1 + (entry.most_models or 2)]],
        parameters=parameters,
        dtype="float32",
    )
    plan, opened = make_plan(config, Context())
    [tensor] = plan.tensors
    with CheckpointWriter(tmp_path, plan.specs) as writer:
        merge_tensor(tensor, opened.checkpoints, writer)  # compiled, imported
        del writer
    (tmp_path / "out").mkdir()
    with CheckpointWriter(tmp_path / "out", plan.specs) as writer:
        tracemalloc.start()
        merge_tensor(tensor, opened.checkpoints, writer)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        writer.finish()
    assert peak <= tensor_bytes(tensor)


def test_selection_leaves_no_cycles(in_memory: Any) -> None:
    """A merge's process runs without the collector: half a megabyte a tensor and model would stay until its end."""
    a, b = np.random.default_rng(0).standard_normal((2, 9000)).astype(np.float32)
    middle_deltas(in_memory([a, b], np.zeros_like(a)), (0.3, 0.4), (0.1, 0.2))
    gc.collect()
    gc.disable()
    try:
        tracemalloc.start()
        for _ in range(3):
            middle_deltas(in_memory([a, b], np.zeros_like(a)), (0.3, 0.4), (0.1, 0.2))
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    finally:
        gc.enable()
    assert held < 100_000


def test_the_bound_changes_no_byte(
    recipe: Callable[..., MergeConfig], siblings: dict[str, Path], tmp_path: Path
) -> None:
    config = recipe(merge_method="ties", base_model="base", models=["a", "b"], parameters={"weight": 1, "density": 0.3})
    outs = [
        merge(config, tmp_path / str(m), Context(models=siblings, threads=4, memory_bytes=m)) for m in (11 * MB, None)
    ]
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()
