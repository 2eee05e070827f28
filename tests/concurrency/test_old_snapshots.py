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
