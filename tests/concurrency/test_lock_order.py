"""Where two sessions lock many things: the same order everywhere, so that none deadlocks.

By named steps: one session holds a lock in the middle, another one waits for it, and what that one
has locked by then shows its order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sessions import TIMEOUT_S, Session, wait_until_blocked
from story import (
    User,
    add_machine,
    add_signal,
    add_user,
    count_rows,
    next_bar,
    rows,
    value,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

#: So many that no order but the right one locks exactly the first half by chance.
USERS = 9
MIDDLE = USERS // 2


def people(conn: Conn) -> list[User]:
    """Users without a lease, in the order of their ids."""
    return sorted((add_user(conn) for _ in range(USERS)), key=lambda user: user.id)


@contextmanager
def first_write_in_flight(db: Database, user: User) -> Iterator[Conn]:
    """Another session is creating the user's lease; it has rolled back at the end."""
    conn = db.connect(autocommit=False)
    add_signal(conn, user.trader)
    yield conn
    conn.rollback()


def being_created(conn: Conn, users: list[User]) -> list[bool]:
    """Whose lease another transaction is creating."""
    found = []
    for user in users:
        with conn.transaction(force_rollback=True):
            found.append(
                value(conn, "select arbiter._create_lease(%s, 'first_write')", user.id) is None
            )
    return found


FIRST_HALF = [n <= MIDDLE for n in range(USERS)]
INSERT_FOR_MANY = """
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
select t.id, 'BTCUSDT', '1m', 'buy', %s
  from unnest(%s::uuid[]) with ordinality as t (id, position)
 order by t.position
"""


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_a_write_for_many_users_locks_them_by_their_ids(db: Database, order: str) -> None:
    owner = db.connect()
    users = people(owner)
    traders = [user.trader for user in users][:: 1 if order == "ascending" else -1]
    with db.session() as writer:
        writer.run("set enable_sort = off")  # unless an order is asked for
        with first_write_in_flight(db, users[MIDDLE]):
            write = writer.start(INSERT_FOR_MANY, (next_bar(), traders))
            wait_until_blocked(writer)
            assert being_created(owner, users) == FIRST_HALF
        assert write.result(TIMEOUT_S).rowcount == USERS


def test_two_writes_for_many_users_in_opposite_order_both_succeed(db: Database) -> None:
    owner = db.connect()
    users = people(owner)
    traders = [user.trader for user in users]
    with db.session() as one, db.session() as other:
        with first_write_in_flight(db, users[MIDDLE]):
            first = one.start(INSERT_FOR_MANY, (next_bar(), traders))
            second = other.start(INSERT_FOR_MANY, (next_bar(), traders[::-1]))
            wait_until_blocked(one)
            wait_until_blocked(other)
        assert first.result(TIMEOUT_S).rowcount == USERS
        assert second.result(TIMEOUT_S).rowcount == USERS
    assert count_rows(owner, "public.signals") == 2 * USERS
    assert count_rows(owner, "arbiter.leases") == USERS


TRIGGERS = """
select tgname from pg_trigger
 where tgrelid = 'public.cloud_machines'::regclass and starts_with(tgname, 'arbiter_')
"""


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_registering_creates_leases_by_their_users_ids(db: Database, order: str) -> None:
    """While it waits for one, it has none that a writer for several users would need first."""
    owner = db.connect()
    users = people(owner)
    # As from a dump: rows that the triggers have not seen.
    owner.execute("alter table public.cloud_machines disable trigger user")
    for user in users if order == "ascending" else reversed(users):
        add_machine(owner, user, "stopped")
    for (name,) in rows(owner, TRIGGERS):
        owner.execute(f"alter table public.cloud_machines enable always trigger {name}".encode())
    assert count_rows(owner, "arbiter.leases") == 0
    with db.session() as registering:
        registering.run("set enable_sort = off")  # unless an order is asked for
        with first_write_in_flight(db, users[MIDDLE]):
            registered = registering.start(
                "select arbiter.register_machines('public.cloud_machines')"
            )
            wait_until_blocked(registering)
            assert being_created(owner, users) == FIRST_HALF
        assert registered.result(TIMEOUT_S)
    assert count_rows(owner, "arbiter.leases") == USERS


def wait_until_blocked_by(session: Session, other: Conn) -> None:
    for _ in range(1000):
        if other.info.backend_pid in wait_until_blocked(session).blocked_by:
            return
    raise AssertionError(f"{session} does not wait for {other}")


# -- heartbeats -----------------------------------------------------------------------------------


def test_heartbeats_for_many_do_not_deadlock(db: Database) -> None:
    """Two calls for the same machines, one of which began before a row moved.

    An update puts the row's new version elsewhere, so one call meets it first and the other last.
    """
    owner = db.connect()
    moved, held, last = sorted(
        (add_machine(owner, add_user(owner), "starting") for _ in range(3)), key=str
    )
    # The order in which a scan meets them.
    owner.execute("truncate public.cloud_machines cascade")
    for machine in (moved, held, last):
        owner.execute(
            "insert into public.cloud_machines (id, user_id, status) values (%s, %s, 'starting')",
            (machine, add_user(owner).id),
        )
    owner.execute("vacuum analyze public.cloud_machines")  # so few rows are read by a scan
    mover, holder = db.connect(autocommit=False), db.connect(autocommit=False)
    heartbeat = "select arbiter.heartbeats(%s::text[])"
    touch = "update public.cloud_machines set region = 'ams' where id = %s"
    with db.session() as one, db.session() as other:
        mover.execute(touch, (moved,))
        holder.execute(touch, (held,))
        first = one.start(heartbeat, ([moved, held, last],))
        wait_until_blocked(one)  # for the row that is being moved
        mover.commit()
        while holder.info.backend_pid not in wait_until_blocked(one).blocked_by:
            pass  # it is still seen waiting for the row that was moved
        second = other.start(heartbeat, ([last, moved],))
        wait_until_blocked(other)
        holder.commit()
        assert first.result(TIMEOUT_S) == [(3,)]
        assert second.result(TIMEOUT_S) == [(2,)]
