"""PostgreSQL servers that are kept from one test run to the next, so that a run starts at once.

A kept server belongs to a holder: a detached process that owns an ``EmbeddedServer`` and ends by
itself after IDLE_S without use. Servers are numbered for each major version; a run takes the first
number that no other run uses, and each worker of pytest-xdist takes one of its own.

In the user's cache directory, in a folder for this checkout, each number has two files:

``<major>-<number>.lock``   locked by the run that uses the server, touched when a run lets it go
``<major>-<number>.json``   locked by the holder as long as it lives; says how to reach the server

A run gets a server as it was right after its start: databases and sessions that an interrupted run
left are removed, and a server whose roles or settings have changed is replaced by a new one. The
templates of databases stay, under names that end with a hash of what they are made from.

    python tests/kept_server.py stop     # end those that no run uses
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

import psycopg
from psycopg import sql

from arbiter_db.demo import embedded, processes
from arbiter_db.demo.embedded import EmbeddedServer, EmbeddedServerError, find_installation

__all__ = ["IDLE_S", "KeptServer", "claim", "folder", "hold", "state_of", "stop"]

#: How long a holder waits for the next run.
IDLE_S = 30 * 60.0
#: How often it looks.
LOOK_EVERY_S = 2.0
#: How many servers of a version are kept at most.
MOST = 32
#: How long a holder may take to end before it is killed.
END_TIMEOUT_S = 20.0

#: The state of a server that all its databases share.
_STATE = """
select to_jsonb(a) - 'oid' from pg_authid a
union all
select jsonb_build_array('member', member::regrole, roleid::regrole, admin_option)
  from pg_auth_members
union all
select jsonb_build_array('set', setrole::regrole, setconfig) from pg_db_role_setting
 where setdatabase = 0
    or setdatabase in (select oid from pg_database where datname in ('postgres', 'template1'))
union all
select jsonb_build_array(source, name, setting) from pg_settings
 where source in ('configuration file', 'command line')
union all
select jsonb_build_array('tablespace', spcname) from pg_tablespace
union all
select jsonb_build_array('replication slot', slot_name) from pg_replication_slots
union all
select jsonb_build_array('prepared', gid) from pg_prepared_xacts
"""


class KeptServer(EmbeddedServer):
    """A server that a holder owns, for one run. It cannot be stopped: other runs want it."""

    def __init__(self, major: int, state: dict[str, Any], lock: IO[str], *, is_new: bool) -> None:
        super().__init__(major)
        self.version = state["version"]
        self.port = state["port"]
        self.bindir = Path(state["bindir"])
        self.is_new = is_new
        self._state = state
        self._lock = lock

    @property
    def host(self) -> str:
        return str(self._state["host"])

    @property
    def data_directory(self) -> Path:
        return Path(self._state["data_directory"])

    @property
    def log_file(self) -> Path:
        return Path(self._state["log_file"])

    @property
    def pid(self) -> int | None:
        return int(self._state["server_pid"])

    def start(self) -> None:
        """Nothing to do: it runs."""

    def stop(self) -> None:
        raise EmbeddedServerError("this server is kept for other runs: take one of your own")

    kill = stop

    def close(self) -> None:
        """Leave the server to the next run. Harmless when repeated."""
        if not self._lock.closed:
            os.utime(self._lock.name)
            self._lock.close()


# What a run does ---------------------------------------------------------------------------------


def folder() -> Path:
    """Where the files of this checkout's servers are."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    here = hashlib.sha256(os.fsencode(Path(__file__).resolve())).hexdigest()[:12]
    return base / "arbiter-db" / "test-servers" / here


def claim(major: int, setup: str, keep: str) -> KeptServer | None:
    """A server of that version for this run alone, until its ``close()``.

    ``setup`` is SQL that is run once on a new server. Template databases whose names end with
    ``keep`` stay; all other databases are dropped. Returns None when all numbers are in use or no
    holder can be started.
    """
    key = _key(major, setup)
    try:
        folder().mkdir(parents=True, exist_ok=True)
        for number in range(MOST):
            file = folder() / f"{major}-{number}.json"
            lock = _try_lock(file.with_suffix(".lock"))
            if lock is not None:
                with contextlib.ExitStack() as stack:
                    stack.callback(lock.close)
                    server = _take(file, major, key, setup, keep, lock)
                    stack.pop_all()
                    return server
    except (OSError, ValueError, psycopg.Error) as error:
        print(f"no server is kept: {error}", file=sys.stderr)
    return None


def _take(file: Path, major: int, key: str, setup: str, keep: str, lock: IO[str]) -> KeptServer:
    state = _read(file)
    if state is not None and state["key"] == key:
        with contextlib.suppress(psycopg.Error):
            server = KeptServer(major, state, lock, is_new=False)
            if _clean(server, keep):
                return server
    _end(file)
    server = KeptServer(major, _start(file, major, key), lock, is_new=True)
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        conn.execute(setup.encode())
        # It is noted on the server itself: a run that is interrupted before leaves no note.
        note = sql.Literal(_digest(server))
        conn.execute(sql.SQL("comment on database postgres is {}").format(note))
    return server


def _clean(server: KeptServer, keep: str) -> bool:
    """Remove what an interrupted run left; return whether the server is as it was at its start."""
    with psycopg.connect(server.conninfo(), autocommit=True, connect_timeout=5) as conn:
        conn.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where backend_type = 'client backend' and pid <> pg_backend_pid()"
        )
        found = conn.execute(
            "select datname, datistemplate from pg_database where datname <> all (%s)",
            (["postgres", "template0", "template1"],),
        ).fetchall()
        for name, is_template in found:
            if not (is_template and name.endswith(keep)):
                database = sql.Identifier(name)
                conn.execute(sql.SQL("alter database {} is_template false").format(database))
                conn.execute(sql.SQL("drop database {} with (force)").format(database))
        noted = conn.execute(
            "select shobj_description(oid, 'pg_database') from pg_database"
            " where datname = 'postgres'"
        ).fetchone()
        return noted == (_digest(server),)


def state_of(server: EmbeddedServer) -> list[str]:
    """The state that no test may leave changed: roles, settings, and all else that is shared."""
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        return sorted(str(row[0]) for row in conn.execute(_STATE.encode()))


def _digest(server: EmbeddedServer) -> str:
    return hashlib.sha256("\n".join(state_of(server)).encode()).hexdigest()


def _key(major: int, setup: str) -> str:
    """A hash of all that a server is made from."""
    installation = find_installation(major)
    parts = [
        Path(__file__).read_bytes(),
        Path(embedded.__file__).read_bytes(),
        Path(processes.__file__).read_bytes(),
        setup.encode(),
        repr(installation).encode(),
        str((installation.bindir / "postgres").stat().st_mtime_ns).encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _start(file: Path, major: int, key: str) -> dict[str, Any]:
    """Start a holder and wait until its server accepts connections."""
    with file.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "hold", str(file), str(major), key],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    with process:  # which forks and ends; the pipe stays open until the server is ready
        assert process.stdout is not None
        process.stdout.read()
    state = _read(file)
    if state is None:
        raise OSError(f"a holder did not start: {file.with_suffix('.log').read_text()[-2000:]}")
    return state


# What a holder does ------------------------------------------------------------------------------


def hold(file: Path, major: int, key: str) -> None:
    """Own a server until no run has used it for IDLE_S, or until SIGTERM."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lock = _try_lock(file)
    if lock is None:
        raise SystemExit(f"{file} has a holder already")
    use = file.with_suffix(".lock")
    with contextlib.ExitStack() as last, lock, EmbeddedServer(major) as server:
        state = {
            "key": key,
            "holder_pid": os.getpid(),
            "server_pid": server.pid,
            "version": server.version,
            "host": server.host,
            "port": server.port,
            "bindir": str(server.bindir),
            "data_directory": str(server.data_directory),
            "log_file": str(server.log_file),
        }
        lock.truncate(0)
        lock.write(json.dumps(state))
        lock.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # closes the pipe: the run goes on
        pause = threading.Event()
        while server.pid is not None and use.exists():
            pause.wait(LOOK_EVERY_S)
            if time.time() - use.stat().st_mtime > IDLE_S and (taken := _try_lock(use)):
                # No run may take a server that is about to go: released after all else.
                last.enter_context(taken)
                break


# Both --------------------------------------------------------------------------------------------


def _try_lock(file: Path) -> IO[str] | None:
    """Open a file and lock it, until it is closed; None when another process has locked it."""
    opened = file.open("a+", encoding="utf-8")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        return None
    return opened


def _read(file: Path) -> dict[str, Any] | None:
    """What a living holder says about its server; None when there is none."""
    lock = _try_lock(file)
    if lock is not None:
        lock.close()
        return None
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return state


def _end(file: Path) -> None:
    """End the holder, if there is one, and wait for its end."""
    pause = threading.Event()
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_TIMEOUT_S
        state = _read(file)
        if state is None:
            return
        os.kill(state["holder_pid"], number)  # its lock says that it lives
        while time.monotonic() < deadline:
            lock = _try_lock(file)
            if lock is not None:
                lock.close()
                return
            pause.wait(0.02)


def stop() -> None:
    """End all holders whose servers no run uses, and say so of the others."""
    for file in sorted(folder().glob("*.json")):
        lock = _try_lock(file.with_suffix(".lock"))
        if lock is None:
            print(f"in use: {file.stem}")
            continue
        with lock:
            if _read(file) is not None:
                _end(file)
                print(f"ended: {file.stem}")


def main(arguments: list[str]) -> None:
    if arguments == ["stop"]:
        stop()
    elif arguments[:1] == ["hold"]:
        if os.fork():  # so that the run has no child that it would have to wait for
            os._exit(0)
        hold(Path(arguments[1]), int(arguments[2]), arguments[3])
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
