"""From a built folder to a result: push one version, wait for that version, fetch and check it."""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from atlas_lib import artifacts
from tools import leaks
from tools.kaggle import bundle, errors, service
from tools.kaggle.errors import Problem, say
from tools.kaggle.service import Session

FETCHED = r"^(0\d_\w+|notebooks)/|^metrics\.json$"
LOG_LINES = 30  # of a kernel that failed
FAILED_LOG = "failed.log"
SILENCE = 300.0  # seconds after which an unchanged state is told again


def pushed(folder: Path) -> dict[str, Any]:
    """What pushed.json says; without a version, the push was begun and its answer never seen."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / bundle.PUSHED).read_bytes())
    return {}


def version_of(folder: Path) -> dict[str, Any]:
    """pushed.json of a folder whose version is known. Raises ValueError."""
    record = pushed(folder)
    if not record.get("version"):
        raise ValueError(f"{folder.name} was not pushed from {folder}; push it first.")
    return record


def checked(folder: Path, allow_dirty: bool) -> dict[str, Any]:
    """build.json of a folder that may be pushed now. Raises ValueError."""
    build = bundle.guard(folder)
    commit, _ = bundle.head()
    if build["commit"] != commit:
        raise ValueError(
            f"{folder} was built from commit {build['commit'][:12]} and this is {commit[:12]}; "
            "build it again."
        )
    if build["dirty"] and not allow_dirty:
        raise ValueError(
            f"{folder} was built with uncommitted changes; commit and build, or say --allow-dirty."
        )
    return build


def push(session: Session, folder: Path, build: dict[str, Any], hours: float, alone: bool) -> None:
    """Send the folder, after asking whether it can work. Raises Problem."""
    with _folder_to_send(folder, alone) as sent:
        metadata = json.loads((sent / bundle.METADATA).read_bytes())
        ref = metadata["id"]
        if ref.partition("/")[0].lower() != session.user.lower():
            raise ValueError(
                f"{ref} does not belong to {session.user or 'this account'}; build again with "
                "KAGGLE_USERNAME set to the account's name."
            )
        for stage in () if alone else build["needs"]:
            require_upstream(session, stage, build, folder.parent / stage)
        if metadata["enable_gpu"]:
            require_quota(session, folder.name, hours)
        record = send(session, sent, folder, _identity(build, metadata))
    record |= {"commit": _commit(build), "digest": build["digests"][folder.name]}
    artifacts.write_json(folder / bundle.PUSHED, record)
    say(f"{folder.name}: pushed as version {record['version']}, {record['url']}")


@contextlib.contextmanager
def _folder_to_send(folder: Path, alone: bool) -> Iterator[Path]:
    """The folder itself, or a copy with nothing attached."""
    if not alone:
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        path = Path(shutil.copy2(folder / bundle.METADATA, copy))
        metadata = json.loads(path.read_bytes()) | {"kernel_sources": []}
        artifacts.write_json(path, metadata)
        shutil.copy2(folder / bundle.NOTEBOOK, copy)
        yield Path(copy)


def _identity(build: dict[str, Any], metadata: dict[str, Any]) -> list:
    """What makes two pushes the same one."""
    return [build["notebook_sha256"], metadata["id"], metadata["kernel_sources"]]


def send(session: Session, sent: Path, folder: Path, identity: list) -> dict[str, Any]:
    """Push once and only once: an answer that got lost is looked for before it is asked again."""
    page = json.loads((sent / bundle.NOTEBOOK).read_bytes())
    sources = ["".join(cell["source"]) for cell in page["cells"]]
    _, ref, attached = identity
    earlier = record = pushed(folder)
    lost = record.get("build") == identity and not record.get("version")
    if not lost:
        before = service.call(session, f"look at {ref}", lambda: service.latest(session, ref))[0]
        record = {"ref": ref, "build": identity, "before": before}
        artifacts.write_json(folder / bundle.PUSHED, record)

    def once() -> tuple[int, str]:
        nonlocal lost
        if lost:
            version, there, kernels = service.latest(session, ref)
            if version > record["before"] and there == sources and kernels == set(attached):
                return version, service.address(ref)
        lost = True
        return service.save(session, sent, ref)

    try:
        version, url = service.call(session, f"push {ref}", once)
    except Problem as problem:
        if problem.code != errors.OUT_OF_ORDER:  # refused: there is no answer to look for
            artifacts.write_json(folder / bundle.PUSHED, earlier if earlier.get("version") else {})
        raise
    return record | {"version": version, "url": url, "when": f"{datetime.now(UTC):%FT%TZ}"}


def require_upstream(session: Session, stage: str, build: dict[str, Any], folder: Path) -> None:
    """The kernel that is attached is complete, and of the same commit and configuration."""
    ref = build["needs"][stage]
    record = pushed(folder)
    version = record.get("version") if record.get("ref") == ref else None
    try:
        found, _ = service.call(
            session, f"look at {ref}", lambda: service.state(session, ref, version)
        )
    except Problem as problem:
        if problem.status not in service.ABSENT:
            raise
        raise ValueError(f"{stage} comes first, and {ref} is not there: push it.") from None
    if found != "COMPLETE":
        fix = "wait for it" if found in ("QUEUED", "RUNNING") else "push it again"
        raise ValueError(f"{stage} comes first, and {ref} is {found}: {fix}.")
    with tempfile.TemporaryDirectory() as part:
        _download(session, ref, version, rf"^{stage}/{artifacts.MANIFEST}$", Path(part))
        try:
            check_manifest(Path(part) / stage, stage, build["digests"][stage], _commit(build))
        except Problem as problem:
            raise ValueError(f"{ref} does not fit: {problem}") from None


def _commit(build: dict[str, Any]) -> str:
    return bundle.short(build["commit"], build["dirty"])


def _download(session: Session, ref: str, version: int | None, pattern: str, part: Path) -> None:
    what = f"fetch the output of {ref}"
    service.call(session, what, lambda: service.download(session, ref, version, pattern, part))


def check_manifest(folder: Path, stage: str, digest: str, commit: str) -> dict[str, Any]:
    """The manifest of a result of this build. Raises Problem."""
    if not (folder / artifacts.MANIFEST).is_file():
        raise Problem(
            errors.KERNEL_FAILED, f"The kernel of {stage} left no {stage}/{artifacts.MANIFEST}."
        )
    try:
        manifest = artifacts.read_manifest(folder)
    except ValueError:
        raise Problem(
            errors.KERNEL_FAILED, f"{stage}'s manifest is damaged; run it again."
        ) from None
    for what, there, here in (
        ("stage", manifest["stage"], stage),
        ("commit", manifest.get("commit"), commit),
        ("configuration", manifest.get("config_digest"), digest),
    ):
        if there != here:
            raise Problem(
                errors.KERNEL_FAILED,
                f"The result of {stage} is of another {what}: {there} there and {here} here; push "
                "it again.",
            )
    return manifest


def require_quota(session: Session, stage: str, hours: float) -> None:
    """Enough GPU hours are left. A look-up that fails is told and stops nothing."""
    try:
        left, total, until = service.quota_left(session)
    except Problem as problem:
        say(f"warning: {problem}")
        return
    if left < hours:
        raise Problem(
            errors.REFUSED,
            f"{stage} needs {hours:g} GPU hours; {left:.1f} of {total:g} are left until {until}.",
        )


def wait(session: Session, folder: Path) -> None:
    """Follow the pushed version to its end, telling each change of state. Raises Problem."""
    record, started, told, spoken = version_of(folder), time.time(), "", 0.0
    ref, version = record["ref"], record["version"]
    what = f"{folder.name} version {version}"
    while True:
        found, failure = service.call(
            session, f"look at {what}", lambda: _state(session, ref, version)
        )
        now = time.time()
        if found != told or now - spoken > SILENCE:
            minutes, left = (now - started) / 60, (session.deadline - now) / 60
            say(f"{what}: {found}, {minutes:.1f} min so far, {left:.0f} min to the deadline")
            told, spoken = found, now
        if found == "COMPLETE":
            return
        if found == "ERROR":
            show_log(session, ref, version, folder)
            raise Problem(
                errors.KERNEL_FAILED, f"{what} failed{f': {failure}' if failure else ''}."
            )
        if found.startswith("CANCEL"):
            raise Problem(errors.KERNEL_FAILED, f"{what} was cancelled ({found}).")
        if now + session.poll > session.deadline:
            raise Problem(
                errors.DEADLINE,
                f"{what} is {found} after {session.minutes:g} minutes; it goes on at Kaggle: type "
                "the same again, or give a longer --deadline.",
            )
        time.sleep(session.poll)


def _state(session: Session, ref: str, version: int) -> tuple[str, str]:
    """Its state; a version just pushed may not be known for a moment."""
    try:
        return service.state(session, ref, version)
    except Exception as error:
        problem = errors.explain(f"look at {ref} version {version}", error)
        problem.code = errors.OUT_OF_ORDER if problem.status == 404 else problem.code
        raise problem from None


def show_log(session: Session, ref: str, version: int, folder: Path) -> None:
    """The last lines of what the kernel printed; all of them go into the folder's failed.log."""
    try:
        lines = service.call(
            session, "fetch the log", lambda: service.log(session, ref, version), retries=1
        )
    except Problem as problem:
        say(f"warning: {problem}")
        return
    artifacts.write_lines(folder / FAILED_LOG, map(errors.without_secrets, lines))
    say("\n".join(["the last lines of its log:", *(f"  {line}" for line in lines[-LOG_LINES:])]))


def fetch(session: Session, folder: Path, out: Path) -> None:
    """Bring the pushed version's results into `out`, every file checked first. Raises Problem."""
    record = version_of(folder)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".fetch-") as name:
        part = Path(name)
        _download(session, record["ref"], record["version"], FETCHED, part / "new")
        check_manifest(part / "new" / folder.name, folder.name, record["digest"], record["commit"])
        check_files(part / "new")
        for log in (part / "new").glob("*.log"):
            log.unlink()  # named by Kaggle's client after the kernel; the page has it too
        count = sum(path.is_file() for path in (part / "new").rglob("*"))
        for number, path in enumerate(sorted((part / "new").iterdir())):
            _replace(path, out / path.name, part / f"old{number}")
    say(f"{folder.name}: {count} files of version {record['version']} are in {out}, checked")


def check_files(folder: Path) -> None:
    """Every file that a manifest names has its hash, and none holds a secret. Raises Problem."""
    for manifest in folder.glob(f"*/{artifacts.MANIFEST}"):
        for file, digest in artifacts.read_manifest(manifest.parent)["outputs"].items():
            path = manifest.parent / file
            if not path.is_file() or artifacts.sha256(path) != digest:
                raise Problem(
                    errors.KERNEL_FAILED,
                    f"{path.relative_to(folder)} is not the file that its manifest names; fetch it "
                    "again, or push the stage again.",
                )
    for path in (path for path in folder.rglob("*") if path.is_file()):
        # Answers and rows may well talk of keys; only a page or a log would show one of ours.
        known_only = path.suffix not in (".ipynb", ".log")
        text = path.read_bytes().decode(errors="replace")
        try:
            leaks.refuse(str(path.relative_to(folder)), text, known_only)
        except ValueError as error:
            raise Problem(errors.KERNEL_FAILED, f"Nothing was kept: {error}") from None


def _replace(new: Path, target: Path, aside: Path) -> None:
    """Put a file or a stage's folder in its place; the page folder keeps other stages' pages."""
    if target.name == "notebooks":
        target.mkdir(exist_ok=True)
        for page in new.iterdir():
            page.replace(target / page.name)
        return
    if target.exists():
        target.rename(aside)
    new.rename(target)


def chain(
    session: Session, folder: Path, build: dict, hours: float, alone: bool, out: Path
) -> None:
    """Push, wait, fetch; a version of this same build that runs or is complete is not pushed."""
    metadata = json.loads((folder / bundle.METADATA).read_bytes())
    identity = _identity(build, metadata | ({"kernel_sources": []} if alone else {}))
    record = pushed(folder)
    same = record.get("build") == identity and record.get("version")
    if not (same and _goes_on(session, folder)):
        push(session, folder, build, hours, alone)
    wait(session, folder)
    fetch(session, folder, out)


def _goes_on(session: Session, folder: Path) -> bool:
    """Whether the pushed version runs or is complete."""
    record = pushed(folder)
    ref, version = record["ref"], record["version"]
    try:
        found, _ = service.call(
            session, f"look at {ref}", lambda: service.state(session, ref, version)
        )
    except Problem as problem:
        if problem.status not in service.ABSENT:
            raise
        found = "DELETED"
    say(f"{folder.name}: version {version} of this build is {found}")
    return not found.startswith(("ERROR", "CANCEL", "DELETED"))
