"""Where it runs, on what, with which secrets: every platform's oddities, planted."""

import json
import os
import subprocess
import sys
import time
import types
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import IPython
import loopback
import psutil
import pytest

from atlas_lib import artifacts, bootstrap, devices, notebooks, progress, session, stages
from atlas_lib.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary-2f9c1d"
PLATFORM = ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "COLAB_GPU")
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "WANDB_MODE", "WANDB_PROJECT")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A local machine without secrets; whatever a test or the library sets is undone."""
    before = dict(os.environ)
    for name in (*PLATFORM, *SECRETS, "CUDA_VISIBLE_DEVICES", "ATLAS_COMMIT"):
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def config():
    return load_config("sft_qwen05b")


@pytest.fixture
def on_kaggle(monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")  # Kaggle's image sets it, too
    monkeypatch.setenv("COLAB_GPU", "1")


@pytest.fixture
def on_colab(monkeypatch):
    monkeypatch.setattr(IPython, "get_ipython", lambda: "<google.colab._shell.Shell object>")


# --- where ----------------------------------------------------------------------------------------


def test_kaggle_is_kaggle_though_colabs_variables_are_set(on_kaggle, on_colab):
    assert bootstrap.platform_name() == "kaggle"


def test_colab_is_known_by_its_shell(on_colab):
    assert bootstrap.platform_name() == "colab"


def test_anything_else_is_local(monkeypatch):
    monkeypatch.setenv("COLAB_GPU", "1")
    assert bootstrap.platform_name() == "local"


def test_without_ipython_it_is_local(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert bootstrap.platform_name() == "local"


# --- OUT ------------------------------------------------------------------------------------------


def test_out_is_made_and_left_empty(tmp_path):
    folder = session.output_folder(str(tmp_path / "a" / "b"), "x")
    assert folder == tmp_path / "a" / "b"
    assert list(folder.iterdir()) == []


def test_the_default_out_names_config_and_overlay(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "ROOT", tmp_path)
    (tmp_path / "Makefile").touch()
    assert session.output_folder("", "recipe") == tmp_path / "runs" / "recipe"
    assert session.output_folder("", "recipe", "over") == tmp_path / "runs" / "recipe-over"


def test_an_installed_library_writes_below_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "ROOT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    assert session.output_folder("", "recipe") == tmp_path / "runs" / "recipe"


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_an_out_that_is_not_writable_is_refused(below, tmp_path):
    (tmp_path / "file").write_text("mine", "utf-8")
    out = tmp_path / "file" / below
    with pytest.raises(ValueError, match=r"\AOUT [^\n]+ cannot be written to [^\n]+\.\Z") as caught:
        session.output_folder(str(out), "x")
    assert str(out) in str(caught.value)
    assert (tmp_path / "file").read_text("utf-8") == "mine"


# --- commit ---------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A scratch checkout with one commit, apart from the user's git settings."""
    for name in [n for n in os.environ if n.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "file").write_text("1", "utf-8")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    monkeypatch.setattr(session, "ROOT", folder)
    return folder


def test_a_clean_checkout_is_its_commit(repository):
    head = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    full = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    assert session.commit() == full[:12]


@pytest.mark.parametrize("name", ["file", "new"])
def test_a_changed_checkout_is_dirty(name, repository):
    (repository / name).write_text("2", "utf-8")
    assert session.commit().endswith("-dirty")


def test_outside_git_the_commit_is_unknown_or_given(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "ROOT", tmp_path)
    assert session.commit() == "unknown"
    monkeypatch.setenv("ATLAS_COMMIT", "abc123")
    assert session.commit() == "abc123"


def test_a_package_from_git_is_the_commit_that_pip_noted(tmp_path, monkeypatch):
    note = tmp_path / "atlas_sft-0.1.dist-info"
    note.mkdir()
    (note / "METADATA").write_text("Metadata-Version: 2.1\nName: atlas-sft\nVersion: 0.1\n")
    origin = {"url": "https://x", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}
    (note / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.setattr(session, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert session.commit() == "0123456789ab"


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert session.commit() == "unknown"


# --- device ---------------------------------------------------------------------------------------


def gpu(monkeypatch, capability: tuple[int, int] | None) -> None:
    """Let torch report a GPU of this capability, or none."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # so on a T4: emulated


def test_without_gpu_the_full_recipe_is_refused(config, monkeypatch):
    gpu(monkeypatch, None)
    with pytest.raises(RuntimeError, match=r"\ANo CUDA GPU[^\n]+\.\Z") as caught:
        devices.choose_device(config)
    for way_out in ("T4", "OVERLAY=offline", "run.require_gpu=false"):
        assert way_out in str(caught.value)


def test_without_gpu_a_cpu_run_is_float32(monkeypatch):
    gpu(monkeypatch, None)
    found = devices.choose_device(load_config("sft_qwen05b", "", {"run.require_gpu": False}))
    assert (found.name, found.dtype) == ("cpu", "float32")
    assert "no GPU" in found.reason


@pytest.mark.parametrize("capability", [(3, 7), (6, 0), (7, 0), (7, 2)])
def test_a_gpu_older_than_a_t4_is_refused(capability, config, monkeypatch):
    gpu(monkeypatch, capability)
    name = "sm_{}{}".format(*capability)
    with pytest.raises(RuntimeError, match=rf"\A[^\n]+ {name};[^\n]+\.\Z") as caught:
        devices.choose_device(config)
    assert "T4" in str(caught.value)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), "float16"), ((8, 0), "bfloat16"), ((8, 9), "bfloat16"), ((9, 0), "bfloat16"),
     ((10, 0), "bfloat16"), ((12, 0), "bfloat16")],
)  # fmt: skip
def test_the_precision_follows_the_hardware_and_says_why(capability, dtype, config, monkeypatch):
    gpu(monkeypatch, capability)
    found = devices.choose_device(config)
    assert (found.name, found.dtype) == ("cuda", dtype)
    assert "sm_{}{}".format(*capability) in found.reason


def test_one_gpu_is_chosen_unless_the_user_chose(config, monkeypatch):
    gpu(monkeypatch, (7, 5))
    devices.choose_device(config)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    for chosen in ("1", "0,1", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        devices.choose_device(config)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen


# --- secrets --------------------------------------------------------------------------------------


def raiser(error: BaseException):
    def fail(*args):
        raise error

    return fail


def named(name: str) -> BaseException:
    """An exception of a class that only the platform's own package defines."""
    return type(name, (Exception,), {})("planted")


def kaggle_secrets(monkeypatch, get_secret=None, constructor=None) -> None:
    """Stand in for Kaggle's package, which is on no index."""

    class UserSecretsClient:
        def __init__(self):
            if constructor:
                constructor()

        def get_secret(self, name):
            return get_secret(name)

    module = types.ModuleType("kaggle_secrets")
    module.UserSecretsClient = UserSecretsClient
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)


def colab_userdata(monkeypatch, get) -> None:
    """Stand in for Colab's package."""
    userdata = types.ModuleType("google.colab.userdata")
    userdata.get = get
    colab = types.ModuleType("google.colab")
    colab.userdata = userdata
    for module in (colab, userdata):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_secret_in_the_environment_comes_first(on_kaggle, monkeypatch):
    kaggle_secrets(monkeypatch, lambda name: "from kaggle")
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    assert session.secret("WANDB_API_KEY") == CANARY


def test_kaggles_secret_is_found(on_kaggle, monkeypatch):
    kaggle_secrets(monkeypatch, {"WANDB_API_KEY": CANARY}.get)
    assert session.secret("WANDB_API_KEY") == CANARY
    assert session.secret("HF_TOKEN") is None


def test_colabs_secret_is_found(on_colab, monkeypatch):
    colab_userdata(monkeypatch, {"WANDB_API_KEY": CANARY}.get)
    assert session.secret("WANDB_API_KEY") == CANARY
    assert session.secret("HF_TOKEN") is None


@pytest.mark.parametrize("error", [named("BackendError"), ConnectionError("HTTP 403")], ids=repr)
def test_kaggles_absent_secret_is_none(error, on_kaggle, monkeypatch):
    kaggle_secrets(monkeypatch, raiser(error))
    assert session.secret("WANDB_API_KEY") is None


def test_a_kaggle_session_without_token_has_no_secret(on_kaggle, monkeypatch):
    kaggle_secrets(monkeypatch, constructor=raiser(named("CredentialError")))
    assert session.secret("WANDB_API_KEY") is None


def test_a_kaggle_image_without_the_package_has_no_secret(on_kaggle, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaggle_secrets", None)  # what makes `import` raise
    assert session.secret("WANDB_API_KEY") is None


COLAB_ERRORS = [
    *map(named, ("SecretNotFoundError", "NotebookAccessError", "TimeoutException")),
    ValueError("planted"),
    ImportError("planted"),
]


@pytest.mark.parametrize("error", COLAB_ERRORS, ids=repr)
def test_colabs_absent_secret_is_none(error, on_colab, monkeypatch):
    colab_userdata(monkeypatch, raiser(error))
    assert session.secret("WANDB_API_KEY") is None


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_secret_is_none(empty, on_kaggle, monkeypatch):
    kaggle_secrets(monkeypatch, lambda name: empty)
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert session.secret("WANDB_API_KEY") is None


def test_a_local_machine_has_only_its_environment():
    assert session.secret("WANDB_API_KEY") is None


# --- the end of the session -----------------------------------------------------------------------


def hours_left(**run) -> float | None:
    given = {f"run.{key}": value for key, value in run.items()}
    end = callbacks.session_deadline(load_config("sft_qwen05b", "", given))
    return end and (end - time.time()) / 3600


def test_a_local_run_has_no_end():
    assert hours_left() is None


def test_a_local_run_ends_when_it_is_told_to():
    since_start = (time.time() - psutil.Process().create_time()) / 3600  # a long suite is hours old
    assert hours_left(session_hours=9) == pytest.approx(9 - 10 / 60 - since_start, abs=0.01)


class FirstProcess:
    """A container that began so many hours ago."""

    def __init__(self, hours_ago: float):
        self.hours_ago, self.real = hours_ago, psutil.Process()

    def __call__(self, number=None):
        if number is None:
            return self.real
        if self.hours_ago is None:
            raise psutil.AccessDenied(number)
        return types.SimpleNamespace(create_time=lambda: time.time() - self.hours_ago * 3600)


@pytest.mark.parametrize(
    ("hours_ago", "left"),
    [(3, 9 - 10 / 60), (11.9, 12 - 10 / 60), (500, 12 - 10 / 60), (None, 12 - 10 / 60)],
    ids=["its first process", "past", "a machine that is older", "hidden"],
)
def test_a_kaggle_session_ends_after_twelve_hours(hours_ago, left, on_kaggle, monkeypatch, capsys):
    monkeypatch.setattr(psutil, "Process", FirstProcess(hours_ago))
    since_start = (time.time() - psutil.Process().create_time()) / 3600
    own = 0 if hours_ago == 3 else since_start
    assert hours_left() == pytest.approx(left - own, abs=0.01)
    assert "run.session_hours: 12" in capsys.readouterr().out


# --- the stamp ------------------------------------------------------------------------------------


def test_the_stamp_identifies_the_run_and_shows_no_secret(monkeypatch, tmp_path, capfd):
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, CANARY)
    config, out = notebooks.start("01_data_prep", "sft_qwen05b", "offline", str(tmp_path), {})
    assert out == tmp_path
    shown = "".join(capfd.readouterr())
    assert CANARY not in shown
    digest = artifacts.config_digest(config, "01_data_prep")
    for part in (config.label, digest, session.commit(), "local", str(tmp_path), "trl "):
        assert part in shown


def test_each_stage_shows_the_digest_of_its_own(tmp_path, capsys):
    for stage in stages.STAGES:
        notebooks.start(stage, "sft_qwen05b", "offline", str(tmp_path), {})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("digest ")]
    assert len({line.split()[1] for line in lines}) == 4


def test_kaggles_token_reaches_the_hubs_library(on_kaggle, monkeypatch, capfd):
    kaggle_secrets(monkeypatch, lambda name: CANARY)
    session.export_secrets()
    assert os.environ["HF_TOKEN"] == CANARY
    assert CANARY not in "".join(capfd.readouterr())


def test_a_manifest_says_what_made_it_and_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    found = session.provenance()
    assert found.keys() == {"commit", "versions", "platform", "image", "hardware", "gpus"}
    assert {"python", "torch", "trl", "lm_eval"} <= found["versions"].keys()
    assert CANARY not in str(found)


def test_a_manifest_names_the_image_of_a_hosted_session(on_kaggle, monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "f00d")
    monkeypatch.setenv("BUILD_DATE", "20261001")
    assert session.provenance()["image"] == "f00d 20261001"
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    assert session.provenance()["image"] == "release-colab"
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    assert session.provenance()["image"] == ""


def test_a_manifest_counts_the_gpus(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4'\necho 'GPU 1: Tesla T4'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert session.provenance()["gpus"] == 2


@pytest.mark.parametrize(("chosen", "count"), [("1", 1), ("", 0), ("-1", 0)])
def test_hidden_gpus_are_not_counted(chosen, count, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert devices.gpu_count() == count


def test_a_nested_notebook_takes_secrets_from_the_environment_only(on_kaggle, monkeypatch):
    class UserSecretsClient:
        def get_secret(self, name):
            return CANARY

    client = types.ModuleType("kaggle_secrets")
    client.UserSecretsClient = UserSecretsClient
    monkeypatch.setitem(sys.modules, "kaggle_secrets", client)
    assert session.secret("HF_TOKEN") == CANARY
    monkeypatch.setenv(session.NESTED, "1")
    assert session.secret("HF_TOKEN") is None
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert session.secret("HF_TOKEN") == "mine"


# --- the hub --------------------------------------------------------------------------------------


def ask_hub(endpoint: str, *repositories: str, **environment: str) -> dict[str, str]:
    """Repository -> the exception that check_hub raises in a fresh process, or "fine"."""
    code = (
        "import sys; from atlas_lib import sources\n"
        "for name in sys.argv[1:]:\n"
        "    try: sources.check_hub(name, None, 'dataset'); print(name, 'fine', sep='\\t')\n"
        "    except Exception as e: print(name, f'{type(e).__name__}: {e}', sep='\\t')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *repositories],
        cwd=ROOT,
        env=os.environ | {"HF_ENDPOINT": endpoint, "NO_PROXY": "*", "no_proxy": "*"} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return dict(line.split("\t") for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def stub_hub():
    """A hub on loopback that answers with the status that the repository's name begins with."""

    class Stub(BaseHTTPRequestHandler):
        def do_GET(self):
            status = int(self.path.split("/datasets/")[1].split("/")[0].removeprefix("s"))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"id": "s200/x", "sha": "0", "tags": [], "siblings": []}')

        def log_message(self, *args):
            pass

    with loopback.serving(Stub) as address:
        yield address


@pytest.fixture(scope="module")
def answers(stub_hub) -> dict[str, str]:
    names = ("s200/x", "s404/x", "s401/x", "s403/x", "s503/x", "./missing/folder")
    return ask_hub(stub_hub, *names)


UNREACHABLE = "http://127.0.0.1:9"


def test_an_unreachable_hub_names_the_offline_overlay():
    sentence = ask_hub(UNREACHABLE, "someone/data")["someone/data"]
    assert sentence.startswith("ConnectionError: ")
    assert sentence.endswith(".")
    for part in ("dataset someone/data", "OVERLAY=offline", "HF_HUB_OFFLINE=1"):
        assert part in sentence


def test_who_says_that_all_is_cached_is_not_asked_for_a_hub():
    assert ask_hub(UNREACHABLE, "someone/data", HF_HUB_OFFLINE="1") == {"someone/data": "fine"}


def test_a_repository_that_is_there_is_fine(answers):
    assert answers["s200/x"] == "fine"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_repository_that_the_hub_does_not_give_is_named(status, answers):
    sentence = answers[f"s{status}/x"]
    assert sentence.startswith("ValueError: ")
    assert sentence.endswith(".")
    for part in (f"dataset s{status}/x", "revision", "HF_TOKEN"):
        assert part in sentence
    assert "OVERLAY=offline" not in sentence


def test_a_hub_that_is_down_is_not_taken_for_a_wrong_name(answers):
    assert answers["s503/x"].startswith("ConnectionError: ")
    assert "OVERLAY=offline" in answers["s503/x"]


def test_a_path_that_does_not_exist_is_not_taken_for_a_broken_connection(answers):
    assert answers["./missing/folder"].startswith("ValueError: ")
    assert "cannot be reached" not in answers["./missing/folder"]


# --- progress -------------------------------------------------------------------------------------


def test_tracking_yields_every_item_and_speaks_at_the_end(capsys):
    assert list(progress.track("abc", "letters")) == ["a", "b", "c"]
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("letters: 3/3, ")


def test_tracking_speaks_on_the_way(capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0)
    list(progress.track("abc", "letters"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"letters: {n}/3" for n in (1, 2, 3)]


def test_tracking_nothing_says_nothing(capsys):
    assert list(progress.track([], "letters")) == []
    assert capsys.readouterr().out == ""


def test_the_time_left_is_in_proportion(capsys):
    progress.say("work", 2, 10, 5.0, ", loss 1.000")
    assert capsys.readouterr().out == "work: 2/10, 5 s so far, 20 s left, loss 1.000\n"
