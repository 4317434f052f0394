"""The push to the hub: the real client and the real `hf` against a hub on loopback."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stub_hub

ROOT = Path(__file__).resolve().parents[2]
TOKENS = "https://huggingface.co/settings/tokens"
UNREACHABLE = "http://127.0.0.1:9"
PREFLIGHT = "print(repr(hub.preflight(config)))"
PUSH = "print(repr(hub.push(pathlib.Path('it\\'s an adapter'), 'alice/adapter', config)))"


@pytest.fixture
def hub():
    with stub_hub.serve() as served:
        yield served


@pytest.fixture
def client(hub, tmp_path):
    """Runs code on `hub` and `config` in a fresh process: the client reads HF_ENDPOINT once."""

    def run(code: str, repo: str | None = "{user}/adapter", private: bool = True, **environment):
        done = subprocess.run(
            command(code, repo, private),
            cwd=tmp_path,
            env=surroundings(hub, tmp_path) | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        shown = done.stdout + done.stderr
        assert stub_hub.TOKEN not in shown and stub_hub.TOKEN[-12:] not in shown
        return done

    return run


def command(code: str, repo: str | None = "{user}/adapter", private: bool = True) -> list[str]:
    head = (
        "import pathlib, types\nfrom atlas_lib import hub\n"
        f"output = types.SimpleNamespace(hub_repo={repo!r}, hub_private={private!r})\n"
        "config = types.SimpleNamespace(output=output)\n"
    )
    return [sys.executable, "-c", head + code]


def surroundings(hub: stub_hub.Hub, home: Path) -> dict[str, str]:
    """The machine's environment without its secrets, proxies and platform."""
    strange = ("HF_", "HUGGING", "KAGGLE", "COLAB")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(strange) and not name.lower().endswith("_proxy")
    }
    return kept | {
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": stub_hub.TOKEN,
        "HF_HUB_DISABLE_XET": "1",  # LFS is what the stub speaks
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def refusal(done: subprocess.CompletedProcess) -> str:
    """The one sentence of the ValueError with which the process ended, having printed nothing."""
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: ") and last.endswith(".")
    assert "During handling" not in done.stderr
    return last


def lines(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# --- preflight: off -------------------------------------------------------------------------------


@pytest.mark.parametrize("repo", [None, ""])
def test_without_a_repository_the_hub_is_off(repo, hub, client):
    found = lines(client(PREFLIGHT, repo=repo))
    assert found == ["Hub: off (output.hub_repo is not set).", "None"]
    assert hub.requests == []


@pytest.mark.parametrize("token", ["", "  \n"])
def test_without_a_token_the_hub_is_off_and_nothing_prompts(token, hub, client):
    found = lines(client(PREFLIGHT, HF_TOKEN=token))
    assert found == ["Hub: off (no HF_TOKEN); the adapter stays in OUT.", "None"]
    assert hub.requests == []


def test_offline_the_hub_is_off_though_there_is_a_token(hub, client):
    found = lines(client(PREFLIGHT, HF_HUB_OFFLINE="1"))
    assert found == ["Hub: off (HF_HUB_OFFLINE is set); the adapter stays in OUT.", "None"]
    assert hub.requests == []


# --- preflight: on --------------------------------------------------------------------------------


def test_a_new_repository_is_made_private(hub, client):
    found = lines(client(PREFLIGHT))
    assert found == ["Hub: will push to alice/adapter (private)", "'alice/adapter'"]
    assert hub.private == {"alice/adapter": True}
    assert "GET /api/models/alice/adapter/auth-check/write" in hub.requests


def test_a_new_repository_is_public_if_asked_for(hub, client):
    found = lines(client(PREFLIGHT, private=False))
    assert found == ["Hub: will push to alice/adapter (public)", "'alice/adapter'"]
    assert hub.private == {"alice/adapter": False}


def test_what_exists_and_is_public_stays_so_and_is_said(hub, client):
    hub.hold("alice/adapter", private=False)
    line, returned = lines(client(PREFLIGHT))
    assert returned == "'alice/adapter'"
    assert "public already" in line and "output.hub_private" in line
    assert hub.private == {"alice/adapter": False}


def test_what_exists_and_is_private_is_not_called_public(hub, client):
    hub.hold("alice/adapter", private=True)
    assert lines(client(PREFLIGHT, private=False))[0].endswith("alice/adapter (private)")


def test_an_organisation_of_the_user_can_be_named(hub, client):
    assert lines(client(PREFLIGHT, repo="team/adapter"))[-1] == "'team/adapter'"
    assert "team/adapter" in hub.private


def test_a_name_without_namespace_is_the_users(hub, client):
    assert lines(client(PREFLIGHT, repo="adapter"))[-1] == "'alice/adapter'"


def test_the_token_of_a_login_is_found(tmp_path, client):
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "token").write_text(stub_hub.TOKEN, "utf-8")
    assert lines(client(PREFLIGHT, HF_TOKEN=""))[-1] == "'alice/adapter'"


def test_a_pasted_line_end_does_not_spoil_the_token(client):
    assert lines(client(PREFLIGHT, HF_TOKEN=f" {stub_hub.TOKEN}\n"))[-1] == "'alice/adapter'"


def test_a_token_for_this_repository_alone_is_enough(hub, client):
    hub.role = "fineGrained"
    hub.hold("alice/adapter", private=True)
    hub.plant("no create")
    assert lines(client(PREFLIGHT))[-1] == "'alice/adapter'"


def test_the_clients_patience_is_as_before(client):
    code = "from huggingface_hub.utils import get_session as s; a = s().timeout; "
    found = lines(client(code + PREFLIGHT + "; print(s().timeout == a and a.read is None)"))
    assert found[-1] == "True"


# --- preflight: the user is mistaken --------------------------------------------------------------


def test_an_invalid_token_is_refused(hub, client):
    hub.plant("bad token")
    sentence = refusal(client(PREFLIGHT))
    assert "refuses HF_TOKEN (401)" in sentence and TOKENS in sentence


@pytest.mark.parametrize("strange", ["\n", "\x7f", "…"])
def test_a_token_that_no_request_could_carry_is_refused_unquoted(strange, hub, client):
    broken = stub_hub.TOKEN[:-6] + strange + stub_hub.TOKEN[-6:]
    done = client(PREFLIGHT, HF_TOKEN=broken)
    assert "HF_TOKEN holds a character" in refusal(done) and TOKENS in done.stderr
    assert "canary" not in done.stderr
    assert hub.requests == []


def test_a_token_that_only_reads_is_refused_before_anything_is_made(hub, client):
    hub.role = "read"
    hub.hold("alice/adapter", private=True)
    sentence = refusal(client(PREFLIGHT))
    assert "only read" in sentence and TOKENS in sentence
    assert "POST /api/repos/create" not in hub.requests


def test_a_foreign_namespace_is_refused_with_those_that_would_do(hub, client):
    sentence = refusal(client(PREFLIGHT, repo="bob/adapter"))
    assert "'bob'" in sentence and "alice and team" in sentence and "{user}/name" in sentence
    assert hub.private == {}


def test_a_fine_grained_token_without_write_is_refused(hub, client):
    hub.role = "fineGrained"
    hub.plant("no create", "no write")
    sentence = refusal(client(PREFLIGHT))
    assert "write to alice/adapter (403 You don't have the rights" in sentence
    assert TOKENS in sentence and "output.hub_repo=null" in sentence


@pytest.mark.parametrize("faults", [("no create", "no write"), ("no write",)])
def test_a_repository_that_exists_but_cannot_be_written_is_refused(faults, hub, client):
    """create_repo(exist_ok=True) is content with a 403 where the repository exists."""
    hub.hold("alice/adapter", private=True)
    hub.plant(*faults)
    sentence = refusal(client(PREFLIGHT))
    assert "write to alice/adapter (403 You need write access" in sentence and TOKENS in sentence


WRONG = (
    "{usr}/x",
    "{user}/a/b",
    "a//b",
    "/x",
    "{user}/",
    "{user}/a b",
    "{user}/a--b",
    "{user}/x.git",
)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_repository_name_is_refused_unasked(name, hub, client):
    sentence = refusal(client(PREFLIGHT, repo=name))
    assert f"output.hub_repo {name!r}" in sentence and "placeholder but {user}" in sentence
    assert hub.requests == []


def test_a_refusal_quotes_no_token(hub, client):
    hub.plant("echo")
    assert "Bearer ***" in refusal(client(PREFLIGHT))


# --- preflight: the hub is away -------------------------------------------------------------------


def assert_away(found: list[str]) -> None:
    line, returned = found
    assert returned == "None"
    assert line.startswith("Hub: cannot be reached (") and "stays in OUT" in line
    assert "hf upload USER/adapter OUT/03_sft_train/adapter . --private" in line


def test_without_a_connection_the_run_goes_on(client):
    found = lines(client(PREFLIGHT, HF_ENDPOINT=UNREACHABLE))
    assert_away(found)
    assert "refused" in found[0]


@pytest.mark.parametrize("fault", ["down", "portal"])
def test_a_hub_that_is_out_of_order_is_no_mistake_of_the_users(fault, hub, client):
    hub.plant(fault)
    assert_away(lines(client(PREFLIGHT)))


def test_a_hub_that_never_answers_is_not_waited_for(hub, client):
    hub.plant("silent")
    assert_away(lines(client("hub.ANSWER_SECONDS = 1; " + PREFLIGHT)))


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


def test_without_a_repository_nothing_is_pushed_or_said(adapter, hub, client):
    code = 'print(repr(hub.push(pathlib.Path("it\'s an adapter"), None, config)))'
    assert lines(client(code)) == ["None"]
    assert hub.requests == []


@pytest.mark.parametrize("way", ["LFS", "the client's pipeline"])
def test_the_hub_has_the_folder_and_nothing_else(way, adapter, hub, client):
    hub.takes_lfs = way == "LFS"  # the pipeline sends large files by a protocol of its own
    done = client(PREFLIGHT + "; " + PUSH, HF_HUB_DISABLE_XET="01"[hub.takes_lfs])
    pushed, returned = lines(done)[-2:]
    assert hub.files == {"alice/adapter": adapter}
    assert hub.private == {"alice/adapter": True}
    assert len(hub.large) == hub.takes_lfs
    url = returned.strip("'")
    assert url.startswith(f"{hub.endpoint}/alice/adapter/commit/")
    assert pushed == f"Hub: pushed to {url}"


REASONS = {
    "no commit": "500 planted: no commit",
    "dropped commit": "disconnected",
    "silent commit": "timed out",
    "no write": "403 You need write access",
    "bad token": "401",
    "down": "503",
}


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("fault", REASONS)
def test_after_a_failed_push_the_printed_command_does_it(
    fault, private, adapter, hub, client, tmp_path
):
    hub.hold("alice/adapter", private)
    hub.plant(fault)
    code = "hub.UPLOAD_SECONDS = 1; " + PUSH
    line, recovery, returned = lines(client(code, private=private))
    assert returned == "None"
    assert line.startswith("Hub: the push to alice/adapter failed (")
    assert REASONS[fault] in line and "the adapter is safe" in line
    assert hub.files == {"alice/adapter": {}}

    hub.plant()
    hub.private.clear()  # the command makes the repository, too, where preflight did not
    env = surroundings(hub, tmp_path)
    words = shlex.split(recovery)
    assert words[:2] == ["hf", "upload"]
    subprocess.run(words, cwd=ROOT, env=env, check=True, capture_output=True, timeout=60)
    assert hub.files == {"alice/adapter": adapter}
    assert hub.private == {"alice/adapter": private}


def test_a_folder_that_is_missing_ends_no_run(hub, client):
    line, recovery, returned = lines(client(PUSH))
    assert "failed" in line and recovery.startswith("hf upload") and returned == "None"


def test_a_token_that_is_gone_ends_no_run(adapter, hub, client):
    hub.hold("alice/adapter", private=True)
    for token in ("", "a\x7fb"):
        line, recovery, returned = lines(client(PUSH, HF_TOKEN=token))
        assert "failed" in line and recovery.startswith("hf upload") and returned == "None"


def test_an_interrupt_is_the_users_and_ends_the_push(adapter, hub, tmp_path):
    hub.hold("alice/adapter", private=True)
    hub.plant("silent commit")
    # A shell starts what runs in its background with interrupts ignored; the child must hear ours.
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    pushing = subprocess.Popen(
        command(hear + PUSH),
        cwd=tmp_path,
        env=surroundings(hub, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not any("/commit/" in request for request in hub.requests):
            assert pushing.poll() is None
            time.sleep(0.05)
        pushing.send_signal(signal.SIGINT)
        shown, errors = pushing.communicate(timeout=60)
    finally:
        pushing.kill()
    assert "KeyboardInterrupt" in errors
    assert shown == ""
