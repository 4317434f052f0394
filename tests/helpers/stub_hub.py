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
USER, ORGANISATION = "alice", "team"
COMMIT = "0123456789" * 4  # of every repository
# What `Hub.faults` may hold, and the answer that it plants.
FAULTS = (
    "bad token",  # 401 to every question
    "no create",  # 403 to a new repository, whether or not it exists, as the hub does
    "no write",  # 403 to the check of write access, and to a commit
    "no commit",  # 500 to a commit
    "silent commit",  # no answer to a commit, ever
    "down",  # 503 to every question
    "silent",  # no answer to any question, ever
    "stall",  # half of a file and then nothing, whatever range was asked for
    "echo",  # 400 to a new repository, quoting the request's token as a careless proxy would
    "portal",  # 200 and a page of HTML to every question, as a hotel's network does
)


@dataclass
class Hub:
    """The hub's state: what a test plants in it, and what it has received."""

    endpoint: str = ""
    role: str = "write"  # "read", "write" or "fineGrained"
    faults: set[str] = field(default_factory=set)
    private: dict[str, bool] = field(default_factory=dict)  # repository -> whether it is private
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # repository -> path -> bytes
    datasets: dict[str, dict[str, bytes]] = field(default_factory=dict)  # as `files`, read only
    requests: list[str] = field(default_factory=list)  # "GET /api/whoami-v2"
    closing: threading.Event = field(default_factory=threading.Event)

    def hold(self, repo: str, private: bool) -> None:
        """Let a repository exist already."""
        self.private[repo], self.files[repo] = private, {}

    def plant(self, *faults: str) -> None:
        """From now on these faults and no others."""
        assert set(faults) <= set(FAULTS)
        self.faults = set(faults)

    def answer(self, path: str, authorization: str | None, body: bytes) -> tuple[int, Any] | None:
        """(status, JSON, or a message for an error) of one request; None: hang up."""
        if "silent" in self.faults or ("silent commit" in self.faults and "/commit/" in path):
            self.closing.wait()
            return None
        if "down" in self.faults:
            return 503, "planted: down"
        if "portal" in self.faults:
            return 200, b"<html>Please log in</html>"
        if authorization != f"Bearer {TOKEN}" or "bad token" in self.faults:
            return 401, "Invalid credentials in Authorization header"
        if path == "/api/whoami-v2":
            access = {"type": "access_token", "accessToken": {"role": self.role}}
            orgs = [{"type": "org", "name": ORGANISATION}]
            return 200, {"type": "user", "name": USER, "orgs": orgs, "auth": access}
        if "/datasets/" in path:
            return self.answer_about_data(path)
        if "/resolve/" in path:
            repo, _, file = path.removeprefix("/").partition("/resolve/")
            found = self.files.get(repo, {}).get(file.partition("/")[2])
            return (404, "Entry not found") if found is None else (200, found)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            echo = (400, f"planted: {authorization}") if "echo" in self.faults else None
            return echo or self.create(json.loads(body))
        owner, name, what = [*path.removeprefix("/api/models/").split("/"), "", ""][:3]
        return self.answer_about(f"{owner}/{name}", what, body)

    def create(self, body: dict[str, Any]) -> tuple[int, Any]:
        owner = body.get("organization") or USER
        repo = f"{owner}/{body['name']}"
        foreign = owner not in (USER, ORGANISATION)
        if "no create" in self.faults or self.role == "read" or foreign:
            return 403, "You don't have the rights to create a model under this namespace"
        url = {"url": f"{self.endpoint}/{repo}"}
        if repo in self.private:
            return 409, url | {"error": "You already created this model repo"}
        self.hold(repo, body.get("visibility") == "private" or body.get("private") is True)
        return 200, url | {"name": repo, "id": "1"}

    def answer_about(self, repo: str, what: str, body: bytes) -> tuple[int, Any]:
        """The answer to /api/models/<repo>/<what>/..."""
        if repo not in self.private:
            return 404, "Repository not found"
        if what == "preupload":  # all files travel inside the commit
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": file["path"], **modes} for file in files]}
        if what == "tree":
            return 200, tree(self.files[repo])
        if what not in ("auth-check", "commit"):
            found = {"id": repo, "sha": COMMIT, "private": self.private[repo]}
            return 200, found | {"tags": [], "siblings": []}
        own = repo.split("/")[0] in (USER, ORGANISATION)
        if not own or self.role == "read" or "no write" in self.faults:
            return 403, "You need write access to this repository"
        return self.commit(repo, body) if what == "commit" else (200, {})

    def answer_about_data(self, path: str) -> tuple[int, Any]:
        """The answer to /api/datasets/<repo>/<what>/<commit> or /datasets/<repo>/resolve/..."""
        owner, name, what, commit, *file = path.partition("/datasets/")[2].split("/")
        files = self.datasets.get(f"{owner}/{name}")
        if files is None:
            return 404, "Repository not found"
        if what == "resolve":
            found = files.get("/".join(file))
            return (404, "Entry not found") if found is None else (200, found)
        if what == "tree":
            return 200, tree(files)
        return 200, {"id": f"{owner}/{name}", "sha": commit, "private": False, "siblings": []}

    def commit(self, repo: str, body: bytes) -> tuple[int, Any]:
        if "no commit" in self.faults:
            return 500, "planted: no commit"
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitOid": oid, "commitUrl": f"{self.endpoint}/{repo}/commit/{oid}"}


def tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """A repository's files, as the hub lists them."""
    entry = {"type": "file", "oid": "0" * 40}
    return [entry | {"path": path, "size": len(content)} for path, content in files.items()]


def body_of(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding", "") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    parts = []
    while size := int(request.rfile.readline(), 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(parts)


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            answer = hub.answer(path, self.headers.get("Authorization"), body_of(self))
            if answer is None:
                return  # the connection ends without a word
            status, content = answer
            self.send_response(status)
            if isinstance(content, str):
                self.send_header("X-Error-Message", content)
                if status == 404:
                    absent = "Entry" if "/resolve/" in path else "Repo"
                    self.send_header("X-Error-Code", f"{absent}NotFound")
                content = {"error": content}
            self.send_header("Content-Type", "application/json")
            if isinstance(content, bytes):  # a file
                self.send_header("ETag", hashlib.sha1(content).hexdigest())
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if isinstance(content, bytes) and "stall" in hub.faults:
                self.wfile.write(content[: len(content) // 2])
                hub.closing.wait()
                return
            self.wfile.write(
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )

        do_POST = do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with loopback.serving(Handler) as hub.endpoint:
        try:
            yield hub
        finally:
            hub.closing.set()
