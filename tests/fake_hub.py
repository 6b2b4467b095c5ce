"""A hub on the loopback address: the few endpoints that an upload uses, and the files served back.

Branches, commits and large files are kept in memory. What the client asks for beyond that is answered 404 and remembered in
`FakeHub.unknown`, so that a test sees it.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_token_of_the_test"


@dataclass
class Repository:
    """Files by path of each commit, the commit of each branch, and for whom it was made."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    private: bool = False

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        files = self.commits[self.branches[branch]] | files
        oid = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class FakeHub:
    """`with FakeHub() as hub:` serves on `hub.url`.

    Attributes:
        repositories: by `user/name`.
        large: contents of large files by their SHA-256.
        seen: `METHOD route` of each request that has a route.
        unknown: `METHOD path` of each other one.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.seen: list[str] = []
        self.unknown: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.resolve(revision)]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass  # the server's own log would go to stderr

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                self.hub.seen.append(f"{self.command} {handler.__name__}")
                reads = self.command in ("GET", "HEAD")
                if (
                    not reads
                    and self.headers.get("Authorization") != f"Bearer {TOKEN}"
                    and handler is not _Handler.store
                ):
                    self.answer({"error": "Invalid credentials"}, 401)
                else:
                    handler(self, body, **match.groupdict())
                return
        self.hub.unknown.append(f"{self.command} {path}")
        self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Uploads

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'user'}/{asked['name']}"
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, Repository(private=asked.get("visibility") == "private"))
        self.answer({"url": f"{self.hub.url}/{name}", "name": name}, status)

    def validate_card(self, body: bytes) -> None:
        _, metadata, _ = json.loads(body)["content"].split("---\n", 2)
        good = isinstance(yaml.safe_load(metadata), dict)
        errors = [] if good else [{"message": "no dictionary"}]
        self.answer({"errors": errors, "warnings": []}, 200 if good else 400)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def large_files(self, body: bytes, name: str) -> None:
        objects = json.loads(body)["objects"]
        for file in objects:
            if file["oid"] not in self.hub.large:
                file["actions"] = {"upload": {"href": f"{self.hub.url}/large/{file['oid']}", "header": {}}}
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer({"error": "other content than announced"}, 400)
            return
        self.hub.large[oid] = body
        self.answer({})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        files = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                assert item["key"] == "header", item
        oid = self.hub.repositories[name].commit(revision, files)
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def branch(self, body: bytes, name: str, revision: str) -> None:
        branches = self.hub.repositories[name].branches
        status = 409 if revision in branches else 200
        branches.setdefault(revision, branches["main"])
        self.answer({}, status)

    # Downloads

    def model(self, body: bytes, name: str, revision: str = "main") -> None:
        repository = self.hub.repositories.get(name)
        oid = repository and repository.resolve(revision)
        if oid is None:
            code = "RepoNotFound" if repository is None else "RevisionNotFound"
            self.answer({"error": code}, 404, {"X-Error-Code": code})
            return
        siblings = [{"rfilename": path} for path in repository.commits[oid]]
        self.answer({"id": name, "sha": oid, "private": False, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        repository = self.hub.repositories[name]
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in repository.commits[repository.resolve(revision)].items()
        ]
        self.answer(entries)

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get(name)
        oid = repository and repository.resolve(revision)
        content = repository.commits[oid].get(path) if oid else None
        if content is None:
            code = "EntryNotFound" if oid else "RevisionNotFound" if repository else "RepoNotFound"
            self.answer({"error": code}, 404, {"X-Error-Code": code, **({"X-Repo-Commit": oid} if oid else {})})
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(content, headers={"X-Repo-Commit": oid, "ETag": etag})


_NAME = r"(?P<name>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"

#: Methods, path and handler of each request that is answered.
ROUTES = (
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("POST", rf"/api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.large_files),
    ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("POST", rf"/api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
    ("POST", rf"/api/models/{_NAME}/branch/{_REVISION}", _Handler.branch),
    ("GET", rf"/api/models/{_NAME}", _Handler.model),
    ("GET", rf"/api/models/{_NAME}/revision/{_REVISION}", _Handler.model),
    ("GET", rf"/api/models/{_NAME}/tree/{_REVISION}", _Handler.tree),
    ("GET HEAD", rf"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
)
