"""Transactions whose snapshot is older than what another session has done since.

At repeatable read and above a query shows the past, while triggers, policies and locks are of the
present. What arbiter makes or decides there must fit the present, or fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import (
    SETTINGS,
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    beat,
    lease,
    rejection,
    rows,
    value,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

LEVELS = ["repeatable read", "serializable"]
by_level = pytest.mark.parametrize("level", LEVELS)


@contextmanager
def old_snapshot(db: Database, level: str) -> Iterator[Conn]:
    """A transaction whose snapshot is taken now; it commits at the end."""
    conn = db.connect()
    conn.execute(f"begin isolation level {level}".encode())
    conn.execute("select")
    assert value(conn, "select current_setting('transaction_isolation')") == level
    yield conn
    conn.execute("commit")


def is_well(conn: Conn) -> None:
    """Nothing is wrong but advice."""
    assert rows(conn, "select object from arbiter.doctor() where state not in ('ok', 'note')") == []


# -- activation -----------------------------------------------------------------------------------


class Rivals:
    """Two machines of one user. The first one holds; by the snapshot its heartbeat has lapsed."""

    def __init__(self, db: Database) -> None:
        self.owner = db.connect()
        self.owner.execute(
            "alter table public.cloud_machines drop constraint cloud_machines_user_id_key"
        )
        self.user = add_user(self.owner)
        self.first = activate(self.owner, self.user)
        self.second = add_machine(self.owner, self.user, "running")
        age(self.owner, self.first, heartbeat=2 * SETTINGS["heartbeat_timeout"])


@by_level
def test_a_machine_that_has_beaten_since_keeps_the_lease(db: Database, level: str) -> None:
    at = Rivals(db)
    with old_snapshot(db, level) as conn:
        beat(at.owner, at.first)
        assert rejection(beat, conn, at.second).sqlstate == "40001"
    now = lease(at.owner, at.user)
    assert (now.machine_id, now.draining_since) == (at.first, None)


@by_level
def test_a_machine_that_is_beating_keeps_the_lease(db: Database, level: str) -> None:
    """Its heartbeat is not committed yet, and may be."""
    at = Rivals(db)
    first = db.connect(autocommit=False)
    with old_snapshot(db, level) as conn:
        beat(first, at.first)
        beat(conn, at.second)
    first.commit()
    now = lease(at.owner, at.user)
    assert (now.machine_id, now.draining_since) == (at.first, None)


@by_level
def test_a_machine_that_is_silent_gives_way_there_too(db: Database, level: str) -> None:
    at = Rivals(db)
    with old_snapshot(db, level) as conn:
        beat(conn, at.second)
    assert lease(at.owner, at.user).draining_to == at.second


@by_level
def test_a_machine_that_came_back_keeps_the_lease(db: Database, level: str) -> None:
    """By the snapshot its row is gone, and its claim has ended."""
    owner = db.connect()
    user = add_user(owner)
    machine = activate(owner, user)
    owner.execute("delete from public.cloud_machines where id = %s", (machine,))
    age(owner, machine, left_running=2 * SETTINGS["stop_grace"])
    with old_snapshot(db, level) as conn:
        owner.execute(
            "insert into public.cloud_machines (id, user_id, status, last_health_check)"
            " values (%s, %s, 'running', now())",
            (machine, user.id),
        )
        with pytest.raises(psycopg.errors.SerializationFailure), conn.transaction():
            add_signal(conn, user.trader)
    now = lease(owner, user)
    assert (str(now.machine_id), now.draining_since) == (str(machine), None)


@by_level
@pytest.mark.parametrize("gone", [False, True])
def test_a_takeover_waits_for_no_machine(db: Database, level: str, gone: bool) -> None:
    """Its row, or the note of one that is gone, is being written, and may be committed."""
    owner = db.connect()
    owner.execute("update arbiter.settings set drain_timeout = '100 ms'")
    user = add_user(owner)
    machine = activate(owner, user)
    writing = db.connect(autocommit=False)
    if gone:
        owner.execute("delete from public.cloud_machines where id = %s", (machine,))
        age(owner, machine, left_running=2 * SETTINGS["stop_grace"])
        writing.execute("update arbiter.machine_notes set left_running_at = null")
    else:
        age(owner, machine, heartbeat=2 * SETTINGS["heartbeat_timeout"])
        beat(writing, machine)
    with old_snapshot(db, level) as conn:
        conn.execute("set local statement_timeout = '15 s'")  # where it would wait
        with conn.transaction(force_rollback=True):
            assert rejection(add_signal, conn, user.trader).sqlstate == "WX007"
        conn.execute("rollback")
        writing.rollback()
        add_signal(conn, user.trader)
    assert lease(owner, user).holder == "local"


# -- policies and triggers ------------------------------------------------------------------------

CLAIM = """
select pg_get_expr(p.polwithcheck, p.polrelid) from pg_policy p
 where p.polrelid = 'public.signals'::regclass and p.polname = 'arbiter_claim'
"""
OPEN = "alter policy arbiter_claim on public.signals with check (true)"


@by_level
@pytest.mark.parametrize("how", [OPEN, "drop policy arbiter_claim on public.signals"])
def test_a_policy_that_was_changed_since_is_made_anew(db: Database, how: str, level: str) -> None:
    owner = db.connect()
    wanted = value(owner, CLAIM)
    with old_snapshot(db, level) as conn:
        owner.execute(how.encode())
        conn.execute("select arbiter.protect('public.signals')")
    assert value(owner, CLAIM) == wanted
    is_well(owner)


@by_level
def test_the_comment_is_of_the_policy_that_is_there(db: Database, level: str) -> None:
    """The snapshot also shows the one that was dropped since."""
    owner = db.connect()
    owner.execute(OPEN.encode())
    with old_snapshot(db, level) as conn:
        owner.execute("drop policy arbiter_claim on public.signals")
        conn.execute("select arbiter.protect('public.signals')")
    is_well(owner)


@by_level
def test_a_policy_of_the_registry_that_was_changed_since_is_made_anew(
    db: Database, level: str
) -> None:
    owner = db.connect()
    with old_snapshot(db, level) as conn:
        owner.execute("alter policy arbiter_registry_insert on public.cloud_machines"
                      " with check (true)")  # fmt: skip
        conn.execute("select arbiter.register_machines('public.cloud_machines')")
    is_well(owner)


@by_level
def test_of_a_protection_that_ended_since_no_policy_is_made(db: Database, level: str) -> None:
    """The snapshot shows two for the table; the newest one says which column names the machine."""
    owner = db.connect()
    owner.execute("alter table public.signals drop constraint arbiter_machine_id_fkey")
    with old_snapshot(db, level) as conn:
        owner.execute("select arbiter.unprotect('public.signals')")
        conn.execute(
            "select arbiter.protect('public.signals', 'trader_id.user_id',"
            " p_machine_column => 'fly_id')"
        )
    assert "fly_id" in value(owner, CLAIM)
    is_well_but_for_an_index(owner)


def is_well_but_for_an_index(conn: Conn) -> None:
    conn.execute("create index on public.signals (fly_id)")
    conn.execute("alter table public.signals validate constraint arbiter_machine_id_fkey")
    is_well(conn)


@by_level
def test_a_trigger_that_was_dropped_since_is_made_anew(db: Database, level: str) -> None:
    owner = db.connect()
    # Another one by that name, so that the snapshot does not take it for the right one.
    owner.execute("comment on trigger arbiter_guard_insert on public.signals is null")
    with old_snapshot(db, level) as conn:
        owner.execute("drop trigger arbiter_guard_insert on public.signals")
        conn.execute("select arbiter.protect('public.signals')")
    is_well(owner)


#: By kind: how to drop one from public.signals, and how to make it.
NAMESAKES = {
    "trigger": (
        "drop trigger mine on public.signals",
        "create trigger mine after delete on public.signals for each row"
        " execute function public.of_the_app()",
    ),
    "column": (
        "alter table public.signals drop column mine",
        "alter table public.signals add column mine text",
    ),
    "constraint": (
        "alter table public.signals drop constraint mine",
        "alter table public.signals add constraint mine check (price > 0)",
    ),
    "index": ("drop index public.mine", "create index mine on public.signals (price)"),
    "policy": ("drop policy mine on public.signals", "create policy mine on public.signals"),
}


@by_level
@pytest.mark.parametrize("kind", NAMESAKES)
def test_the_newest_of_a_name_is_the_one_that_is_there(db: Database, kind: str, level: str) -> None:
    """The snapshot also shows those that were dropped since."""
    drop, make = NAMESAKES[kind]
    owner = db.connect()
    db.connect("postgres").execute("vacuum full pg_catalog.pg_attribute")  # the newest comes last
    owner.execute(
        "create function public.of_the_app() returns trigger language plpgsql"
        " as $$ begin return null; end $$"
    )
    owner.execute(make.encode())
    find = "select object_id from arbiter._find(%s, 'public.signals', 'mine')"
    with old_snapshot(db, level) as conn:
        owner.execute(drop.encode())
        conn.execute(make.encode())
        found = value(conn, find, kind)
    assert found == value(owner, find, kind)
