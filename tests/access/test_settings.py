"""Settings of the caller's transaction are after a call what they were before it.

Inside, functions set lock_timeout, row_security, search_path and the planner's settings. What
leaked would bound the caller's own locks, or turn its own queries into errors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import (
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    beat,
    rejection,
    rows,
    set_status,
)

if TYPE_CHECKING:
    from conftest import Database, Templates

# By this way, because the package's attribute `install` is the function.
installer = importlib.import_module("arbiter_db.install")

Conn = psycopg.Connection[Any]

#: Other values than the defaults, and than those that arbiter sets.
OWN = """
set local lock_timeout = '7 s';
set local search_path = public;
set local row_security = on;
set local enable_seqscan = on;
set local enable_nestloop = on;
set local jit = on;
"""

#: What a client or the owner may call.
PUBLIC = """
select p.oid::regprocedure::text from pg_proc p
 where p.pronamespace = 'arbiter'::regnamespace and p.proname !~ '^(_|tg_)'
"""


class Stage:
    """Ada is local, bob's machine holds, carol's is in error since long, dave has no lease."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.owner = db.connect()
        self.ada, self.bob, self.carol, self.dave = (add_user(self.owner) for _ in range(4))
        add_signal(self.owner, self.ada.trader)
        self.bobs, self.carols = activate(self.owner, self.bob), activate(self.owner, self.carol)
        set_status(self.owner, self.carols, "error")
        age(self.owner, self.carols, entered_error=timedelta(hours=1))
        self.owner.execute(
            "select arbiter.protect('public.positions', p_verbs => '{insert,update}')"
        )
        self.owner.execute(
            "insert into public.positions (user_id, symbol) values (%s, 'ETH')", (self.ada.id,)
        )


@pytest.fixture(scope="module")
def shared(templates: Templates) -> Iterator[Stage]:
    """For all calls, as each is rolled back."""
    with templates.clone("installed") as database:
        yield Stage(database)


def settings(conn: Conn) -> dict[str, str]:
    found = rows(conn, "select name, setting from pg_settings")
    found += rows(
        conn,
        "select 'arbiter.documented_before', current_setting('arbiter.documented_before', true)",
    )
    return dict(found)


Call = Callable[[Conn, Stage], object]


def sql(statement: str) -> Call:
    def run(conn: Conn, at: Stage) -> None:
        names = {"bob": at.bob.id, "carol": at.carol.id, "bobs": at.bobs, "ada": at.ada.id}
        conn.execute(statement.encode(), names)

    return run


CALLS: dict[str, Call] = {
    "version()": sql("select arbiter.version()"),
    "claimed_user_id()": sql("select arbiter.claimed_user_id()"),
    "claimed_machine_id()": sql("select arbiter.claimed_machine_id()"),
    "status(text)": sql("select arbiter.status(%(bob)s)"),
    "status(uuid)": sql("select arbiter.status(%(bob)s::uuid)"),
    "confirm_takeover(text)": sql("select arbiter.confirm_takeover(%(carol)s)"),
    "confirm_takeover(uuid)": sql("select arbiter.confirm_takeover(%(carol)s::uuid)"),
    "heartbeat(text)": sql("select arbiter.heartbeat(%(bobs)s)"),
    "heartbeat(uuid)": sql("select arbiter.heartbeat(%(bobs)s::uuid)"),
    "heartbeats(text[])": sql("select arbiter.heartbeats(array[%(bobs)s]::text[])"),
    "register_machines(regclass,name,name,name,name,jsonb,text[],name,text[])": sql(
        "select arbiter.register_machines('public.cloud_machines')"
    ),
    "protect(regclass,text,text[],name,text,text,boolean)": sql(
        "select arbiter.protect('public.signals', p_mode => 'observe')"
    ),
    "unprotect(regclass)": sql("select arbiter.unprotect('public.signals')"),
    "amend(regclass,text)": sql("select arbiter.amend('public.signals', 'why')"),
    "audit(regclass,boolean)": sql("select * from arbiter.audit('public.signals', true)"),
    "doctor()": sql("select * from arbiter.doctor()"),
    "expose(name)": sql("select arbiter.expose()"),
    "unexpose(name)": sql("select arbiter.unexpose()"),
    "add_client_role(name)": sql("select arbiter.add_client_role('authenticator')"),
    "remove_client_role(name)": sql("select arbiter.remove_client_role('authenticator')"),
}
OTHERS: dict[str, Call] = {
    "lock tables": sql("select arbiter._lock_tables('{public.signals,public.traders}', 'share')"),
    "detach all": sql("select * from arbiter._detach_all(true)"),
    "first write": lambda conn, at: add_signal(conn, at.dave.trader),
    "write of the holder": lambda conn, at: add_signal(conn, at.ada.trader),
    "write of the machine": lambda conn, at: add_signal(conn, at.bob.trader, "cloud", at.bobs),
    "first machine": lambda conn, at: beat(conn, add_machine(conn, at.dave, "running")),
    "update": sql("update public.positions set quantity = 2"),
    "machines gone": sql("truncate public.cloud_machines cascade"),
    "provenance": lambda conn, at: rejection(
        within, conn, "update public.signals set trader_id = gen_random_uuid()"
    ),
    "rejected write": lambda conn, at: rejection(in_savepoint, conn, at),
}


def within(conn: Conn, statement: str) -> None:
    with conn.transaction():
        conn.execute(statement.encode())


def in_savepoint(conn: Conn, at: Stage) -> None:
    with conn.transaction():
        add_signal(conn, at.bob.trader)


def test_each_function_that_can_be_called_is_tried(shared: Stage) -> None:
    names = {name.removeprefix("arbiter.") for (name,) in rows(shared.owner, PUBLIC)}
    assert names == set(CALLS)


@pytest.mark.parametrize("level", ["read committed", "repeatable read"])
@pytest.mark.parametrize("name", [*CALLS, *OTHERS])
def test_a_call_leaves_the_settings_alone(shared: Stage, name: str, level: str) -> None:
    conn = shared.owner
    with conn.transaction(force_rollback=True):
        conn.execute(f"set transaction isolation level {level}".encode())
        conn.execute(OWN.encode())
        before = settings(conn)
        ({**CALLS, **OTHERS})[name](conn, shared)
        assert settings(conn) == before


def test_a_migration_of_the_app_leaves_the_settings_alone(db: Database) -> None:
    """Tools run it in one transaction, and go on with the session; so do poolers."""
    conn = db.connect()
    conn.execute("do 'begin end'")  # plpgsql has settings of its own
    before = settings(conn)
    for text in installer.migration_texts():
        with conn.transaction():
            conn.execute(text.encode())
        assert settings(conn) == {**before, "arbiter.documented_before": ""}


def test_the_comparison_sees_a_leak(shared: Stage) -> None:
    with shared.owner.transaction(force_rollback=True):
        before = settings(shared.owner)
        shared.owner.execute("select set_config('lock_timeout', '1ms', true)")
        assert settings(shared.owner) != before


#: What functions set beside search_path. With row_security off a hidden row is an error; the
#: planner's settings keep plans from depending on statistics; a lock_timeout bounds a wait; the
#: notices of ``drop ... if exists`` are not for the caller.
GUARD = ["row_security=off", "enable_seqscan=off"]
OWNERS = ["row_security=off", "lock_timeout=5s"]
SET = {
    "_activate_template()": GUARD,
    "_build_policies(regclass)": ["client_min_messages=warning"],
    "_create_lease(text,text)": ["lock_timeout=1ms"],
    "_detach_all(boolean)": ["lock_timeout=5s"],
    "_drop_guard(integer)": ["client_min_messages=warning"],
    "_guard_1()": GUARD,
    "_guard_2()": GUARD,
    "_guard_template()": GUARD,
    "_lock_tables(regclass[],text)": ["lock_timeout=5s"],
    "_make_view(name,text,text,text)": ["client_min_messages=warning"],
    "_note_template()": ["row_security=off"],
    "_provenance_1()": GUARD,
    "_provenance_2()": GUARD,
    "_provenance_template()": GUARD,
    "_share_lease_bounded(text,text,text)": ["lock_timeout=2s"],
    "_stamp_template()": ["row_security=off"],
    "add_client_role(name)": ["lock_timeout=5s"],
    "audit(regclass,boolean)": ["row_security=off", "enable_nestloop=off", "jit=off"],
    "confirm_takeover(text)": ["row_security=off"],
    "protect(regclass,text,text[],name,text,text,boolean)": OWNERS,
    "register_machines(regclass,name,name,name,name,jsonb,text[],name,text[])": OWNERS,
    "remove_client_role(name)": ["lock_timeout=5s"],
    "status(text)": ["row_security=off"],
    "tg_announce()": ["lock_timeout=100ms"],
    "tg_protections()": ["row_security=off"],
    "tg_registry_activate()": GUARD,
    "tg_registry_note()": ["row_security=off"],
    "tg_registry_stamp()": ["row_security=off"],
    "tg_settings()": ["row_security=off"],
    "unprotect(regclass)": OWNERS,
}


def test_functions_set_what_was_reviewed(shared: Stage) -> None:
    """Copies of templates, too, which get their settings from the template."""
    found = rows(
        shared.owner,
        "select p.oid::regprocedure::text, array_remove(p.proconfig, %s) from pg_proc p"
        " where p.pronamespace = 'arbiter'::regnamespace",
        "search_path=pg_catalog, pg_temp",
    )
    assert {name.removeprefix("arbiter."): said for name, said in found if said} == SET
