"""`compat: mergekit` against mergekit itself, in the same test: every byte of every tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, ResourceError
from solera_core.provenance import read_provenance, verify
from solera_merge.config import MergeConfig
from solera_merge.methods.catalogue import METHODS
from solera_merge.plan import make_plan, plan_key
from solera_merge.run import merge, plan_merge
from tests.merge.test_parity_mergekit import (  # noqa: F401
    FAMILIES,
    RECIPES,
    STOPS_IN_BFLOAT16,
    families,
    layers,
    resolved,
    run_mergekit,
    source,
)

Recipe = Callable[..., MergeConfig]
Siblings = dict[str, Path]
COMPAT = Context(compat="mergekit")

MORE: dict[str, dict[str, Any]] = {
    "passthrough, scaled": {"merge_method": "passthrough", "models": [source("a", scale=0.3)]},
    "arcee_fusion": {"merge_method": "arcee_fusion", "base_model": "base", "models": [source("wide")]},
    "dare_ties, nothing dropped": {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": [source("a", weight=0.3), source("b", weight=0.4)],
    },
}
ALL = RECIPES | MORE
# mergekit's random masks follow its schedule; see solera_merge.compat.
NAN_IN_BFLOAT16 = {"karcher, wide angles"}  # with `tol: 0` it divides an angle of 0 by its sine
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}


@pytest.fixture
def both(run_mergekit: Callable[..., None], families: Any, recipe: Recipe, tmp_path: Path) -> Callable[..., None]:  # noqa: F811
    """`both(name, family, stored, **dtypes)`: merges with both, and compares names, formats, shapes and bytes."""

    def run(name: str, family: str, stored: str, **dtypes: str) -> None:
        content = resolved(ALL[name], families[family, stored]) | dtypes
        run_mergekit(content, tmp_path / "theirs")
        merge(recipe(**content), tmp_path / "ours", COMPAT)
        theirs, ours = (open_checkpoint(tmp_path / who, Context()) for who in ("theirs", "ours"))
        assert {n: (t.dtype, t.shape) for n, t in theirs.tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in ours.tensors.items()
        }
        different = [n for n in ours.tensors if theirs.read_raw(n).tobytes() != ours.read_raw(n).tobytes()]
        assert not different

    return run


def test_every_method_that_mergekit_repeats_is_here() -> None:
    from mergekit.merge_methods import registered_methods

    theirs = {method.spec.name for method in registered_methods()}
    assert {content["merge_method"] for content in ALL.values()} >= (theirs & METHODS.keys()) - RANDOM


def test_defaults_are_mergekits() -> None:
    """What a recipe leaves out must mean the same to both, where both have the parameter."""
    from mergekit.merge_methods import registered_methods

    differing = {
        f"{method.spec.name}.{theirs.name}": (theirs.default, ours.default)
        for method in registered_methods()
        if method.spec.name in METHODS
        for theirs in method.spec.parameters
        if (ours := METHODS[method.spec.name].parameters.get(theirs.name)) is not None
        and not theirs.required
        and theirs.default != ours.default
    }
    assert differing == {"passthrough.scale": (None, 1.0)}  # no multiplication, and one by 1


BFLOAT16 = [
    (name, family)
    for name in ALL
    for family in FAMILIES
    # mergekit sets num_hidden_layers but not layer_types, and transformers 5 refuses such a config.
    if name not in STOPS_IN_BFLOAT16 | NAN_IN_BFLOAT16 and (family == "llama" or "slices" not in name)
]


@pytest.mark.parametrize(("name", "family"), BFLOAT16)
def test_bfloat16(both: Callable[..., None], name: str, family: str) -> None:
    both(name, family, "bfloat16", dtype="bfloat16")


@pytest.mark.parametrize("name", ALL)
def test_float32(both: Callable[..., None], name: str) -> None:
    both(name, "llama", "float32", dtype="float32")


@pytest.mark.parametrize(
    ("stored", "dtypes"),
    [
        ("bfloat16", {}),
        ("bfloat16", {"dtype": "float32", "out_dtype": "bfloat16"}),
        ("bfloat16", {"out_dtype": "float32"}),
        ("float32", {"dtype": "float16"}),
        ("float32", {"dtype": "bfloat16", "out_dtype": "float16"}),
    ],
)
@pytest.mark.parametrize("name", ["ties", "slerp", "arcee_fusion"])
def test_dtype_and_out_dtype(both: Callable[..., None], name: str, stored: str, dtypes: dict[str, str]) -> None:
    both(name, "llama", stored, **dtypes)


def test_where_mergekit_writes_nan_the_merge_stops(
    run_mergekit: Callable[..., None],  # noqa: F811
    families: Any,  # noqa: F811
    recipe: Recipe,
    tmp_path: Path,
) -> None:
    content = resolved(RECIPES["karcher, wide angles"], families["llama", "bfloat16"]) | {"dtype": "bfloat16"}
    run_mergekit(content, tmp_path / "theirs")
    theirs = open_checkpoint(tmp_path / "theirs", Context())
    assert any(np.isnan(theirs.read_flat(name)).any() for name in theirs.tensors)
    with pytest.raises(CheckpointError, match=r"NaN or infinite"):
        merge(recipe(**content), tmp_path / "ours", COMPAT)
    assert not (tmp_path / "ours").exists()


def test_where_mergekit_stops_its_reason_is_given(families: Any, recipe: Recipe, tmp_path: Path) -> None:  # noqa: F811
    (name,) = STOPS_IN_BFLOAT16
    content = resolved(RECIPES[name], families["llama", "bfloat16"]) | {"dtype": "bfloat16"}
    with pytest.raises(
        CheckpointError, match=r"(?s)'model\..*mergekit's multislerp stops.*sum.*is zero.*without compat"
    ):
        merge(recipe(**content), tmp_path / "ours", COMPAT)


def test_the_record_says_so(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> None:
    import torch

    config = recipe(merge_method="linear", models=[source(str(siblings[m]), weight=1) for m in "ab"])
    merge(config, tmp_path / "as mergekit", COMPAT)
    merge(config, tmp_path / "plain", Context())
    record = read_provenance(tmp_path / "as mergekit")
    assert record["compat"] == {
        "with": "mergekit",
        "mergekit": record["versions"]["mergekit"],
        "torch": torch.__version__,
    }
    assert "compat" not in read_provenance(tmp_path / "plain")
    assert verify(tmp_path / "as mergekit") == []
    assert record["checks"]["drift"]["tensors"].keys() == record["tensors"].keys()
    drifts = [read_provenance(tmp_path / d)["checks"]["drift"]["tensors"] for d in ("as mergekit", "plain")]
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-4)


def test_it_can_be_made_again_from_its_record(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> None:
    from solera.rebuild import rebuild

    config = recipe(
        merge_method="task_arithmetic",
        base_model=str(siblings["base"]),
        models=[source(str(siblings[m]), weight=0.3) for m in "ab"],
        dtype="bfloat16",
    )
    plain = merge(config, tmp_path / "plain", Context())
    out = merge(config, tmp_path / "out", COMPAT)
    assert read_provenance(plain)["tensors"] != read_provenance(out)["tensors"]
    assert rebuild(out, Context()).problems == ()


def test_a_run_goes_on_only_with_the_same_compat_and_versions(
    recipe: Recipe, siblings: Siblings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(merge_method="linear", models=[source(str(siblings[m]), weight=1) for m in "ab"])
    key = plan_key(*make_plan(config, COMPAT))
    assert key == plan_key(*make_plan(config, COMPAT))
    assert key != plan_key(*make_plan(config, Context()))
    monkeypatch.setattr("solera_merge.compat.mergekit_versions", lambda: {"mergekit": "0.1.6", "torch": "2.13"})
    assert key != plan_key(*make_plan(config, COMPAT))


def test_threads_change_no_byte(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> None:
    config = recipe(
        merge_method="ties",
        base_model=str(siblings["base"]),
        models=[source(str(siblings[m]), weight=1, density=0.5) for m in "abc"],
        dtype="bfloat16",
    )
    files = []
    for threads in (1, 4):
        out = merge(config, tmp_path / str(threads), Context(compat="mergekit", threads=threads))
        files.append({f.name: f.read_bytes() for f in out.iterdir()})
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"merge_method": "dare_ties", "base_model": "base", "parameters": {"weight": 1, "density": [1, 0.5]}},
            "merge_method: dare_ties draws random masks.*leave it out",
        ),
        ({"parameters": {"weight": 1}, "tokenizer_source": "a"}, "tokenizer_source: mergekit rebuilds the embeddings"),
        (
            {"merge_method": "karcher", "parameters": {"weight": [1, 2]}},
            "parameters.weight: mergekit's karcher has no such parameter",
        ),
    ],
)
def test_what_cannot_be_the_same_is_refused(
    recipe: Recipe, siblings: Siblings, changes: dict[str, Any], message: str
) -> None:
    content = {"merge_method": "linear", "models": [source("a"), source("b")], **changes}
    with pytest.raises(ConfigError, match=f"^{message}"):
        plan_merge(recipe(**content), Context(compat="mergekit", models=siblings))


def test_a_parameter_that_mergekit_lacks_may_be_at_its_default(recipe: Recipe, siblings: Siblings) -> None:
    config = recipe(merge_method="karcher", models=["a", "b"], parameters={"weight": 1})
    plan_merge(config, Context(compat="mergekit", models=siblings))


def test_other_names(recipe: Recipe, siblings: Siblings, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit.merge_methods import registry

    config = recipe(merge_method="linear", models=["a", "b"], parameters={"weight": 1})
    with pytest.raises(ConfigError, match=r"^compat: 'mergkit' is not known \(did you mean 'mergekit'\?\)"):
        plan_merge(config, Context(compat="mergkit", models=siblings))
    monkeypatch.delitem(registry._METHODS, "linear")
    with pytest.raises(ConfigError, match=r"^merge_method: mergekit [0-9.]+ has no 'linear'"):
        plan_merge(config, Context(compat="mergekit", models=siblings))


def test_arcee_fusion_of_large_tensors_is_a_lottery(
    recipe: Recipe, bare_model: Callable[..., Path], tmp_path: Path
) -> None:
    for size, refused in ((1_000_000, False), (1_000_001, True)):
        for name in "ab":
            bare_model(tmp_path / f"{name}{size}", {"w": np.ones((1, size))}, num_hidden_layers=0)
        config = recipe(merge_method="arcee_fusion", base_model=f"a{size}", models=[f"b{size}"])
        ctx = Context(compat="mergekit", base_dir=tmp_path)
        if refused:
            with pytest.raises(ConfigError, match=r"more than 1000000 elements \('w'\) from a random sample"):
                plan_merge(config, ctx)
        else:
            plan_merge(config, ctx)


def test_an_adapter_is_refused(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    layer = "base_model.model.model.layers.0.self_attn.q_proj."
    low_rank = {
        f"{layer}lora_A.weight": np.ones((2, 32), np.float32),
        f"{layer}lora_B.weight": np.ones((32, 2), np.float32),
    }
    save_file(low_rank, adapter / "adapter_model.safetensors")
    config = recipe(merge_method="passthrough", models=[f"{siblings['base']}+{adapter}"])
    plan_merge(config, Context())
    with pytest.raises(CheckpointError, match=r"adapter: mergekit has peft merge an adapter.*merge_and_unload"):
        plan_merge(config, COMPAT)


def test_memory_is_that_of_whole_tensors(recipe: Recipe, siblings: Siblings, tmp_path: Path) -> None:
    content = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [source(m, weight=1, density=0.5) for m in "abc"],
    }
    plan = plan_merge(recipe(**content), Context(compat="mergekit", models=siblings, threads=1))
    embedding = 304 * 32
    assert plan.memory_bytes >= embedding * 4 * (4 + 4 + 3 + 3)  # inputs, as converted, deltas, and their sort
    few = Context(compat="mergekit", models=siblings, memory_bytes=embedding * 4 * 4)
    with pytest.raises(ResourceError, match=r"'lm_head.weight' \(304, 32\): ties needs .* --memory"):
        merge(recipe(**content), tmp_path / "out", few)


def test_an_input_that_is_not_finite_is_named(recipe: Recipe, bare_model: Callable[..., Path], tmp_path: Path) -> None:
    good = np.ones((3, 4))
    bad = good.copy()
    bad[2, 1] = np.inf
    bare_model(tmp_path / "a", {"w": good, "position_ids": np.arange(4)}, "BF16", num_hidden_layers=0)
    bare_model(tmp_path / "b", {"w": good, "position_ids": np.arange(4)}, "F32", num_hidden_layers=0)
    damaged: dict[str, Any] = {"w": bad.astype(np.float32), "position_ids": np.arange(4)}
    save_file(damaged, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    bare_model(tmp_path / "c", {"w": good * 2, "position_ids": np.arange(4)}, "BF16", num_hidden_layers=0)
    ctx = Context(compat="mergekit", base_dir=tmp_path, reload_check=False)
    with pytest.raises(CheckpointError, match=r"tensor 'w' \(3, 4\) of model 'b' holds inf at \(2, 1\)"):
        merge(recipe(merge_method="linear", models=["a", "b"], parameters={"weight": 1}), tmp_path / "out", ctx)
    merge(recipe(merge_method="linear", models=["a", "c"], parameters={"weight": 1}), tmp_path / "out", ctx)
    out = open_checkpoint(tmp_path / "out", Context())
    assert (out.read("w") == 1.5).all()
    assert out.tensors["position_ids"].dtype == "I64"
    assert out.read_raw("position_ids").tobytes() == np.arange(4).tobytes()
