"""tools/run.py: what it refuses before it starts, and when a finished stage is used again.

Whole pipelines run in test_pipeline.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import nbformat
import pytest

from atlas_lib import artifacts, data, notebooks
from atlas_lib.config import STAGES, load_config
from tools import run

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = "01_data_prep", "02_template_audit"

# --- arguments ------------------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "unknown stage": (["05_dpo"], "05_dpo"),
    "a stage's number": (["01"], "01_data_prep"),
    "unknown option": (["--lr", "1"], "--lr"),
    "shortened option": (["--overla", "offline", "05_dpo"], "--overla"),
    "unknown config": (["--config", "nope"], "Unknown config 'nope'"),
    "unknown overlay": (["--overlay", "nope"], "'nope'"),
    "an overlay as config": (["--config", "smoke"], "sft_qwen05b"),
    "set without value": (["--set", "train.max_steps"], "KEY=VALUE"),
    "set of unknown key": (["--set", "train.max_step=1"], "'train.max_steps'"),
    "set of wrong type": (["--set", "train.max_steps=ten"], "train.max_steps is 'ten'"),
    "set of no rows": (["--set", "data.n_samples=0"], "data.n_samples is 0"),
    "set of broken yaml": (["--set", "train.max_steps=[1"], "train.max_steps"),
}


def command_line(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_one_sentence_and_nothing_is_written(name, tmp_path):
    arguments, words = BAD_ARGUMENTS[name]
    out = tmp_path / "out"
    done = command_line(*arguments, "--out", str(out))
    assert done.returncode != 0
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    [sentence] = [line for line in done.stderr.splitlines() if "error: " in line]
    assert sentence == done.stderr.splitlines()[-1]  # argparse shows the usage above it
    assert words in sentence
    assert not out.exists()


def test_an_out_that_is_not_writable_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    done = command_line(FIRST, "--overlay", "offline", "--out", str(tmp_path / "file" / "out"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: OUT ")
    assert done.stderr.count("\n") == 1


def parsed(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    return run.parse()


def test_all_stages_run_unless_some_are_named_and_always_in_order(monkeypatch):
    assert parsed(monkeypatch).stages == list(STAGES)
    assert parsed(monkeypatch, SECOND, FIRST).stages == [FIRST, SECOND]
    assert parsed(monkeypatch, SECOND, SECOND).stages == [SECOND]


# --- reuse ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config():
    return load_config("sft_qwen05b")


def write_page(stage: str, out: Path, **papermill) -> Path:
    """The page as papermill leaves it: the source, the injected parameters and its own notes."""
    page = nbformat.read(notebooks.FOLDER / f"{stage}.ipynb", as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in page.cells]
    place = next(n for n, found in enumerate(tags) if "parameters" in found) + 1
    injected = nbformat.v4.new_code_cell("# Parameters\nCONFIG = 'sft_qwen05b'\n")
    injected.metadata["tags"] = ["injected-parameters"]
    page.cells.insert(place, injected)
    page.metadata["papermill"] = {"end_time": "2026-01-01T00:00:00", "exception": None} | papermill
    path = out / "notebooks" / f"{stage}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(page, path)
    return path


def finish(stage: str, config, out: Path, inputs=(), text="row") -> Path:
    """A stage with everything that a finished run leaves."""
    with artifacts.stage(stage, config, out, inputs) as folder:
        artifacts.write_jsonl(folder / "rows.jsonl", [{"text": text}])
    write_page(stage, out)
    return folder


def why(config, out, stage=FIRST) -> str | None:
    return run.why_not_reused(stage, config, out)


def test_a_finished_stage_is_reused(config, tmp_path):
    first = finish(FIRST, config, tmp_path)
    finish(SECOND, config, tmp_path, [first])
    assert why(config, tmp_path) is None
    assert why(config, tmp_path, SECOND) is None


def test_reuse_does_not_touch_anything(config, tmp_path, capsys):
    finish(FIRST, config, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert run.run_stage(FIRST, config, tmp_path, {}, force=False) == "reused"
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert "reused" in capsys.readouterr().out


def test_a_stage_that_is_absent_runs(config, tmp_path):
    assert "not run yet" in why(config, tmp_path)


def test_a_stage_that_another_one_built_has_no_page_and_runs(config, tmp_path):
    finish(FIRST, config, tmp_path)
    (tmp_path / "notebooks" / f"{FIRST}.ipynb").unlink()
    assert "not run yet" in why(config, tmp_path)


def test_a_stage_without_manifest_runs(config, tmp_path):
    (finish(FIRST, config, tmp_path) / artifacts.MANIFEST).unlink()
    assert "not run yet" in why(config, tmp_path)


@pytest.mark.parametrize("note", [{"exception": True}, {"end_time": None}], ids=["error", "killed"])
def test_a_page_that_did_not_run_to_its_end_runs_again(note, config, tmp_path):
    finish(FIRST, config, tmp_path)
    write_page(FIRST, tmp_path, **note)
    assert "not to its end" in why(config, tmp_path)


def test_a_page_that_papermill_never_ran_runs_again(config, tmp_path):
    finish(FIRST, config, tmp_path)
    page = tmp_path / "notebooks" / f"{FIRST}.ipynb"
    page.write_bytes((notebooks.FOLDER / f"{FIRST}.ipynb").read_bytes())
    assert why(config, tmp_path)


@pytest.mark.parametrize("size", [0, 400])
def test_a_page_that_was_cut_off_in_the_writing_runs_again(size, config, tmp_path):
    """A run killed in any place must not need a hand to go on."""
    finish(FIRST, config, tmp_path)
    os.truncate(tmp_path / "notebooks" / f"{FIRST}.ipynb", size)
    assert why(config, tmp_path)


def test_an_edited_page_runs_again(config, tmp_path):
    """The page is the experiment: a changed cell under the old results would be a lie."""
    finish(FIRST, config, tmp_path)
    path = tmp_path / "notebooks" / f"{FIRST}.ipynb"
    page = nbformat.read(path, as_version=4)
    [*_, last] = [cell for cell in page.cells if cell.cell_type == "code"]
    last.source += "\nprint('as it was before the edit')"
    nbformat.write(page, path)
    assert why(config, tmp_path)


def test_another_configuration_runs_again_and_says_which_key(config, tmp_path):
    finish(FIRST, config, tmp_path)
    reason = why(load_config("sft_qwen05b", "", {"data.n_samples": 7}), tmp_path)
    assert "data.n_samples is 5000 there and 7 here" in reason


def test_a_key_of_a_later_stage_does_not_matter(config, tmp_path):
    finish(FIRST, config, tmp_path)
    later = {"eval.limit": 3, "train.learning_rate": 1e-3}
    assert why(load_config("sft_qwen05b", "", later), tmp_path) is None


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{}\n", "utf-8")])
def test_a_damaged_output_runs_again(damage, config, tmp_path):
    damage(finish(FIRST, config, tmp_path) / "rows.jsonl")
    assert "rows.jsonl" in why(config, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null"])
def test_a_damaged_manifest_runs_again(text, config, tmp_path):
    (finish(FIRST, config, tmp_path) / artifacts.MANIFEST).write_text(text, "utf-8")
    assert why(config, tmp_path)


def test_another_upstream_runs_again(config, tmp_path):
    first = finish(FIRST, config, tmp_path)
    finish(SECOND, config, tmp_path, [first])
    finish(FIRST, config, tmp_path, text="another row")
    assert why(config, tmp_path) is None
    assert f"another {FIRST}" in why(config, tmp_path, SECOND)


def test_the_same_upstream_again_does_not_matter(config, tmp_path):
    first = finish(FIRST, config, tmp_path)
    finish(SECOND, config, tmp_path, [first])
    finish(FIRST, config, tmp_path)
    assert why(config, tmp_path, SECOND) is None


def test_an_upstream_that_is_gone_runs_again(config, tmp_path):
    first = finish(FIRST, config, tmp_path)
    finish(SECOND, config, tmp_path, [first])
    (first / artifacts.MANIFEST).unlink()
    assert why(config, tmp_path, SECOND)


def test_a_local_collection_that_was_edited_runs_again(tmp_path, monkeypatch):
    """Its path stays the same, its rows do not: the path alone does not decide the result."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source, out = tmp_path / "chats.jsonl", tmp_path / "out"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    source.write_text(f"{json.dumps({'messages': chat})}\n" * 3, "utf-8")
    overrides = {"data.dataset": str(source), "data.n_samples": 2, "data.n_validation": 1}
    config = load_config("sft_qwen05b", "", overrides)
    data.prepare(config, out)
    write_page(FIRST, out)
    assert why(config, out) is None
    source.write_text(source.read_text("utf-8").replace('"a"', '"b"'), "utf-8")
    assert why(config, out)


# --- the table ------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_model_and_format_and_its_label():
    row = {"model": "base", "format": "chat", "n": 541, "prompt_level_strict_acc": 0.125}
    row |= {"prompt_level_loose_acc": 0.25, "ci95": [0.1, 0.15], "stop_rate": 0.5, "distinct": 7}
    row |= {"label": "a stand-in"}
    heads, first, second, label = run.table([row, row | {"model": "SFT"}]).strip().splitlines()
    assert " ".join(first.split()) == "base chat 541 0.125 0.100 to 0.150 0.250 0.50 7"
    assert second.startswith("SFT ")
    assert len(heads) == len(first) == len(second)
    assert label == "a stand-in"
