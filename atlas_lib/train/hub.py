"""Push the adapter to the Hugging Face hub; write access is checked before the training."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from atlas_lib import session
from atlas_lib.schema import Config, Output

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFLIGHT_SECONDS = 10.0  # for each request of the preflight
UPLOAD_SECONDS = 60.0  # for each request of a push, which the client repeats up to six times
# Unfinished files, exports without a proof, and pickles, which run code when they are loaded.
UNPUBLISHED = ("*.part", "*.unproven", "*.unproven/*", "*.bin", "*.pt", "*.pkl")
TOKENS = "https://huggingface.co/settings/tokens"


def preflight(config: Config, adapter: str | Path = "OUT/03_sft_train/adapter") -> str | None:
    """The repository to push to, created if necessary; None, after printing why, if none is.

    Never prompts. `adapter` is the folder in the command that is printed to push it later. Raises
    ValueError if the token or the repository's name has to be corrected.
    """
    from huggingface_hub import constants

    output, state = config.output, "off"
    if not output.hub_repo:
        print("Hub: off (output.hub_repo is not set); the adapter stays in OUT.")
        return None
    name = _full_name(output.hub_repo, "USER").removeprefix("USER/")  # the client's default
    token, reason = (None, "HF_HUB_OFFLINE is set") if constants.HF_HUB_OFFLINE else _token()
    try:
        if token:
            return _claim(_client(token, PREFLIGHT_SECONDS), output)
    except Exception as error:  # the client lets every kind of transport error through
        state, reason = "not reachable", _reason(error, token)
        if _refused(error):
            raise ValueError(
                f"The hub refuses HF_TOKEN ({reason}); create one that can write to "
                f"{output.hub_repo} at {TOKENS}, write {{user}}/name, or set output.hub_repo=null."
            ) from None
    print(f"Hub: {state} ({reason}); the adapter stays in OUT. To push it, run:")
    print(_command(name, adapter, output.hub_private))
    return None


def push_adapter(folder: Path, repo: str | None, config: Config, path: str = "") -> None:
    """Upload `folder` to preflight's `repo`, by default to its root.

    A failure is printed with the command that repeats the push; it does not fail the run.
    """
    if repo is None:
        return
    token = None
    try:
        token, _ = _token()
        commit = _client(token, UPLOAD_SECONDS).upload_folder(
            repo_id=repo,
            folder_path=folder,
            path_in_repo=path,
            commit_message="Adapter trained by Atlas",
            ignore_patterns=list(UNPUBLISHED),
        )
        print(f"Hub: pushed to {commit.commit_url}")
    except Exception as error:
        print(f"Hub: the push to {repo} failed ({_reason(error, token)}). To repeat it, run:")
        print(_command(repo, Path(folder).resolve(), config.output.hub_private, path))


def _client(token: str | None, seconds: float) -> "HfApi":
    from huggingface_hub import HfApi
    from huggingface_hub.utils import get_session

    get_session().timeout = seconds  # the client's own default is to wait forever
    return HfApi(token=token)


def _token() -> tuple[str | None, str]:
    """The user's token, or None and why. Raises ValueError for one that no request can carry."""
    from huggingface_hub import get_token

    secret, reason = session.secret("HF_TOKEN")
    token = (secret or "").strip() or get_token()
    if token and not (token.isascii() and token.isprintable()):  # the client would quote it
        raise ValueError(f"HF_TOKEN contains an invalid character; copy it again from {TOKENS}.")
    return token, reason


def _full_name(name: str, user: str) -> str:
    """output.hub_repo as "namespace/name"; the namespace defaults to `user`. Raises ValueError."""
    from huggingface_hub.utils import validate_repo_id

    repo = name.replace("{user}", user)
    repo = repo if "/" in repo else f"{user}/{repo}"
    validate_repo_id(repo)
    return repo


def _claim(api: "HfApi", output: Output) -> str:
    """The repository's name, after creating it if necessary and checking write access."""
    me = api.whoami()
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError("it is read-only")
    repo = _full_name(output.hub_repo, me["name"])
    api.create_repo(repo, private=output.hub_private, exist_ok=True)
    api.auth_check(repo, write=True)  # create_repo accepts a 403 if the repository exists
    visibility = "private" if api.repo_info(repo).private else "public"
    if visibility == "public" and output.hub_private:
        visibility = "already public, which output.hub_private does not change"
    print(f"Hub: will push to {repo} ({visibility})")
    return repo


def _refused(error: Exception) -> bool:
    """Whether the hub has refused, rather than being overloaded, out of order or unreachable."""
    status = getattr(getattr(error, "response", None), "status_code", 503)
    return isinstance(error, PermissionError) or (status < 500 and status not in (408, 429))


def _reason(error: Exception, token: str | None) -> str:
    """An exception in one line, with the token masked."""
    response, text = getattr(error, "response", None), str(error)
    if response is not None:  # the client's own text fills a paragraph
        text = f"{response.status_code} {getattr(error, 'server_message', None) or ''}"
    line = " ".join(text.split()).rstrip(".") or type(error).__name__
    return line.replace(token, "***") if token else line


def _command(repo: str, folder: str | Path, private: bool, path: str = "") -> str:
    """The shell command that does what `push_adapter` does."""
    words = ["hf", "upload", repo, str(folder), path or ".", *(["--private"] if private else [])]
    return shlex.join([*words, *(word for p in UNPUBLISHED for word in ("--exclude", p))])
