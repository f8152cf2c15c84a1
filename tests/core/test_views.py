"""Views: renamed tensors keep their bytes and their speed, computed ones have values only, and identity tells all."""

from dataclasses import replace
from operator import methodcaller
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_core.views import Derived, view


@pytest.fixture
def model(llama: Path, ctx: Context) -> Checkpoint:
    return open_checkpoint(llama, ctx)


def _doubled(model: Checkpoint, name: str) -> Derived:
    def read(start: int, stop: int) -> npt.NDArray[np.float32]:
        return model.read_flat(name, start, stop) * 2

    return Derived(replace(model.tensors[name], dtype="F32"), read)


def test_a_renamed_tensor_keeps_bytes_file_and_speed(model: Checkpoint) -> None:
    seen = view(model, {"norm": "model.norm.weight"}, what={"renamed": True})
    assert list(seen.tensors) == ["norm"]
    assert seen.tensors["norm"].name == "norm"
    assert np.array_equal(seen.read_raw("norm"), model.read_raw("model.norm.weight"))
    assert seen.is_plain("norm", ("F32", "F16", "BF16"))
    assert not seen.is_derived("norm")
    reader = seen.reader("norm")
    assert reader is not None
    with reader:
        raw = np.empty(seen.tensors["norm"].nbytes, np.uint8)
        reader.read_into(seen.tensors["norm"].begin, raw)
    assert np.array_equal(raw, model.read_raw("model.norm.weight"))


def test_a_computed_tensor_has_values_and_no_bytes(model: Checkpoint) -> None:
    name = "model.norm.weight"
    seen = view(model, {name: _doubled(model, name)}, what={"scale": 2})
    assert np.array_equal(seen.read(name), model.read(name) * 2)
    assert np.array_equal(seen.read_flat(name, 3, 5), model.read_flat(name, 3, 5) * 2)
    assert seen.is_derived(name)
    assert not seen.is_plain(name, ("F32",))
    assert seen.reader(name) is None
    with pytest.raises(CheckpointError, match="is computed; its bytes are not stored"):
        seen.read_raw(name)


def test_views_lie_over_views(model: Checkpoint) -> None:
    name = "model.norm.weight"
    doubled = view(model, {"a": _doubled(model, name), "b": name}, what={"scale": 2})
    renamed = view(doubled, {"c": "a", "d": "b"}, what={"names": "c, d"})
    assert np.array_equal(renamed.read("c"), model.read(name).reshape(-1) * 2)
    assert renamed.is_derived("c")
    assert not renamed.is_plain("c", ("F32",))
    assert renamed.is_plain("d", ("F32", "F16", "BF16"))


def test_what_differs_is_part_of_the_identity(model: Checkpoint) -> None:
    name = "model.norm.weight"
    one, same, other = (view(model, {name: name}, what={"n": n}) for n in (1, 1, 2))
    for of in map(methodcaller, ("digest", "identity", "fingerprint")):
        assert of(one) == of(same)
        assert len({of(one), of(other), of(model)}) == 3
    assert one.identity().startswith("blake3:")


def test_ranges_and_names_are_checked(model: Checkpoint) -> None:
    seen = view(model, {"norm": "model.norm.weight"}, what={})
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.norm\.weight'"):
        seen.read_flat("model.norm.weight")
    with pytest.raises(ValueError, match="range"):
        seen.read_flat("norm", 0, 10_000)
