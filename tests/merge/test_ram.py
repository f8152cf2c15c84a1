"""`ram`, `ramplus_tl` and `ramplus`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from solera_core.context import Context
from solera_core.progress import Silent
from solera_core.writer import CheckpointWriter
from solera_merge.config import MergeConfig
from solera_merge.engine import execute
from solera_merge.methods.ram import count_model
from solera_merge.plan import make_plan

Apply = Callable[..., Any]
F32 = npt.NDArray[np.float32]
ZERO = [0.0, 0.0, 0.0, 0.0, 0.0]
A = [1.0, 2.0, 0.0, 0.05, 4.0]  # changes 3 elements: 1 alone, 2 with b
B = [0.0, 4.0, 3.0, 0.0, -2.0]  # changes 3 elements: 1 alone, 2 with a
EPSILON = 0.1


def test_by_hand(apply: Apply) -> None:
    assert apply("ram", [A, B], ZERO, epsilon=EPSILON).tolist() == [1.0, 3.0, 3.0, 0.0, 1.0]


@pytest.mark.parametrize("method", ["ramplus_tl", "ramplus"])
def test_what_one_model_changes_is_scaled_up(apply: Apply, method: str) -> None:
    """Shared / alone is 2 for both, which alpha limits to 1.5: the factor is 1 + 0.5 * 1.5."""
    merged = apply(method, [A, B], ZERO, epsilon=EPSILON, r=0.5, alpha=1.5)
    assert merged.tolist() == [1.75, 3.0, 5.25, 0.0, 1.0]
    merged = apply(method, [A, B], ZERO, epsilon=EPSILON, r=0.5, alpha=9.0)
    assert merged.tolist() == [2.0, 3.0, 6.0, 0.0, 1.0]


@pytest.mark.parametrize("method", ["ram", "ramplus_tl", "ramplus"])
def test_a_single_model_is_itself_but_for_tiny_changes(apply: Apply, method: str) -> None:
    assert apply(method, [A], ZERO, epsilon=EPSILON).tolist() == [1.0, 2.0, 0.0, 0.0, 4.0]


@pytest.mark.parametrize("method", ["ram", "ramplus_tl", "ramplus"])
def test_a_change_of_epsilon_is_none(apply: Apply, method: str) -> None:
    assert apply(method, [[0.25], [0.0]], [0.0], epsilon=0.25).tolist() == [0.0]
    assert apply(method, [[0.25], [0.0]], [0.0], epsilon=0.2499).tolist() == [0.25]


def test_without_overlap_ramplus_is_ram(apply: Apply) -> None:
    a, b = [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]
    assert apply("ramplus", [a, b], [0.0] * 3, r=9.0).tolist() == apply("ram", [a, b], [0.0] * 3).tolist()


def test_models_that_change_nothing_alone(apply: Apply) -> None:
    """Their ratio would be a division by 0; it applies to nothing."""
    assert apply("ramplus", [[1.0], [2.0]], [0.0]).tolist() == [1.5]
    assert apply("ramplus_tl", [[1.0], [2.0]], [0.0]).tolist() == [1.5]


def reference(tensors: dict[str, list[F32]], epsilon: float, r: float, alpha: float) -> dict[str, Any]:
    """The paper on one vector of all tensors, element by element: {name: [base, model, ...]} -> {name: merged}."""
    flat = [
        np.concatenate([t[i].reshape(-1) for t in tensors.values()]) for i in range(len(next(iter(tensors.values()))))
    ]
    base, models = flat[0], flat[1:]
    taus = [m.astype(np.float64) - base for m in models]
    masks = [np.abs(t) > epsilon for t in taus]
    number = np.sum(masks, axis=0)
    out = base.astype(np.float64)
    factors = []
    for mask in masks:
        shared, alone = np.sum(mask & (number >= 2)), np.sum(mask & (number == 1))
        factors.append(1 + r * np.clip(shared / alone, 0, alpha))
    for i in range(base.size):
        changed = [t[i] for t, mask in zip(taus, masks, strict=True) if mask[i]]
        if len(changed) == 1:
            out[i] += changed[0] * next(f for f, mask in zip(factors, masks, strict=True) if mask[i])
        elif changed:
            out[i] += np.mean(changed)
    sizes = np.cumsum([t[0].size for t in tensors.values()])[:-1]
    return {
        name: part.reshape(t[0].shape) for (name, t), part in zip(tensors.items(), np.split(out, sizes), strict=True)
    }


def sparse_models(rng: np.random.Generator) -> dict[str, list[F32]]:
    """Base and three models: two that overlap much in the first tensor and hardly in the second."""
    found: dict[str, list[F32]] = {}
    for name, shape, share in (("first", (30, 40), 0.7), ("second", (500,), 0.1), ("none", (3,), 0.0)):
        base = rng.standard_normal(shape).astype(np.float32)
        changes = [rng.standard_normal(shape) * (rng.random(shape) < share) for _ in range(3)]
        found[name] = [base, *(np.asarray(base + c, np.float32) for c in changes)]
    return found


def merged(config: MergeConfig, out: Path) -> dict[str, F32]:
    """Through plan and engine, but without the check that transformers can load these tensors: it cannot."""
    out.mkdir()
    plan, models = make_plan(config, Context())
    with CheckpointWriter(out, plan.specs) as writer:
        execute(plan.tensors, models.checkpoints, writer, threads=2, progress=Silent())
        writer.finish()
    return load_file(out / "model.safetensors")


def test_ramplus_counts_over_the_whole_model(bare_model: Callable[..., Path], recipe: Any, tmp_path: Path) -> None:
    tensors = sparse_models(np.random.default_rng(5))
    paths = [str(bare_model(tmp_path / str(i), {name: t[i] for name, t in tensors.items()})) for i in range(4)]
    parameters = {"r": 0.4, "alpha": 2.5, "epsilon": 0.01}
    common = {"base_model": paths[0], "models": paths[1:], "parameters": parameters}
    ours = merged(recipe(merge_method="ramplus", **common), tmp_path / "out")
    for name, expected in reference(tensors, 0.01, 0.4, 2.5).items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-6, atol=1e-6)
    # The tensor-local variant is something else: each tensor as if it were the model.
    local = merged(recipe(merge_method="ramplus_tl", **common), tmp_path / "local")
    assert not np.allclose(local["second"], ours["second"], rtol=1e-3)
    for name in ("first", "second"):
        expected = reference({name: tensors[name]}, 0.01, 0.4, 2.5)[name]
        np.testing.assert_allclose(local[name], expected, rtol=1e-6, atol=1e-6)


def test_counts_belong_to_models_not_to_places(in_memory: Any) -> None:
    """In slices, the model that comes first in one tensor may come second in another."""
    base = np.zeros(4, np.float32)
    one = np.array([1, 1, 0, 0], np.float32)
    two = np.array([0, 1, 1, 1], np.float32)
    tensors = [in_memory([one, two], base, model_ids=(4, 7)), in_memory([two, one], base, model_ids=(7, 4))]
    settings = [{"epsilon": 0.5}, {"epsilon": 0.5}]
    assert count_model(tensors, settings) == [[(2, 2), (2, 4)], [(2, 4), (2, 2)]]
    tensors.append(in_memory([two], base, model_ids=(4,)))
    assert count_model(tensors, [*settings, {"epsilon": 2.0}])[2] == [(2, 2)]
