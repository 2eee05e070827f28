"""What is recorded with a transaction id does not depend on what the transaction did before: a call
gives it one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import add_machine, add_signal, add_user, column, handovers, value

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]


@pytest.mark.parametrize(
    "level", ["read uncommitted", "read committed", "repeatable read", "serializable"]
)
def test_a_handover_names_its_transaction(db: Database, level: str) -> None:
    owner = db.connect()
    user = add_user(owner)
    add_signal(owner, user.trader)
    machine = add_machine(owner, user, "stopped")
    with owner.transaction():
        owner.execute(f"set transaction isolation level {level}".encode())
        owner.execute(
            "select arbiter._record_handover(l, l.user_id, 'cloud', %s, 'activated')"
            "  from arbiter.leases l where l.user_id = %s",
            (str(machine), str(user.id)),
        )
        xid = value(owner, "select pg_current_xact_id()::text::bigint")
    last = handovers(owner, user)[-1]
    assert (int(last.xid), last.exact) == (xid, level in ("read uncommitted", "read committed"))
    # That of a savepoint where the snapshot may be old.
    assert int(last.frontier) >= xid + (not last.exact)


def test_an_observation_names_its_transaction(db: Database) -> None:
    owner = db.connect()
    xids = []
    for _ in range(2):  # the first one takes a number for the row, which gives it an id, too
        with owner.transaction():
            owner.execute("select arbiter._observe('public.signals', 'cloud_active', '{}')")
            xids.append(value(owner, "select pg_current_xact_id()::text"))
    assert column(owner, "select xid::text from arbiter.observations order by 1") == xids


def test_a_short_id_stands_for_the_nearest_one(db: Database) -> None:
    owner = db.connect()
    xid = value(owner, "select pg_current_xact_id()::text::bigint")
    short = "select arbiter._full_xid((%s::bigint & 4294967295)::text::xid)"
    assert value(owner, short, xid) == xid
