"""The cloud worker's helper, on a real server: when it may go on, and when it must not."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest
from sessions import TIMEOUT_S, wait_until_blocked

import arbiter_db
from arbiter_db import Machine

if TYPE_CHECKING:
    from conftest import Database

ADA = UUID("ada00000-0000-4000-8000-000000000001")
ADAS_MACHINE = UUID("ada00000-0000-4000-8000-0000000000c1")

#: Default settings: heartbeat_timeout 30 s less the default margin of 5 s.
WINDOW_S = 25.0

STORED = "select last_health_check from public.cloud_machines"
LOCK = "select from public.cloud_machines for update"

Connection = psycopg.Connection[Any]


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Losses:
    """An `on_loss` that counts."""

    def __init__(self) -> None:
        self._happened = threading.Semaphore(0)
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        self._happened.release()

    def wait(self) -> None:
        """Wait for one more call."""
        assert self._happened.acquire(timeout=TIMEOUT_S), "on_loss was not called"


class Connector:
    """A `connect` that remembers what it opened."""

    def __init__(self, conninfo: str, **kw: Any) -> None:
        self._conninfo = conninfo
        self._kw = kw
        self.opened: list[Connection] = []

    def __call__(self) -> Connection:
        self.opened.append(psycopg.connect(self._conninfo, **self._kw))
        return self.opened[-1]


@pytest.fixture
def owner(db: Database) -> Connection:
    """The owner's connection to a database with one running machine."""
    conn = db.connect()
    people = Path(arbiter_db.__file__).parent / "demo" / "people.sql"
    conn.execute(people.read_text(encoding="utf-8"))
    conn.execute(
        "insert into public.cloud_machines (id, user_id, status) values (%s, %s, 'running')",
        (ADAS_MACHINE, ADA),
    )
    return conn


@pytest.fixture
def connect(db: Database, owner: Connection) -> Iterator[Connector]:
    """Connections for a machine. When the test is over, no thread and no connection is left."""
    connector = Connector(db.conninfo())
    yield connector
    assert machine_threads() == []
    assert [conn for conn in connector.opened if not conn.closed] == []


@pytest.fixture
def short_settings(owner: Connection) -> None:
    owner.execute(
        "update arbiter.settings"
        " set heartbeat_interval = '100 milliseconds', heartbeat_timeout = '600 milliseconds'"
    )


MARGIN = timedelta(milliseconds=200)


def machine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("arbiter ")]


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(TIMEOUT_S / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen")


def in_a_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_it_may_execute_from_the_first_heartbeat_to_the_stop(connect: Connector) -> None:
    losses = Losses()
    machine = Machine(connect, ADAS_MACHINE, on_loss=losses)
    assert not machine.may_execute()
    with machine:
        assert machine.may_execute()
        assert len(machine_threads()) == 2
    assert not machine.may_execute()
    assert machine_threads() == []
    assert losses.count == 0  # a stop is no loss


def test_a_heartbeat_is_committed_and_returns_what_was_stored(
    db: Database, owner: Connection
) -> None:
    with Machine(Connector(db.conninfo(), autocommit=False), str(ADAS_MACHINE)) as machine:
        stored = machine.beat_now()
        assert owner.execute(STORED).fetchone() == (stored,)


def test_it_stops_a_margin_before_the_timeout(connect: Connector) -> None:
    clock = Clock()
    with Machine(connect, ADAS_MACHINE, clock=clock) as machine:
        clock.advance(WINDOW_S)
        assert machine.may_execute()
        clock.advance(0.001)
        assert not machine.may_execute()


def test_margin_is_the_callers_choice(connect: Connector) -> None:
    clock = Clock()
    with Machine(connect, ADAS_MACHINE, clock=clock, margin=timedelta(seconds=20)) as machine:
        clock.advance(10)
        assert machine.may_execute()
        clock.advance(0.001)
        assert not machine.may_execute()


def test_changed_settings_count_from_the_next_heartbeat(
    connect: Connector, owner: Connection
) -> None:
    clock = Clock()
    with Machine(connect, ADAS_MACHINE, clock=clock) as machine:
        owner.execute("update arbiter.settings set heartbeat_timeout = '1 minute'")
        machine.beat_now()
        clock.advance(55)
        assert machine.may_execute()


def test_age_counts_from_the_heartbeats_begin(connect: Connector, db: Database) -> None:
    clock = Clock()
    with db.session(name="app") as app, Machine(connect, ADAS_MACHINE, clock=clock) as machine:
        app.run("begin")
        app.run(LOCK)
        clock.advance(10)
        beating = in_a_thread(machine.beat_now)
        wait_until_blocked(connect.opened[0])
        clock.advance(10)  # while the heartbeat is under way
        app.run("commit")
        beating.join(TIMEOUT_S)

        clock.advance(WINDOW_S - 10)
        assert machine.may_execute()
        clock.advance(0.001)
        assert not machine.may_execute()


def test_a_loss_is_reported_once_and_again_after_a_recovery(connect: Connector) -> None:
    clock, losses = Clock(), Losses()
    with Machine(connect, ADAS_MACHINE, clock=clock, on_loss=losses) as machine:
        for count in (1, 2):
            clock.advance(WINDOW_S + 1)
            assert [machine.may_execute() for _ in range(3)] == [False] * 3
            losses.wait()
            assert losses.count == count
            machine.beat_now()
            assert machine.may_execute()
    assert losses.count == 2


def test_an_unnoticed_loss_is_reported_with_the_next_heartbeat(connect: Connector) -> None:
    clock, losses = Clock(), Losses()
    with Machine(connect, ADAS_MACHINE, clock=clock, on_loss=losses) as machine:
        clock.advance(WINDOW_S + 1)  # as after a suspend: the first to run is the heartbeat
        machine.beat_now()
        losses.wait()
        assert machine.may_execute()
    assert losses.count == 1


def test_a_heartbeat_that_came_back_too_late_is_no_recovery(
    connect: Connector, db: Database
) -> None:
    clock, losses = Clock(), Losses()
    with db.session(name="app") as app:
        with Machine(connect, ADAS_MACHINE, clock=clock, on_loss=losses) as machine:
            app.run("begin")
            app.run(LOCK)
            beating = in_a_thread(machine.beat_now)
            wait_until_blocked(connect.opened[0])
            clock.advance(WINDOW_S + 1)
            assert not machine.may_execute()
            losses.wait()  # while the heartbeat hangs
            app.run("commit")
            beating.join(TIMEOUT_S)
            assert not machine.may_execute()
        assert losses.count == 1


@pytest.mark.usefixtures("short_settings")
def test_heartbeats_go_on_by_themselves(connect: Connector, owner: Connection) -> None:
    with Machine(connect, ADAS_MACHINE, margin=MARGIN) as machine:
        seen = {owner.execute(STORED).fetchone()}

        def three_more() -> bool:
            seen.add(owner.execute(STORED).fetchone())
            return len(seen) > 3

        wait_until(three_more)
        assert machine.may_execute()
    assert len(connect.opened) == 1


@pytest.mark.usefixtures("short_settings")
def test_the_loss_is_reported_while_every_heartbeat_hangs(connect: Connector, db: Database) -> None:
    losses = Losses()
    app = db.session(name="app")
    with Machine(connect, ADAS_MACHINE, margin=MARGIN, on_loss=losses) as machine:
        app.run("begin")
        app.run(LOCK)
        losses.wait()  # no heartbeat came back, may_execute() was not called
        assert not machine.may_execute()
        app.run("commit")
        wait_until(machine.may_execute)


def stop_while_idle(owner: Connection, pid: int) -> None:
    """Stop a backend between two heartbeats: within one it would keep its locks."""

    def stopped_while_idle() -> bool:
        os.kill(pid, signal.SIGSTOP)
        stat = Path(f"/proc/{pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        row = owner.execute("select state from pg_stat_activity where pid = %s", (pid,)).fetchone()
        if row == ("idle",):
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    wait_until(stopped_while_idle)


@pytest.mark.usefixtures("short_settings")
def test_a_server_that_falls_silent_is_left_for_a_new_connection(
    connect: Connector, owner: Connection
) -> None:
    losses = Losses()
    with Machine(connect, ADAS_MACHINE, margin=MARGIN, on_loss=losses) as machine:
        silent = connect.opened[0].info.backend_pid
        try:
            stop_while_idle(owner, silent)  # as a network that swallows everything
            losses.wait()
            wait_until(lambda: len(connect.opened) > 1)
            wait_until(machine.may_execute)
        finally:
            os.kill(silent, signal.SIGCONT)
    assert connect.opened[0].closed


@pytest.mark.usefixtures("short_settings")
def test_a_lost_connection_is_replaced(
    connect: Connector, owner: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    with Machine(connect, ADAS_MACHINE, margin=MARGIN) as machine:
        # app_owner may end the sessions of app_owner.
        owner.execute("select pg_terminate_backend(%s)", (connect.opened[0].info.backend_pid,))
        wait_until(lambda: len(connect.opened) == 2)
        wait_until(machine.may_execute)
    assert connect.opened[0].closed
    assert "heartbeat failed" in caplog.text


@pytest.mark.usefixtures("short_settings")
def test_a_database_that_cannot_be_reached_is_tried_again(
    db: Database, owner: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    losses, attempts = Losses(), Losses()
    connector = Connector(db.conninfo())

    def connect() -> Connection:
        if 0 < attempts.count < 4:
            attempts()
            raise psycopg.OperationalError("no route")
        attempts()
        return connector()

    with Machine(connect, ADAS_MACHINE, margin=MARGIN, on_loss=losses) as machine:
        owner.execute("select pg_terminate_backend(%s)", (connector.opened[0].info.backend_pid,))
        for _ in range(5):
            attempts.wait()
        wait_until(machine.may_execute)
    assert caplog.text.count("no route") == 3


@pytest.mark.usefixtures("short_settings")
def test_the_server_gives_up_a_heartbeat_that_is_too_late(connect: Connector, db: Database) -> None:
    machine = Machine(connect, ADAS_MACHINE, margin=MARGIN)
    with db.session(name="app") as app:
        app.run("begin")
        app.run(LOCK)
        with pytest.raises(psycopg.errors.QueryCanceled):
            machine.beat_now()
    machine.stop()


def test_an_unknown_machine_is_an_error_at_the_start(connect: Connector) -> None:
    machine = Machine(connect, UUID(int=0))
    with pytest.raises(psycopg.errors.NoDataFound):
        machine.start()
    assert not machine.may_execute()


def test_a_margin_that_leaves_no_time_is_an_error_at_the_start(connect: Connector) -> None:
    machine = Machine(connect, ADAS_MACHINE, margin=timedelta(seconds=21))
    with pytest.raises(ValueError, match="margin"):
        machine.start()
    assert not machine.may_execute()


def test_an_exception_in_on_loss_is_logged_and_the_next_loss_reported(
    connect: Connector, caplog: pytest.LogCaptureFixture
) -> None:
    clock, losses = Clock(), Losses()

    def on_loss() -> None:
        losses()
        raise LookupError("no such exchange")

    with Machine(connect, ADAS_MACHINE, clock=clock, on_loss=on_loss) as machine:
        for _ in range(2):
            clock.advance(WINDOW_S + 1)
            assert not machine.may_execute()
            losses.wait()
            machine.beat_now()
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "no such exchange" in caplog.text


def test_stop_does_not_wait_for_a_heartbeat_that_hangs(connect: Connector, db: Database) -> None:
    with db.session(name="app") as app:
        machine = Machine(connect, ADAS_MACHINE)
        machine.start()
        app.run("begin")
        app.run(LOCK)
        raised: list[BaseException] = []

        def beat() -> None:
            try:
                machine.beat_now()
            except psycopg.OperationalError as exc:
                raised.append(exc)

        beating = in_a_thread(beat)
        wait_until_blocked(connect.opened[0])
        machine.stop()
        beating.join(TIMEOUT_S)
        assert len(raised) == 1


def test_on_loss_may_stop_the_machine(connect: Connector) -> None:
    clock, losses = Clock(), Losses()

    def on_loss() -> None:
        machine.stop()
        losses()

    machine = Machine(connect, ADAS_MACHINE, clock=clock, on_loss=on_loss)
    machine.start()
    clock.advance(WINDOW_S + 1)
    assert not machine.may_execute()
    losses.wait()
    wait_until(lambda: machine_threads() == [])


def test_a_machine_runs_once(connect: Connector) -> None:
    machine = Machine(connect, ADAS_MACHINE)
    with machine:
        with pytest.raises(RuntimeError):
            machine.start()
        assert machine.may_execute()
    with pytest.raises(RuntimeError):
        machine.start()
    with pytest.raises(RuntimeError):
        machine.beat_now()
    machine.stop()
