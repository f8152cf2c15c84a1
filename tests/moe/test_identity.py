"""The identity check must hold on what is right, and must fail on everything that could be wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from solera_core.context import Context
from solera_core.errors import VerificationError
from solera_merge.moe.config import MoeConfig
from solera_merge.moe.identity import Identity, check_identity, checked_parameters, checked_part
from solera_merge.moe.inputs import Inputs, open_inputs
from solera_merge.moe.targets.choice import TARGETS
from solera_merge.moe.targets.mixtral import TARGET
from solera_merge.moe.write import Part

SECOND = "model.layers.2.block_sparse_moe.experts.1.w2.weight"


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Path],
    moe_config: Callable[..., MoeConfig],
    build: Callable[..., Path],
) -> tuple[Path, Inputs]:
    """A Mistral MoE of 4 layers with a window, and its inputs."""
    root = tmp_path_factory.mktemp("identity")
    base = make_model(root / "base", family="mistral", num_hidden_layers=4, sliding_window=20)
    models = {n: make_model(root / n, base=base, seed=i + 1, noise=0.3) for i, n in enumerate("ab")}
    out = build(root / "moe", base, models)
    return out, open_inputs(moe_config(base, models), Context())


@pytest.fixture
def check(built: tuple[Path, Inputs], tmp_path: Path) -> Callable[..., Identity]:
    """`check(edit, limit=...)`: the identity check on a copy of the built MoE that `edit` may damage."""

    def run(edit: Callable[[Path], Any] = lambda path: None, **options: Any) -> Identity:
        copy = tmp_path / "copy"
        shutil.copytree(built[0], copy)
        edit(copy)
        scratch = tmp_path / "scratch"
        try:
            return check_identity(copy, scratch, built[1], top_k=2, dtype=None, **options)
        finally:
            assert not scratch.exists()

    return run


def edit_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors: dict[str, np.ndarray] = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return edit


def swap(a: str, b: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if a in name]:
            other = name.replace(a, b)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return change


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads((path / "config.json").read_text())
        for key in [key for key, value in fields.items() if value is None and key.startswith("rope")]:
            del content[key]
        (path / "config.json").write_text(json.dumps(content | {k: v for k, v in fields.items() if v is not None}))

    return edit


def test_a_right_moe_passes_on_all_layers_and_on_some(check: Callable[..., Identity], tmp_path: Path) -> None:
    whole = check()
    assert whole.layers == [0, 1, 2, 3]
    assert whole.window_exercised
    shutil.rmtree(tmp_path / "copy")
    part = check(limit=50_000)
    assert part.layers == [0, 3]
    assert part.of_layers == 4
    shutil.rmtree(tmp_path / "copy")
    assert check(limit=1).layers == [0]


def test_a_part_finds_what_is_wrong_in_it(check: Callable[..., Identity]) -> None:
    with pytest.raises(VerificationError, match="every token sent to 'a'"):
        check(edit_tensors(swap("layers.3.block_sparse_moe.", "layers.2.block_sparse_moe.")), limit=50_000)


def test_layers_are_spread_within_the_limit(built: tuple[Path, Inputs]) -> None:
    _, inputs = built
    whole = sum(t.size for t in load_file(built[0] / "model.safetensors").values())
    assert checked_parameters(inputs) == whole
    assert checked_part(inputs, limit=whole) is None
    assert checked_part(inputs, limit=whole - 1) == Part([0, 1, 2, 3], 256)  # a smaller vocabulary was enough
    layer = 2 * 3 * 32 * 48 + 2 * 32 + 2 * 32 + 2 * 32 * 32 + 2 * 16 * 32
    outside = 2 * 256 * 32 + 32
    assert checked_part(inputs, limit=outside + 3 * layer) == Part([0, 2, 3], 256)
    assert checked_part(inputs, limit=outside + 3 * layer - 1) == Part([0, 3], 256)
    assert checked_part(inputs, limit=1) == Part([0], 256)


@pytest.mark.parametrize(
    "edit, message",
    [
        (edit_tensors(swap(".experts.0.", ".experts.1.")), "every token sent to 'a'"),
        (edit_tensors(lambda t: t[SECOND].__imul__(1.01)), "expert 'b' under its own trunk"),
        (edit_tensors(swap(".w1.", ".w3.")), "every token sent to 'a'"),
        (edit_tensors(swap("layers.0.self_attn", "layers.1.self_attn")), "every token sent to 'a'"),
        (edit_tensors(lambda t: t["model.norm.weight"].__imul__(1.01)), "every token sent to 'a'"),
        (edit_config(sliding_window=30), "every token sent to 'a'"),
        (edit_config(rms_norm_eps=1e-3), "every token sent to 'a'"),
        (edit_config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_theta=None), "every token"),
    ],
)
def test_a_wrong_moe_fails(check: Callable[..., Identity], edit: Callable[[Path], None], message: str) -> None:
    with pytest.raises(VerificationError, match=f"{message}.*more than 1e-05; nothing was written"):
        check(edit)


def test_a_wrong_name_map_is_found_and_leaves_nothing(
    built: tuple[Path, Inputs],
    tmp_path: Path,
    build: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The code itself broken: gate and up exchanged. T1 fails although inputs and files are whole.
    gate, up, down = TARGET.slots
    monkeypatch.setitem(TARGETS, "mixtral", replace(TARGET, slots=(up, gate, down)))
    _, inputs = built
    experts = {n: e.checkpoint.path for n, e in zip(inputs.names, inputs.experts, strict=True)}
    with pytest.raises(VerificationError, match="2 copies of the trunk as experts: logits differ"):
        build(tmp_path / "moe", inputs.trunk.checkpoint.path, experts)
    assert list(tmp_path.iterdir()) == []


def test_a_field_that_is_not_carried_is_found(
    built: tuple[Path, Inputs], tmp_path: Path, build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As mergekit 0.1.5 does it: the window is dropped.
    def dropped(fields: Any, sizes: Any) -> dict[str, Any]:
        return TARGET.settings(fields, sizes) | {"sliding_window": None}

    monkeypatch.setitem(TARGETS, "mixtral", replace(TARGET, settings=dropped))
    _, inputs = built
    experts = {n: e.checkpoint.path for n, e in zip(inputs.names, inputs.experts, strict=True)}
    with pytest.raises(VerificationError, match="2 copies of the trunk as experts: logits differ"):
        build(tmp_path / "moe", inputs.trunk.checkpoint.path, experts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_holds_in_float32_arithmetic_and_mostly_in_its_own(
    siblings: dict[str, Path], tmp_path: Path, build: Callable[..., Path], dtype: str
) -> None:
    out = build(tmp_path / "moe", siblings["base"], {n: siblings[n] for n in "ab"}, dtype=dtype)
    identity = json.loads((out / "solera.json").read_text())["checks"]["identity"]
    assert identity["identical_experts"] <= 1e-5
    assert 0.9 <= identity["agreement"] <= 1.0
