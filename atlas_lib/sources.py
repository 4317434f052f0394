"""A configured name -> a local folder or file, or a hub id at a revision: the only resolver."""

import functools

from atlas_lib.bootstrap import ROOT


def locate(name: str) -> str:
    """The absolute path of a file or folder below the repository, any other name unchanged."""
    return str(ROOT / name) if (ROOT / name).exists() else name


@functools.cache  # what it gave once is in the cache: a hiccup later must not lose a run
def check_hub(repo: str, revision: str | None, kind: str = "model") -> None:
    """Ask the hub for `repo` before anything long starts. Raises ConnectionError or ValueError."""
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:  # the user says that everything is cached; the loader will tell
        return
    try:
        HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=5)
    except errors.HFValidationError:
        raise ValueError(f"{repo} is neither a hub id nor an existing file or folder.") from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 429 or error.response.status_code >= 500:
            raise ConnectionError(
                f"The Hugging Face hub answers {error.response.status_code}; try again in a while, "
                "or run without a hub: OVERLAY=offline (`make run`)."
            ) from None
        raise ValueError(
            f"The hub does not give {kind} {repo} at {revision or 'main'} "
            f"({type(error).__name__}); check the name, the revision and, for a private or gated "
            "repository, HF_TOKEN."
        ) from None
    except Exception as error:
        raise ConnectionError(
            f"The Hugging Face hub, which has {kind} {repo}, cannot be reached "
            f"({type(error).__name__}); connect, set HF_HUB_OFFLINE=1 if it is cached, or run "
            "without a hub: OVERLAY=offline (`make run`)."
        ) from None
