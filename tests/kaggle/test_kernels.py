"""tools.kernels with Kaggle's own client and CLI against a stub of its service on loopback."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import stub_hub
import stub_kaggle
import twin
from IPython.core.inputtransformer2 import TransformerManager
from requests.adapters import HTTPAdapter

from atlas_lib import artifacts, bootstrap, session
from atlas_lib.config import load_config
from atlas_lib.stages import STAGES
from tools import kernels, leaks
from tools.kaggle import bundle, service

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND, THIRD, FOURTH = STAGES
SLUG = "atlas-01-data-prep"
REF = f"agaonker/{SLUG}"
OFFLINE = ("--overlay", "offline", "--set", "data.n_samples=64")
CHOICE = {"CONFIG": "sft_qwen05b", "OVERLAY": "offline", "SET": {"data.n_samples": 64}}


# --- a clone to build in, and the builds ----------------------------------------------------------


def git(folder: Path, *args: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *who, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def build(clone: Path, *args: object, **env: str) -> subprocess.CompletedProcess:
    """python -m tools.kernels build ..., with nothing of this process's environment."""
    command = [sys.executable, "-m", "tools.kernels", "build", *map(str, args)]
    env = {"PATH": os.environ["PATH"], **env}
    return subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """This tree as it is, committed: a build wants a clean one."""
    folder = twin.copy_tree(tmp_path_factory.mktemp("clone") / "atlas")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        git(folder, *command)
    return folder


@pytest.fixture(scope="module")
def built(clone):
    """build/kaggle of the clone, all four stages."""
    done = build(clone, *OFFLINE)
    assert (done.returncode, done.stderr) == (0, "")
    return clone / "build" / "kaggle"


@pytest.fixture
def builds(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "kaggle"))


@pytest.fixture
def kaggle(builds):
    """The stub; a pushed version runs through and leaves what its stage would leave."""
    with stub_kaggle.serve() as service:
        service.run = lambda slug, version: finish(builds, slug, version)
        yield service


def read(folder: Path, file: str):
    return json.loads((folder / file).read_bytes())


def record(folder: Path) -> dict:
    """What a built notebook says of its build."""
    return read(folder, "notebook.ipynb")["metadata"]["atlas"]


def finish(builds: Path, slug: str, version: stub_kaggle.Version, **manifest) -> None:
    """The output of a kernel: a row, its manifest, the executed notebook, metrics and a log."""
    stage = next(stage for stage in STAGES if bundle.kernel_id("", stage) == f"/{slug}")
    build = record(builds / stage)
    about = {"format": artifacts.MANIFEST_FORMAT, "stage": stage, "commit": build["commit"]}
    about |= {"made_from": {}, "inputs": {}, "digest": build["digests"][stage]}
    about |= {"outputs": {"rows.jsonl": hashlib.sha256(b"{}\n").hexdigest()}}
    version.files = {
        f"{stage}/rows.jsonl": b"{}\n",
        f"{stage}/manifest.json": json.dumps(about | manifest).encode(),
        f"notebooks/{stage}.ipynb": b'{"cells": []}',
        "metrics.json": b"[]",
        "responses/kept.jsonl": b"{}\n",
    }
    lines = [{"stream_name": "stdout", "time": n, "data": f"line {n}\n"} for n in range(140)]
    version.log = json.dumps(lines)


def environment(kaggle: stub_kaggle.Kaggle, home: Path) -> dict[str, str]:
    """Where the real client meets the stub, as kagglesdk has it for tests: as its proxy."""
    return {
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "http_proxy": kaggle.endpoint,
        "no_proxy": "",
        "NO_PROXY": "",
        "HOME": str(home),
        "KAGGLE_CONFIG_DIR": str(home),
        "KAGGLE_USERNAME": stub_kaggle.USER,
        "KAGGLE_KEY": stub_kaggle.KEY,
    }


@pytest.fixture
def here(clone, builds, kaggle, tmp_path, monkeypatch, capsys):
    """python -m tools.kernels ... in this process, which has to end with `code` and say `words`."""
    monkeypatch.setattr(HTTPAdapter, "send", HTTPAdapter.send)  # put back afterwards
    monkeypatch.setattr(leaks, "FROM_FILES", {})
    for module in (bootstrap, session):
        monkeypatch.setattr(module, "ROOT", clone, raising=False)
    for name, value in environment(kaggle, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)

    def run(*args: str, code: int = 0, words: str = "") -> str:
        monkeypatch.setattr(sys, "argv", command(builds, tmp_path, *args))
        with pytest.raises(SystemExit) as ended:
            kernels.main()
        out, err = capsys.readouterr()
        assert (ended.value.code, "Traceback" in err) == (code, False), out + err
        assert not words or words in (sentence(err) if code else out)
        return out + err

    return run


def command(builds: Path, tmp_path: Path, verb: str, *args: str) -> list[str]:
    """The arguments, with the folders of this test and little patience."""
    patience = ["--poll", "0.02", "--retries", "2"] if verb != "build" else []
    folders = ["--out-folder", str(builds)]
    out = ["--out", str(tmp_path / "runs")] if verb in ("chain", "fetch") else []
    return ["kernels", verb, *patience, *folders, *out, *args]


def sentence(err: str) -> str:
    """The line that a failure ends with."""
    *_, line = err.splitlines()
    assert "error: " in line
    return line


# --- build ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_build_is_the_committed_notebook_with_parameters_and_payload(stage, clone, built):
    page = nbformat.read(built / stage / "notebook.ipynb", as_version=4)
    nbformat.validate(page)
    source = nbformat.read(clone / "notebooks" / f"{stage}.ipynb", as_version=4)
    tags = [cell.metadata.get("tags", [None])[0] for cell in page.cells]
    place = tags.index("payload")
    assert tags[place : place + 2] == ["payload", "bootstrap"]
    assert page.cells[place].metadata.jupyter.source_hidden
    values: dict = {}
    exec(page.cells[tags.index("parameters")].source, values)
    assert {key: values[key] for key in values if key.isupper()} == CHOICE | {"OUT": ""}
    assert page.metadata.kernelspec.name == "python3"
    assert not any(cell.get("outputs") for cell in page.cells)
    del page.cells[place]
    del page.cells[tags.index("parameters")], source.cells[tags.index("parameters")]
    assert [(cell.id, cell.source) for cell in page.cells] == [
        (cell.id, cell.source) for cell in source.cells
    ]
    assert page.metadata.atlas.commit == git(clone, "rev-parse", "--short=12", "HEAD").strip()
    assert list(page.metadata.atlas.digests) == list(STAGES)


def test_the_owner_is_the_one_of_pyproject_unless_the_environment_names_another(clone, tmp_path):
    owner = read(ROOT, "kernel-metadata.json")["id"].partition("/")[0]
    assert f"github.com/{owner}/" in (ROOT / "pyproject.toml").read_text("utf-8")
    done = build(clone, SECOND, "--out-folder", tmp_path, KAGGLE_USERNAME="alice")
    assert done.returncode == 0
    metadata = read(tmp_path / SECOND, "kernel-metadata.json")
    assert metadata["id"] == "alice/atlas-02-template-audit"
    assert metadata["kernel_sources"] == ["alice/atlas-01-data-prep"]
    assert list(metadata) == list(read(ROOT, "kernel-metadata.json"))


def test_the_same_commit_gives_the_same_bytes_beside_what_was_pushed(clone, built, builds):
    for path in (clone / "atlas_lib").glob("*.py"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    (builds / FIRST / "notebook.ipynb").unlink()
    (builds / FIRST / "pushed.json").write_text("{}", "utf-8")
    assert build(clone, FIRST, *OFFLINE, "--out-folder", builds).returncode == 0
    names = {path.name for path in (builds / FIRST).iterdir()}
    assert names == {"notebook.ipynb", "kernel-metadata.json", "pushed.json"}
    for name in ("notebook.ipynb", "kernel-metadata.json"):
        assert (builds / FIRST / name).read_bytes() == (built / FIRST / name).read_bytes()


# --- the payload ----------------------------------------------------------------------------------


def payload(builds: Path) -> str:
    page = nbformat.read(builds / FIRST / "notebook.ipynb", as_version=4)
    [cell] = [cell for cell in page.cells if "payload" in cell.metadata.get("tags", [])]
    return cell.source


def run_cell(source: str, tmp_path: Path, version: str = "") -> subprocess.CompletedProcess:
    """The source in an empty working folder, by an interpreter without any package."""
    for folder in ("temporary", "working"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cell.py").write_text(source, "utf-8")
    interpreter = shutil.which(f"python{version}") if version else sys.executable
    env = {"PATH": os.environ["PATH"], "PYENV_VERSION": version}  # pyenv's shims need a version
    if not interpreter or subprocess.run([interpreter, "-V"], env=env).returncode:
        pytest.skip(f"NOT TESTED: there is no Python {version} here")
    return subprocess.run(
        [interpreter, "-I", "-S", str(tmp_path / "cell.py")], cwd=tmp_path / "working",
        env=env | {"TMPDIR": str(tmp_path / "temporary")}, capture_output=True, text=True,
    )  # fmt: skip


LOOK = """
import json, os, subprocess, sys
code = "import atlas_lib.bootstrap; print(atlas_lib.__file__)"
child = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
import atlas_lib
print(json.dumps([library, atlas_lib.__file__, child.stdout.strip(), os.environ["ATLAS_COMMIT"]]))
"""


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_payload_cell_needs_nothing_but_python(version, clone, builds, tmp_path):
    done = run_cell(payload(builds) + LOOK, tmp_path, version)
    assert (done.returncode, done.stderr) == (0, "")
    library, here, child, commit = json.loads(done.stdout)
    assert Path(library).parent == tmp_path / "temporary"
    assert not list((tmp_path / "working").iterdir())
    assert here == child == f"{library}/atlas_lib/__init__.py"
    assert commit == git(clone, "rev-parse", "--short=12", "HEAD").strip()
    tracked = git(clone, "ls-files", *bundle.PACKED)
    found = [path for path in Path(library).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {str(path.relative_to(library)) for path in found} == set(tracked.split())
    for path in found:
        assert path.read_bytes() == (clone / path.relative_to(library)).read_bytes()


def test_ipython_takes_the_payload_for_plain_python(builds):
    """Its lines may begin with % or !, which would be commands outside a string."""
    source = payload(builds)
    assert TransformerManager().transform_cell(source) == f"{source}\n"


@pytest.mark.parametrize("cut", [0, 99])
def test_a_damaged_payload_is_one_sentence_and_unpacks_nothing(cut, builds, tmp_path):
    """One letter is another one, or a line is lost."""
    head, start, rest = payload(builds).partition('PACKED = """\n')
    rest = rest[:500] + ("a" if rest[500] != "a" else "b") + rest[501 + cut :]
    done = run_cell(head + start + rest, tmp_path)
    told = "RuntimeError: The payload of this notebook is damaged; build and push it again."
    assert done.stderr.splitlines()[-1] == told
    assert not list((tmp_path / "temporary").iterdir())


# --- guards ---------------------------------------------------------------------------------------


def edit(folder: Path, function) -> None:
    page = json.loads((folder / "notebook.ipynb").read_bytes())
    function(page)
    (folder / "notebook.ipynb").write_text(json.dumps(page), "utf-8")


def output(page: dict) -> None:
    cell = next(cell for cell in page["cells"] if cell["cell_type"] == "code")
    cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "0.7"}]


def other_letter(page: dict) -> None:
    [cell] = [cell for cell in page["cells"] if cell["id"] == "payload"]
    source = cell["source"]
    cell["source"] = source[:900] + ("a" if source[900] != "a" else "b") + source[901:]


TOKENS = {
    "hub": "hf_" + "aB3dE5gH7j" * 3 + "kLmN",
    "kaggle": "KGAT_" + "0123456789abcdef" * 2,
    "kaggle.json": '{"username": "x", "key": "' + "0f1e2d3c" * 4 + '"}',
    "old W&B": "WANDB_API_KEY=" + "0123456789" * 4,
    "W&B": "wandb_v1_" + "aB3dE5gH7j_" * 7,
    "AWS": "AKIA" + "Q7R2M4K9" * 2,
    "GitHub": "ghp_" + "a1B2c3D4e5F6" * 3,
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
}
CHANGED = "was changed or damaged after the build"
PUSH_GUARDS = {
    "a changed notebook": (lambda p: p["cells"].pop(), CHANGED),
    "outputs": (output, CHANGED),
    "no kernelspec": (lambda p: p["metadata"].pop("kernelspec"), CHANGED),
    "a damaged payload": (other_letter, CHANGED),
    "another commit": (
        lambda p: p["metadata"]["atlas"].update(commit="0" * 12), "from commit 000000000000"
    ),
    "a dirty build": (
        lambda p: p["metadata"]["atlas"].update(commit=p["metadata"]["atlas"]["commit"] + "-dirty"),
        "uncommitted changes",
    ),
    "no build": (lambda p: p["metadata"].pop("atlas"), "is not a finished build"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUSH_GUARDS)
def test_a_build_that_is_not_as_it_was_is_refused_before_any_request(name, builds, kaggle, here):
    plant, words = PUSH_GUARDS[name]
    edit(builds / FIRST, plant)
    here("push", FIRST, code=2, words=words)
    os.truncate(builds / FIRST / "notebook.ipynb", 900)
    here("push", FIRST, code=2, words="is not a finished build")
    assert kaggle.calls == []


def test_a_secret_of_the_environment_is_found_at_the_push_too(builds, here, monkeypatch):
    text = read(builds / FIRST, "notebook.ipynb")["cells"][0]["source"][2:20]
    monkeypatch.setenv("HF_TOKEN", text)
    assert text not in here("push", FIRST, code=2, words="holds HF_TOKEN")


@pytest.mark.parametrize("name", TOKENS)
def test_every_kind_of_key_is_found(name):
    text = json.dumps({"source": f"a = '{TOKENS[name]}'"})
    assert leaks.finding(text) == "what looks like a key or token"


def plant_in_notebook(clone: Path, function) -> None:
    path = clone / "notebooks" / f"{FIRST}.ipynb"
    page = json.loads(path.read_bytes())
    function(page)
    path.write_text(json.dumps(page), "utf-8")


DIRTY = ["--allow-dirty"]
BUILD_GUARDS = {
    "untracked file": (lambda c: (c / "new.txt").write_text("x"), [], "uncommitted changes"),
    "secret in a packed file": (
        lambda c: (c / "configs" / "new.yaml").write_text(f"token: {TOKENS['hub']}"), DIRTY,
        "configs/new.yaml holds what looks like a key or token",
    ),
    "secret in a parameter": (
        lambda c: None, ["--set", f"run.wandb_project={TOKENS['kaggle']}"],
        "holds what looks like a key or token",
    ),
    "too large": (
        lambda c: (c / "configs" / "new.yaml").write_text(os.urandom(1_000_000).hex()), DIRTY,
        "bytes, and Kaggle accepts 1,000,000",
    ),
    "unknown config": (lambda c: None, ["--config", "nope"], "Unknown config 'nope'"),
    "unknown key": (lambda c: None, ["--set", "train.max_step=1"], "'train.max_steps'"),
    "no value": (lambda c: None, ["--set", "train.max_steps"], "KEY=VALUE"),
    "no checkout": (lambda c: (c / ".git").rename(c / "git"), [], "is not a git checkout"),
}  # fmt: skip


@pytest.fixture
def restored(clone):
    yield clone
    if (clone / "git").exists():
        (clone / "git").rename(clone / ".git")
    git(clone, "checkout", "-q", ".")
    git(clone, "clean", "-fdq", "-e", "build")


@pytest.mark.parametrize("name", BUILD_GUARDS)
def test_a_build_that_is_refused_leaves_nothing(name, restored, tmp_path):
    plant, args, words = BUILD_GUARDS[name]
    plant(restored)
    out = tmp_path / "out"
    done = build(restored, FIRST, "--out-folder", out, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in sentence(done.stderr)
    assert not out.exists()


def test_a_dirty_tree_may_be_built_and_says_so_and_outputs_stay_out(restored, tmp_path):
    plant_in_notebook(restored, output)
    done = build(restored, FIRST, "--allow-dirty", "--out-folder", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert record(tmp_path / FIRST)["commit"].endswith("-dirty")
    assert payload(tmp_path).endswith('-dirty"')
    page = read(tmp_path / FIRST, "notebook.ipynb")
    assert not any(cell.get("outputs") for cell in page["cells"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("build", "05_dpo"), "unknown stage 05_dpo; there are: 01_data_prep, 02_template_audit"),
        (("chain", "05_dpo"), "unknown stage 05_dpo; there are: 01_data_prep, 02_template_audit"),
        (("push",), "required: STAGE"),
        (("wait", "--set", "a=1"), "unrecognized arguments: --set"),
    ],
)
def test_a_wrong_command_is_one_sentence(args, words, kaggle, here):
    here(*args, code=2, words=words)
    assert kaggle.calls == []


# --- what is sent ---------------------------------------------------------------------------------


def expected_body(stage: str, alone: bool = False) -> dict:
    gpu = {"machineShape": "NvidiaTeslaT4"} if stage in (THIRD, FOURTH) else {}
    needed = [] if alone else [bundle.kernel_id("agaonker", need) for need in STAGES[stage].needs]
    return {
        "slug": bundle.kernel_id("agaonker", stage),
        "newTitle": f"Atlas {stage.replace('_', ' ')}",
        "language": "python",
        "kernelType": "notebook",
        "isPrivate": True,
        "enableGpu": bool(gpu),
        "enableTpu": False,
        "enableInternet": True,
        "sessionTimeoutSeconds": 180 * 60,
        **({"kernelDataSources": needed} if needed else {}),
        **gpu,
    }


def check_body(body: dict, stage: str, alone: bool = False, built: bool = True) -> None:
    """Pushed by these tools, a version ends after the deadline at Kaggle, too."""
    page = json.loads(body["text"])
    assert page["metadata"]["kernelspec"]["name"] == "python3"
    assert not any(cell.get("outputs") for cell in page["cells"])
    assert sum(cell["id"] == "payload" for cell in page["cells"]) == built
    assert len(body["text"]) < 1_000_000
    assert body == expected_body(stage, alone) | {"text": body["text"]}


@pytest.mark.parametrize("stage", ["the checkout", *STAGES])
def test_kaggles_own_command_pushes_a_build_and_the_checkout(
    stage, clone, builds, kaggle, tmp_path
):
    """`kaggle kernels push -p`, which the checkout's own metadata makes a push of 03 alone."""
    built = stage in STAGES
    cli = [Path(sys.executable).parent / "kaggle", "kernels", "push", "-p"]
    done = subprocess.run(
        [*cli, builds / stage if built else clone], capture_output=True, text=True,
        env={"PATH": os.environ["PATH"]} | environment(kaggle, tmp_path),
    )  # fmt: skip
    assert "Kernel version 1 successfully pushed" in done.stdout
    assert len(done.stdout.splitlines()) == 1  # no warning of another slug
    [body] = kaggle.bodies("SaveKernel")
    check_body({"sessionTimeoutSeconds": 10800} | body, stage if built else THIRD, not built, built)


def test_the_chain_from_nothing(kaggle, builds, here, tmp_path):
    out = here("chain")
    for stage, body in zip(STAGES, kaggle.bodies("SaveKernel"), strict=True):
        check_body(body, stage)
        for state in stub_kaggle.WALK:
            assert f"{stage} version 1: {state}, " in out
        assert (tmp_path / "runs" / stage / "rows.jsonl").read_text() == "{}\n"
        assert (tmp_path / "runs" / "notebooks" / f"{stage}.ipynb").is_file()
        ref = bundle.kernel_id("agaonker", stage)
        assert read(builds / stage, "pushed.json")["name"] == f"{ref}/1"
        assert f"https://www.kaggle.com/code/{ref}" in out
    kept = {path.name for path in (tmp_path / "runs").iterdir()}
    assert kept == {*STAGES, "notebooks", "metrics.json"}
    here("chain")
    assert len(kaggle.bodies("SaveKernel")) == 4


def test_alone_attaches_nothing_and_what_is_sent_is_not_read_from_the_folder(builds, kaggle, here):
    (builds / FOURTH / "kernel-metadata.json").write_text('{"id": "x/y", "title": "other"}')
    here("push", FOURTH, "--alone", words="pushed as version 1")
    check_body(*kaggle.bodies("SaveKernel"), FOURTH, alone=True)
    assert kaggle.bodies("GetKernelSessionStatus") == []


# --- what Kaggle may answer -----------------------------------------------------------------------

GOOD = {"ref": f"/code/{REF}", "url": f"https://www.kaggle.com/code/{REF}"}
GOOD |= {"versionNumber": 7, "kernelId": 42}
ALWAYS = 9  # more often than it is asked
HTML = (200, "<html>Please log in</html>", {})
SESSIONS = {"error": "Maximum batch GPU session count of 2 reached."}
DROPPED = {"invalidKernelSources": ["a/b"], "invalidDatasetSources": ["a/c"], "invalidTags": ["f"]}
DROPPED |= {"invalidCompetitionSources": ["d"], "invalidModelSources": ["e"]}
# name -> (answers to the push, exit code, words, times sent)
PUSH_ANSWERS = {
    "good": ([GOOD], 0, "pushed as version 7", 1),
    "the short good one": ([GOOD | {"ref": f"/agaonker/{SLUG}", "url": ""}], 0, "version 7", 1),
    "a version and no word more": ([{"versionNumber": 7}], 0, f"/code/{REF}", 1),
    "error": ([{"error": "Something is wrong"}], 3, f"did not start {REF}", 1),
    "not found": ([{"error": "Kernel not found"}], 3, "Kernel not found", 1),
    "weekly quota": (
        [{"error": "Maximum weekly GPU quota of 30.00 hours reached."}], 3, "weekly GPU quota", 1
    ),
    "two sessions": ([SESSIONS] * ALWAYS, 4, "session count", 3),
    "two sessions at first": ([SESSIONS], 0, "Retrying in 0 s", 2),
    "capacity": ([{"error": "No GPU capacity available"}] * ALWAYS, 4, "No GPU capacity", 3),
    "dropped": (
        [GOOD | DROPPED], 3, "version 7, but without dataset source a/c, competition source d, "
        "kernel source a/b, model source e, tag f: stop", 1
    ),
    "no version": ([GOOD | {"versionNumber": None}], 3, "named no version", 1),
    "another slug": (
        [GOOD | {"ref": "/code/agaonker/atlas-01-x", "url": ""}], 3, f"saved {REF}", 1
    ),
    "another owner": (
        [GOOD | {"ref": f"/code/bob/{SLUG}", "url": ""}], 3, f"as /code/bob/{SLUG}", 1
    ),
    "empty": ([{}], 3, "named no version", 1),
    "a list": ([(200, [], {})], 3, "named no version", 1),
    "html": ([HTML] * ALWAYS, 4, "the answer is not JSON", 3),
    "html once": ([HTML], 0, "pushed as version 1", 2),
    "401": ([(401, {"message": "Unauthenticated"}, {})], 3, "(401)", 1),
    "403": ([(403, {"message": "Phone verification needed"}, {})], 3, "Phone verification", 1),
    "404": ([(404, "no", {})], 3, "(404)", 1),
    "400": ([(400, {"message": "Title too long"}, {})], 3, "Title too long", 1),
    "403 in a good answer": ([{"code": 403, "message": "Denied"}], 3, "(403)", 1),
    "429": ([(429, "", {"Retry-After": "0"})] * ALWAYS, 4, "answers 429", 3),
    "429 once": ([(429, "", {"Retry-After": "1"})], 0, "Retrying in 1 s", 2),
    "412": ([(412, {"message": "TooManyAssignments"}, {})] * ALWAYS, 4, "no capacity", 3),
    "412 once": ([(412, "", {})], 0, "pushed as version 1", 2),
    "500": ([(500, "oops", {})] * ALWAYS, 4, "answers 500", 3),
    "503 once": ([(503, "", {})], 0, "answers 503", 2),
    "hung up": ([stub_kaggle.HANG_UP] * ALWAYS, 4, "no connection", 3),
    "the answer lost": ([stub_kaggle.LOST], 0, "pushed as version 1", 1),
    "the echo of a key": (
        [{"error": f"bad header {stub_kaggle.KEY}"}], 3, "bad header ***", 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUSH_ANSWERS)
def test_every_answer_to_a_push_has_its_name_and_code(name, kaggle, builds, here):
    answers, code, words, times = PUSH_ANSWERS[name]
    kaggle.planted["SaveKernel"] = list(answers)
    assert stub_kaggle.KEY not in here("push", FIRST, code=code, words=words)
    assert len(kaggle.bodies("SaveKernel")) == times
    assert (builds / FIRST / "pushed.json").exists() == (code == 0)


def test_what_stays_lost_is_found_by_the_same_command_later(kaggle, here):
    kaggle.planted["SaveKernel"] = [stub_kaggle.LOST]
    kaggle.planted["GetKernel"] = [None, None] + [(503, "", {})] * 2
    here("push", FIRST, code=4)
    here("push", FIRST, words="pushed as version 1")
    assert len(kaggle.bodies("SaveKernel")) == 1


def test_a_build_that_kaggle_has_is_not_pushed_twice(kaggle, builds, here):
    for _ in range(2):
        here("push", FOURTH, "--alone")
    assert len(kaggle.bodies("SaveKernel")) == 1
    [version] = kaggle.kernels["atlas-04-ifeval-eval"]
    version.body["kernelDataSources"], version.walk = ["bob/other"], ["COMPLETE"]
    here("push", FOURTH, "--alone")
    kaggle.kernels["atlas-04-ifeval-eval"][1].walk = ["COMPLETE"]
    edit(builds / FOURTH, lambda page: page["metadata"]["atlas"].update(id="another build"))
    here("push", FOURTH, "--alone")
    assert len(kaggle.bodies("SaveKernel")) == 3


@pytest.mark.parametrize("state", ["QUEUED", "RUNNING"])
@pytest.mark.parametrize("behind", [0, 1])
def test_a_version_of_another_build_that_still_runs_is_named(state, behind, kaggle, builds, here):
    """Both would use up GPU hours; Kaggle may not show the newest version at once."""
    here("push", FIRST)
    kaggle.kernels[SLUG][0].walk, kaggle.behind = [state], behind
    edit(builds / FIRST, lambda page: page["metadata"]["atlas"].update(id="another build"))
    words = f"{REF}/1 is {state}, and a second one would use up quota, too; wait for it, or stop it"
    here("push", FIRST, code=2, words=words)
    here("chain", FIRST, code=2, words=words)
    assert len(kaggle.bodies("SaveKernel")) == 1
    kaggle.kernels[SLUG][0].walk = ["CANCEL_ACKNOWLEDGED"]
    here("push", FIRST, words="pushed as version 2")


def test_a_refused_push_forgets_no_earlier_version(kaggle, builds, here):
    walk(kaggle, "ERROR")
    here("push", FIRST)
    kaggle.planted["SaveKernel"] = [{"error": "quota"}]
    here("push", FIRST, code=3)
    assert read(builds / FIRST, "pushed.json")["version"] == 1


def test_kaggle_that_never_answers(kaggle, here, monkeypatch):
    monkeypatch.setattr(service, "TIMEOUT", 0.2)
    kaggle.planted["SaveKernel"] = [stub_kaggle.SILENT] * ALWAYS
    here("push", FIRST, code=4, words="does not answer in time")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    here("push", FIRST, code=4, words="no connection")


# --- credentials ----------------------------------------------------------------------------------

NONE = {"KAGGLE_USERNAME": None, "KAGGLE_KEY": None}
CREDENTIALS = {
    "none": (NONE, None, 3, "No Kaggle credentials: set KAGGLE_API_TOKEN"),
    "empty ones": (
        {"KAGGLE_USERNAME": "", "KAGGLE_KEY": "", "KAGGLE_API_TOKEN": ""},
        None,
        3,
        "KAGGLE_API_TOKEN, KAGGLE_KEY, KAGGLE_USERNAME is empty, which counts as missing",
    ),
    "a name without a key": ({"KAGGLE_KEY": None}, None, 3, "No Kaggle credentials"),
    "a token": (NONE | {"KAGGLE_API_TOKEN": "canarytoken1"}, None, 0, ""),
    "a token refused": (
        {"KAGGLE_API_TOKEN": "canarytoken1"}, (401, {"message": "no"}, {}), 3, "(401)"
    ),
    "a token expired, and a good key": (
        {"KAGGLE_API_TOKEN": "canarytoken1"}, {"active": False}, 3, "renew it or unset it"
    ),
    "another account": (
        NONE | {"KAGGLE_API_TOKEN": "canarytoken1"}, {"active": True, "username": "bob"}, 2,
        f"{REF} does not belong to the account bob",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CREDENTIALS)
def test_credentials(name, kaggle, here, monkeypatch):
    env, introspection, code, words = CREDENTIALS[name]
    for variable, value in env.items():
        if value is None:
            monkeypatch.delenv(variable)
        else:
            monkeypatch.setenv(variable, value)
    kaggle.planted["IntrospectToken"] = [introspection] * ALWAYS
    assert "canarytoken1" not in here("push", FIRST, code=code, words=words)
    assert bool(kaggle.bodies("SaveKernel")) == (code == 0)
    if name == "a token":
        assert kaggle.authorizations == {"Bearer canarytoken1"}


# --- what comes first -----------------------------------------------------------------------------


def plant_first(kaggle, builds, states=("COMPLETE",), **manifest) -> None:
    version = stub_kaggle.Version({"text": "{}"}, list(states))
    finish(builds, SLUG, version, **manifest)
    kaggle.kernels[SLUG] = [version]


UPSTREAM = {
    "still running": ({"states": ["RUNNING"]}, "is RUNNING; wait for it"),
    "queued": ({"states": ["QUEUED"]}, "is QUEUED; wait for it"),
    "failed": ({"states": ["ERROR"]}, "is ERROR; push it"),
    "cancelled": ({"states": ["CANCEL_ACKNOWLEDGED"]}, "push it"),
    "another commit": ({"commit": "0" * 12}, "commit is 000000000000 there"),
    "another configuration": (
        {"digest": "f" * 12}, "digest is ffffffffffff there"
    ),
    "a damaged manifest": ({"outputs": None, "stage": None}, "does not fit"),
    "never pushed": (None, f"01_data_prep has to run first, and {REF} is ABSENT; push it."),
    "no manifest": ({}, "left no 01_data_prep/manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", UPSTREAM)
def test_an_upstream_that_does_not_fit_is_one_sentence(name, kaggle, builds, here):
    planted, words = UPSTREAM[name]
    if planted is not None:
        plant_first(kaggle, builds, **planted)
    if name == "no manifest":
        kaggle.kernels[SLUG][0].files = {}
    assert REF in here("push", SECOND, code=2, words=words)
    assert kaggle.bodies("SaveKernel") == []


def test_too_little_quota_stops_a_gpu_stage_only(kaggle, here):
    kaggle.gpu_hours = (29.5, 30.0)
    words = "needs 1 GPU hours; 0.5 of 30 are left until 2026-11-28 00:00 UTC"
    here("push", THIRD, "--alone", code=3, words=words)
    assert kaggle.bodies("SaveKernel") == []
    here("push", FIRST)


@pytest.mark.parametrize("answer", [(500, "", {}), (403, "", {}), {}, HTML])
def test_a_quota_that_cannot_be_read_is_a_warning(answer, kaggle, here):
    kaggle.planted["GetAcceleratorQuotaStatistics"] = [answer] * ALWAYS
    here("push", THIRD, "--alone", words="warning: Cannot look at the GPU quota")


# --- waiting --------------------------------------------------------------------------------------


def walk(kaggle, *states, failure=None) -> None:
    """What the next pushed version goes through."""
    before = kaggle.run

    def run(slug, version):
        before(slug, version)
        version.walk, version.failure = list(states), failure

    kaggle.run = run


WALKS = {
    "ERROR": (("QUEUED", "RUNNING", "ERROR"), (), 1, "version 1 failed: out of memory"),
    "cancelled": (("CANCEL_REQUESTED",), (), 1, "ended in the state CANCEL_REQUESTED"),
    "a new script": (("NEW_SCRIPT", "RUNNING", "COMPLETE"), (), 0, ""),
    "an unknown state": (("PAUSED",), (), 4, "KeyError: 'PAUSED'"),
    "unknown for a moment": (("PAUSED", "RUNNING", "COMPLETE"), (), 0, ""),
    "too long": (("RUNNING",), ("--deadline", "0.005"), 5, "is RUNNING after 0.005 minutes"),
}


@pytest.mark.parametrize("name", WALKS)
def test_every_end_of_a_kernel_has_its_code(name, kaggle, here):
    states, args, code, words = WALKS[name]
    walk(kaggle, *states, failure="out of memory" if "ERROR" in states else None)
    here("push", FIRST)
    out = here("wait", FIRST, *args, code=code, words=words)
    if name == "ERROR":
        shown = [line for line in out.splitlines() if line.startswith("  ")]
        assert shown == [f"  line {n}" for n in range(40, 140)]
        assert "ERROR out of memory" in here("status", FIRST, code=1)


def test_single_polls_may_fail_and_not_too_many(kaggle, here):
    walk(kaggle, *["RUNNING"] * 4, "COMPLETE")
    here("push", FIRST)
    faults = [(500, "", {}), None, (404, "", {}), stub_kaggle.HANG_UP, None, HTML]
    kaggle.planted["GetKernelSessionStatus"] = list(faults)
    here("wait", FIRST)
    kaggle.planted["GetKernelSessionStatus"] = [(503, "", {})] * ALWAYS
    here("wait", FIRST, code=4, words="answers 503")


def test_the_version_just_pushed_is_the_one_that_is_followed(kaggle, here):
    """The one before has failed and is still shown as the latest."""
    walk(kaggle, "ERROR")
    here("push", FIRST)
    walk(kaggle, "RUNNING", "RUNNING", "COMPLETE")
    here("push", FIRST)
    kaggle.behind = 1
    assert "ERROR" not in here("wait", FIRST, words="version 2: RUNNING")


def test_nothing_is_followed_that_was_not_pushed(kaggle, here):
    for verb in ("wait", "fetch"):
        here(verb, FIRST, code=2, words="was not pushed")
    assert kaggle.calls == []


def test_status_shows_each_stage(here):
    here("push", FIRST)
    first, second, *_ = here("status").splitlines()
    assert first == f"01_data_prep: {REF}/1 QUEUED"
    assert "agaonker/atlas-02-template-audit ABSENT" in second


# --- killed ---------------------------------------------------------------------------------------


@pytest.fixture
def started(clone, builds, kaggle, tmp_path):
    """Start a chain as a process."""

    def start(*stages: str, **env: str) -> subprocess.Popen:
        args = ["-m", "tools.kernels", *command(builds, tmp_path, "chain", *stages)[1:]]
        env = {"PATH": os.environ["PATH"]} | environment(kaggle, tmp_path) | env
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *args], cwd=clone, env=env, **pipes)

    return start


def kill(process: subprocess.Popen, seen) -> None:
    """End it the hard way as soon as `seen()` holds."""
    while not seen():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()


def test_a_chain_that_was_killed_goes_on_and_pushes_nothing_twice(
    builds, kaggle, started, here, tmp_path
):
    def run(slug, version):
        finish(builds, slug, version)
        version.walk = ["COMPLETE"] if slug == SLUG else ["RUNNING"]

    def second_is_awaited() -> bool:
        asked = {body["kernelSlug"] for body in kaggle.bodies("GetKernelSessionStatus")}
        return "atlas-02-template-audit" in asked

    kaggle.run = run
    kill(started(FIRST, SECOND), second_is_awaited)
    kaggle.kernels["atlas-02-template-audit"][0].walk = ["RUNNING", "COMPLETE"]
    here("chain", FIRST, SECOND)
    assert len(kaggle.bodies("SaveKernel")) == 2
    assert (tmp_path / "runs" / SECOND / "manifest.json").is_file()


def test_a_push_that_was_killed_before_its_answer_is_found(kaggle, started, here):
    kaggle.planted["SaveKernel"] = [stub_kaggle.SAVED_SILENTLY]
    kill(started(FIRST), lambda: kaggle.kernels)
    here("chain", FIRST, words="pushed as version 1")
    assert len(kaggle.bodies("SaveKernel")) == 1


def test_a_version_that_failed_or_was_deleted_is_pushed_again_by_the_chain(kaggle, here):
    good = kaggle.run
    walk(kaggle, "ERROR")
    here("chain", FIRST, code=1)
    kaggle.run = good
    here("chain", FIRST, words="pushed as version 2")
    kaggle.kernels.clear()
    here("chain", FIRST, words="pushed as version 1")
    assert len(kaggle.bodies("SaveKernel")) == 3


# --- fetching -------------------------------------------------------------------------------------


def leak(version, name: str, text: str) -> None:
    version.files[name] = text.encode()


FETCHED = {
    "no manifest": (
        lambda v: v.files.pop(f"{FIRST}/manifest.json"), "left no 01_data_prep/manifest.json"
    ),
    "another file": (
        lambda v: v.files.update({f"{FIRST}/rows.jsonl": b"[]\n"}), "rows.jsonl is not the file"
    ),
    "a lost file": (lambda v: v.files.pop(f"{FIRST}/rows.jsonl"), "rows.jsonl is not the file"),
    "half a manifest": (
        lambda v: v.files.update({f"{FIRST}/manifest.json": b"{"}), "manifest.json is damaged"
    ),
    "a token in the page": (
        lambda v: leak(v, f"notebooks/{FIRST}.ipynb", TOKENS["hub"]), "looks like a key or token"
    ),
    "our key in a row": (
        lambda v: leak(v, f"{FIRST}/more.jsonl", f"x {stub_kaggle.KEY}"), "holds KAGGLE_KEY"
    ),
    "a name that climbs": (lambda v: leak(v, f"{FIRST}/../../../up", "x"), "outside destination"),
}  # fmt: skip


@pytest.mark.parametrize("name", FETCHED)
def test_a_result_that_is_wrong_is_one_sentence_and_stays_out(name, kaggle, here, tmp_path):
    plant, words = FETCHED[name]
    here("push", FIRST)
    plant(kaggle.kernels[SLUG][0])
    code = 2 if name == "a name that climbs" else 1
    assert stub_kaggle.KEY not in here("fetch", FIRST, code=code, words=words)
    assert not list((tmp_path / "runs").rglob("*"))


def test_an_output_that_is_refused_is_no_wrong_name(kaggle, here):
    """The client makes a ValueError of this one, which blames the kernel's name."""
    here("push", FIRST)
    kaggle.planted["ListKernelSessionOutput"] = [(403, {"message": "Denied"}, {})]
    here("fetch", FIRST, code=3, words="(403)")


def test_a_new_result_replaces_the_old_one(here, tmp_path):
    here("chain", FIRST)
    (tmp_path / "runs" / FIRST / "old").touch()
    (tmp_path / "runs" / "notebooks" / "other.ipynb").touch()
    here("fetch", FIRST)
    assert not (tmp_path / "runs" / FIRST / "old").exists()
    assert (tmp_path / "runs" / "notebooks" / "other.ipynb").exists()
    assert not list((tmp_path / "runs").glob(".*"))


# --- the adapter, which its kernel cannot push: a push detaches the secrets -----------------------


@pytest.fixture
def train(kaggle, builds, started, tmp_path):
    """Run notebook 03 of the recipe by a chain, with these variables: (lines, errors, the hub)."""
    about = {"config": load_config("sft_qwen05b").as_dict()}
    about["outputs"] = {"adapter/weights": hashlib.sha256(b"weights").hexdigest()}

    def finish_training(slug: str, version: stub_kaggle.Version) -> None:
        finish(builds, slug, version, **about)
        version.files[f"{THIRD}/adapter/weights"] = b"weights"

    kaggle.run = finish_training
    with stub_hub.serve() as hub:
        # The hub is reached without the proxy, at which the client finds Kaggle.
        env = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}

        def run(code: int = 0, **more: str) -> tuple[list[str], str]:
            process = started(THIRD, "--alone", **env | more)
            out, err = process.communicate()
            assert process.returncode == code, out + err
            assert stub_hub.TOKEN not in out + err
            assert (tmp_path / "runs" / THIRD / "adapter" / "weights").is_file()
            return out.splitlines(), err

        yield run, hub


def test_fetch_prints_the_upload_that_the_kernel_could_not_make(train, tmp_path):
    run, hub = train
    *_, told, upload = run()[0]
    assert told.startswith("Hub: off (no HF_TOKEN)")
    assert hub.requests == []
    token = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": stub_hub.TOKEN, "HF_HUB_DISABLE_XET": "1"}
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    subprocess.run(shlex.split(upload), env=token | paths, check=True, capture_output=True)
    assert hub.files == {"alice/atlas-sft-qwen05b-v2": {"weights": b"weights"}}
    assert hub.private == {"alice/atlas-sft-qwen05b-v2": True}


def test_with_a_token_of_its_own_fetch_makes_the_upload(train):
    run, hub = train
    assert run(HF_TOKEN=stub_hub.TOKEN)[0][-1].startswith("Hub: pushed to ")
    assert hub.files == {"alice/atlas-sft-qwen05b-v2": {"weights": b"weights"}}


def test_a_token_that_the_hub_refuses_is_one_sentence_and_the_results_stay(train):
    run, hub = train
    hub.plant("bad token")
    assert "The hub refuses HF_TOKEN" in sentence(run(2, HF_TOKEN=stub_hub.TOKEN)[1])


# --- secrets --------------------------------------------------------------------------------------


def test_no_secret_leaves_the_authorization_header(clone, builds, kaggle, started, tmp_path):
    canaries = {
        "KAGGLE_API_TOKEN": "KGAT_canary" + "0" * 24,
        "HF_TOKEN": "hf_canary" + "1" * 30,
        "WANDB_API_KEY": "canary" + "2" * 34,
        "KAGGLE_KEY": stub_kaggle.KEY,
    }
    done = build(clone, FIRST, "--out-folder", builds, **canaries)
    assert done.returncode == 0
    walk(kaggle, "RUNNING", "ERROR", failure=f"401 for {canaries['HF_TOKEN']}")
    process = started(FIRST, VERBOSE="1", **canaries)
    shown = process.communicate()
    assert (process.returncode, "401 for ***" in shown[1]) == (1, True)
    assert "DEBUG" not in shown[1]  # the client's verbose output has headers and signed addresses
    assert (builds / FIRST / "pushed.json").is_file()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    texts = [done.stdout, done.stderr, *shown]
    texts += [path.read_bytes().decode(errors="replace") for path in files]
    # a token is introspected by Kaggle itself: there alone it is part of a body
    texts += [text for text in kaggle.texts if '"token"' not in text]
    for value in canaries.values():
        assert not any(value in text for text in texts)
    assert kaggle.authorizations == {f"Bearer {canaries['KAGGLE_API_TOKEN']}"}


def test_help_shows_the_exit_codes(clone, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        kernels.main()
    out = capsys.readouterr().out
    assert all(f"\n  {code}  " in out for code in range(6))
