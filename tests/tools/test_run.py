"""tools/run.py: which arguments it refuses, and when it reuses a finished stage.

Whole pipelines run in tests/runs/test_pipeline.py.
"""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from checks import ROOT, refusal, run_python

from atlas_lib import artifacts, session, stages
from atlas_lib.config import load_config
from tools import run

FIRST, SECOND = "01_data_prep", "02_template_audit"

BAD_ARGUMENTS = {
    "unknown stage": (["05_dpo"], "05_dpo"),
    "number of a stage": (["01"], "01_data_prep"),
    "unknown option": (["--lr", "1"], "--lr"),
    "shortened option": (["--overla", "offline", "05_dpo"], "--overla"),
    "unknown overlay": (["--overlay", "nope"], "'nope'"),
    "set without value": (["--set", "train.max_steps"], "KEY=VALUE"),
    "set of unknown key": (["--set", "data.n_sample=1"], "'data.n_samples'"),
    "seed twice": (["--seeds", "1,2,01"], "seed 1 twice"),
    "seed that is no number": (["--seeds", "1,one"], "'one' is not a seed"),
    "negative seed": (["--seeds", "1,-2"], "'-2' is not a seed"),
    "seed that is too large": (["--seeds", "1,4294967296"], "less than 4294967296"),
    "seeds and a seed": (["--seeds", "1,2", "--set", "seed=3"], "both choose the seed"),
    "seeds and the trainer's": (["--seeds=1,2", "--set=train.seed=3"], "--set train.seed"),
    "seeds and an adapter": (["--seeds", "1,2", "--set", "model.adapter=x"], "model.adapter"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_one_sentence_and_nothing_is_written(name, tmp_path):
    arguments, words = BAD_ARGUMENTS[name]
    done = run_python("-m", "tools.run", *arguments, "--out", tmp_path / "out")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    [sentence] = [line for line in done.stderr.splitlines() if "error: " in line]
    assert sentence == done.stderr.splitlines()[-1]  # argparse prints the usage above it
    assert words in sentence
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_not_writable_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    done = run_python("-m", "tools.run", FIRST, "--overlay", "offline", "--out", out)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: OUT ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("named", "stages"),
    [([], list(stages.STAGES)), ([SECOND, FIRST], [FIRST, SECOND]), ([SECOND, SECOND], [SECOND])],
)
def test_all_stages_run_unless_some_are_named_and_always_in_order(named, stages, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", *named])
    assert run.parse_arguments().stages == stages


@pytest.fixture(scope="module")
def config():
    return load_config("sft_qwen05b")


def executed(stage: str, out: Path) -> Path:
    return out / "notebooks" / f"{stage}.ipynb"


def write_executed(stage: str, out: Path, **papermill) -> None:
    """The notebook as papermill leaves it: with injected parameters and its own metadata."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    injected = nbformat.v4.new_code_cell("# Parameters\nCONFIG = 'sft_qwen05b'\n")
    injected.metadata["tags"] = ["injected-parameters"]
    notebook.cells.insert(next(n for n, t in enumerate(tags, 1) if "parameters" in t), injected)
    times = {"end_time": "2026-01-01T00:00:00", "exception": None}
    notebook.metadata["papermill"] = times | papermill
    executed(stage, out).parent.mkdir(exist_ok=True)
    nbformat.write(notebook, executed(stage, out))


def finish(stage: str, config, out: Path, inputs=(), text="row") -> Path:
    """A stage with all that a finished run leaves."""
    with artifacts.stage(stage, config, out, inputs) as folder:
        artifacts.write_jsonl(folder / "rows.jsonl", [{"text": text}])
    write_executed(stage, out)
    return folder


@pytest.fixture
def out(config, tmp_path) -> Path:
    """OUT with two finished stages."""
    finish(SECOND, config, tmp_path, [finish(FIRST, config, tmp_path)])
    return tmp_path


def test_reuse_changes_no_file(config, out, capsys):
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for stage in (FIRST, SECOND):
        run.run_stage(stage, config, out, {}, force=False)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert capsys.readouterr().out.count("reused") == 2


def edit_last_cell(out: Path) -> None:
    notebook = nbformat.read(executed(FIRST, out), as_version=4)
    [*_, last] = [cell for cell in notebook.cells if cell.cell_type == "code"]
    last.source += "\nprint('as it was before the edit')"
    nbformat.write(notebook, executed(FIRST, out))


# What happened to stage 01 -> what the reason says.
FAULTS = {
    "built by another stage": (lambda out: executed(FIRST, out).unlink(), "not run yet"),
    "no manifest": (lambda out: (out / FIRST / artifacts.MANIFEST).unlink(), "not run yet"),
    "failed": (lambda out: write_executed(FIRST, out, exception=True), "not to its end"),
    "killed": (lambda out: write_executed(FIRST, out, end_time=None), "not to its end"),
    "cut-off notebook": (lambda out: os.truncate(executed(FIRST, out), 400), "not to its end"),
    "other code": (edit_last_cell, "not to its end"),
    "output edited": (lambda out: (out / FIRST / "rows.jsonl").write_text("{}\n"), "rows.jsonl"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stage_that_is_not_finished_and_intact_runs_again(fault, config, out):
    plant, words = FAULTS[fault]
    plant(out)
    assert words in run.why_not_reused(FIRST, config, out)


def test_another_configuration_runs_the_stage_again(out):
    changed = load_config("sft_qwen05b", "", {"data.n_samples": 7})
    assert "data.n_samples is 5000 there and 7 here" in run.why_not_reused(FIRST, changed, out)
    later = {"eval.limit": 3, "train.learning_rate": 1e-3}
    assert run.why_not_reused(FIRST, load_config("sft_qwen05b", "", later), out) is None


def test_another_result_of_the_stage_before_runs_a_stage_again(config, out):
    finish(FIRST, config, out)
    assert run.why_not_reused(SECOND, config, out) is None
    finish(FIRST, config, out, text="another row")
    assert run.why_not_reused(FIRST, config, out) is None
    assert f"another {FIRST}" in run.why_not_reused(SECOND, config, out)
    (out / FIRST / artifacts.MANIFEST).unlink()
    assert "out of date" in run.why_not_reused(SECOND, config, out)


def test_the_table_has_a_line_for_each_model_and_format_and_its_label():
    row = {"model": "base", "format": "chat", "n": 541, "prompt_level_strict_acc": 0.125}
    row |= {"prompt_level_loose_acc": 0.25, "ci95": [0.1, 0.15], "eos_rate": 0.5, "distinct": 7}
    row |= {"label": "a tiny model"}
    table = run.metrics_table([row, row | {"model": "SFT"}])
    heads, first, second, label = table.strip().splitlines()
    assert " ".join(first.split()) == "base chat 541 0.125 0.100 to 0.150 0.250 0.50 7"
    assert second.startswith("SFT ")
    assert len(heads) == len(first) == len(second)
    assert label == "a tiny model"


def test_the_primary_verdict_follows_the_table(tmp_path):
    """Also of a result that an earlier version has written, with a verdict that is not used now."""
    row = {"comparison": "SFT chat against base chat", "verdict": "better, but small"}
    row |= {"both": 9, "only_a": 2, "only_b": 12, "neither": 77, "p_adjusted": 0.013}
    row |= {"difference_points": 10.0, "difference_ci95": [3.0, 17.0]}
    path = tmp_path / stages.IFEVAL_EVAL / "ifeval.json"
    artifacts.write_json(path, {"comparisons": [row, row | {"comparison": "raw"}]})
    assert run.after_the_table(tmp_path) == (
        "SFT chat against base chat: better, but small. +10.00 points (+3.00 to +17.00) of "
        "prompt-level strict accuracy on 100 prompts, 12 won, 2 lost, p = 0.013. The test is about "
        "this one adapter; another seed gives another."
    )


def stderr_line(done: subprocess.CompletedProcess) -> str:
    """The one line that a refused run prints."""
    assert done.returncode == 1, done.stdout
    [sentence] = done.stderr.splitlines()
    return sentence


def test_a_second_run_in_the_same_out_says_who_holds_it(out):
    done = run_python("-m", "tools.run", FIRST, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"results in {out}: notebooks, {SECOND}"
    with session.hold(out / session.LOCK, "OUT"):
        sentence = stderr_line(run_python("-m", "tools.run", FIRST, "--out", out))
    assert sentence.startswith(f"error: OUT {out} is in use by process ")
    assert f" on {platform.node()} since " in sentence


# A run that stays in its first stage.
STAY = """
import sys, time
from tools import run
run.run_stage = lambda *_: print("running", flush=True) or time.sleep(600)
run.main()
"""


def enter(out: Path) -> None:
    with session.hold(out / session.LOCK, "OUT"):
        pass


def test_a_run_holds_its_out_until_it_is_killed(tmp_path):
    command = [sys.executable, "-c", STAY, FIRST, "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "running\n"
        sentence = refusal(enter, tmp_path)
        assert f"in use by process {holder.pid} on " in sentence
        holder.send_signal(signal.SIGKILL)
    enter(tmp_path)


def test_a_reader_that_has_ended_stops_the_run_with_a_sentence(out):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tools.run", FIRST, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "reader of the output has ended" in stderr_line(done)


def test_a_missing_package_names_the_command_that_installs_it():
    code = "import runpy, sys; sys.modules['yaml'] = None; runpy.run_module('tools.run')"
    sentence = stderr_line(run_python("-c", code))
    assert "yaml" in sentence
    assert "`rm -rf .venv && make setup`" in sentence


MEASURED = {"metrics": [{"model": "base", "n": 1}], "origin": {"digest": "0123"}}
METRICS_FAULTS = {
    "deleted": lambda path: path.unlink(),
    "torn": lambda path: os.truncate(path, 9),
    "edited": lambda path: path.write_text(path.read_text("utf-8").replace("base", "best")),
    "as written": lambda path: None,
}


@pytest.mark.parametrize("fault", METRICS_FAULTS)
def test_metrics_are_those_that_stage_04_measured(fault, config, tmp_path):
    assert run.current_metrics(config, tmp_path) == []
    with artifacts.stage(stages.IFEVAL_EVAL, config, tmp_path) as folder:
        artifacts.write_json(folder / "ifeval.json", MEASURED)
    write_executed(stages.IFEVAL_EVAL, tmp_path)
    path = tmp_path / "metrics.json"
    rows = [{"model": "base", "n": 1, "digest": "0123"}]
    artifacts.write_json(path, rows)
    METRICS_FAULTS[fault](path)
    assert run.current_metrics(config, tmp_path) == rows
    assert json.loads(path.read_bytes()) == rows


def test_metrics_of_another_configuration_are_not_shown(config, tmp_path):
    with artifacts.stage(stages.IFEVAL_EVAL, config, tmp_path) as folder:
        artifacts.write_json(folder / "ifeval.json", MEASURED)
    write_executed(stages.IFEVAL_EVAL, tmp_path)
    assert run.current_metrics(load_config("sft_qwen05b", "", {"seed": 7}), tmp_path) == []


def test_a_full_disk_is_named_with_the_next_step(tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")
    for error, least in ((full, run.FULL), (RuntimeError("unexpected pos 64 vs 0"), 2**62)):
        monkeypatch.setattr(run, "FULL", least)
        sentence = run.sentence_of(error, tmp_path)
        assert sentence.startswith(f"{error}. The disk of /")
        assert "free some space, then the same command continues" in sentence
    monkeypatch.setattr(run, "FULL", 0)
    assert run.sentence_of(RuntimeError("another cause."), tmp_path) == "another cause."
