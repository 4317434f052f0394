"""Preflight and push: the real client and the real `hf` command against a hub on loopback."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import stub_hub
from checks import ROOT

TOKENS = "https://huggingface.co/settings/tokens"
UNREACHABLE = "http://127.0.0.1:9"
PREFLIGHT = "print(repr(hub.preflight(config)))"
PUSH = "hub.push_adapter(pathlib.Path('it\\'s an adapter'), 'alice/adapter', config)"
LIMIT = "hub.PREFLIGHT_SECONDS = hub.UPLOAD_SECONDS = 1; "


@pytest.fixture
def hub():
    with stub_hub.serve() as served:
        yield served


@pytest.fixture
def client(hub, tmp_path):
    """Runs code on `hub` and `config` in a new process: the client reads HF_ENDPOINT once."""

    def run(code: str, repo: str | None = "{user}/adapter", private: bool = True, **environment):
        head = (
            "import pathlib, types\nfrom atlas_lib.train import hub\n"
            f"output = types.SimpleNamespace(hub_repo={repo!r}, hub_private={private!r})\n"
            "config = types.SimpleNamespace(output=output)\n"
        )
        done = run_outside(hub, tmp_path, [sys.executable, "-c", head + code], **environment)
        for token in (stub_hub.TOKEN, stub_hub.TOKEN[-12:]):  # is never shown
            assert token not in done.stdout + done.stderr
        return done

    return run


def run_outside(hub: stub_hub.Hub, home: Path, command: list[str], **environment: str):
    """The finished command in an environment without the machine's secrets and proxies."""
    foreign = ("HF_", "HUGGING", "KAGGLE", "COLAB")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and not name.lower().endswith("_proxy")
    }
    kept |= {
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": stub_hub.TOKEN,
        "HF_HUB_DISABLE_XET": "1",  # whose pipeline repeats a failed commit for half a minute
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 60}
    return subprocess.run(command, cwd=home, env=kept | environment, **pipes)


def refused(done: subprocess.CompletedProcess) -> str:
    """The sentence of the ValueError with which the process ended, having printed nothing."""
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert "ValidationError: " in last or last.startswith("ValueError: ")
    assert last.endswith(".")
    assert "During handling" not in done.stderr
    return last


def lines(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# --- preflight: off -------------------------------------------------------------------------------

OFF = {
    "no repository": ({"repo": None}, "output.hub_repo is not set"),
    "no token": ({"HF_TOKEN": ""}, "no HF_TOKEN"),
    "a blank token": ({"HF_TOKEN": "  \n"}, "no HF_TOKEN"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
}
SECRETS = """
class UserSecretsClient:
    def get_secret(self, name):
        raise ConnectionError("HTTP 429")
"""


@pytest.mark.parametrize(("given", "reason"), OFF.values(), ids=OFF.keys())
def test_the_hub_is_off_and_nothing_prompts(given, reason, hub, client):
    found = lines(client(PREFLIGHT, **given))
    assert found[0].startswith(f"Hub: off ({reason}); the adapter stays in OUT.")
    assert found[-1] == "None"
    assert (found[1:-1] == []) == (given == {"repo": None})  # otherwise how to push it later
    assert hub.requests == []


def test_a_secrets_service_that_stumbles_is_not_a_missing_token(hub, client, tmp_path):
    (tmp_path / "kaggle_secrets.py").write_text(SECRETS, "utf-8")
    fast = "from atlas_lib import session; session.PAUSE_SECONDS = 0; "
    given = {"HF_TOKEN": "", "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    given["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}"
    line, recovery, _ = lines(client(fast + PREFLIGHT, **given))
    assert "HF_TOKEN cannot be read: ConnectionError: HTTP 429" in line
    assert recovery.startswith("hf upload")


# --- preflight: on --------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("existing", [None, True, False])
def test_the_repository_is_created_or_kept_and_its_visibility_printed(
    existing, private, hub, client
):
    if existing is not None:
        hub.hold("alice/adapter", private=existing)
    line, returned = lines(client(PREFLIGHT, private=private))
    assert returned == "'alice/adapter'"
    found = private if existing is None else existing
    assert hub.private == {"alice/adapter": found}
    kept = "already public, which output.hub_private does not change"
    visibility = "private" if found else kept if private else "public"
    assert line == f"Hub: will push to alice/adapter ({visibility})"
    assert "GET /api/models/alice/adapter/auth-check/write" in hub.requests


@pytest.mark.parametrize(
    ("name", "full"), [("team/adapter", "team/adapter"), ("adapter", "alice/adapter")]
)
def test_the_namespace_is_an_organisations_or_the_users(name, full, hub, client):
    assert lines(client(PREFLIGHT, repo=name))[-1] == repr(full)
    assert list(hub.private) == [full]


def test_a_login_or_a_pasted_token_is_found(tmp_path, client):
    assert lines(client(PREFLIGHT, HF_TOKEN=f" {stub_hub.TOKEN}\n"))[-1] == "'alice/adapter'"
    (tmp_path / "huggingface").mkdir(exist_ok=True)
    (tmp_path / "huggingface" / "token").write_text(stub_hub.TOKEN, "utf-8")
    assert lines(client(PREFLIGHT, HF_TOKEN=""))[-1] == "'alice/adapter'"


def test_a_token_for_this_repository_alone_is_enough(hub, client):
    hub.role = "fineGrained"
    hub.hold("alice/adapter", private=True)
    hub.plant("no create")
    assert lines(client(PREFLIGHT))[-1] == "'alice/adapter'"


# --- preflight: the user has to correct something -------------------------------------------------


@pytest.mark.parametrize("strange", ["\n", "\x7f", "…"])
def test_a_token_with_an_invalid_character_is_refused_and_not_shown(strange, hub, client):
    done = client(PREFLIGHT, HF_TOKEN=stub_hub.TOKEN[:-6] + strange + stub_hub.TOKEN[-6:])
    assert "HF_TOKEN contains an invalid character" in refused(done) and TOKENS in done.stderr
    assert "canary" not in done.stderr
    assert hub.requests == []


CANNOT_WRITE = "403 You need write access"
CANNOT_CREATE = "403 You don't have the rights"
OWN, FOREIGN = "alice/adapter", "bob/adapter"
REFUSED = {  # role of the token, faults, repository, whether it exists, the hub's reason
    "a read-only token": ("read", [], OWN, True, "it is read-only"),
    "an invalid token": ("write", ["bad token"], OWN, False, "401"),
    "no right to create": ("fineGrained", ["no create"], OWN, False, CANNOT_CREATE),
    # create_repo(exist_ok=True) accepts a 403 where the repository exists
    "no right to write": ("fineGrained", ["no create", "no write"], OWN, True, CANNOT_WRITE),
    "a foreign namespace": ("write", [], FOREIGN, False, CANNOT_CREATE),
    "a foreign repository": ("write", [], FOREIGN, True, CANNOT_WRITE),
    "a token in the answer": ("write", ["echo"], OWN, False, "Bearer ***"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_of_the_hub_ends_the_preflight(case, hub, client):
    hub.role, faults, repo, exists, reason = REFUSED[case]
    if exists:
        hub.hold(repo, private=True)
    hub.plant(*faults)
    sentence = refused(client(PREFLIGHT, repo=repo))
    assert "The hub refuses HF_TOKEN (" in sentence and reason in sentence
    assert f"can write to {repo} at {TOKENS}" in sentence
    assert "{user}/name" in sentence and "output.hub_repo=null" in sentence
    assert list(hub.private) == ([repo] if exists else [])
    assert hub.role != "read" or "POST /api/repos/create" not in hub.requests


@pytest.mark.parametrize("name", ["{usr}/x", "{user}/a/b", "{user}/", "{user}/a b"])
def test_an_invalid_name_is_refused_without_a_request(name, hub, client):
    sentence = refused(client(PREFLIGHT, repo=name))
    assert f"'{name.replace('{user}', 'USER')}'" in sentence and "epo" in sentence
    assert hub.requests == []


# --- preflight: no hub ----------------------------------------------------------------------------

AWAY = {
    "no connection": (None, "refused"),
    "out of order": ("down", "503"),
    "a login page": ("portal", "Expecting value"),
    "no answer": ("silent", "timed out"),
}


@pytest.mark.parametrize(("fault", "reason"), AWAY.values(), ids=AWAY.keys())
def test_without_the_hub_the_run_goes_on(fault, reason, hub, client):
    hub.plant(*([fault] if fault else []))
    environment = {} if fault else {"HF_ENDPOINT": UNREACHABLE}
    line, recovery, returned = lines(client(LIMIT + PREFLIGHT, **environment))
    assert returned == "None"
    assert line.startswith("Hub: not reachable (") and reason in line
    assert "stays in OUT" in line
    assert recovery.startswith("hf upload adapter OUT/03_sft_train/adapter . --private")


# --- push -----------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path) -> dict[str, bytes]:
    """What of the folder "it's an adapter" is to be published; beside it lies what is not."""
    published = {
        "README.md": b"---\nlicense: apache-2.0\n---\n# An adapter\n",
        "adapter_model.safetensors": os.urandom(70_000),
        "adapter_config.json": b'{"r": 16}',
        "empty": b"",
        "deep/er/chat_template.jinja": "{{ '…' }}\r\n".encode(),
    }
    pickles = ("training_args.bin", "x.pt", "deep/x.pkl", "adapter_model.safetensors.part")
    for name, content in (published | dict.fromkeys(pickles, b"pickle")).items():
        path = tmp_path / "it's an adapter" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return published


def test_without_a_repository_nothing_is_pushed(adapter, hub, client):
    assert lines(client(PUSH.replace("'alice/adapter'", "None"))) == []
    assert hub.requests == []


def test_the_hub_receives_the_folder_and_nothing_else(adapter, hub, client):
    done = client(PREFLIGHT + "; " + PUSH, HF_HUB_DISABLE_XET="0")  # as in a real run
    assert lines(done)[-1].startswith(f"Hub: pushed to {hub.endpoint}/alice/adapter/commit/")
    assert hub.files == {"alice/adapter": adapter}
    assert hub.private == {"alice/adapter": True}


def test_an_export_goes_into_a_folder_of_its_own_and_what_is_unproven_stays(hub, client, tmp_path):
    proved = {"export.json": b"{}", "model-f16.gguf": b"GGUF"}
    unproven = {"model-q8_0.gguf.unproven": b"GGUF", "merged.unproven/config.json": b"{}"}
    for name, content in (proved | unproven).items():
        (tmp_path / "export" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "export" / name).write_bytes(content)
    hub.hold("alice/adapter", private=True)
    push = "hub.push_adapter(pathlib.Path('export'), 'alice/adapter', config, 'export')"
    assert lines(client(push))[-1].startswith("Hub: pushed to")
    assert hub.files == {"alice/adapter": {f"export/{name}": c for name, c in proved.items()}}


REASONS = {
    "no commit": "500 planted: no commit",
    "silent commit": "timed out",
    "no write": "403 You need write access",
    "down": "503",
}


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("fault", REASONS)
def test_after_a_failed_push_the_printed_command_repeats_it(
    fault, private, adapter, hub, client, tmp_path
):
    hub.hold("alice/adapter", private)
    hub.plant(fault)
    line, recovery = lines(client(LIMIT + PUSH, private=private))
    assert line.startswith("Hub: the push to alice/adapter failed (") and REASONS[fault] in line
    assert hub.files == {"alice/adapter": {}}

    hub.plant()
    hub.private.clear()  # the command also creates the repository
    command = shlex.split(recovery)
    assert command[:2] == ["hf", "upload"]
    done = run_outside(hub, tmp_path, command)
    assert done.returncode == 0, done.stderr
    assert hub.files == {"alice/adapter": adapter}
    assert hub.private == {"alice/adapter": private}


@pytest.mark.parametrize("token", [stub_hub.TOKEN, "", "a\x7fb"])
def test_a_missing_folder_or_token_does_not_fail_the_run(token, hub, client):
    line, recovery = lines(client(PUSH, HF_TOKEN=token))  # without the folder
    assert "failed" in line and recovery.startswith("hf upload")
