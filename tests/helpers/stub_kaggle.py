"""Kaggle's kernel service on loopback for the real client and CLI, which reach it as a proxy."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

import loopback

USER = "agaonker"
KEY = "canary5e8c02b7f4d1a9c3"
WALK = ("QUEUED", "RUNNING", "COMPLETE")
HANG_UP, SILENT = "hang up", "silent"  # answers that are none
LOST, SAVED_SILENTLY = "lost", "saved silently"  # the same, after what was asked has been done


@dataclass
class Version:
    """One pushed version: what came, what it answers when asked, what it left."""

    body: dict[str, Any]
    walk: list[str]  # its states, one a question; the last one stays
    failure: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    log: str = ""


@dataclass
class Kaggle:
    """The service's state: what a test plants in it, and what it has seen."""

    endpoint: str = ""
    # "SaveKernel" -> answers to give before the good ones: JSON, (status, JSON or text, headers),
    # or one of the four above; None is the good one.
    planted: dict[str, list[Any]] = field(default_factory=dict)
    # Gives a new version its states, failure, files and log.
    run: Callable[[str, Version], None] = lambda slug, version: None
    kernels: dict[str, list[Version]] = field(default_factory=dict)
    behind: int = 0  # by how many versions the latest one, asked for without a number, lags
    gpu_hours: tuple[float, float] = (3.0, 30.0)  # used, allowed
    calls: list[tuple[str, dict]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # every address and body that came
    authorizations: set[str] = field(default_factory=set)
    closing: threading.Event = field(default_factory=threading.Event)

    def bodies(self, method: str) -> list[dict]:
        return [body for name, body in self.calls if name == method]

    def answer(self, path: str, body: bytes) -> Any:
        if path.startswith("/files/"):
            slug, number, name = path.removeprefix("/files/").split("/", 2)
            return 200, self.kernels[slug][int(number) - 1].files[name], {}
        method, given = path.rpartition("/")[2], json.loads(body or b"{}")
        self.calls.append((method, given))
        planted = self.planted.get(method, [])
        answer = planted.pop(0) if planted else None
        if answer in (LOST, SAVED_SILENTLY):
            getattr(self, method)(given)
            return HANG_UP if answer == LOST else SILENT
        if answer is not None:
            return answer if isinstance(answer, tuple | str) else (200, answer, {})
        return getattr(self, method)(given)

    def SaveKernel(self, given: dict) -> Any:
        owner, slug = given["slug"].split("/")
        if owner != USER:
            return 403, {"code": 403, "message": "Permission 'kernels.update' was denied"}, {}
        version = Version(given, list(WALK))
        self.kernels.setdefault(slug, []).append(version)
        self.run(slug, version)
        number = len(self.kernels[slug])
        url = f"https://www.kaggle.com/code/{owner}/{slug}"
        return {"ref": f"/code/{owner}/{slug}", "url": url, "versionNumber": number, "kernelId": 42}

    def find(self, given: dict) -> tuple[int, Version] | None:
        """(number, version) of the version asked for, the latest without one."""
        versions = self.kernels.get(given["kernelSlug"], [])
        label = given.get("versionLabel")
        number = int(label.removeprefix("v")) if label else len(versions) - self.behind
        return (number, versions[number - 1]) if 0 < number <= len(versions) else None

    def GetKernelSessionStatus(self, given: dict) -> Any:
        found = self.find(given)
        if not found:
            return 404, {"code": 404, "message": "Not found"}, {}
        walk = found[1].walk
        state = walk.pop(0) if len(walk) > 1 else walk[0]
        failure = {"failureMessage": found[1].failure} if found[1].failure else {}
        return {"status": state} | failure

    def GetKernel(self, given: dict) -> Any:
        found = self.find(given)
        if not found:
            return 403, {"code": 403, "message": "Permission 'kernels.get' was denied"}, {}
        number, version = found
        sources = version.body.get("kernelDataSources", [])
        metadata = {"currentVersionNumber": number, "kernelDataSources": sources}
        return {"metadata": metadata, "blob": {"source": version.body["text"]}}

    def ListKernelSessionOutput(self, given: dict) -> Any:
        """Two files a page, so that a client has to turn them."""
        found = self.find(given)
        if not found:
            return 404, {"code": 404, "message": "Not found"}, {}
        number, version = found
        start = int(given.get("pageToken") or 0)
        names = sorted(version.files)
        base = f"http://localhost/files/{given['kernelSlug']}/{number}"
        files = [{"fileName": n, "url": f"{base}/{n}"} for n in names[start : start + 2]]
        more = {"nextPageToken": str(start + 2)} if start + 2 < len(names) else {}
        return {"files": files, "log": version.log} | more

    def GetAcceleratorQuotaStatistics(self, given: dict) -> Any:
        used, allowed = (f"{hours * 3600:.0f}s" for hours in self.gpu_hours)
        gpu = {"timeUsed": used, "totalTimeAllowed": allowed}
        return {"quotaRefreshTime": "2026-11-28T00:00:00.000Z", "gpuQuota": gpu}

    def IntrospectToken(self, given: dict) -> Any:
        return {"active": True, "username": USER}


@contextlib.contextmanager
def serve() -> Iterator[Kaggle]:
    """A service that answers until the block ends."""
    kaggle = Kaggle()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kaggle.authorizations.add(self.headers.get("Authorization", ""))
            kaggle.texts += [self.path, body.decode()]
            answer = kaggle.answer(unquote(urlsplit(self.path).path), body)
            if answer == SILENT:
                kaggle.closing.wait()
            if answer in (HANG_UP, SILENT):
                return
            status, content, headers = answer if isinstance(answer, tuple) else (200, answer, {})
            kind = "application/json" if isinstance(content, dict | list) else "text/html"
            content = json.dumps(content) if kind == "application/json" else content
            content = content.encode() if isinstance(content, str) else content
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(content))} | headers
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    with loopback.serving(Handler) as kaggle.endpoint:
        try:
            yield kaggle
        finally:
            kaggle.closing.set()
