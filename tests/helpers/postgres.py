"""A PostgreSQL server of one's own: in a temporary folder, on a free port, with a password."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

PASSWORD = "pg-secret-9f2c"


def programs() -> Path | None:
    """The folder of initdb and pg_ctl: on PATH, or where Debian puts them; None: not here."""
    found = shutil.which("initdb")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    places += [Path(found).parent] if found else []
    return next((p for p in places if (p / "initdb").is_file() and (p / "pg_ctl").is_file()), None)


def _as_user() -> list[str]:
    """The server refuses to be root's."""
    return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] * (os.geteuid() == 0)


def _call(*command: object) -> None:
    given = [*_as_user(), *map(str, command)]
    # Files, not pipes: the server would keep a pipe open after pg_ctl has ended.
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(given, cwd="/", stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        said.seek(0)
        assert done.returncode == 0, said.read()


class Server(NamedTuple):
    url: str
    restart: Callable[[], None]  # as after a crash: connections are cut, nothing is flushed first


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """A running server; it is stopped and removed afterwards."""
    home = Path(tempfile.mkdtemp(prefix="atlas-postgres-"))
    secret, data, binaries = home / "password", home / "data", programs()
    secret.write_text(PASSWORD)
    if os.geteuid() == 0:
        for path in (home, secret):
            shutil.chown(path, "nobody", "nogroup")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={home}"
    try:
        _call(binaries / "initdb", "-D", data, "-U", "atlas", "-A", "scram-sha-256",
              "--pwfile", secret, "-E", "UTF8", "--no-sync")  # fmt: skip
        control = (binaries / "pg_ctl", "-D", data, "-l", home / "log", "-w", "-o", options)
        _call(*control, "start")
        yield Server(
            f"postgresql://atlas:{PASSWORD}@127.0.0.1:{port}/postgres",
            lambda: _call(*control, "-m", "immediate", "restart"),
        )
    finally:
        with contextlib.suppress(AssertionError):
            _call(binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(home, ignore_errors=True)
