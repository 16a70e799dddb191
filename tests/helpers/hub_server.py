"""A stand-in for the Hugging Face Hub on 127.0.0.1: only models, weights over Git LFS, everything in memory.

It keeps what a client sends it, and fails on request. `HF_HUB_DISABLE_XET=1` keeps the client to LFS.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"


@dataclass
class Repository:
    """Files by name at each commit, the last of which is the head, and tags of commits."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {".gitattributes": b""}})
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    def at(self, revision: str) -> str | None:
        """Resolve a branch, tag or commit to a commit."""
        revision = self.head if revision == "main" else self.tags.get(revision, revision)
        return revision if revision in self.commits else None


@dataclass
class Hub:
    """Content of the server, received requests, and the failures to simulate."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # by sha256: all uploads, referenced by a commit or not
    calls: list[str] = field(default_factory=list)  # "METHOD path"
    role: str = "write"  # of the token
    accepted_puts: int | None = None  # number of objects still accepted; the next one is rejected
    drop: str | None = None  # requests whose path contains this get no answer: the connection is closed

    def count(self, method: str, part: str) -> int:
        """Count the calls whose path contains this."""
        return sum(call.startswith(method) and part in call for call in self.calls)

    def environment(self, home) -> dict[str, str]:
        """Return the environment of a process that uses this Hub, with a separate cache and login."""
        switched_on = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, **switched_on}


class Handler(BaseHTTPRequestHandler):
    """Routes for uploads, tags and downloads."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    lock: threading.Lock

    def log_message(self, *_):
        pass

    def answer(self):
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        with self.lock:
            self.hub.calls.append(f"{self.command} {path}")
            if self.hub.drop and self.hub.drop in path:
                self.close_connection = True
                return
            if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
                self.fail(401, "Unauthorized")
                return
            for method, pattern, route in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method == self.command.replace("HEAD", "GET"):
                    route(self, body, **found.groupdict())
                    return
            self.fail(404, "NoSuchRoute")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, value, status: int = 200, **headers: str):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, code: str):
        self.send({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def found(self, name: str, revision: str = "main") -> tuple[Repository, str, dict[str, bytes]] | None:
        """Return a repository, its commit and files; None after an error response if the caller has no access."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and "Authorization" not in self.headers):
            return self.fail(404, "RepoNotFound")
        commit = repository.at(revision)
        return (repository, commit, repository.commits[commit]) if commit else self.fail(404, "RevisionNotFound")

    def whoami(self, body):
        rights = {"accessToken": {"role": self.hub.role, "displayName": "test"}}
        self.send({"type": "user", "name": "owner", "orgs": [{"name": "team"}], "auth": rights})

    def validate(self, body):
        self.send({"errors": [], "warnings": []})

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        status = 409 if name in self.hub.repositories else 200
        private = asked.get("visibility") == "private" or asked.get("private", False)  # newer and older clients
        self.hub.repositories.setdefault(name, Repository(private))
        self.send({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, status)

    def info(self, body, name, revision="main"):
        if found := self.found(name, revision):
            files = [{"rfilename": file} for file in found[2]]
            self.send({"id": name, "sha": found[1], "private": found[0].private, "siblings": files, "tags": []})

    def tree(self, body, name, revision):
        if found := self.found(name, revision):
            self.send([{"type": "file", "path": path} | _sizes(path, data) for path, data in found[2].items()])

    def preupload(self, body, name, revision):
        if found := self.found(name):
            asked = [file["path"] for file in json.loads(body)["files"]]
            known = {path: {"oid": _content(path, data)} for path, data in found[2].items()}
            modes = {path: {"uploadMode": "lfs" if _is_large(path) else "regular"} for path in asked}
            files = [{"path": path, "shouldIgnore": False} | modes[path] | known.get(path, {}) for path in asked]
            self.send({"files": files})

    def batch(self, body, name):
        """Answer which LFS objects to upload, and where; existing objects are skipped."""
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/objects/{asked['oid']}"}}}
            objects.append(asked | ({} if asked["oid"] in self.hub.objects else upload))
        self.send({"transfer": "basic", "objects": objects})

    def put(self, body, sha256):
        if self.hub.accepted_puts == 0 or hashlib.sha256(body).hexdigest() != sha256:
            return self.fail(400, "Refused")
        self.hub.accepted_puts = self.hub.accepted_puts and self.hub.accepted_puts - 1
        self.hub.objects[sha256] = body
        return self.send({})

    def commit(self, body, name, revision):
        if not (found := self.found(name)):
            return
        files = dict(found[2])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = f"{len(found[0].commits):040x}"
        found[0].commits[commit] = files
        self.send({"commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def refs(self, body, name):
        if found := self.found(name):
            tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": to} for tag, to in found[0].tags.items()]
            self.send({"branches": [], "tags": tags, "converts": []})

    def tag(self, body, name, revision):
        if found := self.found(name, revision):
            found[0].tags[json.loads(body)["tag"]] = found[1]
            self.send({})

    def download(self, body, name, revision, path):
        if found := self.found(name, revision):
            if path not in found[2]:
                return self.fail(404, "EntryNotFound")
            data = found[2][path]
            etag = _content(path, data)
            return self.send(data, ETag=f'"{etag}"', X_Repo_Commit=found[1], X_Linked_Size=str(len(data)))
        return None


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def _content(path: str, data: bytes) -> str:
    """Return the hash that identifies the content of a file."""
    sizes = _sizes(path, data)
    return sizes.get("lfs", sizes)["oid"]


def _sizes(path: str, data: bytes) -> dict:
    """Return the Hub's file metadata: size, Git hash, and for large files the LFS hash."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
    return {"size": len(data), "oid": oid} | (large if _is_large(path) else {})


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", "/api/repos/create", Handler.create),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}", Handler.tree),
    ("GET", f"/api/models/{NAME}/refs", Handler.refs),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/objects/(?P<sha256>.+)", Handler.put),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    ("POST", f"/api/models/{NAME}/tag/{REVISION}", Handler.tag),
    ("GET", f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.download),
]


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run the stand-in on a separate port while the context is active."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub, "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
