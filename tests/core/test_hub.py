"""References to the hub, against a small hub on the loopback interface: the real client, the real protocol."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from solera_core.checkpoint import locate, open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, HubError
from solera_core.hub import split_adapter
from tests import loopback_hub
from tests.loopback_hub import COMMIT, Hub

CLIENT = """
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
ctx = Context(base_dir=Path(arguments["base_dir"]), allow_pickle=arguments["pickle"])
ck = open_checkpoint(arguments["ref"], ctx)
answer |= {"digest": ck.digest(), "revision": ck.revision, "files": sorted(p.name for p in ck.path.iterdir())}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, siblings: dict[str, Path]) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(siblings["a"], folder / "model")
    (folder / "model" / "training_args.bin").write_bytes(b"not wanted")
    (folder / "model" / "consolidated.safetensors").write_bytes(b"not wanted")
    shutil.copytree(siblings["a"], folder / "pickled")
    from safetensors.torch import load_file
    from torch import save

    save(load_file(folder / "pickled" / "model.safetensors"), folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "model.safetensors").unlink()
    with loopback_hub.serve(folder) as hub:
        yield hub


@pytest.fixture
def hub(server: Hub) -> str:
    server.reset()
    return server.endpoint


def ask(ref: str, endpoint: str, home: Path, *, pickle: bool = False, offline: bool = False) -> dict[str, str]:
    answer: dict[str, str] = loopback_hub.ask(
        CLIENT, endpoint, home, offline=offline, ref=ref, base_dir=str(home), pickle=pickle
    )
    return answer


def test_download_then_offline_from_the_cache(
    hub: str, tmp_path: Path, siblings: dict[str, Path], ctx: Context
) -> None:
    answer = ask("me/model", hub, tmp_path)
    assert answer["digest"] == open_checkpoint(siblings["a"], ctx).digest()
    assert answer["revision"] == COMMIT
    assert "tokenizer.json" in answer["files"]
    assert not {"training_args.bin", "consolidated.safetensors"} & set(answer["files"])
    assert ask("me/model", "http://127.0.0.1:9", tmp_path, offline=True) == answer


def test_a_revision(hub: str, tmp_path: Path) -> None:
    assert ask("me/model@v1", hub, tmp_path)["revision"] == COMMIT
    answer = ask("me/model@v2", hub, tmp_path)
    assert answer["error"] == "CheckpointError"
    assert f"{hub} has me/model, but no branch, tag or commit 'v2'" in answer["message"]


def test_a_model_that_does_not_exist(hub: str, tmp_path: Path) -> None:
    answer = ask("me/other", hub, tmp_path)
    assert answer["error"] == "CheckpointError"
    assert f"no directory {tmp_path / 'me/other'}, and {hub} has no such model" in answer["message"]


def test_a_gated_model(hub: str, tmp_path: Path) -> None:
    answer = ask("me/gated", hub, tmp_path)
    assert answer["error"] == "HubError"
    assert "access is gated" in answer["message"]


def test_pickles_are_downloaded_with_permission_only(hub: str, server: Hub, tmp_path: Path) -> None:
    answer = ask("me/pickled", hub, tmp_path)
    assert answer["error"] == "CheckpointError"
    assert not server.weights()
    assert "pytorch_model.bin" in ask("me/pickled", hub, tmp_path, pickle=True)["files"]


def test_no_network(tmp_path: Path) -> None:
    answer = ask("me/model", "http://127.0.0.1:9", tmp_path)
    assert answer["error"] == "HubError"
    assert "http://127.0.0.1:9 cannot be reached while the cache has no copy" in answer["message"]


def test_offline_and_not_in_the_cache(ctx: Context) -> None:
    with pytest.raises(CheckpointError, match=r"no directory .*, and HF_HUB_OFFLINE is set while the cache"):
        open_checkpoint("nobody/nothing-at-all", ctx)


def test_a_local_directory_wins(llama: Path, ctx: Context) -> None:
    folder = ctx.base_dir / "me"
    folder.mkdir()
    llama.rename(folder / "model")
    assert locate("me/model", ctx) == folder / "model"


@pytest.mark.parametrize("ref", ["model", "./me/model", "../x/y", "/no/where", "a/b/c", "me/model@", "@", "-x/y", ""])
def test_what_is_no_hub_id_is_not_asked_for(ref: str, ctx: Context) -> None:
    with pytest.raises(CheckpointError, match=r"not a hub id|is no valid hub id|reference is empty"):
        open_checkpoint(ref, Context(base_dir=ctx.base_dir, models={"blend": ctx.base_dir}))


def test_what_was_tried_is_said(ctx: Context) -> None:
    with pytest.raises(
        CheckpointError, match=r"model 'blent' not found: no finished stage of that name \(there are: blend\), no"
    ):
        open_checkpoint("blent", Context(base_dir=ctx.base_dir, models={"blend": ctx.base_dir}))


def test_a_file_is_no_model(llama: Path, ctx: Context) -> None:
    with pytest.raises(CheckpointError, match="is a file; a model is a directory"):
        open_checkpoint(llama / "config.json", ctx)


def test_splitting_hub_ids(ctx: Context) -> None:
    assert split_adapter("me/model@v1+you/adapter@v2", ctx) == ("me/model@v1", "you/adapter@v2")
    assert split_adapter("me/model+a/b+c/d", ctx) == ("me/model+a/b", "c/d")
    assert split_adapter("me/model", ctx) is None
    assert split_adapter("model+", ctx) is None


def test_hub_error_is_about_the_environment() -> None:
    assert HubError.exit_code == 4
