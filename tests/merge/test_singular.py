from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from solera_core.context import Context
from solera_merge.block import BLOCK_ELEMENTS, block_starts
from solera_merge.methods.catalogue import METHODS
from solera_merge.run import plan_merge
from solera_merge.singular import has_matrices, nearest_orthonormal, svd

F64 = npt.NDArray[np.float64]
METHOD_NAMES = ("tsv_m", "iso_c", "iso_cts")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 32)),
        ("model.layers.0.mlp.gate.weight", (8, 32)),
        ("model.layers.0.mlp.experts.3.up_proj.weight", (64, 32)),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 32)),
        ("transformer.h.0.attn.c_attn.weight", (32, 96)),
    ],
)
def test_matrices(name: str, shape: tuple[int, ...]) -> None:
    assert has_matrices(name, shape)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (32,)),
        ("scale", ()),
        ("model.embed_tokens.weight", (100, 32)),
        ("transformer.wpe.weight", (100, 32)),
        ("model.language_model.embed_tokens_per_layer.weight", (100, 32)),
        ("lm_head.weight", (100, 32)),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 32)),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (8, 64)),
        ("model.layers.0.linear_attn.conv1d.weight", (64, 1, 4)),
        ("audio.conv1.weight", (64, 80, 3)),
        ("visual.patch.weight", (64, 3, 14, 14)),
    ],
)
def test_not_matrices(name: str, shape: tuple[int, ...]) -> None:
    assert not has_matrices(name, shape)


def test_blocks_are_whole_matrices() -> None:
    assert block_starts((5, 100, 50), "matrices", 8192) == [0, 5000, 10000, 15000, 20000, 25000]
    assert block_starts((5, 20, 50), "matrices", 8192) == [0, 5000]
    assert block_starts((100, 90), "matrices", 8192) == [0, 9000]
    assert block_starts((7,), "matrices", 8192) == [0, 7]
    assert block_starts((), "matrices", 8192) == [0, 1]
    assert block_starts((2, 0, 3), "matrices", 8192) == [0]


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_only_matrices_are_read_whole(method: str) -> None:
    """An embedding of 150,000 rows is not; it would not fit beside those of the other models."""
    assert METHODS[method].unit_of("model.layers.0.mlp.up_proj.weight", (64, 32)) == "matrices"
    assert METHODS[method].unit_of("model.embed_tokens.weight", (150_000, 4096)) == "elements"


@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (4, 9)])
def test_svd(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal(shape)
    u, s, vt = svd(x)
    np.testing.assert_allclose(u * s @ vt, x, atol=1e-14)
    assert (s[:-1] >= s[1:]).all()
    largest = np.take_along_axis(u, np.argmax(np.abs(u), axis=0)[None], axis=0)
    assert (largest > 0).all()


def test_the_sign_does_not_depend_on_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(1).standard_normal((6, 4))
    ours = svd(x)
    lapack = np.linalg.svd
    flip = np.array([1.0, -1.0, -1.0, 1.0])

    def other(a: F64, full_matrices: bool) -> tuple[Any, Any, Any]:
        u, s, vt = lapack(a, full_matrices=full_matrices)
        return u * flip, s, vt * flip[:, None]

    monkeypatch.setattr(np.linalg, "svd", other)
    for a, b in zip(ours, svd(x), strict=True):
        assert np.array_equal(a, b)


def test_a_direction_that_is_not_there_has_no_vectors() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((8, 2)) @ rng.standard_normal((2, 5))
    u, s, vt = svd(x)
    assert (s[:2] > 0).all()
    assert not any(part.any() for part in (s[2:], u[:, 2:], vt[2:]))
    np.testing.assert_allclose(u * s @ vt, x, atol=1e-14)
    zero = svd(np.zeros((3, 2)))
    assert not any(part.any() for part in zero)


def test_what_a_subtraction_left_is_measured_against_what_it_left_it_of() -> None:
    rest = np.random.default_rng(3).standard_normal((4, 3)) * 1e-16
    assert svd(rest)[1].all()
    assert not svd(rest, largest=1.0)[1].any()


def test_nearest_orthonormal() -> None:
    x = np.random.default_rng(4).standard_normal((7, 3))
    q = nearest_orthonormal(x)
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-14)
    np.testing.assert_allclose(nearest_orthonormal(x.T), q.T, atol=1e-14)
    np.testing.assert_allclose(nearest_orthonormal(q), q, atol=1e-14)
    # of a column that is there twice, each copy gets a half
    twice = np.array([[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(nearest_orthonormal(twice), twice / np.sqrt(8), atol=1e-15)


def test_the_plan_counts_whole_matrices(bare_model: Callable[..., Path], recipe: Any, tmp_path: Path) -> None:
    """A matrix of 500 x 600 is more than a block, and decomposed in float64; a long embedding costs nothing more."""
    blocks = 3 * 2 + 8  # of three sources, stored and wide, and temporaries
    shapes = {"model.layers.0.mlp.up_proj.weight": (500, 600), "model.embed_tokens.weight": (40_000, 10)}
    tensors = {name: np.zeros(shape) for name, shape in shapes.items()}
    config = {"num_hidden_layers": 1, "vocab_size": 40_000}
    paths = [str(bare_model(tmp_path / name, tensors, **config)) for name in ("base", "a", "b")]
    memory: dict[str, int] = {}
    for method in ("iso_c", "magmax"):
        content = recipe(merge_method=method, base_model=paths[0], models=paths[1:])
        memory[method] = plan_merge(content, Context(threads=1)).memory_bytes
    assert memory["iso_c"] - memory["magmax"] == blocks * (500 * 600 * 10 - BLOCK_ELEMENTS * 4)
