"""What can fail between this machine and Kaggle: an exit code and one sentence for each."""

import contextlib
import json

import requests
import urllib3

KERNEL_FAILED, WRONG_INPUT, REFUSED, UNAVAILABLE, DEADLINE = 1, 2, 3, 4, 5
REASONS = {
    401: "Kaggle does not accept these credentials (401); create a new token",
    403: "Kaggle refuses this account (403); check the owner and the phone verification",
    404: "Kaggle does not know it (404)",
    412: "Kaggle has no capacity (412)",  # TooManyAssignments
}


class Problem(Exception):
    """A message, its exit code and, if Kaggle gave them, HTTP status and seconds to wait."""

    def __init__(
        self, code: int, sentence: str, status: int | None = None, pause: float | None = None
    ):
        super().__init__(sentence)
        self.code, self.status, self.pause = code, status, pause


def explain(what: str, error: Exception) -> Problem:
    """The problem behind an exception of Kaggle's client; its own text may quote a secret."""
    if isinstance(error, Problem):
        return error
    # The client turns some refusals into a ValueError that blames the name of the kernel.
    for cause in (error, error.__context__):
        if isinstance(cause, requests.HTTPError):
            return explain_response(what, cause.response)
    code = UNAVAILABLE
    if isinstance(error, json.JSONDecodeError):
        reason = "the answer is not JSON but a page (from a proxy, or in an outage?)"
    elif isinstance(error, requests.Timeout):
        reason = "Kaggle does not answer in time"
    elif isinstance(error, OSError):  # requests' exceptions are among them
        reason = f"no connection ({type(error).__name__})"
    elif isinstance(error, ValueError):
        code, reason = WRONG_INPUT, " ".join(str(error).split())
    else:
        reason = f"the client stopped with {type(error).__name__}: {str(error)[:200]}"
    return Problem(code, f"Cannot {what}: {reason}.")


def explain_response(what: str, response: requests.Response) -> Problem:
    """The problem behind a response whose status or body reports an error."""
    message, status = "", response.status_code
    with contextlib.suppress(ValueError, AttributeError):  # of a proxy, not of Kaggle
        body = response.json()
        message = " ".join(str(body.get("message") or "").split())[:200]
        status = body.get("code") if response.ok else status
    reason = REASONS.get(status, f"Kaggle answers {status}")
    sentence = f"Cannot {what}: {reason}{f' - {message}' if message else ''}."
    if status not in (408, 412, 429) and status < 500:
        return Problem(REFUSED, sentence, status)
    pause = None
    with contextlib.suppress(urllib3.exceptions.InvalidHeader):
        pause = urllib3.Retry().get_retry_after(response)
    return Problem(UNAVAILABLE, sentence, status, pause)
