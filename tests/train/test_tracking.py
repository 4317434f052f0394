"""Weights & Biases: the real client against a stub of its service."""

import base64
import os
import sys
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace

import loopback
import pytest
from checks import run_python

from atlas_lib import session
from atlas_lib.config import load_config
from atlas_lib.train import tracking

KEY = "canary2f9c1d" * 4  # W&B wants at least 40 characters
UNREACHABLE = "http://127.0.0.1:9"


class Service(BaseHTTPRequestHandler):
    """A W&B that knows one key."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Basic ")
        known = base64.b64decode(token).decode().endswith(KEY) if token else False
        self.send_response(200 if known else 401)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"data": {"viewer": {"id": "x", "entity": "me", "flags": "{}"}}}')

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def environment(tmp_path):
    """A machine without W&B's variables, which reaches the stub; all changes are undone."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(("WANDB", "KAGGLE", "COLAB"))]:
        del os.environ[name]
    with loopback.serving(Service) as address:
        os.environ |= {"WANDB_BASE_URL": address, "HOME": str(tmp_path)}
        yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def report_to(tmp_path, capfd):
    """Calls `report_to` with these variables: (what it returns, what it printed)."""

    def call(asked="wandb", **variables) -> tuple[str, str]:
        os.environ.update(variables)
        config = load_config("sft_qwen05b", "", {"train.report_to": asked})
        returned = tracking.report_to(config, tmp_path)
        return returned, "".join(capfd.readouterr())

    return call


def test_it_is_on_with_a_key_that_is_never_shown(report_to, tmp_path):
    returned, shown = report_to(WANDB_API_KEY=KEY)
    assert (returned, "W&B: on" in shown, KEY in shown) == ("wandb", True, False)
    assert os.environ["WANDB_PROJECT"] == load_config("sft_qwen05b").run.wandb_project
    assert os.environ["WANDB_DIR"] == str(tmp_path)
    assert "WANDB_MODE" not in os.environ
    assert not (tmp_path / ".netrc").exists()


def test_the_check_of_a_key_leaves_nothing_behind(report_to, tmp_path):
    (scratch := tmp_path / "scratch").mkdir()
    assert report_to(WANDB_API_KEY=KEY, TMPDIR=str(scratch))[0] == "wandb"
    assert not list(scratch.iterdir())


NO_CONNECTION = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": UNREACHABLE}
OFF = {
    "no key": ({"WANDB_API_KEY": ""}, "no WANDB_API_KEY"),
    "a wrong key": ({"WANDB_API_KEY": "wrong" * 8}, "the key is not accepted"),
    "no connection": (NO_CONNECTION, "or W&B cannot be reached"),
    "not asked for": ({"WANDB_API_KEY": KEY, "asked": "none"}, "train.report_to does not ask"),
}


@pytest.mark.parametrize(("given", "reason"), OFF.values(), ids=OFF.keys())
def test_it_is_off_before_the_training(given, reason, report_to):
    returned, shown = report_to(**given)
    assert returned == "none"
    assert os.environ["WANDB_MODE"] == "disabled"
    [line] = shown.splitlines()
    assert line.startswith("W&B: off (")
    assert reason in line
    assert not given["WANDB_API_KEY"] or given["WANDB_API_KEY"] not in line


def test_a_service_that_never_answers_is_off(report_to, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("import time\nApi = lambda timeout: time.sleep(5)\n")
    monkeypatch.setattr(tracking, "KEY_CHECK_SECONDS", 1)
    returned, shown = report_to(WANDB_API_KEY=KEY, PYTHONPATH=str(tmp_path))
    assert (returned, "W&B: off (" in shown) == ("none", True)


def test_offline_needs_no_accepted_key(report_to):
    assert report_to(**NO_CONNECTION, WANDB_MODE="offline")[0] == "wandb"
    assert os.environ["WANDB_MODE"] == "offline"


def test_a_key_from_kaggles_secrets_reaches_the_client(report_to, monkeypatch):
    client = SimpleNamespace(get_secret={"WANDB_API_KEY": KEY}.get)
    secrets = SimpleNamespace(UserSecretsClient=lambda: client)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", secrets)
    assert report_to(KAGGLE_KERNEL_RUN_TYPE="Batch")[0] == "wandb"
    assert os.environ["WANDB_API_KEY"] == KEY


def test_a_secrets_service_that_stumbles_is_not_a_missing_key(report_to, monkeypatch):
    def stumble():
        raise ConnectionError("HTTP 429")

    monkeypatch.setitem(sys.modules, "kaggle_secrets", SimpleNamespace(UserSecretsClient=stumble))
    monkeypatch.setattr(session, "PAUSE_SECONDS", 0)
    returned, shown = report_to(KAGGLE_KERNEL_RUN_TYPE="Batch")
    assert returned == "none"
    assert "WANDB_API_KEY cannot be read: ConnectionError: HTTP 429" in shown


def test_a_key_that_is_added_later_switches_it_on(report_to):
    """In the same session of a notebook, the cell is run again."""
    assert report_to()[0] == "none"
    assert report_to(WANDB_API_KEY=KEY)[0] == "wandb"
    assert os.environ.get("WANDB_MODE") != "disabled"


@pytest.mark.parametrize("key", ["", "short"])
def test_without_a_good_key_the_real_client_neither_prompts_nor_fails(key, tmp_path):
    code = (
        "import sys; from pathlib import Path; from atlas_lib.config import load_config\n"
        "from atlas_lib.train import tracking\n"
        "tracking.report_to(load_config('sft_qwen05b'), Path(sys.argv[1]))\n"
        "import wandb; wandb.init().log({'loss': 1.0}); print('through')\n"
    )
    done = run_python("-c", code, tmp_path, WANDB_API_KEY=key)
    assert done.stdout.endswith("through\n"), done.stderr
    assert not list(tmp_path.glob("wandb/*"))
