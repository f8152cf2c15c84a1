"""A hub on 127.0.0.1 that speaks the wire format of huggingface_hub 2.x (LFS transport), and checkpoints to publish."""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "test" * 9
LFS_BYTES = 1_000_000  # the server decides what is LFS: weights, and whatever is larger than this


@dataclass(frozen=True)
class Entry:
    """One file in one commit."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.lfs else self.git_sha1


@dataclass
class Repo:
    """One model repository: a line of commits, and tags."""

    private: bool
    commits: list[tuple[str, dict[str, Entry]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, Entry]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, Entry]] | None:
        wanted = self.head if revision in ("main", "refs/heads/main") else self.tags.get(revision, revision)
        return next((c for c in self.commits if c[0] == wanted), None)

    def commit(self, files: dict[str, Entry], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits.append((oid, files))
        self.messages.append(message)
        return oid


@dataclass
class Hub:
    """The server's memory, and switches for what may go wrong."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)  # "METHOD path-regex" -> status, message
    always_public: bool = False
    corrupt: str = ""  # a file whose bytes the hub gets wrong

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "PYTEST_CURRENT_TEST")}
        roots = [ROOT, *(ROOT / part for part in ("core", "merge", "distill", "eval"))]
        return environment | {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": os.pathsep.join(map(str, roots)),
            "PYTHONWARNINGS": "error,ignore::DeprecationWarning",  # huggingface_hub 2.4 itself sends blobs the old way
            **more,
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class calls it so)
        pass

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    # plumbing

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self._read()
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, (status, message) in self.hub.answers.items():
            if re.fullmatch(pattern, f"{self.command} {path}"):
                return self._error(status, message)
        for method, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                return handler(self, **match.groupdict())
        return self._error(404, "no such route")

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts: list[bytes] = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str = "") -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, repo: str) -> Repo | None:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and not self._authorised()):
            self._error(
                401,
                "Invalid username or password." if not self._authorised() else "Repository not found",
                "RepoNotFound",
            )
            return None
        return found

    # routes

    def create(self) -> None:
        if not self._authorised():
            return self._error(401, "Invalid username or password.")
        asked = json.loads(self.body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        repo = self.hub.repos[name] = Repo(private and not self.hub.always_public)
        repo.commit({".gitattributes": Entry(b"*.safetensors filter=lfs\n", lfs=False)}, "initial commit")
        return self._json({"url": url, "name": name, "id": name})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            return self._json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        if "license: nonsense" in content:
            return self._json({"errors": [{"message": '"license" must be one of ...'}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def info(self, repo: str, revision: str | None = None) -> None:
        found = self._repo(repo)
        if found is None:
            return None
        at = found.at(revision or "main")
        if at is None:
            return self._error(404, "no such revision", "RevisionNotFound")
        siblings = [{"rfilename": name} for name in at[1]]
        return self._json(
            {"id": repo, "modelId": repo, "sha": at[0], "private": found.private, "gated": False, "siblings": siblings}
        )

    def preupload(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        if found is None:
            return
        answer: list[dict[str, Any]] = []
        for file in json.loads(self.body)["files"]:
            there = found.files.get(file["path"])
            lfs = file["path"].endswith(".safetensors") or file["size"] > LFS_BYTES
            row = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answer.append(row | ({"oid": there.oid} if there is not None else {}))
        self._json({"files": answer})

    def batch(self, repo: str) -> None:
        objects: list[dict[str, Any]] = []
        for item in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}},
                "verify": {"href": f"{self.hub.url}/lfs/{item['oid']}/verify", "header": {}},
            }
            objects.append(item | ({} if item["oid"] in self.hub.blobs else {"actions": actions}))
        self._json({"transfer": "basic", "objects": objects})

    def put_blob(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "digest mismatch")
        self.hub.blobs[oid] = self.body
        return self._send(200, b"", {"ETag": f'"{oid}"'})

    def verify_blob(self, oid: str) -> None:
        size = json.loads(self.body)["size"]
        there = self.hub.blobs.get(oid)
        self._json({}, 200 if there is not None and len(there) == size else 404)

    def commit(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        if found is None:
            return None
        files, message = dict(found.files), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    message = value["summary"]
                    if value.get("parentCommit", found.head) != found.head:
                        return self._error(412, "A commit has happened since. Please refresh and try again.")
                case "file":
                    data = base64.b64decode(value["content"])
                    files[value["path"]] = Entry(data + b"!" if value["path"] == self.hub.corrupt else data, lfs=False)
                case "lfsFile":
                    files[value["path"]] = Entry(self.hub.blobs[value["oid"]], lfs=True)
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    return self._error(400, f"unknown operation {other}")
        oid = found.commit(files, message)
        return self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def tree(self, repo: str, revision: str, under: str | None = None) -> None:
        found = self._repo(repo)
        if found is None:
            return None
        at = found.at(revision)
        if at is None:
            return self._error(404, "no such revision", "RevisionNotFound")
        if under is not None and not any(name.startswith(f"{under}/") for name in at[1]):
            return self._error(404, "no such folder", "EntryNotFound")
        rows: list[dict[str, Any]] = []
        for name, entry in at[1].items():
            if under is not None and not name.startswith(f"{under}/"):
                continue
            lfs = {"lfs": {"oid": entry.sha256, "size": len(entry.data), "pointerSize": 130}} if entry.lfs else {}
            rows.append({"type": "file", "path": name, "size": len(entry.data), "oid": entry.git_sha1} | lfs)
        return self._json(rows)

    def refs(self, repo: str) -> None:
        found = self._repo(repo)
        if found is None:
            return
        tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": c} for t, c in found.tags.items()]
        self._json(
            {
                "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": found.head}],
                "converts": [],
                "tags": tags,
            }
        )

    def tag(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        if found is None:
            return None
        name = json.loads(self.body)["tag"]
        if name in found.tags:
            return self._error(409, "tag exists")
        found.tags[name] = revision
        return self._json({})

    def settings(self, repo: str) -> None:
        found = self._repo(repo)
        if found is None:
            return
        asked = json.loads(self.body)
        found.private = asked["visibility"] == "private" if "visibility" in asked else bool(asked["private"])
        self._json({"private": found.private})

    def resolve(self, repo: str, revision: str, file: str) -> None:
        found = self._repo(repo)
        if found is None:
            return None
        at = found.at(revision)
        if at is None:
            return self._error(404, "no such revision", "RevisionNotFound")
        if file not in at[1]:
            body = b"not found"
            return self._send(404, body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": at[0]})
        entry = at[1][file]
        headers = {"X-Repo-Commit": at[0], "ETag": f'"{entry.oid}"', "X-Linked-Etag": f'"{entry.oid}"'}
        return self._send(200, entry.data, headers | {"X-Linked-Size": str(len(entry.data))})


_R = r"(?P<repo>[^/]+/[^/]+)"
_V = r"(?P<revision>.+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_R}/preupload/{_V}", _Handler.preupload),
    ("POST", rf"/api/models/{_R}/commit/{_V}", _Handler.commit),
    ("GET", rf"/api/models/{_R}/tree/(?P<revision>[^/]+)(?:/(?P<under>.+))?", _Handler.tree),
    ("GET", rf"/api/models/{_R}/refs", _Handler.refs),
    ("POST", rf"/api/models/{_R}/tag/{_V}", _Handler.tag),
    ("PUT", rf"/api/models/{_R}/settings", _Handler.settings),
    ("GET", rf"/api/models/{_R}/revision/{_V}", _Handler.info),
    ("GET", rf"/api/models/{_R}", _Handler.info),
    ("POST", rf"/{_R}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.put_blob),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler.verify_blob),
    ("GET", rf"/{_R}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    ("HEAD", rf"/{_R}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
]


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A running hub without repositories."""
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": state}))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass(frozen=True)
class Ran:
    """A finished subprocess: what it returned, or how it failed."""

    result: Any
    error: str
    output: str


_PUBLISH = """
import json, sys
from pathlib import Path
from solera.assemble import Evidence
from solera.publish import PublishConfig, publish
from solera_core.context import Context
from solera_core.errors import SoleraError
from solera_core.strict import parse
asked = json.loads(sys.argv[1])
evidence = asked["evidence"]
if evidence is not None:
    results = {k: Path(v) for k, v in evidence.pop("results", {}).items()}
    evidence = Evidence(results=results, model=evidence.pop("model", None), **{k: Path(v) for k, v in evidence.items()})
models = {k: Path(v) for k, v in asked["models"].items()}
try:
    out = publish(parse(PublishConfig, asked["config"], where="publish"), Context(models=models), evidence=evidence)
except SoleraError as e:
    print(json.dumps({"error": f"{type(e).__name__}: {e}"}))
else:
    print(json.dumps({"result": out.to_json()}))
"""

Publish = Callable[..., Ran]


@pytest.fixture
def publish_to(hub: Hub, tmp_path: Path) -> Publish:
    """`publish_to(config, evidence=None, models={}, **environment)`: publish in a process of its own."""

    def run(
        config: dict[str, Any],
        evidence: dict[str, Any] | None = None,
        models: dict[str, str] | None = None,
        **environment: str,
    ) -> Ran:
        asked = json.dumps({"config": config, "evidence": evidence, "models": models or {}})
        done = subprocess.run(
            [sys.executable, "-c", _PUBLISH, asked],
            env=hub.environment(tmp_path / "hf", **environment),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout.splitlines()[-1])
        return Ran(answer.get("result"), answer.get("error", ""), done.stdout + done.stderr)

    return run


Finish = Callable[..., Path]


@pytest.fixture(scope="session")
def finish() -> Finish:
    """`finish(directory, kind="merge", recipe={}, inputs=[])`: write the solera.json that a stage would."""
    from solera_core.output import InputRecord, write_provenance

    def write(
        directory: Path,
        *,
        kind: str = "merge",
        recipe: dict[str, Any] | None = None,
        inputs: list[tuple[str, ...]] | None = None,
    ) -> Path:
        records = [InputRecord(i[0], i[1], i[2] or None, i[3]) for i in inputs or []]
        checks = {"parameters": 12345, "bytes": 49380}
        write_provenance(directory, kind=kind, recipe=recipe or {}, seed=7, inputs=records, tensors=None, checks=checks)
        return directory

    return write


@pytest.fixture
def merged(tmp_path: Path, siblings: dict[str, Path], finish: Finish) -> Path:
    """A merge, by its record, of two models that are not on this machine: a tiny Llama with a solera.json."""
    directory = tmp_path / "models" / "blend"
    shutil.copytree(siblings["a"], directory)
    inputs = [
        ("org/one", "org/one", "1" * 40, "blake3:" + "1" * 64),
        ("org/two", "org/two", "2" * 40, "blake3:" + "2" * 64),
    ]
    return finish(
        directory,
        recipe={"merge_method": "linear", "models": [{"model": "org/one"}, {"model": "org/two"}]},
        inputs=inputs,
    )


def write_results(directory: Path, digest: str, value: float = 5.0, **parameters: int) -> Path:
    """A results.json as an evaluation writes it: one text task and one of choices."""
    directory.mkdir(parents=True, exist_ok=True)
    tasks = [
        {"name": "held-out", "kind": "text", "domain": "prose", "metric": "perplexity", "value": value,
         "low": value * 0.95, "high": value * 1.05, "n": 80, "extra": {"bits_per_byte": value / 4}},
        {"name": "pairs", "kind": "choice", "domain": "grammar", "metric": "accuracy", "value": 0.715,
         "low": 0.68, "high": 0.75, "n": 400, "extra": {"chance": 0.5}},
    ]  # fmt: skip
    model = {
        "ref": str(directory.name),
        "digest": digest,
        "parameters": {"total": 12345, "active": 12345, "bytes": 49380} | parameters,
    }
    content = {
        "schema": 1,
        "model": model,
        "suite": {"name": "tiny", "digest": "sha256:0"},
        "tasks": tasks,
        "settings": {},
    }
    (directory / "results.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="session")
def results_of() -> Callable[..., Path]:
    """`results_of(directory, digest, value=5.0, total=..., active=..., bytes=...)`: see `write_results`."""
    return write_results
