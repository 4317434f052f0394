"""What can go wrong between us and Kaggle: one sentence, an exit code, never a secret."""

import contextlib
import json
import os
import re
import sys
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from tools import leaks

KERNEL_FAILED, WRONG_INPUT, REFUSED, OUT_OF_ORDER, DEADLINE = 1, 2, 3, 4, 5
HIDDEN: set[str] = set()  # secrets that the client read from files of its own
# What Kaggle says in a good answer (200) that is none. A quota comes back in days, the rest today.
QUOTA = re.compile(r"quota|weekly", re.IGNORECASE)
BUSY = re.compile(r"capacity|sessions?\b|concurrent|try again|temporar|too many", re.IGNORECASE)
BROKEN = re.compile(r"40[13]|not found|permission", re.IGNORECASE)


class Problem(Exception):
    """One sentence for the user and the exit code; Kaggle's HTTP status and the pause it asks."""

    def __init__(
        self, code: int, sentence: str, status: int | None = None, pause: float | None = None
    ):
        super().__init__(sentence)
        self.code, self.status, self.pause = code, status, pause


def without_secrets(text: str) -> str:
    """`text` with the secrets that are known here replaced: logs and messages may quote one."""
    known = {os.environ.get(name, "") for name in leaks.NAMES} | HIDDEN
    for value in (value for value in known if len(value) > 7):
        text = text.replace(value, "***")
    return text


def say(text: str, file: Any = None) -> None:
    """Print, but never a secret."""
    print(without_secrets(text), file=file, flush=True)


def fail(problem: Problem) -> None:
    """End with the problem's sentence and code."""
    say(f"error: {problem}", sys.stderr)
    sys.exit(problem.code)


def explain(what: str, error: Exception) -> Problem:
    """The problem behind an exception of the client; its own text may quote an address's token."""
    import requests

    if isinstance(error, Problem):
        return error
    # The client hides some refusals in a ValueError that blames the name.
    cause = next((e for e in (error, error.__context__) if isinstance(e, requests.HTTPError)), None)
    if cause is not None and cause.response is not None:
        return _explain_status(what, cause.response)
    if isinstance(error, requests.JSONDecodeError | json.JSONDecodeError):
        return Problem(
            OUT_OF_ORDER,
            f"Cannot {what}: the answer is a page, not Kaggle's (a proxy, an outage?).",
        )
    if isinstance(error, requests.Timeout):
        return Problem(OUT_OF_ORDER, f"Cannot {what}: Kaggle does not answer in time.")
    if isinstance(error, requests.RequestException | OSError):
        return Problem(OUT_OF_ORDER, f"Cannot {what}: no connection ({type(error).__name__}).")
    if isinstance(error, KeyError):
        return Problem(OUT_OF_ORDER, f"Cannot {what}: Kaggle answers {error}, unknown here.")
    if isinstance(error, ValueError):
        return Problem(WRONG_INPUT, f"Cannot {what}: {' '.join(str(error).split())}")
    # What the client did not expect, from an answer of another shape to a bug, its own or ours.
    told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Problem(OUT_OF_ORDER, f"Cannot {what}: the client stopped at {told}.")


REASONS = {
    401: "Kaggle does not accept these credentials (401); make a new token",
    403: "Kaggle refuses this to the account (403); is the owner right and the phone verified?",
    404: "Kaggle does not know it (404)",
}


def _explain_status(what: str, response: Any) -> Problem:
    try:
        body = response.json()
        message = " ".join(str(body.get("message") or body.get("error") or "").split())[:200]
        status = body.get("code") if response.ok else response.status_code
    except (ValueError, AttributeError):
        message, status = "", response.status_code
    reason = REASONS.get(status, f"Kaggle answers {status}")
    sentence = f"Cannot {what}: {reason}{f' - {message}' if message else ''}."
    if status in (408, 429) or status >= 500:
        pause = _retry_after(response.headers.get("Retry-After"))
        return Problem(OUT_OF_ORDER, sentence, status, pause)
    return Problem(REFUSED, sentence, status)


def _retry_after(header: str | None) -> float | None:
    """Seconds; the header has them, or a date."""
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, float(header))
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    return None


def refusal(ref: str, message: str) -> Problem:
    """The problem behind an error that came in a good answer."""
    message = " ".join(message.split()).rstrip(".")
    if QUOTA.search(message):
        return Problem(REFUSED, f"Kaggle did not start {ref}, the quota is used up: {message}.")
    if BUSY.search(message) and not BROKEN.search(message):
        return Problem(OUT_OF_ORDER, f"Kaggle cannot start {ref} now: {message}.")
    return Problem(REFUSED, f"Kaggle did not take {ref}: {message}.")
