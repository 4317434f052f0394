"""Whole runs: the offline default, killed runs, each notebook alone, and runs that are refused."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from checks import ROOT, run_python
from tiny import TINY

from atlas_lib import models, session
from atlas_lib.config import load_config

STAGES = ["01_data_prep", "02_template_audit", "03_sft_train", "04_ifeval_eval"]
LABEL = load_config("sft_qwen05b", "offline").label
TINY_ARGS = [argument for key, value in TINY.items() for argument in ("--set", f"{key}={value}")]
WEIGHTS_LOADED = "in nf4"  # printed by the cell of 03 that loads the weights

pytestmark = pytest.mark.slow


def run_stages(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return run_python("-m", "tools.run", "--out", out, *arguments, **environment)


def run_tiny(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run_stages(out, "--overlay", "offline", *TINY_ARGS, *arguments)


def run_papermill(notebook: Path, out: Path) -> subprocess.CompletedProcess:
    parameters = {"OVERLAY": "offline", "OUT": str(out), "SET": json.dumps(TINY)}
    given = [part for name, value in parameters.items() for part in ("-p", name, value)]
    return run_python("-m", "papermill", notebook, out.with_suffix(".ipynb"), *given)


def read(path: Path):
    return json.loads(path.read_text("utf-8"))


def outputs_of(stage: str, out: Path) -> list[dict]:
    cells = read(out / "notebooks" / f"{stage}.ipynb")["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def shown_by(stage: str, out: Path) -> str:
    """Everything that an executed notebook shows, without errors."""
    outputs = outputs_of(stage, out)
    parts = [output.get("text", "") for output in outputs]
    parts += [part for output in outputs for part in output.get("data", {}).values()]
    return "\n".join("".join(part) for part in parts)


def last_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1, done.stdout[-3000:]
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """OUT and the printed text of the offline default, with nothing made smaller."""
    out = tmp_path_factory.mktemp("offline")
    done = run_stages(out, "--overlay", "offline")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done.stdout


def test_training_teaches_the_instructions_and_the_end_of_turn(whole):
    taught = read(whole[0] / "04_ifeval_eval" / "ifeval.json")["taught_types"]
    rows = {(row["model"], row["format"]): row for row in taught}
    base, sft = rows["base", "chat"], rows["SFT", "chat"]
    assert base["prompt_level_strict_acc"] <= 0.3
    assert sft["prompt_level_strict_acc"] - base["prompt_level_strict_acc"] >= 0.5
    assert base["eos_rate"] <= 0.05
    assert sft["eos_rate"] >= 0.95


def test_the_fall_on_what_was_not_taught_is_reported(whole):
    found = read(whole[0] / "04_ifeval_eval" / "ifeval.json")
    parts = {row["part"]: row for row in found["parts"]}
    assert parts["all types taught"]["net"] > 0 > parts["other types"]["net"]
    assert sum(row["net"] for row in parts.values()) == found["comparisons"][0]["net"]
    assert "SFT chat against base chat: clear margin." in whole[1]


def test_metrics_hold_every_model_and_format_and_their_run(whole):
    metrics = read(whole[0] / "metrics.json")
    assert "| SFT | chat | 121 |" in (whole[0] / "report.md").read_text("utf-8")
    grid = {(row["model"], row["format"]) for row in metrics}
    assert grid == {(name, form) for name in ("base", "SFT") for form in ("raw", "chat")}
    for row in metrics:
        assert all(row[key] for key in ("commit", "data", "hardware", "label", "ci95", "counts"))
        assert re.fullmatch(r"[0-9a-f]{12}", row["digest"])
        assert len(row["by_type"]) == 25


def test_ifbench_stands_beside_ifeval_in_files_of_its_own(whole):
    out, printed = whole
    found = read(out / "04_ifeval_eval" / "ifeval.json")["benchmarks"]["ifbench"]
    assert 39 <= found["n"] <= 40 and 0.2 < found["trivial"] < 0.5
    assert {row["role"] for row in found["comparisons"]} == {"other"}
    for folder in ("responses", "scores"):
        names = {path.stem for path in (out / "04_ifeval_eval" / folder).iterdir()}
        rows = {f"{name}-{form}" for name in ("base", "SFT") for form in ("raw", "chat")}
        assert names == rows | {f"ifbench-{row}" for row in rows}
    assert "IFBench; the response 'x' passes" in printed


def test_every_notebook_shows_its_label_and_its_finding(whole):
    out, printed = whole
    assert LABEL in printed
    for stage in STAGES:
        shown = shown_by(stage, out)
        assert LABEL in shown
        assert "appears here at the end" not in shown
    assert "not run" in shown_by("04_ifeval_eval", out)


def test_every_row_is_audited_and_compared_with_the_trainer(whole):
    folder = whole[0] / "02_template_audit"
    summary = read(folder / "summary.json")
    lines = (folder / "sft_template_audit.jsonl").read_text("utf-8").splitlines()
    assert summary["rows"] == summary["rows_ok"] == len(lines) == 605
    shown = shown_by("02_template_audit", whole[0])  # an example with several assistant turns
    assert len(re.findall(r"<b [^>]*>[^<]*&lt;\|im_end\|&gt;</b>", shown)) >= 2
    trained = read(whole[0] / "03_sft_train" / "summary.json")
    assert trained["rows_compared_with_audit"] == 605


def times_of_files(out: Path) -> dict[Path, int]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name != session.LOCK]
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_second_run_reuses_all_stages(whole):
    before = times_of_files(whole[0])
    done = run_stages(whole[0], "--overlay", "offline")
    assert done.returncode == 0
    assert done.stdout.count("finished and unchanged, reused") == len(STAGES)
    assert before == times_of_files(whole[0])


# What a stage prints while it works.
MIDDLE = ["digest", "digest", "the labels in the batches", "generating (raw)"]


def test_a_run_killed_in_any_stage_continues_when_repeated(tmp_path):
    command = [sys.executable, "-m", "tools.run", "--out", str(tmp_path)]
    command += ["--overlay", "offline", *TINY_ARGS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for stage, middle in zip(STAGES, MIDDLE, strict=True):
        process, started = subprocess.Popen(command, cwd=ROOT, **pipes), False
        for line in process.stdout:
            started = started or line.startswith(f"── {stage}: not run yet")
            if started and middle in line:
                break
        else:
            pytest.fail(f"{stage} never printed {middle!r}")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / stage / "manifest.json").exists()
    done = run_tiny(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished and unchanged, reused") == 3
    assert len(read(tmp_path / "metrics.json")) == 4


def start_tiny(out: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tools.run", "--out", str(out), "--overlay", "offline"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *TINY_ARGS, *arguments], cwd=ROOT, **pipes)


@pytest.mark.parametrize(
    ("seconds", "stages"),
    [(0, STAGES[:2]), pytest.param(14, STAGES, marks=pytest.mark.long)],
    ids=["at once", "later"],
)
def test_of_two_runs_in_one_out_one_ends_and_the_other_names_it(seconds, stages, tmp_path):
    runs = []
    for _ in range(2):
        time.sleep(seconds * len(runs))
        runs.append(start_tiny(tmp_path, *stages))
    texts = [run.communicate() for run in runs]
    finished, refused = sorted(range(2), key=lambda n: runs[n].returncode)
    assert [runs[finished].returncode, runs[refused].returncode] == [0, 1], texts
    [sentence] = texts[refused][1].splitlines()
    assert f"is in use by process {runs[finished].pid} on " in sentence
    assert sorted(path.parent.name for path in tmp_path.glob("*/manifest.json")) == stages


def test_ctrl_c_ends_the_run_and_its_notebook_with_a_sentence(tmp_path):
    run = start_tiny(tmp_path, *STAGES[:3])
    for line in run.stdout:
        if "the labels in the batches" in line:
            break
    children = psutil.Process(run.pid).children(recursive=True)
    assert children
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    sentence = "error: interrupted; the same command continues at the unfinished stage."
    assert errors.splitlines()[-1] == sentence
    assert "Traceback" not in errors
    assert psutil.wait_procs(children, timeout=5)[1] == []
    done = run_tiny(tmp_path, *STAGES[:3])
    assert done.returncode == 0, done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".part"]


def test_the_last_notebook_alone_builds_what_is_missing(tmp_path):
    done = run_tiny(tmp_path, "04_ifeval_eval")
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in tmp_path.glob("*/manifest.json")} == set(STAGES)


def test_papermill_runs_a_notebook_by_itself(tmp_path):
    done = run_papermill(ROOT / "notebooks" / "03_sft_train.ipynb", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    adapter = tmp_path / "out" / "03_sft_train" / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file()


def test_a_bfloat16_adapter_stops_the_notebook(tmp_path):
    """Without the cast, TRL's bfloat16 adapter would meet float16's gradient scaler on a T4."""
    text = (ROOT / "notebooks" / "03_sft_train.ipynb").read_text("utf-8")
    text, removed = re.subn(r"\w+\.keep_adapter_in_float32\(trainer\.model\)(\\n)?", "", text)
    assert removed == 1
    (tmp_path / "planted.ipynb").write_text(text, "utf-8")
    done = run_papermill(tmp_path / "planted.ipynb", tmp_path / "out")
    assert done.returncode != 0
    assert "AssertionError: {'torch.bfloat16'}" in done.stderr
    assert not (tmp_path / "out" / "03_sft_train").exists()


def test_a_failing_notebook_is_named_kept_and_not_reused(tmp_path):
    for _ in range(2):
        error = last_line(run_tiny(tmp_path, "--set", "data.dataset=nowhere.jsonl"))
        assert error.startswith("error: 01_data_prep stopped: nowhere.jsonl does not exist")
        assert "notebooks/01_data_prep.ipynb" in error
    assert (tmp_path / "notebooks" / "01_data_prep.ipynb").is_file()
    assert not (tmp_path / "01_data_prep").exists()


def test_the_full_recipe_without_a_gpu_is_refused_at_once(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("NOT TESTED: this machine has a GPU, so the refusal cannot happen")
    done = run_stages(tmp_path)
    assert done.stdout == ""
    assert last_line(done).startswith("error: No CUDA GPU here")
    assert "OVERLAY=offline" in done.stderr


def test_the_full_recipe_without_a_hub_names_the_offline_overlay(tmp_path):
    error = last_line(run_stages(tmp_path, "01_data_prep", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "cannot be reached" in error
    assert "OVERLAY=offline" in error
    assert not (tmp_path / "01_data_prep").exists()


WRONG = {
    "template": (
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        "The chat template does not render the content of responses",
    ),
    "tokenizer": (lambda tokenizer: tokenizer.add_tokens(["<new>"]), "ids would mean other tokens"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_03_loads_no_weights_with_a_wrong(fault, tmp_path):
    change, sentence = WRONG[fault]
    tokenizer = models.load_tokenizer(load_config("sft_qwen05b", "offline", TINY))
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = ["--set", f"model.tokenizer={tmp_path / 'tokenizer'}"]
    assert sentence in last_line(run_tiny(tmp_path, "03_sft_train", *given))
    [error] = {o["evalue"] for o in outputs_of("03_sft_train", tmp_path) if "evalue" in o}
    assert sentence in error
    assert WEIGHTS_LOADED not in shown_by("03_sft_train", tmp_path)


def test_03_loads_no_weights_with_a_stale_audit(tmp_path):
    done = run_tiny(tmp_path, "01_data_prep", "02_template_audit")
    assert done.returncode == 0, done.stderr
    error = last_line(run_tiny(tmp_path, "03_sft_train", "--set", "train.max_length=100"))
    assert "train.max_length is 512 there and 100 here" in error
    assert WEIGHTS_LOADED not in shown_by("03_sft_train", tmp_path)
