"""A throw-away PgBouncer in transaction mode, in front of an EmbeddedServer.

    with EmbeddedServer() as server, PgBouncer(server) as bouncer:
        psycopg.connect(bouncer.conninfo(dbname="postgres"), prepare_threshold=None)

It is the one of Debian's package ``pgbouncer``: installed on this machine, or unpacked by ``fetch``
into the user's cache directory. Nothing is downloaded unless ``fetch`` is called, and nothing is
ever installed or started as a service::

    python -m proof.pgbouncer fetch

PgBouncer refuses to run as root; started by root it runs as the account that runs the server then.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import click
import psycopg
from psycopg.conninfo import make_conninfo

# How a server is kept apart from root, and swept up when its owner is killed, is the same here.
from arbiter_db.demo.embedded import (
    _WATCHER,
    EmbeddedServer,
    _Account,
    _cache_directory,
    _free_port,
    _last_lines,
)

__all__ = ["PgBouncer", "PgBouncerError", "fetch", "find"]

PACKAGE = "pgbouncer"
SYSTEM = Path("/usr/sbin/pgbouncer")

START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 10.0
APT_TIMEOUT_S = 300.0

#: Who may log in. Trust is enough: the socket's directory is its owner's, as the server's is.
USERS = ("postgres", "app_owner", "authenticator")

_CONFIG = """\
[databases]
* = host={server_host} port={server_port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir = {directory}
pidfile = {directory}/pgbouncer.pid
auth_type = trust
auth_file = {directory}/users.txt
admin_users = postgres
pool_mode = transaction
max_client_conn = 1000
default_pool_size = {pool_size}
; A server that was down is asked again at once: the next client is not told of the last failure.
server_login_retry = 0.05
query_wait_timeout = 30
log_connections = 0
log_disconnections = 0
{more}
"""


class PgBouncerError(Exception):
    """PgBouncer is missing, or cannot be fetched or started; the message says what to do."""


def _cache() -> Path:
    return _cache_directory().parent / "pgbouncer"


def _run(
    *command: str | Path, cwd: Path | None = None, libraries: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    try:
        return subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=APT_TIMEOUT_S,
        )
    except FileNotFoundError as error:
        raise PgBouncerError(
            f"{command[0]} is needed to fetch PgBouncer: install the package {PACKAGE} yourself"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise PgBouncerError(f"{command[0]} took over {APT_TIMEOUT_S:g} s") from error


def find() -> Path:
    """Return the binary on this machine; raise PgBouncerError when there is none."""
    candidates = [Path(found)] if (found := shutil.which("pgbouncer")) else []
    for path in (*candidates, SYSTEM, _cache() / "pgbouncer"):
        if path.is_file():
            return path
    raise PgBouncerError(
        "there is no PgBouncer on this machine: python -m proof.pgbouncer fetch (with"
        f" PYTHONPATH=tests), or install the package {PACKAGE}"
    )


# -------------------------------------------------------------------------------------- fetching


def fetch() -> Path:
    """Make sure that PgBouncer is there, unpacking Debian's packages if it is not.

    The package, and of its dependencies those with shared libraries that this machine misses, go to
    the user's cache directory. Raises PgBouncerError when there is no such package here.
    """
    with contextlib.suppress(PgBouncerError):
        return find()
    target = _cache()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        work = Path(scratch)
        made, libraries = work / "made", work / "made" / "lib"
        libraries.mkdir(parents=True)
        (package,) = _download([PACKAGE], work)
        binary = made / "pgbouncer"
        shutil.copy2(_unpack(package, work) / "usr/sbin/pgbouncer", binary)
        wanted = [PACKAGE]
        while missing := _missing(binary, libraries):
            wanted = _dependencies(wanted)
            if not wanted:
                raise PgBouncerError(f"shared libraries are missing: {', '.join(sorted(missing))}")
            for package in _download(wanted, work):
                for path in _unpack(package, work).rglob("*.so*"):
                    if any(path.name.startswith(name) for name in missing):
                        shutil.copy2(path, libraries / path.name)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # else another process fetched it meanwhile
                raise
    return find()


def _download(packages: Iterable[str], work: Path) -> list[Path]:
    """Get packages with apt, reading the lists of packages first when there are none."""
    before = set(work.glob("*.deb"))
    # Without it, apt tries to become a user who may not write here, and complains.
    command = ("apt-get", "download", "-o", "APT::Sandbox::User=root", *packages)
    done = _run(*command, cwd=work)
    if done.returncode != 0 and os.geteuid() == 0:
        update = _run("apt-get", "update", cwd=work)
        if update.returncode != 0:
            raise PgBouncerError(f"apt-get update failed: {_last_lines(update.stderr)}")
        done = _run(*command, cwd=work)
    if done.returncode != 0:
        raise PgBouncerError(
            f"apt-get download failed, install the package {PACKAGE} or run apt-get update:"
            f" {_last_lines(done.stderr)}"
        )
    return sorted(set(work.glob("*.deb")) - before)


def _unpack(package: Path, work: Path) -> Path:
    target = work / package.stem
    done = _run("dpkg-deb", "-x", package, target)
    if done.returncode != 0:
        raise PgBouncerError(f"dpkg-deb failed: {_last_lines(done.stderr)}")
    return target


def _missing(binary: Path, libraries: Path) -> set[str]:
    listed = _run("ldd", binary, libraries=libraries).stdout
    return set(re.findall(r"(\S+) => not found", listed))


def _dependencies(packages: Iterable[str]) -> list[str]:
    """The libraries that packages depend on, but for the C library, which is this machine's."""
    listed = _run("apt-cache", "depends", "--important", *packages).stdout
    names = set(re.findall(r"Depends: (lib\S+)", listed))
    return sorted(name for name in names if not name.startswith("libc6"))


# --------------------------------------------------------------------------------------- running


class PgBouncer:
    """One PgBouncer in transaction mode for all databases of ``server``, thrown away at the end.

    It listens on a unix socket in a directory of its own, and on 127.0.0.1 (any user of this
    machine may then log in). ``pool_size`` is the number of connections it opens for each pair of
    database and user. Raises PgBouncerError when there is no PgBouncer on this machine.

    One thread at a time may start and stop it.

    Attributes: ``host`` (the socket's directory) and ``port``; ``pid`` (None when not running);
    ``log_file``; ``version``.
    """

    def __init__(self, server: EmbeddedServer, *, pool_size: int = 20) -> None:
        self.server = server
        self.pool_size = pool_size
        self.version = ""
        self.port = 0
        self._binary = find()
        self._account = _Account.choose()
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._owner_pid = os.getpid()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def host(self) -> str:
        """The directory of the unix socket."""
        return str(self._place)

    @property
    def log_file(self) -> Path:
        """What PgBouncer writes to its log."""
        return self._place / "pgbouncer.log"

    @property
    def pid(self) -> int | None:
        """The process id, None when it is not running."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    def conninfo(
        self, dbname: str = "postgres", user: str = "postgres", *, tcp: bool = False
    ) -> str:
        """A libpq connection string: over the socket, or over 127.0.0.1 with ``tcp=True``.

        A client must not prepare statements (``prepare_threshold=None``).
        """
        host = "127.0.0.1" if tcp else self.host
        return make_conninfo("", host=host, port=self.port, dbname=dbname, user=user)

    def start(self) -> None:
        """Start it and wait until it accepts clients, whether or not the server does."""
        if self.pid is not None:
            return
        if self._directory is None:
            self._create()
        for left in (self._place / "pgbouncer.pid", self._place / f".s.PGSQL.{self.port}"):
            left.unlink(missing_ok=True)  # of one that was killed
        arguments = self._account.popen_arguments(self._place)
        arguments["env"]["LD_LIBRARY_PATH"] = str(self._place / "lib")
        with self.log_file.open("ab") as log:
            process = self._process = subprocess.Popen(
                [self._place / "pgbouncer", self._place / "pgbouncer.ini"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **arguments,
            )
        self._tell_watcher(str(process.pid))
        # Its own console answers even while the server is down.
        console = make_conninfo(self.conninfo("pgbouncer"), connect_timeout=2)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(console, autocommit=True).close()
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                problem = f"ended with status {process.wait(timeout=0.01)}"
                break
            if time.monotonic() > deadline:
                self.kill()
                problem = f"did not accept clients within {START_TIMEOUT_S:g} s"
                break
        raise PgBouncerError(
            f"PgBouncer {problem}; its log ends: {_last_lines(self.log_file.read_text())}"
        )

    def kill(self) -> None:
        """End it at once, as a crash would: all its clients lose their connections.

        ``start()`` starts it again at the same place.
        """
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(timeout=STOP_TIMEOUT_S)
            self._tell_watcher("none")

    def close(self) -> None:
        """End it and remove what it has on disk. Harmless when repeated."""
        if self._directory is None or os.getpid() != self._owner_pid:
            return
        atexit.unregister(self.close)
        try:
            self.kill()
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
            self._tell_watcher("done")

    @property
    def _place(self) -> Path:
        if self._directory is None:
            raise PgBouncerError("this PgBouncer is not started")
        return self._directory

    def _create(self) -> None:
        """Make the directory, with a copy of the binary: its account may not reach the cache."""
        atexit.register(self.close)
        # Beside the server's own, which is short enough for a socket and within reach.
        parent = Path(self.server.host).parent
        place = self._directory = Path(tempfile.mkdtemp(prefix="arbiter-pgb-", dir=parent))
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHER, "arbiter-pgb", str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **self._account.popen_arguments(Path("/")),
        )
        shutil.copy2(self._binary, place / "pgbouncer")
        libraries = self._binary.parent / "lib"
        if self._binary.parent == _cache() and libraries.is_dir():
            shutil.copytree(libraries, place / "lib")
        told = _run(place / "pgbouncer", "--version", libraries=place / "lib").stdout
        found = re.search(r"PgBouncer (\d+)\.(\d+)", told, re.IGNORECASE)
        if found is None:
            raise PgBouncerError(f"PgBouncer in {self._binary} does not say its version: {told!r}")
        self.version = f"{found[1]}.{found[2]}"
        # Prepared statements of clients are none of a pooler's business here; older ones know none.
        old = (int(found[1]), int(found[2])) < (1, 21)
        self.port = _free_port()
        (place / "pgbouncer.ini").write_text(
            _CONFIG.format(
                server_host=self.server.host,
                server_port=self.server.port,
                port=self.port,
                directory=place,
                pool_size=self.pool_size,
                more="" if old else "max_prepared_statements = 0",
            )
        )
        (place / "users.txt").write_text("".join(f'"{user}" ""\n' for user in USERS))
        paths = [place, *place.rglob("*")]
        self._account.own(*paths)

    def _tell_watcher(self, word: str) -> None:
        watcher = self._watcher
        if watcher is None or watcher.stdin is None:
            return
        with contextlib.suppress(OSError):  # somebody killed it: then there is nobody to tell
            watcher.stdin.write(f"{word}\n".encode())
            watcher.stdin.flush()
        if word == "done":
            with contextlib.suppress(OSError):
                watcher.stdin.close()
            watcher.wait(timeout=STOP_TIMEOUT_S)
            self._watcher = None


# ---------------------------------------------------------------------------------- command line


@click.group(help="A throw-away PgBouncer for the tests.")
def _cli() -> None:
    pass


@_cli.command("fetch", help="Unpack Debian's PgBouncer, unless one is on this machine already.")
def _fetch() -> None:
    try:
        click.echo(f"PgBouncer: {fetch()}")
    except PgBouncerError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    _cli(prog_name="python -m proof.pgbouncer")
