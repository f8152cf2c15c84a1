"""A small hub on the loopback interface: as much of the real protocol as the real client needs, and a record of it."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["COMMIT", "Asked", "Hub", "ask", "serve"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_REVISIONS = ("main", "v1", COMMIT)
_PIECE = 1 << 16


@dataclass
class Asked:
    """One request, and how many bytes of a body went out for it."""

    method: str
    path: str
    file: str
    first: int | None  # of the range that was asked for
    last: int | None
    token: str | None
    served: int = 0


@dataclass
class Hub:
    """What the hub holds and how it behaves.

    Attributes:
        folder: `folder/name` is the repository `me/name`, at one commit.
        ranges: "yes", "no" (a range is ignored, the whole file comes) or "wrong" (another range comes).
        elsewhere: weights are redirected to another host name, as to a content delivery network.
        sizes: bytes that the list of files claims, by `name/file`, where they are not the true ones.
        asked: every request.
    """

    folder: Path
    endpoint: str = ""
    ranges: str = "yes"
    elsewhere: bool = False
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    asked: list[Asked] = field(default_factory=list[Asked])

    def weights(self) -> list[Asked]:
        """The requests that were answered with bytes of a weight file."""
        return [asked for asked in self.asked if asked.file.endswith((".safetensors", ".bin")) and asked.served]

    def reset(self) -> None:
        """Forget what was asked, and behave."""
        self.ranges, self.elsewhere = "yes", False
        self.sizes.clear()
        self.asked.clear()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name it has in the base class
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(found[1]) if found else None
        last = int(found[2]) if found and found[2] else None
        file = parts[4] if len(parts) > 4 and parts[0] != "api" else ""
        self.asked = Asked(self.command, self.path, file, first, last, self.headers.get("Authorization"))
        self.hub.asked.append(self.asked)
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        name = repo.removeprefix("me/")
        if repo == "me/gated":
            return self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if not repo.startswith("me/") or not (self.hub.folder / name).is_dir():
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = sorted(p for p in (self.hub.folder / name).iterdir() if p.is_file())
        revision = parts[5] if parts[0] == "api" and len(parts) > 5 else parts[3] if parts[0] != "api" else "main"
        if revision not in _REVISIONS:
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if parts[0] == "api":
            sizes = {f"{name}/{f.name}": f.stat().st_size for f in files} | self.hub.sizes
            mine = {key.removeprefix(f"{name}/"): n for key, n in sizes.items() if key.startswith(f"{name}/")}
            siblings = [{"rfilename": f} for f in mine]
            tree = [
                {"type": "file", "path": f, "size": n, "oid": hashlib.sha1(f.encode()).hexdigest()}
                for f, n in mine.items()
            ]
            content = tree if "tree" in parts else {"id": repo, "sha": COMMIT, "siblings": siblings}
            return self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
        path = next((f for f in files if f.name == file), None)
        if path is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.reply_file(path)

    def reply_file(self, path: Path) -> None:
        size = path.stat().st_size
        etag = hashlib.sha1(path.read_bytes()).hexdigest() if size < 1 << 24 else "0" * 40
        about = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        host = self.headers["Host"]
        if self.hub.elsewhere and path.suffix == ".safetensors" and not host.startswith("localhost"):
            there = f"http://{host.replace('127.0.0.1', 'localhost')}{self.path}"
            linked = {"Location": there, "X-Linked-Size": str(size), "X-Linked-ETag": about["ETag"]}
            return self.reply(302, b"", about | linked)
        begin, end = 0, size
        if self.asked.first is not None and self.hub.ranges != "no":
            begin = self.asked.first + (self.hub.ranges == "wrong")
            end = min(size, size if self.asked.last is None else self.asked.last + 1)
            if begin >= size:
                return self.reply(416, b"", about | {"Content-Range": f"bytes */{size}"})
            about["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self.send_response(206 if "Content-Range" in about else 200)
        for key, value in (about | {"Content-Length": str(end - begin)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        with path.open("rb") as stream:
            stream.seek(begin)
            while begin < end:
                piece = stream.read(min(_PIECE, end - begin))
                try:
                    self.wfile.write(piece)
                except OSError:  # the client hung up
                    self.close_connection = True
                    return None
                begin += len(piece)
                self.asked.served += len(piece)
        return None

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.asked.served += len(body)


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """A running hub."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


_CLIENT = """
import json, sys
from pathlib import Path
from solera_core.errors import SoleraError
arguments = json.loads(sys.argv[1])
answer = {}
try:
    exec(arguments.pop("code"), globals())
except SoleraError as e:
    answer |= {"error": type(e).__name__, "message": str(e)}
print(json.dumps(answer))
"""


def ask(code: str, endpoint: str, home: Path, *, offline: bool = False, token: str = "", **arguments: Any) -> Any:
    """Run `code` in a process of its own: the hub's client reads its environment when it is imported.

    The code finds its `arguments` in the mapping of that name and puts what it found into `answer`; an error of solera
    is put there as `error` and `message`. The cache is `home/hf`.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(home / "hf"), "HF_ENDPOINT": endpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_TOKEN": token} if token else {}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", _CLIENT, json.dumps(arguments | {"code": code})]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=100)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])
