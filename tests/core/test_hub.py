"""References to the hub, against a small hub on the loopback interface: the real client, the real protocol."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from solera_core.checkpoint import locate, open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, HubError
from solera_core.hub import split_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"

CLIENT = """
import json, sys
from pathlib import Path
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import SoleraError
try:
    ctx = Context(base_dir=Path(sys.argv[2]), allow_pickle="pickle" in sys.argv)
    ck = open_checkpoint(sys.argv[1], ctx)
    answer = {"digest": ck.digest(), "revision": ck.revision, "files": sorted(p.name for p in ck.path.iterdir())}
except SoleraError as e:
    answer = {"error": type(e).__name__, "message": str(e)}
print(json.dumps(answer))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs."""

    folder: ClassVar[Path]
    asked: ClassVar[list[str]]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name it has in the base class
        self.asked.append(self.path)

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo == "me/gated":
            return self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if repo not in ("me/model", "me/pickled"):
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = sorted(p for p in (self.folder / repo.split("/")[1]).iterdir() if p.is_file())
        revision = parts[5] if parts[0] == "api" and len(parts) > 5 else parts[3] if parts[0] != "api" else "main"
        if revision not in ("main", "v1", COMMIT):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if parts[0] == "api":
            siblings = [{"rfilename": f.name} for f in files]
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files]
            content = tree if "tree" in parts else {"id": repo, "sha": COMMIT, "siblings": siblings}
            return self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
        file = next((f for f in files if f.name == parts[4]), None)
        if file is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.reply(200, file.read_bytes(), {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, siblings: dict[str, Path]) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(siblings["a"], folder / "model")
    (folder / "model" / "training_args.bin").write_bytes(b"not wanted")
    (folder / "model" / "consolidated.safetensors").write_bytes(b"not wanted")
    shutil.copytree(siblings["a"], folder / "pickled")
    from safetensors.torch import load_file
    from torch import save

    save(load_file(folder / "pickled" / "model.safetensors"), folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "model.safetensors").unlink()
    Hub.folder, Hub.asked = folder, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(ref: str, endpoint: str, home: Path, *arguments: str, offline: bool = False) -> dict[str, str]:
    """Open `ref` in a process of its own: the client reads its environment when it is imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(home / "hf"), "HF_ENDPOINT": endpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if offline:
        env["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-c", CLIENT, ref, str(home), *arguments]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=100)
    assert run.returncode == 0, run.stderr
    answer: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
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


def test_pickles_are_downloaded_with_permission_only(hub: str, tmp_path: Path) -> None:
    Hub.asked.clear()
    answer = ask("me/pickled", hub, tmp_path)
    assert answer["error"] == "CheckpointError"
    assert not any("pytorch_model.bin" in path for path in Hub.asked)
    assert "pytorch_model.bin" in ask("me/pickled", hub, tmp_path, "pickle")["files"]


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
