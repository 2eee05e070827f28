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

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import click
import psycopg
from psycopg.conninfo import make_conninfo

from arbiter_db.demo.downloads import cache_directory, put, work_in
from arbiter_db.demo.embedded import EmbeddedServer
from arbiter_db.demo.processes import ChildProcess, run

__all__ = ["PgBouncer", "PgBouncerError", "fetch", "find"]

PACKAGE = "pgbouncer"
SYSTEM = Path("/usr/sbin/pgbouncer")

START_TIMEOUT_S = 15.0
APT_TIMEOUT_S = 300.0

#: Who may log in. Trust is enough, because the socket is its owner's, as the server's is.
USERS = ("postgres", "app_owner", "authenticator")

_CONFIG = """\
[databases]
* = host={server_host} port={server_port}

[pgbouncer]
listen_addr =
listen_port = {port}
unix_socket_dir = {directory}
unix_socket_mode = 0700
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
    return cache_directory() / "pgbouncer"


def _tool(*command: str | Path, cwd: Path | None = None, libraries: Path | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    return run(command, PgBouncerError, APT_TIMEOUT_S, cwd=cwd, env=environment)


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
    with work_in(target.parent) as work:
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
        put(made, target)
    return find()


def _download(packages: Iterable[str], work: Path) -> list[Path]:
    """Get packages with apt, reading the lists of packages first when there are none."""
    before = set(work.glob("*.deb"))
    # Without it, apt changes to a user who may not write here, and complains.
    command = ("apt-get", "download", "-o", "APT::Sandbox::User=root", *packages)
    try:
        _tool(*command, cwd=work)
    except PgBouncerError as error:
        if os.geteuid() != 0:
            advice = f"install the package {PACKAGE} or run apt-get update"
            raise PgBouncerError(f"{advice}: {error}") from error
        _tool("apt-get", "update", cwd=work)
        _tool(*command, cwd=work)
    return sorted(set(work.glob("*.deb")) - before)


def _unpack(package: Path, work: Path) -> Path:
    target = work / package.stem
    _tool("dpkg-deb", "-x", package, target)
    return target


def _missing(binary: Path, libraries: Path) -> set[str]:
    listed = _tool("ldd", binary, libraries=libraries)
    return set(re.findall(r"(\S+) => not found", listed))


def _dependencies(packages: Iterable[str]) -> list[str]:
    """The libraries that packages depend on, but for the C library, which is this machine's."""
    listed = _tool("apt-cache", "depends", "--important", *packages)
    names = set(re.findall(r"Depends: (lib\S+)", listed))
    return sorted(name for name in names if not name.startswith("libc6"))


# --------------------------------------------------------------------------------------- running


class PgBouncer(ChildProcess):
    """One PgBouncer in transaction mode for all databases of ``server``, thrown away at the end.

    It listens on a unix socket in a directory of its own. ``pool_size`` is the number of
    connections it opens for each pair of database and user. Raises PgBouncerError when there is no
    PgBouncer on this machine.

    One thread at a time may start and stop it.

    Attributes: ``host`` (the socket's directory) and ``port``; ``pid`` (None when not running);
    ``log_file``; ``version``.
    """

    def __init__(self, server: EmbeddedServer, *, pool_size: int = 20) -> None:
        super().__init__("PgBouncer", PgBouncerError, prefix="arbiter-pgb-", log="pgbouncer.log")
        self.server = server
        self.pool_size = pool_size
        self.version = ""
        self.port = 6432  # names the socket, in a directory of its own: no clash
        self._binary = find()

    @property
    def host(self) -> str:
        """The directory of the unix socket."""
        return str(self.directory)

    def conninfo(self, dbname: str = "postgres", user: str = "postgres") -> str:
        """A libpq connection string. A client must not prepare statements
        (``prepare_threshold=None``)."""
        return make_conninfo("", host=self.host, port=self.port, dbname=dbname, user=user)

    def _create(self) -> None:
        """Make the directory, with a copy of the binary: its account may not reach the cache."""
        # Beside the server's own, which is short enough for a socket and within reach.
        self._make_directories(Path(self.server.host).parent)
        place = self.directory
        shutil.copy2(self._binary, place / "pgbouncer")
        libraries = self._binary.parent / "lib"
        if self._binary.parent == _cache() and libraries.is_dir():
            shutil.copytree(libraries, place / "lib")
        told = _tool(place / "pgbouncer", "--version", libraries=place / "lib")
        found = re.search(r"PgBouncer (\d+)\.(\d+)", told, re.IGNORECASE)
        if found is None:
            raise PgBouncerError(f"PgBouncer in {self._binary} does not say its version: {told!r}")
        self.version = f"{found[1]}.{found[2]}"
        # Clients do not prepare statements here; older versions do not know the setting.
        old = (int(found[1]), int(found[2])) < (1, 21)
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
        self._account.own(*place.rglob("*"))

    def _run(self) -> None:
        for left in (self.directory / "pgbouncer.pid", self.directory / f".s.PGSQL.{self.port}"):
            left.unlink(missing_ok=True)  # of one that was killed
        self._launch(
            [self.directory / "pgbouncer", self.directory / "pgbouncer.ini"],
            {"LD_LIBRARY_PATH": str(self.directory / "lib")},
        )
        self._wait_until_ready(self._why_not_ready, START_TIMEOUT_S)

    def _why_not_ready(self) -> str:
        """That it takes no clients yet; nothing when it does, whether or not the server is up."""
        # Its own console answers even while the server is down.
        console = make_conninfo(self.conninfo("pgbouncer"), connect_timeout=2)
        try:
            psycopg.connect(console, autocommit=True).close()
        except psycopg.OperationalError:
            return f"did not accept clients within {START_TIMEOUT_S:g} s"
        return ""


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
