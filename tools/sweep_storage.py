"""Where a study lives, a journal file or PostgreSQL, and locks that end with their holder."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

ASK = -1  # the lock beside the trials' numbers that makes asking one worker's business at a time


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[Any]:
    """The locked file, or None if another process holds it and `wait` is false.

    A child that is given the file's descriptor keeps the lock if this process is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield file


class JournalLock:
    """Ends with its holder; Optuna's own stalls everybody for 30 s when the holder is killed."""

    def __init__(self, journal: Path) -> None:
        self.journal, self.held = journal, contextlib.ExitStack()

    def acquire(self) -> bool:
        self.held.enter_context(file_lock(self.journal.with_suffix(".lock")))
        _cut_torn_line(self.journal)
        return True

    def release(self) -> None:
        self.held.close()


def _cut_torn_line(journal: Path) -> None:
    """Remove what a machine that went down left of a half-written last line."""
    with journal.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if not end or (file.seek(end - 1), file.read(1))[1] == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def open_storage(url: str, folder: Path) -> optuna.storages.BaseStorage:
    """The journal file in `folder`, or PostgreSQL by URL. Raises ValueError or ConnectionError."""
    if not url:
        folder.mkdir(parents=True, exist_ok=True)
        journal = folder / "journal.log"
        backend = JournalFileBackend(str(journal), lock_obj=JournalLock(journal))
        return optuna.storages.JournalStorage(backend)
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise ValueError(
            f"--storage is {scheme!r}; give a postgresql:// URL, or nothing for a file."
        )
    import sqlalchemy.exc

    try:  # a connection that the server dropped is noticed and opened anew
        return optuna.storages.RDBStorage(
            f"postgresql+psycopg://{rest}", engine_kwargs={"pool_pre_ping": True}
        )
    except sqlalchemy.exc.OperationalError as error:
        reason = " ".join(str(error.orig).split())
        raise ConnectionError(f"PostgreSQL does not answer ({reason}); check --storage.") from None


def locks(storage: Any, study: optuna.Study, folder: Path) -> Callable:
    """`held(number, wait)`: a context with a file if this process holds lock `number`, else None.

    Local processes exclude each other by files. With PostgreSQL, machines do by advisory locks too.
    """

    def on_this_machine(number: int, wait: bool = False) -> Any:
        return file_lock(folder / "leases" / f"{'ask' if number == ASK else number}.lock", wait)

    if not isinstance(storage, optuna.storages.RDBStorage):
        return on_this_machine

    @contextlib.contextmanager
    def everywhere(number: int, wait: bool = False) -> Iterator[Any]:
        with on_this_machine(number, wait) as file, contextlib.ExitStack() as stack:
            held = file and stack.enter_context(
                _advisory_lock(storage.engine, study._study_id, number, wait)
            )
            yield file if held else None

    return everywhere


@contextlib.contextmanager
def _advisory_lock(engine: Any, study_id: int, number: int, wait: bool) -> Iterator[bool]:
    """PostgreSQL's lock of a session: the server frees it when this process or machine is gone."""
    import sqlalchemy

    function = "pg_advisory_lock" if wait else "pg_try_advisory_lock"
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for name, value in {"idle": 30, "interval": 10, "count": 3}.items():
            connection.execute(sqlalchemy.text(f"SET tcp_keepalives_{name} = {value}"))
        got = connection.execute(
            sqlalchemy.text(f"SELECT {function}(:study, :number)"),
            {"study": study_id, "number": number},
        ).scalar()
        try:
            yield got is not False  # the waiting one returns nothing
        finally:
            connection.invalidate()  # closes the session, and the lock with it
