"""The check of a GPU: its dry run on a CPU, its verdicts, its refusals and its limits of time."""

import json
import os
from pathlib import Path

import pytest
from checks import ROOT, run_python

from atlas_lib import devices
from tools import gpu_check

NOTICE = "nothing printed here is about a GPU"
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}
T4 = {"free_gib": 13.9, "total_gib": 14.6, "gpus_listed": ["0"]}
T4 |= {"device": {"name": "cuda", "dtype": "float16", "reason": ""}}


def check(*arguments, **environment):
    return run_python("-m", "tools.gpu_check", *arguments, **environment)


def found(figures: dict | None = None, error: str | None = None) -> dict:
    return {"figures": figures or {}, "error": error, "seconds": 1.0}


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The process of a dry run, and its results."""
    file = tmp_path_factory.mktemp("dry") / "gpu.json"
    before = set((ROOT / "results").iterdir())
    done = check("--dry", "--json", file)
    assert set((ROOT / "results").iterdir()) == before
    return done, json.loads(file.read_text("utf-8"))


def test_a_dry_run_passes_and_says_that_it_is_not_about_a_gpu(dry):
    done, result = dry
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert NOTICE in lines[0] and NOTICE in lines[-1]
    verdicts = {name: one["verdict"] for name, one in result["checks"].items()}
    assert list(verdicts) == list(gpu_check.LIMITS)
    assert verdicts.pop("gpus") == "not run"
    assert set(verdicts.values()) == {"passed"}


def test_the_results_name_what_they_were_made_with(dry):
    _, result = dry
    assert (result["card"], result["dry"]) == (None, True)
    assert result["seconds"] > 0
    assert len(result["commit"].partition("-")[0]) == 12
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes"} <= result["versions"].keys()
    for name, one in result["checks"].items():
        assert one.keys() == {"verdict", "reason", "seconds", "limit_seconds", "figures"}
        assert one["limit_seconds"] == gpu_check.LIMITS[name]
    training = result["checks"]["training"]["figures"]
    assert (training["steps"], training["with_recomputing"]["steps"]) == (3, 2)
    assert training["real_tokens_per_second"] > 0


def test_every_claim_is_a_row_and_only_those_of_any_card_are_judged(dry):
    done, result = dry
    assert len(result["claims"]) == len(gpu_check.CLAIMS)
    for row in result["claims"]:
        judged = row["judged_on"] == "any" and row["check"] != "gpus"
        assert row["verdict"] == ("confirmed" if judged else "not judged"), row
        assert row["claim"] in done.stdout


@pytest.mark.slow
def test_a_broken_library_fails_the_checks_that_need_it_and_no_others(tmp_path):
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("raise ImportError('planted')\n")
    file = tmp_path / "gpu.json"
    done = check("--dry", "--json", file, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    result = json.loads(file.read_text("utf-8"))["checks"]
    failed = [name for name, one in result.items() if one["verdict"] == "failed"]
    assert failed == ["kernels", "memory", "training"]
    assert "planted" in result["kernels"]["reason"]
    assert "attention_error_decoding" in result["kernels"]["figures"]  # found before the failure
    assert "\nkernels   failed (" in done.stdout


def test_without_a_gpu_one_sentence_names_the_fix():
    before = set((ROOT / "results").iterdir())
    done = check(**HIDDEN)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: PyTorch finds no CUDA GPU: run this on a machine with one")
    assert "--dry" in line
    assert set((ROOT / "results").iterdir()) == before


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (found(T4 | {"free_gib": 3.1}), "3.1 of the GPU's 14.6 GiB are free and 8.5 are needed"),
        (found(error="The GPU is sm_60; Atlas needs sm_75."), "cannot be used: The GPU is sm_60"),
        (found(T4 | {"free_gib": 0, "device": {"name": "cpu"}}), "update the driver"),
    ],
    ids=["busy", "old", "driver"],
)
def test_a_gpu_that_cannot_be_checked_is_refused(card, words):
    sentence = gpu_check.refusal_of(card, dry=False)
    assert words in sentence
    assert sentence.endswith(".") and "\n" not in sentence
    assert gpu_check.refusal_of(card, dry=True) is None


OLD_GPU = """
import sys

if "tools.gpu_measure" in sys.orig_argv:
    import bitsandbytes, torch

    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda: (6, 0)
"""


def test_the_reason_of_a_gpu_that_is_too_old_is_told(tmp_path):
    """PyTorch is told, after its own start, that it has a P100."""
    (tmp_path / "sitecustomize.py").write_text(OLD_GPU)
    done = check(PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: The GPU cannot be used: RuntimeError: The GPU is sm_60; Atlas")
    assert "Traceback" not in done.stderr


def test_a_free_gpu_is_not_refused():
    assert gpu_check.refusal_of(found(T4), dry=False) is None


def verdict(check: str, figures: dict, card: str | None, error: str | None = None) -> dict:
    measured = {name: found() for name in gpu_check.LIMITS} | {check: found(figures, error)}
    claims = gpu_check.judge_claims(measured, card)
    return gpu_check.verdict_on(check, measured[check], claims)


@pytest.mark.parametrize(
    ("figures", "card", "expected"),
    [
        ({"real_tokens_per_second": 7100.0}, "Tesla T4", "passed"),
        ({"real_tokens_per_second": 6900.0}, "Tesla T4", "failed"),
        ({"real_tokens_per_second": 6900.0}, "NVIDIA L4", "passed"),
        ({"skipped_steps": 2}, "NVIDIA L4", "failed"),
        ({"skipped_steps": 2}, None, "passed"),
    ],
)
def test_a_limit_is_judged_on_its_card_only(figures, card, expected):
    assert verdict("training", figures, card)["verdict"] == expected


def test_a_refuted_claim_is_the_reason_of_the_failure():
    assert verdict("decoding", {"rows_as_generate": 0.875}, None)["reason"] == (
        "refutes: responses of generate()"
    )


def test_an_error_comes_before_figures():
    assert verdict("gpus", {"gpus": 2}, "Tesla T4", "RuntimeError: planted")["verdict"] == "failed"
    assert verdict("gpus", {"gpus": 1}, "Tesla T4")["verdict"] == "not run"


def test_the_limits_of_the_checks_are_nine_minutes():
    assert sum(gpu_check.LIMITS.values()) <= 9 * 60


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """An nvidia-smi that lists two GPUs, first on the PATH; the user has chosen none."""
    stub = tmp_path / "nvidia-smi"
    stub.write_text(f"#!{os.path.realpath('/bin/sh')}\necho 'GPU 0: A'\necho 'GPU 1: B'\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in (devices.VISIBLE, devices.NARROWED):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("chosen", "used"), [(None, ["0", "1"]), ("0", ["0"]), ("1", ["1"])])
def test_gpus_that_the_user_has_hidden_stay_hidden(chosen, used, two_gpus, monkeypatch):
    if chosen is not None:
        monkeypatch.setenv(devices.VISIBLE, chosen)
    given = gpu_check.environment(dry=False)
    assert given[devices.VISIBLE] == (chosen or "0")
    for name in (devices.VISIBLE, devices.NARROWED):
        if name in given:
            monkeypatch.setenv(name, given[name])
    assert devices.visible_gpus() == used


def test_a_check_that_takes_too_long_is_ended(tmp_path):
    measured = gpu_check.run_process(["card"], tmp_path, dry=True, limit=0.5)
    assert measured["card"]["error"] == "not finished within 0.5 seconds"


def test_the_file_is_named_after_the_card():
    assert gpu_check.file_name("Tesla T4") == "gpu_tesla_t4.json"
    assert gpu_check.file_name("NVIDIA H100 80GB HBM3") == "gpu_nvidia_h100_80gb_hbm3.json"


@pytest.mark.slow
def test_a_process_on_each_gpu_computes_the_same(tmp_path, two_gpus):
    """Two processes, each narrowed to a GPU that nvidia-smi lists; both compute on the CPU."""
    from tools import gpu_measure

    task = gpu_measure.Task(Path(tmp_path), dry=True)
    figures = {}
    for more in gpu_measure.every_gpu(task):
        figures |= more
    assert figures == {"gpus": 2, "share_of_gpus_used": 1.0, "share_of_gpus_equal": 1.0}
