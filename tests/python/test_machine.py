"""The cloud worker's helper, on a real server: when it may go on, and when it must not."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest
from sessions import TIMEOUT_S, wait_until_blocked

import arbiter_db
from arbiter_db import Machine

if TYPE_CHECKING:
    from conftest import Database

ADA = "ada00000-0000-4000-8000-000000000001"
ADAS_MACHINE = "ada00000-0000-4000-8000-0000000000c1"

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
    machine = Machine(connect, str(UUID(int=0)))
    with pytest.raises(psycopg.errors.NoDataFound):
        machine.start()
    assert not machine.may_execute()


def test_a_machine_that_is_called_unhealthy_stops_before_the_browser_may_write(
    owner: Connection, connect: Connector
) -> None:
    owner.execute(
        "alter table public.cloud_machines add probe text default 'bad';"
        "select arbiter.register_machines('public.cloud_machines',"
        " p_health_column => 'probe', p_healthy => '{good}')"
    )
    clock = Clock()
    machine = Machine(connect, ADAS_MACHINE, margin=timedelta(seconds=5), clock=clock)
    not_well = pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="does not count")
    with not_well:
        machine.beat_now()
    assert not machine.may_execute()
    owner.execute("update public.cloud_machines set probe = 'good'")
    machine.beat_now()
    owner.execute("update public.cloud_machines set probe = 'bad'")
    clock.now += 25
    with not_well:
        machine.beat_now()
    assert machine.may_execute()
    clock.now += 0.1
    assert not machine.may_execute()
    machine.stop()


def test_a_margin_that_leaves_no_time_is_an_error_before_the_first_heartbeat(
    owner: Connection, connect: Connector
) -> None:
    """A heartbeat would take the lease for a machine that cannot use it."""
    machine = Machine(connect, ADAS_MACHINE, margin=timedelta(seconds=21))
    for call in (machine.start, machine.beat_now):
        with pytest.raises(ValueError, match="margin"):
            call()
        assert not machine.may_execute()
        assert owner.execute(STORED).fetchone() == (None,)


@pytest.mark.parametrize("seconds", [-3, -0.000001, 0, -1e9])
def test_a_margin_that_is_none_is_an_error(seconds: float) -> None:
    """may_execute() would be true while the browser may write."""
    with pytest.raises(ValueError, match=r"^margin must be more than zero, it is -?[\de+.-]+ s$"):
        Machine(psycopg.connect, ADAS_MACHINE, margin=timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("error", "said", "options"),
    [
        (TypeError, "margin is a timedelta, not 5", {"margin": 5}),
        (TypeError, "margin is a timedelta, not None", {"margin": None}),
        (TypeError, "margin is a timedelta, not '5 s'", {"margin": "5 s"}),
        (TypeError, "connect is a function that opens a connection", {"connect": "host=x"}),
        (TypeError, "on_loss is a function, or None", {"on_loss": True}),
        (TypeError, "machine_id is a uuid, a text or a number, not None", {"machine_id": None}),
        (TypeError, "machine_id is a uuid, a text or a number, not b'x'", {"machine_id": b"x"}),
    ],
)
def test_parameters_of_another_kind_are_errors(
    error: type[Exception], said: str, options: dict[str, Any]
) -> None:
    with pytest.raises(error) as caught:
        Machine(**{"connect": psycopg.connect, "machine_id": ADAS_MACHINE, **options})
    assert str(caught.value) == said


@pytest.mark.parametrize("margin", [timedelta(microseconds=1), timedelta(seconds=20)])
def test_it_stops_before_the_browser_may_write(
    db: Database, owner: Connection, connect: Connector, margin: timedelta
) -> None:
    """At the very end of the heartbeat's time, however small the margin."""
    clock = Clock()
    with Machine(connect, ADAS_MACHINE, margin=margin, clock=clock) as machine:
        clock.advance(30 - margin.total_seconds() - 0.0000005)
        assert machine.may_execute()
        clock.advance(0.000001)
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


# What it waits for --------------------------------------------------------------------------------


class Waits(threading.Condition):
    """The condition of a machine; notes how long it would wait, and waits for a moment instead.

    `to_beat` are the pauses between heartbeats, `to_watch` those of the thread that sees losses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_beat: list[float | None] = []
        self.to_watch: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        if "watch" in threading.current_thread().name:
            self.to_watch.append(timeout)
        return super().wait(0.01)

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        self.to_beat.append(timeout)
        return super().wait_for(predicate, 0.01)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """The condition that the next machine gets. `threading` stays as it is elsewhere."""
    made = Waits()
    names = {name: getattr(threading, name) for name in threading.__all__}
    seen_by_machine = SimpleNamespace(**{**names, "Condition": lambda: made})
    monkeypatch.setattr("arbiter_db.machine.threading", seen_by_machine)
    return made


def last(values: list[float | None], count: int = 2) -> list[float | None]:
    return values[-count:]


def test_the_pause_counts_from_begin_to_begin_and_grows_with_failures(
    db: Database, owner: Connection, waits: Waits
) -> None:
    clock = Clock()
    connector = Connector(db.conninfo())
    attempts = 0

    def connect() -> Connection:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            return connector()
        if attempts < 9:
            raise psycopg.OperationalError("no route")
        clock.advance(4)  # this one takes its time
        return connector()

    machine = Machine(connect, ADAS_MACHINE, clock=clock)
    with machine:
        owner.execute("select pg_terminate_backend(%s)", (connector.opened[0].info.backend_pid,))
        wait_until(lambda: 6 in waits.to_beat)
    pauses = waits.to_beat[waits.to_beat.index(0.625) : waits.to_beat.index(6)]
    assert waits.to_beat[0] == 10
    # One for the connection that was lost, seven for those that were refused.
    assert pauses == [0.625, 1.25, 2.5, 5, 10, 10, 10, 10]


def test_a_heartbeat_that_took_longer_than_the_pause_is_followed_at_once(
    connect: Connector, waits: Waits
) -> None:
    clock = Clock()

    def slow() -> Connection:
        clock.advance(14)
        return connect()

    with Machine(slow, ADAS_MACHINE, clock=clock):
        wait_until(lambda: bool(waits.to_beat))
    assert waits.to_beat[0] == 0


def test_the_watch_waits_until_something_is_due(
    connect: Connector, db: Database, waits: Waits
) -> None:
    clock = Clock()
    app = db.session(name="app")
    with Machine(connect, ADAS_MACHINE, clock=clock) as machine:
        wait_until(lambda: last(waits.to_watch) == [WINDOW_S] * 2)
        app.run("begin")
        app.run(LOCK)
        wait_until_blocked(connect.opened[0])  # a heartbeat hangs, which began just now
        clock.advance(19)
        wait_until(lambda: last(waits.to_watch) == [6] * 2)  # may_execute() ends
        assert machine.may_execute()
        clock.advance(7)
        wait_until(lambda: last(waits.to_watch) == [4] * 2)  # the heartbeat's own time ends
        assert not machine.may_execute()
        app.run("rollback")


def test_a_heartbeat_that_hangs_longer_than_the_timeout_is_broken_off(
    connect: Connector, db: Database, waits: Waits, caplog: pytest.LogCaptureFixture
) -> None:
    clock, losses = Clock(), Losses()
    app = db.session(name="app")
    with Machine(connect, ADAS_MACHINE, clock=clock, on_loss=losses) as machine:
        app.run("begin")
        app.run(LOCK)
        wait_until_blocked(connect.opened[0])
        clock.advance(30)
        losses.wait()
        wait_until(lambda: last(waits.to_watch) == [0.001] * 2)
        assert "heartbeat failed" not in caplog.text
        clock.advance(0.001)
        wait_until(lambda: "heartbeat failed" in caplog.text)
        app.run("commit")
        wait_until(machine.may_execute)
    assert len(connect.opened) > 1
    assert losses.count == 1
    assert f"machine {ADAS_MACHINE}: heartbeat failed: " in caplog.text


def test_after_a_loss_nothing_is_due(connect: Connector, waits: Waits) -> None:
    clock = Clock()
    allowed = [True]

    def once() -> Connection:
        if not allowed:
            raise psycopg.OperationalError("no route")
        allowed.clear()
        return connect()

    with Machine(once, ADAS_MACHINE, clock=clock) as machine, machine._beating:
        # No heartbeat gets in between.
        connect.opened[0].close()
        clock.advance(WINDOW_S + 1)
        wait_until(lambda: last(waits.to_watch) == [None] * 2)
        assert not machine.may_execute()


# At the ends --------------------------------------------------------------------------------------


def test_a_loss_that_nobody_has_noticed_is_reported_at_the_stop(connect: Connector) -> None:
    clock, losses = Clock(), Losses()
    machine = Machine(connect, ADAS_MACHINE, clock=clock, on_loss=losses)
    machine.start()
    clock.advance(WINDOW_S + 1)
    machine.stop()
    assert losses.count == 1


def test_a_loss_needs_nobody_to_report_it_to(
    connect: Connector, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    with Machine(connect, ADAS_MACHINE, clock=clock) as machine:
        clock.advance(WINDOW_S + 1)
        assert not machine.may_execute()
        machine.beat_now()
        assert machine.may_execute()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_connection_within_a_transaction_is_refused_and_closed(
    connect: Connector,
) -> None:
    def begun() -> Connection:
        conn = connect()
        conn.execute("select 1")
        return conn

    machine = Machine(begun, ADAS_MACHINE)
    with pytest.raises(psycopg.ProgrammingError, match="autocommit"):
        machine.start()
    assert connect.opened[0].closed
    assert not machine.may_execute()


def test_a_stop_does_not_wait_for_a_connection(
    connect: Connector, caplog: pytest.LogCaptureFixture
) -> None:
    called, go_on = threading.Event(), threading.Event()

    def slow() -> Connection:
        called.set()
        assert go_on.wait(TIMEOUT_S)
        return connect()

    machine = Machine(slow, ADAS_MACHINE)
    raised: list[BaseException] = []

    def beat() -> None:
        try:
            machine.beat_now()
        except RuntimeError as exc:
            raised.append(exc)

    beating = in_a_thread(beat)
    assert called.wait(TIMEOUT_S)
    machine.stop()
    assert caplog.messages == [f"machine {ADAS_MACHINE}: stopped while it was connecting"]
    go_on.set()
    beating.join(TIMEOUT_S)
    assert [str(exc) for exc in raised] == ["this machine was stopped"]
    assert not machine.may_execute()


def test_what_it_says_when_it_is_started_wrongly(connect: Connector) -> None:
    machine = Machine(connect, ADAS_MACHINE, margin=timedelta(seconds=20, milliseconds=1))
    with pytest.raises(ValueError, match="margin") as caught:
        machine.start()
    assert str(caught.value) == (
        "margin is 20.001 s, more than heartbeat_timeout 30 s less heartbeat_interval 10 s"
    )
    with Machine(connect, ADAS_MACHINE) as machine, pytest.raises(RuntimeError, match="once"):
        machine.start()
    with pytest.raises(RuntimeError, match=r"^a Machine starts once$"):
        machine.start()


def test_its_threads_can_be_told_apart_and_hold_no_process_up(connect: Connector) -> None:
    with Machine(connect, str(ADAS_MACHINE)):
        assert sorted(thread.name for thread in machine_threads()) == [
            f"arbiter beat_on {ADAS_MACHINE}",
            f"arbiter watch {ADAS_MACHINE}",
        ]
        assert all(thread.daemon for thread in machine_threads())


def test_the_clock_goes_on_while_the_host_is_suspended(
    connect: Connector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No clock was given, so it must be the one of the time since boot."""
    boot = {"now": 5_000.0}
    monkeypatch.setattr(
        "arbiter_db.machine.time",
        SimpleNamespace(
            CLOCK_BOOTTIME=7,
            clock_gettime=lambda clock: boot["now"] if clock == 7 else 0.0,
            monotonic=lambda: 1.0,
        ),
    )
    with Machine(connect, ADAS_MACHINE) as machine:
        boot["now"] += WINDOW_S
        assert machine.may_execute()
        boot["now"] += 0.001
        assert not machine.may_execute()


def test_where_there_is_no_such_clock_it_is_the_monotonic_one(
    connect: Connector, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = {"now": 5_000.0}
    time = SimpleNamespace(monotonic=lambda: boot["now"])
    monkeypatch.setattr("arbiter_db.machine.time", time)
    with Machine(connect, ADAS_MACHINE) as machine:
        boot["now"] += WINDOW_S + 0.001
        assert not machine.may_execute()
