"""From a build to its results: push one version, follow that version, fetch and check its files."""

import contextlib
import dataclasses
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, sources
from atlas_lib.schema import Config
from atlas_lib.stages import STAGES
from atlas_lib.train import hub
from tools import leaks
from tools.kaggle import bundle, errors
from tools.kaggle.errors import Problem
from tools.kaggle.service import Connection

FETCHED = r"^(0\d_\w+|notebooks)/|^metrics\.json$"
PUSHED = "pushed.json"  # beside a build
LOG_LINES = 100  # shown of a kernel that failed
GPU_HOURS = 1.0  # of quota that a stage with a GPU needs
RUNNING = ("QUEUED", "RUNNING", "NEW_SCRIPT")
FAILED = ("ERROR", "CANCEL")  # how the states begin in which a kernel ends without a result


def push_record(folder: Path) -> dict[str, Any]:
    """Name, version, commit and configuration digest of what was pushed last, if anything was."""
    with contextlib.suppress(OSError, ValueError):
        return artifacts.read_json(folder / PUSHED)
    return {}


def known_version(folder: Path) -> dict[str, Any]:
    """The record of the last push. Raises ValueError if there is none."""
    record = push_record(folder)
    if not record:
        raise ValueError(f"{folder.name} was not pushed from {folder}; push it first.")
    return record


def push_version(kaggle: Connection, folder: Path, build: dict[str, Any], alone: bool) -> None:
    """Push a build, unless Kaggle runs it or has completed it. Raises Problem or ValueError."""
    stage, metadata = folder.name, bundle.kernel_metadata(folder.name, alone)
    ref, user = metadata["id"], kaggle.api.config_values.get("username", "")
    owner = ref.partition("/")[0]
    if owner.lower() != user.lower():
        raise ValueError(
            f"{ref} does not belong to the account {user}; set KAGGLE_USERNAME to its name."
        )

    impatient, record = dataclasses.replace(kaggle, retries=0), push_record(folder)

    def push_once() -> int:
        # It asks first, since the answer to an earlier attempt may have been lost.
        version = version_of_build(impatient, build, metadata, record)
        return version or impatient.save(folder, ref)

    version = version_of_build(kaggle, build, metadata, record)
    if not version:
        for need in () if alone else STAGES[stage].needs:
            require_upstream(kaggle, need, bundle.kernel_id(owner, need), build)
        if metadata["enable_gpu"]:
            require_quota(kaggle, stage)
        artifacts.write_json(folder / bundle.METADATA, metadata)
        version = kaggle.ask(f"push {ref}", push_once)
    record = {"name": f"{ref}/{version}", "version": version}
    record |= {"commit": build["commit"], "digest": build["digests"][stage]}
    artifacts.write_json(folder / PUSHED, record)
    leaks.log(f"{stage}: pushed as version {version}, https://www.kaggle.com/code/{ref}")


def version_of_build(
    kaggle: Connection, build: dict[str, Any], metadata: dict[str, Any], record: dict[str, Any]
) -> int:
    """The newest version of a kernel if it is of this build and has not failed, else 0.

    Raises ValueError if another one, or the one in `record`, still runs.
    """
    ref = metadata["id"]
    version, source, attached = kaggle.newest(ref)
    same = build["id"] in source and set(attached) == set(metadata["kernel_sources"])
    name = f"{ref}/{version}"
    if record.get("name", "").startswith(f"{ref}/") and record["version"] > version:
        name, same = record["name"], False  # Kaggle does not show the newest one yet
    state, _ = kaggle.state(name) if name != f"{ref}/0" else ("ABSENT", "")
    if state in RUNNING and not same:
        raise ValueError(
            f"{name} is {state}, and a second one would use up quota, too; wait for it, or stop it "
            f"at https://www.kaggle.com/code/{ref}."
        )
    return version if same and not state.startswith(FAILED) else 0


def require_upstream(kaggle: Connection, stage: str, ref: str, build: dict[str, Any]) -> None:
    """Refuse unless the kernel to attach is complete and of the same build. Raises ValueError."""
    state, _ = kaggle.state(ref)
    if state != "COMPLETE":
        fix = "wait for it" if state in RUNNING else "push it"
        raise ValueError(f"{stage} has to run first, and {ref} is {state}; {fix}.")
    with tempfile.TemporaryDirectory() as part:
        kaggle.download(ref, rf"^{stage}/{artifacts.MANIFEST}$", Path(part))
        for fault in manifest_faults(Path(part) / stage, build["commit"], build["digests"][stage]):
            raise ValueError(f"{ref} does not fit: {fault}; push {stage} again.")


def require_quota(kaggle: Connection, stage: str) -> None:
    """Refuse if too few GPU hours are left; if Kaggle does not tell, log a warning."""
    try:
        left, total, until = dataclasses.replace(kaggle, retries=1).quota_left()
    except Problem as problem:
        leaks.log(f"warning: {problem}")
        return
    if left < GPU_HOURS:
        hours = f"{left:.1f} of {total:g} are left until {until}"
        raise Problem(errors.REFUSED, f"{stage} needs {GPU_HOURS:g} GPU hours; {hours}.")


def follow(kaggle: Connection, folder: Path, record: dict[str, Any]) -> None:
    """Wait for the end of the pushed version and log its states. Raises Problem."""
    what, started, logged = f"{folder.name} version {record['version']}", time.time(), ""
    while True:
        state, failure = kaggle.state(record["name"])  # ABSENT for a moment after the push
        minutes = (time.time() - started) / 60
        if state != logged:
            left = kaggle.minutes - minutes
            leaks.log(f"{what}: {state}, {minutes:.1f} min so far, {left:.0f} min to the deadline")
            logged = state
        if state == "COMPLETE":
            return
        if state.startswith(FAILED):
            show_log(kaggle, record["name"])
            reason = f"failed: {failure}" if failure else f"ended in the state {state}"
            raise Problem(errors.KERNEL_FAILED, f"{what} {reason}.")
        if minutes + kaggle.poll / 60 > kaggle.minutes:
            raise Problem(
                errors.DEADLINE,
                f"{what} is {state} after {kaggle.minutes:g} minutes and continues at Kaggle until "
                "the --deadline of its push; run the same command again.",
            )
        time.sleep(kaggle.poll)


def show_log(kaggle: Connection, name: str) -> None:
    """Log the last lines that a kernel printed; `kaggle kernels logs` shows all of them."""
    try:
        lines = kaggle.log_lines(name)[-LOG_LINES:]
    except Problem as problem:
        lines = [f"warning: {problem}"]
    leaks.log("\n".join(["last lines of the log:", *(f"  {line}" for line in lines)]))


def fetch_results(kaggle: Connection, folder: Path, record: dict[str, Any], out: Path) -> None:
    """Download the pushed version's results, check them and move them to `out`. Raises Problem."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".fetch-") as name:
        part = Path(name)
        kaggle.download(record["name"], FETCHED, part)
        faults = manifest_faults(part / folder.name, record["commit"], record["digest"])
        for fault in itertools.chain(faults, file_faults(part)):
            raise Problem(
                errors.KERNEL_FAILED, f"No file was kept: {fault}; fetch or push the stage again."
            )
        for path in part.iterdir():
            target = out / path.name
            if path.name == "notebooks":  # it holds those of other stages, too
                shutil.copytree(path, target, dirs_exist_ok=True)
            elif path.suffix != ".log":  # written by Kaggle's client; the notebook shows the same
                shutil.rmtree(target, ignore_errors=True)
                path.replace(target)
    leaks.log(f"{folder.name}: the results of version {record['version']} are in {out}")
    if (out / folder.name / "adapter").is_dir():
        upload_adapter(out / folder.name)


def upload_adapter(folder: Path) -> None:
    """Push a fetched adapter to the Hub, or print how to; its kernel had no secrets to do so."""
    config = Config.model_validate(artifacts.read_manifest(folder)["config"])
    adapter = folder / "adapter"
    hub.push_adapter(adapter, hub.preflight(config, adapter), config)


def manifest_faults(folder: Path, commit: str, digest: str) -> Iterator[str]:
    """Why a stage's folder is not the result at this commit and configuration digest."""
    here = {"stage": folder.name, "commit": commit, "digest": digest}
    try:
        manifest = artifacts.read_manifest(folder)
    except OSError:
        yield f"the kernel left no {folder.name}/{artifacts.MANIFEST}"
    except ValueError:
        yield f"its {artifacts.MANIFEST} is damaged or written by another version of Atlas"
    else:
        for key in (key for key in here if manifest.get(key) != here[key]):
            yield f"its {key} is {manifest.get(key)} there and {here[key]} here"


def file_faults(folder: Path) -> Iterator[str]:
    """Files that do not match their manifest, or that hold a secret."""
    for manifest in folder.glob(f"*/{artifacts.MANIFEST}"):
        for name, recorded in artifacts.read_manifest(manifest.parent)["outputs"].items():
            path = manifest.parent / name
            if not path.is_file() or sources.sha256(path) != recorded:
                yield f"{path.relative_to(folder)} is not the file that its manifest names"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        # Rows and responses may mention keys; only a notebook or a log would show ours.
        known_only = path.suffix not in (".ipynb", ".log")
        if found := leaks.finding(path.read_bytes().decode(errors="replace"), known_only):
            yield f"{path.relative_to(folder)} holds {found}"


def push_and_fetch(
    kaggle: Connection, folder: Path, build: dict[str, Any], alone: bool, out: Path
) -> None:
    """Push, follow and fetch; a version of this build that runs or is complete is kept."""
    push_version(kaggle, folder, build, alone)
    record = known_version(folder)
    follow(kaggle, folder, record)
    fetch_results(kaggle, folder, record, out)
