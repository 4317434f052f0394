"""A Hugging Face hub on loopback for the real client: repositories in memory, faults on demand."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

import loopback

TOKEN = "hf_canary2f9c1d"
# What `Hub.faults` may hold, and the answer that it plants.
FAULTS = (
    "bad token",  # 401 to every question
    "no create",  # 403 to a new repository, whether or not it exists, as the hub does
    "no write",  # 403 to the check of write access, and to a commit
    "no commit",  # 500 to a commit
    "dropped commit",  # the connection ends where the answer should begin
    "silent commit",  # no answer to a commit, ever
    "down",  # 503 to every question
    "silent",  # no answer to any question, ever
    "echo",  # 400 to a new repository, quoting the request's token as a careless proxy would
    "portal",  # 200 and a page of HTML to every question, as a hotel's network does
)


@dataclass
class Hub:
    """The hub's state: what a test plants in it, and what it has seen."""

    endpoint: str = ""
    user: str = "alice"
    orgs: tuple[str, ...] = ("team",)
    role: str = "write"  # "read", "write" or "fineGrained"
    faults: set[str] = field(default_factory=set)
    private: dict[str, bool] = field(default_factory=dict)  # repository -> whether it is private
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # repository -> path -> bytes
    requests: list[str] = field(default_factory=list)  # "GET /api/whoami-v2"
    closing: threading.Event = field(default_factory=threading.Event)

    def hold(self, repo: str, private: bool) -> None:
        """Let a repository exist already."""
        self.private[repo], self.files[repo] = private, {}

    def plant(self, *faults: str) -> None:
        """From now on these faults and no others."""
        assert set(faults) <= set(FAULTS)
        self.faults = set(faults)

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, Any] | None:
        """(status, JSON, or a message for an error) of one request; None: hang up."""
        path, faults = unquote(urlsplit(request.path).path), self.faults
        if "silent" in faults or ("silent commit" in faults and "/commit/" in path):
            self.closing.wait()
            return None
        if "down" in faults:
            return 503, "planted: down"
        if "portal" in faults:
            return 200, b"<html>Please log in</html>"
        authorization = request.headers.get("Authorization")
        if authorization != f"Bearer {TOKEN}" or "bad token" in faults:
            return 401, "Invalid credentials in Authorization header"
        if path == "/api/repos/create" and "echo" in faults:
            return 400, f"planted: {authorization}"
        return self.route(path, body if "/commit/" in path else json.loads(body or b"{}"))

    def route(self, path: str, body: Any) -> tuple[int, Any] | None:
        if path == "/api/whoami-v2":
            return 200, self.whoami()
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.create(body)
        repo, what = self.split(path)
        if repo not in self.private:
            return 404, "Repository not found"
        return {
            "preupload": self.preupload,
            "auth-check": self.auth_check,
            "commit": self.commit,
        }.get(what, self.info)(repo, body)

    @staticmethod
    def split(path: str) -> tuple[str, str]:
        """("owner/name", "what") of "/api/models/owner/name/what/..."."""
        owner, name, what = [*path.removeprefix("/api/models/").split("/"), "", ""][:3]
        return f"{owner}/{name}", what

    def whoami(self) -> dict[str, Any]:
        token = {"displayName": "stub", "role": self.role}
        return {
            "type": "user",
            "name": self.user,
            "orgs": [{"type": "org", "name": name} for name in self.orgs],
            "auth": {"type": "access_token", "accessToken": token},
        }

    def may_write(self, repo: str) -> bool:
        own = repo.split("/")[0] in (self.user, *self.orgs)
        return own and self.role != "read" and "no write" not in self.faults

    def create(self, body: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{body['organization']}/{body['name']}"
        foreign = body["organization"] not in (self.user, *self.orgs)
        if "no create" in self.faults or self.role == "read" or foreign:
            return 403, "You don't have the rights to create a model under this namespace"
        url = {"url": f"{self.endpoint}/{repo}"}
        if repo in self.private:
            return 409, url | {"error": "You already created this model repo"}
        self.hold(repo, body.get("visibility") == "private" or body.get("private") is True)
        return 200, url | {"name": repo, "id": "1"}

    def info(self, repo: str, body: Any) -> tuple[int, Any]:
        found = {"id": repo, "sha": "0" * 40, "private": self.private[repo]}
        return 200, found | {"tags": [], "siblings": []}

    def auth_check(self, repo: str, body: Any) -> tuple[int, Any]:
        return (
            (200, {}) if self.may_write(repo) else (403, "You need write access to this repository")
        )

    def preupload(self, repo: str, body: dict[str, Any]) -> tuple[int, Any]:
        """All files travel inside the commit; large-file protocols are the client's business."""
        modes = {"uploadMode": "regular", "shouldIgnore": False}
        return 200, {"files": [{"path": file["path"], **modes} for file in body["files"]]}

    def commit(self, repo: str, body: bytes) -> tuple[int, Any] | None:
        if not self.may_write(repo):
            return 403, "You need write access to this repository"
        if "no commit" in self.faults:
            return 500, "planted: no commit"
        if "dropped commit" in self.faults:
            return None
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitOid": oid, "commitUrl": f"{self.endpoint}/{repo}/commit/{oid}"}


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hub.requests.append(f"{self.command} {unquote(urlsplit(self.path).path)}")
            answer = hub.answer(self, self.body())
            if answer is None:
                return  # the connection ends without a word
            status, content = answer
            self.send_response(status)
            if isinstance(content, str):
                self.send_header("X-Error-Message", content)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                content = {"error": content}
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )

        do_POST = do_PUT = do_HEAD = do_GET

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *args):
            pass

    with loopback.serving(Handler) as hub.endpoint:
        try:
            yield hub
        finally:
            hub.closing.set()
