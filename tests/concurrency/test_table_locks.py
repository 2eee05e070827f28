"""Locks on tables: which call waits for which, and that nobody is a deadlock's victim.

A call that changes a table takes the strongest lock that it will need at once. While it waits for
that it has no other one on the table, so a client that has read it may still write it.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from sessions import TIMEOUT_S, wait_until_blocked
from story import (
    activate,
    add_machine,
    add_user,
    age,
    column,
    lease,
    set_status,
    value,
)

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

TRADING = Path(arbiter_db.__file__).parent / "demo" / "trading.sql"
TABLES = """
create table public.vms (id uuid primary key, user_id uuid, status text);
-- With all that is needed, but for the guard.
create table public.feeds (
  user_id uuid not null, source text not null default 'local' check (source in ('local', 'cloud')),
  machine_id uuid);
"""
#: What a client reads first, and then writes.
VMS = "insert into public.vms (id) values (gen_random_uuid())"
FEEDS = "insert into public.feeds (user_id) values (gen_random_uuid())"
POSITIONS = "update public.positions set quantity = 1"
SIGNALS = "delete from public.signals"
MACHINES = "update public.cloud_machines set region = 'ams'"

#: What an earlier version may have made otherwise.
OLDER = {
    "policy": (
        "comment on policy arbiter_claim on public.signals is 'Older.'",
        "comment on policy arbiter_registry_update on public.cloud_machines is 'Older.'",
    ),
    "trigger": (
        "comment on trigger arbiter_guard_insert on public.signals is 'Older.'",
        "comment on trigger arbiter_note on public.cloud_machines is 'Older.'",
    ),
}

ADD = "select arbiter.add_client_role('pg_monitor')"
REMOVE = "select arbiter.remove_client_role('pg_monitor')"
PROTECT = "select arbiter.protect('public.feeds', p_evidence => false)"

CALLS = {
    "protect": ("select arbiter.protect('public.positions')", "positions", POSITIONS),
    "protect without a new column": (PROTECT, "feeds", FEEDS),
    "register": ("select arbiter.register_machines('public.vms')", "vms", VMS),
    "add a role": (ADD, "signals", SIGNALS),
    "remove a role": (REMOVE, "cloud_machines", MACHINES),
}


def prepare(db: Database) -> Conn:
    owner = db.connect()
    owner.execute(TABLES.encode())
    add_machine(owner, add_user(owner), "running")
    return owner


@pytest.mark.parametrize("name", CALLS)
def test_a_reader_may_go_on_to_write(db: Database, name: str) -> None:
    call, table, write = CALLS[name]
    owner = prepare(db)
    if call == REMOVE:
        owner.execute(ADD.encode())
    reader = db.connect(autocommit=False)
    reader.execute(f"select count(*) from public.{table}".encode())
    with db.session() as caller:
        called = caller.start(call)
        wait_until_blocked(caller)
        reader.execute(write.encode())
        reader.commit()
        called.result(TIMEOUT_S)


def test_a_reader_may_go_on_to_write_to_a_table_that_is_adopted(bare_db: Database) -> None:
    arbiter_db.install(bare_db.conninfo())
    owner = bare_db.connect()
    owner.execute(
        "create table public.cloud_machines (id uuid primary key, user_id uuid, status text)"
    )
    reader = bare_db.connect(autocommit=False)
    reader.execute("select from public.cloud_machines")
    with ThreadPoolExecutor(max_workers=1) as pool:
        installed = pool.submit(arbiter_db.install, installer_of(bare_db))
        wait_until_it_waits(owner, "public.cloud_machines")
        reader.execute("insert into public.cloud_machines (id) values (gen_random_uuid())")
        reader.commit()
        installed.result(TIMEOUT_S)
    assert value(owner, "select registry::text from arbiter.registry") == "cloud_machines"


TWO = pytest.mark.parametrize(("first", "second"), [(SIGNALS, MACHINES), (MACHINES, SIGNALS)])


@TWO
@pytest.mark.parametrize("call", [ADD, REMOVE])
def test_a_client_of_two_tables_is_no_victim(
    db: Database, call: str, first: str, second: str
) -> None:
    """Policies of both change: neither is kept while the other one is not to be had."""
    owner = prepare(db)
    if call == REMOVE:
        owner.execute(ADD.encode())
    client = db.connect(autocommit=False)
    client.execute(first.encode())
    with db.session() as caller:
        called = caller.start(call)
        wait_until_blocked(caller)
        client.execute(second.encode())
        client.commit()
        called.result(TIMEOUT_S)


@TWO
@pytest.mark.parametrize("kind", ["policy", "trigger"])
def test_a_client_of_two_tables_is_no_victim_of_an_upgrade(
    db: Database, kind: str, first: str, second: str
) -> None:
    owner = prepare(db)
    arbiter_db.install(db.conninfo())  # which recognises what it has copied
    for statement in OLDER[kind]:
        owner.execute(statement.encode())
    client = db.connect(autocommit=False)
    client.execute(first.encode())
    with ThreadPoolExecutor(max_workers=1) as pool:
        installed = pool.submit(arbiter_db.install, installer_of(db))
        wait_until_it_waits(owner, f"public.{'signals' if first == SIGNALS else 'cloud_machines'}")
        client.execute(second.encode())
        client.commit()
        installed.result(TIMEOUT_S)
    assert value(owner, "select count(*) from arbiter._wrong_policies(null)") == 0


@TWO
def test_a_client_of_two_tables_that_are_adopted_is_no_victim(
    bare_db: Database, first: str, second: str
) -> None:
    """They have come after the first installation."""
    arbiter_db.install(bare_db.conninfo())
    owner = bare_db.connect()
    owner.execute(TRADING.read_bytes())
    client = bare_db.connect(autocommit=False)
    client.execute(first.encode())
    with ThreadPoolExecutor(max_workers=1) as pool:
        installed = pool.submit(arbiter_db.install, installer_of(bare_db))
        wait_until_it_waits(owner, f"public.{'signals' if first == SIGNALS else 'cloud_machines'}")
        client.execute(second.encode())
        client.commit()
        installed.result(TIMEOUT_S)
    assert value(owner, "select count(*) from arbiter.protections") == 1


@pytest.mark.parametrize("mode", ["enforce", "observe"])
def test_a_call_that_changes_no_table_waits_for_a_write_in_flight(db: Database, mode: str) -> None:
    """What was written under the old rules is committed before the new ones are there."""
    owner = prepare(db)
    owner.execute(PROTECT.encode())
    writer = db.connect(autocommit=False)
    writer.execute(FEEDS.encode())
    with db.session() as caller:
        called = caller.start("select arbiter.protect('public.feeds', p_mode => %s)", (mode,))
        wait_until_blocked(caller)
        assert not called.done()
        writer.commit()
        called.result(TIMEOUT_S)


# -- one after the other --------------------------------------------------------------------------

#: Calls of which two would not meet at a table of the app, and where the second one waits.
DECLARATIONS = {
    "protect": (
        "select arbiter.protect('public.feeds')",
        "select arbiter.protect('public.positions')",
        "arbiter.protections",
    ),
    "register": (
        "select arbiter.register_machines('public.vms')",
        "select arbiter.register_machines('public.cloud_machines')",
        "arbiter.protections",
    ),
    "add a role": (ADD, ADD.replace("monitor", "checkpoint"), "arbiter.protections"),
    "remove a role": (REMOVE, REMOVE.replace("monitor", "checkpoint"), "arbiter.protections"),
    "uninstall": (
        "select arbiter._detach_all(false)",
        "select arbiter._detach_all(false)",
        "arbiter.protections",
    ),
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_the_second_call_waits_before_it_locks_a_table(db: Database, name: str) -> None:
    first, second, where = DECLARATIONS[name]
    prepare(db)
    with db.session() as one, db.session() as other:
        one.run("begin")
        one.run(first)
        called = other.start(second)
        wait_until_blocked(other)
        assert waits_for(db.connect(), other.pid) == [where]
        one.run("rollback")
        called.result(TIMEOUT_S)


def test_an_installation_waits_before_it_locks_a_table(db: Database) -> None:
    """Also for an unprotect(), which locks but the table's row."""
    owner = prepare(db)
    with db.session() as one, ThreadPoolExecutor(max_workers=1) as pool:
        one.run("begin")
        one.run("select arbiter.unprotect('public.signals')")
        installed = pool.submit(arbiter_db.install, installer_of(db))
        wait_until_it_waits(owner, "arbiter.protections")
        one.run("commit")
        installed.result(TIMEOUT_S)


def waits_for(conn: Conn, pid: int) -> list[str]:
    """The tables for which a backend waits."""
    return column(
        conn,
        "select format('%%s.%%s', c.relnamespace::regnamespace, c.relname)"
        "  from pg_locks l join pg_class c on c.oid = l.relation"
        " where l.pid = %s and not l.granted",
        pid,
    )


def installer_of(db: Database) -> str:
    return make_conninfo(db.conninfo(), application_name="installer")


def wait_until_it_waits(conn: Conn, table: str) -> None:
    """Wait until an installation waits for a lock on that table."""
    pids = "select pid from pg_stat_activity where application_name = 'installer'"
    pause, deadline = threading.Event(), time.monotonic() + TIMEOUT_S
    while [table] not in (seen := [waits_for(conn, pid) for pid in column(conn, pids)]):
        assert time.monotonic() < deadline, seen
        pause.wait(0.01)


# -- a trigger that comes ------------------------------------------------------------------------


def test_a_trigger_that_is_being_created_is_seen(db: Database) -> None:
    """The question what the registry runs waits for it, and so does not come too early."""
    owner = db.connect()
    user = add_user(owner)
    machine = activate(owner, user)
    set_status(owner, machine, "error")
    age(owner, machine, entered_error=timedelta(hours=1))
    db.connect("postgres").execute(
        "create function public.of_another() returns trigger language plpgsql"
        " as $$ begin raise exception 'it has run'; end $$;"
        " alter function public.of_another() owner to authenticated"
    )
    creating = db.connect(autocommit=False)
    creating.execute(
        "create trigger of_another before update on public.cloud_machines"
        " for each row execute function public.of_another()"
    )
    with db.session() as caller:
        called = caller.start("select arbiter.confirm_takeover(%s)", (user.id,))
        wait_until_blocked(caller)
        creating.commit()
        error = called.exception(TIMEOUT_S)
    assert isinstance(error, psycopg.errors.ObjectNotInPrerequisiteState)
    assert str(lease(owner, user).machine_id) == str(machine)


# -- how long -------------------------------------------------------------------------------------

#: A wait for a table ends after 5 s. Far from that, and from ten times as much.
LONG_S = 20.0


@pytest.mark.slow
def test_each_gives_up_on_a_table_that_is_busy(db: Database, trading_db: Database) -> None:
    """An installation while another session makes the schema, and while one locks a table; and who
    needs several tables, of which the one or the other is busy.
    """
    busy, making = db.connect(autocommit=False), trading_db.connect(autocommit=False)
    busy.execute("lock table arbiter.protections, public.signals in access exclusive mode")
    making.execute("create schema arbiter")
    lock = "select arbiter._lock_tables('{{{0}}}', 'access exclusive')"
    both = lock.format("public.traders,public.signals")
    with db.session() as one, db.session() as two, ThreadPoolExecutor(max_workers=2) as pool:
        two.run("begin")
        two.run("savepoint before")
        calls: list[Future[Any]] = [
            pool.submit(arbiter_db.install, trading_db.conninfo()),
            pool.submit(arbiter_db.install, db.conninfo()),
            one.start(lock.format("public.signals")),
            two.start(both),
        ]
        for call in calls:
            error = call.exception(LONG_S)
            assert error is not None
            assert "lock timeout" in str(error)
        # The wait counts from the call: this transaction is older.
        two.run("rollback to before")
        again = two.start(both)
        wait_until_blocked(two)
        busy.execute("select pg_sleep(0.5)")  # longer than it waits for the second table
        busy.rollback()
        again.result(TIMEOUT_S)
