"""A transaction that is open for long is judged by the present, not by its start.

Each test begins a transaction, sees that the clock has moved on since, and then lets a period end
at that later instant exactly: it is over by the clock, and not over by the transaction's start.
Nothing waits: the owner moves what happened to where it must be.
"""

from __future__ import annotations

import json
import threading
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest
from sessions import TIMEOUT_S, wait_until_blocked
from story import (
    SETTINGS,
    activate,
    add_machine,
    add_signal,
    add_user,
    beat,
    browser,
    handovers,
    lease,
    one,
    rejection,
    set_status,
    status,
    value,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

HEARTBEAT, DELAY = SETTINGS["heartbeat_timeout"], SETTINGS["error_takeover_delay"]


class Late:
    """A transaction of the owner that has begun before ``then``, an instant in the past."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.owner = db.connect()
        self.user = add_user(self.owner)
        self.conn = db.connect()
        self.then = self.begun = datetime.min

    def begin(self, conn: Conn | None = None) -> datetime:
        """Begin; returns an instant that is over but later than the transaction's start."""
        if conn is not None:
            self.conn = conn
        self.conn.execute("begin")
        self.begun = value(self.conn, "select now()")
        self.then = value(self.conn, "select clock_timestamp()")
        assert self.begun < self.then
        return self.then

    def heartbeat_was(self, machine: str, instant: datetime) -> None:
        """Past the stamp, which takes no client's word."""
        triggers = ('"~arbiter_stamp_update"', "arbiter_activate_update")
        with self.owner.transaction():
            for name in triggers:
                self.owner.execute(
                    f"alter table public.cloud_machines disable trigger {name}".encode()
                )
            self.owner.execute(
                "update public.cloud_machines set last_health_check = %s where id = %s",
                (instant, machine),
            )
            for name in triggers:
                self.owner.execute(
                    f"alter table public.cloud_machines enable always trigger {name}".encode()
                )

    def note(self, conn: Conn, machine: str) -> Any:
        return one(
            conn,
            "select * from arbiter.machine_notes where machine_id = %s and user_id = %s",
            machine,
            self.user.id,
        )


@pytest.fixture
def late(db: Database) -> Late:
    return Late(db)


# -- decisions ------------------------------------------------------------------------------------


def test_a_machine_does_not_write_on_an_old_heartbeat(late: Late) -> None:
    machine = activate(late.owner, late.user)
    late.heartbeat_was(machine, late.begin() - HEARTBEAT)
    error = rejection(add_signal, late.conn, late.user.trader, "cloud", machine)
    assert error.sqlstate == "WX004"


def test_a_browser_takes_over_once_the_heartbeat_has_lapsed(late: Late) -> None:
    machine = activate(late.owner, late.user)
    late.heartbeat_was(machine, late.begin() - HEARTBEAT)
    assert status(late.conn, late.user.id)["environment"] == "local"
    add_signal(late.conn, late.user.trader)
    last = handovers(late.conn, late.user)[-1]
    assert (last.reason, last.to_holder) == ("heartbeat_lapsed", "local")
    now = lease(late.conn, late.user)
    assert late.then < last.handed_over_at
    assert late.then < now.held_since


def test_a_machine_with_an_old_heartbeat_is_not_activated(late: Late) -> None:
    add_signal(late.owner, late.user.trader)
    machine = add_machine(late.owner, late.user, "running")
    late.heartbeat_was(machine, late.begin() - HEARTBEAT)
    late.conn.execute("update public.cloud_machines set region = 'ams'")
    assert not lease(late.conn, late.user).draining_since


def test_a_machine_that_lapsed_gives_way_to_another(late: Late) -> None:
    late.owner.execute(
        "alter table public.cloud_machines drop constraint cloud_machines_user_id_key"
    )
    first = activate(late.owner, late.user)
    second = add_machine(late.owner, late.user, "running")
    late.heartbeat_was(first, late.begin() - HEARTBEAT)
    beat(late.conn, second)
    now = lease(late.conn, late.user)
    assert now.draining_to == second
    assert late.then < now.draining_since


def test_registering_takes_no_machine_with_an_old_heartbeat(late: Late) -> None:
    add_signal(late.owner, late.user.trader)
    machine = add_machine(late.owner, late.user, "running")
    late.heartbeat_was(machine, late.begin() - HEARTBEAT)
    late.conn.execute("select arbiter.register_machines('public.cloud_machines')")
    assert not lease(late.conn, late.user).draining_since


def test_a_yes_counts_once_the_delay_is_over(late: Late) -> None:
    machine = activate(late.owner, late.user)
    set_status(late.owner, machine, "error")
    late.owner.execute(
        "update arbiter.machine_notes set entered_error_at = %s", (late.begin() - DELAY,)
    )
    late.conn.execute("select arbiter.confirm_takeover(%s)", (late.user.id,))
    last = handovers(late.conn, late.user)[-1]
    assert (last.reason, last.to_holder) == ("confirmed", "local")
    assert late.then < last.handed_over_at


def test_a_client_is_told_to_retry_by_the_clock(late: Late) -> None:
    machine = activate(late.owner, late.user)
    set_status(late.owner, machine, "stopped")
    in_ten_seconds = late.begin() + timedelta(seconds=10)
    late.owner.execute(
        "update arbiter.machine_notes set left_running_at = %s",
        (in_ten_seconds - SETTINGS["stop_grace"],),
    )
    late.conn.execute("set local request.method = 'POST'")
    error = rejection(add_signal, late.conn, late.user.trader)
    detail = json.loads(error.diag.message_detail or "")
    assert 1 <= int(detail["headers"]["Retry-After"]) <= 10


# -- stamps ---------------------------------------------------------------------------------------


def test_status_says_when_it_looked(late: Late) -> None:
    late.begin()
    assert late.then < status(late.conn, late.user.id)["as_of"]


def test_a_first_write_creates_the_lease_now(late: Late) -> None:
    late.begin()
    add_signal(late.conn, late.user.trader)
    assert late.then < lease(late.conn, late.user).held_since
    assert late.then < handovers(late.conn, late.user)[0].handed_over_at


def test_a_heartbeat_and_the_drain_that_it_marks_are_of_now(late: Late) -> None:
    machine = add_machine(late.owner, late.user, "running")
    late.begin()
    assert late.then < beat(late.conn, machine)
    assert late.then < lease(late.conn, late.user).draining_since


@pytest.mark.parametrize("word", ["stopped", "error"])
def test_a_machine_leaves_running_now(late: Late, word: str) -> None:
    machine = activate(late.owner, late.user)
    late.begin()
    set_status(late.conn, machine, word)
    noted = late.note(late.conn, machine)
    assert late.then < noted.left_running_at
    assert (noted.entered_error_at is not None) is (word == "error")
    assert noted.entered_error_at is None or late.then < noted.entered_error_at


@pytest.mark.parametrize("statement", ["delete from", "truncate"])
def test_a_machine_that_goes_left_now(late: Late, statement: str) -> None:
    machine = activate(late.owner, late.user)
    late.begin()
    cascade = " cascade" if statement == "truncate" else ""
    late.conn.execute(f"{statement} public.cloud_machines{cascade}".encode())
    assert late.then < late.note(late.conn, machine).left_running_at


def test_registering_takes_machines_as_of_now(late: Late) -> None:
    late.owner.execute(
        "create table public.apps (id uuid primary key, user_id uuid, status text,"
        " last_health_check timestamptz);"
        "insert into public.apps values (gen_random_uuid(), '00000000-0000-0000-0000-000000000007',"
        " 'error')"
    )
    late.begin()
    late.conn.execute("select arbiter.register_machines('public.apps')")
    noted = one(late.conn, "select * from arbiter.machine_notes")
    assert late.then < noted.left_running_at
    assert late.then < noted.entered_error_at
    assert late.then < value(late.conn, "select held_since from arbiter.leases")
    assert late.then < value(late.conn, "select handed_over_at from arbiter.handovers")


def test_a_heartbeat_is_in_the_future_by_the_clock(late: Late) -> None:
    """When another column or table is registered, which clients stamped by their own clocks."""
    late.owner.execute(
        "create table public.apps (id uuid primary key, user_id uuid, status text,"
        " last_health_check timestamptz)"
    )
    late.begin()
    past, future = str(UUID(int=1)), str(UUID(int=2))
    late.owner.execute(
        "insert into public.apps values (%s, gen_random_uuid(), 'stopped', %s),"
        " (%s, gen_random_uuid(), 'stopped', %s)",
        (past, late.then, future, late.then + timedelta(hours=1)),
    )
    late.conn.execute("select arbiter.register_machines('public.apps')")
    found = dict(late.conn.execute("select id, last_health_check from public.apps").fetchall())
    assert found[past] == late.then
    assert late.then < found[future] < late.then + timedelta(minutes=30)


def test_an_observation_is_of_now(late: Late) -> None:
    late.owner.execute("select arbiter.protect('public.signals', p_mode => 'observe')")
    activate(late.owner, late.user)
    late.begin()
    add_signal(late.conn, late.user.trader)
    assert late.then < value(late.conn, "select observed_at from arbiter.observations")


def test_a_yes_while_the_machine_writes_marks_the_drain_now(late: Late) -> None:
    machine = activate(late.owner, late.user)
    writer = late.db.connect(autocommit=False)
    add_signal(writer, late.user.trader, "cloud", machine)
    set_status(late.owner, machine, "error")
    late.owner.execute(
        "update arbiter.machine_notes set entered_error_at = clock_timestamp() - interval '1 h'"
    )
    late.begin()
    late.conn.execute("select arbiter.confirm_takeover(%s)", (late.user.id,))
    assert late.then < lease(late.conn, late.user).draining_since


def test_a_heartbeat_of_another_is_none_of_this_call(late: Late) -> None:
    """A browser sees the machine but may not update it; meanwhile the machine has sent its own."""
    machine = activate(late.owner, late.user)
    late.begin(browser(late.db, late.user))
    beat(late.owner, machine)
    error = rejection(late.conn.execute, "select arbiter.heartbeat(%s::uuid)", (machine,))
    assert (error.sqlstate, error.diag.message_primary) == (
        "P0002",
        f"arbiter: no machine {machine}",
    )


# -- waits ----------------------------------------------------------------------------------------


def older_than(conn: Conn, period: timedelta) -> None:
    """Wait until the transaction is open for longer than that."""
    pause, deadline = threading.Event(), time.monotonic() + TIMEOUT_S
    while not value(conn, "select clock_timestamp() - now() > %s", period):
        assert time.monotonic() < deadline
        pause.wait(0.05)


def test_a_wait_begins_when_it_begins(db: Database) -> None:
    """And not with the transaction, which is older than drain_timeout."""
    owner, writer = db.connect(), db.connect(autocommit=False)
    owner.execute("update arbiter.settings set drain_timeout = '1 s'")
    ada, bob = add_user(owner), add_user(owner)
    machine = add_machine(owner, ada, "running")
    add_signal(writer, ada.trader)
    beat(owner, machine)  # marks the drain
    failed = activate(owner, bob)
    set_status(owner, failed, "error")
    owner.execute(
        "update arbiter.machine_notes set entered_error_at = clock_timestamp() - interval '1 h'"
        " where machine_id = %s",
        (failed,),
    )
    writer.execute("select from public.cloud_machines where id = %s for update", (failed,))

    cloud, web = db.session(), db.session()
    for session in (cloud, web):
        session.run("begin")
    for session in (cloud, web):
        older_than(session.conn, timedelta(seconds=1))
    write = cloud.start(
        "insert into public.signals"
        " (trader_id, symbol, interval, signal, bar_time, source, machine_id)"
        " values (%s, 'BTCUSDT', '1m', 'buy', now(), 'cloud', %s)",
        (ada.trader, machine),
    )
    yes = web.start("select arbiter.confirm_takeover(%s)", (bob.id,))
    wait_until_blocked(cloud)
    wait_until_blocked(web)
    writer.commit()
    assert write.result(TIMEOUT_S).rowcount == 1
    assert yes.result(TIMEOUT_S).rowcount == 1
