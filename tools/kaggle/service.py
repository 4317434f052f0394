"""Kaggle's kernel service through its own client: requests are retried, answers are checked."""

import contextlib
import functools
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tenacity
from requests.adapters import HTTPAdapter

from tools import leaks
from tools.kaggle.errors import REFUSED, UNAVAILABLE, Problem, explain

TIMEOUT = 120  # seconds for an answer; the client itself would wait forever
LONGEST_PAUSE = 300.0  # seconds between two attempts, unless Kaggle asks for more
ABSENT = (403, 404)  # a private kernel that does not exist is forbidden, too
# Errors in a response of status 200. A quota returns within days, the busy ones within minutes.
QUOTA = re.compile(r"quota|weekly", re.IGNORECASE)
BUSY = re.compile(r"capacity|sessions?\b|concurrent|try again|temporar|too many", re.IGNORECASE)
BROKEN = re.compile(r"40[13]|not found|permission", re.IGNORECASE)


@dataclass
class Connection:
    """Kaggle's client, logged in, and how patient to be. Its methods raise Problem."""

    api: Any
    retries: int
    poll: float  # seconds between two looks at a kernel, and before the first retry
    minutes: float  # for a kernel to run, and at most for one request

    def ask(self, what: str, function: Callable, *args: Any, absent: Any = None) -> Any:
        """function(*args), repeated while Kaggle is unavailable; `absent` if there is no kernel."""
        growing = tenacity.wait_exponential(self.poll, LONGEST_PAUSE)

        def attempt() -> Any:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    return function(*args)
            except Exception as error:
                problem = explain(what, error)
            if absent is not None and problem.status in ABSENT:
                return absent
            raise problem

        def pause(state: tenacity.RetryCallState) -> float:
            asked = state.outcome.exception().pause
            return growing(state) if asked is None else asked

        def announce(state: tenacity.RetryCallState) -> None:
            leaks.log(f"{state.outcome.exception()} Retrying in {state.upcoming_sleep:.0f} s.")

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda e: getattr(e, "code", 0) == UNAVAILABLE),
            wait=pause,
            stop=tenacity.stop_after_attempt(self.retries + 1)
            | tenacity.stop_before_delay(self.minutes * 60),
            before_sleep=announce,
            reraise=True,
        )(attempt)

    def state(self, name: str) -> tuple[str, str]:
        """(QUEUED, RUNNING, COMPLETE, ERROR, ... or ABSENT; what failed) of owner/slug/version."""

        def look() -> tuple[str, str]:
            answer = self.api.kernels_status(name)
            return answer.status.name, answer.failure_message or ""

        return self.ask(f"look at {name}", look, absent=("ABSENT", ""))

    def newest(self, ref: str) -> tuple[int, str, list[str]]:
        """(version, source, attached kernels) of the newest version; (0, "", []) if none."""

        def look() -> tuple[int, str, list[str]]:
            # The whole answer, of which the client's own method hides a part.
            from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

            request = ApiGetKernelRequest()
            request.user_name, request.kernel_slug = ref.split("/")
            with self.api.build_kaggle_client() as client:
                answer = client.kernels.kernels_api_client.get_kernel(request)
            about = answer.metadata
            return about.current_version_number, answer.blob.source, about.kernel_data_sources

        return self.ask(f"look at {ref}", look, absent=(0, "", []))

    def save(self, folder: Path, ref: str) -> int:
        """Push a folder without retrying; returns the number of the new version.

        Kaggle ends it when it has run for `minutes`; otherwise it could use up 12 GPU hours.
        """
        answer = self.api.kernels_push(str(folder), timeout=str(math.ceil(self.minutes * 60)))
        message = " ".join((answer.error or "").split())
        for fault in _faults(answer, message, ref):
            busy = BUSY.search(message) and not (QUOTA.search(message) or BROKEN.search(message))
            raise Problem(UNAVAILABLE if busy else REFUSED, f"Kaggle {fault}")
        return answer.version_number

    def log_lines(self, name: str) -> list[str]:
        """The lines that owner/slug/version printed."""

        def read() -> list[str]:
            parts = json.loads(self.api.kernels_logs(name) or "[]")
            return "".join(part["data"] for part in parts).splitlines()

        return self.ask("fetch the log", read)

    def download(self, name: str, pattern: str, folder: Path) -> None:
        """Fetch the output files of owner/slug[/version] whose name matches into `folder`."""
        output = functools.partial(self.api.kernels_output, file_pattern=pattern, force=True)
        self.ask(f"fetch the output of {name}", output, name, str(folder))

    def quota_left(self) -> tuple[float, float, str]:
        """GPU hours left this week, hours in total, and when the week ends."""
        answer = self.ask("look at the GPU quota", self.api.quota_view)
        gpu, end = answer.gpu_quota, answer.quota_refresh_time
        if gpu is None or gpu.time_used is None or gpu.total_time_allowed is None:
            raise Problem(UNAVAILABLE, "Cannot look at the GPU quota: Kaggle reports none.")
        total, used = gpu.total_time_allowed.total_seconds(), gpu.time_used.total_seconds()
        until = f"{end:%Y-%m-%d %H:%M} UTC" if end else "an unknown time"
        return max(0.0, total - used) / 3600, total / 3600, until


def connect(retries: int, poll: float, minutes: float) -> Connection:
    """A connection. Raises Problem where credentials are missing or not accepted."""
    empty = sorted(k for k, v in os.environ.items() if k.startswith("KAGGLE_") and not v)
    for name in (*empty, "VERBOSE", "VERBOSE_OUTPUT"):
        os.environ.pop(name, None)  # verbose output has headers and signed addresses
    HTTPAdapter.send = functools.partialmethod(HTTPAdapter.send, timeout=TIMEOUT)
    with contextlib.redirect_stdout(io.StringIO()):  # the import logs in and prints help
        from kaggle.api.kaggle_api_extended import KaggleApi
    kaggle = Connection(KaggleApi(), retries, poll, minutes)
    try:
        kaggle.ask("log in", kaggle.api.authenticate)
    except SystemExit:
        unset = f" ({', '.join(empty)} is empty, which counts as missing)" if empty else ""
        variables = "KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY"
        raise Problem(REFUSED, f"No Kaggle credentials{unset}: set {variables}.") from None
    values = kaggle.api.config_values
    leaks.FROM_FILES |= {name: values.get(name) or "" for name in ("key", "token")}
    if "KAGGLE_API_TOKEN" in os.environ and values.get("auth_method") != "ACCESS_TOKEN":
        # The client falls back on other credentials, if there are any.
        raise Problem(REFUSED, "Kaggle does not accept KAGGLE_API_TOKEN; renew it or unset it.")
    return kaggle


def _faults(answer: Any, message: str, ref: str) -> Iterator[str]:
    """Why a push that was answered with status 200 did not do what was asked."""
    if message:
        yield f"did not start {ref}: {message}"
    kinds = ("dataset", "competition", "kernel", "model")
    dropped = {f"{kind} source": getattr(answer, f"invalid_{kind}_sources") for kind in kinds}
    dropped["tag"] = answer.invalid_tags
    missing = ", ".join(f"{kind} {', '.join(names)}" for kind, names in dropped.items() if names)
    if missing:
        yield (
            f"runs {ref}, version {answer.version_number}, but without {missing}: stop that "
            "version and check the names."
        )
    if not answer.version_number:
        yield f"accepted {ref} but named no version; look at it there."
    places = {part.lower() for text in (answer.ref, answer.url) for part in text.split("/")}
    if places != {""} and not set(ref.lower().split("/")) <= places:
        saved = answer.ref or answer.url
        yield f"saved {ref} as {saved}; delete the kernel with this title, or push as its owner."
