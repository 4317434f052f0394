"""The adapter's way to the Hugging Face hub: proven open before training, taken after it."""

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from atlas_lib import session

ANSWER_SECONDS = 10  # for each of preflight's questions
UPLOAD_SECONDS = 60  # for each step of a push, which the client tries six times
# Files that were not finished, and pickles, which run code where they are loaded.
UNPUBLISHED = ("*.part", "*.bin", "*.pt", "*.pkl")
TOKENS = "https://huggingface.co/settings/tokens"


def preflight(config: Any) -> str | None:
    """The hub repository to push to, proven to be writable; None and a printed reason: no push.

    Nothing prompts. Raises ValueError where the user is mistaken, in the token or the name.
    """
    from huggingface_hub import HfApi, constants

    output = config.output
    if not output.hub_repo:
        print("Hub: off (output.hub_repo is not set).")
        return None
    token = None if constants.HF_HUB_OFFLINE else _token()
    if not token:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no HF_TOKEN"
        print(f"Hub: off ({reason}); the adapter stays in OUT.")
        return None
    later = _resolve(output.hub_repo, "USER")  # a wrong name is one, hub or no hub
    try:
        with _patience(ANSWER_SECONDS):
            repo, private = _claim(HfApi(token=token), output)
    except ConnectionError as error:
        command = _command(later, "OUT/03_sft_train/adapter", output.hub_private)
        print(f"Hub: cannot be reached ({error}); the adapter stays in OUT, to push: {command}")
        return None
    kept = "public already; output.hub_private does not change what exists"
    seen = "private" if private else kept if output.hub_private else "public"
    print(f"Hub: will push to {repo} ({seen})")
    return repo


def push(folder: Path, repo: str | None, config: Any) -> str | None:
    """Upload the adapter's `folder` to preflight's `repo`: the commit's URL; None: not pushed.

    A failure is printed, with the command that repeats the push: the run must still end well.
    """
    if repo is None:
        return None
    from huggingface_hub import HfApi

    token = None
    try:
        token = _token()
        with _patience(UPLOAD_SECONDS):
            commit = HfApi(token=token).upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message="Adapter trained by Atlas",
                ignore_patterns=list(UNPUBLISHED),
            )
    except Exception as error:
        why = _why(error, token)
        print(f"Hub: the push to {repo} failed ({why}); the adapter is safe. Repeat it with:")
        print(_command(repo, Path(folder).resolve(), config.output.hub_private))
        return None
    print(f"Hub: pushed to {commit.commit_url}")
    return commit.commit_url


def _token() -> str | None:
    """The user's token; None: there is none. Raises ValueError for what cannot be one."""
    from huggingface_hub import get_token

    token = (session.secret("HF_TOKEN") or "").strip() or get_token()
    if token and not (token.isascii() and token.isprintable()):
        # No request could carry it, and the client's exception would quote it.
        raise ValueError(f"HF_TOKEN holds a character that no token has; copy it from {TOKENS}.")
    return token


def _resolve(name: str, user: str) -> str:
    """output.hub_repo as "namespace/name", the user's own namespace if it gives none."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    repo = name.replace("{user}", user)
    repo = repo if "/" in repo else f"{user}/{repo}"
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise ValueError(
            f"output.hub_repo {name!r} does not name a repository; write namespace/name with "
            "letters, digits, single '-', '_' and '.', and no placeholder but {user}."
        ) from None
    return repo


def _claim(api: Any, output: Any) -> tuple[str, bool]:
    """(repository, whether it is private), made if need be and proven to be writable."""
    me = _ask(api, api.whoami, f"The hub refuses HF_TOKEN (%s); make a new one at {TOKENS}.")
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(
            f"HF_TOKEN can only read; make one that can write at {TOKENS}, or set "
            "output.hub_repo=null."
        )
    repo = _resolve(output.hub_repo, me["name"])
    owner, owners = repo.split("/")[0], [me["name"], *(org["name"] for org in me.get("orgs", []))]
    if owner not in owners:
        raise ValueError(
            f"output.hub_repo is under {owner!r}, and HF_TOKEN belongs to {' and '.join(owners)}; "
            "write {user}/name, or take a token of that namespace."
        )
    refusal = (
        f"The hub does not let HF_TOKEN write to {repo} (%s); give it write access to {owner}'s "
        f"repositories at {TOKENS}, or set output.hub_repo=null."
    )
    _ask(api, api.create_repo, refusal, repo, private=output.hub_private, exist_ok=True)
    _ask(api, api.auth_check, refusal, repo, write=True)  # create_repo forgives a 403 if it exists
    return repo, _ask(api, api.repo_info, refusal, repo).private


def _ask(api: Any, question: Callable, refusal: str, *args: Any, **options: Any) -> Any:
    """The hub's answer. Raises ValueError(refusal % why), and ConnectionError if there is none."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return question(*args, **options)
    except HfHubHTTPError as error:
        status, why = error.response.status_code, _why(error, api.token)
        if status in (408, 429) or status >= 500:
            raise ConnectionError(why) from None
        raise ValueError(refusal % why) from None
    except Exception as error:  # the client lets every kind of its transport's through
        raise ConnectionError(_why(error, api.token)) from None


def _why(error: Exception, token: str | None) -> str:
    """An exception as one line that holds no token."""
    response, said = getattr(error, "response", None), str(error)
    if response is not None:  # the client's own text fills a paragraph
        said = f"{response.status_code} {getattr(error, 'server_message', None) or ''}"
    line = " ".join(said.split()).rstrip(".") or type(error).__name__
    return line.replace(token, "***") if token else line


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Bound each wait of the hub's client, which by itself waits forever."""
    from huggingface_hub.utils import get_session

    session = get_session()
    before, session.timeout = session.timeout, seconds
    try:
        yield
    finally:
        session.timeout = before


def _command(repo: str, folder: str | Path, private: bool) -> str:
    """The shell command that does what push does."""
    words = ["hf", "upload", repo, str(folder), ".", *(["--private"] if private else [])]
    return shlex.join([*words, *(word for p in UNPUBLISHED for word in ("--exclude", p))])
