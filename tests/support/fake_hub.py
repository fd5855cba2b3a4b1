"""A model hub on loopback, as much of one as huggingface_hub needs to download a snapshot and upload a folder.

with FakeHub() as hub:
    hub.add("owner/name", {"config.json": b"{}"}, private=True)
    subprocess.run(..., env={**os.environ, **hub.environment(tmp_path)})
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_owner"


@dataclass
class Repository:
    private: bool
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch, "")
        text = repr(
            (parent, len(self.commits), sorted((name, hashlib.sha1(data).digest()) for name, data in files.items()))
        )
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class FakeHub:
    """The hub's state and its server. Every request is noted in `requests`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken = False  # answers 500 to everything
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> str:
        """Make a repository with one commit on main; returns the commit."""
        repository = self.repositories[name] = Repository(private, gated)
        return repository.commit("main", files)

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]

    def environment(self, home: Path, *, token: str | None = TOKEN) -> dict[str, str]:
        """The variables that send huggingface_hub here and nowhere else."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "file"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/large/([0-9a-f]{64})", "lfs_put"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
    )

    def serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {url.path}")
        method = "GET" if self.command == "HEAD" else self.command
        try:
            if self.hub.broken:
                raise _Refused(500, "Broken")
            for verb, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and verb == method:
                    getattr(self, name)(*(unquote(part) if part else part for part in match.groups()))
                    return
            raise _Refused(404, "RouteNotFound")
        except _Refused as refused:
            self.answer(b"", status=refused.status, headers={"X-Error-Code": refused.code})

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def answer(self, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, document: Any, status: int = 200) -> None:
        self.answer(json.dumps(document).encode(), status=status, headers={"Content-Type": "application/json"})

    def log_message(self, *_: object) -> None:
        return

    @property
    def owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str, *, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.owner):
            raise _Refused(404, "RepoNotFound")
        if write and not self.owner:
            raise _Refused(401, "NoToken")
        return repository

    def snapshot(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(name)
        sha = repository.resolve(revision)
        if sha is None:
            raise _Refused(404, "RevisionNotFound")
        return sha, repository.commits[sha]

    def info(self, name: str, revision: str | None) -> None:
        sha, files = self.snapshot(name, revision or "main")
        self.answer_json(
            {
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": self.repository(name).private,
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def tree(self, name: str, revision: str) -> None:
        _, files = self.snapshot(name, revision)
        self.answer_json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
        )

    def file(self, name: str, revision: str, path: str) -> None:
        sha, files = self.snapshot(name, revision)
        if self.repository(name).gated:
            raise _Refused(403, "GatedRepo")
        if path not in files:
            raise _Refused(404, "EntryNotFound")
        data = files[path]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        self.answer(data, headers=headers)

    def create(self) -> None:
        if not self.owner:
            raise _Refused(401, "NoToken")
        wish = json.loads(self.body)
        name = f"{wish['organization']}/{wish['name']}"
        if name in self.hub.repositories:
            self.answer_json({"error": "exists", "url": f"{self.hub.endpoint}/{name}"}, 409)
            return
        private = wish.get("visibility") == "private" or bool(wish.get("private"))
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self.answer_json({"url": f"{self.hub.endpoint}/{name}", "id": name})

    def branch(self, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise _Refused(409, "BranchExists")
        repository.branches[branch] = repository.branches["main"]
        self.answer_json({})

    def preupload(self, name: str, revision: str) -> None:
        self.repository(name, write=True)
        files = json.loads(self.body)["files"]
        modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
        self.answer_json(
            {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
        )

    def lfs_batch(self, name: str) -> None:
        self.repository(name, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/large/{item['oid']}"}}
        self.answer_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "WrongHash")
        self.hub.large[oid] = self.body
        self.answer(b"")

    def commit(self, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        files = dict(repository.commits[repository.branches[branch]])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(branch, files)
        self.answer_json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})
