"""The session: platform, OUT, commit, device, secrets, deadline, stamp, and the hub's check."""

import json
import os
import platform
import re
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
from checks import refusal, run_python

from atlas_lib import artifacts, bootstrap, devices, notebooks, progress, session, stages
from atlas_lib.config import load_config
from atlas_lib.train import callbacks

CANARY = "canary-2f9c1d"
PLATFORM = ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "COLAB_GPU")
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "WANDB_MODE", "WANDB_PROJECT")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A local machine without secrets; whatever a test or the library sets is undone."""
    before = dict(os.environ)
    for name in (*PLATFORM, *SECRETS, devices.VISIBLE, devices.NARROWED, "ATLAS_COMMIT"):
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


# --- platform -------------------------------------------------------------------------------------


def test_kaggle_is_not_taken_for_colab(on_kaggle, on_colab):
    assert bootstrap.platform_name() == "kaggle"


def test_colab_is_known_by_its_shell(on_colab):
    assert bootstrap.platform_name() == "colab"


def test_anything_else_is_local(monkeypatch):
    monkeypatch.setenv("COLAB_GPU", "1")
    assert bootstrap.platform_name() == "local"
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert bootstrap.platform_name() == "local"


# --- OUT ------------------------------------------------------------------------------------------


def test_out_is_created_and_left_empty(tmp_path):
    folder = session.output_folder(str(tmp_path / "a" / "b"), "x")
    assert folder == tmp_path / "a" / "b"
    assert list(folder.iterdir()) == []


def test_the_default_out_is_below_the_checkout_or_the_working_folder(tmp_path, monkeypatch):
    checkout, working = tmp_path / "checkout", tmp_path / "working"
    for folder in (checkout, working):
        folder.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setattr(session, "ROOT", checkout)
    assert session.output_folder("", "recipe") == working / "runs" / "recipe"  # installed by pip
    (checkout / "Makefile").touch()
    assert session.output_folder("", "recipe") == checkout / "runs" / "recipe"
    assert session.output_folder("", "recipe", "over") == checkout / "runs" / "recipe-over"


def test_an_out_on_a_drive_that_is_not_mounted_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "DRIVE", tmp_path / "drive")
    out = tmp_path / "drive" / "MyDrive" / "atlas"
    assert "Drive is not mounted" in refusal(session.output_folder, str(out), "x")
    assert not (tmp_path / "drive").exists()


@pytest.mark.parametrize("below", ["", "a/b"])
def test_an_out_that_is_not_writable_is_refused(below, tmp_path):
    (tmp_path / "file").write_text("mine", "utf-8")
    out = tmp_path / "file" / below
    assert f"OUT {out} cannot be written to" in refusal(session.output_folder, str(out), "x")
    assert (tmp_path / "file").read_text("utf-8") == "mine"


def test_a_relative_out_is_one_place_whatever_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = session.output_folder("runs/rel", "x")
    assert folder == tmp_path / "runs" / "rel"
    assert folder.is_absolute()


def test_a_notebook_opened_while_a_run_is_in_its_out_is_refused(tmp_path, monkeypatch):
    given = ("01_data_prep", "sft_qwen05b", "offline", str(tmp_path), {})
    notebooks.start(*given)
    assert list(tmp_path.iterdir()) == []  # alone, it holds nothing
    with session.hold(tmp_path / session.LOCK, "OUT"):
        (tmp_path / session.LOCK).write_text("by process 7")
        assert f"OUT {tmp_path} is in use by process 7; " in refusal(notebooks.start, *given)
        monkeypatch.setenv(session.NESTED, "1")  # the run's own notebooks
        notebooks.start(*given)
    monkeypatch.delenv(session.NESTED)
    notebooks.start(*given)


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
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    monkeypatch.setattr(session, "ROOT", folder)
    return folder


@pytest.mark.parametrize("changed", [None, "file", "new"])
def test_a_checkout_is_its_commit_or_dirty(changed, repository):
    head = subprocess.check_output(["git", "-C", str(repository), "rev-parse", "HEAD"], text=True)
    if changed:
        (repository / changed).write_text("2", "utf-8")
    assert session.commit() == head[:12] + ("-dirty" if changed else "")


def test_outside_git_the_commit_is_unknown_or_given(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "ROOT", tmp_path)
    assert session.commit() == "unknown"
    monkeypatch.setenv("ATLAS_COMMIT", "abc123")
    assert session.commit() == "abc123"


def test_without_the_git_program_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert session.commit() == "unknown"


def test_a_package_from_git_is_the_commit_that_pip_recorded(tmp_path, monkeypatch):
    metadata = tmp_path / "atlas_sft-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: atlas-sft\nVersion: 0.1\n")
    origin = {"url": "https://x", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}
    (metadata / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.setattr(session, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert session.commit() == "0123456789ab"


def test_a_checkout_of_another_user_names_gits_reason_and_command(repository, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    found = session.provenance()["commit"]
    assert found.startswith("unknown (fatal: detected dubious ownership in repository at ")
    assert f"git config --global --add safe.directory {repository}" in found


# --- device ---------------------------------------------------------------------------------------


def gpu(monkeypatch, capability: tuple[int, int] | None) -> None:
    """Let torch report a GPU of this capability, or none."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a planted GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # so on a T4: emulated


def test_without_gpu_the_full_recipe_is_refused_and_others_are_float32(config, monkeypatch):
    gpu(monkeypatch, None)
    sentence = refusal(devices.choose_device, config, kind=RuntimeError)
    for way_out in ("No CUDA GPU", "T4", "OVERLAY=offline", "run.require_gpu=false"):
        assert way_out in sentence
    found = devices.choose_device(load_config("sft_qwen05b", "", {"run.require_gpu": False}))
    assert (found.name, found.dtype) == ("cpu", "float32")
    assert "no GPU" in found.reason


@pytest.mark.parametrize("capability", [(6, 0), (7, 0), (7, 2)])
def test_a_gpu_older_than_a_t4_is_refused(capability, config, monkeypatch):
    gpu(monkeypatch, capability)
    sentence = refusal(devices.choose_device, config, kind=RuntimeError)
    assert "sm_{}{}; ".format(*capability) in sentence
    assert "T4" in sentence


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_the_precision_follows_the_hardware_with_a_reason(capability, dtype, config, monkeypatch):
    gpu(monkeypatch, capability)
    found = devices.choose_device(config)
    assert (found.name, found.dtype) == ("cuda", dtype)
    assert "sm_{}{}".format(*capability) in found.reason


@pytest.mark.parametrize("chosen", [None, "1", "0,1", ""])
def test_one_gpu_is_chosen_unless_the_user_chose(chosen, config, monkeypatch):
    gpu(monkeypatch, (7, 5))
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    devices.choose_device(config)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("0" if chosen is None else chosen)


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """An nvidia-smi that lists two GPUs, the second divided into two MIG instances."""
    lines = ("GPU 0: Tesla T4", "GPU 1: NVIDIA A100", "  MIG 1g Device 0:", "  MIG 1g Device 1:")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


CHOICES = [(None, ["0", "1"]), ("0", ["0"]), ("1", ["1"]), ("0,1", ["0", "1"]), ("1,0", ["1", "0"])]
CHOICES += [("", []), ("-1", []), ("0,7", ["0"]), ("MIG-c0ffee", ["MIG-c0ffee"])]


@pytest.mark.parametrize(("chosen", "expected"), CHOICES)
def test_the_gpus_are_those_that_the_user_has_not_hidden(
    chosen, expected, two_gpus, config, monkeypatch
):
    """Before and after Atlas narrows this process to one of them."""
    gpu(monkeypatch, (7, 5))
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    for _ in range(2):
        assert devices.visible_gpus() == expected
        assert session.provenance()["gpus"] == len(expected)
        devices.choose_device(config)


def test_a_driver_that_is_too_old_is_not_called_no_gpu(two_gpus, config, monkeypatch):
    import torch

    def init():
        raise RuntimeError(f"{old} Please update your GPU driver.")

    old = "The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    sentence = refusal(devices.choose_device, config, kind=RuntimeError)
    assert "(The NVIDIA driver on your system is too old (found version 11040))" in sentence
    assert "update its driver" in sentence
    assert "No CUDA GPU" not in sentence


def test_hidden_gpus_are_named_with_the_variable(two_gpus, config, monkeypatch):
    gpu(monkeypatch, None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sentence = refusal(devices.choose_device, config, kind=RuntimeError)
    assert sentence.startswith("CUDA_VISIBLE_DEVICES is '' and hides all other GPUs. No CUDA GPU")


# --- secrets --------------------------------------------------------------------------------------


def platform_secrets(monkeypatch, get) -> None:
    """Stand in for the packages of Kaggle and Colab, which are on no index."""
    packages = {
        "kaggle_secrets": {"UserSecretsClient": lambda: types.SimpleNamespace(get_secret=get)},
        "google.colab": {"userdata": types.SimpleNamespace(get=get)},
    }
    for name, content in packages.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def raise_platform_error(*_):
    """Each platform raises exceptions of its own for an absent secret."""
    raise type("SecretNotFoundError", (Exception,), {})("planted")


@pytest.mark.parametrize("platform", ["on_kaggle", "on_colab"])
def test_a_secret_comes_from_the_environment_or_the_platform(platform, request, monkeypatch):
    request.getfixturevalue(platform)
    platform_secrets(monkeypatch, {"WANDB_API_KEY": CANARY, "EMPTY": ""}.get)
    assert session.secret("WANDB_API_KEY")[0] == CANARY
    assert session.secret("HF_TOKEN") == (None, "no HF_TOKEN")
    assert session.secret("EMPTY") == (None, "no EMPTY")
    monkeypatch.setenv("WANDB_API_KEY", "mine")
    assert session.secret("WANDB_API_KEY")[0] == "mine"


@pytest.mark.parametrize("platform", ["on_kaggle", "on_colab"])
def test_an_absent_secret_or_package_is_no_error(platform, request, monkeypatch):
    request.getfixturevalue(platform)
    platform_secrets(monkeypatch, raise_platform_error)
    assert session.secret("WANDB_API_KEY") == (None, "no WANDB_API_KEY")
    for package in ("kaggle_secrets", "google.colab"):
        monkeypatch.setitem(sys.modules, package, None)  # what makes `import` raise
    assert session.secret("WANDB_API_KEY") == (None, "no WANDB_API_KEY")


TOO_MANY = ConnectionError("Service responded with error code 429")
NO_FRONTEND = type("TimeoutException", (Exception,), {})("planted")
STUMBLES = {"on_kaggle": TOO_MANY, "on_colab": NO_FRONTEND}


@pytest.mark.parametrize("answers", [1, 0])
@pytest.mark.parametrize("platform", STUMBLES)
def test_a_service_that_stumbles_is_asked_twice(platform, answers, request, monkeypatch):
    request.getfixturevalue(platform)
    asked = []

    def get(name: str) -> str:
        asked.append(name)
        if len(asked) == 1 or not answers:
            raise STUMBLES[platform]
        return CANARY

    platform_secrets(monkeypatch, get)
    monkeypatch.setattr(session, "PAUSE_SECONDS", 0)
    value, reason = session.secret("HF_TOKEN")
    assert (value, len(asked)) == (CANARY if answers else None, 2)
    if not answers:
        error = f"{type(STUMBLES[platform]).__name__}: {STUMBLES[platform]}"
        assert reason == f"HF_TOKEN cannot be read: {error}"


def test_a_nested_notebook_takes_secrets_from_the_environment_only(on_kaggle, monkeypatch):
    platform_secrets(monkeypatch, lambda name: CANARY)
    monkeypatch.setenv(session.NESTED, "1")
    assert session.secret("HF_TOKEN")[0] is None
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert session.secret("HF_TOKEN")[0] == "mine"


def test_kaggles_token_reaches_the_hubs_library(on_kaggle, monkeypatch, capfd):
    platform_secrets(monkeypatch, lambda name: CANARY)
    session.export_secrets()
    assert os.environ["HF_TOKEN"] == CANARY
    assert CANARY not in "".join(capfd.readouterr())


# --- the end of the session -----------------------------------------------------------------------


def hours_left(**run) -> float | None:
    given = {f"run.{key}": value for key, value in run.items()}
    end = callbacks.session_deadline(load_config("sft_qwen05b", "", given))
    return end and (end - time.time()) / 3600


def test_a_local_run_ends_only_if_configured():
    assert hours_left() is None
    since_start = (time.time() - psutil.Process().create_time()) / 3600  # a long suite is hours old
    assert hours_left(session_hours=9) == pytest.approx(9 - 10 / 60 - since_start, abs=0.01)


class FirstProcess:
    """A container that began so many hours ago."""

    def __init__(self, hours_ago: float | None):
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


# --- the stamp and the manifest -------------------------------------------------------------------


def test_the_stamp_identifies_the_run_and_shows_no_secret(monkeypatch, tmp_path, capfd):
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, CANARY)
    for stage in stages.STAGES:
        config, out = notebooks.start(stage, "sft_qwen05b", "offline", str(tmp_path), {})
        assert out == tmp_path
        shown = "".join(capfd.readouterr())
        assert CANARY not in shown
        digest = artifacts.config_digest(config, stage)
        for part in (config.label, digest, session.commit(), "local", str(tmp_path), "trl "):
            assert part in shown


def test_a_manifest_records_the_environment_and_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    found = session.provenance()
    assert found.keys() == {"commit", "versions", "platform", "image", "hardware", "gpus"}
    assert {"python", "torch", "trl", "lm_eval"} <= found["versions"].keys()
    assert CANARY not in str(found)


def test_hardware_tells_processors_apart():
    import torch

    named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text("utf-8"))
    model = f"{named[1]}, " if named else ""
    cores = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    if not torch.cuda.is_available():
        assert devices.hardware() == f"{model}{cores}, {torch.backends.cpu.get_cpu_capability()}"


def test_a_manifest_names_the_image_of_a_hosted_session(on_kaggle, monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "f00d")
    monkeypatch.setenv("BUILD_DATE", "20261001")
    assert session.provenance()["image"] == "f00d 20261001"
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    assert session.provenance()["image"] == "release-colab"
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    assert session.provenance()["image"] == ""


# --- the hub --------------------------------------------------------------------------------------


def ask_hub(endpoint: str, *repositories: str, **environment: str) -> dict[str, str]:
    """Repository -> the exception that check_hub raises in a fresh process, or "fine"."""
    code = (
        "import sys; from atlas_lib import sources\n"
        "for name in sys.argv[1:]:\n"
        "    try: sources.check_hub(name, None, 'dataset'); print(name, 'fine', sep='\\t')\n"
        "    except Exception as e: print(name, f'{type(e).__name__}: {e}', sep='\\t')\n"
    )
    environment |= {"HF_ENDPOINT": endpoint, "NO_PROXY": "*", "no_proxy": "*"}
    done = run_python("-c", code, *repositories, **environment)
    return dict(line.split("\t") for line in done.stdout.splitlines())


class StatusHub(BaseHTTPRequestHandler):
    """A hub that answers with the status that the repository's name begins with."""

    def do_GET(self):
        self.send_response(int(self.path.split("/datasets/s")[1].split("/")[0]))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"id": "s200/x", "sha": "0", "tags": [], "siblings": []}')

    def log_message(self, *args):
        pass


def test_a_missing_repository_is_told_from_a_hub_that_is_down():
    missing = ("s401/x", "s403/x", "s404/x")
    with loopback.serving(StatusHub) as endpoint:
        found = ask_hub(endpoint, "s200/x", *missing, "s503/x", "./missing/folder")
    assert found["s200/x"] == "fine"
    for name in missing:
        assert found[name].startswith("ValueError: ")
        for part in (f"dataset {name}", "revision", "HF_TOKEN"):
            assert part in found[name]
        assert "OVERLAY=offline" not in found[name]
    assert found["s503/x"].startswith("ConnectionError: ")
    assert found["./missing/folder"].startswith("ValueError: ")
    assert "cannot be reached" not in found["./missing/folder"]


UNREACHABLE = "http://127.0.0.1:9"


def test_an_unreachable_hub_names_the_offline_overlay():
    sentence = ask_hub(UNREACHABLE, "someone/data")["someone/data"]
    assert sentence.startswith("ConnectionError: ")
    for part in ("dataset someone/data", "OVERLAY=offline", "HF_HUB_OFFLINE=1"):
        assert part in sentence


def test_with_hf_hub_offline_the_hub_is_not_asked():
    assert ask_hub(UNREACHABLE, "someone/data", HF_HUB_OFFLINE="1") == {"someone/data": "fine"}


# --- progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "printed"), [(0, [1, 2, 3]), (10, [3])])
def test_progress_is_printed_now_and_then_and_at_the_end(interval, printed, capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", interval)
    assert list(progress.track("abc", "letters")) == ["a", "b", "c"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"letters: {n}/3" for n in printed]
