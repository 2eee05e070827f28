"""Every instant is the clock's, and not the start of the transaction, which may be long ago.

Each is asked for in a transaction that has been open for a while: what is stored is not older than
the call, and a period that has ended in between has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sessions import TIMEOUT_S, wait_until_blocked
from story import (
    SETTINGS,
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    beat,
    clock,
    handovers,
    lease,
    rejection,
    set_status,
    status,
    value,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

#: How long the transaction is open before a call.
WHILE = 0.1

TIMEOUT = SETTINGS["heartbeat_timeout"]
DELAY = SETTINGS["error_takeover_delay"]


class Stage:
    """Ada is local and has a machine that does not run, bob's machine holds, carol's is in error.

    Everything is done by the owner, from now on in one transaction.
    """

    def __init__(self, db: Database) -> None:
        self.db = db
        self.conn = db.connect()
        self.conn.execute(
            "alter table public.cloud_machines drop constraint cloud_machines_user_id_key"
        )
        self.ada, self.bob, self.carol, self.dave = (add_user(self.conn) for _ in range(4))
        add_signal(self.conn, self.ada.trader)
        self.adas = add_machine(self.conn, self.ada, "starting")
        self.bobs, self.carols = activate(self.conn, self.bob), activate(self.conn, self.carol)
        set_status(self.conn, self.carols, "error")

    def wait(self) -> datetime:
        """Begin, and let a while pass; the instant after it."""
        self.conn.execute("begin")
        value(self.conn, "select pg_sleep(%s)", WHILE)
        assert value(self.conn, "select clock_timestamp() - now()") >= timedelta(seconds=WHILE)
        return clock(self.conn)

    def heartbeat(self, machine: object) -> datetime:
        found: datetime = value(
            self.conn,
            "select last_health_check from public.cloud_machines where id = %s",
            str(machine),
        )
        return found

    def note(self, column: str, machine: object) -> datetime:
        found: datetime = value(
            self.conn,
            f"select {column} from arbiter.machine_notes where machine_id = %s",
            str(machine),
        )
        return found


@pytest.fixture
def at(db: Database) -> Stage:
    return Stage(db)


def unseen(at: Stage, statement: str, *params: object) -> None:
    """Change the registry past its triggers, as a restore does."""
    triggers = at.conn.execute(
        "select tgname from pg_trigger where tgrelid = 'public.cloud_machines'::regclass"
        " and starts_with(tgname, 'arbiter_') and tgenabled = 'A'"
    ).fetchall()
    at.conn.execute("alter table public.cloud_machines disable trigger user")
    at.conn.execute(statement.encode(), params)
    for (name,) in triggers:
        at.conn.execute(f"alter table public.cloud_machines enable always trigger {name}".encode())


REGISTER = "select arbiter.register_machines('public.cloud_machines')"


# -- what is stored -------------------------------------------------------------------------------


def first_write(at: Stage) -> list[datetime]:
    add_signal(at.conn, at.dave.trader)
    return [lease(at.conn, at.dave).held_since, handovers(at.conn, at.dave)[0].handed_over_at]


def takeover(at: Stage) -> list[datetime]:
    age(at.conn, at.bobs, heartbeat=TIMEOUT)
    add_signal(at.conn, at.bob.trader)
    return [lease(at.conn, at.bob).held_since, handovers(at.conn, at.bob)[-1].handed_over_at]


def heartbeat(at: Stage) -> list[datetime]:
    beat(at.conn, at.bobs)
    return [at.heartbeat(at.bobs)]


def heartbeat_without_its_trigger(at: Stage) -> list[datetime]:
    at.conn.execute('alter table public.cloud_machines disable trigger "~arbiter_stamp_update"')
    return [value(at.conn, "select arbiter.heartbeat(%s::uuid)", at.bobs)]


def mark(at: Stage) -> list[datetime]:
    set_status(at.conn, at.adas, "running")
    beat(at.conn, at.adas)
    return [lease(at.conn, at.ada).draining_since]


def stop(at: Stage) -> list[datetime]:
    set_status(at.conn, at.bobs, "stopped")
    return [at.note("left_running_at", at.bobs)]


def error(at: Stage) -> list[datetime]:
    set_status(at.conn, at.bobs, "error")
    return [at.note("left_running_at", at.bobs), at.note("entered_error_at", at.bobs)]


def deletion(at: Stage) -> list[datetime]:
    at.conn.execute("delete from public.cloud_machines where id = %s", (at.bobs,))
    return [at.note("left_running_at", at.bobs)]


def truncation(at: Stage) -> list[datetime]:
    at.conn.execute("truncate public.cloud_machines cascade")
    return [at.note("left_running_at", at.bobs)]


def observation(at: Stage) -> list[datetime]:
    at.conn.execute("select arbiter.protect('public.signals', p_mode => 'observe')")
    add_signal(at.conn, at.bob.trader)
    return [value(at.conn, "select observed_at from arbiter.observations")]


def registering(at: Stage) -> list[datetime]:
    unseen(
        at,
        "insert into public.cloud_machines (user_id, status) values (%s, 'error')",
        at.dave.id,
    )
    at.conn.execute(REGISTER)
    machine = value(at.conn, "select id from public.cloud_machines where user_id = %s", at.dave.id)
    return [
        lease(at.conn, at.dave).held_since,
        handovers(at.conn, at.dave)[0].handed_over_at,
        at.note("left_running_at", machine),
        at.note("entered_error_at", machine),
    ]


def confirmation(at: Stage) -> list[datetime]:
    """While a write of the machine is in flight: the drain is marked."""
    age(at.conn, at.carols, entered_error=DELAY)
    at.conn.execute("select arbiter.confirm_takeover(%s)", (at.carol.id,))
    return [lease(at.conn, at.carol).held_since]


STORED: dict[str, Callable[[Stage], list[datetime]]] = {
    "first write": first_write,
    "takeover": takeover,
    "heartbeat": heartbeat,
    "heartbeat without its trigger": heartbeat_without_its_trigger,
    "mark of a drain": mark,
    "stop": stop,
    "error": error,
    "deletion": deletion,
    "truncation": truncation,
    "observation": observation,
    "registering": registering,
    "confirmation": confirmation,
}


@pytest.mark.parametrize("what", STORED)
def test_what_is_stored_is_not_older_than_the_call(at: Stage, what: str) -> None:
    called = at.wait()
    for stored in STORED[what](at):
        assert called <= stored <= clock(at.conn)


def test_the_mark_of_a_confirmed_drain_is_not_older_than_the_call(at: Stage) -> None:
    """A write of the machine is in flight, so the drain is marked."""
    set_status(at.conn, at.carols, "running")
    beat(at.conn, at.carols)
    machine = at.db.connect(autocommit=False)
    add_signal(machine, at.carol.trader, "cloud", at.carols)
    set_status(at.conn, at.carols, "error")
    age(at.conn, at.carols, entered_error=DELAY)
    called = at.wait()
    at.conn.execute("select arbiter.confirm_takeover(%s)", (at.carol.id,))
    now = lease(at.conn, at.carol)
    assert called <= now.draining_since <= clock(at.conn)
    assert now.holder == "cloud"


def test_heartbeats_in_the_future_become_the_clock_and_no_others(at: Stage) -> None:
    called = at.wait()
    unseen(
        at,
        "update public.cloud_machines set last_health_check = case id when %s"
        " then clock_timestamp() else timestamptz '2100-01-01' end",
        at.bobs,
    )
    before = at.heartbeat(at.bobs)
    at.conn.execute(
        "alter table public.cloud_machines add column beaten_at timestamptz;"
        "update public.cloud_machines set beaten_at = last_health_check"
    )
    at.conn.execute(REGISTER.replace("')", "', p_heartbeat_column => 'beaten_at')"))
    found = dict(at.conn.execute("select id, beaten_at from public.cloud_machines").fetchall())
    assert found.pop(at.bobs) == before
    assert len(found) == 2
    assert all(called <= beaten_at <= clock(at.conn) for beaten_at in found.values())


def test_a_heartbeat_of_this_transaction_is_not_in_the_future(at: Stage) -> None:
    """So the registry is not written, and what its triggers do does not matter."""
    at.conn.execute(
        "alter table public.cloud_machines add column beaten_at timestamptz;"
        "create function public.of_the_app() returns trigger language plpgsql"
        "  as $$ begin return new; end $$;"
        "create trigger opaque before update on public.cloud_machines for each row"
        "  when (length(new.region) > 9) execute function public.of_the_app()"
    )
    at.wait()
    at.conn.execute("update public.cloud_machines set beaten_at = clock_timestamp()")
    at.conn.execute(REGISTER.replace("')", "', p_heartbeat_column => 'beaten_at')"))


# -- what has ended -------------------------------------------------------------------------------


def test_a_lapse(at: Stage) -> None:
    at.wait()
    age(at.conn, at.bobs, heartbeat=TIMEOUT)
    said = status(at.conn, at.bob.id)
    assert (said["environment"], said["code"]) == ("local", None)
    add_signal(at.conn, at.bob.trader)
    assert handovers(at.conn, at.bob)[-1].reason == "heartbeat_lapsed"


def test_a_heartbeat_since(at: Stage) -> None:
    """As far in the future as counts as fresh; at the transaction's start it was too far."""
    called = at.wait()
    age(at.conn, at.bobs, heartbeat=timedelta(seconds=WHILE / 2) - TIMEOUT)
    said = status(at.conn, at.bob.id)
    assert (said["environment"], said["code"]) == ("cloud", "cloud_active")
    assert called <= said["as_of"] <= clock(at.conn)
    assert rejection(add_signal, at.conn, at.bob.trader).sqlstate == "WX001"


def test_a_delay_before_a_yes(at: Stage) -> None:
    at.wait()
    age(at.conn, at.carols, entered_error=DELAY)
    assert status(at.conn, at.carol.id)["retry_at"] is None
    at.conn.execute("select arbiter.confirm_takeover(%s)", (at.carol.id,))
    assert lease(at.conn, at.carol).holder == "local"


def test_a_machine_that_runs_again_after_its_lapse(at: Stage) -> None:
    age(at.conn, at.adas, heartbeat=timedelta())
    at.wait()
    age(at.conn, at.adas, heartbeat=TIMEOUT)
    set_status(at.conn, at.adas, "running")
    assert lease(at.conn, at.ada).draining_since is None


def test_a_lapse_that_another_machine_profits_from(at: Stage) -> None:
    other = add_machine(at.conn, at.bob, "running")
    at.wait()
    age(at.conn, at.bobs, heartbeat=TIMEOUT)
    beat(at.conn, other)
    assert str(lease(at.conn, at.bob).draining_to) == str(other)


def test_a_lapse_before_registering(at: Stage) -> None:
    at.wait()
    unseen(
        at,
        "update public.cloud_machines"
        " set status = 'running', last_health_check = clock_timestamp() - %s where id = %s",
        TIMEOUT,
        at.adas,
    )
    at.conn.execute(REGISTER)
    assert lease(at.conn, at.ada).draining_since is None


def test_retry_after_counts_from_the_answer(at: Stage) -> None:
    at.wait()
    at.conn.execute("set local request.method = 'POST'")
    headers = value(
        at.conn,
        "select (e).detail::jsonb -> 'headers' from arbiter._error('WX002', 'm', 'h',"
        "  jsonb_build_object('retry_at', now() + interval '3 s' + %s), 409) as e",
        timedelta(seconds=WHILE / 2),
    )
    assert int(headers["Retry-After"]) <= 3


def test_a_machine_that_has_beaten_since_is_still_named_as_unknown(at: Stage) -> None:
    """To a token that sees it and may not update it."""
    at.conn.execute(
        "alter table public.cloud_machines enable row level security;"
        "create policy seen on public.cloud_machines for select to authenticated using (true)"
    )
    token = at.db.connect(
        role="authenticated", claims={"sub": str(at.bob.id), "machine_id": str(at.bobs)}
    )
    token.execute("begin")
    value(token, "select pg_sleep(%s)", WHILE)
    beat(at.conn, at.carols)
    error = rejection(
        token.execute, "select arbiter.heartbeats(%s::text[])", ([at.bobs, at.carols],)
    )
    assert error.sqlstate == "P0002"
    assert str(at.carols) in str(error)


#: How long it waits for a lease, and the transaction has been open before.
DRAIN_TIMEOUT = 1.5


@pytest.mark.parametrize(
    "call",
    [
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " values (%(ada)s, 'A', '1m', 'buy', now())",
        "select arbiter.confirm_takeover(%(carol)s)",
    ],
    ids=["write", "confirm"],
)
def test_a_wait_is_as_long_as_it_should_be(at: Stage, call: str) -> None:
    age(at.conn, at.carols, entered_error=DELAY)
    at.conn.execute(
        "update arbiter.settings set drain_timeout = make_interval(secs => %s)", (DRAIN_TIMEOUT,)
    )
    other = at.db.connect(autocommit=False)
    other.execute("select from arbiter.leases for update")
    with at.db.session() as waiter:
        waiter.run("begin")
        waiter.run("select pg_sleep(%s)", (DRAIN_TIMEOUT,))
        waiting = waiter.start(call, {"ada": at.ada.trader, "carol": at.carol.id})
        wait_until_blocked(waiter)
        other.rollback()
        assert waiting.result(TIMEOUT_S).rowcount == 1
