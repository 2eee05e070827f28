"""Two-session tests by named steps: sessions that run statements in threads of their own, and a
way to wait until one of them is blocked. Nothing here sleeps to let something happen: the only
pause is the one between two looks at ``pg_stat_activity``, and every wait ends.

    with db.session() as a, db.session() as b:
        a.run("begin")
        a.run("update t set n = 1")
        waiting = b.start("update t set n = 2")
        wait_until_blocked(b)
        a.run("commit")
        assert waiting.result(TIMEOUT_S).rowcount == 1
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.rows import class_row

__all__ = [
    "TIMEOUT_S",
    "Activity",
    "Result",
    "Session",
    "orders",
    "wait_until_blocked",
    "watch_with",
]

#: How long anything here waits before it fails the test.
TIMEOUT_S = 20.0

#: The pause between two looks at pg_stat_activity.
LOOK_EVERY_S = 0.005

Params = Sequence[Any] | Mapping[str, Any] | None

_ACTIVITY = """
select pid, application_name, usename::text as username, state, wait_event_type, wait_event, query,
       pg_blocking_pids(pid) as blocked_by
  from pg_stat_activity
 where backend_type = 'client backend' and pid <> pg_backend_pid() and datname is not null
 order by pid
"""


class Result(list[tuple[Any, ...]]):
    """The rows of a statement (empty if it returns none), with its ``rowcount`` and ``status``."""

    def __init__(self, cursor: psycopg.Cursor[Any]) -> None:
        super().__init__(cursor.fetchall() if cursor.description else [])
        self.rowcount = cursor.rowcount
        self.status = cursor.statusmessage or ""


@dataclass(frozen=True)
class Activity:
    """A backend as another session sees it; ``blocked_by`` are the process ids it waits for."""

    pid: int
    application_name: str
    username: str | None
    state: str | None
    wait_event_type: str | None
    wait_event: str | None
    query: str
    blocked_by: list[int]

    @property
    def is_blocked(self) -> bool:
        """Waits for a lock, or in ``pg_sleep``, which is how arbiter waits for a drain."""
        return self.state == "active" and (
            self.wait_event_type == "Lock" or self.wait_event == "PgSleep"
        )


class Session:
    """A connection with a thread of its own. The connection is closed with the session.

    Statements run one after the other, in the order in which they were started.
    """

    def __init__(self, conn: psycopg.Connection[Any], name: str = "session") -> None:
        self.conn = conn
        self.name = name
        self.pid = conn.info.backend_pid
        self.last: Future[Result] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Session {self.name}, backend {self.pid}>"

    def start(self, sql: str, params: Params = None) -> Future[Result]:
        """Start a statement and return at once; ``.result(TIMEOUT_S)`` gives rows or raises."""
        self.last = self._executor.submit(lambda: Result(self.conn.execute(sql, params)))
        return self.last

    def run(self, sql: str, params: Params = None, timeout: float = TIMEOUT_S) -> Result:
        """Run a statement and wait for its end, at most ``timeout`` seconds (TimeoutError)."""
        return self.start(sql, params).result(timeout)

    def close(self) -> None:
        """End the connection, also while a statement runs. Harmless when repeated."""
        if self.last is not None and not self.last.done():
            # A connection must not be closed under the thread that uses it: end its backend.
            with _watcher() as conn:
                conn.execute("select pg_terminate_backend(%s)", (self.pid,))
        self._executor.shutdown(wait=True, cancel_futures=True)
        self.conn.close()


_watch_conninfo: str | None = None


def watch_with(conninfo: str | None) -> None:
    """Say how ``wait_until_blocked`` connects (as a superuser, to see what everybody does)."""
    global _watch_conninfo
    _watch_conninfo = conninfo


def _watcher() -> psycopg.Connection[tuple[Any, ...]]:
    if _watch_conninfo is None:
        raise RuntimeError("call watch_with first; the fixtures in conftest.py do")
    conninfo = make_conninfo(_watch_conninfo, application_name="watcher")
    return psycopg.connect(conninfo, autocommit=True)


def wait_until_blocked(
    target: Session | psycopg.Connection[Any] | int, timeout: float = TIMEOUT_S
) -> Activity:
    """Wait until that backend waits for a lock or in ``pg_sleep``; return what it was seen doing.

    ``target`` is a session, a connection, or a backend's process id. Raises AssertionError, with
    all activity seen last, when the statement ends without having blocked or after ``timeout``
    seconds.
    """
    last: Future[Result] | None = None
    if isinstance(target, Session):
        pid, last = target.pid, target.last
    elif isinstance(target, int):
        pid = target
    else:
        pid = target.info.backend_pid
    pause = threading.Event()
    deadline = time.monotonic() + timeout
    with _watcher() as conn, conn.cursor(row_factory=class_row(Activity)) as cur:
        while True:
            ended = last is not None and last.done()  # before the look: it may end right after it
            seen = cur.execute(_ACTIVITY).fetchall()
            for activity in seen:
                if activity.pid == pid and activity.is_blocked:
                    return activity
            problem = ""
            if ended and last is not None:
                problem = f"its statement ended: {last.exception() or last.result()!r}"
            elif time.monotonic() > deadline:
                problem = f"not within {timeout:g} s"
            if problem:
                lines = "\n".join(f"  {activity}" for activity in seen) or "  nothing"
                raise AssertionError(f"backend {pid} did not block, {problem}; activity:\n{lines}")
            pause.wait(LOOK_EVERY_S)


def orders(*sequences: tuple[str, ...]) -> Iterator[list[str]]:
    """All ways to merge the sequences, each of which keeps its own order."""
    rest = [s for s in sequences if s]
    if not rest:
        yield []
    for n, (first, *others) in enumerate(rest):
        for tail in orders(*rest[:n], tuple(others), *rest[n + 1 :]):
            yield [first, *tail]
