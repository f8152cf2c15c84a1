"""Models on the hub of which only headers are read, until their weights are asked for."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from tests import loopback_hub
from tests.loopback_hub import COMMIT, Hub

PREAMBLE = """
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
ctx = Context(base_dir=Path(arguments["base_dir"]))
def opened(weights="later"):
    return open_checkpoint(arguments["ref"], ctx, weights=weights)
"""
OPEN = """
ck = opened()
answer |= {"tensors": [[t.name, t.dtype, t.shape, t.file.name, t.begin, t.end] for t in ck.tensors.values()]}
answer |= {"missing": ck.missing_bytes, "revision": ck.revision}
"""
FETCH = """
ck = opened()
ck.fetch()
answer |= {"digest": ck.digest(), "missing": ck.missing_bytes}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with loopback_hub.serve(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(server: Hub) -> Hub:
    """A hub without repositories."""
    server.reset()
    for repository in server.folder.iterdir():
        shutil.rmtree(repository)
    return server


Ask = Callable[..., Any]


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Ask:
    """`ask(code, ref="me/model", ...)`: run code against the hub; afterwards `hub.asked` is about that run alone."""

    def run(code: str, ref: str = "me/model", **options: Any) -> Any:
        hub.asked.clear()
        return loopback_hub.ask(PREAMBLE + code, hub.endpoint, tmp_path, ref=ref, base_dir=str(tmp_path), **options)

    return run


def header_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def many_shards(path: Path, shards: int = 30) -> Path:
    """One layer a shard; 50 KB each."""
    from safetensors.numpy import save_file

    path.mkdir()
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        names = [f"model.layers.{i}.{n}.weight" for n in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
        save_file({n: rng.standard_normal((64, 64)).astype(np.float32) for n in names}, path / file)
        weight_map |= dict.fromkeys(names, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": shards}))
    (path / "tokenizer.json").write_text("{}")
    return path


def test_headers_and_not_a_byte_of_weights(hub: Hub, ask: Ask) -> None:
    model = many_shards(hub.folder / "model")
    answer = ask(OPEN)
    local = open_checkpoint(model, Context())
    assert answer["tensors"] == [
        [t.name, t.dtype, list(t.shape), t.file.name, t.begin, t.end] for t in local.tensors.values()
    ]
    assert answer["revision"] == COMMIT
    assert answer["missing"] == sum(f.stat().st_size for f in model.glob("*.safetensors"))
    assert sum(a.served for a in hub.asked) < 1e6 < answer["missing"]
    ranges = {name: sorted((a.first, a.last) for a in hub.weights() if a.file == name) for name in _shards(model)}
    assert ranges == {name: [(0, 7), (8, header_bytes(model / name) - 1)] for name in _shards(model)}
    assert all(a.served == a.last - a.first + 1 for a in hub.weights() if a.first is not None and a.last is not None)
    assert all(COMMIT in a.path for a in hub.weights())


def _shards(model: Path) -> list[str]:
    return sorted(f.name for f in model.glob("*.safetensors"))


def test_reading_is_refused_until_the_weights_are_here(hub: Hub, ask: Ask, siblings: dict[str, Path]) -> None:
    shutil.copytree(siblings["a"], hub.folder / "model")
    code = """
ck = opened()
name = "model.norm.weight"
try:
    ck.read_raw(name)
except RuntimeError as e:
    answer["refused"] = str(e)
answer["before"] = [ck.is_plain(name, ("F32",)), ck.reader(name) is None, ck.missing_bytes]
ck.fetch()
answer["after"] = [ck.is_plain(name, ("F32",)), ck.reader(name) is None, ck.missing_bytes]
answer["digest"] = ck.digest()
"""
    answer = ask(code)
    assert "tensor 'model.norm.weight' [0, 32): not downloaded yet" in answer["refused"]
    size = (siblings["a"] / "model.safetensors").stat().st_size
    assert answer["before"] == [False, True, size]
    assert answer["after"] == [True, False, 0]
    assert answer["digest"] == open_checkpoint(siblings["a"], Context()).digest()
    # Everything is in the cache now: no request for weights any more, and none at all offline.
    again = ask(FETCH)
    assert again == {"digest": answer["digest"], "missing": 0}
    assert not [a for a in hub.asked if a.file == "model.safetensors"]
    assert ask(FETCH, offline=True) == again
    assert ask("answer['digest'] = opened('now').digest()", offline=True)["digest"] == answer["digest"]
    assert hub.asked == []


def test_offline_the_small_files_alone_are_no_model(hub: Hub, ask: Ask, siblings: dict[str, Path]) -> None:
    shutil.copytree(siblings["a"], hub.folder / "model")
    ask(OPEN)
    answer = ask(OPEN, offline=True)
    assert answer["error"] == "CheckpointError"
    assert "HF_HUB_OFFLINE is set while the cache" in answer["message"]


def test_a_cache_that_holds_the_weights_and_no_readme_is_enough(
    hub: Hub, ask: Ask, siblings: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(siblings["a"], hub.folder / "model")
    (hub.folder / "model" / "LICENSE").write_text("free")
    code = """
import huggingface_hub
huggingface_hub.snapshot_download("me/model", allow_patterns=["*.safetensors", "*.json"])
"""
    ask(code)
    assert ask(OPEN)["missing"] == 0
    assert not hub.weights()
    assert ask(OPEN, offline=True)["missing"] == 0
    digest = open_checkpoint(siblings["a"], Context()).digest()
    assert ask("answer['digest'] = opened('now').digest()", offline=True)["digest"] == digest


def test_what_inspect_needs(hub: Hub, ask: Ask, siblings: dict[str, Path]) -> None:
    shutil.copytree(siblings["a"], hub.folder / "model")
    (hub.folder / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    code = """
from solera_core.inspect import describe
answer |= describe(opened(arguments["weights"]))
"""
    early = ask(code, weights="later")
    assert sum(a.served for a in hub.weights()) == header_bytes(siblings["a"] / "model.safetensors")
    assert early["licence"] == "mit"
    assert early == ask(code, weights="now")


def test_a_header_of_a_megabyte(hub: Hub, ask: Ask, raw_safetensors: Callable[..., Path]) -> None:
    folder = hub.folder / "model"
    entries = {
        "__metadata__": {"note": "x" * 1_000_000},
        "w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]},
    }
    file = raw_safetensors(folder / "model.safetensors", entries, bytes(4000))
    (folder / "config.json").write_text("{}")
    assert ask(OPEN)["tensors"] == [["w", "F32", [1000], file.name, header_bytes(file), header_bytes(file) + 4000]]
    assert sum(a.served for a in hub.weights()) == header_bytes(file) > 1e6


def test_a_shard_that_is_cut_off_on_the_hub(hub: Hub, ask: Ask) -> None:
    model = many_shards(hub.folder / "model", 3)
    file = model / "model-00002-of-00003.safetensors"
    whole = file.stat().st_size
    os.truncate(file, whole - 100)
    answer = ask(OPEN)
    assert answer["error"] == "CheckpointError"
    assert (
        f"/{COMMIT}/{file.name}: truncated: the header promises {whole} bytes, the file has {whole - 100}"
        in (answer["message"])
    )
    assert f"{hub.endpoint}/me/model itself is damaged" in answer["message"]
    os.truncate(file, 20)
    answer = ask(OPEN)
    assert f"{file.name}: truncated: the header alone needs" in answer["message"]
    os.truncate(file, 5)
    answer = ask(OPEN)
    assert f"{file.name}: only 5 bytes, so it is not a safetensors file" in answer["message"]
    os.truncate(file, 0)
    assert f"{file.name}: only 0 bytes" in ask(OPEN)["message"]


def test_the_list_of_files_and_the_storage_disagree(hub: Hub, ask: Ask, siblings: dict[str, Path]) -> None:
    model = Path(shutil.copytree(siblings["a"], hub.folder / "model"))
    size = (model / "model.safetensors").stat().st_size
    os.truncate(model / "model.safetensors", size - 100)
    hub.sizes["model/model.safetensors"] = size
    answer = ask(OPEN)
    assert answer["error"] == "HubError"
    assert (
        f"model.safetensors: the file has {size - 100} bytes, but {size} by the hub's list of files"
        in (answer["message"])
    )
    os.truncate(model / "model.safetensors", 0)
    assert f"but the file is shorter than the {size} bytes of the hub's list" in ask(OPEN)["message"]


def test_no_safetensors_under_that_name(hub: Hub, ask: Ask, siblings: dict[str, Path]) -> None:
    model = Path(shutil.copytree(siblings["a"], hub.folder / "model"))
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "not a safetensors file (it starts with b'version '); a Git LFS pointer" in ask(OPEN)["message"]


def test_a_hub_without_ranges(hub: Hub, ask: Ask, raw_safetensors: Callable[..., Path]) -> None:
    """The file is taken from its start, and the connection closed behind the header."""
    size = 1 << 30
    entries = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    file = raw_safetensors(hub.folder / "model" / "model.safetensors", entries)
    os.truncate(file, header_bytes(file) + size)  # zeros that take no space
    (hub.folder / "model" / "config.json").write_text("{}")
    hub.ranges = "no"
    assert [t[0] for t in ask(OPEN)["tensors"]] == ["w"]
    requests = [a for a in hub.asked if a.file == file.name]
    assert len(requests) == 2
    assert all(a.served < size // 8 for a in requests)  # no more than what the system's buffers hold


def test_another_range_than_the_one_asked_for(hub: Hub, ask: Ask, siblings: dict[str, Path]) -> None:
    shutil.copytree(siblings["a"], hub.folder / "model")
    hub.ranges = "wrong"
    answer = ask(OPEN)
    assert answer["error"] == "HubError"
    assert "model.safetensors: bytes 0 to 7 asked for, but 'bytes 1-7/" in answer["message"]


def test_a_redirect_is_followed_without_the_token(hub: Hub, ask: Ask, siblings: dict[str, Path]) -> None:
    shutil.copytree(siblings["a"], hub.folder / "model")
    hub.elsewhere = True
    answer = ask(OPEN, token="hf_secret")
    assert len(answer["tensors"]) == len(open_checkpoint(siblings["a"], Context()).tensors)
    gets = [a for a in hub.asked if a.file == "model.safetensors" and a.method == "GET"]
    assert [(a.token, a.served > 0) for a in gets] == [("Bearer hf_secret", False), (None, True)] * 2


def test_a_gated_model(ask: Ask) -> None:
    answer = ask(OPEN, ref="me/gated")
    assert answer["error"] == "HubError"
    assert "access is gated" in answer["message"]


@pytest.mark.parametrize("name", ["../../etc/model.safetensors", "/model.safetensors", "a/b.safetensors"])
def test_an_index_names_files_beside_it_only(hub: Hub, ask: Ask, name: str) -> None:
    model = many_shards(hub.folder / "model", 2)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.0.mlp.up_proj.weight"] = name
    index.write_text(json.dumps(content))
    assert f"is said to be in {name!r}, which is not a plain file name" in ask(OPEN)["message"]
    assert not hub.weights()


def test_shards_that_the_repository_lacks_or_has_too_many_of(hub: Hub, ask: Ask) -> None:
    model = many_shards(hub.folder / "model", 3)
    stray = model / "model-00001-of-00009.safetensors"
    shutil.copy(model / "model-00001-of-00003.safetensors", stray)
    assert f"{stray.name} is not part of the model" in ask(OPEN)["message"]
    stray.unlink()
    (model / "model-00003-of-00003.safetensors").unlink()
    message = ask(OPEN)["message"]
    assert "lists model-00003-of-00003.safetensors, but it is not there (2 of 3 shards are)" in message
    assert "the repository is incomplete" in message
    assert not hub.weights()


def test_index_and_headers_disagree(hub: Hub, ask: Ask) -> None:
    model = many_shards(hub.folder / "model", 2)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    assert (
        "lists tensor 'model.layers.9.mlp.up_proj.weight' in model-00001-of-00002.safetensors, which does not"
        in (ask(OPEN)["message"])
    )


def test_pickles_are_downloaded_at_once_and_with_permission_only(hub: Hub, ask: Ask, siblings: dict[str, Path]) -> None:
    from safetensors.torch import load_file
    from torch import save

    model = Path(shutil.copytree(siblings["a"], hub.folder / "model"))
    save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert "pass --allow-pickle" in ask(OPEN)["message"]
    assert not hub.weights()
    answer = ask("ctx = Context(allow_pickle=True)" + FETCH)
    assert answer["digest"] == open_checkpoint(model, Context(allow_pickle=True)).digest()


def _with_head(model: Path, change: Callable[[Any], Any]) -> None:
    """The config ties the embeddings, and the weights hold a head made from them."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = np.ascontiguousarray(change(tensors["model.embed_tokens.weight"]))
    save_file(tensors, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))


def test_a_tied_head_is_compared_once_it_is_here(hub: Hub, ask: Ask, siblings: dict[str, Path]) -> None:
    for name in ("same", "other", "shorter"):
        shutil.copytree(siblings["a"], hub.folder / name)
    _with_head(hub.folder / "same", lambda w: w)
    _with_head(hub.folder / "other", lambda w: w + 1)
    _with_head(hub.folder / "shorter", lambda w: w[:-1])
    assert "lm_head.weight" not in [t[0] for t in ask(OPEN, ref="me/same")["tensors"]]
    assert "digest" in ask(FETCH, ref="me/same")
    words = "config.json ties the embeddings"
    assert words in ask(OPEN, ref="me/shorter")["message"]  # the shape tells
    assert sum(a.served for a in hub.weights()) < 10_000
    assert "tensors" in ask(OPEN, ref="me/other")
    assert words in ask(FETCH, ref="me/other")["message"]


def test_an_adapter_is_here_at_once_and_its_base_later(
    hub: Hub, ask: Ask, siblings: dict[str, Path], raw_safetensors: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(siblings["a"], hub.folder / "model")
    target = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    entries = {
        target.format("A"): {"dtype": "F32", "shape": [2, 32], "data_offsets": [0, 256]},
        target.format("B"): {"dtype": "F32", "shape": [32, 2], "data_offsets": [256, 512]},
    }
    factors = np.random.default_rng(0).standard_normal(128).astype(np.float32).tobytes()
    adapter = hub.folder / "adapter"
    raw_safetensors(adapter / "adapter_model.safetensors", entries, factors)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    shutil.copytree(siblings["a"], tmp_path / "model")
    shutil.copytree(adapter, tmp_path / "adapter")
    answer = ask(OPEN, ref="me/model+me/adapter")
    assert answer["missing"] == (siblings["a"] / "model.safetensors").stat().st_size
    assert {a.file for a in hub.weights() if a.first is None} == {"adapter_model.safetensors"}
    local = open_checkpoint("model+adapter", Context(base_dir=tmp_path))
    assert ask(FETCH, ref="me/model+me/adapter")["digest"] == local.digest()


def test_the_download_must_be_what_the_headers_said(hub: Hub, ask: Ask, siblings: dict[str, Path]) -> None:
    model = Path(shutil.copytree(siblings["a"], hub.folder / "model"))
    code = """
ck = opened()
file = Path(arguments["file"])
file.write_bytes(file.read_bytes().replace(b'"shape":[304,32]', b'"shape":[32,304]', 1))
ck.fetch()
"""
    answer = ask(code, file=str(model / "model.safetensors"))
    assert answer["error"] == "CheckpointError"
    assert ".weight' is F32 (32, 304) in model.safetensors from byte" in answer["message"]
    assert "but was F32 (304, 32) in model.safetensors from byte" in answer["message"]


def test_an_adapter_is_no_model(hub: Hub, ask: Ask) -> None:
    (hub.folder / "model").mkdir()
    (hub.folder / "model" / "adapter_config.json").write_text("{}")
    (hub.folder / "model" / "adapter_model.safetensors").write_bytes(bytes(100))
    assert "is a LoRA adapter, not a model" in ask(OPEN)["message"]
    assert not hub.weights()


def test_python_code_is_not_even_fetched_without_permission(
    hub: Hub, ask: Ask, siblings: dict[str, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(siblings["a"], hub.folder / "model"))
    (model / "modeling.py").write_text("raise SystemExit")
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling.M"}}
    (model / "config.json").write_text(json.dumps(config))
    assert "`auto_map` asks to run Python code" in ask(OPEN)["message"]
    assert not [a for a in hub.asked if a.file == "modeling.py"]
    assert not hub.weights()
    trusted = "ctx = Context(trust_remote_code=True)" + OPEN + "answer['sidecars'] = [p.name for p in ck.sidecars]"
    assert "modeling.py" in ask(trusted)["sidecars"]
