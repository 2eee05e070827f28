"""protect() and register_machines() at once, each with each, on the same table and on others.

One session has called, and its transaction is open; another one calls and must wait. When the
first one has ended, everything must be as if they had been called one after the other.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from sessions import TIMEOUT_S, wait_until_blocked
from story import activate, add_machine, add_signal, add_user, beat, rows, value

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

TABLES = """
create table public.feeds (id uuid primary key, user_id uuid not null);
create table public.bars (id uuid primary key, user_id uuid not null);
create table public.parent (user_id uuid not null);
create table public.child () inherits (public.parent);
create table public.parted (user_id uuid not null, n integer) partition by list (n);
create table public.fly_apps (id uuid primary key, user_id uuid, status text);
create table public.vms (id uuid primary key, user_id uuid, status text);
alter table public.fly_apps enable row level security;
alter table public.vms enable row level security;
revoke trigger on public.cloud_machines from service_role;
"""
FEEDS, BARS = "arbiter.protect('public.feeds')", "arbiter.protect('public.bars')"
SIGNALS = "arbiter.protect('public.signals')"
APPS = "arbiter.register_machines('public.fly_apps')"
VMS = "arbiter.register_machines('public.vms')"
MACHINES = "arbiter.register_machines('public.cloud_machines')"
UNPROTECT = "arbiter.unprotect('public.signals')"


def prepare(db: Database) -> Conn:
    owner = db.connect()
    owner.execute(TABLES.encode())
    return owner


def is_well(conn: Conn) -> None:
    """Nothing is wrong but what is left to finish()."""
    arbiter_db.finish(conn)
    assert rows(conn, "select * from arbiter.doctor() where state not in ('ok', 'note')") == []
    # No trigger is left on a table that is neither the registry nor protected, and each protected
    # table has a foreign key to the registry.
    assert (
        rows(
            conn,
            "select t.tgrelid::regclass, t.tgname from pg_trigger t"
            " where t.tgname ~ '^[!~]?arbiter_' and t.tgparentid = 0"
            "   and t.tgrelid <> all (array(select protected_table from arbiter.protections))"
            "   and t.tgrelid <> (select registry from arbiter.registry)"
            "   and t.tgrelid <> all"
            "     ('{arbiter.leases,arbiter.handovers,arbiter.amendments,arbiter.settings,"
            "arbiter.protections}'::regclass[])",
        )
        == []
    )
    keys = rows(
        conn,
        "select p.protected_table, k.confrelid::regclass::text from arbiter.protections p"
        "  left join pg_constraint k"
        "    on k.conrelid = p.protected_table and k.conname = 'arbiter_machine_id_fkey'"
        " where p.protected_table <> 'public.parted'::regclass",  # a partitioned table has none
    )
    registry = value(conn, "select registry::text from arbiter.registry")
    assert {parent for _, parent in keys} - {registry} == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "end", "second"),
    [
        (FEEDS, "commit", FEEDS),
        (FEEDS, "rollback", FEEDS),
        (FEEDS, "commit", BARS),
        (FEEDS, "commit", APPS),
        (APPS, "commit", FEEDS),
        (APPS, "rollback", FEEDS),
        (SIGNALS, "commit", SIGNALS),
        (SIGNALS, "commit", APPS),
        (APPS, "commit", SIGNALS),
        (MACHINES, "commit", MACHINES),
        (APPS, "commit", VMS),
        (APPS, "rollback", VMS),
        (UNPROTECT, "commit", APPS),
        (APPS, "commit", UNPROTECT),
    ],
)
def test_one_after_the_other(db: Database, first: str, end: str, second: str) -> None:
    owner = prepare(db)
    with db.session() as one, db.session() as other:
        one.run("begin")
        one.run(f"select {first}")
        called = other.start(f"select {second}")
        wait_until_blocked(other)
        one.run(end)
        called.result(TIMEOUT_S)
    is_well(owner)
    done = [first, second] if end == "commit" else [second]
    tables = {"signals", *(t for t in ("feeds", "bars") for call in done if f"{t}'" in call)}
    tables -= {"signals"} if UNPROTECT in done else set()
    found = rows(owner, "select protected_table::text, protection_id from arbiter.protections")
    assert {table for table, _ in found} == tables
    registry = "cloud_machines"
    for call, table in ((APPS, "fly_apps"), (VMS, "vms"), (MACHINES, "cloud_machines")):
        registry = table if call in done else registry
    assert value(owner, "select registry::text from arbiter.registry") == registry


def test_of_a_table_and_what_inherits_from_it_one_is_protected(db: Database) -> None:
    owner = prepare(db)
    with db.session() as one, db.session() as other:
        one.run("begin")
        one.run("select arbiter.protect('public.child')")
        called = other.start("select arbiter.protect('public.parent')")
        wait_until_blocked(other)
        one.run("commit")
        error = called.exception(TIMEOUT_S)
    assert isinstance(error, psycopg.errors.WrongObjectType)
    assert "cannot be protected beside" in str(error)
    is_well(owner)


def test_neither_waits_for_a_table_that_the_other_one_has(db: Database) -> None:
    """Both wait for the registry, and protect() has locked its table already."""
    owner = prepare(db)
    owner.execute("alter table public.signals drop constraint arbiter_machine_id_fkey")
    machine = add_machine(owner, add_user(owner), "running")
    beating = db.connect(autocommit=False)
    beat(beating, machine)
    with db.session() as one, db.session() as other:
        registered = one.start(f"select {MACHINES}")
        wait_until_blocked(one)
        protected = other.start(f"select {SIGNALS}")
        wait_until_blocked(other)
        beating.commit()
        registered.result(TIMEOUT_S)
        protected.result(TIMEOUT_S)
    is_well(owner)


def test_each_locks_what_both_read_in_the_same_order(db: Database) -> None:
    owner = prepare(db)
    reader = db.connect(autocommit=False)
    reader.execute("lock table arbiter.registry in row exclusive mode")
    with db.session() as one, db.session() as other:
        registered = one.start(f"select {APPS}")
        wait_until_blocked(one)
        protected = other.start(f"select {FEEDS}")
        wait_until_blocked(other)
        reader.commit()
        registered.result(TIMEOUT_S)
        protected.result(TIMEOUT_S)
    is_well(owner)


def test_two_tables_are_unprotected_at_once(db: Database) -> None:
    """Each replaces the function that says whether a table is in mode enforce."""
    owner = prepare(db)
    owner.execute("select arbiter.protect('public.positions')")
    with db.session() as one, db.session() as other:
        one.run("begin")
        one.run(f"select {UNPROTECT}")
        called = other.start("select arbiter.unprotect('public.positions')")
        wait_until_blocked(other)
        one.run("commit")
        called.result(TIMEOUT_S)
    is_well(owner)
    assert value(owner, "select arbiter._is_enforced()") is False


@pytest.mark.parametrize("call", [FEEDS, MACHINES])
def test_a_call_waits_for_a_write_in_flight(db: Database, call: str) -> None:
    """What was written under the old rules is committed before the new ones are there."""
    owner = prepare(db)
    user = add_user(owner)
    machine = activate(owner, user)
    writer = db.connect(autocommit=False)
    if call == FEEDS:
        writer.execute("insert into public.feeds values (gen_random_uuid(), %s)", (user.id,))
    else:
        beat(writer, machine)
    with db.session() as caller:
        called = caller.start(f"select {call}")
        wait_until_blocked(caller)
        writer.commit()
        called.result(TIMEOUT_S)
    is_well(owner)


@pytest.mark.parametrize("call", [FEEDS, MACHINES, "arbiter.unprotect('public.positions')"])
def test_a_call_waits_for_no_write_to_another_table(db: Database, call: str) -> None:
    """Not by arbiter's own tables, either, which each write reads and locks."""
    owner = prepare(db)
    owner.execute("select arbiter.protect('public.positions')")
    user = add_user(owner)
    writer = db.connect(autocommit=False)
    add_signal(writer, user.trader)
    owner.execute("set statement_timeout = '4 s'")  # before lock_timeout
    owner.execute(f"select {call}".encode())
    writer.rollback()


@pytest.mark.parametrize(("call", "then"), [("install", SIGNALS), ("uninstall", MACHINES)])
def test_an_installation_waits_before_it_locks_a_table(db: Database, call: str, then: str) -> None:
    """Otherwise it has what the other session's next call needs."""
    owner = prepare(db)
    owner.execute("drop policy arbiter_claim on public.signals")  # an install locks all tables
    conninfo = make_conninfo(db.conninfo(), application_name="installer")
    with db.session() as one, ThreadPoolExecutor(max_workers=1) as pool:
        one.run("begin")
        one.run("select arbiter.protect('public.parted')")  # locks no other table of the app
        done: Future[object] = pool.submit(getattr(arbiter_db, call), conninfo)
        wait_until_waiting(owner, "installer")
        one.run(f"select {then}")
        one.run("commit")
        done.result(TIMEOUT_S)
    if call == "install":
        is_well(owner)


def test_an_installation_generates_nothing_while_a_registration_waits(db: Database) -> None:
    """Both generate the same functions: an installation that had begun would have them locked."""
    owner = prepare(db)
    writer = db.connect(autocommit=False)
    writer.execute("lock table public.fly_apps in row exclusive mode")
    conninfo = make_conninfo(db.conninfo(), application_name="installer")
    with db.session() as one, ThreadPoolExecutor(max_workers=1) as pool:
        registered = one.start(f"select {APPS}")
        wait_until_blocked(one)
        done: Future[object] = pool.submit(arbiter_db.install, conninfo)
        wait_until_waiting(owner, "installer")
        writer.commit()
        registered.result(TIMEOUT_S)
        done.result(TIMEOUT_S)
    is_well(owner)


def test_no_write_waits_with_an_installation_for_a_change_of_the_settings(db: Database) -> None:
    owner = prepare(db)
    user = add_user(owner)
    owner.execute("drop policy arbiter_claim on public.signals")  # an install locks all tables
    conninfo = make_conninfo(db.conninfo(), application_name="installer")
    with db.session() as one, ThreadPoolExecutor(max_workers=1) as pool:
        one.run("begin")
        one.run("update arbiter.settings set heartbeat_timeout = '40 s'")
        done: Future[object] = pool.submit(arbiter_db.install, conninfo)
        wait_until_waiting(owner, "installer")
        owner.execute("set lock_timeout = '1 s'")  # before the one of the installation
        add_signal(owner, user.trader)
        one.run("commit")
        done.result(TIMEOUT_S)
    is_well(owner)
    assert value(owner, "select count(*) from arbiter._outdated_constants()") == 0


def wait_until_waiting(conn: Conn, application: str) -> None:
    """Wait until a session of that name waits for a lock."""
    query = (
        "select count(*) from pg_stat_activity"
        " where application_name = %s and wait_event_type = 'Lock' and datname = current_database()"
    )
    pause, deadline = threading.Event(), time.monotonic() + TIMEOUT_S
    while not value(conn, query, application):
        assert time.monotonic() < deadline
        pause.wait(0.01)
