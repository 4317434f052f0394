"""The offline pipeline on three sets of versions: the pins, Kaggle's image, the newest of today.

Versions and figures of each are printed and kept in build/drift.json.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import twin

from atlas_lib import artifacts, bootstrap

ROOT = twin.ROOT
DRIFT = ROOT / "build" / "drift.json"
# torch is the same in all sets, so what differs comes from the libraries above it. Rows and labels
# may not move at all. Losses and shares may by rounding, which three epochs amplify, and by the few
# of 242 prompts that stand on the edge; measured, the three sets agreed in all four digits shown.
EXACT = ("rows", "tokens", "supervised", "labels")
TOLERANCE = {"loss": 0.01, "share": 0.02}


def pinned(folder: Path) -> Path:
    return Path(sys.executable)


def image(folder: Path) -> Path:
    """Kaggle's image and what our bootstrap installs there."""
    python = twin.kaggle_session(folder / "venv")
    env = twin.environment(folder / "home", KAGGLE_KERNEL_RUN_TYPE="Batch")
    twin.run(python, "-c", "from atlas_lib import bootstrap; bootstrap.ensure()", cwd=ROOT, env=env)
    return python


def newest(folder: Path) -> Path:
    """The pins, upgraded to today's newest of everything that pyproject.toml names."""
    python = twin.copied(Path(sys.prefix), folder / "venv")
    held = folder / "held.txt"
    held.write_text("\n".join(bootstrap.held()), "utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [d for d in project["dependencies"] if not d.startswith(bootstrap.UNTOUCHABLE)]
    twin.run(python, "-m", "pip", "install", "-q", "-U", "-c", held, *wanted)
    return python


def run_offline(python: Path, folder: Path) -> dict:
    """Versions and figures of one whole offline run in a HOME of its own."""
    env, out = twin.environment(folder / "home"), folder / "out"
    command = [python, "-m", "tools.run", "--overlay", "offline", "--out", out]
    twin.run(*command, cwd=ROOT, env=env)
    audit = json.loads((out / "02_template_audit" / "summary.json").read_bytes())
    trained = json.loads((out / "03_sft_train" / "summary.json").read_bytes())
    rows = artifacts.read_jsonl(out / "02_template_audit" / "sft_template_audit.jsonl")
    figures = {"rows": audit["rows_ok"], "tokens": audit["n_tokens"]}
    figures |= {"supervised": audit["n_supervised"], "labels": [r["labels_sha256"] for r in rows]}
    figures |= {key: trained[key] for key in ("first_loss", "last_loss", "validation_loss")}
    for row in json.loads((out / "metrics.json").read_bytes()):
        name = f"{row['model']} {row['format']}"
        figures[f"{name} strict share"] = row["prompt_level_strict_acc"]
        figures[f"{name} EOS rate"] = row["eos_rate"]
    manifest = artifacts.read_manifest(out / "04_ifeval_eval")
    return {"versions": manifest["versions"], "figures": figures}


def too_far(here: dict, there: dict) -> list[str]:
    """Figures of `here` that differ from those of `there` by more than they may."""
    found = [key for key in EXACT if here[key] != there[key]]
    for key in here.keys() - set(EXACT):
        allowed = TOLERANCE["loss" if key.endswith("loss") else "share"]
        if abs(here[key] - there[key]) > allowed:
            found.append(key)
    return sorted(found)


@pytest.mark.slow
@pytest.mark.network
def test_the_results_do_not_depend_on_versions(tmp_path):
    sets, failed = {}, ""
    for environment in (pinned, image, newest):
        folder = tmp_path / environment.__name__
        folder.mkdir()
        try:
            sets[environment.__name__] = run_offline(environment(folder), folder)
        except AssertionError as error:
            if environment is not newest:
                raise
            failed = f"today's newest versions do not work: {str(error)[-500:]}"
        shutil.rmtree(folder)
    for found in sets.values():
        found["too far"] = too_far(found["figures"], sets["pinned"]["figures"])
    for found in sets.values():
        del found["figures"]["labels"]
    artifacts.write_json(DRIFT, sets)
    print(json.dumps(sets, indent=1))
    assert sets["image"]["too far"] == []
    if failed or sets["newest"]["too far"]:  # a release of tomorrow is reported and blocks nobody
        pytest.xfail(failed or f"today's newest versions move {sets['newest']['too far']}")


FIGURES = dict.fromkeys(EXACT, 1) | {"last_loss": 1.0, "SFT chat strict share": 0.5}


@pytest.mark.parametrize(
    ("moved", "found"),
    [({"last_loss": 1.009}, []), ({"last_loss": 1.011}, ["last_loss"]), ({"tokens": 2}, ["tokens"]),
     ({"SFT chat strict share": 0.47}, ["SFT chat strict share"])],
)  # fmt: skip
def test_a_drift_that_is_too_far_is_found(moved, found):
    assert too_far(FIGURES | moved, FIGURES) == found


@pytest.mark.parametrize(("source", "fine"), [(None, True), ('x = "\\d"\n', False)])
def test_all_sources_are_python_313_without_a_warning(source, fine, tmp_path):
    """Kaggle's Python; a planted warning is found."""
    interpreter = sys.executable if sys.version_info[:2] == (3, 13) else shutil.which("python3.13")
    env = os.environ | {"PYENV_VERSION": "3.13", "PYTHONPYCACHEPREFIX": str(tmp_path / "cache")}
    if not interpreter or subprocess.run([interpreter, "-V"], env=env).returncode:
        pytest.skip("NOT TESTED: there is no Python 3.13, which Kaggle has, on this machine")
    folders = ["atlas_lib", "tools", "notebooks", "tests", "benchmarks"]
    if source:
        (tmp_path / "planted.py").write_text(source, "utf-8")
        folders = [str(tmp_path / "planted.py")]
    command = [interpreter, "-W", "error", "-m", "compileall", "-q", *folders]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == fine, done.stdout
