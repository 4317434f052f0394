"""Kaggle's kernel service through its own client: every failure named, trouble asked again."""

import contextlib
import functools
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.kaggle.errors import (
    HIDDEN,
    OUT_OF_ORDER,
    REFUSED,
    Problem,
    explain,
    refusal,
    say,
)

ANSWER_SECONDS = 120  # the client itself would wait for ever
ABSENT = (403, 404)  # a private kernel that is not there is forbidden, too
LONGEST_PAUSE = 300.0  # seconds between two tries, unless Kaggle asks for more


@dataclass
class Session:
    """The authenticated client, and how patient to be with it."""

    api: Any
    user: str
    retries: int
    poll: float  # seconds between two looks at a kernel, and before the first retry
    minutes: float
    deadline: float = field(init=False)  # Unix time

    def __post_init__(self):
        self.restart_clock()

    def restart_clock(self) -> None:
        """Each stage has the deadline's minutes for itself."""
        self.deadline = time.time() + self.minutes * 60


def connect(retries: int, poll: float, minutes: float) -> Session:
    """An authenticated session. Raises Problem where credentials are absent or not accepted."""
    empty = [name for name, value in os.environ.items() if name.startswith("KAGGLE_") and not value]
    for name in (*empty, "VERBOSE", "VERBOSE_OUTPUT"):  # empty: taken for credentials there;
        os.environ.pop(name, None)  # verbose: prints the authorization header
    _wait_no_longer_than(ANSWER_SECONDS)
    session = Session(None, "", retries, poll, minutes)
    with contextlib.redirect_stdout(io.StringIO()):  # the import tries to log in and prints help
        from kaggle.api.kaggle_api_extended import KaggleApi
    session.api = KaggleApi()
    try:
        call(session, "log in", session.api.authenticate)
    except SystemExit:
        ignored = f" ({', '.join(sorted(empty))} is empty, which counts as absent)" if empty else ""
        raise Problem(
            REFUSED,
            f"No Kaggle credentials{ignored}: set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and "
            "KAGGLE_KEY.",
        ) from None
    values = session.api.config_values
    if "KAGGLE_API_TOKEN" in os.environ and values.get("auth_method") != "ACCESS_TOKEN":
        raise Problem(
            REFUSED,
            "Kaggle does not accept KAGGLE_API_TOKEN (wrong or expired): renew or unset it.",
        )
    HIDDEN.update(filter(None, (values.get("key"), values.get("token"))))
    session.user = values.get("username", "")
    return session


@functools.cache
def _wait_no_longer_than(seconds: float) -> None:
    """Give every request of this process a timeout: Kaggle's client sets none."""
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send

    def bounded(self, request, stream=False, timeout=None, **options):
        return send(self, request, stream=stream, timeout=timeout or seconds, **options)

    HTTPAdapter.send = bounded


def call(
    session: Session, what: str, function: Callable[[], Any], retries: int | None = None
) -> Any:
    """function(), tried again with growing pauses while Kaggle is out of order. Raises Problem."""
    import tenacity

    retries = session.retries if retries is None else retries

    def attempt():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return function()
        except Exception as error:
            raise explain(what, error) from None

    def pause(state: tenacity.RetryCallState) -> float:
        asked = state.outcome.exception().pause
        growing = min(session.poll * 2 ** (state.attempt_number - 1), LONGEST_PAUSE)
        return growing if asked is None else asked

    def enough(state: tenacity.RetryCallState) -> bool:
        over = time.time() + state.upcoming_sleep > session.deadline
        return over or state.attempt_number > retries

    def tell(state: tenacity.RetryCallState) -> None:
        again = f"again in {state.upcoming_sleep:.0f} s ({state.attempt_number}/{retries})"
        say(f"{state.outcome.exception()} - {again}")

    def out_of_order(error: BaseException) -> bool:
        return isinstance(error, Problem) and error.code == OUT_OF_ORDER

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(out_of_order),
        wait=pause,
        stop=enough,
        before_sleep=tell,
        reraise=True,
    )(attempt)


def kernels(session: Session, method: str, request: str, **values: Any) -> Any:
    """One request to Kaggle's kernel service, unwrapped, as the client's wrappers hide answers."""
    from kagglesdk.kernels.types import kernels_api_service as types

    message = getattr(types, request)()
    for name, value in values.items():
        setattr(message, name, value)
    with session.api.build_kaggle_client() as client:
        return getattr(client.kernels.kernels_api_client, method)(message)


def named(ref: str, version: int | None = None) -> dict[str, Any]:
    """The fields of a request that say which kernel."""
    owner, _, slug = ref.partition("/")
    return {"user_name": owner, "kernel_slug": slug, "version_label": version and f"v{version}"}


def state(session: Session, ref: str, version: int | None = None) -> tuple[str, str]:
    """(QUEUED, RUNNING, COMPLETE, ERROR, ...; what failed) of a version, or of the latest."""
    answer = kernels(
        session, "get_kernel_session_status", "ApiGetKernelSessionStatusRequest",
        **named(ref, version),
    )  # fmt: skip
    return answer.status.name, answer.failure_message or ""


def latest(session: Session, ref: str) -> tuple[int, list[str], set[str]]:
    """(version, sources of the cells, kernels attached) of the newest; (0, [], set()) if none."""
    try:
        answer = kernels(session, "get_kernel", "ApiGetKernelRequest", **named(ref))
    except Exception as error:
        if explain("look for the kernel", error).status not in ABSENT:
            raise
        return 0, [], set()
    sources = []
    with contextlib.suppress(AttributeError, TypeError, ValueError, KeyError):  # no notebook
        sources = ["".join(cell["source"]) for cell in json.loads(answer.blob.source)["cells"]]
    about = answer.metadata
    return about.current_version_number or 0, sources, set(about.kernel_data_sources or [])


def log(session: Session, ref: str, version: int | None) -> list[str]:
    """The lines that a kernel printed."""
    answer = kernels(
        session, "list_kernel_session_output", "ApiListKernelSessionOutputRequest",
        **named(ref, version),
    )  # fmt: skip
    try:
        return "".join(part["data"] for part in json.loads(answer.log or "[]")).splitlines()
    except (ValueError, TypeError, KeyError):
        return answer.log.splitlines()


def download(session: Session, ref: str, version: int | None, pattern: str, folder: Path) -> None:
    """Fetch the output files whose name matches `pattern` into `folder`."""
    name = f"{ref}/{version}" if version else ref
    session.api.kernels_output(name, str(folder), file_pattern=pattern, force=True)


def quota_left(session: Session) -> tuple[float, float, str]:
    """GPU hours left this week, hours in all, and when the week ends. Raises Problem."""
    answer = call(session, "look at the GPU quota", session.api.quota_view, retries=1)
    gpu = answer.gpu_quota
    if gpu is None or gpu.time_used is None or gpu.total_time_allowed is None:
        raise Problem(OUT_OF_ORDER, "Cannot look at the GPU quota: Kaggle tells none.")
    total, used = gpu.total_time_allowed.total_seconds(), gpu.time_used.total_seconds()
    until = f"{answer.quota_refresh_time:%Y-%m-%d %H:%M} UTC" if answer.quota_refresh_time else "?"
    return max(0.0, total - used) / 3600, total / 3600, until


def delete(session: Session, ref: str) -> None:
    """Delete a kernel with all its versions."""
    fields = {name: value for name, value in named(ref).items() if name != "version_label"}
    answer = call(
        session, f"delete {ref}",
        lambda: kernels(session, "delete_kernel", "ApiDeleteKernelRequest", **fields),
    )  # fmt: skip
    if answer is not None and answer.error_message:  # the client itself would report success
        raise Problem(REFUSED, f"Kaggle did not delete {ref}: {answer.error_message}")


def address(ref: str) -> str:
    """Where a kernel can be looked at."""
    return f"https://www.kaggle.com/code/{ref}"


def save(session: Session, folder: Path, ref: str) -> tuple[int, str]:
    """Push the folder once; (version, url) of what Kaggle made of it. Raises Problem."""
    answer = session.api.kernels_push(str(folder))
    if answer is None:
        raise Problem(REFUSED, f"Kaggle gave no answer to the push of {ref}.")
    if answer.error:
        raise refusal(ref, answer.error)
    dropped = ", ".join(_dropped(answer))
    if dropped:
        raise Problem(
            REFUSED,
            f"Kaggle runs {ref}, version {answer.version_number}, but without {dropped}: stop that "
            "version and check the names.",
        )
    url = answer.url or address(ref)
    if not answer.version_number:
        raise Problem(REFUSED, f"Kaggle took {ref} but named no version; look at {url}.")
    places = {part.lower() for text in (answer.ref, answer.url) for part in text.split("/")}
    if places != {""} and not set(ref.lower().split("/")) <= places:
        raise Problem(
            REFUSED,
            f"Kaggle saved {ref} as {answer.ref or answer.url}: owner or title do not give that "
            "id; change the title or delete the other kernel.",
        )
    return answer.version_number, url


def _dropped(answer: Any) -> Iterator[str]:
    """What was asked for and silently left out."""
    for kind in ("dataset", "competition", "kernel", "model"):
        names = getattr(answer, f"invalid_{kind}_sources")
        if names:
            yield f"{kind} source {', '.join(names)}"
    if answer.invalid_tags:
        yield f"tag {', '.join(answer.invalid_tags)}"
