"""A small server on this machine that speaks the Hub's HTTP interface, for the real huggingface_hub client.

`with hub_server() as hub, hub.connected(monkeypatch, cache):` leads the client of this process there, and
`hub.environment` that of another process. Repositories are in `hub.repositories`, and `hub.received` keeps the body of
every request.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

USER = "user"
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".png", ".jpg", ".mp4")
"""Files that go by LFS, as the Hub's own .gitattributes say."""


@dataclass
class Commit:
    """State of a repository: its files by path."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool = False
    commits: list[Commit] = field(default_factory=lambda: [Commit("0" * 40, "initial commit", {})])

    def at(self, revision: str) -> Commit | None:
        """The commit of the main branch, or one by its id."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)

    def commit(self, message: str, files: dict[str, bytes], deleted: tuple[str, ...] = ()) -> Commit:
        kept = {path: content for path, content in self.commits[-1].files.items() if path not in deleted}
        number = f"{len(self.commits)} {message} {sorted(files)}"
        self.commits.append(Commit(hashlib.sha1(number.encode()).hexdigest(), message, kept | files))
        return self.commits[-1]


class HubServer(ThreadingHTTPServer):
    """Repositories of models, by id, and what clients sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.received: list[bytes] = []
        self.card_errors: list[str] = []
        self.tokens: set[str | None] = set()

    def push(self, repository: str, folder: Path, message: str = "files") -> Commit:
        """Put the files of a folder into a repository, as another user would."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.repositories.setdefault(repository, Repository()).commit(message, files)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that lead the client of a new process here."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    @contextlib.contextmanager
    def connected(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
        """Lead the client of this process here, with a cache of its own."""
        with monkeypatch.context() as patch:
            for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
                patch.setattr(constants, name, name.endswith("TELEMETRY"))
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.setattr(constants, "ENDPOINT", self.url)
            patch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
            )
            patch.setattr(constants, "HF_HUB_CACHE", str(cache))
            patch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)
            patch.setattr("transformers.utils.hub._hf_api", None)
            patch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
            yield


class Handler(BaseHTTPRequestHandler):
    """Answers what uploading and downloading ask for."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if content is body else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, X_Error_Code=code)

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.received.append(body)
        self.server.tokens.add((self.headers.get("Authorization") or "").removeprefix("Bearer ") or None)
        path = unquote(urlsplit(self.path).path)
        if self.command == "PUT":
            self.server.large_files[path.removeprefix("/lfs/")] = body
            return self.answer()
        if path == "/api/whoami-v2":
            return self.answer({"name": USER, "type": "user", "orgs": [], "auth": {}})
        if path == "/api/validate-yaml":
            errors = [{"message": each} for each in self.server.card_errors]
            return self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.answer({"objects": [self.slot(each) for each in json.loads(body)["objects"]]})
        if path.startswith("/api/models/"):
            user, name, *rest = path.removeprefix("/api/models/").split("/")
            return self.repository(f"{user}/{name}", rest, body)
        user, name, _, revision, *file = path.removeprefix("/").split("/")
        return self.resolve(f"{user}/{name}", revision, "/".join(file))

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        known = name in self.server.repositories
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.repositories.setdefault(name, Repository(bool(private)))
        self.answer({"url": f"{self.server.url}/{name}", "name": name}, 409 if known else 200)

    def slot(self, wanted: dict[str, Any]) -> dict[str, Any]:
        known = wanted["oid"] in self.server.large_files
        upload = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}}
        return {**wanted, **({} if known else {"actions": upload})}

    def repository(self, name: str, rest: list[str], body: bytes) -> None:
        known = self.server.repositories.get(name)
        if known is None:
            return self.missing("RepoNotFound")
        action, *arguments = rest or ["revision"]
        if action == "preupload":
            asked = [{"path": file["path"], "shouldIgnore": False} for file in json.loads(body)["files"]]
            there = known.commits[-1].files
            modes = [
                {**file, "uploadMode": mode(file["path"]), "oid": oid(file["path"], there.get(file["path"]))}
                for file in asked
            ]
            return self.answer({"files": modes})
        if action == "commit":
            return self.commit(name, known, [json.loads(line) for line in body.splitlines()])
        commit = known.at(arguments[0] if arguments else "main")
        if commit is None:
            return self.missing("RevisionNotFound")
        if action == "tree":
            folder = "/".join(arguments[1:])
            paths = [path for path in commit.files if path.startswith(f"{folder}/" * bool(folder))]
            return self.answer([entry(path, commit.files[path]) for path in sorted(paths)])
        if action == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else []
            return self.answer([entry(path, commit.files[path]) for path in asked if path in commit.files])
        files = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"_id": name, "id": name, "modelId": name, "private": known.private, "tags": [], "gated": False}
        return self.answer({**about, "sha": commit.oid, "siblings": files, "downloads": 0, "likes": 0})

    def commit(self, name: str, known: Repository, lines: list[dict[str, Any]]) -> None:
        message, files, deleted = "", {}, []
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                deleted.append(value["path"])
        commit = known.commit(message, files, tuple(deleted))
        self.answer(
            {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.server.url}/{name}/commit/{commit.oid}"}
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        known = self.server.repositories.get(name)
        commit = known and known.at(revision)
        if known is None:
            return self.missing("RepoNotFound")
        if commit is None:
            return self.missing("RevisionNotFound")
        if path not in commit.files:
            return self.answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        content = commit.files[path]
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=commit.oid)


def mode(path: str) -> str:
    """How a file goes up."""
    return "lfs" if path.endswith(LARGE) else "regular"


def oid(path: str, content: bytes | None) -> str | None:
    """What the Hub tells of a file that it has: SHA-256 of a large one, git's number of another."""
    if content is None:
        return None
    if mode(path) == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file in a listing."""
    found = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(LARGE):
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return found


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server that runs for a while."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
