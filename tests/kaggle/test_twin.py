"""The built kernels on a machine like Kaggle's or Colab's: chained, alone, in one kernel, broken.

The bootstraps of this file really install what the image lacks, from the package index.
"""

import json
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
import twin
from tiny import TINY

from tools.kaggle import bundle

ROOT = twin.ROOT
FIRST, SECOND, THIRD, FOURTH = twin.STAGES
NEEDS = {SECOND: [FIRST], THIRD: [FIRST, SECOND], FOURTH: [THIRD]}
ABSENT = dict(
    zip(twin.STAGES, ["BackendError", "CredentialError", "ConnectionError", "ImportError"])  # noqa: B905
)
CANARY = "canary-2f9c1d"
LABEL = "offline stand-in: shows that the machinery works, says nothing about Qwen"

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    """The four built kernels, tiny; W&B is asked for, and nobody has a key."""
    return twin.build(tmp_path_factory.mktemp("build"), **TINY, **{"train.report_to": "wandb"})


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where all sessions of this file keep their folders; one HOME, so one stand-in is built."""
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def chain(kernels, home) -> dict[str, Path]:
    """Stage -> its session's folder: each with an output of its own, the earlier ones attached."""
    python = twin.kaggle_session(home / "venv")
    old = ["-m", "pip", "install", "-q", "--no-deps", "torchao==0.10.0"]  # as the image has it
    twin.run(python, *old)
    folders = {stage: home / stage for stage in twin.STAGES}
    for stage, folder in folders.items():
        env = twin.kaggle(folder, TWIN_SECRETS=ABSENT[stage])
        for need in NEEDS.get(stage, []):
            twin.attach(folder, need, folders[need] / "working")
        page = kernels / stage / bundle.NOTEBOOK
        done = twin.batch(python, page, folder / "working", env)
        assert done.returncode == 0, f"{stage}: {done.stderr[-4000:]}"
    return folders


def load(path: Path):
    return json.loads(path.read_text("utf-8"))


def shown(folder: Path, stage: str) -> str:
    return twin.page_text(folder / "working" / "notebooks" / f"{stage}.ipynb")


# --- Kaggle, chained ------------------------------------------------------------------------------


def test_each_kernel_reads_what_is_attached_and_builds_nothing_else(chain):
    for stage, folder in chain.items():
        for need in NEEDS.get(stage, []):
            assert f"{need}: using {folder / 'input'}" in shown(folder, stage)
        assert "building it" not in shown(folder, stage)


def test_the_output_holds_the_stage_and_its_page_and_nothing_else(chain):
    for stage, folder in chain.items():
        expected = {stage, "notebooks", "__notebook__.ipynb"}
        expected |= {"answers", "metrics.json"} if stage == FOURTH else set()
        assert {path.name for path in (folder / "working").iterdir()} == expected
        weights = {path.parent.name for path in (folder / "working").rglob("*.safetensors")}
        assert weights == ({"adapter"} if stage == THIRD else set())


def test_manifests_name_commit_machine_and_image(chain, kernels):
    for stage, folder in chain.items():
        manifest = load(folder / "working" / stage / "manifest.json")
        build = load(kernels / stage / bundle.BUILD)
        assert manifest["commit"] == bundle.short(build["commit"], build["dirty"])
        assert manifest["config_digest"] == build["digests"][stage]
        assert manifest["platform"].startswith("kaggle, ")
        assert manifest["image"] == "f00d 2026"
        assert manifest["gpus"] == 0
        assert f"transformers=={manifest['versions']['transformers']}" in twin.IMAGE.read_text()


def test_the_page_is_kept_with_its_finding(chain):
    for stage, folder in chain.items():
        text = shown(folder, stage)
        assert LABEL in text
        assert "The finding appears here" not in text


def test_the_first_page_installs_and_the_others_have_nothing_to_do(chain, home):
    text = shown(chain[FIRST], FIRST)
    assert "Removed torchao 0.10.0" in text
    assert "Installing trl>=" in text
    for stage in (SECOND, THIRD, FOURTH):
        assert "Packages: nothing is missing" in shown(chain[stage], stage)
    moved = {
        path.name.partition("-")[0] for path in (home / "venv" / twin.SITE).glob("*.dist-info")
    }
    assert {"trl", "bitsandbytes", "lm_eval", "langdetect"} <= moved
    assert not moved & {"torch", "numpy", "transformers", "peft", "datasets", "accelerate"}


def test_an_absent_secret_of_every_kind_is_the_normal_case(chain):
    assert "W&B: off (no key" in shown(chain[THIRD], THIRD)


# --- Kaggle, alone --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(chain, home):
    """A new session that has what the chain's first page installed."""

    def session(name: str) -> Path:
        return twin.kaggle_session(home / name, home / "venv" / twin.SITE)

    return session


def test_the_last_kernel_alone_trains_first_and_leaves_no_secret(kernels, prepared, home):
    folder, page = home / "alone", kernels / FOURTH / bundle.NOTEBOOK
    env = twin.kaggle(folder, TWIN_SECRETS=CANARY)
    done = twin.batch(prepared("alone-venv"), page, folder / "working", env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {*twin.STAGES} < {path.name for path in (folder / "working").iterdir()}
    assert "the trainer's labels are exactly those" in shown(folder, THIRD)
    assert "trained by" in shown(folder, FOURTH)
    for path in (path for path in (folder / "working").rglob("*") if path.is_file()):
        assert CANARY.encode() not in path.read_bytes(), path
    assert CANARY not in done.stdout + done.stderr


def test_run_all_twice_in_one_interactive_kernel(kernels, prepared, home):
    folder, page = home / "interactive", kernels / FIRST / bundle.NOTEBOOK
    env = twin.kaggle(folder, KAGGLE_KERNEL_RUN_TYPE="Interactive")
    done = twin.run_all(prepared("interactive-venv"), page, folder / "working", env, times=2)
    assert done.returncode == 0, done.stderr[-4000:]
    text = twin.page_text(folder / "working" / "page.ipynb")
    assert text.count("Packages: nothing is missing") == 2
    assert (folder / "working" / FIRST / "manifest.json").is_file()


# --- Kaggle, broken -------------------------------------------------------------------------------


def refused(done: subprocess.CompletedProcess, folder: Path) -> str:
    """The last line of the error that stopped a page."""
    assert done.returncode != 0
    return twin.page_text(folder / "working" / "__notebook__.ipynb").splitlines()[-1]


def run_second(kernels, chain, session, folder: Path, **parameters: str) -> str:
    env = twin.kaggle(folder)
    page = kernels / SECOND / bundle.NOTEBOOK
    return refused(twin.batch(session, page, folder / "working", env, **parameters), folder)


def test_an_attached_result_of_another_configuration_is_named(kernels, chain, prepared, home):
    folder = home / "other"
    twin.kaggle(folder)
    twin.attach(folder, FIRST, chain[FIRST] / "working")
    settings = json.dumps(TINY | {"data.n_samples": 63})
    said = run_second(kernels, chain, prepared("other-venv"), folder, SET=settings)
    assert "does not fit this run: data.n_samples is 64 there and 63 here" in said


def test_a_damaged_attached_result_is_named(kernels, chain, prepared, home):
    folder = home / "damaged"
    twin.kaggle(folder)
    twin.attach(folder, FIRST, chain[FIRST] / "working")
    [rows] = (folder / "input").rglob("train.jsonl")
    rows.write_text("{}\n", "utf-8")
    said = run_second(kernels, chain, prepared("damaged-venv"), folder)
    assert f"{rows} is not the file {FIRST} wrote; run {FIRST} again." in said


def test_without_internet_the_first_cell_names_the_switch(kernels, home):
    folder = home / "offline"
    python, env = twin.kaggle_session(home / "offline-venv"), twin.kaggle(folder, PIP_NO_INDEX="1")
    done = twin.batch(python, kernels / FIRST / bundle.NOTEBOOK, folder / "working", env)
    assert "Settings > Internet" in refused(done, folder)
    assert "trl>=" in refused(done, folder)


# --- where the library comes from, when a badge has brought the page alone ------------------------


@pytest.fixture(scope="module")
def clone(home) -> Path:
    """This tree as it is, committed on a branch main."""
    folder = home / "clone"
    listed = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in twin.run(*listed).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], [*who, "commit", "-qm", "all"]):
        twin.run("git", "-C", folder, *command)
    return folder


def page_of(clone: Path, target: Path, **replaced: str) -> Path:
    """Notebook 01 as a badge opens it, with `replaced` texts: this machine's stand-ins."""
    page = nbformat.read(clone / "notebooks" / f"{FIRST}.ipynb", as_version=4)
    for cell in (cell for cell in page.cells if "bootstrap" in cell.metadata.get("tags", [])):
        for old, new in replaced.items():
            assert old in cell.source
            cell.source = cell.source.replace(old, new)
    nbformat.write(page, target)
    return target


BADGE = {"OVERLAY": "offline", "SET": json.dumps(TINY)}


def test_the_library_is_found_in_an_attached_dataset(clone, prepared, home):
    folder = home / "dataset"
    env = twin.kaggle(folder)
    shutil.copytree(clone, folder / "input" / "datasets" / "someone" / "atlas")
    page = page_of(clone, home / "dataset.ipynb", **{"/kaggle/input": str(folder / "input")})
    done = twin.batch(prepared("dataset-venv"), page, folder / "working", env, **BADGE)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folder / "working" / FIRST / "manifest.json").is_file()


def test_the_library_is_found_above_the_working_folder(clone, prepared, home):
    env = twin.environment(home / "home")
    page = clone / "notebooks" / f"{FIRST}.ipynb"
    out = home / "checkout-out"
    done = twin.batch(
        prepared("checkout-venv"), page, clone / "notebooks", env, **BADGE, OUT=str(out)
    )
    (clone / "notebooks" / "__notebook__.ipynb").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert load(out / FIRST / "manifest.json")["platform"].startswith("local, ")


REPOSITORY = "https://github.com/agaonker/atlas"


def test_the_library_comes_by_pip_otherwise_and_knows_its_commit(clone, prepared, home):
    folder = home / "badge"
    env = twin.kaggle(folder)
    page = page_of(clone, home / "badge.ipynb", **{REPOSITORY: f"file://{clone}"})
    done = twin.batch(prepared("badge-venv"), page, folder / "working", env, **BADGE)
    assert done.returncode == 0, done.stderr[-4000:]
    head = twin.run("git", "-C", clone, "rev-parse", "--short=12", "HEAD").stdout.strip()
    assert load(folder / "working" / FIRST / "manifest.json")["commit"] == head


def test_without_internet_the_page_of_a_badge_names_the_switch(clone, prepared, home):
    folder = home / "badge-offline"
    env = twin.kaggle(folder)
    page = page_of(clone, home / "none.ipynb", **{REPOSITORY: f"file://{home}/nowhere"})
    done = twin.batch(prepared("badge-offline-venv"), page, folder / "working", env, **BADGE)
    assert refused(done, folder) == (
        f"pip cannot install file://{home}/nowhere; Kaggle: is Settings > Internet on?"
    )


# --- Colab ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colab(kernels, home):
    """(python, working folder) after the last page ran alone, in one kernel of Colab's."""
    python, content = twin.colab_session(home / "colab-venv"), home / "content"
    content.mkdir()
    env = twin.environment(home / "home", COLAB_RELEASE_TAG="release-colab-external")
    page = kernels / FOURTH / bundle.NOTEBOOK
    assert subprocess.run([str(python), "-c", "import papermill"], capture_output=True).returncode
    done = twin.run_all(python, page, content, env | {"TWIN_SECRETS": "TimeoutException"})
    assert done.returncode == 0, done.stderr[-4000:]
    return python, content


def test_on_colab_the_last_page_alone_brings_papermill_and_trains_first(colab):
    out = colab[1] / "runs" / "sft_qwen05b-offline"
    text = twin.page_text(colab[1] / "page.ipynb")
    assert "papermill>=" in text
    assert "trained by" in text
    for stage in twin.STAGES:
        manifest = load(out / stage / "manifest.json")
        assert manifest["platform"].startswith("colab, ")
        assert manifest["image"] == "release-colab-external"


def test_on_colab_a_page_runs_in_batch(colab, kernels, home):
    folder = home / "content-batch"
    folder.mkdir()
    env = twin.environment(home / "home", COLAB_RELEASE_TAG="release-colab-external")
    page = kernels / FIRST / bundle.NOTEBOOK
    done = twin.batch(colab[0], page, folder, env)
    assert done.returncode == 0, done.stderr[-4000:]
    out = folder / "runs" / "sft_qwen05b-offline"
    assert {path.name for path in out.iterdir()} == {FIRST}  # no page is kept where nobody looks


COLABS = ["SecretNotFoundError", "NotebookAccessError", "TimeoutException", "ValueError", CANARY]


def test_colabs_secrets_of_every_kind(colab, kernels, home):
    """In Colab's own shell, without its release's variable."""
    page = nbformat.read(kernels / FIRST / bundle.NOTEBOOK, as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in page.cells]
    page.cells = page.cells[: tags.index(["bootstrap"]) + 1]
    code = f"import os\nfrom atlas_lib import session\nfor name in {COLABS}:\n"
    code += "    os.environ['TWIN_SECRETS'] = name\n    found = session.secret('HF_TOKEN')\n"
    page.cells.append(nbformat.v4.new_code_cell(f"{code}    print(name, '->', found)"))
    nbformat.write(page, home / "secrets.ipynb")
    done = twin.run_all(colab[0], home / "secrets.ipynb", colab[1], twin.environment(home / "home"))
    assert done.returncode == 0, done.stderr[-4000:]
    text = twin.page_text(colab[1] / "page.ipynb")
    for name in COLABS[:-1]:
        assert f"{name} -> None" in text
    assert f"{CANARY} -> {CANARY}" in text
