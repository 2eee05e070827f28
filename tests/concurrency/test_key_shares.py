"""What a foreign key locks, ``for key share``, keeps nothing waiting that changes no key.

An app's own tables may refer to the registry, and a row that is inserted there locks the machine
that it names to the end of its transaction; so does a write of the machine. arbiter waits for such
a lock only where it hands over.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
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
    count_rows,
    handovers,
    lease,
    set_status,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]


class Stage:
    """Ada is local, bob's machine has lapsed, carol's failed long ago, dave's is gone."""

    def __init__(self, db: Database) -> None:
        self.owner = db.connect()
        self.ada, self.bob, self.carol, self.dave = (add_user(self.owner) for _ in range(4))
        add_signal(self.owner, self.ada.trader)
        self.adas = add_machine(self.owner, self.ada, "running")
        self.bobs, self.carols, self.daves = (
            activate(self.owner, user) for user in (self.bob, self.carol, self.dave)
        )
        set_status(self.owner, self.carols, "error")
        self.owner.execute("delete from public.cloud_machines where id = %s", (self.daves,))
        age(self.owner, self.bobs, heartbeat=2 * SETTINGS["heartbeat_timeout"])
        age(self.owner, self.carols, entered_error=timedelta(hours=1))
        age(self.owner, self.daves, left_running=timedelta(hours=1))


def mark(at: Stage) -> None:
    beat(at.owner, at.adas)
    assert str(lease(at.owner, at.ada).draining_to) == str(at.adas)


def beat_for_many(at: Stage) -> None:
    at.owner.execute("select arbiter.heartbeats(%s::text[])", ([at.adas, at.bobs],))


def confirm(at: Stage) -> None:
    at.owner.execute("select arbiter.confirm_takeover(%s)", (at.carol.id,))
    assert lease(at.owner, at.carol).holder == "local"


def take_over(at: Stage) -> None:
    with at.owner.transaction():
        at.owner.execute("set transaction isolation level repeatable read")
        add_signal(at.owner, at.bob.trader)
    assert handovers(at.owner, at.bob)[-1].reason == "heartbeat_lapsed"


def take_over_from_one_that_is_gone(at: Stage) -> None:
    with at.owner.transaction():
        at.owner.execute("set transaction isolation level repeatable read")
        add_signal(at.owner, at.dave.trader)
    assert handovers(at.owner, at.dave)[-1].reason == "machine_stopped"


def change_settings(at: Stage) -> None:
    at.owner.execute("update arbiter.settings set heartbeat_timeout = '40 s'")


#: What is done, and the rows that another transaction has locked.
CASES: dict[str, tuple[Callable[[Stage], None], str]] = {
    "mark of a drain": (mark, "arbiter.leases"),
    "mark of a drain to a machine": (mark, "public.cloud_machines"),
    "heartbeats": (beat_for_many, "public.cloud_machines"),
    "yes to a takeover": (confirm, "public.cloud_machines"),
    "takeover": (take_over, "public.cloud_machines"),
    "takeover from one that is gone": (take_over_from_one_that_is_gone, "arbiter.machine_notes"),
    "settings": (change_settings, "arbiter.settings"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_does_not_wait(db: Database, case: str) -> None:
    do, table = CASES[case]
    at = Stage(db)
    other = db.connect(autocommit=False)
    locked = other.execute(f"select from {table} for key share".encode())
    assert locked.rowcount >= 1
    at.owner.execute("set statement_timeout = '10 s'")
    do(at)


def test_trimming_leaves_what_is_locked(db: Database) -> None:
    """To delete it would wait."""
    owner = db.connect()
    owner.execute(
        "insert into arbiter.observations (observed_at, protected_table, code, detail, xid)"
        " select now(), 'public.signals'::regclass, 'cloud_active', '{}', '3'"
        " from generate_series(1, 1010)"
    )
    other = db.connect(autocommit=False)
    other.execute("select from arbiter.observations order by observation_id limit 3 for key share")
    owner.execute("set statement_timeout = '10 s'")
    owner.execute("select arbiter._trim_observations('public.signals')")
    assert count_rows(owner, "arbiter.observations") == 1003
