"""The built kernels on a machine like Kaggle's or Colab's: chained, alone, in one kernel, broken.

The bootstraps of this file really install what the image lacks, from the package index.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import twin
from tiny import TINY

from atlas_lib import bootstrap
from atlas_lib.stages import STAGES
from tools.kaggle import bundle

FIRST, SECOND, THIRD, FOURTH = STAGES
ABSENT = ["BackendError", "CredentialError", "ConnectionError", "ImportError"]
CANARY = "canary-2f9c1d"
LABEL = "offline overlay with a tiny model: shows that the code works, says nothing about Qwen"
BADGE = {"OVERLAY": "offline", "SET": json.dumps(TINY)}

pytestmark = [pytest.mark.slow, pytest.mark.network]


def load(path: Path):
    return json.loads(path.read_text("utf-8"))


def shown(folder: Path, stage: str) -> str:
    return twin.page_text(folder / "working" / "notebooks" / f"{stage}.ipynb")


def passed(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stderr[-4000:]


def refused(done: subprocess.CompletedProcess, folder: Path) -> str:
    """The last line of the error that stopped a notebook."""
    assert done.returncode != 0
    return twin.page_text(folder / "working" / "__notebook__.ipynb").splitlines()[-1]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, Path]:
    """The notebooks of the four built kernels, tiny; W&B is asked for, and nobody has a key."""
    folder = tmp_path_factory.mktemp("build")
    twin.build(folder, **TINY, **{"train.report_to": "wandb"})
    return {stage: folder / stage / bundle.NOTEBOOK for stage in STAGES}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where all sessions of this file keep their folders; one HOME, so one tiny model is built."""
    return tmp_path_factory.mktemp("sessions")


# --- Kaggle, chained ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(kernels, home) -> dict[str, Path]:
    """Stage -> its session's folder: each with an output of its own, the earlier ones attached."""
    python = twin.kaggle_session(home / "venv")
    folders = {stage: home / stage for stage in STAGES}
    for (stage, folder), absent in zip(folders.items(), ABSENT, strict=True):
        env = twin.kaggle(folder, TWIN_SECRETS=absent)
        for need in STAGES[stage].needs:
            twin.attach(folder, need, folders[need] / "working")
        passed(twin.batch(python, kernels[stage], folder / "working", env))
    return folders


def test_each_kernel_reads_what_is_attached_and_keeps_its_notebook(chain):
    for stage, folder in chain.items():
        text = shown(folder, stage)
        for need in STAGES[stage].needs:
            assert f"{need}: using {folder / 'input'}" in text
        assert "building it" not in text
        assert LABEL in text
        assert "The result appears here" not in text
    told = "W&B: off (WANDB_API_KEY cannot be read: ConnectionError: HTTP 403)"
    assert told in shown(chain[THIRD], THIRD)


def test_the_output_holds_the_stage_and_its_notebook_and_nothing_else(chain):
    for stage, folder in chain.items():
        expected = {stage, "notebooks", "__notebook__.ipynb"}
        expected |= {"responses", "metrics.json", "report.md"} if stage == FOURTH else set()
        assert {path.name for path in (folder / "working").iterdir()} == expected
        weights = {path.parent.name for path in (folder / "working").rglob("*.safetensors")}
        assert weights == ({"adapter"} if stage == THIRD else set())


def test_manifests_name_commit_machine_and_image(chain, kernels):
    for stage, folder in chain.items():
        manifest = load(folder / "working" / stage / "manifest.json")
        build = load(kernels[stage])["metadata"]["atlas"]
        assert manifest["commit"] == build["commit"]
        assert manifest["digest"] == build["digests"][stage]
        assert manifest["platform"].startswith("kaggle, ")
        assert (manifest["image"], manifest["gpus"]) == ("f00d 2026", 0)
        assert f"transformers=={manifest['versions']['transformers']}" in bootstrap.pins().values()


def test_the_first_kernel_installs_and_the_others_have_nothing_to_do(chain, home):
    text = shown(chain[FIRST], FIRST)
    assert "Removed torchao 0.10.0" in text
    assert "Installing transformers==" in text
    for stage in (SECOND, THIRD, FOURTH):
        assert "Installing" not in shown(chain[stage], stage)
    folders = (home / "venv" / twin.SITE).glob("*.dist-info")
    installed = {path.stem.partition("+")[0] for path in folders}
    upgraded = ("transformers", "trl", "peft", "bitsandbytes", "datasets", "lm-eval")
    expected = {bootstrap.pins()[name].replace("[ifeval]", "") for name in upgraded}
    image = twin.IMAGE.read_text().splitlines()
    expected |= {line for line in image if line.startswith(("torch==", "numpy", "pandas", "accel"))}
    assert {line.replace("lm-eval", "lm_eval").replace("==", "-") for line in expected} <= installed
    assert "pyarrow-18.1.0" not in installed


def test_pandas_imported_before_the_first_cell_asks_for_one_restart(kernels, home):
    """It brings pyarrow into memory, which pip then replaces, for datasets."""
    folder, page = home / "restart", nbformat.read(kernels[FIRST], as_version=4)
    page.cells.insert(0, nbformat.v4.new_code_cell("import pandas"))
    nbformat.write(page, home / "restart.ipynb")
    python, env = twin.kaggle_session(home / "restart-venv"), twin.kaggle(folder)
    said = refused(twin.batch(python, home / "restart.ipynb", folder / "working", env), folder)
    assert said.startswith("pyarrow 18.1.0 had been imported before")
    passed(twin.batch(python, home / "restart.ipynb", folder / "working", env))


# --- Kaggle, alone and broken ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(chain, home) -> Callable[[str], Path]:
    """The python of a new session that has what the chain's first kernel installed."""

    def session(name: str) -> Path:
        return twin.copied(home / "venv", home / f"{name}-venv")

    return session


def test_the_last_kernel_alone_trains_first_and_leaves_no_secret(kernels, prepared, home):
    folder = home / "alone"
    env = twin.kaggle(folder, TWIN_SECRETS=CANARY)
    done = twin.batch(prepared("alone"), kernels[FOURTH], folder / "working", env)
    passed(done)
    assert {*STAGES} < {path.name for path in (folder / "working").iterdir()}
    assert "the labels in the batches are identical" in shown(folder, THIRD)
    assert "trained by" in shown(folder, FOURTH)
    for path in (path for path in (folder / "working").rglob("*") if path.is_file()):
        assert CANARY.encode() not in path.read_bytes(), path
    assert CANARY not in done.stdout + done.stderr


def test_run_all_twice_in_one_interactive_kernel(kernels, prepared, home):
    folder = home / "interactive"
    env = twin.kaggle(folder, KAGGLE_KERNEL_RUN_TYPE="Interactive")
    working = folder / "working"
    passed(twin.run_all(prepared("interactive"), kernels[FIRST], working, env, times=2))
    assert "Installing" not in twin.page_text(working / "page.ipynb")
    assert (working / FIRST / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("other", {"data.n_samples": 63}, "run: data.n_samples is 64 there and 63 here"),
        ("damaged", {}, f"train.jsonl is not the file that {FIRST} wrote; run {FIRST} again."),
    ],
)
def test_an_attached_result_that_does_not_fit_is_named(
    name, values, words, kernels, chain, prepared, home
):
    folder, parameters = home / name, {"SET": json.dumps(TINY | values)}
    env = twin.kaggle(folder)
    twin.attach(folder, FIRST, chain[FIRST] / "working")
    if name == "damaged":
        [rows] = (folder / "input").rglob("train.jsonl")
        rows.write_text("{}\n", "utf-8")
    done = twin.batch(prepared(name), kernels[SECOND], folder / "working", env, **parameters)
    assert words in refused(done, folder)


def test_without_internet_the_first_cell_names_the_switch(kernels, home):
    folder = home / "offline"
    python, env = twin.kaggle_session(home / "offline-venv"), twin.kaggle(folder, PIP_NO_INDEX="1")
    said = refused(twin.batch(python, kernels[FIRST], folder / "working", env), folder)
    assert "Settings > Internet" in said
    assert "trl>=" in said


# --- where the library comes from, when a badge has opened the notebook alone ---------------------


@pytest.fixture(scope="module")
def clone(home) -> Path:
    """This tree as it is, committed on a branch main."""
    folder = twin.copy_tree(home / "clone")
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], [*who, "commit", "-qm", "all"]):
        twin.run("git", "-C", folder, *command)
    return folder


@pytest.fixture
def badge(clone, prepared, home) -> Callable:
    """Run notebook 01 as a badge opens it, with `old` replaced by `new` in its bootstrap cell."""

    def run(name: str, old: str, new: str) -> tuple[subprocess.CompletedProcess, Path]:
        folder, page = home / name, nbformat.read(clone / "notebooks" / f"{FIRST}.ipynb", 4)
        [cell] = [cell for cell in page.cells if "bootstrap" in cell.metadata.get("tags", [])]
        assert old in cell.source
        cell.source = cell.source.replace(old, new)
        nbformat.write(page, home / f"{name}.ipynb")
        env = twin.kaggle(folder)
        working = folder / "working"
        done = twin.batch(prepared(name), home / f"{name}.ipynb", working, env, **BADGE)
        return done, folder

    return run


REPOSITORY = "https://github.com/agaonker/atlas"


def test_the_library_is_found_in_an_attached_dataset(clone, badge, home):
    shutil.copytree(clone, home / "dataset" / "input" / "datasets" / "someone" / "atlas")
    done, folder = badge("dataset", "/kaggle/input", str(home / "dataset" / "input"))
    passed(done)
    assert (folder / "working" / FIRST / "manifest.json").is_file()


def test_the_library_comes_by_pip_otherwise_and_knows_its_commit(clone, badge):
    done, folder = badge("badge", REPOSITORY, f"file://{clone}")
    passed(done)
    head = twin.run("git", "-C", clone, "rev-parse", "--short=12", "HEAD").stdout.strip()
    assert load(folder / "working" / FIRST / "manifest.json")["commit"] == head


def test_without_internet_the_notebook_of_a_badge_names_the_switch(badge, home):
    done, folder = badge("badge-offline", REPOSITORY, f"file://{home}/nowhere")
    assert refused(done, folder) == (
        f"pip cannot install file://{home}/nowhere; Kaggle: is Settings > Internet on?"
    )


def test_the_library_is_found_above_the_working_folder(clone, prepared, home):
    env, out = twin.environment(home / "home"), home / "checkout-out"
    working, page = clone / "notebooks", clone / "notebooks" / f"{FIRST}.ipynb"
    passed(twin.batch(prepared("checkout"), page, working, env, **BADGE, OUT=str(out)))
    (working / "__notebook__.ipynb").unlink()
    assert load(out / FIRST / "manifest.json")["platform"].startswith("local, ")


# --- Colab ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colab(kernels, home) -> tuple[Path, Path]:
    """(python, working folder) after the last notebook ran alone, in one kernel of Colab's."""
    python, content = twin.colab_session(home / "colab-venv"), home / "content"
    content.mkdir()
    env = twin.environment(home / "home", COLAB_RELEASE_TAG="release-colab-external")
    assert subprocess.run([str(python), "-c", "import papermill"], capture_output=True).returncode
    absent = {"TWIN_SECRETS": "TimeoutException"}
    passed(twin.run_all(python, kernels[FOURTH], content, env | absent))
    return python, content


def test_on_colab_the_last_notebook_alone_brings_papermill_and_trains_first(colab):
    text = twin.page_text(colab[1] / "page.ipynb")
    assert "papermill==" in text
    assert "trained by" in text
    for stage in STAGES:
        manifest = load(colab[1] / "runs" / "sft_qwen05b-offline" / stage / "manifest.json")
        assert manifest["platform"].startswith("colab, ")
        assert manifest["image"] == "release-colab-external"


def test_on_colab_a_notebook_runs_in_batch(colab, kernels, home):
    folder = home / "content-batch"
    folder.mkdir()
    env = twin.environment(home / "home", COLAB_RELEASE_TAG="release-colab-external")
    passed(twin.batch(colab[0], kernels[FIRST], folder, env))
    out = folder / "runs" / "sft_qwen05b-offline"
    assert {path.name for path in out.iterdir()} == {FIRST}  # no notebook is kept unseen


COLABS = ["SecretNotFoundError", "NotebookAccessError", "TimeoutException", "ValueError", CANARY]


def test_colabs_secrets_of_every_kind(colab, kernels, home):
    """In Colab's own shell, without its release's variable."""
    page = nbformat.read(kernels[FIRST], as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in page.cells]
    page.cells = page.cells[: tags.index(["bootstrap"]) + 1]
    code = f"import os\nfrom atlas_lib import session\nfor name in {COLABS}:\n"
    code += "    os.environ['TWIN_SECRETS'] = name\n    found = session.secret('HF_TOKEN')[0]\n"
    page.cells.append(nbformat.v4.new_code_cell(f"{code}    print(name, '->', found)"))
    nbformat.write(page, home / "secrets.ipynb")
    env = twin.environment(home / "home")
    passed(twin.run_all(colab[0], home / "secrets.ipynb", colab[1], env))
    text = twin.page_text(colab[1] / "page.ipynb")
    for name in COLABS:
        assert f"{name} -> {CANARY if name == CANARY else None}" in text
