"""What `make publish` accepts, and what it refuses in one sentence, with the fault planted."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from checks import ROOT, run_python
from tiny import TINY

from atlas_lib.notebooks import STAMP
from tools import leaks, publish
from tools.kaggle import bundle

PAGE = "notebooks/03_sft_train.ipynb"


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *identity, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository with this working tree committed, so that what runs in it is clean."""
    folder = tmp_path_factory.mktemp("publish") / "checkout"
    folder.mkdir()
    for name in ("atlas_lib", "configs", "notebooks", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "kernel-metadata.json", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")
    return folder


def publish_from(checkout: Path, run: Path, results: Path, *args: str):
    return run_python("-m", "tools.publish", run, "--results", results, *args, cwd=checkout)


@pytest.fixture(scope="module")
def finished(checkout):
    """A tiny run of all four notebooks, at a clean commit."""
    given = [a for key, value in TINY.items() for a in ("--set", f"{key}={json.dumps(value)}")]
    given += ["--overlay", "offline", "--out", "runs/tiny"]
    done = run_python("-m", "tools.run", *given, cwd=checkout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return checkout / "runs" / "tiny"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run to plant faults in."""
    return shutil.copytree(finished, tmp_path / "run")


def edit(path: Path, change) -> None:
    """Apply `change` to an executed notebook."""
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


@pytest.mark.slow
def test_a_clean_run_is_published(checkout, finished, tmp_path):
    results = tmp_path / "results"
    done = publish_from(checkout, finished, results)
    assert done.returncode == 0, done.stderr
    names = {p.relative_to(results).as_posix() for p in results.rglob("*") if p.is_file()}
    assert names == {
        "metrics.json", "run.json", "config.yaml", "report.md",
        "sft_template_audit.jsonl", "sft_template_audit_summary.json",
        *(f"notebooks/{stage}.ipynb" for stage in publish.STAGES),
    }  # fmt: skip
    record = json.loads((results / "run.json").read_text("utf-8"))
    assert record["commit"] == git(checkout, "rev-parse", "--short=12", "HEAD")
    assert len((results / "sft_template_audit.jsonl").read_text("utf-8").splitlines()) == 50
    for name in names:  # nothing of this machine
        assert str(checkout) not in (results / name).read_text("utf-8"), name
    # published again: the same rows are not repeated, older ones stay
    older = [{"model": "older"}]
    rows = json.loads((results / "metrics.json").read_text("utf-8"))
    (results / "metrics.json").write_text(json.dumps(older + rows))
    again = publish_from(checkout, finished, results, "--metrics-only")
    assert again.returncode == 0, again.stderr
    assert json.loads((results / "metrics.json").read_text("utf-8")) == older + rows
    assert list(tmp_path.iterdir()) == [results]


@pytest.fixture
def from_kaggle(checkout, run, monkeypatch):
    """The executed 03 as a kernel would have kept it: built by tools.kernels, cut at its end."""
    for module in (bundle, publish):
        monkeypatch.setattr(module, "ROOT", checkout)
    ran = nbformat.read(run / PAGE, as_version=4)
    choice = {"config": "sft_qwen05b", "overlay": "offline", "set": TINY}
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    page = bundle.kernel_notebook("03_sft_train", choice, commit)
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    shown = [cell.outputs for cell in ran.cells if cell.cell_type == "code"]
    del shown[1]  # of the cell that papermill injected: its values are in the built page itself
    shown.insert(1, [])  # of the payload
    for number, (cell, outputs) in enumerate(zip(code, shown, strict=True), 1):
        cell.execution_count, cell.outputs = number, outputs
        for output in (each for each in outputs if STAMP in each.get("metadata", {})):
            output.metadata[STAMP]["platform"] = "kaggle"
    code[-1].execution_count = None
    nbformat.write(page, run / PAGE)
    return run / PAGE


@pytest.mark.slow
def test_a_notebook_that_ran_on_kaggle_is_published_without_its_payload(from_kaggle):
    notebook = publish.check_notebook("03_sft_train", from_kaggle)
    assert publish.stamp_of(notebook)["parameters"]["OVERLAY"] == "offline"
    text = publish.text_of(notebook, from_kaggle.parents[1])
    nbformat.validate(nbformat.reads(text, as_version=4))
    assert "PACKED" in from_kaggle.read_text("utf-8")
    assert "PACKED" not in text
    edit(from_kaggle, lambda notebook: notebook.cells[0].update(source="# Another title"))
    with pytest.raises(ValueError, match="is not the committed"):
        publish.check_notebook("03_sft_train", from_kaggle)


def in_notebook(change):
    """A fault in the executed notebook 03 of a run."""
    return lambda run: edit(run / PAGE, change)


def in_last_cell(**changes):
    """A fault in the last code cell."""
    return in_notebook(
        lambda notebook: [c for c in notebook.cells if c.cell_type == "code"][-1].update(changes)
    )


def in_outputs(kind: str, **content):
    """A fault in the outputs of the last code cell."""
    return in_last_cell(outputs=[nbformat.v4.new_output(kind, **content)])


def in_stamp(**changes):
    """A fault in what the notebook records of its run."""
    return in_notebook(lambda notebook: publish.stamp_of(notebook).update(changes))


def remove_alternative_text(notebook) -> None:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    next(o for o in outputs if "image/png" in o.get("data", {})).metadata.clear()


NOT_COMMITTED = "is not the committed notebooks/03_sft_train.ipynb"
WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}
FAULTS = {
    "other code": (in_last_cell(source="print()"), NOT_COMMITTED),
    "other prose": (in_notebook(lambda n: n.cells[0].update(source="# Other")), NOT_COMMITTED),
    "another order": (in_last_cell(execution_count=1), "did not run once each, in order"),
    "a cell not run": (in_last_cell(execution_count=None), "did not run once each, in order"),
    "an error": (in_outputs("error", ename="E", evalue="e"), "has a cell that ended in an error"),
    "a widget": (in_outputs("display_data", data=WIDGET), "has a widget"),
    "no alternative text": (
        in_notebook(remove_alternative_text), "has a figure without alternative text",
    ),
    "four megabytes": (in_outputs("stream", text="x" * 4_000_000), "at most 3,000,000 go in"),
    "a secret": (
        in_outputs("stream", text="hf_" + "AbCdEfGhIj" * 4), "what looks like a key or token",
    ),
    "a dirty commit": (in_stamp(commit="0123456789ab-dirty"), "-dirty; commit everything"),
    "an unknown commit": (in_stamp(commit="0123456789ab"), "ran at commit 0123456789ab"),
    "no commit": (
        in_notebook(lambda n: publish.stamp_of(n).clear()), "does not record its commit",
    ),
    "another digest": (in_stamp(digest="0123456789ab"), "was not written by its notebook"),
    "no notebook": (lambda run: (run / PAGE).unlink(), "lacks notebooks/03_sft_train.ipynb"),
    "half a notebook": (lambda run: os.truncate(run / PAGE, 1000), "is not a notebook"),
    "another audit": (
        lambda run: (run / "02_template_audit" / "summary.json").write_text("{}"),
        "is not the file that 02_template_audit wrote",
    ),
}  # fmt: skip


def refused(checkout: Path, run: Path, results: Path, sentence: str) -> None:
    done = publish_from(checkout, run, results)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not results.exists()  # nothing half-written


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_with_a_planted_fault_is_refused(fault, checkout, run, tmp_path):
    plant, sentence = FAULTS[fault]
    plant(run)
    refused(checkout, run, tmp_path / "results", sentence)


@pytest.mark.slow
def test_a_changed_configuration_is_refused(checkout, run, tmp_path):
    other = shutil.copytree(checkout, tmp_path / "checkout")
    path = other / "configs" / "offline.yaml"
    path.write_text(
        path.read_text("utf-8").replace("learning_rate: 5.0e-3", "learning_rate: 4.0e-3")
    )
    git(other, "commit", "-qam", "change")
    refused(
        other,
        run,
        tmp_path / "results",
        "does not fit this run: train.learning_rate is 0.005 there and 0.004 here",
    )


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    lacking = "lacks notebooks/01_data_prep.ipynb; run it first"
    refused(ROOT, tmp_path, tmp_path / "results", lacking)


def test_a_checkout_of_another_user_is_refused_with_gits_command(tmp_path):
    foreign = {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}
    done = run_python("-m", "tools.publish", tmp_path, "--results", tmp_path / "r", **foreign)
    assert done.returncode == 1
    [sentence] = done.stderr.splitlines()
    assert "dubious ownership" in sentence
    assert "git config --global --add safe.directory" in sentence


def test_the_published_pages_are_those_of_their_commit():
    pages = sorted((ROOT / "results" / "notebooks").glob("*.ipynb"))
    assert [page.stem for page in pages[:4]] == list(publish.STAGES)
    commit = json.loads((ROOT / "results" / "run.json").read_text("utf-8"))["commit"]
    if not publish.is_known(commit):
        pytest.skip(f"NOT TESTED: this clone's history does not reach back to {commit}")
    for path in pages:
        publish.check_notebook(path.stem, path, at=None)
        leaks.refuse(path.name, path.read_text("utf-8"))


LOOKS_LIKE_A_SECRET = {
    "wandb": "WANDB_API_KEY=" + "0123456789abcdef0123456789abcdef01234567",
    "wandb's command": "wandb login " + "0123456789abcdef0123456789abcdef01234567",
    "kaggle, inside a page": '{\\"key\\": \\"' + "0123456789abcdef" * 2 + '\\"}',
    "github": "ghp_" + "a1B2" * 9,
    "kaggle": '{"username": "me", "key": "' + "0123456789abcdef" * 2 + '"}',
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
}


@pytest.mark.parametrize("text", LOOKS_LIKE_A_SECRET.values(), ids=LOOKS_LIKE_A_SECRET)
def test_what_looks_like_a_secret_is_refused(text):
    with pytest.raises(ValueError, match="what looks like a key or token"):
        leaks.refuse("the page", f"before {text} after")


def test_the_environments_own_secret_is_refused(monkeypatch):
    monkeypatch.setitem(os.environ, "HF_TOKEN", "a-plain-word")
    with pytest.raises(ValueError, match="the page holds HF_TOKEN"):
        leaks.refuse("the page", "it says a-plain-word")


def test_hashes_are_no_secrets():
    leaks.refuse("x", "7ae557604adf67be50417f59c2c2f167def9a775 " + "0123456789abcdef" * 4)
