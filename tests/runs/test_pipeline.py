"""Whole runs: the offline default as a user types it, killed runs, and each notebook alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["01_data_prep", "02_template_audit", "03_sft_train", "04_ifeval_eval"]
TINY_ARGS = [argument for key, value in TINY.items() for argument in ("--set", f"{key}={value}")]

pytestmark = pytest.mark.slow


def atlas(*arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.run", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def load(path: Path):
    return json.loads(path.read_text("utf-8"))


def text_of(page: Path) -> str:
    """Everything that an executed notebook shows."""
    outputs = [out for cell in load(page)["cells"] for out in cell.get("outputs", [])]
    shown = [out.get("text", "") for out in outputs]
    shown += [text for out in outputs for text in out.get("data", {}).values()]
    return "\n".join("".join(part) for part in shown)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(OUT, what the first run printed) of the offline default, nothing made smaller."""
    out = tmp_path_factory.mktemp("offline")
    done = atlas("--overlay", "offline", "--out", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done.stdout


def test_it_learns_what_it_is_taught(whole):
    rows = {
        (row["model"], row["format"]): row
        for row in load(whole[0] / "04_ifeval_eval" / "ifeval.json")["taught_types"]
    }
    base, sft = rows["base", "chat"], rows["SFT", "chat"]
    assert base["prompt_level_strict_acc"] <= 0.3
    assert sft["prompt_level_strict_acc"] - base["prompt_level_strict_acc"] >= 0.5
    assert base["stop_rate"] <= 0.05
    assert sft["stop_rate"] >= 0.95


def test_metrics_name_their_run(whole):
    metrics = load(whole[0] / "metrics.json")
    grid = {(row["model"], row["format"]) for row in metrics}
    assert grid == {(name, form) for name in ("base", "SFT") for form in ("raw", "chat")}
    for row in metrics:
        for key in ("config_digest", "commit", "data", "hardware", "label", "ci95", "counts"):
            assert row[key], key
        assert len(row["by_type"]) == 25


def test_every_page_says_what_it_is(whole):
    label = "offline stand-in: shows that the machinery works, says nothing about Qwen"
    assert label in whole[1]
    for stage in STAGES:
        shown = text_of(whole[0] / "notebooks" / f"{stage}.ipynb")
        assert label in shown
        assert "The finding appears here" not in shown
    assert "not run" in text_of(whole[0] / "notebooks" / "04_ifeval_eval.ipynb")


def test_the_audit_is_complete(whole):
    folder = whole[0] / "02_template_audit"
    summary = load(folder / "summary.json")
    lines = (folder / "sft_template_audit.jsonl").read_text("utf-8").splitlines()
    assert summary["rows"] == summary["rows_ok"] == len(lines) == 605
    trained = load(whole[0] / "03_sft_train" / "summary.json")
    assert trained["rows_compared_with_audit"] == 605


def test_a_second_run_reuses_everything(whole):
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*") if path.is_file()}
    done = atlas("--overlay", "offline", "--out", whole[0])
    assert done.returncode == 0
    assert done.stdout.count("reused") == 2 * len(STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in whole[0].rglob("*") if p.is_file()}


# What a stage prints while it is in the middle of its work.
MIDDLE = ["config digest", "config digest", "rows: the trainer's labels", "generating (raw)"]


def test_a_run_killed_in_any_stage_goes_on_when_typed_again(tmp_path):
    command = [sys.executable, "-m", "tools.run", "--overlay", "offline", "--out", str(tmp_path)]
    for stage, middle in zip(STAGES, MIDDLE, strict=True):
        run = subprocess.Popen(
            command + TINY_ARGS,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started = False
        for line in run.stdout:
            started = started or line.startswith(f"── {stage}: not run yet")
            if started and middle in line:
                break
        else:
            pytest.fail(f"{stage} never came to {middle!r}")
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert not (tmp_path / stage / "manifest.json").exists()
    done = atlas("--overlay", "offline", "--out", tmp_path, *TINY_ARGS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished and unchanged, reused") == 3
    assert len(load(tmp_path / "metrics.json")) == 4


def test_the_last_notebook_alone_builds_what_is_missing(tmp_path):
    done = atlas("04_ifeval_eval", "--overlay", "offline", "--out", tmp_path, *TINY_ARGS)
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in tmp_path.glob("*/manifest.json")} == set(STAGES)


def test_papermill_runs_a_notebook_by_itself(tmp_path):
    parameters = {"OVERLAY": "offline", "OUT": str(tmp_path / "out"), "SET": json.dumps(TINY)}
    command = [
        sys.executable,
        "-m",
        "papermill",
        "notebooks/03_sft_train.ipynb",
        str(tmp_path / "page.ipynb"),
    ]
    for name, value in parameters.items():
        command += ["-p", name, value]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "03_sft_train" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_bfloat16_adapter_stops_the_page(tmp_path):
    """Without the cast, TRL's bfloat16 adapter would meet float16's gradient scaler on a T4."""
    cast = "model.keep_adapter_in_float32(trainer.model)\n"
    page = (ROOT / "notebooks" / "03_sft_train.ipynb").read_text("utf-8")
    planted = tmp_path / "planted.ipynb"
    planted.write_text(page.replace(json.dumps(cast)[1:-1], "", 1), "utf-8")
    assert planted.read_text("utf-8") != page
    parameters = {"OVERLAY": "offline", "OUT": str(tmp_path / "out"), "SET": json.dumps(TINY)}
    command = [sys.executable, "-m", "papermill", str(planted), str(tmp_path / "page.ipynb")]
    for name, value in parameters.items():
        command += ["-p", name, value]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "AssertionError: {'torch.bfloat16'}" in done.stderr
    assert not (tmp_path / "out" / "03_sft_train").exists()


def test_the_first_two_stages_need_neither_trl_nor_peft(tmp_path):
    code = (
        "import sys, pathlib; from atlas_lib import audit, config; from tiny import TINY;"
        "audit.prepare(config.load('sft_qwen05b', 'offline', TINY), pathlib.Path(sys.argv[1]));"
        "print(sorted({'trl', 'peft', 'bitsandbytes'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_a_failing_notebook_is_named_kept_and_not_reused(tmp_path):
    bad = ["--set", "eval.prompts=nowhere.jsonl"]
    done = atlas("--overlay", "offline", "--out", tmp_path, *TINY_ARGS, *bad)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: 04_ifeval_eval stopped: nowhere.jsonl does not exist")
    assert "notebooks/04_ifeval_eval.ipynb" in last
    assert (tmp_path / "notebooks" / "04_ifeval_eval.ipynb").is_file()
    assert not (tmp_path / "metrics.json").exists()


def test_the_full_recipe_without_a_gpu_is_refused_at_once(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("NOT TESTED: this machine has a GPU, so the refusal cannot happen")
    done = atlas("--out", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: No CUDA GPU here")
    assert "OVERLAY=offline" in done.stderr


def test_the_full_recipe_without_a_hub_names_the_offline_overlay(tmp_path):
    done = atlas("01_data_prep", "--out", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "cannot be reached" in last
    assert "OVERLAY=offline" in last
    assert not (tmp_path / "01_data_prep").exists()


def stopped_page(out: Path) -> tuple[str, str]:
    """(what the failed notebook 03 printed, its error) after an `atlas` run that failed in it."""
    outputs = [
        o
        for c in load(out / "notebooks" / "03_sft_train.ipynb")["cells"]
        for o in c.get("outputs", [])
    ]
    [error] = {o["evalue"] for o in outputs if o["output_type"] == "error"}
    return text_of(out / "notebooks" / "03_sft_train.ipynb"), error


def other_tokenizer(folder: Path, change) -> str:
    """A folder with the stand-in's tokenizer after `change`."""
    from atlas_lib.config import load_config
    from atlas_lib import models

    tokenizer = models.load_tokenizer(load_config("sft_qwen05b", "offline", TINY))
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return str(folder)


WRONG = {
    "template": (
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        "Not Qwen2.5's chat template",
    ),
    "tokenizer": (lambda tokenizer: tokenizer.add_tokens(["<new>"]), "ids would mean other tokens"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_03_stops_before_it_loads_weights_with_a_wrong(fault, tmp_path):
    change, sentence = WRONG[fault]
    name = other_tokenizer(tmp_path / "tokenizer", change)
    given = ["--set", f"model.tokenizer={name}"]
    done = atlas("03_sft_train", "--overlay", "offline", "--out", tmp_path, *TINY_ARGS, *given)
    assert done.returncode == 1
    assert sentence in done.stderr.splitlines()[-1]
    shown, error = stopped_page(tmp_path)
    assert sentence in error
    assert "in nf4" not in shown  # what the cell that loads the weights prints


def test_03_stops_before_it_loads_weights_with_a_stale_audit(tmp_path):
    first = ["01_data_prep", "02_template_audit"]
    done = atlas(*first, "--overlay", "offline", "--out", tmp_path, *TINY_ARGS)
    assert done.returncode == 0, done.stderr
    other = ["--set", "train.max_length=100"]
    done = atlas("03_sft_train", "--overlay", "offline", "--out", tmp_path, *TINY_ARGS, *other)
    assert done.returncode == 1
    assert "train.max_length is 512 there and 100 here" in done.stderr.splitlines()[-1]
    assert "in nf4" not in stopped_page(tmp_path)[0]
