"""A Hub on the loopback interface: the part of its HTTP API that our calls use, with faults on request.

It shows that our calls are right as far as huggingface_hub goes. It is no proof about the real Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from hub_entries import entry_of, is_large, key_of

TOKEN = "hf_" + "thetokenofthetests"


@dataclass
class Repo:
    """Commits by their id, each a mapping of path -> content; refs are branches, tags and pull requests."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def commit(self, files: dict[str, bytes | None], message: str, ref: str = "main", parent: str | None = None) -> str:
        """Add files to what the parent has; None deletes one."""
        merged = {**self.commits.get(self.refs.get(parent or ref, ""), {}), **files}
        merged = {path: content for path, content in merged.items() if content is not None}
        oid = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid], self.refs[ref] = merged, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.refs.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


class HubDouble:
    """The server and what it holds.

    Attributes:
        repos: by `org/name` (models) or `kernels/org/name`.
        log: method and path of every request.
        break_downloads, break_uploads: so many transfers of large files lose their connection half-way.
        damage: paths that are served with one byte changed.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # large files by SHA-256
        self.log: list[str] = []
        self.break_downloads = self.break_uploads = 0
        self.damage: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        # large files come from another host than the Hub's, which matters: its redirects are not followed for the headers
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def add(self, name: str, files: dict[str, bytes], message: str = "first", **options) -> str:
        repo = self.repos.setdefault(name, Repo(**options))
        return repo.commit(files, message)

    def environment(self, home, token: str | None = None, **more: str) -> dict[str, str]:
        """Of a process that talks to this Hub and to no other, with a cache of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
        login = {"HF_TOKEN": token} if token else {}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **login,
            **more,
        }

    def connect(self, monkeypatch, home, token: str | None = None) -> None:
        """The same for this process, whose huggingface_hub has read its environment before."""
        from huggingface_hub import constants

        settings = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.log)

    def methods(self) -> Counter:
        return Counter(line.split()[0] for line in self.log)

    @contextmanager
    def running(self):
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self
        finally:
            for server in self.servers:
                server.shutdown()
                server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    protocol_version = "HTTP/1.1"
    timeout = 20
    sent: bytes | None

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        path, self.sent = unquote(urlsplit(self.path).path), None
        self.hub.log.append(f"{self.command} {path}")
        self.query = urlsplit(self.path).query
        name = r"((?:kernels/)?[\w.-]+/[\w.-]+)"
        api = r"/api/(models|kernels)/([\w.-]+/[\w.-]+)"
        routes = [
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", lambda: self.body() and self.reply({"errors": [], "warnings": []})),
            (r"/api/whoami-v2", self.whoami),
            (rf"{api}/preupload/(.+)", self.preupload),
            (rf"{api}/commit/(.+)", self.commit),
            (rf"{api}/tree/([^/]+)(?:/.*)?", self.tree),
            (rf"{api}(?:/revision/(.+))?", self.info),
            (rf"{api}/(branch|tag)/(.+)", self.ref),
            (rf"/{name}\.git/info/lfs/objects/batch", self.batch),
            (r"/lfs/(\w{64})", self.put),
            (r"/lfs/verify", self.verify),
            (r"/cdn/(\w{64})(?:/.*)?", self.cdn),
            (rf"/{name}/resolve/([^/]+)/(.+)", self.resolve),
        ]
        for pattern, action in routes:
            if match := re.fullmatch(pattern, path):
                action(*match.groups())
                return
        self.fail(404, "EntryNotFound", f"the double has no {path}")

    # ---- answers ----

    def reply(self, data, status: int = 200, headers: dict | None = None) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, message: str) -> None:
        self.body()
        self.reply({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def body(self) -> bytes:
        if self.sent is None:
            self.sent = self.read()
        return self.sent

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def cut(self) -> None:
        """Break the connection as a failing network does."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository, or None after the answer that the Hub gives to whoever may not see it."""
        repo = self.hub.repos.get(name)
        if write and not self.logged_in():
            self.fail(401, "", "Invalid username or password.")
        elif repo is None or (repo.private and not self.logged_in()):
            self.fail(404 if self.logged_in() else 401, "RepoNotFound", "Repository not found")
        elif repo.gated and not self.logged_in():
            self.fail(401, "GatedRepo", "Access to this model is restricted.")
        else:
            return repo
        return None

    # ---- repositories ----

    def whoami(self) -> None:
        if self.logged_in():
            self.reply({"type": "user", "name": "somebody", "orgs": []})
        else:
            self.fail(401, "", "Invalid username or password.")

    def create(self) -> None:
        asked = json.loads(self.body())
        if not self.logged_in():
            return self.fail(401, "", "Invalid username or password.")
        name = f"{asked['organization']}/{asked['name']}"
        prefix = "kernels/" if asked.get("type") == "kernel" else ""
        if prefix + name in self.hub.repos:
            return self.reply({"error": "You already created this model repo", "url": f"{self.hub.url}/{prefix}{name}"}, 409)
        repo = self.hub.repos[prefix + name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.reply({"url": f"{self.hub.url}/{prefix}{name}", "name": name, "id": "1"})

    def info(self, kind: str, name: str, revision: str | None) -> None:
        if (repo := self.repo(key_of(kind, name))) is None:
            return
        if (found := repo.files(revision or "main")) is None:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": path} for path in found[1]]
        self.reply(
            {
                "id": name,
                "modelId": name,
                "sha": found[0],
                "private": repo.private,
                "tags": [],
                "siblings": siblings,
                "downloads": 0,
                "likes": 0,
            }
        )

    def tree(self, kind: str, name: str, revision: str) -> None:
        if (repo := self.repo(key_of(kind, name))) is None:
            return
        if (found := repo.files(revision)) is None:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        self.reply([entry_of(path, content) for path, content in sorted(found[1].items())])

    def ref(self, kind: str, name: str, what: str, ref: str) -> None:
        sent = json.loads(self.body() or b"{}")
        if (repo := self.repo(key_of(kind, name), write=True)) is None:
            return
        if what == "tag":  # POST .../tag/{revision} with the tag in the body
            repo.refs[sent["tag"]] = repo.refs.get(ref, ref)
        elif ref in repo.refs:
            return self.reply({"error": "Reference already exists"}, 409)
        else:
            repo.refs[ref] = repo.refs[sent.get("startingPoint", "main")]
        self.reply({})

    # ---- push ----

    def preupload(self, kind: str, name: str, revision: str) -> None:
        asked = json.loads(self.body())
        if (repo := self.repo(key_of(kind, name), write=True)) is None:
            return
        if revision not in repo.refs:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        files = [
            {"path": f["path"], "uploadMode": "lfs" if is_large(f["path"]) else "regular", "shouldIgnore": False}
            for f in asked["files"]
        ]
        self.reply({"files": files})

    def batch(self, name: str) -> None:
        asked = json.loads(self.body())
        if self.repo(name, write=True) is None:
            return
        objects = []
        for each in asked["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            objects.append(each if each["oid"] in self.hub.stored else {**each, "actions": actions})
        self.reply({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if self.hub.break_uploads > 0:
            self.hub.break_uploads -= 1
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self.cut()
        body = self.body()
        if hashlib.sha256(body).hexdigest() != oid:
            return self.fail(400, "", "the content has another hash")
        self.hub.stored[oid] = body
        self.reply({})

    def verify(self) -> None:
        asked = json.loads(self.body())
        stored = self.hub.stored.get(asked["oid"])
        if stored is None or len(stored) != asked["size"]:
            return self.fail(404, "", "not stored")
        self.reply({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        if (repo := self.repo(key_of(kind, name), write=True)) is None:
            return
        files: dict[str, bytes | None] = {}
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", repo.refs[revision]) != repo.refs[revision]:
                    return self.fail(412, "", "The branch has moved")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                files[value["path"]] = None
        ref, request = revision, None
        if "create_pr=1" in self.query:
            repo.pull_requests += 1
            ref, request = f"refs/pr/{repo.pull_requests}", f"{self.hub.url}/{name}/discussions/{repo.pull_requests}"
        oid = repo.commit(files, message, ref, parent=revision)
        self.reply(
            {
                "commitUrl": f"{self.hub.url}/{(name if kind == 'models' else f'{kind}/{name}')}/commit/{oid}",
                "commitOid": oid,
                "pullRequestUrl": request,
            }
        )

    # ---- pull ----

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (repo := self.repo(name)) is None:
            return
        if (found := repo.files(revision)) is None:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        oid, files = found
        if path not in files:
            return self.reply(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        content = files[path]
        if not is_large(path):
            digest = hashlib.sha1(content).hexdigest()
            return self.reply(content, headers={"ETag": f'"{digest}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"})
        digest = hashlib.sha256(content).hexdigest()
        self.hub.stored[digest] = content
        headers = {
            "X-Repo-Commit": oid,
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.cdn}/cdn/{digest}/{path}",
        }
        self.reply(b"", 302, headers)

    def cdn(self, oid: str) -> None:
        content = self.hub.stored[oid]
        if any(self.path.endswith(path) for path in self.hub.damage):
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        part = content[start:]
        status = 206 if start else 200
        ranges = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        if self.hub.break_downloads > 0 and self.command == "GET":
            self.hub.break_downloads -= 1
            self.send_response(status)
            for key, value in {"Content-Length": str(len(part)), **ranges}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            return self.cut()
        self.reply(part, status, {"ETag": f'"{oid}"', **ranges})
